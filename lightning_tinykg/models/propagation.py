"""LightGCN's propagation as one product with a sparse matrix, where PyG goes edge by edge.

What PyG gathers and weights for all edges, `[E, d]`, never exists here, forward or backward. An operator of PyTorch's,
so that ``torch.compile`` sees through it.
"""

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, library

__all__ = ["propagate", "row_starts"]


def row_starts(row: Tensor, num_nodes: int) -> Tensor:
    """Where each node's edges begin among edges sorted by node, and where the last one's end.

    Args:
        row: The node of each edge, ascending, int64 `[E]`.
        num_nodes: Number of nodes.

    Returns:
        int64 `[num_nodes + 1]`.

    Example:
        >>> row_starts(torch.tensor([0, 2, 2]), num_nodes=4)
        tensor([0, 1, 1, 3, 3])
    """
    count = row.bincount(minlength=num_nodes)
    return torch.cat([count.new_zeros(1), count.cumsum(0)])


@library.custom_op("tinykg::propagate_symmetric", mutates_args=())
def propagate(x: Tensor, starts: Tensor, neighbour: Tensor, weight: Tensor) -> Tensor:
    """`y[i] = sum of weight[e] * x[neighbour[e]]` over the edges `e` of node `i`.

    The weights have to be symmetric, that of `(i, j)` the same as that of `(j, i)`: the gradient is then the same
    product. Graph and weights get none. Half precision is summed in float32: sparse products take no less on a CPU.

    Args:
        x: `[N, d]`, floating point.
        starts: See :func:`row_starts`.
        neighbour: The other node of each edge, int64 `[E]`.
        weight: `[E]`, floating point.

    Returns:
        `[N, d]`, of `x`'s dtype.

    Example:
        >>> starts, neighbour = torch.tensor([0, 1, 2]), torch.tensor([1, 0])
        >>> propagate(torch.tensor([[1.0], [2.0]]), starts, neighbour, torch.tensor([0.5, 0.5]))
        tensor([[1.0000],
                [0.5000]])
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide, weight = x.to(dtype), weight.to(dtype)
    if x.device.type not in ("cpu", "cuda"):  # others have no sparse matrices by rows
        row = torch.repeat_interleave(starts.diff())
        return torch.zeros_like(wide).index_add_(0, row, weight[:, None] * wide[neighbour]).to(x.dtype)
    _expect_beta()
    size = (x.size(0), x.size(0))
    matrix = torch.sparse_csr_tensor(starts, neighbour, weight, size, check_invariants=False)
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = matrix @ wide
    return y.to(x.dtype, copy=False)


@propagate.register_fake
def _(x: Tensor, starts: Tensor, neighbour: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    # not by save_for_backward: the graph is no activation, and nobody is to compress its weights
    ctx.graph = inputs[1:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return propagate(grad, *ctx.graph), None, None, None


propagate.register_autograd(_backward, setup_context=_remember)


@cache
def _expect_beta() -> None:
    """PyTorch warns once in a process that such matrices are in beta: not our user's business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.zeros(1, dtype=torch.int64), [], [], (0, 0))
