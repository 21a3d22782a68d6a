"""What stands in for a piece of a model while it is quantized: a softmax, a dropout, a table. No global is changed."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch_geometric.utils import softmax

__all__ = ["Dropped", "dropped_from", "shadow_parameter", "unshadow", "with_softmax"]

_SOURCE = "_sgquant_dropped_from"


def with_softmax(method: Any, after: Callable[[Tensor, Tensor | None], Tensor]) -> MethodType | None:
    """A copy of a method in which PyG's `softmax` goes through a function of ours.

    The copy has the globals that the method has now, with that one name replaced.

    Args:
        method: A bound method, such as `AGNNConv.message`.
        after: Given what the softmax returned and the node at which each edge arrives; returns what takes its place.

    Returns:
        The copy, bound to the same object; `None` if the method calls no softmax by name.
    """
    function = getattr(method, "__func__", None)
    if not isinstance(function, FunctionType):
        return None
    names = [name for name in function.__code__.co_names if function.__globals__.get(name) is softmax]
    if not names:
        return None

    def softened(src: Tensor, index: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        return after(softmax(src, index, *args, **kwargs), index)

    scope = {**function.__globals__, **dict.fromkeys(names, softened)}
    copy = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return MethodType(copy, method.__self__)


class Dropped(TorchFunctionMode):
    """Remembers, while it is on, what a dropout was made of: the tensor before it, and the mask that it is times.

    What is stored is the tensor before a dropout. Quantized after it, a kept value of `x / (1 - p)` would be cut off at
    the end of a range that was calibrated in evaluation, and a dropped one would come back as the level nearest to 0.

    Example:
        >>> x = torch.ones(4)
        >>> with Dropped():
        ...     y = F.dropout(x, 0.5)
        >>> source, mask = dropped_from(y)
        >>> source is x, torch.equal(x * mask, y)
        (True, True)
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op; a dropout as a product with its mask, drawn as it draws it."""
        kwargs = kwargs or {}
        if func is F.dropout and (call := _as_dropout(*args, **kwargs)) is not None:
            x, p = call
            mask = F.dropout(torch.ones_like(x, requires_grad=False), p, True)
            out = x * mask
            setattr(out, _SOURCE, (x, mask))
            return out
        return func(*args, **kwargs)


def _as_dropout(
    input: Any, p: float = 0.5, training: bool = True, inplace: bool = False
) -> tuple[Tensor, float] | None:
    if not training or inplace or p == 0 or not isinstance(input, Tensor) or not input.is_floating_point():
        return None
    return input, p


def dropped_from(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """The tensor that a dropout was made of, and its mask, if `x` is a dropout's result and `Dropped` was on."""
    found: tuple[Tensor, Tensor] | None = getattr(x, _SOURCE, None)
    return found


# -- tables ----------------------------------------------------------------------------------------------------------


def shadow_parameter(module: nn.Module, name: str, stored: Callable[[Tensor, Tensor | None], Tensor]) -> None:
    """Let `module.name` be read as it is stored, while parameters, optimizer and state dict have the parameter itself.

    Args:
        module: Whose parameter it is.
        name: Its name there.
        stored: Given rows of the parameter and which these are (`None`: all), returns what is read instead.
    """
    original = type(module)

    def read(self: nn.Module) -> Tensor:
        parameter = self._parameters[name]
        assert parameter is not None
        return stored(parameter, None)

    members: dict[str, Any] = {name: property(read), "_sgquant_original": original, "__module__": original.__module__}
    if original.forward is nn.Embedding.forward and name == "weight":
        members["forward"] = lambda self, input: _looked_up(self, input, stored)
    module.__class__ = type(original.__name__, (original,), members)


def _looked_up(table: nn.Embedding, index: Tensor, stored: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
    """An embedding's forward: only the rows that are asked for are quantized."""
    weight = table._parameters["weight"]
    assert weight is not None
    rows = F.embedding(
        index, weight, table.padding_idx, table.max_norm, table.norm_type, table.scale_grad_by_freq, table.sparse
    )
    return stored(rows.reshape(-1, rows.size(-1)), index.reshape(-1)).reshape(rows.shape)


def unshadow(module: nn.Module) -> None:
    """Undo `shadow_parameter`, all of a module's."""
    while _is_shadowed(original := type(module)):
        module.__class__ = original._sgquant_original


def _is_shadowed(kind: Any) -> TypeGuard[Any]:
    return "_sgquant_original" in vars(kind)
