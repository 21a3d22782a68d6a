"""What got a code of its own is made again after all, if all that it was made of is kept in the end."""

import weakref
from collections.abc import Callable

import pytest
import torch
from comparing import assert_exact, compressed, gradients, made, weighted
from torch import Tensor
from torch.nn import functional as F

from lightning_tinykg import BitPlan, Ledger, compress_activations, keep_exact
from lightning_tinykg.activations.repeatable import Repeatable
from lightning_tinykg.bits import PlanEntry

ROWS, WIDTH = 300, 32
FIRST, SECOND = (torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed)) / 6 for seed in (5, 6))

CONSTANT = FIRST.clone()


def leaf(seed: int = 0) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def interaction(a: Tensor, b: Tensor) -> Tensor:
    """As a layer of KGAT: the sum is saved before what it is made of."""
    a, b = made(a), made(b)
    return F.linear((a + b), FIRST.requires_grad_()).tanh() + F.linear(a * b, SECOND.requires_grad_()).tanh()


def step(function: Callable[..., Tensor], bits: int | BitPlan, **options: object) -> Ledger:
    # options of several types
    with compress_activations(bits, min_bytes=0, **options) as ledger:  # type: ignore[arg-type]
        loss = weighted(function(leaf(), leaf(1)))
    loss.backward()
    return ledger


def tables(ledger: Ledger) -> list[str]:
    """The saves that a whole table is kept for."""
    return [entry.op for entry in ledger if entry.shape == (ROWS, WIDTH) and entry.stored_bytes]


def test_exactly() -> None:
    a, b = leaf(), leaf(1)
    ledger = assert_exact(lambda: weighted(interaction(a, b)), [a, b, FIRST, SECOND])
    assert tables(ledger) == ["Mul.other", "Mul.self"]


@pytest.mark.parametrize("bits", [8, 4])
def test_rounded(bits: int) -> None:
    """Of two that are rounded it is as good as what is rounded itself."""
    a, b = leaf(), leaf(1)
    want = gradients(lambda: weighted(interaction(a, b)), [a, b, FIRST])

    def off_by(**options: str) -> float:
        got, _ = compressed(lambda: weighted(interaction(a, b)), [a, b, FIRST], bits, **options)
        return float(sum((g - w).norm() / w.norm() for g, w in zip(got, want, strict=True)))

    assert off_by() < 1.5 * off_by(recompute="off")
    assert step(interaction, bits).stored_bytes < 0.85 * step(interaction, bits, recompute="off").stored_bytes


def test_what_is_not_as_exact_as_was_asked_for_does_not_do() -> None:
    """A sum is worth 2 bits if what is added has 4; products ask for 2 bits of it."""

    def function(a: Tensor, b: Tensor) -> Tensor:
        a, b = made(a), made(b)
        return (a + b).square() + a * b

    assert tables(step(function, 2)) == ["Pow.self", "Mul.other", "Mul.self"]
    assert tables(step(function, 8)) == ["Mul.other", "Mul.self"]


def test_what_is_made_of_it_may_ask_for_more() -> None:
    """A tanh is made of the sum, in 12 bits; products ask for 8 of what is added."""

    def function(a: Tensor, b: Tensor) -> Tensor:
        a, b = made(a), made(b)
        return F.linear(a + b, FIRST.requires_grad_()).tanh() + a * b

    assert tables(step(function, 8)) == ["Tanh.result from", "Mul.other", "Mul.self"]
    assert tables(step(interaction, 8)) == ["Mm.self from", "Mm.self from"]


def test_sums_in_any_order_are_not_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where a backward looks for what equals the largest."""
    monkeypatch.setattr(Repeatable, "repeats", lambda self, out: not self.any_order)
    onto = torch.arange(ROWS) // 2

    def largest(a: Tensor, b: Tensor) -> Tensor:
        a = made(a)
        sums = torch.zeros(ROWS, WIDTH).index_add(0, onto, a)
        return sums.square().sum(-1) + torch.linalg.vector_norm(sums, ord=float("inf"), dim=1) + (a * b).sum(-1)

    assert "Pow.self" in tables(step(largest, 32))
    monkeypatch.setattr(Repeatable, "repeats", lambda self, out: True)
    assert "Pow.self" not in tables(step(largest, 32))


def test_what_is_too_much_work_is_not_made_again() -> None:
    def function(a: Tensor, b: Tensor) -> Tensor:
        a = h = made(a)
        for _ in range(10):
            h = F.linear(h, CONSTANT)
        return h.square() + a * b

    assert "Pow.self" in tables(step(function, 8))
    assert "Pow.self" not in tables(step(function, 8, recompute="aggressive"))


@pytest.mark.parametrize("bits", [32, 8])
def test_what_something_is_made_of_stays(bits: int) -> None:
    """The sum is made of ``c``, which could be made of the rest in its turn, and is not."""

    def function(a: Tensor, b: Tensor) -> Tensor:
        a, b = made(a), made(b)
        c = a - b
        return F.linear(a + c, FIRST.requires_grad_()).relu() + c * 3.0 * F.linear(c, SECOND) + a * b

    ledger = step(function, bits)
    assert tables(ledger) == ["Relu.result", "Mm.self", "Mul.other", "Mul.self"]
    assert "add(x, sub(x))" in {entry.recipe for entry in ledger}


def test_what_the_user_holds_costs_nothing_and_is_not_made_again() -> None:
    a, b = leaf(), leaf(1)
    with compress_activations(32, min_bytes=0) as ledger:
        x, y = made(a), made(b)
        held = x + y
        loss = weighted(F.linear(held, FIRST.requires_grad_()) + x * y)
    loss.backward()
    assert "recipe" not in {entry.codec for entry in ledger}
    assert held.shape == a.shape


def test_nothing_is_held_for_it() -> None:
    """Nor what it was made of, as tables are while rows of them are there: that is looked for among what is kept."""
    index = torch.arange(3 * ROWS // 2) % ROWS
    with compress_activations(8) as ledger:
        a, b = made(leaf()), made(leaf(1))
        loss = F.linear(a[index] + b[index.flip(0)], FIRST.requires_grad_()).sum()
        gone = weakref.ref(a), weakref.ref(b)
        del a, b
        for _ in range(40):  # until it is looked what is still there, and what was kept last is other things
            (made(leaf()) * 2.0).square()
        assert [tensor() for tensor in gone] == [None, None]
    loss.backward()
    assert "int8" in {entry.codec for entry in ledger}


def test_what_is_left_out_of_compression_is_not_computed_again() -> None:
    def function(a: Tensor, b: Tensor) -> Tensor:
        a, b = made(a), made(b)
        with keep_exact():
            first = (a + b).square()
        return first + (a + b) * (a * b)

    assert "Pow.self" in tables(step(function, 32))


@pytest.mark.parametrize("bits", [1, 2, 4, 12])
def test_in_a_plan_it_is_so_whatever_the_widths(bits: int) -> None:
    def kept(bits: int) -> list[tuple[str, str]]:
        plan = BitPlan([PlanEntry(bits, component="*.*")], default=8)
        return [(entry.op, entry.codec.replace(f"int{bits}", "rounded")) for entry in step(interaction, plan)]

    assert "recipe" in {codec for _, codec in kept(bits)}
    assert kept(bits) == [(op, codec) for op, codec in kept(8)]
