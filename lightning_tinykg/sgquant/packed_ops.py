"""What can be done with packed features without decoding all of them. Imported by `packed.py`, which it completes."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_tinykg.sgquant.packed import PackedFeatures

__all__: list[str] = []

aten = torch.ops.aten

_BLOCK_ELEMENTS = 1 << 20
"""Elements decoded at a time for a matrix product: 4 MiB."""


def _implements(*operations: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for operation in operations:
            PackedFeatures._ops[operation] = function
        return function

    return register


# -- matrix products ---------------------------------------------------------------------------------------------------


def _by_blocks(x: Any, weight: Tensor, product: Callable[[Tensor, slice], Tensor]) -> Any:
    """Products of the rows of `x` with a matrix `[d, width]`, some rows decoded at a time."""
    if not isinstance(x, PackedFeatures) or isinstance(weight, PackedFeatures) or x.dim() != 2 or weight.dim() != 2:
        return NotImplemented
    width = weight.size(1)
    out = torch.empty(x.size(0), width, dtype=torch.float32, device=x.device)
    step = max(64, _BLOCK_ELEMENTS // max(prod(x.row_shape), width, 1) // 64 * 64)
    for first in range(0, x.size(0), step):
        rows = slice(first, min(first + step, x.size(0)))
        out[rows] = product(x.decode(rows), rows)
    return out


@_implements(aten.mm.default, aten.matmul.default)
def _mm(x: Any, weight: Tensor) -> Any:
    return _by_blocks(x, weight, lambda rows, _: rows @ weight)


@_implements(aten.addmm.default)
def _addmm(bias: Tensor, x: Any, weight: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    if isinstance(bias, PackedFeatures):
        return NotImplemented
    by_row = bias.dim() == 2 and bias.size(0) > 1
    return _by_blocks(
        x,
        weight,
        lambda rows, part: torch.addmm(bias[part] if by_row else bias, rows, weight, beta=beta, alpha=alpha),
    )


@_implements(aten.linear.default)
def _linear(x: Any, weight: Tensor, bias: Tensor | None = None) -> Any:
    if isinstance(weight, PackedFeatures):
        return NotImplemented
    return _by_blocks(x, weight.t(), lambda rows, _: torch.nn.functional.linear(rows, weight, bias))


# -- picking rows ------------------------------------------------------------------------------------------------------


def _pick(x: PackedFeatures, index: Tensor) -> Any:
    """Rows of any shape of index; negative ones count from the end."""
    if index.dtype not in (torch.int32, torch.int64):
        return NotImplemented
    flat = index.reshape(-1)
    return x.decode(torch.where(flat < 0, flat + x.size(0), flat)).view(*index.shape, *x.row_shape)


@_implements(aten.index_select.default)
def _index_select(x: Any, dim: int, index: Tensor) -> Any:
    # as in PyTorch, a negative index is an error here, and it is the codes' own index_select that says so
    return x.decode(index.reshape(-1)) if isinstance(x, PackedFeatures) and dim % x.dim() == 0 else NotImplemented


@_implements(aten.embedding.default)
def _embedding(weight: Any, index: Tensor, *_: Any, **__: Any) -> Any:
    return _pick(weight, index) if isinstance(weight, PackedFeatures) else NotImplemented


@_implements(aten.index.Tensor)
def _index(x: Any, indices: list[Tensor | None]) -> Any:
    if not isinstance(x, PackedFeatures) or len(indices) != 1 or indices[0] is None:
        return NotImplemented
    index = indices[0]
    if index.dtype == torch.bool and index.shape == (x.size(0),):
        index = index.nonzero().squeeze(1)
    return _pick(x, index)


@_implements(aten.slice.Tensor)
def _slice(x: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    if not isinstance(x, PackedFeatures) or dim % x.dim() != 0 or step != 1:
        return NotImplemented
    first, last, _ = slice(start, end).indices(x.size(0))
    return _alias(x) if (first, last) == (0, x.size(0)) else x.decode(slice(first, max(first, last)))


@_implements(aten.select.int)
def _select(x: Any, dim: int, index: int) -> Any:
    if not isinstance(x, PackedFeatures) or dim % x.dim() != 0:
        return NotImplemented
    if not -x.size(0) <= index < x.size(0):
        raise IndexError(f"index must be in -{x.size(0)}..{x.size(0) - 1}, got {index}")
    return x.decode(slice(index % x.size(0), index % x.size(0) + 1))[0]


# -- the same codes ----------------------------------------------------------------------------------------------------


@_implements(aten.detach.default, aten.alias.default, aten.lift_fresh.default)
def _alias(x: PackedFeatures) -> PackedFeatures:
    return x.alias()


@_implements(aten.clone.default)
def _clone(x: PackedFeatures, *, memory_format: Any = None) -> PackedFeatures:
    # a write into either makes floats of it first
    return x.alias()


@_implements(aten._to_copy.default)
def _to_copy(x: PackedFeatures, *, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> Any:
    if dtype not in (None, torch.float32):
        return NotImplemented
    return _alias(x) if device is None else x.parts_to(device)
