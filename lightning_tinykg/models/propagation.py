"""Propagation as one product with a sparse matrix, where PyG goes edge by edge.

What PyG gathers and weights for all edges, `[E, d]`, never exists here, forward or backward. An operator of PyTorch's,
so that ``torch.compile`` sees through it.
"""

import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, library, nn
from torch_geometric.nn import MessagePassing

from lightning_tinykg.models.graph_buffers import HoldsGraph

__all__ = ["SortedEdges", "SparseMatrix", "is_watched", "propagate", "row_starts"]


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


class SparseMatrix(NamedTuple):
    """A graph's weights, row by row, and its transpose's, which is what the gradient is multiplied by.

    Attributes:
        starts: Where each row begins, int64 `[N + 1]`, see :func:`row_starts`.
        column: The column of each weight, int64 `[E]`.
        weight: `[E]`, floating point.
        back_starts: The same of the transpose; as are the next two.
        back_column: int64 `[E]`.
        back_weight: `[E]`.
    """

    starts: Tensor
    column: Tensor
    weight: Tensor
    back_starts: Tensor
    back_column: Tensor
    back_weight: Tensor

    @classmethod
    def symmetric(cls, starts: Tensor, column: Tensor, weight: Tensor) -> "SparseMatrix":
        """Of weights that are the same in both directions, that of `(i, j)` and that of `(j, i)`."""
        return cls(starts, column, weight, starts, column, weight)


class SortedEdges(HoldsGraph, nn.Module):
    """A graph's edges by receiver, and by sender: what makes matrices of weights for its edges.

    Args:
        edge_index: int64 `[2, E]`; row 0 the source, row 1 the receiver.
        num_nodes: Nodes of the graph.

    Example:
        >>> edges = SortedEdges(torch.tensor([[1, 2, 0], [0, 0, 2]]), num_nodes=3)
        >>> propagate(torch.eye(3), edges.weighted(torch.tensor([0.25, 0.5, 1.0])))
        tensor([[0.0000, 0.2500, 0.5000],
                [0.0000, 0.0000, 0.0000],
                [1.0000, 0.0000, 0.0000]])
    """

    starts: Tensor
    column: Tensor
    order: Tensor
    back_starts: Tensor
    back_column: Tensor
    back_order: Tensor

    def __init__(self, edge_index: Tensor, num_nodes: int) -> None:
        super().__init__()
        for prefix, (column, row) in (("", edge_index), ("back_", edge_index.flip(0))):
            row, order = row.sort(stable=True)
            self.register_buffer(f"{prefix}starts", row_starts(row, num_nodes), persistent=False)
            self.register_buffer(f"{prefix}column", column[order], persistent=False)
            self.register_buffer(f"{prefix}order", order, persistent=False)

    @torch.no_grad()
    def weighted(self, weight: Tensor) -> SparseMatrix:
        """The matrix of weights for the edges as they were given, `[E]`; they get no gradient by it."""
        forth, back = weight[self.order], weight[self.back_order]
        return SparseMatrix(self.starts, self.column, forth, self.back_starts, self.back_column, back)


def is_watched(layer: nn.Module, kind: type[MessagePassing]) -> bool:
    """Whether somebody wants to see a layer's edges: by hooks, an explanation, or a method or a class of his own.

    Args:
        layer: The layer.
        kind: What it is unless somebody has replaced it.
    """
    own = vars(layer)
    hooked = any(value for name, value in own.items() if name.endswith("_hooks"))
    return type(layer) is not kind or hooked or bool(layer.explain) or "propagate" in own or "message" in own


def propagate(x: Tensor, matrix: SparseMatrix) -> Tensor:
    """`y[i] = sum of weight[e] * x[j]` over the edges `e` from `j` to `i`.

    Graph and weights get no gradient. Half precision is summed in float32: sparse products take no less on a CPU.

    Args:
        x: `[N, d]`, floating point.
        matrix: The graph.

    Returns:
        `[N, d]`, of `x`'s dtype.

    Example:
        >>> starts, neighbour = torch.tensor([0, 1, 2]), torch.tensor([1, 0])
        >>> half = SparseMatrix.symmetric(starts, neighbour, torch.tensor([0.5, 0.5]))
        >>> propagate(torch.tensor([[1.0], [2.0]]), half)
        tensor([[1.0000],
                [0.5000]])
    """
    y: Tensor = _propagate(x, *matrix)
    return y


@library.custom_op("tinykg::propagate", mutates_args=())
def _propagate(
    x: Tensor,
    starts: Tensor,
    column: Tensor,
    weight: Tensor,
    back_starts: Tensor,
    back_column: Tensor,
    back_weight: Tensor,
) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide, weight = x.to(dtype), weight.to(dtype)
    if x.device.type not in ("cpu", "cuda"):  # others have no sparse matrices by rows
        row = torch.repeat_interleave(starts.diff())
        return torch.zeros_like(wide).index_add_(0, row, weight[:, None] * wide[column]).to(x.dtype)
    _expect_beta()
    size = (x.size(0), x.size(0))
    matrix = torch.sparse_csr_tensor(starts, column, weight, size, check_invariants=False)
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = matrix @ wide
    return y.to(x.dtype, copy=False)


@_propagate.register_fake
def _(x: Tensor, *matrix: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    # not by save_for_backward: the graph is no activation, and nobody is to compress its weights
    ctx.transpose = inputs[4:] + inputs[1:4]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _propagate(grad, *ctx.transpose), None, None, None, None, None, None


_propagate.register_autograd(_backward, setup_context=_remember)


@cache
def _expect_beta() -> None:
    """PyTorch warns once in a process that such matrices are in beta: not our user's business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.zeros(1, dtype=torch.int64), [], [], (0, 0))
