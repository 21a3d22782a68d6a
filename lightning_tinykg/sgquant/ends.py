"""The two ends of edges: which nodes these are, and of which tensors a layer takes rows at each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch_geometric.utils import is_sparse, is_torch_sparse_tensor

__all__ = ["are_of_one_kind", "asked_for", "ends_of", "has_rows", "is_head", "is_of_nodes", "is_pair"]


def ends_of(edges: Any, flow: str) -> tuple[Tensor, Tensor]:
    """The node at which each edge arrives, and the one that it comes from.

    Args:
        edges: int32 or int64 `[2, E]`, or a sparse matrix of receivers by senders: PyTorch's, or torch_sparse's.
        flow: PyG's, which says which row of `edges` receives.

    Returns:
        int64 `[E]` each; of a matrix in the order of its values.

    Example:
        >>> edges = torch.tensor([[1, 2], [0, 0]])
        >>> ends_of(edges, "source_to_target")
        (tensor([0, 0]), tensor([1, 2]))
        >>> ends_of(torch.eye(2).to_sparse_csr(), "source_to_target")
        (tensor([0, 1]), tensor([0, 1]))
    """
    if is_torch_sparse_tensor(edges):
        if edges.layout == torch.sparse_coo:
            receivers, senders = edges._indices()
        elif edges.layout == torch.sparse_csr:
            receivers, senders = _spread(edges.crow_indices()), edges.col_indices()
        else:
            receivers, senders = edges.row_indices(), _spread(edges.ccol_indices())
    elif isinstance(edges, Tensor):
        first, second = edges.as_subclass(Tensor)
        receivers, senders = (second, first) if flow == "source_to_target" else (first, second)
    else:
        receivers, senders, _ = edges.coo()
    return receivers.long(), senders.long()


def _spread(pointers: Tensor) -> Tensor:
    """The row, or column, of each value of a compressed matrix."""
    counts = pointers.diff()
    return torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts)


def are_of_one_kind(size: Any, values: list[Any], node_dim: int) -> bool:
    """Whether senders and receivers are the same nodes: as many, in all that a layer takes rows of.

    Args:
        size: What `propagate` was given: how many senders and receivers there are, or `None`.
        values: What the layer takes rows of, tensors and pairs of them.
        node_dim: PyG's, the dimension of the nodes.

    Example:
        >>> x, y = torch.ones(2, 1), torch.ones(3, 1)
        >>> are_of_one_kind(None, [x, (x, None)], -2), are_of_one_kind(None, [x, y], -2)
        (True, False)
    """
    tensors = [x for value in values for x in (value if is_pair(value) else [value]) if isinstance(x, Tensor)]
    counts = [x.size(0) for x in tensors if is_of_nodes(x, node_dim)] + [n for n in size or () if n is not None]
    return len(set(counts)) <= 1


def asked_for(layer: Any, name: str, ends: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The rows that edges between two kinds of nodes take of a tensor, which is of one kind.

    Args:
        layer: A message passing layer.
        name: What it calls the tensor.
        ends: Senders and receivers, int64 `[E]` each.

    Returns:
        What is taken at each end; where only one end takes rows, that twice; nothing, if none does.
    """
    taken = tuple(end for end, suffix in zip(ends, ("_j", "_i"), strict=True) if name + suffix in layer._user_args)
    return taken if len(taken) > 1 else 2 * taken


def end_of(layer: Any, name: str) -> int:
    """Which of two kinds of nodes a tensor is of that messages are made of: 0, if only senders take rows of it; else 1.

    Args:
        layer: A message passing layer.
        name: What it calls the tensor.
    """
    return int(f"{name}_j" not in layer._user_args or f"{name}_i" in layer._user_args)


def is_pair(value: Any) -> bool:
    """Whether something is a pair, of senders' and receivers'."""
    return isinstance(value, (tuple, list))


def has_rows(value: Any, count: int) -> bool:
    """Whether it is a tensor of so many rows."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.size(0) == count


def is_head(part: Any, whole: Any) -> bool:
    """Whether a tensor is the first rows of another."""
    if part is whole:
        return True
    if not (isinstance(part, Tensor) and isinstance(whole, Tensor)) or part.dim() == 0 or is_sparse(whole):
        return False
    where = [(x.untyped_storage()._cdata, x.storage_offset(), x.stride(), x.shape[1:]) for x in (part, whole)]
    return where[0] == where[1] and part.size(0) <= whole.size(0)


def is_of_nodes(value: Any, node_dim: int) -> bool:
    """Whether the first dimension is that of the nodes; of a pair, in both."""
    tensors = [item for item in value if item is not None] if is_pair(value) else [value]
    return all(isinstance(item, Tensor) and item.dim() and node_dim % item.dim() == 0 for item in tensors)
