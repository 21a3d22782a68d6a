"""Rows times the matrix of their group, as one op: a relation's transform of the nodes that it is asked of.

Written as a product for each group, a step of TransR over a hundred relations is a thousand ops, each with its node in
the graph, and the gradient of the rows is filled up with zeros and added up once a group.
``torch.nn.functional.grouped_mm`` wants rows of a multiple of 16 bytes and no double precision; PyG's
``segment_matmul`` wants pyg-lib.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, library

from lightning_tinykg.activations import calling
from lightning_tinykg.activations.recipes import Ingredient
from lightning_tinykg.activations.repeatable import FLOPS_PER_BYTE, PRODUCT, REPEATABLE, Repeatable
from lightning_tinykg.activations.rules import LINEAR, RULES

__all__ = ["grouped_matmul"]

_BEGINS = 1 << 14
"""Bytes that are moved in the time that it takes to begin a product, a few microseconds on a CPU."""


def grouped_matmul(rows: Tensor, matrices: Tensor, counts: Sequence[int]) -> Tensor:
    """`y[i] = rows[i] @ matrices[g]` for row `i` of group `g`; the rows of a group follow one another.

    Under autocast in its dtype, as any matrix product.

    Args:
        rows: `[P, d]`, floating point, sorted by group.
        matrices: `[G, d, k]`, of the rows' dtype.
        counts: Rows of each group, `G` numbers that sum to `P`; on the host, since they say which products there are.

    Returns:
        `[P, k]`.

    Raises:
        ValueError: If there is not a number for each matrix, or they do not sum to the rows.

    Example:
        >>> rows, matrices = torch.ones(3, 2), torch.stack([torch.eye(2), 2 * torch.eye(2)])
        >>> grouped_matmul(rows, matrices, [1, 2])
        tensor([[1., 1.],
                [2., 2.],
                [2., 2.]])
    """
    if len(counts) != len(matrices) or sum(counts) != len(rows):
        raise ValueError(
            f"counts must be {len(matrices)} numbers, one for each matrix, that sum to the {len(rows)} rows, "
            f"got {len(counts)} that sum to {sum(counts)}"
        )
    device = rows.device.type
    if torch.is_autocast_enabled(device) and rows.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        rows, matrices = rows.to(dtype), matrices.to(dtype)
    y: Tensor = _products(rows, matrices, list(counts))
    return y


def _by_group(counts: list[int], *tables: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(torch.split(table, counts) for table in tables), strict=True)


@library.custom_op("tinykg::grouped_matmul", mutates_args=())
def _products(rows: Tensor, matrices: Tensor, counts: list[int]) -> Tensor:
    """See :func:`grouped_matmul`."""
    y = rows.new_empty(rows.size(0), matrices.size(2))
    for matrix, (part, made) in zip(matrices.unbind(), _by_group(counts, rows, y), strict=True):
        torch.mm(part, matrix, out=made)
    return y


@library.custom_op("tinykg::grouped_outer", mutates_args=())
def _outer(left: Tensor, right: Tensor, counts: list[int]) -> Tensor:
    """The matrices' gradient `[G, d, k]`: `left[i]^T right[i]`, added up over the rows of each group."""
    y = left.new_empty(len(counts), left.size(1), right.size(1))
    for made, (a, b) in zip(y.unbind(), _by_group(counts, left, right), strict=True):
        torch.mm(a.t(), b, out=made)  # zeros, where the group has no rows
    return y


@_products.register_fake
def _(rows: Tensor, matrices: Tensor, counts: list[int]) -> Tensor:
    return rows.new_empty(rows.size(0), matrices.size(2))


@_outer.register_fake
def _(left: Tensor, right: Tensor, counts: list[int]) -> Tensor:
    return left.new_empty(len(counts), left.size(1), right.size(1))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.counts = inputs[2]


def _of_products(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, matrices = ctx.saved_tensors
    of_rows = _products(grad, matrices.mT, ctx.counts) if ctx.needs_input_grad[0] else None
    of_matrices = _outer(rows, grad, ctx.counts) if ctx.needs_input_grad[1] else None
    return of_rows, of_matrices, None


def _of_outer(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    left, right = ctx.saved_tensors
    of_left = _products(right, grad.mT, ctx.counts) if ctx.needs_input_grad[0] else None
    of_right = _products(left, grad, ctx.counts) if ctx.needs_input_grad[1] else None
    return of_left, of_right, None


_products.register_autograd(_of_products, setup_context=_remember)
_outer.register_autograd(_of_outer, setup_context=_remember)

# linear in each factor, as any product: what is saved of them may be rounded, and the product be made again
for _name in ("grouped_matmul", "grouped_outer"):
    RULES[f"GeneratedBackwardFor_tinykg_{_name}_default"] = {"tensors": LINEAR}


def _adds_up(rows: Ingredient, matrices: Ingredient, counts: list[int]) -> float:
    """The products that an element is the sum of, and its share of what it takes to begin each group's."""
    count, width = rows.layout.shape
    made = count * matrices.layout.shape[2] * rows.dtype.itemsize
    return width + FLOPS_PER_BYTE * _BEGINS * len(counts) / max(made, 1)


REPEATABLE[torch.ops.tinykg.grouped_matmul.default] = Repeatable(
    torch.ops.tinykg.grouped_matmul.default,
    "grouped_matmul",
    PRODUCT,
    1,
    calling.as_called,
    adds_up=_adds_up,
)
