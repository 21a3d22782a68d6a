"""One table: which ops can be run again in the backward, what that takes, and how exact their arguments have to be.

All give the same bits when they are run again on the same elements, but for sums over a graph's edges on a GPU, which
are added up in any order: there the forward, too, is not the same twice. What is in the table is cheap beside what it
saves; anything random is not. (Dropout is: its mask is kept anyway, and the rest is a product.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_tinykg.activations import calling
from lightning_tinykg.activations.storages import storage_id

_TORCH = torch._C._VariableFunctions
"""What ``torch`` was made of: PyG puts an ``index_select`` of its own in there, which calls this one."""

INDEX_SELECT = _TORCH.index_select


class Carries(Enum):
    """What rounding of an op's arguments does to its result."""

    SAME = "the result is as exact as the arguments: it picks or joins their elements"
    LINEAR = "unbiased arguments give an unbiased result, with an error of the same size"
    BOUNDED = "the error is at most the arguments', and the range about theirs"
    SATURATES = "the error is at most the arguments', but the range may be far smaller"
    SUM = "linear, but for a negative of one of two: the result may be far smaller than they are, and then is all error"
    DIFFERENCE = "linear in one that a number is taken from, or that from a number; of two as the sum with a negative"
    QUOTIENT = "linear in the first argument, if the others are exact"
    PRODUCT = "linear in each argument, if the others are exact"
    ROWS = "the error is at most the first argument's, each row by its own range, if the others are exact"
    EXACT = "the error may be of any size"


SAME, LINEAR, BOUNDED, SATURATES, SUM, DIFFERENCE, QUOTIENT, PRODUCT, ROWS, EXACT = Carries


@dataclass(frozen=True, slots=True)
class Repeatable:
    """An op that can be run again.

    Attributes:
        op: the op, to be called with what ``describe`` gives.
        name: its name in a ledger.
        carries: what rounding of its arguments does to its result.
        passes: the work, in times that its result's bytes are moved; for a matrix product, times what is
            added up, divided by :data:`FLOPS_PER_BYTE`.
        describe: the arguments to call it with again, all tensors in positional ones; None if it can't be repeated.
        reads: the work for what it reduces, in times that its last tensor's bytes are moved.
        table: the position of the table that it gathers from, or of the places that it marks, which are far smaller;
            held until the result, and what is made of it, is gone.
        adds_up: for a matrix product: how many products each element is the sum of, by its arguments.
        row: for ``ROWS``: how many elements are normalized together, by its arguments; 0 if they are no row.
        any_order: whether it adds up in any order, where it is not told otherwise, on a GPU.
        onto_zeros: whether it writes onto its first argument, which has to be zeros that were made for it.
        rounds: whether it may round otherwise than the op did.
        writes: whether it writes over its first argument.
        negates: whether its result is a negative of one argument.
        jumps: whether the least change of an argument may change the result altogether.
    """

    op: Callable[..., Tensor]
    name: str
    carries: Carries
    passes: float
    describe: calling.Describe
    reads: float = 0
    table: int | None = None
    adds_up: Callable[..., float] | None = None
    row: Callable[..., int] | None = None
    any_order: bool = False
    onto_zeros: bool = False
    writes: bool = False
    negates: bool = False
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


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A product of all rows at once, as it is where these need a gradient, however they lie.

    Without one it is a product for each batch of them, which on a GPU may have other bits.
    """
    if x.dim() < 3 or x.is_contiguous():
        return functional.linear(x, weight, bias)
    made: Tensor = x.reshape(-1, x.shape[-1]) @ weight.t()
    if bias is not None:
        made += bias.to(made.dtype)
    return made.view(*x.shape[:-1], -1)


def _scattered(shape: tuple[int, ...], dim: int, index: Tensor, src: Tensor) -> Tensor:
    return src.new_zeros(shape).scatter_add_(dim, index, src)


def _set_to(shape: tuple[int, ...], dim: int, index: Tensor, value: float, dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=index.device).scatter_(dim, index, value)


def _index_added(shape: tuple[int, ...], dim: int, index: Tensor, source: Tensor) -> Tensor:
    return source.new_zeros(shape).index_add_(dim, index, source)


def _length(x: Tensor, dim: Any, keepdim: bool) -> Tensor:
    """A 2-norm: over any dimension but the last, PyTorch's own takes 20 to 50 times as long on a CPU."""
    wide = x if x.dtype == torch.float64 else x.float()
    return wide.square().sum(dim, keepdim).sqrt().to(x.dtype)


_WRITING = {
    "add": "add_ __iadd__", "sub": "sub_ __isub__", "mul": "mul_ __imul__", "div": "div_ __itruediv__", "neg": "neg_",
    "relu": "relu_", "leaky_relu": "leaky_relu_", "elu": "elu_", "celu": "celu_", "tanh": "tanh_", "exp": "exp_",
    "sigmoid": "sigmoid_", "abs": "abs_", "clamp": "clamp_", "square": "square_", "sqrt": "sqrt_",
    "erf": "erf_", "masked_fill": "masked_fill_",
}  # fmt: skip  # a table, read as one
"""By op: those that do it and write over their first argument."""


def _table() -> dict[Any, Repeatable]:
    found: dict[Any, Repeatable] = {}

    def add(names: str, carries: Carries, passes: float, describe: Any = calling.as_called, **more: Any) -> None:
        for name in names.split():
            for owner in (_TORCH, Tensor, functional):
                if (op := getattr(owner, name, None)) is not None:
                    found[op] = Repeatable(op, name.strip("_"), carries, passes, describe, **more)

    add("add __add__ __radd__", SUM, 1)
    # the steepest, gelu's, by 1.13
    add("abs gelu clamp clamp_min clamp_max clip", BOUNDED, 1.5)
    add("relu silu mish", BOUNDED, 1.5, calling.anew(1))
    add("leaky_relu elu celu", BOUNDED, 1.5, calling.anew(2))
    add("tanh sigmoid softplus logsigmoid erf atan arctan", SATURATES, 1.5)
    add("sub __sub__", DIFFERENCE, 1)
    add("neg __neg__ rsub __rsub__", DIFFERENCE, 1, negates=True)
    add("mul __mul__ __rmul__", PRODUCT, 1)
    add("square", SATURATES, 1)
    add("pow __pow__", SATURATES, 1, calling.squared)
    add("div __truediv__ true_divide", QUOTIENT, 1, calling.quotient)
    add("prelu exp log sqrt rsqrt reciprocal sin cos", EXACT, 1.5)  # an angle's error may be many turns
    compares = "eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__ logical_and logical_or logical_not"
    add(f"{compares} __and__ __or__ __invert__ __mod__ __floordiv__", EXACT, 1, jumps=True)
    add("softmax log_softmax", EXACT, 3)
    add(
        "layer_norm",
        ROWS,
        3,
        calling.by_name("input", "normalized_shape", "weight", "bias", "eps"),
        row=calling.row_of_norm,
    )
    add("group_norm", EXACT, 3, calling.by_name("input", "num_groups", "weight", "bias", "eps"))
    add("rms_norm", ROWS, 3, calling.by_name("input", "normalized_shape", "weight", "eps"), row=calling.row_of_norm)
    add("normalize", ROWS, 3, calling.normalize, row=calling.row_of_normalize)
    # sums of many may be far smaller than what was added up, and then are all error
    add("sum mean", EXACT, 8, calling.as_called, reads=1)
    length = Repeatable(_length, "norm", EXACT, 1, calling.norm, reads=4, rounds=True)
    found |= dict.fromkeys((torch.norm, Tensor.norm, torch.linalg.norm, torch.linalg.vector_norm), length)
    add("cat concat stack", SAME, 1, calling.joined)
    add("repeat repeat_interleave where", SAME, 1)
    add("masked_fill", SAME, 1, calling.by_name("input", "mask", "value"))
    add("pad", SAME, 1, calling.padded)
    add("reshape flatten contiguous clone", SAME, 1)  # where they copy
    for casts in (Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double):
        found[casts] = Repeatable(casts, casts.__name__, SAME, 1, calling.as_called)
    found[Tensor.to] = found[Tensor.type_as] = Repeatable(Tensor.to, "to", SAME, 1, calling.cast)
    add("arange zeros ones full", SAME, 0.5)
    found[Tensor.new_zeros] = Repeatable(torch.zeros, "zeros", SAME, 0.5, calling.new_zeros)
    found[torch.zeros_like] = Repeatable(torch.zeros, "zeros", SAME, 0.5, calling.zeros_like)
    by_rows = calling.rows_that_need_a_gradient("input", "weight", "bias")
    linear = Repeatable(_linear, "linear", PRODUCT, 1, by_rows, adds_up=calling.last_of_the_first)
    found[functional.linear] = linear
    add("mm matmul __matmul__ bmm", PRODUCT, 1, calling.folded(calling.as_called), adds_up=calling.last_of_the_first)
    # on a GPU cuDNN may take another algorithm each time
    add("conv1d conv2d conv3d", PRODUCT, 1, calling.convolution, adds_up=calling.in_a_kernel, any_order=True)
    product = Repeatable(torch.einsum, "einsum", PRODUCT, 1, calling.einsum, adds_up=calling.not_in_the_result)
    found[torch.einsum] = product
    add("one_hot", SAME, 1, calling.one_hot, table=0)
    add("gather take_along_dim", SAME, 1, table=0)
    for gathers in (INDEX_SELECT, Tensor.index_select):
        found[gathers] = Repeatable(INDEX_SELECT, "index_select", SAME, 1, calling.index_select, table=0)
    found[Tensor.__getitem__] = Repeatable(Tensor.__getitem__, "getitem", SAME, 1, calling.getitem, table=0)
    for name, op in (("scatter_add", _scattered), ("index_add", _index_added)):
        repeatable = Repeatable(
            op, name, LINEAR, 1, calling.sum_of_rows, SCATTER_READS, any_order=True, onto_zeros=True
        )
        for adds in (getattr(_TORCH, name), getattr(Tensor, name), getattr(Tensor, f"{name}_")):
            found[adds] = repeatable
    for sets in (_TORCH.scatter, Tensor.scatter, Tensor.scatter_):
        found[sets] = Repeatable(_set_to, "scatter", SAME, 1, calling.set_to, table=2, onto_zeros=True)
    found[functional.batch_norm] = Repeatable(functional.batch_norm, "batch_norm", EXACT, 4, calling.batch_norm)
    for name, writes in _WRITING.items():
        like = found[getattr(_TORCH, name, None) or getattr(functional, name)]
        for over in writes.split():
            for owner in (_TORCH, Tensor, functional):
                if (function := getattr(owner, over, None)) is not None:
                    found[function] = replace(like, describe=calling.in_place(like.describe), writes=True)
    found[functional.embedding] = Repeatable(functional.embedding, "embedding", SAME, 1, calling.embedding, table=1)
    return found


REPEATABLE = _table()
"""The table: a function as it is called -> how to call it again."""


def _mask_and_scale(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    return x * mask * scale


DROPOUT = Repeatable(torch.mul, "dropout", LINEAR, 2, calling.as_called)
"""Dropout by its mask of two levels, as on a CPU."""

FUSED_DROPOUT = Repeatable(_mask_and_scale, "dropout", LINEAR, 2, calling.as_called, rounds=True)
"""Dropout by its bool mask."""


def _copied(x: Tensor, dtypes: tuple[torch.dtype, ...], expanded: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    made = _in_order(_cast(x, dtypes), expanded, shape)
    # what is made again may be computed with in place, and what it is made of may be the user's
    return made.clone() if storage_id(made) == storage_id(x) else made


def _scaled(
    x: Tensor, factor: float, dtypes: tuple[torch.dtype, ...], expanded: tuple[int, ...], shape: tuple[int, ...]
) -> Tensor:
    return _in_order(_cast(x, dtypes) * factor, expanded, shape)


def _in_order(x: Tensor, expanded: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    return x.expand(expanded).reshape(shape).contiguous()


def _cast(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    for dtype in dtypes:
        x = x.to(dtype)
    return x


COPIED = Repeatable(_copied, "copy", SAME, 1, calling.as_called)
"""What an op casts, or copies in order, for itself."""

SCALED = Repeatable(_scaled, "scale", LINEAR, 2, calling.as_called)
"""What an attention casts, multiplies by a number and copies in order, for itself."""
