"""Restored tensors that become the gradient which is computed from them, element by element.

The backward of ``a * b`` takes both factors first, and then computes ``grad * b`` and ``grad * a``: with the gradient,
five tensors at once where both are large. But a factor that was restored is nobody else's. Here autograd is given a
stand-in for it; once it multiplies with that, the factor is restored, and multiplied in place: with the gradient and
the two products, three tensors, and no more memory is written to than without compression.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import graph
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from lightning_tinykg.activations.keeping import Kept
    from lightning_tinykg.activations.workspace import Workspace

DEFERRED = frozenset(
    {"Mul.self", "Mul.other", "Exp.result", "Tanh.result", "Sigmoid.result", "Relu.result", "LeakyRelu.self"}
)
"""What a backward uses once, and in an op that can write over it."""

_ENGINE = graph._engine_run_backward.__code__

_WORTH_BYTES = 1 << 20
"""What is smaller is restored at once: a stand-in takes tens of microseconds."""

_INTO = {
    torch.ops.aten.mul.Tensor: (torch.ops.aten.mul.out, "out"),
    torch.ops.aten.tanh_backward.default: (torch.ops.aten.tanh_backward.grad_input, "grad_input"),
    torch.ops.aten.sigmoid_backward.default: (torch.ops.aten.sigmoid_backward.grad_input, "grad_input"),
    torch.ops.aten.threshold_backward.default: (torch.ops.aten.threshold_backward.grad_input, "grad_input"),
    torch.ops.aten.leaky_relu_backward.default: (torch.ops.aten.leaky_relu_backward.grad_input, "grad_input"),
}
"""The ops, of a gradient and of what was saved; the same into memory that is there, and by which name that is given."""


class Deferred(Tensor):
    """A stand-in for a contiguous tensor that is restored when an op asks for it, for that op alone."""

    kept: Kept
    workspace: Workspace
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # not overridden but off

    @staticmethod
    def __new__(
        cls, kept: Kept, workspace: Workspace, shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> Deferred:
        """A stand-in for what is kept of a tensor of this shape and dtype, on this device."""
        deferred: Deferred = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        deferred.kept, deferred.workspace = kept, workspace
        return deferred

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # as the stubs have it, it is no class method
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default:  # as autograd does with what it is given
            given = args[0]
            return Deferred(given.kept, given.workspace, given.shape, given.dtype, given.device)
        last = args[1] if func in _INTO and not kwargs else None
        args, kwargs = tree_map_only(Deferred, lambda given: given.kept.restore(given.workspace), (args, kwargs or {}))
        if type(last) is Deferred and _lies_alike(*args[:2]):
            place = last.workspace.place_for_result(args[1])
            if place is not None:
                into, name = _INTO[func]
                return into(*args, **{name: place})
        return func(*args, **kwargs)


def _lies_alike(gradient: Any, restored: Tensor) -> bool:
    """Whether what is computed of both would lie as the second does, which is contiguous.

    A result that lay otherwise might be summed up in another order, which differs in a bit.
    """
    if type(gradient) is not Tensor or gradient.layout is not torch.strided or not restored.is_contiguous():
        return False
    if (gradient.shape, gradient.dtype, gradient.device) != (restored.shape, restored.dtype, restored.device):
        return False
    # contiguous, or expanded from what is
    strides = [s for n, s in zip(gradient.shape, gradient.stride(), strict=True) if n != 1 and s != 0]
    return all(outer > inner for outer, inner in pairwise(strides))


def is_deferrable(tensor: Tensor, place: str) -> bool:
    """Whether a tensor that was saved at this place (``Mul.self``) can have a stand-in, and is large enough for one."""
    large = place in DEFERRED and tensor.nbytes >= _WORTH_BYTES
    return large and tensor.is_contiguous() and tensor.is_floating_point()


def defers() -> bool:
    """Whether a save is unpacked by an op of a backward that is not differentiated in its turn, nor batched.

    Not by a hook that looks at what was saved: between that and the engine there is a frame of its own.
    """
    asks = sys._getframe(1).f_back  # a GPU's backward runs on a thread of autograd's, which has no frame
    return (
        (asks is None or asks.f_code is _ENGINE)
        and not torch.is_grad_enabled()
        and torch._C._functorch.peek_interpreter_stack() is None
    )
