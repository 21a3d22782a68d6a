"""One table: which ops can be run again in the backward, what that takes, and how exact their arguments have to be.

All give the same bits when they are run again on the same elements, but for sums over a graph's edges on a GPU, which
are added up in any order: there the forward, too, is not the same twice. What is in the table is cheap beside what it
saves; anything random is not. (Dropout is: its mask is kept anyway, and the rest is a product.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_TORCH = torch._C._VariableFunctions
"""What ``torch`` was made of: PyG puts an ``index_select`` of its own in there, which calls this one."""

INDEX_SELECT = _TORCH.index_select


class Carries(Enum):
    """What rounding of an op's arguments does to its result."""

    SAME = "the result is as exact as the arguments: it picks or joins their elements"
    LINEAR = "unbiased arguments give an unbiased result, with an error of the same size"
    BOUNDED = "the error is at most the arguments', and the range about theirs"
    SATURATES = "the error is at most the arguments', but the range may be far smaller"
    QUOTIENT = "linear in the first argument, if the others are exact"
    PRODUCT = "linear in each argument, if the others are exact"
    ROWS = "the error is at most the first argument's, each row by its own range, if the others are exact"
    EXACT = "the error may be of any size"


SAME, LINEAR, BOUNDED, SATURATES, QUOTIENT, PRODUCT, ROWS, EXACT = Carries

_Call = tuple[tuple[Any, ...], dict[str, Any]]
_Describe = Callable[[tuple[Any, ...], dict[str, Any]], _Call | None]


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
        reads: the work for what it reduces, in times that its last tensor's bytes are moved.
        table: the position of the table that it gathers from, which is held until the result is gone.
        product: whether it is a matrix product.
        row: for ``ROWS``: how many elements are normalized together, by its arguments; 0 if they are no row.
        any_order: whether it adds up rows in any order, where it is not told otherwise, on a GPU.
        onto_zeros: whether it writes onto its first argument, which has to be zeros that were made for it.
        rounds: whether it may round otherwise than the op did.
        jumps: whether the least change of an argument may change the result altogether.
    """

    op: Callable[..., Tensor]
    name: str
    carries: Carries
    passes: float
    describe: _Describe
    reads: float = 0
    table: int | None = None
    product: bool = False
    row: Callable[..., int] | None = None
    any_order: bool = False
    onto_zeros: bool = False
    jumps: bool = False
    rounds: bool = False

    def repeats(self, out: Tensor) -> bool:
        """Whether it makes a result of its own once more to the last bit."""
        in_order = not self.any_order or out.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
        return in_order and not self.rounds


SCATTER_READS = 6
"""The work of adding up rows by their indices, in times that they are moved: on a CPU these are sorted first."""

FLOPS_PER_BYTE = 16
"""Multiplications that take as long as moving a byte."""


def _as_called(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
    return None if any(isinstance(value, Tensor) for value in kwargs.values()) else (args, kwargs)


def _anew(place: int) -> _Describe:
    """Of an activation that may write over its argument, as ``inplace`` at this place says: without that."""

    def describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        return _as_called(args[:place], {name: value for name, value in kwargs.items() if name != "inplace"})

    return describe


def _in_place(describe: _Describe) -> _Describe:
    """Of an op that writes over its first argument: as its like that does not, if that casts nothing."""

    def described(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        tensors = [argument for argument in args if isinstance(argument, Tensor)]
        return describe(args, kwargs) if len({tensor.dtype for tensor in tensors}) == 1 else None

    return described


def _folded(describe: _Describe) -> _Describe:
    """Of a matrix product: a batch that does not lie in order is one product only where it needs a gradient."""

    def described(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        factors = [argument for argument in args[:2] if isinstance(argument, Tensor)]
        otherwise = any(x.dim() > 2 and not x.is_contiguous() for x in factors) and min(x.dim() for x in factors) <= 2
        return None if otherwise else describe(args, kwargs)

    return described


def _by_name(*names: str) -> _Describe:
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


def _batch_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
    """With the statistics that it had, which in training are the batch's own: the running ones stay as they are."""
    order = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    names = dict.fromkeys(order[1:5]) | {"training": False, "momentum": 0.1, "eps": 1e-5}
    names |= dict(zip(order, args, strict=False)) | kwargs
    if names["training"]:
        names["running_mean"] = names["running_var"] = None
    return tuple(names[name] for name in order), {}


def _joined(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
    return None if "out" in kwargs else ((tuple(args[0]), *args[1:]), kwargs)


def _cast(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
    """Of a cast to another float: by a dtype, or as another tensor has it."""
    to = args[1] if len(args) > 1 else kwargs.get("dtype", kwargs.get("other"))
    dtype = to.dtype if isinstance(to, Tensor) else to
    stays = not isinstance(to, Tensor) or to.device == args[0].device
    return ((args[0], dtype), {}) if stays and isinstance(dtype, torch.dtype) and dtype.is_floating_point else None


def _new_zeros(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
    """Of ``x.new_zeros``; dtype and device are those of the result."""
    sizes = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
    return None if "size" in kwargs else ((tuple(sizes),), {})


def _zeros_like(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
    return ((tuple(args[0].shape),), {}) if len(args) == 1 else None


def _sum_of_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
    """Of a scatter onto zeros."""
    names = dict(zip(("input", "dim", "index", "source"), args, strict=False)) | kwargs
    if "src" in names:
        names["source"] = names.pop("src")
    if names.keys() != {"input", "dim", "index", "source"} or not isinstance(names["dim"], int):
        return None
    return (tuple(names["input"].shape), names["dim"], names["index"], names["source"]), {}


def _scattered(shape: tuple[int, ...], dim: int, index: Tensor, src: Tensor) -> Tensor:
    return src.new_zeros(shape).scatter_add_(dim, index, src)


def _index_added(shape: tuple[int, ...], dim: int, index: Tensor, source: Tensor) -> Tensor:
    return source.new_zeros(shape).index_add_(dim, index, source)


def _squared(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
    return (args, kwargs) if len(args) == 2 and isinstance(args[1], (int, float)) and args[1] == 2 else None


def _norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
    """Of a 2-norm."""
    names = {"p": 2, "dim": None, "keepdim": False} | dict(zip(("input", "p", "dim", "keepdim"), args, strict=False))
    names |= {name: value for name, value in kwargs.items() if not (name in ("dtype", "out") and value is None)}
    names["p"] = names.pop("ord", names["p"])
    names["input"] = names.pop("x", names.get("input"))
    known = names.keys() == {"input", "p", "dim", "keepdim"} and names["p"] in (2, None, "fro")
    return ((names["input"], names["dim"], names["keepdim"]), {}) if known else None


def _length(x: Tensor, dim: Any, keepdim: bool) -> Tensor:
    """A 2-norm: over any dimension but the last, PyTorch's own takes 20 to 50 times as long on a CPU."""
    wide = x if x.dtype == torch.float64 else x.float()
    return wide.square().sum(dim, keepdim).sqrt().to(x.dtype)


def _normalize(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
    names = {"p": 2.0, "dim": 1, "eps": 1e-12} | dict(zip(("input", "p", "dim", "eps"), args, strict=False)) | kwargs
    x, p, dim = names["input"], names["p"], names["dim"]
    slow = x.is_cpu and not (p == 2 and dim in (-1, x.dim() - 1))  # 40 to 170 times as long as to copy it
    return None if slow or names.get("out") is not None else ((x, p, dim, names["eps"]), {})


def _row_of_normalize(x: Any, p: float, dim: Any, eps: float) -> int:
    shape: tuple[int, ...] = x.layout.shape
    return shape[-1] if p == 2 and dim in (-1, len(shape) - 1) else 0


def _row_of_norm(x: Any, shape: Any, *others: Any) -> int:
    return math.prod(shape) if isinstance(shape, (tuple, list)) else int(shape)


def _quotient(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
    return None if kwargs.get("rounding_mode") is not None else _as_called(args, kwargs)


_WRITING = {
    "add": "add_ __iadd__", "sub": "sub_ __isub__", "mul": "mul_ __imul__", "div": "div_ __itruediv__", "neg": "neg_",
    "relu": "relu_", "leaky_relu": "leaky_relu_", "elu": "elu_", "celu": "celu_", "tanh": "tanh_", "exp": "exp_",
    "sigmoid": "sigmoid_", "abs": "abs_", "clamp": "clamp_", "square": "square_", "sqrt": "sqrt_",
}  # fmt: skip  # a table, read as one
"""By op: those that do it and write over their first argument."""


def _table() -> dict[Any, Repeatable]:
    found: dict[Any, Repeatable] = {}

    def add(names: str, carries: Carries, passes: float, describe: Any = _as_called, **more: Any) -> None:
        for name in names.split():
            for owner in (_TORCH, Tensor, functional):
                if (op := getattr(owner, name, None)) is not None:
                    found[op] = Repeatable(op, name.strip("_"), carries, passes, describe, **more)

    add("add __add__ __radd__", LINEAR, 1)
    # the steepest, gelu's, by 1.13
    add("abs gelu clamp clamp_min clamp_max clip", BOUNDED, 1.5)
    add("relu silu mish", BOUNDED, 1.5, _anew(1))
    add("leaky_relu elu celu", BOUNDED, 1.5, _anew(2))
    add("tanh sigmoid softplus logsigmoid", SATURATES, 1.5)
    # a difference may be far smaller than what it is of, and then is all error; and so may be a sum with a negative
    add("neg __neg__ sub __sub__ rsub __rsub__", EXACT, 1)
    add("mul __mul__ __rmul__", PRODUCT, 1)
    add("square", SATURATES, 1)
    add("pow __pow__", SATURATES, 1, _squared)
    add("div __truediv__ true_divide", QUOTIENT, 1, _quotient)
    add("prelu exp log sqrt rsqrt reciprocal sin cos where", EXACT, 1.5)  # an angle's error may be many turns
    compares = "eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__ logical_and logical_or logical_not"
    add(f"{compares} __and__ __or__ __invert__ __mod__ __floordiv__", EXACT, 1, jumps=True)
    add("softmax log_softmax", EXACT, 3)
    add("layer_norm", ROWS, 3, _by_name("input", "normalized_shape", "weight", "bias", "eps"), row=_row_of_norm)
    add("group_norm", EXACT, 3, _by_name("input", "num_groups", "weight", "bias", "eps"))
    add("rms_norm", ROWS, 3, _by_name("input", "normalized_shape", "weight", "eps"), row=_row_of_norm)
    add("normalize", ROWS, 3, _normalize, row=_row_of_normalize)
    # sums of many may be far smaller than what was added up, and then are all error
    add("sum mean", EXACT, 8, _as_called, reads=1)
    length = Repeatable(_length, "norm", EXACT, 1, _norm, reads=4, rounds=True)
    found |= dict.fromkeys((torch.norm, Tensor.norm, torch.linalg.norm, torch.linalg.vector_norm), length)
    add("cat concat stack", SAME, 1, _joined)
    add("repeat repeat_interleave", SAME, 1)
    add("reshape flatten contiguous clone", SAME, 1)  # where they copy
    for casts in (Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double):
        found[casts] = Repeatable(casts, casts.__name__, SAME, 1, _as_called)
    found[Tensor.to] = found[Tensor.type_as] = Repeatable(Tensor.to, "to", SAME, 1, _cast)
    add("arange zeros ones full", SAME, 0.5)
    found[Tensor.new_zeros] = Repeatable(torch.zeros, "zeros", SAME, 0.5, _new_zeros)
    found[torch.zeros_like] = Repeatable(torch.zeros, "zeros", SAME, 0.5, _zeros_like)
    add("linear", LINEAR, 1, _folded(_by_name("input", "weight", "bias")), product=True)
    add("mm matmul __matmul__ bmm", PRODUCT, 1, _folded(_as_called), product=True)
    add("gather take_along_dim", SAME, 1, table=0)
    for gathers in (INDEX_SELECT, Tensor.index_select):
        found[gathers] = Repeatable(INDEX_SELECT, "index_select", SAME, 1, _index_select, table=0)
    found[Tensor.__getitem__] = Repeatable(Tensor.__getitem__, "getitem", SAME, 1, _getitem, table=0)
    for name, op in (("scatter_add", _scattered), ("index_add", _index_added)):
        repeatable = Repeatable(op, name, LINEAR, 1, _sum_of_rows, SCATTER_READS, any_order=True, onto_zeros=True)
        for adds in (getattr(_TORCH, name), getattr(Tensor, name), getattr(Tensor, f"{name}_")):
            found[adds] = repeatable
    found[functional.batch_norm] = Repeatable(functional.batch_norm, "batch_norm", EXACT, 4, _batch_norm)
    for name, writes in _WRITING.items():
        like = found[getattr(_TORCH, name, None) or getattr(functional, name)]
        for over in writes.split():
            for owner in (_TORCH, Tensor, functional):
                if (function := getattr(owner, over, None)) is not None:
                    found[function] = replace(like, describe=_in_place(like.describe))
    found[functional.embedding] = Repeatable(functional.embedding, "embedding", SAME, 1, _embedding, table=1)
    return found


REPEATABLE = _table()
"""The table: a function as it is called -> how to call it again."""


def _mask_and_scale(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    return x * mask * scale


DROPOUT = Repeatable(torch.mul, "dropout", LINEAR, 2, _as_called)
"""Dropout by its mask of two levels, as on a CPU."""

FUSED_DROPOUT = Repeatable(_mask_and_scale, "dropout", LINEAR, 2, _as_called, rounds=True)
"""Dropout by its bool mask."""


def _copied(x: Tensor, dtype: torch.dtype, expanded: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    return x.to(dtype).expand(expanded).reshape(shape).contiguous()


COPIED = Repeatable(_copied, "copy", SAME, 1, _as_called)
"""What an op casts, or copies in order, for itself."""
