"""One table: which ops can be run again in the backward, what that takes, and how exact their arguments have to be.

All are deterministic and give the same bits when they are run again on the same elements. What is in the table is cheap
beside what it saves; reductions over a graph's edges and anything random are not. (Dropout is: its mask is kept anyway,
and the rest is a product.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class Carries(Enum):
    """What rounding of an op's arguments does to its result."""

    SAME = "the result is as exact as the arguments: it picks or joins their elements"
    LINEAR = "unbiased arguments give an unbiased result, with an error of the same size"
    BOUNDED = "the error is at most the arguments', and the range about theirs"
    SATURATES = "the error is at most the arguments', but the range may be far smaller"
    EXACT = "the error may be of any size"


SAME, LINEAR, BOUNDED, SATURATES, EXACT = Carries

_Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Repeatable:
    """An op that can be run again.

    Attributes:
        op: the op, to be called with what ``describe`` gives.
        name: its name in a ledger.
        carries: what rounding of its arguments does to its result.
        passes: the work, in times that its result's bytes are moved; for a matrix product, times the columns that are
            added up, divided by :data:`FLOPS_PER_BYTE`.
        describe: the arguments to call it with again, all tensors in positional ones; None if it can't be repeated.
        table: the position of the table that it gathers from, which is held until the result is gone.
        product: whether it is a matrix product.
    """

    op: Callable[..., Tensor]
    name: str
    carries: Carries
    passes: float
    describe: Callable[[tuple[Any, ...], dict[str, Any]], _Call | None]
    table: int | None = None
    product: bool = False


FLOPS_PER_BYTE = 16
"""Multiplications that take as long as moving a byte."""


def _as_called(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
    return None if any(isinstance(value, Tensor) for value in kwargs.values()) else (args, kwargs)


def _by_name(*names: str) -> Callable[[tuple[Any, ...], dict[str, Any]], _Call | None]:
    """Positional arguments throughout, missing ones at the end left out, those between None."""

    def describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        if not kwargs:
            return args, kwargs
        if not kwargs.keys() <= set(names):
            return None
        last = max(names.index(name) for name in kwargs)
        return (*args, *(kwargs.get(name) for name in names[len(args) : last + 1])), {}

    return describe


def _index_select(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
    names = dict(zip(("input", "dim", "index"), args, strict=False)) | kwargs
    return ((names["input"], names["dim"], names["index"]), {}) if isinstance(names["dim"], int) else None


def _getitem(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
    table, item = args
    items = item if isinstance(item, tuple) else (item,)
    if not any(isinstance(i, Tensor) for i in items):
        return None
    for i in items:
        picks = isinstance(i, Tensor) and i.dtype in (torch.int64, torch.int32, torch.bool)
        if not (picks or i is Ellipsis or isinstance(i, slice)):
            return None
    return (table, items), {}


def _embedding(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
    names = dict(zip(("input", "weight", "padding_idx", "max_norm"), args, strict=False)) | kwargs
    if names.get("max_norm") is not None:  # it changes the table
        return None
    return (names["input"], names["weight"]), {}


def _joined(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
    return None if "out" in kwargs else ((tuple(args[0]), *args[1:]), kwargs)


def _table() -> dict[Any, Repeatable]:
    found: dict[Any, Repeatable] = {}

    def add(names: str, carries: Carries, passes: float, describe: Any = _as_called, **more: Any) -> None:
        for name in names.split():
            for owner in (torch, Tensor, functional):
                if (op := getattr(owner, name, None)) is not None:
                    found[op] = Repeatable(op, name.strip("_"), carries, passes, describe, **more)

    add("add __add__ __radd__", LINEAR, 1)
    add("relu leaky_relu elu abs", BOUNDED, 1.5)
    add("tanh sigmoid softplus logsigmoid", SATURATES, 1.5)
    # a difference may be far smaller than what it is of, and then is all error; and so may be a sum with a negative
    add("neg __neg__ sub __sub__ rsub __rsub__", EXACT, 1)
    add("mul __mul__ __rmul__ div __truediv__ true_divide square", EXACT, 1)
    add("exp gelu silu log sqrt rsqrt reciprocal sin cos where", EXACT, 1.5)  # an angle's error may be many turns
    add("eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__ logical_and logical_or logical_not", EXACT, 1)
    add("__and__ __or__ __invert__ __mod__ __floordiv__", EXACT, 1)
    add("softmax log_softmax", EXACT, 3)
    add("layer_norm", EXACT, 3, _by_name("input", "normalized_shape", "weight", "bias", "eps"))
    add("cat concat stack", SAME, 1, _joined)
    add("repeat repeat_interleave", SAME, 1)
    add("arange zeros ones full", SAME, 0.5)
    add("linear", LINEAR, 1, _by_name("input", "weight", "bias"), product=True)
    add("mm matmul __matmul__ bmm", EXACT, 1, product=True)
    for gathers in (torch.index_select, Tensor.index_select):
        found[gathers] = Repeatable(torch.index_select, "index_select", SAME, 1, _index_select, table=0)
    found[Tensor.__getitem__] = Repeatable(Tensor.__getitem__, "getitem", SAME, 1, _getitem, table=0)
    found[functional.embedding] = Repeatable(functional.embedding, "embedding", SAME, 1, _embedding, table=1)
    return found


REPEATABLE = _table()
"""The table: a function as it is called -> how to call it again."""


def _mask_and_scale(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    return x * mask * scale


DROPOUT = Repeatable(torch.mul, "dropout", LINEAR, 2, _as_called)
"""Dropout by its mask of two levels, as on a CPU."""

FUSED_DROPOUT = Repeatable(_mask_and_scale, "dropout", LINEAR, 2, _as_called)
"""Dropout by its bool mask. Its kernel may round otherwise."""
