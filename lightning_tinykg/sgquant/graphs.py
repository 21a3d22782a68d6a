"""The graph that a module is called with: where it is among the arguments, and the in-degrees of its nodes."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data, HeteroData
from torch_geometric.utils import is_sparse

from lightning_tinykg.sgquant.ends import ends_of

__all__ = ["Graph", "Graphs", "find_edges"]

_REMEMBERED = 8
"""Graphs whose degrees are kept: a full graph is met in every layer of every step."""


def find_edges(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The first thing among a call's arguments that is a graph's edges: an `edge_index`, a sparse matrix, or in `Data`.

    Args:
        args: Positional arguments.
        kwargs: The others.

    Returns:
        An integer tensor `[2, E]` or a sparse matrix (receivers by senders); `None` if there is none.

    Example:
        >>> edges = torch.tensor([[0, 1], [1, 0]])
        >>> find_edges((torch.ones(2, 4), edges), {}) is edges
        True
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, Data):
            value = value.get("edge_index") if value.get("edge_index") is not None else value.get("adj_t")
        elif isinstance(value, HeteroData):
            stores = [store for store in value.edge_stores if "edge_index" in store]
            # of several types of edges none is the graph of a layer that sees one type of nodes
            value = stores[0].edge_index if len(stores) == 1 else None
        if _is_edges(value):
            return value
    return None


def _is_edges(value: Any) -> bool:
    if isinstance(value, Tensor) and value.layout == torch.strided:
        return value.dim() == 2 and value.size(0) == 2 and value.dtype in (torch.int64, torch.int32)
    return value is not None and bool(is_sparse(value))


@dataclass(eq=False)  # a graph is itself only: its tensors have no one answer to ==
class Graph:
    """A graph's nodes by degree.

    Args:
        receivers: int64 `[E]`, the node at which each edge arrives.
        senders: int64 `[E]`, the node that it comes from.
    """

    receivers: Tensor
    senders: Tensor
    rows: int | None = None
    """Nodes that receive, as far as a layer has shown it: those without an edge are not in `receivers`."""
    _degrees: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)
    _buckets: dict[Any, Any] = field(default_factory=dict)

    @torch.inference_mode(False)
    def degrees(self, rows: int, end: int = 1) -> Tensor | None:
        """Degree of every node: edges that it receives, or sends where `end` is 0 and they are another kind of nodes.

        Args:
            rows: Number of nodes.
            end: 1 for nodes that receive, 0 for those that send.

        Returns:
            int64 `[rows]`; `None` if the graph has more nodes than that, and so is another one's.
        """
        if (rows, end) not in self._degrees:
            counts = torch.bincount(self.receivers if end else self.senders, minlength=rows)
            self._degrees[rows, end] = counts if counts.numel() == rows else None
        return self._degrees[rows, end]

    @torch.inference_mode(False)
    def buckets(self, points: tuple[int, ...], rows: int, end: int = 1) -> Tensor | None:
        """Bucket of every node, int64 `[rows]`; see `DegreeBuckets`."""
        key = (points, rows, end)
        if key not in self._buckets:
            degrees = self.degrees(rows, end)
            thresholds = torch.tensor(points, dtype=torch.long, device=self.receivers.device)
            self._buckets[key] = None if degrees is None else torch.bucketize(degrees, thresholds)
        found: Tensor | None = self._buckets[key]
        return found


class Graphs:
    """The graphs met of late, by the identity of their edges, so that degrees are counted once.

    Example:
        >>> graphs, edges = Graphs(), torch.tensor([[1, 2], [0, 0]])
        >>> graphs.of(edges) is graphs.of(edges)
        True
        >>> graphs.of(edges).degrees(rows=3)
        tensor([2, 0, 0])
    """

    def __init__(self) -> None:
        self._met: list[tuple[weakref.ref[Any], int, str, Graph]] = []
        self.last: Graph | None = None

    def of(self, edges: Any, flow: str = "source_to_target") -> Graph:
        """The graph of some edges.

        Args:
            edges: int64 `[2, E]`, or a sparse matrix of receivers by senders.
            flow: PyG's, which says which row of `edges` receives.
        """
        version = -1 if not isinstance(edges, Tensor) or edges.is_inference() else edges._version
        self._met = [entry for entry in self._met if entry[0]() is not None]
        for known, was, direction, graph in self._met:
            if known() is edges and was == version and direction == flow:
                self.last = graph
                return graph
        with torch.inference_mode(False), torch.no_grad():
            graph = self.last = Graph(*ends_of(edges, flow))
        self._met = [*self._met[1 - _REMEMBERED :], (weakref.ref(edges), version, flow, graph)]
        return graph
