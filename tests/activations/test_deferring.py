"""What is restored for an op of the backward becomes its result: less memory at once, and the same to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_tinykg import compress_activations
from lightning_tinykg.activations import keeping
from lightning_tinykg.activations.deferring import Deferred
from tests.activations.comparing import assert_exact, gradients

EDGES, WIDTH = 8192, 64
SIZE = EDGES * WIDTH * 4


def tables() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(50, WIDTH, requires_grad=True) for _ in range(2)]


def indices() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(50, (EDGES,), generator=generator), torch.randint(50, (EDGES,), generator=generator)


def most_alive(function: Callable[[], Any]) -> int:
    """The most bytes that were allocated at once of what a function allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    # there is one
    events = list(profiled.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    found: list[tuple[int, int, int]] = []
    while events:
        event = events.pop()
        events += event.children
        if event.typed[0].name == "Allocation":
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    alive: dict[int, int] = {}
    most = 0
    for _, pointer, nbytes in sorted(found, key=lambda item: item[0]):
        if nbytes > 0:
            alive[pointer] = nbytes
        else:
            alive.pop(pointer, None)
        most = max(most, sum(alive.values()))
    return most


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops that stand-ins were given to."""
    seen: list[str] = []
    dispatch = Deferred.__torch_dispatch__

    def noted(cls: type, func: Any, *args: Any, **kwargs: Any) -> Any:
        if func is not torch.ops.aten.detach.default:
            seen.append(func.name())
        return dispatch(func, *args, **kwargs)

    monkeypatch.setattr(Deferred, "__torch_dispatch__", classmethod(noted))
    return seen


@pytest.mark.parametrize("bits", [2, 8, 32])
def test_the_backward_of_a_product_holds_three_tensors(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient and both products; the two factors are restored in the memory of these."""
    (a, b), (i, j), gradient = tables(), indices(), torch.randn(EDGES, WIDTH)

    def alive() -> float:
        with compress_activations(bits):
            product = a[i] * b[j]
        return most_alive(lambda: product.backward(1 * gradient)) / SIZE

    alive()
    assert alive() < 3.2
    monkeypatch.setattr(keeping, "defers", lambda: False)
    assert alive() > 4.9


@pytest.mark.parametrize("bits", [2, 32])
def test_what_several_ops_need_is_left_to_them_until_the_last(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tanh that a product saved too: what it was made from leaves its memory to the products."""
    (a, b), (i, j), gradient = tables(), indices(), torch.randn(EDGES, WIDTH)

    def alive() -> float:
        with compress_activations(bits):
            product = a[i] * torch.tanh(a[j] + b[j])
        return most_alive(lambda: product.backward(1 * gradient)) / SIZE

    alive()
    assert alive() < 4.2
    monkeypatch.setattr(keeping, "defers", lambda: False)
    assert alive() > 5.9


def scaled(x: Tensor) -> Tensor:
    return x * torch.linspace(-1, 2, x.numel()).view(x.shape)


OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mul": lambda a, b: scaled(a * b),
    "square": lambda a, b: scaled(a * a) * b,
    "the same factor twice": lambda a, b: scaled(a * b) + (a * b.flip(0)).tanh(),
    "tanh": lambda a, b: scaled(torch.tanh(a)),
    "sigmoid": lambda a, b: scaled(torch.sigmoid(a)),
    "exp": lambda a, b: scaled(torch.exp(a)),
    "relu": lambda a, b: scaled(F.relu(a)),
    "leaky_relu": lambda a, b: scaled(F.leaky_relu(a, 0.3)),
    "of an expanded gradient": lambda a, b: scaled((a * torch.tanh(b)).sum(-1)),
    "of a transposed gradient": lambda a, b: scaled((a * torch.tanh(b)).t()).cumsum(0),
    "of a gradient of one element": lambda a, b: a.sigmoid() * b,
    "broadcast": lambda a, b: scaled(a[:, None] * b.view(2, -1, WIDTH)[:, :1].transpose(0, 1)),
    "dropout": lambda a, b: F.dropout(scaled(a) * b, 0.3),
}


@pytest.mark.parametrize("op", OPS)
def test_exact(op: str, stand_ins: list[str]) -> None:
    (a, b), (i, j) = tables(), indices()
    assert_exact(lambda: OPS[op](a[i], b[j]).square().sum(), [a, b])
    assert stand_ins


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_exact_in_other_dtypes(dtype: torch.dtype, stand_ins: list[str]) -> None:
    (a, b), (i, j) = (table.detach().to(dtype).requires_grad_() for table in tables()), indices()
    assert_exact(lambda: (a[i] * torch.tanh(b[j])).float().square().sum(), [a, b])
    assert stand_ins


@pytest.mark.parametrize("bits", [2, 8])
def test_rounded_as_without(bits: int, monkeypatch: pytest.MonkeyPatch, stand_ins: list[str]) -> None:
    """The same noise makes the same gradients; of a retained graph, again and again."""
    (a, b), (i, j) = tables(), indices()

    def step() -> list[Tensor]:
        with compress_activations(bits, seed=3):
            hidden = torch.tanh(a[i] @ torch.ones(WIDTH, WIDTH) / WIDTH)
            loss = (hidden * F.leaky_relu(b[j] * hidden)).square().sum()
        first = torch.autograd.grad(loss, [a, b], retain_graph=True)
        second = torch.autograd.grad(loss, [a, b])
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
        return list(first)

    with_it = step()
    assert stand_ins
    monkeypatch.setattr(keeping, "defers", lambda: False)
    assert all(torch.equal(one, other) for one, other in zip(with_it, step(), strict=True))


@pytest.mark.parametrize("lies", ["contiguous", "transposed", "expanded"])
def test_results_lie_as_otherwise(lies: str) -> None:
    """A sum over a gradient that lay otherwise might differ in a bit."""
    x, seen = torch.randn(EDGES, WIDTH, requires_grad=True), []
    gradient = {
        "contiguous": torch.randn(EDGES, WIDTH),
        "transposed": torch.randn(WIDTH, EDGES).t(),
        "expanded": torch.randn(EDGES, 1).expand(-1, WIDTH),
    }[lies]
    for bits in (None, 32):
        with compress_activations(bits) if bits else nullcontext():
            hidden = 1 * x
            out = torch.tanh(hidden)
        hidden.register_hook(lambda given: seen.append((given.stride(), given.clone())))
        out.backward(gradient)
    assert seen[0][0] == seen[1][0]
    assert torch.equal(seen[0][1], seen[1][1])


def test_gradients_that_are_kept_are_not_written_over() -> None:
    x, (a, b), (i, j) = torch.randn(EDGES, WIDTH, requires_grad=True), tables(), indices()
    seen: list[tuple[Tensor, Tensor]] = []

    def loss() -> Tensor:
        hidden = scaled(x) * torch.tanh(a[i])
        hidden.register_hook(lambda gradient: seen.append((gradient, gradient.clone())))
        return (hidden * torch.tanh(x) * b[j]).square().sum() + torch.tanh(a[j] * b[i]).square().sum()

    assert_exact(loss, [x, a, b])
    assert all(torch.equal(kept, then) for kept, then in seen)


def test_a_gradient_takes_no_more_memory_than_it_fills() -> None:
    """Though the factor was restored into a buffer that something larger had before."""
    x, big = torch.randn(EDGES, WIDTH, requires_grad=True), torch.randn(50, 3 * WIDTH, requires_grad=True)
    (a, _), (i, j) = tables(), indices()
    with compress_activations(32):
        loss = scaled(x * a[i]).sum() + F.silu(big[j]).sum()  # whose backward comes first
    loss.backward()
    assert x.grad is not None
    assert x.grad.untyped_storage().nbytes() == x.grad.nbytes


def test_what_others_hold_is_not_written_over() -> None:
    """A table by reference, and a part of a tensor by a copy: the second backward finds them as they were."""
    x, given = torch.randn(EDGES, WIDTH, requires_grad=True), torch.randn(EDGES, WIDTH)
    before = given.clone()
    with compress_activations(32):
        made = x.cumsum(0)
        loss = (scaled(x) * given * made.view(2, -1, WIDTH)[1].repeat(2, 1)).square().sum() + (made * made).sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)
    second = torch.autograd.grad(loss, x)
    assert torch.equal(given, before)
    assert torch.equal(*first, *second)


def test_who_looks_at_what_was_saved_gets_it(stand_ins: list[str]) -> None:
    """A hook of the node too, though it runs within the backward."""
    (a, b), (i, j), seen = tables(), indices(), []
    with compress_activations(32):
        product = a[i] * b[j]
    node = product.grad_fn
    assert node is not None
    node.register_prehook(lambda _: seen.append(node._saved_self))
    assert torch.equal(node._saved_other, b[j])
    product.sum().backward()
    assert type(seen[0]) is Tensor
    assert torch.equal(seen[0], a[i])
    assert stand_ins == ["aten::mul.Tensor"] * 2


def test_a_backward_that_is_differentiated_gets_tensors(stand_ins: list[str]) -> None:
    (a, b), (i, j) = tables(), indices()

    def penalty() -> Tensor:
        loss = (a[i] * torch.tanh(b[j])).square().sum()
        return sum((g.square().sum() for g in torch.autograd.grad(loss, [a, b], create_graph=True)), torch.zeros(()))

    want = torch.autograd.grad(penalty(), [a, b])
    with compress_activations(32):
        value = penalty()
        assert not stand_ins
    got = torch.autograd.grad(value, [a, b])
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_batched_gradients() -> None:
    (a, b), (i, j), vectors = tables(), indices(), torch.randn(2, EDGES, WIDTH)

    def rows() -> tuple[Tensor, ...]:
        with compress_activations(32):
            product = a[i] * torch.tanh(b[j])
        return torch.autograd.grad(product, [a, b], vectors, is_grads_batched=True)

    want = torch.autograd.grad(a[i] * torch.tanh(b[j]), [a, b], vectors, is_grads_batched=True)
    assert all(torch.equal(one, other) for one, other in zip(rows(), want, strict=True))


class Watching(TorchDispatchMode):
    """A mode that somebody has around the backward, to look at each op."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_a_mode_around_the_backward() -> None:
    (a, b), (i, j) = tables(), indices()
    want = gradients(lambda: (a[i] * torch.tanh(b[j])).square().sum(), [a, b])
    a.grad = b.grad = None
    with compress_activations(32):
        loss = (a[i] * torch.tanh(b[j])).square().sum()
    with Watching():
        loss.backward()
    assert a.grad is not None
    assert b.grad is not None
    assert torch.equal(a.grad, want[0])
    assert torch.equal(b.grad, want[1])


def test_small_tensors_are_restored_at_once(stand_ins: list[str]) -> None:
    (a, b), (i, j) = tables(), indices()
    assert_exact(lambda: (a[i[:500]] * torch.tanh(b[j[:500]])).square().sum(), [a, b])
    assert not stand_ins
