"""A copy of a model in use: after a step of training, compiled or not."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

from torch import Tensor, nn

__all__ = ["copied"]


def copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy that shares nothing with the model, nor runs anything of it.

    Args:
        model: The model; it is not touched.
        memo: By identity: what stands in the copy in a thing's place, as for `copy.deepcopy`, which adds to it.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> model.last = model.weight.sum()    # has a graph
        >>> copied(model, {}).last.requires_grad
        False
    """
    memo |= _without_graphs(model)
    made = copy.deepcopy(model, memo)
    _uncompile_methods(made, memo)
    return made


def _without_graphs(model: nn.Module) -> dict[int, Any]:
    """By identity: copies of what modules noted in their last step, as PyG's `VGAE` does, which PyTorch won't copy."""
    return {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in (*vars(module).values(), *module._buffers.values())
        if isinstance(value, Tensor) and not value.is_leaf
    }


def _uncompile_methods(model: nn.Module, memo: dict[int, Any]) -> None:
    """Give a copied module methods of its own where it has compiled ones, which stay those of what it was copied from.

    Lightning puts them there, of a module that was given to the Trainer as `torch.compile(module)`.
    """
    for module in model.modules():
        for name, value in list(vars(module).items()):
            method = getattr(value, "_torchdynamo_orig_callable", None)
            if isinstance(method, MethodType) and id(method.__self__) in memo:
                module.__dict__[name] = MethodType(method.__func__, memo[id(method.__self__)])
