"""What is made again: the same bits, from what is kept anyway, as much of it as was asked for."""

import subprocess
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from comparing import assert_exact, codecs, compressed, gradients, made, weighted
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch_geometric import EdgeIndex
from torch_geometric.nn import FiLMConv, GATConv, GATv2Conv, GENConv, RGCNConv, TransformerConv
from torch_geometric.utils import scatter, softmax

from lightning_tinykg import BitPlan, Ledger, compress_activations
from lightning_tinykg.activations import remaking
from lightning_tinykg.activations.calling import not_in_the_result
from lightning_tinykg.activations.costs import Cost, Costs
from lightning_tinykg.activations.repeatable import Repeatable
from lightning_tinykg.activations.values import Values
from lightning_tinykg.activations.workspace import Workspace
from lightning_tinykg.bits import PlanEntry

NODES, EDGES, WIDTH = 200, 3000, 32

SOURCE = torch.randint(NODES, (EDGES,), generator=torch.Generator().manual_seed(0))
TARGET = torch.randint(NODES, (EDGES,), generator=torch.Generator().manual_seed(1))
ZEROS = torch.zeros(EDGES, 16, dtype=torch.int64)
COLUMNS = torch.stack([SOURCE, TARGET, SOURCE + TARGET], 1) % WIDTH
SOME, FEW = SOURCE[:100], TARGET[:100] * 7
WEIGHT = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(2)) / WIDTH**0.5)


def table(seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(NODES, WIDTH, generator=torch.Generator().manual_seed(seed)) * scale).requires_grad_()


def of_rows(a: Tensor, b: Tensor) -> Tensor:
    return a[SOURCE] + b[TARGET]


CHAINS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "tanh": (lambda a, b: torch.tanh(of_rows(a, b)), "Tanh.result"),
    "slope by name": (lambda a, b: F.leaky_relu(of_rows(a, b), negative_slope=0.3).exp(), "Exp.result"),
    "alpha": (lambda a, b: torch.add(a[SOURCE], b[TARGET], alpha=3).exp(), "Exp.result"),
    "quotient": (lambda a, b: (a[SOURCE] / (b[TARGET].square() + 1.0)).exp(), "Exp.result"),
    "softmax": (lambda a, b: of_rows(a, b).softmax(-1).exp(), "Exp.result"),
    "softmax of edges": (
        lambda a, b: (of_rows(a, b) - a.detach().cummax(0).values[TARGET]).exp(), "Exp.result"
    ),
    "layer norm": (lambda a, b: F.elu(F.layer_norm(of_rows(a, b), (WIDTH,))), "Elu.self"),
    "rms norm": (lambda a, b: F.elu(F.rms_norm(of_rows(a, b), (WIDTH,), eps=1e-3)), "Elu.self"),
    "group norm": (lambda a, b: F.elu(F.group_norm(of_rows(a, b), 4)), "Elu.self"),
    "batch norm": (lambda a, b: F.elu(F.batch_norm(of_rows(a, b), None, None, training=True, eps=0.1)), "Elu.self"),
    "batch norm of before": (
        lambda a, b: F.elu(F.batch_norm(of_rows(a, b), torch.zeros(WIDTH), torch.ones(WIDTH))), "Elu.self"
    ),
    "prelu": (lambda a, b: F.prelu(of_rows(a, b), b[0, :1]).exp(), "Exp.result"),
    "gelu": (lambda a, b: F.gelu(of_rows(a, b), approximate="tanh").exp(), "Exp.result"),
    "linear": (lambda a, b: torch.tanh(F.linear(a[SOURCE], WEIGHT)) * b[TARGET], "Tanh.result"),
    "product": (lambda a, b: (a[SOURCE] @ WEIGHT).exp() * b[TARGET], "Exp.result"),
    "joined": (lambda a, b: torch.cat([a[SOURCE], b[TARGET]], 1).exp(), "Exp.result"),
    "stacked": (lambda a, b: torch.stack([a[SOURCE], b[TARGET]]).exp(), "Exp.result"),
    "repeated": (lambda a, b: (of_rows(a, b).repeat(2, 1)).exp(), "Exp.result"),
    "where": (lambda a, b: torch.where(SOURCE[:, None] > TARGET[:, None], a[SOURCE], b[TARGET]).exp(), "Exp.result"),
    "embedding": (lambda a, b: (F.embedding(SOURCE, a) + b[TARGET]).exp(), "Exp.result"),
    "dropout": (lambda a, b: F.dropout(of_rows(a, b), 0.3).exp(), "Exp.result"),
    "dropout after dropout": (lambda a, b: F.dropout(F.dropout(of_rows(a, b), 0.3), 0.2).exp(), "Exp.result"),
    "rows added up": (lambda a, b: torch.zeros(EDGES, WIDTH).index_add(0, FEW, a[SOME]).exp(), "Exp.result"),
    "rows added up in place": (
        lambda a, b: a.new_zeros(EDGES, WIDTH).index_add_(0, FEW, a[SOME]).exp() * b[TARGET], "Exp.result"
    ),
    "rows scattered": (
        lambda a, b: torch.zeros_like(b[TARGET]).scatter_add(0, FEW[:, None].expand(-1, WIDTH), a[SOME]).exp(),
        "Exp.result",
    ),
    "mean of rows": (lambda a, b: scatter(a[SOME], FEW, 0, EDGES, "mean").exp() * b[TARGET], "Exp.result"),
    "normalized": (lambda a, b: F.normalize(of_rows(a, b), dim=-1).exp(), "Exp.result"),
    "normalized by another": (lambda a, b: F.normalize(of_rows(a, b), p=2, dim=1, eps=1.0).exp(), "Exp.result"),
    "clamped": (lambda a, b: of_rows(a, b).clamp(-1, 0.5).exp(), "Exp.result"),
    "squared": (lambda a, b: (-(of_rows(a, b) ** 2)).exp(), "Exp.result"),
    "centred": (lambda a, b: (a[SOURCE] - b[TARGET].mean(-1, keepdim=True)).exp(), "Exp.result"),
    "summed": (lambda a, b: (a[SOURCE] * b[TARGET].view(EDGES, 4, -1).sum(1).repeat(1, 4)).exp(), "Exp.result"),
    "gathered": (lambda a, b: of_rows(a, b).gather(1, TARGET[:, None] % WIDTH + ZEROS).exp(), "Exp.result"),
    "slices": (lambda a, b: (a[SOURCE][:, :16] * b[TARGET][:, 16:]).exp(), "Exp.result"),
    "slices of what is computed": (lambda a, b: (of_rows(a, b)[:, ::2] - of_rows(a, b)[:, 1::2]).exp(), "Exp.result"),
    "einsum": (lambda a, b: torch.einsum("nd,de->ne", a[SOURCE], WEIGHT).exp() * b[TARGET], "Exp.result"),
    "einsum of a list": (lambda a, b: torch.einsum("ad,df", [a[SOURCE], WEIGHT]).exp() * b[TARGET], "Exp.result"),
    "einsum of heads": (
        lambda a, b: torch.einsum("nhd,hde->nhe", of_rows(a, b).view(-1, 4, 8), WEIGHT.view(4, 8, -1)[..., :8]).exp(),
        "Exp.result",
    ),
    "einsum of three": (lambda a, b: torch.einsum("nd,ne,d->ne", a[SOURCE], b[TARGET], WEIGHT[0]).exp(), "Exp.result"),
    "one hot": (
        lambda a, b: (a[SOURCE] * (F.one_hot(TARGET % WIDTH, WIDTH).float() * 0.9 + 0.1)).exp() * b[TARGET],
        "Exp.result",
    ),
    "several hot": (
        lambda a, b: (a[SOURCE] * torch.zeros(EDGES, WIDTH).scatter_(1, COLUMNS, 0.3)).exp() * b[TARGET], "Exp.result"
    ),
    "several hot beside the zeros": (
        lambda a, b: (a[SOURCE] * torch.zeros(EDGES, WIDTH).scatter(1, COLUMNS, value=0.3)).exp() * b[TARGET],
        "Exp.result",
    ),
    "picked at a place": (lambda a, b: (a.view(NODES, 4, -1)[SOURCE, 1] * b[None, TARGET, :8]).exp(), "Exp.result"),
    "transposed": (lambda a, b: (a[SOURCE].t() * 2 + b[TARGET].t()).exp(), "Exp.result"),
    "a view of it": (lambda a, b: of_rows(a, b).view(EDGES, 4, -1).transpose(1, 2).exp(), "Exp.result"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_is_made_again_with_the_same_bits(name: str) -> None:
    function, op = CHAINS[name]
    a, b = table(0), table(1)

    def loss() -> Tensor:
        torch.manual_seed(0)
        return weighted(function(made(a), made(b)))

    ledger = assert_exact(loss, [a, b, WEIGHT][: 3 if "WEIGHT" in function.__code__.co_names else 2], 32)
    if name != "a view of it":  # transposed: another kernel might run
        assert codecs(ledger, op) == {"recipe"}


@pytest.mark.parametrize("stride", [None, (1, 3)])
def test_what_is_made_of_what_lies_otherwise_lies_as_it_did(stride: tuple[int, ...] | None) -> None:
    """Parts of rounded rows are restored in order, whatever order they were in."""
    x = torch.randn(3, 5) if stride else torch.randn(5, 3).t()
    making = remaking.Making(torch.square, (x,), {}, (3, 5), stride, x.dtype, None)
    made_again, _ = making.run(Workspace())
    assert made_again.stride() == (stride or (5, 1))
    assert torch.equal(made_again, x.square())


@pytest.mark.parametrize(
    ("equation", "shapes", "count"),
    [
        ("nd,de->ne", ((3, 5), (5, 7)), 5),
        ("nd, de", ((3, 5), (5, 7)), 5),
        ("nhd,mhd->hnm", ((3, 4, 5), (7, 4, 5)), 5),
        ("...d,kde->...ke", ((2, 3, 5), (4, 5, 7)), 5),
        ("n...,nd->d...", ((2, 3, 5), (2, 7)), 2),
        ("bij,bij->b", ((2, 3, 5), (2, 3, 5)), 15),
        ("bi,bj->bij", ((2, 3), (2, 5)), 1),
    ],
)
def test_the_work_of_an_einsum_is_what_it_adds_up(equation: str, shapes: tuple[Any, ...], count: int) -> None:
    operands = [SimpleNamespace(layout=SimpleNamespace(shape=shape)) for shape in shapes]
    assert not_in_the_result(equation, *operands) == count


@pytest.mark.parametrize("function", [
    lambda a: torch.zeros(NODES, WIDTH).scatter(1, COLUMNS[:NODES], a[:, :3]),  # of several one is left
    lambda a: torch.ones(NODES, WIDTH).scatter(1, COLUMNS[:NODES], 0.3),
    lambda a: torch.zeros(NODES, WIDTH).scatter(1, COLUMNS[:NODES], 0.3, reduce="add"),
    lambda a: F.one_hot(SOURCE[:NODES] % WIDTH).float() * 0.9,  # of as many classes as there are
])  # fmt: skip
def test_what_is_not_made_again_has_a_code_of_its_own(function: Callable[[Tensor], Tensor]) -> None:
    a = table()
    ledger = assert_exact(lambda: weighted((made(a) * function(made(a))).exp()), [a, WEIGHT][:1], 32)
    assert not codecs(ledger, "Mul.other") & {"recipe", "gather"}, ledger.rows()


@pytest.mark.parametrize("bits", [32, 8, 2])
def test_more_is_made_again_the_more_is_allowed(bits: int) -> None:
    a, b = table(0), table(1)

    def stored(recompute: str) -> tuple[int, set[str]]:
        with compress_activations(bits, recompute=recompute) as ledger:
            h, t = made(a), made(b)
            for _ in range(3):
                h, t = torch.tanh(h @ WEIGHT) * t.sigmoid(), t + h
            weighted(of_rows(h, t).tanh() * h[TARGET])
        return ledger.stored_bytes, {entry.codec for entry in ledger}

    (off, kept), (cheap, _), (aggressive, _) = stored("off"), stored("cheap"), stored("aggressive")
    assert aggressive <= cheap < off
    assert not kept & {"recipe", "gather"}


def test_recompute_is_one_of_three() -> None:
    with pytest.raises(ValueError, match="recompute must be one of off, cheap, aggressive, got 'some'"):
        compress_activations(recompute="some")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype: torch.dtype) -> None:
    """Ops are run again under the autocast that they ran under, in a backward that runs under none, or another."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
    x = torch.randn(NODES, WIDTH)

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype):
            return model(made(x)).float().square().sum()

    ledger = assert_exact(loss, list(model.parameters()), 32)
    assert "recipe" in {entry.codec for entry in ledger}


def test_in_a_backward_under_autocast() -> None:
    a, b = table(0), table(1)

    def gradient(context: Any) -> list[Tensor]:
        with context:
            loss = weighted(torch.tanh(F.linear(made(a)[SOURCE], WEIGHT)) * made(b)[TARGET])
        with torch.autocast("cpu", torch.bfloat16):
            return list(torch.autograd.grad(loss, [a, b, WEIGHT]))

    want = gradient(compress_activations(32, recompute="off"))
    for w, got in zip(want, gradient(compress_activations(32)), strict=True):
        assert torch.equal(w, got)


def test_an_index_made_in_the_forward_is_made_again() -> None:
    """As PyG adds self-loops: edges are left out by a mask, and others joined to the rest."""
    torch.manual_seed(0)
    edges = torch.stack([SOURCE, TARGET])
    conv, x = GATConv(WIDTH, 8, heads=4), table()

    ledger = assert_exact(lambda: weighted(conv(x, edges)), [x, *conv.parameters()], 32)
    indices = [entry for entry in ledger if entry.dtype == "int64" and entry.codec != "held"]
    assert indices
    assert {entry.codec for entry in indices} == {"recipe"}
    assert sum(entry.stored_bytes for entry in indices) == 0


def test_what_is_random_is_not_made_again() -> None:
    a = table()

    def loss() -> Tensor:
        torch.manual_seed(0)
        x = made(a)
        noisy = (x + torch.rand_like(x)) * torch.bernoulli(torch.full_like(x, 0.5))
        return weighted(noisy.exp() * torch.randn_like(x).exp())

    assert_exact(loss, [a], 32)


def test_it_is_made_once_for_all_that_ask(runs: list[remaking.Making]) -> None:
    a = table()
    with compress_activations(32):
        rows = made(a)[SOURCE]
        loss = weighted(rows.sin()) + weighted(rows.cos())
    loss.backward(retain_graph=True)
    assert sum(making.op is torch.Tensor.__getitem__ for making in runs) == 1
    first, a.grad = a.grad, None
    loss.backward()
    assert first is not None
    assert a.grad is not None
    assert torch.equal(first, a.grad)


def test_of_all_that_are_asked_for_together_each_is_made_once(runs: list[remaking.Making]) -> None:
    """An attention's weights, exponentials, denominators and indices: in all far less than the rows they weight."""
    a, convs = table(), [GATConv(WIDTH, WIDTH // 4, heads=4) for _ in range(2)]
    with compress_activations(8):
        x: Tensor = a
        for conv in convs:
            x = F.elu(conv(x, torch.stack([SOURCE, TARGET])))
        loss = weighted(x)
    loss.backward()
    assert {making.op.__name__ for making in runs} >= {"exp", "div", "cat"}
    assert set(Counter(map(id, runs)).values()) == {1}


@pytest.mark.parametrize("bits", [32, 8, 2])
def test_what_starts_from_the_users_alone_is_made_once_at_whatever_widths(
    bits: int, runs: list[remaking.Making]
) -> None:
    """A difference asks for it exactly, the square of it for a few bits: it is exact for both."""
    a, b = table(), torch.randn(WIDTH, WIDTH, requires_grad=True)
    with compress_activations(bits):
        rows = a[SOURCE] @ b
        loss = weighted(rows.square()) + weighted((rows - a[TARGET]).square())
    loss.backward()
    assert sum(making.op.__name__ in ("matmul", "__matmul__") for making in runs) == 1


@pytest.mark.parametrize("bits", [8, 2])
def test_a_layer_of_kgat_is_made_of_its_sums_alone(bits: int) -> None:
    """They start from the user's table, but over the edges they are too much work to make again, and so are rounded."""
    nodes, width = 2000, 64
    a = torch.randn(nodes, width, requires_grad=True)
    first, second = nn.Linear(width, width), nn.Linear(width, width)
    source, target = torch.randint(nodes, (2, 6 * nodes))
    with compress_activations(bits, min_bytes=0) as ledger:
        sums = torch.zeros_like(a).index_add(0, target, a[source] * 0.1)
        loss = (F.leaky_relu(first(a + sums)) + F.leaky_relu(second(a * sums))).square().sum()
    loss.backward()
    assert ledger.stored_bytes < 0.4 * a.nbytes


def of_a_linear(sums: Tensor) -> Tensor:
    return torch.tanh(sums) * sums


def of_a_maximum(sums: Tensor) -> Tensor:
    return torch.zeros(NODES, WIDTH).scatter_reduce(0, TARGET[:, None].expand(-1, WIDTH), sums.tanh(), "amax")


def of_its_order(sums: Tensor) -> Tensor:
    before = sums[torch.arange(EDGES) // 2 * 2]
    return torch.where(before >= sums, sums.exp(), sums * before)


def of_a_norm(sums: Tensor) -> Tensor:
    return torch.linalg.vector_norm(sums.tanh(), ord=float("inf"), dim=1)


@pytest.mark.parametrize("uses", [of_a_linear, of_a_maximum, of_its_order, of_a_norm])
def test_sums_in_any_order_are_made_again_where_a_bit_more_does_not_matter(
    uses: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: neither a maximum's elements nor what was compared is lost if they are not quite what they were."""
    run = remaking.Making._run

    def another_order(self: remaking.Making, workspace: Any) -> Tensor:
        made = run(self, workspace)
        return made * (1 + 1e-6 * torch.randn_like(made)) if "index_added" in str(self.op) else made

    monkeypatch.setattr(remaking.Making, "_run", another_order)
    monkeypatch.setattr(Repeatable, "repeats", lambda self, out: not self.any_order)
    a, gradients, ledger = table(), [], None
    rows = torch.randint(NODES, (2 * EDGES,), generator=torch.Generator().manual_seed(3))
    onto = torch.arange(EDGES).repeat(2)
    onto[EDGES:] = onto[:EDGES] // 2 * 2  # what lies at odd places has one term, and neighbours are the same at times
    rows[1:EDGES:2] = rows[:EDGES:2]
    for context in (nullcontext(), compress_activations(32, recompute="aggressive")):
        with context as given:
            sums = torch.zeros(EDGES, WIDTH).index_add(0, onto, a[rows])
            loss = weighted(uses(sums))
            del sums
        (gradient,) = torch.autograd.grad(loss, a)
        gradients.append(gradient)
        ledger = given
    assert ledger is not None
    plain, compressed = gradients
    assert (compressed - plain).norm() < 1e-5 * plain.norm()
    if uses is of_a_linear:
        assert "recipe" in codecs(ledger, "Tanh.result")
        assert not torch.equal(compressed, plain)


@pytest.mark.parametrize("last", ["sums", "dropout"])
def test_what_is_needed_as_it_was_is_made_of_what_is_kept_as_it_was(last: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a table, and the table neither of sums in any order nor of a mask that may round otherwise."""
    run = remaking.Making._run

    def otherwise(self: remaking.Making, workspace: Any) -> Tensor:
        made = run(self, workspace)
        other = "index_added" in str(self.op) or "mask_and_scale" in str(self.op)
        return made * (1 + 1e-6 * torch.randn_like(made)) if other else made

    monkeypatch.setattr(remaking.Making, "_run", otherwise)
    monkeypatch.setattr(Repeatable, "repeats", lambda self, out: not self.any_order and not self.rounds)
    a, gradients = table(), []
    for context in (nullcontext(), compress_activations(8, recompute="aggressive")):
        torch.manual_seed(0)
        with context as ledger:
            if last == "sums":
                nodes = torch.zeros(NODES, WIDTH).index_add(0, TARGET, a[SOURCE])
            else:
                nodes, _ = torch.native_dropout(a * 2.0, 0.1, True)
            largest = torch.linalg.vector_norm(torch.tanh(nodes)[SOURCE], float("inf"), dim=-1)
            loss = weighted(largest)
            del nodes
        gradients.append(torch.autograd.grad(loss, a)[0])
    plain, compressed = gradients
    assert (compressed - plain).norm() < 0.02 * plain.norm()  # what tanh keeps is rounded
    assert codecs(ledger, "LinalgVectorNorm.self") <= {"gather", "recipe"}
    assert sum(e.stored_bytes for e in ledger if e.op.startswith("LinalgVectorNorm.self")) <= 4 * NODES * WIDTH


@pytest.mark.parametrize("items", [
    lambda mask: (mask[0],),
    lambda mask: (mask[:, :WIDTH].repeat(NODES // 2, 1),),
    lambda mask: (slice(None), mask[0][:WIDTH]),
    lambda mask: (slice(0, 5), mask[0][:WIDTH]),
    lambda mask: (mask[0], torch.arange(int(mask[0].sum())) % WIDTH),
    lambda mask: (SOURCE[:7],),
    lambda mask: (slice(None),),
])  # fmt: skip
def test_a_mask_as_an_index_is_the_places_where_it_holds(items: Callable[[Tensor], tuple[Any, ...]]) -> None:
    """As a GPU has it, which would be waited for to count them."""
    mask = torch.rand(2, NODES, generator=torch.Generator().manual_seed(0)) < 0.3
    rows, index = table(), items(mask)
    want = rows[index]
    assert torch.equal(rows[remaking._places(index, tuple(want.shape))], want)


def test_what_can_be_made_again_is_not_held() -> None:
    a, b = table(0), table(1)
    with compress_activations(32):
        rows = of_rows(made(a), made(b))
        result = torch.tanh(rows)
        loss = weighted(result * result)
        watched = [weakref.ref(rows.untyped_storage()), weakref.ref(result.untyped_storage())]
        del rows, result
        assert [reference() for reference in watched] == [None, None]
    loss.backward()


def error(function: Callable[[Tensor], Tensor], x: Tensor, bits: int, **options: Any) -> tuple[float, Ledger]:
    want = torch.autograd.grad(weighted(function(x)), x)[0]
    errors = []
    for seed in range(5):
        with compress_activations(bits, seed=seed, **options) as ledger:
            loss = weighted(function(x))
        errors.append(float((torch.autograd.grad(loss, x)[0] - want).norm() / want.norm()))
    return sum(errors) / len(errors), ledger


@pytest.mark.parametrize("bits", [8, 4])
def test_a_saturated_function_is_no_worse_than_its_own_code(bits: int) -> None:
    """Of arguments that reach far beyond where tanh is flat, rounding leaves little of what is not."""
    b = table(1)
    wide = table(scale=10.0).detach()

    def function(b: Tensor) -> Tensor:
        h = made(wide)
        gate = torch.tanh(h[SOURCE] + h[TARGET])
        return gate * made(b)[TARGET]

    own, _ = error(function, b, bits, recompute="off")
    again, _ = error(function, b, bits)
    assert own > 0
    assert again < 1.25 * own


def test_at_8_bits_what_bends_is_made_of_tables_in_12() -> None:
    """The rows' own code has 8 bits; a table in 12 is a tenth of the rows, and makes them as exact."""
    a = table()

    def function(x: Tensor) -> Tensor:
        h = made(x)
        return torch.tanh(h[SOURCE] + h[TARGET])

    own, kept = error(function, a, 8, recompute="off")
    again, less = error(function, a, 8)
    assert again < own
    assert codecs(less, "Tanh.result from") == {"int12"}
    assert less.stored_bytes < kept.stored_bytes / 5


def test_a_difference_of_what_is_nearly_equal_is_not_made_of_rounded_values() -> None:
    a = table(scale=0.01)

    def function(x: Tensor) -> Tensor:
        y = made(x) + 1.0
        return (y[SOURCE] - y[TARGET]).square() * y[SOURCE]

    assert error(function, a, 8)[0] < 0.02


@pytest.mark.parametrize(
    "negative",
    [
        lambda x, y: x + (-y),
        lambda x, y: torch.add(x, y, alpha=-1),
        lambda x, y: x + (1 - y),
        lambda x, y: x + torch.cat([-y[:9], -y[9:]]),
    ],
    ids=["minus", "alpha", "from a number", "joined"],
)
def test_nor_is_a_sum_with_a_negative(negative: Callable[[Tensor, Tensor], Tensor]) -> None:
    a = table()
    near = (a + 0.01 * table(1)).detach().requires_grad_()  # each is far wider than they differ

    def function(x: Tensor) -> Tensor:
        one, other = made(x)[SOURCE], made(near)[SOURCE]
        return negative(one, other).square() + 1e-4 * (one * other)

    assert error(function, a, 8)[0] < 0.02


def test_what_a_number_is_taken_from_is_as_exact_as_what_it_was() -> None:
    """Of ``z`` there is a code, and ``1 - z``, ``z - 1`` and ``-z`` take no more."""
    x, h = table(), table()

    def stored(function: Callable[[Tensor], list[Tensor]]) -> int:
        with compress_activations(2) as ledger:
            z, rows = made(x).sigmoid(), made(h)
            sum(weighted(factor * rows) for factor in [z, *function(z)])
        return ledger.stored_bytes

    assert stored(lambda z: [1 - z, z - 1.0, -z, torch.rsub(z, 0.5)]) == stored(lambda z: [z])


def test_layers_that_are_narrow_are_run_again_and_wide_ones_kept() -> None:
    def kept(width: int, recompute: str) -> set[str]:
        layer, x = nn.Linear(width, width), made(torch.randn(50, width))
        with compress_activations(32, recompute=recompute) as ledger:
            layer(made(x)).exp().sum()
        return codecs(ledger, "Exp.result")

    assert kept(64, "cheap") == {"recipe"}
    assert kept(1024, "cheap") == {"exact"}
    assert kept(1024, "aggressive") == {"recipe"}


def test_with_a_checkpoint_in_the_model() -> None:
    a, b = table(0), table(1)

    def layer(h: Tensor, t: Tensor) -> Tensor:
        return F.layer_norm(torch.tanh(of_rows(h, t)) @ WEIGHT, (WIDTH,))

    ledger = assert_exact(
        lambda: weighted(checkpoint(layer, made(a), made(b), use_reentrant=False).exp()), [a, b, WEIGHT], 32
    )
    assert {entry.op for entry in ledger} >= {"Exp.result"}


def test_the_ledger_says_what_it_is_made_of_and_at_what_work() -> None:
    a, b = table(0), table(1)
    with compress_activations(32) as ledger:
        loss = weighted(torch.tanh(of_rows(made(a), made(b))))
    (entry,) = (entry for entry in ledger if entry.op == "Tanh.result")
    assert entry.recipe == "tanh(add(getitem(x)))"
    assert ledger.work >= entry.work >= 3 * EDGES * WIDTH * 4
    assert "tanh(add(getitem(x)))" in str(ledger)
    loss.backward()


@pytest.mark.parametrize(("table_bits", "rows_bits"), [(1, 8), (1, 32), (2, 12), (32, 1)])
def test_under_a_plan_what_is_gone_is_made_of_what_was_kept(table_bits: int, rows_bits: int) -> None:
    """A plan of saves may keep a table in fewer bits than it says of what is made of its rows."""
    a, b = table(0), table(1)
    plan = BitPlan([PlanEntry(table_bits, component="Exp.result"), PlanEntry(rows_bits, component="Mul.*")], default=8)
    with compress_activations(plan, min_bytes=0) as ledger:
        h = made(a).exp()
        rows = h[SOURCE]
        del h
        loss = weighted(rows.relu() * made(b)[TARGET]) + weighted(torch.tanh(rows) * made(b)[TARGET])
        del rows
    loss.backward()
    assert a.grad is not None
    assert a.grad.isfinite().all()
    assert ledger.stored_bytes < ledger.raw_bytes


def of_ones(a: Tensor) -> Tensor:
    return torch.ones(EDGES, WIDTH).index_add(0, FEW, a[SOME])


def of_changed_zeros(a: Tensor) -> Tensor:
    zeros = torch.zeros(EDGES, WIDTH)
    zeros[0] = 1.0
    return zeros.index_add_(0, FEW, a[SOME])


def of_changed_sums(a: Tensor) -> Tensor:
    return torch.zeros(EDGES, WIDTH).index_add(0, FEW, a[SOME]).add_(1.0)


def of_sums_twice(a: Tensor) -> Tensor:
    return torch.zeros(EDGES, WIDTH).index_add_(0, FEW, a[SOME]).index_add_(0, FEW, a[SOME])


def of_twice_the_rows(a: Tensor) -> Tensor:
    return torch.zeros(EDGES, WIDTH).index_add(0, FEW, a[SOME], alpha=2.0)


@pytest.mark.parametrize("sums", [of_ones, of_changed_zeros, of_changed_sums, of_sums_twice, of_twice_the_rows])
def test_only_sums_onto_zeros_are_made_again(sums: Callable[[Tensor], Tensor]) -> None:
    a = table()

    def loss() -> Tensor:
        rows = made(a)  # which is there as long as this runs
        return weighted(sums(rows).exp())

    ledger = assert_exact(loss, [a])
    assert codecs(ledger, "Exp.result") == {"exact"} or sums is of_changed_sums


def test_a_quotient_is_made_of_exact_denominators() -> None:
    """Those that are small beside others of their row would have a large error, and all of the gradient."""
    a = table()
    wide = (4 * table(1)).exp().detach()

    def function(x: Tensor) -> Tensor:
        h, of = made(x), made(wide)
        return (h[SOURCE] / of[TARGET]) * h[TARGET]

    assert error(function, a, 8)[0] < 0.02


NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "normalize": lambda h: F.normalize(h, dim=-1),
    "layer norm": lambda h: F.layer_norm(h, (WIDTH,)),
    "rms norm": lambda h: F.rms_norm(h, (WIDTH,)),
}


@pytest.mark.parametrize(("name", "bits"), [(name, 8) for name in NORMS] + [("layer norm", 4), ("layer norm", 2)])
def test_what_follows_a_norm_is_made_of_its_input(name: str, bits: int) -> None:
    """It is kept once, in 8 bits, whatever the sizes of the rows: each has a scale of its own."""
    a = table()
    sizes = torch.logspace(-3, 3, NODES)[:, None]

    def function(x: Tensor) -> Tensor:
        return F.gelu(NORMS[name](made(x) * sizes)) @ WEIGHT

    own, kept = error(function, a, bits, recompute="off")
    again, less = error(function, a, bits)
    assert codecs(less, "Gelu.self") == {"recipe"}
    assert less.stored_bytes < 0.7 * kept.stored_bytes
    assert "int12" not in {entry.codec for entry in less if entry.stored_bytes}
    assert again < max(1.5 * own, 0.02)


def test_a_row_of_length_one_is_made_of_a_row_in_as_many_bits() -> None:
    """Divided by its length, it has its own error; 8 bits, as a row that is centred wants, would be no gain at 2."""
    a = table()

    def function(x: Tensor) -> Tensor:
        unit = F.normalize(made(x), dim=-1)
        return unit * unit[SOURCE[:NODES]]

    _, ledger = error(function, a, 2, min_bytes=0)
    assert codecs(ledger, "Mul.self") == {"recipe"}
    assert {entry.codec for entry in ledger if entry.stored_bytes > NODES * 4} == {"int4"}


@pytest.mark.parametrize("bits", [32, 8])
def test_over_other_dimensions_rows_are_not_normalized_again(bits: int) -> None:
    """On a CPU it takes 40 times as long as to copy them, or more; and what is normalized has no scale of its own."""
    a = table()
    _, ledger = error(lambda x: F.elu(F.normalize(made(x).view(NODES, 4, 8), dim=1)), a, bits, min_bytes=0)
    assert codecs(ledger, "Elu.self") == {"exact" if bits == 32 else "int8"}


@pytest.mark.parametrize("norm", [
    lambda h: h.norm(dim=0),
    lambda h: torch.norm(h, p=2, dim=0, keepdim=True)[0],
    lambda h: torch.linalg.norm(h, dim=0),
    lambda h: torch.linalg.vector_norm(h, 2, 0),
])  # fmt: skip
def test_the_modulus_of_complex_numbers_is_made_again(norm: Callable[[Tensor], Tensor]) -> None:
    """As in RotatE. It is so by other ops than the forward's, whose norm is slow; so not where all is to be exact."""
    a, b = table(0), table(1)

    def function(x: Tensor) -> Tensor:
        real, imaginary = (made(x)[SOURCE] - b[TARGET]).chunk(2, dim=1)
        return norm(torch.stack([real, imaginary]))

    off_by, ledger = error(function, a, 8, min_bytes=0)
    assert off_by < 1e-6
    assert codecs(ledger, "LinalgVectorNorm.result") == codecs(ledger, "LinalgVectorNorm.self") == {"recipe"}
    exactly = assert_exact(lambda: weighted(function(a)), [a], 32)
    assert codecs(exactly, "LinalgVectorNorm.result") == {"exact"}


@pytest.mark.parametrize("norm", [
    lambda h: h.norm(p=1, dim=0), lambda h: torch.linalg.vector_norm(h, dim=0, dtype=torch.float64),
])  # fmt: skip
def test_other_norms_are_not(norm: Callable[[Tensor], Tensor]) -> None:
    a = table()
    _, ledger = error(lambda x: norm(torch.stack([made(x)[SOURCE], made(x)[TARGET]])), a, 8, min_bytes=0)
    assert not codecs(ledger, "LinalgVectorNorm.result") & {"recipe"}


@pytest.mark.parametrize("bits", [32, 8])
def test_the_logits_of_a_cross_entropy_are_computed_again(bits: int) -> None:
    """Of all items, which are far more than what they are computed of."""
    a, items = table(), nn.Parameter(torch.randn(500, WIDTH, generator=torch.Generator().manual_seed(5)))
    labels = SOURCE[:NODES]

    def function(x: Tensor) -> Tensor:
        h = made(x)
        return F.cross_entropy(h @ items.t(), labels, reduction="none")

    off_by, ledger = error(function, a, bits)
    assert codecs(ledger, "LogSoftmax.result") == {"recipe"}
    assert ledger.stored_bytes < 1.3 * a.nbytes
    assert off_by < (1e-9 if bits == 32 else 0.01)
    assert_exact(lambda: weighted(function(a)), [a, items], 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_under_autocast(dtype: torch.dtype) -> None:
    a, items = table(), nn.Parameter(torch.randn(500, WIDTH, generator=torch.Generator().manual_seed(5)))

    def loss() -> Tensor:
        h = made(a)
        with torch.autocast("cpu", dtype):
            return F.cross_entropy(h @ items.t(), SOURCE[:NODES])

    assert_exact(loss, [a, items], 32)


def test_logits_of_classes_in_the_second_dimension() -> None:
    a = table()

    def function(x: Tensor) -> Tensor:
        logits = (made(x) @ WEIGHT).view(NODES, 8, 4)
        return F.cross_entropy(input=logits, target=SOURCE[: 4 * NODES].view(NODES, 4) % 8, label_smoothing=0.1)

    ledger = assert_exact(lambda: function(a), [a, WEIGHT], 32)
    assert codecs(ledger, "LogSoftmax.result") == {"recipe"}


@pytest.mark.parametrize("bits", [4, 2, 1])
def test_what_is_only_picked_is_worth_its_own_bits(bits: int) -> None:
    """Two thirds of a table's rows take less than the table; that this was computed does not change it."""
    a = table()

    def function(x: Tensor) -> Tensor:
        wide = made(x) + made(x)
        rows = wide[SOURCE[: 2 * NODES // 3]]
        return rows * rows

    assert error(function, a, bits)[1].stored_bytes <= error(function, a, bits, recompute="off")[1].stored_bytes


@pytest.mark.parametrize("bits", [4, 2])
def test_tables_that_rows_are_picked_from_are_computed_again(bits: int) -> None:
    """One for each relation, of the same nodes: each alone is cheaper in a code of its own, all together are not."""
    torch.manual_seed(0)
    layers = nn.ModuleList(FiLMConv(WIDTH, WIDTH, num_relations=10) for _ in range(2))
    a, edges, relations = table(), torch.stack([SOURCE, TARGET])[:, :1200], TARGET[:1200] % 10

    def function(x: Tensor) -> Tensor:
        h = made(x)
        for layer in layers:
            h = F.layer_norm(layer(h, edges, relations), (WIDTH,)).relu()
        return h

    _, at_8 = error(function, a, 8)
    off_by, with_fewer = error(function, a, bits)
    assert with_fewer.stored_bytes <= at_8.stored_bytes
    assert off_by < 0.1


def test_index_select_is_known_when_pyg_has_put_its_own_in_its_place() -> None:
    """RGATConv picks a matrix for each edge by ``torch.index_select``, which PyG replaces when it is imported."""
    code = """
import torch
from torch_geometric.nn import RGATConv
from lightning_tinykg import compress_activations
x, edges, kinds = torch.randn(50, 16).requires_grad_(), torch.randint(50, (2, 400)), torch.randint(3, (400,))
with compress_activations(32) as ledger:
    RGATConv(16, 16, 3)(x, edges, kinds)
print([entry.codec for entry in ledger if entry.op == "Bmm.mat2"])
"""
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert ran.stdout.split() == ["['gather',", "'gather']"], ran.stdout + ran.stderr


@pytest.mark.parametrize("bits", [32, 8])
def test_rows_are_picked_again_by_pygs_edge_index(bits: int) -> None:
    """As by a tensor, where it is not sorted: its rows are tensors of a class of their own."""
    conv, x = GATConv(WIDTH, WIDTH // 4, heads=4, add_self_loops=False), table()
    edge_index = EdgeIndex(torch.stack([SOURCE, TARGET]), sparse_size=(NODES, NODES))
    stored = []
    for edges in (edge_index, edge_index.as_tensor()):
        (want,) = gradients(lambda edges=edges: weighted(conv(x, edges)), [x])
        (got,), ledger = compressed(lambda edges=edges: weighted(conv(x, edges)), [x], bits)
        assert torch.equal(got, want) if bits == 32 else (got - want).norm() < 0.01 * want.norm()
        stored.append(ledger.stored_bytes)
    assert stored[0] <= stored[1]


def test_an_edge_index_that_the_forward_made_is_coded_and_not_held() -> None:
    """Nobody would pay for it otherwise: autograd keeps no index of features, which have no gradient."""
    features, weight = table().detach(), torch.ones(WIDTH, requires_grad=True)
    given = EdgeIndex(torch.stack([SOURCE, TARGET]), sparse_size=(NODES, NODES))
    with compress_activations(32, min_bytes=0) as ledger:
        twice = torch.cat([given, given], dim=1)
        memory = StorageWeakRef(twice.as_tensor().untyped_storage())
        loss = (features.index_select(0, twice[0]) * weight).sum()
        del twice
    assert memory.expired()
    assert [entry.stored_bytes for entry in ledger if entry.op == "Mul.self index"] == [2 * EDGES]  # a byte each
    loss.backward()
    assert torch.allclose(weight.grad, 2 * features[SOURCE].sum(0), atol=1e-3)


def test_what_is_too_much_work_to_compute_is_kept_for_what_is_picked_of_it() -> None:
    """Rows of all layers' outputs: one layer's input is kept, and not twice as many rows in codes of their own."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
    a = table()

    def function(x: Tensor) -> Tensor:
        h = made(x)
        outputs = [h]
        for sums, products in zip(layers[:3], layers[3:], strict=True):
            around = torch.zeros_like(h).index_add(0, TARGET, h[SOURCE])
            h = F.dropout(F.leaky_relu(sums(h + around)) + F.leaky_relu(products(h * around)), 0.1)
            outputs.append(F.normalize(h, dim=-1))
        out = torch.cat(outputs, dim=1)
        return out[SOME[:60]] * (out[FEW[:60] % NODES] - out[FEW[40:] % NODES])

    _, ledger = error(function, a, 2)
    assert "recipe" in {entry.codec for entry in ledger if entry.shape == (60, 4 * WIDTH)}


def test_what_a_layer_makes_of_nodes_is_made_again_of_its_input() -> None:
    """Each edge asks for rows of it several times, and it is still no more than a product of what is kept anyway."""
    torch.manual_seed(0)
    layers = nn.ModuleList(GATv2Conv(WIDTH, 8, heads=4) for _ in range(2))

    def function(x: Tensor) -> Tensor:
        h = made(x)
        for layer in layers:
            h = F.elu(layer(h, torch.stack([SOURCE, TARGET])))
        return h

    _, ledger = error(function, table(), 8)
    nodes = [entry.op for entry in ledger if entry.shape == (NODES, WIDTH) and entry.stored_bytes]
    assert nodes == ["Addmm.mat1", "Elu.self", "Elu.self"]


def test_what_is_made_for_nothing_is_not_kept_for_what_could_not_be_made_of_it() -> None:
    """An exact softmax of edges would want the second layer's input exactly; all else is made of the norm's."""
    torch.manual_seed(0)
    layers = nn.ModuleList(TransformerConv(WIDTH, 8, heads=4, edge_dim=16) for _ in range(2))
    a, edges, of_edges = table(), torch.stack([SOURCE, TARGET])[:, :1200], torch.randn(1200, 16)

    def function(x: Tensor) -> Tensor:
        h = made(x)
        for layer in layers:
            h = F.layer_norm(layer(h, edges, of_edges), (WIDTH,)).relu()
        return h

    _, ledger = error(function, a, 8)
    nodes = [entry.op for entry in ledger if entry.shape == (NODES, WIDTH) and entry.stored_bytes >= NODES * WIDTH]
    assert nodes == ["Addmm.mat1", "NativeLayerNorm.input", "NativeLayerNorm.input"]


def test_what_rows_are_picked_from_may_have_a_code_of_its_own() -> None:
    """A few rows of a layer of KGAT, in mixed precision, where the whole of it is too much work: its code is less."""
    generator = torch.Generator().manual_seed(0)
    nodes, edges, width = 1000, 10_000, 64
    table = torch.randn(nodes, width, generator=generator).requires_grad_()
    relations = torch.randn(20, width, generator=generator).requires_grad_()
    source, target = torch.randint(nodes, (2, edges), generator=generator)
    kinds = torch.randint(20, (edges,), generator=generator)
    some = torch.randint(nodes, (3, 200), generator=generator)
    linears = [nn.ModuleList(nn.Linear(width, width) for _ in range(2)) for _ in range(3)]

    def layers() -> Tensor:  # whose results are gone when it returns
        x, outputs = table, [table]
        for sums, products in linears:
            scores = (x[source] * torch.tanh(x[target] + relations[kinds])).sum(-1)
            message = softmax(scores, target, num_nodes=nodes)[:, None] * x[source]
            around = torch.zeros_like(x, dtype=message.dtype).index_add(0, target, message)
            x = F.dropout(F.leaky_relu(sums(x + around)) + F.leaky_relu(products(x * around)), 0.1)
            outputs.append(F.normalize(x))
        return torch.cat(outputs, dim=1)

    with torch.autocast("cpu", torch.bfloat16), compress_activations(2) as ledger:
        out = layers()
        user, positive, negative = (out[rows] for rows in some)
        loss = F.logsigmoid((user * positive).sum(-1) - (user * negative).sum(-1)).mean()
    loss.backward()
    picked_from = [e for e in ledger if e.shape == (nodes, width) and e.stored_bytes and "from" in e.op]
    assert picked_from[-1].op == "Mul.other from"
    assert picked_from[-1].codec == "int4"


def test_with_fewer_bits_as_much_is_made_again() -> None:
    """What a code of 2 bits saves in bytes would be no work's worth, and what it costs the gradient a lot."""
    torch.manual_seed(0)
    layers = [module for _ in range(2) for module in (nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.GELU())]
    model, a = nn.Sequential(*layers), table()

    def function(x: Tensor) -> Tensor:
        return model(made(x)) @ WEIGHT

    (most, at_8), (least, at_2) = (error(function, a, bits) for bits in (8, 2))
    assert at_2.stored_bytes <= at_8.stored_bytes
    assert least < 1.5 * most


@pytest.mark.parametrize("bits", [4, 2, 1])
def test_fewer_bits_are_not_more_bytes(bits: int) -> None:
    """Of a perceptron before a norm each tensor alone is cheaper in a code of its own, and not all together."""
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.ReLU()]
    model, a = nn.Sequential(*layers), table()

    def function(x: Tensor) -> Tensor:
        return model(made(x)) @ WEIGHT

    (most, at_8), (least, with_fewer) = (error(function, a, width) for width in (8, bits))
    assert with_fewer.stored_bytes <= at_8.stored_bytes
    assert least < 1.5 * most


@pytest.mark.parametrize("bits", [4, 2, 1])
@pytest.mark.parametrize("activation", [F.relu, F.gelu])
@pytest.mark.parametrize("scored", [False, True])
def test_a_stack_in_fewer_bits_is_not_more_bytes(scored: bool, activation: Any, bits: int) -> None:
    """One finer code of its input serves all layers, and the rows that are picked of the last: each alone is dearer."""
    torch.manual_seed(0)
    layers, a = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3)), table()

    def function(x: Tensor) -> Tensor:
        h = made(x)
        for layer in layers:
            h = activation(layer(h))
        users, liked, other = (h[rows[:300]] for rows in (SOURCE, TARGET, TARGET.flip(0)))
        return F.logsigmoid((users * liked).sum(-1) - (users * other).sum(-1)) if scored else h

    (most, at_8), (least, with_fewer) = (error(function, a, width) for width in (8, bits))
    assert with_fewer.stored_bytes <= at_8.stored_bytes
    assert max(most, least) < 0.01


@pytest.mark.parametrize("turned", [False, True])
def test_what_shares_a_scale_with_other_rows_is_not_made_of_a_norms_input(turned: bool) -> None:
    """Beside a large row, a small one has lost all that its norm would blow up."""
    width = 64 if turned else 4
    sizes = torch.logspace(-3, 3, 4096)[torch.randperm(4096, generator=torch.Generator().manual_seed(0))]
    x = (torch.randn(width, 4096) * sizes).t() if turned else torch.randn(4096, width) * sizes[:, None]
    weight = nn.Parameter(torch.ones(width))

    def function(x: Tensor) -> Tensor:
        return F.elu(F.layer_norm(made(x) if not turned else made(x.t()).t(), (width,), weight))

    _, ledger = error(function, x.requires_grad_(), 8)
    assert "recipe" not in codecs(ledger, "Elu.self")


def test_a_batch_norm_that_is_run_again_leaves_its_statistics_alone() -> None:
    """Also where it runs twice in a forward, and they have changed since the first."""
    norm, plain = nn.BatchNorm1d(WIDTH), nn.BatchNorm1d(WIDTH)
    a, b = table(0), table(1)
    with compress_activations(32) as ledger:
        loss = F.elu(norm(made(a))).sum() + F.elu(norm(made(b))).sum()
    assert codecs(ledger, "Elu.self") == {"recipe"}
    loss.backward()
    (F.elu(plain(made(a))).sum() + F.elu(plain(made(b))).sum()).backward()
    for name, value in plain.state_dict().items():
        assert torch.equal(norm.state_dict()[name], value)


def test_a_product_is_made_of_one_rounded_factor_or_of_two_in_12_bits() -> None:
    """Of two in 8, the error of a small product of large factors would be as large as these."""
    a, b, scale = table(0), table(1), nn.Parameter(torch.rand(WIDTH))

    def kept(other: Callable[[], Any], op: str = "Mm.self") -> set[str]:
        with compress_activations(8) as ledger:
            x = made(a)
            x.square().sum() + (x * other() @ WEIGHT).sum()
        return codecs(ledger, op)

    assert kept(lambda: 0.5) == kept(lambda: scale) == {"recipe"}
    assert kept(lambda: made(b[:, :1])) == {"recipe"}
    assert kept(lambda: made(b)) == {"recipe"}  # which is held for a finer code
    assert kept(lambda: made(b), "Mm.self from") == {"int12"}


@pytest.mark.parametrize("bits", [2, 4])
def test_a_layers_input_gets_the_bits_of_the_norm_of_its_output(bits: int) -> None:
    """It has gone when the norm asks for 8 bits, and would be kept beside a code of the layer's output."""
    a = table()
    off, ledger = error(lambda x: F.layer_norm(F.linear(made(x), WEIGHT), (WIDTH,)).relu(), a, bits)
    assert off < 0.02
    assert codecs(ledger, "NativeLayerNorm.input") == {"recipe"}
    assert codecs(ledger, "Mm.self") | codecs(ledger, "Mm.self from") <= {"int8", f"int{bits}"}
    assert ledger.stored_bytes < 1.7 * NODES * WIDTH


def test_no_more_is_held_for_a_finer_code_than_the_largest_tensor() -> None:
    values, tensors = Values(), [torch.randn(100) for _ in range(4)]
    for tensor in tensors:
        values.linger(tensor, 2 * tensor.nbytes)
    assert [values.of(tensor).raw is not None for tensor in tensors] == [False, False, True, True]
    values.linger(torch.randn(1000), 800)
    assert all(values.of(tensor).raw is None for tensor in tensors)
    values.linger(tensors[0], 800)
    values.forget_recipes()
    assert values.of(tensors[0]).raw is None


def test_a_matrix_product_is_not_made_of_two_rounded_factors() -> None:
    """As attention's logits: what adds up may cancel, so of exact ones alone."""
    a, b = table(0), table(1)
    wide = nn.Parameter(torch.randn(NODES, WIDTH))
    with compress_activations(8) as ledger:
        query, key = made(a), made(b)  # which are there still, and could be kept in more bits
        (query @ key.t() @ wide).sum()
    assert codecs(ledger, "Mm.self from") == {"exact"}


def test_in_a_plan_of_saves_a_product_of_two_has_its_own_width() -> None:
    a, b = table(0), table(1)
    with compress_activations(BitPlan([PlanEntry(8, component="*.*")], default=8)) as ledger:
        (made(a) * made(b) @ WEIGHT).sum()
    assert codecs(ledger, "Mm.self") == {"int8"}


@pytest.mark.parametrize(("nodes", "kept"), [(NODES, "recipe"), (4 * NODES, "int8")])
def test_in_a_plan_of_saves_weights_are_exact_where_that_takes_no_more(nodes: int, kept: str) -> None:
    """They are made of two tables of nodes, which are smaller than their own code, or larger."""
    a, b = torch.randn(2, nodes, 4).requires_grad_()
    with compress_activations(BitPlan([PlanEntry(8, component="*.*")], default=8)) as ledger:
        (made(a)[SOURCE] + made(b)[TARGET]).exp().sum()
    assert codecs(ledger, "Exp.result") == {kept}


def test_a_rounded_quotient_is_no_quotient() -> None:
    """Of what is exact alone: of rounded values it would be another whole number."""
    a = table(scale=10.0)

    def function(x: Tensor) -> Tensor:
        h = made(x)
        return torch.div(h[SOURCE], 3.0, rounding_mode="floor") * h[TARGET]

    assert error(function, a, 8)[0] < 0.01


@pytest.mark.parametrize("bits", [32, 8, 4, 2])
def test_the_sums_of_all_relations_are_made_of_one_table(bits: int) -> None:
    """Each alone is not worth keeping the table; from the third relation on it is known that they all ask for it."""
    relations = 10
    layer = RGCNConv(WIDTH, WIDTH, relations)
    edge_index = torch.stack([SOURCE, TARGET])[:, :400]
    kinds = torch.arange(400) % relations
    x = table()

    def stored(recompute: str) -> int:
        with compress_activations(bits, recompute=recompute) as ledger:
            loss = weighted(layer(made(x), edge_index, kinds))
        loss.backward()
        return ledger.stored_bytes

    assert stored("cheap") < 0.55 * stored("off")


def test_what_three_are_wanted_for_is_not_worth_each_of_them() -> None:
    """Of GEN's messages and weights, what a quotient needs exactly is; what else they are made of stays rounded."""
    torch.manual_seed(0)
    nodes, width = 400, 64
    layers = nn.ModuleList(GENConv(width, width) for _ in range(2))
    edges, x = torch.randint(nodes, (2, 2000)), torch.randn(nodes, width)
    with compress_activations(2) as ledger:
        h = made(x.requires_grad_())
        for layer in layers:
            h = layer(h, edges).relu()
    exactly = [entry.op for entry in ledger if entry.codec == "exact" and entry.stored_bytes == 4 * nodes * width]
    assert exactly == ["Div.other from"] * 2


def test_a_table_that_is_needed_at_two_widths_counts_at_the_larger() -> None:
    """12 bits of it are less than the rows' own code, and its elements, which a sine needs, are more."""
    a, pairs = table(), 2 * NODES

    def stored(recompute: str) -> int:
        with compress_activations(8, recompute=recompute) as ledger:
            h = made(a)
            first, second = h[SOURCE[:pairs]], h[TARGET[:pairs]]
            weighted(torch.tanh(first + second.sin()))
        return ledger.stored_bytes

    assert stored("cheap") <= stored("off")


def test_a_leaf_that_the_forward_makes_is_the_users() -> None:
    """As in an inner optimization, which is differentiated: a second backward, where grad mode is on."""

    def run(x: Tensor) -> Tensor:
        y = torch.zeros(NODES, WIDTH, requires_grad=True)
        inner = (torch.tanh(y[SOURCE] + x[TARGET]) ** 2).sum()
        step = torch.autograd.grad(inner, y, create_graph=True)[0]
        return (torch.tanh(y[SOURCE] - step[TARGET]) * x[SOURCE]).sum()

    x = table(scale=0.3)
    want = torch.autograd.grad(run(x), x)[0]
    for bits in (32, 8):
        with compress_activations(bits):
            loss = run(x)
        got = torch.autograd.grad(loss, x)[0]
        assert (got - want).norm() <= (0 if bits == 32 else 0.05) * want.norm()
    with compress_activations(8) as ledger:
        (torch.zeros(NODES, WIDTH, requires_grad=True) * x).sum()
    assert codecs(ledger, "Mul.self") == {"held"}


def test_of_what_is_empty() -> None:
    """A graph without edges of one kind: rows joined to none."""
    a, none = table(), torch.empty(0, dtype=torch.int64)

    def joined() -> Tensor:
        h = made(a)
        rows = torch.cat([h[none].relu() + 1.0, h[SOURCE]])
        return weighted(torch.tanh(rows) * rows)

    assert_exact(joined, [a], 32)


@pytest.mark.parametrize("bits", [32, 2])
def test_dropouts_however_they_are_called(bits: int) -> None:
    a = table()

    def loss() -> Tensor:
        torch.manual_seed(0)
        rows = made(a)[SOURCE]
        by_name = F.dropout(input=rows, p=0.3)
        fused, _ = torch.native_dropout(rows, 0.3, True)
        return weighted(by_name.relu() * fused) + weighted(F.dropout(fused, 0.3, training=False))

    if bits == 32:
        assert_exact(loss, [a], 32)
    else:
        with compress_activations(2) as ledger:
            value = loss()
        value.backward()
        assert a.grad is not None
        assert "dropout(getitem(x))" in {entry.recipe for entry in ledger}


HEADS = nn.MultiheadAttention(WIDTH, 2, dropout=0.2, batch_first=True)


@pytest.mark.parametrize("attention", [
    lambda h: F.scaled_dot_product_attention(h, h.flip(-1), h, dropout_p=0.2),
    lambda h: HEADS(h, h, h, need_weights=False)[0],
])  # fmt: skip
def test_the_dropout_of_an_attention_is_kept_as_a_mask(attention: Callable[[Tensor], Tensor]) -> None:
    """Its ops are within one function: the mask is not seen to be made, the weights can't be made again."""
    a = table()

    def function(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return attention(made(x).view(4, -1, WIDTH))

    off, ledger = error(function, a, 8)
    assert off < 0.02
    assert codecs(ledger, "Mul.other") - {"held"} == {"mask"}
    assert codecs(ledger, "SafeSoftmax.result") == {"int8"}


def test_arguments_and_results_of_other_kinds() -> None:
    """Sparse and complex results, arrays among the arguments: no recipe, and no exception."""
    a = table()

    def loss() -> Tensor:
        h = made(a)
        sparse = h.relu().to_sparse()
        doubled = (sparse + sparse).to_dense()
        return weighted(doubled * torch.where(torch.tensor(np.eye(WIDTH)).bool()[0], h, h.exp())) + h[[0, 2]].sum()

    assert_exact(loss, [a], 32)
    with compress_activations(8):
        h = made(a)
        value = weighted(torch.view_as_real(torch.complex(h, h) * 2).exp()) + h[np.arange(3)].sum()
    value.backward()

    def of_a_view() -> Tensor:
        h = made(a)
        view = torch.view_as_real(torch.complex(h, h) * 2)
        return weighted(view * h[..., None]) + weighted((view + 1.0).exp())

    assert codecs(assert_exact(of_a_view, [a]), "Exp.result") == {"recipe"}

    def repeated() -> Tensor:
        h = made(a)
        view = torch.view_as_real(torch.complex(h, h) * 2)
        return weighted(view.repeat(8, 1, 1).square())

    assert codecs(assert_exact(repeated, [a]), "Pow.self") == {"gather"}


@pytest.mark.parametrize("bits", [8, 2])
def test_an_angle_is_not_made_of_rounded_values(bits: int) -> None:
    """Rounded by the turn it is a few degrees off; made of what was rounded, many turns."""
    x = table(scale=3.0)

    def function(x: Tensor) -> Tensor:
        times = made(x)
        return torch.cos(F.linear(times[SOURCE], 1000.0 * WEIGHT.detach())) + times.square()[SOURCE]

    own, _ = error(function, x, bits, recompute="off")
    again, _ = error(function, x, bits)
    assert again < 1.25 * own + 1e-6


@pytest.mark.parametrize("bits", [32, 8])
def test_what_is_gone_after_all_is_kept_itself(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parts are counted first and kept then, and to keep one may let go of another."""
    a, b = table(), torch.ones(WIDTH, requires_grad=True)

    def loss() -> Tensor:
        return weighted(_sum_of_two(a) * b)

    monkeypatch.setattr(Costs, "of_recipe", lambda *args, **options: Cost(0, 0))
    (_, got), ledger = compressed(loss, [a, b], bits)
    assert codecs(ledger, "Mul.self") == {"exact" if bits == 32 else "int8"}
    (_, want) = gradients(loss, [a, b])
    assert (got - want).norm() <= (0 if bits == 32 else 0.02) * want.norm()


def _sum_of_two(x: Tensor) -> Tensor:
    """Of rows that are gone when it returns."""
    return made(x).unsqueeze(0) + made(x).unsqueeze(1)
