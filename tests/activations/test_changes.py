"""What plain autograd allows to be changed between forward and backward may be changed here as well."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from comparing import assert_exact, compressed, gradients, made
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_tinykg import compress_activations

INDEX = torch.randint(50, (300,), generator=torch.Generator().manual_seed(0))


def table() -> nn.Embedding:
    torch.manual_seed(1)
    return nn.Embedding(50, 32)


def two_losses(context: compress_activations | None, optimizer: type[torch.optim.Optimizer]) -> Tensor:
    """A step between the backwards of two losses of one forward, as in adversarial training."""
    rows = table()
    torch.manual_seed(2)
    first, second = (torch.randn(300, 32, requires_grad=True) for _ in "ab")
    steps = optimizer(rows.parameters(), lr=0.1)  # type: ignore[call-arg]  # an optimizer's class

    def losses() -> tuple[Tensor, Tensor]:
        return (rows(INDEX) * first).sum(), (rows(INDEX) * second).tanh().sum()

    if context is None:
        a, b = losses()
    else:
        with context:
            a, b = losses()
    a.backward()
    steps.step()
    b.backward()
    assert second.grad is not None
    return second.grad


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad])
def test_an_optimizer_steps_between_two_backwards(optimizer: type[torch.optim.Optimizer]) -> None:
    want = two_losses(None, optimizer)
    assert torch.equal(two_losses(compress_activations(bits=32, min_bytes=0), optimizer), want)
    near = two_losses(compress_activations(bits=8, min_bytes=0), optimizer)
    assert float((near - want).norm() / want.norm()) < 0.02


def test_the_copy_is_in_the_books_and_made_once() -> None:
    rows = table()
    steps = torch.optim.SGD(rows.parameters(), lr=0.1)
    weights = torch.randn(300, 32, requires_grad=True)
    with compress_activations(bits=2, min_bytes=0) as ledger:
        loss = (rows(INDEX) * weights).sum()
    assert ledger.stored_bytes == 0
    loss.backward(retain_graph=True)
    for _ in range(2):
        steps.step()
        loss.backward(retain_graph=True)
    assert ledger.stored_bytes == rows.weight.nbytes
    assert [entry.op for entry in ledger if entry.stored_bytes] == ["changed in place"]


def test_nothing_is_copied_for_a_graph_that_is_done() -> None:
    """Manual optimization: backward and step within the context."""
    rows = table()
    steps = torch.optim.SGD(rows.parameters(), lr=0.1)
    weights = torch.randn(300, 32, requires_grad=True)
    with compress_activations(bits=2, min_bytes=0) as ledger:
        for _ in range(3):
            loss = (rows(INDEX) * weights).sum()
            loss.backward()
            steps.step()
    assert ledger.stored_bytes == 0


@pytest.mark.parametrize(
    "harmless",
    [
        lambda h: F.dropout(h, 0.5, True),
        lambda h: torch.sum(h, 1, True),
        lambda h: h.var(1, True),
        lambda h: F.relu(h, False),
        lambda h: h + 1,
    ],
)
def test_what_only_looks_like_a_change_copies_nothing(harmless: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(64, 64, requires_grad=True)
    weights = torch.randn(300, 64, requires_grad=True)
    with compress_activations(bits=32, min_bytes=0) as ledger:
        h = x.cumsum(0)
        loss = (h[INDEX % 64] * weights).sum() + harmless(h).sum()
    loss.backward()
    assert "changed in place" not in {entry.op for entry in ledger}


@pytest.mark.parametrize(
    "change",
    [
        lambda h: F.relu(h, True),
        lambda h: F.relu(h, inplace=True),
        lambda h: F.leaky_relu(h, 0.1, True),
        lambda h: F.dropout(h, 0.5, True, True),
        lambda h: F.elu(h, 1.0, True),
        lambda h: nn.Hardtanh(inplace=True)(h),
        lambda h: h.mul_(2),
        lambda h: torch.sigmoid_(h),
    ],
)
def test_a_change_is_seen(change: Callable[[Tensor], Any]) -> None:
    x = torch.randn(64, 64, requires_grad=True)
    weights = torch.randn(300, 64, requires_grad=True)

    def loss() -> Tensor:
        h = made(x).clone()
        value = (h[INDEX % 64] * weights).sum()
        return value + change(h).sum()

    want = gradients(loss, [x, weights])
    got, ledger = compressed(loss, [x, weights], 32)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert "changed in place" in {entry.op for entry in ledger}


@pytest.mark.parametrize("lend", [Tensor.numpy, np.asarray, torch.from_dlpack])
def test_what_was_changed_by_another_library_is_not_made_again_as_it_was(lend: Callable[[Tensor], Any]) -> None:
    """It has the memory, and changes no version."""
    rows = torch.randn(40, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def loss() -> Tensor:
        shifted = made(rows).tanh() * 2 + 3
        lend(shifted.detach())[:20] = 1.5
        return (shifted.log() * 2).sum() + (shifted * shifted).sum()

    assert_exact(loss, [rows])
    assert_exact(loss, [rows], recompute="aggressive")
