"""Runs a function plainly and compressed, and compares the gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_tinykg import Ledger, compress_activations

Loss = Callable[[], Tensor]


def gradients(loss: Loss, leaves: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of one plain step."""
    return _step(loss, leaves, None)[1]


def compressed(loss: Loss, leaves: Sequence[Tensor], bits: int, **options: Any) -> tuple[list[Tensor], Ledger]:
    """The gradients of one compressed step, and its ledger."""
    options = {"min_bytes": 0} | options
    with_context = compress_activations(bits=bits, **options)
    _, grads, ledger = _step(loss, leaves, with_context)
    assert ledger is not None
    return grads, ledger


def _step(
    loss: Loss, leaves: Sequence[Tensor], context: compress_activations | None
) -> tuple[Tensor, list[Tensor], Ledger | None]:
    for leaf in leaves:
        leaf.grad = None
    torch.manual_seed(11)
    ledger = None
    if context is None:
        value = loss()
    else:
        with context as ledger:
            value = loss()
    value.backward()
    grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone() for leaf in leaves]
    return value.detach(), grads, ledger


def identical(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, NaN being equal to NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(torch.nan_to_num(a, 7.0), torch.nan_to_num(b, 7.0))


def assert_exact(loss: Loss, leaves: Sequence[Tensor], bits: int = 32, **options: Any) -> Ledger:
    """The compressed step has the loss and the gradients of the plain one, to the last bit."""
    for leaf in leaves:
        leaf.grad = None
    value, want, _ = _step(loss, leaves, None)
    context = compress_activations(bits=bits, **{"min_bytes": 0, **options})
    again, got, ledger = _step(loss, leaves, context)
    assert identical(value, again)
    for number, (a, b) in enumerate(zip(want, got, strict=True)):
        assert a.dtype == b.dtype
        assert identical(a, b), f"gradient {number} differs, by {(a - b).abs().max()} at the most"
    assert ledger is not None
    return ledger


def made(leaf: Tensor) -> Tensor:
    """An activation with a leaf's very values, and no recipe: what a layer might have computed."""
    return leaf.flip(0).flip(0)


def codecs(ledger: Ledger, op: str) -> set[str]:
    """How the saves of one op are kept."""
    return {entry.codec for entry in ledger if entry.op == op}


@cache
def _weights(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    with torch._C.DisableTorchFunction():  # unseen by a context that may be entered, and so the user's
        return torch.randn(shape, generator=torch.Generator().manual_seed(99)).to(dtype)


def weighted(out: Tensor) -> Tensor:
    """A loss that gives each element of a result another gradient, by weights that are the user's."""
    return (out * _weights(out.shape, out.dtype)).sum()
