"""What enters a gradient non-linearly: how far rounding moves it where values are extreme or functions have kinks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from comparing import codecs, compressed, gradients, made
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from lightning_tinykg import compress_activations
from lightning_tinykg.activations.repeatable import EXACT, REPEATABLE
from lightning_tinykg.bits import BitPlan

BITS = (8, 4, 2, 1)


def wide(spread: float) -> Tensor:
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)) * spread
    return x.requires_grad_()


def error(function: Callable[[Tensor], Tensor], x: Tensor, bits: int) -> float:
    def loss() -> Tensor:
        return function(made(x)).sum()

    (want,) = gradients(loss, [x])
    draws = [compressed(loss, [x], bits, seed=seed)[0][0] for seed in range(5)]
    return sum(float((got - want).norm() / want.norm()) for got in draws) / len(draws)


def gated(z: Tensor, of_what_is_left: Callable[[Tensor], Tensor]) -> Tensor:
    left = 1 - z
    rows = left * 3
    return rows + of_what_is_left(left)


class Fragile(NamedTuple):
    """A result whose rounding would be blown up.

    Attributes:
        made: of scores.
        used: blows it up.
    """

    made: Callable[[Tensor], Tensor]
    used: Callable[[Tensor], Tensor]


def softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)


FRAGILE = {
    "bpr": Fragile(torch.sigmoid, lambda p: -(p + 1e-10).log()),
    "negative": Fragile(torch.sigmoid, lambda p: -(1 - p + 1e-10).log()),
    "clamped": Fragile(torch.sigmoid, lambda p: -p.clamp(min=1e-9).log()),
    "clamped in numpy's words": Fragile(torch.sigmoid, lambda p: -p.clip(1e-9, 1 - 1e-6).log()),
    "binary cross entropy": Fragile(torch.sigmoid, lambda p: F.binary_cross_entropy(p, (p > 0.5).to(p.dtype))),
    "view first": Fragile(torch.sigmoid, lambda p: -(p.view(-1) + 1e-10).log()),
    "cross entropy": Fragile(softmax, lambda p: -(p + 1e-15).log()[:, 0]),
    "picked": Fragile(softmax, lambda p: -(p.gather(1, torch.zeros(40, 1, dtype=torch.int64)) + 1e-9).log()),
    "picked by index": Fragile(softmax, lambda p: -(p[torch.arange(40), 3] + 1e-9).log()),
    "softplus": Fragile(torch.exp, lambda e: (1 + e).log()),
    "sigmoid by hand": Fragile(lambda x: (-x).exp(), lambda e: 1 / (1 + e)),
    "two steps": Fragile(torch.sigmoid, lambda p: -(1 - p).clamp(min=1e-9).log()),
    "both sides": Fragile(torch.sigmoid, lambda p: -torch.stack([p, 1 - p]).clamp(min=1e-9).log()),
    "a gate, of which a logarithm is taken too": Fragile(
        torch.sigmoid, lambda z: gated(z, lambda left: -(left + 1e-10).log())
    ),
    "odds": Fragile(torch.sigmoid, lambda p: 1 / p),
    "bounded above": Fragile(torch.exp, lambda e: e.clamp(max=10.0)),
    "quotient": Fragile(torch.exp, lambda e: 3.0 / (e + 1e-6)),
    "power": Fragile(torch.sigmoid, lambda p: (p + 1e-6) ** -0.5),
    "squared": Fragile(torch.sigmoid, lambda p: -(1 - p**2 + 1e-6).log()),
    "squared by name": Fragile(torch.sigmoid, lambda p: -(1 - p.square() + 1e-6).log()),
    "entropy": Fragile(softmax, torch.special.entr),
    "cross entropy of itself": Fragile(softmax, lambda p: torch.xlogy(p.detach(), p + 1e-12)),
    "divergence": Fragile(softmax, lambda p: F.kl_div(torch.zeros_like(p), p, reduction="none")),
    "a variance": Fragile(torch.exp, lambda e: F.gaussian_nll_loss(torch.zeros_like(e), torch.ones_like(e), e)),
    "a rate": Fragile(torch.exp, lambda e: F.poisson_nll_loss(e, torch.ones_like(e), log_input=False)),
}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("spread", [1.0, 8.0])
@pytest.mark.parametrize("name", FRAGILE)
def test_fragile_results(name: str, spread: float, bits: int) -> None:
    """The first is off by several times the gradient, at 8 bits and a spread of 8, if it is rounded."""
    assert error(lambda x: FRAGILE[name].used(FRAGILE[name].made(x)), wide(spread), bits) < 0.01


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", FRAGILE)
def test_fragile_results_that_are_made_again_of_rounded_rows(name: str, bits: int) -> None:
    """Once it is known what they are for, the exact rows have gone, and are not to be had for less than the result."""
    draw = torch.Generator().manual_seed(0)
    entities = torch.randn(500, 64, generator=draw).requires_grad_()
    users, other = (torch.randn(rows, 64, generator=draw).requires_grad_() for rows in (40, 1000))

    def loss() -> Tensor:
        result = FRAGILE[name].made(made(users) @ entities.t())
        others = [made(other) * k for k in range(1, 5)]
        between = torch.stack([(rows * rows.detach()).sum() for rows in others]).sum()
        return FRAGILE[name].used(result).mean() + 0 * between

    want = gradients(loss, [users])[0]  # of which nothing else that is rounded is a factor
    for seed in range(3):
        assert (compressed(loss, [users], bits, seed=seed)[0][0] - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize("bits", BITS)
def test_a_sigmoid_that_is_made_again_is_as_exact_as_what_its_loss_is_given(bits: int) -> None:
    """TuckER's loss: scores of all entities, so wide that some are 0 or 1 to the last bit, of a few rows that are kept.

    The sigmoid's result is to be made of rows in 8 bits, the cross entropy's input, the same, of exact ones.
    """
    draw = torch.Generator().manual_seed(0)
    entities = torch.randn(3000, 64, generator=draw).requires_grad_()
    relations = torch.randn(64, 64, 64, generator=draw).requires_grad_()
    head, target = torch.randint(3000, (64,), generator=draw), torch.rand(64, 3000, generator=draw) < 0.01

    def loss() -> Tensor:
        x = F.dropout(F.batch_norm(entities[head], None, None, training=True), 0.3)
        x = torch.bmm(x.unsqueeze(1), F.dropout(relations, 0.4)).squeeze(1)
        x = F.dropout(F.batch_norm(x, None, None, training=True), 0.5)
        return F.binary_cross_entropy(torch.sigmoid(x @ entities.t()), target.float())

    want = torch.cat([gradient.flatten() for gradient in gradients(loss, [entities, relations])])
    got = torch.cat([gradient.flatten() for gradient in compressed(loss, [entities, relations], bits)[0]])
    assert (got - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize("bits", BITS)
def test_a_sigmoid_that_is_made_of_rounded_rows_is_made_of_exact_ones_then(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own rows are the least bytes in few bits, and what these are made of, by such an op, has to be exact."""
    monkeypatch.setitem(REPEATABLE, torch.where, replace(REPEATABLE[torch.where], carries=EXACT))
    draw = torch.Generator().manual_seed(0)
    entities = torch.randn(3000, 63, generator=draw).requires_grad_()
    rows = torch.randn(64, 32, generator=draw).requires_grad_()
    target, other = torch.rand(64, 3000, generator=draw) < 0.01, torch.ones(64, 32)

    def loss() -> Tensor:
        h = made(rows)
        picked = torch.cat([torch.where(h > 0, h, other), torch.where(h < 0, h, other)], dim=1)
        x = picked[:, 1:]  # a part of it, which keeps its code when all is over
        return F.binary_cross_entropy(torch.sigmoid(x @ entities.t()), target.float())

    want = torch.cat([gradient.flatten() for gradient in gradients(loss, [entities, rows])])
    got = torch.cat([gradient.flatten() for gradient in compressed(loss, [entities, rows], bits)[0]])
    assert (got - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize(("kept", "nbytes"), [("scores", 20_000), ("narrow", 800_000)])
def test_a_sigmoid_behind_what_is_kept_exactly_stays_rounded(kept: str, nbytes: int) -> None:
    """Of what is made again exactly, only what it is made of in the backward has to be exact too.

    The narrow layer's sigmoid is to be made of the wide one's code. What then has to be exact is made of the scores, or
    of that sigmoid, which are kept for it: no reason to keep the wide layer exactly as well.
    """
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(5000, 200, generator=draw).requires_grad_()
    shapes = (200, 80), (80, 40), (40, 1), (20, 64)
    weights = [(torch.randn(shape, generator=draw) / 8).requires_grad_() for shape in shapes]
    slope = torch.tensor([0.25]).requires_grad_()

    def loss() -> Tensor:
        narrow = ((made(rows) @ weights[0]).sigmoid() @ weights[1]).sigmoid()
        if kept == "narrow":
            return F.prelu(torch.cat([narrow - 0.5, narrow - 0.6]), slope).square().sum()
        return F.prelu((narrow @ weights[2]).view(250, 20) @ weights[3], slope).square().sum()

    ledger = compressed(loss, [rows, *weights[:2], slope], 2)[1]
    assert sum(row["stored_bytes"] for row in ledger.rows() if row["codec"] == "exact") == nbytes


@pytest.mark.parametrize("bits", BITS)
def test_a_fragile_result_that_is_tiny_is_exact_whatever_becomes_of_it(bits: int) -> None:
    """Nobody sees through a product that a logarithm is taken of it; a step's scores are too few to matter."""
    nodes, scores = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0)).requires_grad_(), wide(8.0)

    def loss() -> Tensor:
        total = (made(nodes) * made(nodes).detach()).sum()
        weighted = made(scores)[:, 0].sigmoid() * torch.linspace(0.1, 1, 40)
        return total - (weighted + 1e-10).log().sum()

    want = gradients(loss, [scores])[0]
    assert (compressed(loss, [scores], bits, min_bytes=0)[0][0] - want).norm() < 1e-4 * want.norm()


def test_of_fragile_results_few_are_exact() -> None:
    """All together take a 4000th of the step."""
    rows = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def loss() -> Tensor:
        total = (made(rows) * made(rows).detach()).sum()
        for k in range(8):
            total = total + (made(rows)[:16, k].sigmoid() * torch.linspace(0.1, 1, 16)).sum()
        return total

    ledger = compressed(loss, [rows], 8, min_bytes=0)[1]
    exact = [row for row in ledger.rows() if row["op"] == "Sigmoid.result" and row["codec"] == "exact"]
    assert len(exact) == 1_024_000 // 4000 // 64


def test_what_is_added_layer_by_layer_is_not_all_held() -> None:
    """The sum of all layers may be given to a logarithm, but their results would be as much as without compression."""
    storages: list[StorageWeakRef] = []
    weights = [(torch.randn(64, 64, generator=torch.Generator().manual_seed(k)) / 8).requires_grad_() for k in range(8)]
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    with compress_activations(8):
        for weight in weights:
            gate = (x @ weight).sigmoid()
            storages.append(StorageWeakRef(gate.untyped_storage()))
            x = x + gate
            del gate
        alive = sum(not storage.expired() for storage in storages)
    x.sum().backward()
    assert alive <= 2  # one for this, one for a finer code


def test_what_only_multiplies_is_rounded() -> None:
    x, h = wide(1.0), wide(1.0)

    def loss() -> Tensor:
        y, rows = made(x), made(h)
        gated, weighted = y.sigmoid() * rows, y.softmax(-1)[:, None] @ rows[:, :, None]
        return gated.sum() + weighted.sum() + (y.exp() / 3).sum() + (made(h).sigmoid() ** 2).sum()

    ledger = compressed(loss, [x, h], 8)[1]
    for name in ("Sigmoid", "Softmax", "Exp"):
        assert codecs(ledger, f"{name}.result") == {"int8"}


def test_a_gate_is_rounded() -> None:
    """Until it is known what ``1 - z`` is for, the sigmoid is held; it is multiplied by."""
    x, h = wide(1.0), wide(1.0)

    def loss() -> Tensor:
        z, old, new = made(x).sigmoid(), made(x), made(h)
        return (z * new + (1 - z) * old).sum()

    ledger = compressed(loss, [x, h], 8)[1]
    assert codecs(ledger, "Sigmoid.result") == {"int8"}


def test_what_leads_to_a_result_that_is_not_seen_is_kept_exactly() -> None:
    """The one that ``vmap`` makes."""
    x = wide(8.0)
    assert error(lambda y: -torch.vmap(lambda p: p + 1e-10)(y.sigmoid()).log(), x, 8) < 0.01


def test_a_gate_is_let_go_of_once_it_has_multiplied() -> None:
    """A plan that names it has no finer code to hold it for, and there is room for all eight."""
    h, wider = wide(1.0), torch.randn(4000, 64).requires_grad_()
    gates = []
    with compress_activations(BitPlan({("*", "Sigmoid.result"): 8}, default=8)):
        total = (made(wider) * made(wider).detach()).sum()
        x = made(h)
        for _ in range(8):
            z = made(h).sigmoid()
            gates.append(StorageWeakRef(z.untyped_storage()))
            x = z * x + (1 - z) * x
        del z
        assert sum(not gate.expired() for gate in gates) <= 1  # the last, until the next op
    (x.sum() + total).backward()


@pytest.mark.parametrize("function", [torch.sin, torch.cos])
@pytest.mark.parametrize("turns", [1, 100, 10_000])
def test_wide_angles(function: Any, turns: float) -> None:
    """A time encoding's angles go round many times; rounded as they are, 100 turns cost the whole gradient."""
    x = (torch.rand(40, 64, generator=torch.Generator().manual_seed(0)) * 6.28 * turns).requires_grad_()
    assert error(function, x, 8) < 0.02
    assert error(function, x, 2) < 0.3


KINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "selu": F.selu,
    "elu 0.1": lambda x: F.elu(x, 0.1),
    "hardswish": lambda x: F.hardswish(x + 3),
    "prelu": lambda x: F.prelu(x, torch.tensor([0.1])),
    "softsign": F.softsign,
    "huber": lambda x: F.huber_loss(x, torch.zeros_like(x), delta=0.01),
}


@pytest.mark.parametrize("name", KINKS)
def test_kinks(name: str) -> None:
    """Values near a kink, in groups whose range is large: rounding moves them across."""
    x = wide(0.02).detach()
    x[:, 0] = 3.0
    assert error(KINKS[name], x.requires_grad_(), 8) < 0.01


class Unknown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * ctx.saved_tensors[0].cos()


@pytest.mark.parametrize("bits", BITS)
def test_custom_functions_get_8_bits(bits: int) -> None:
    x = wide(1.0)
    assert codecs(compressed(lambda: Unknown.apply(made(x)).sum(), [x], bits)[1], "Unknown.tensors") == {"int8"}
    assert error(Unknown.apply, x, bits) < 0.01


def test_who_knows_a_custom_function_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_tinykg.activations.rules import EXACT, RULES

    monkeypatch.setitem(RULES, "Unknown", {"tensors": EXACT})
    assert error(Unknown.apply, wide(1.0), 2) == 0
