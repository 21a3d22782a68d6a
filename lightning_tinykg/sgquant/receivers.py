"""The edges of a graph by receiver, cut into blocks: all edges that arrive at a node are in one block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_tinykg.sgquant.order import RowOrder

__all__ = ["Block", "BlockCache", "EdgesByReceiver"]

_REMEMBERED = 16
"""Graphs whose order is kept: GCN makes the same edges anew in every layer, RGCN has a graph for each relation."""


class Block(NamedTuple):
    """Some receivers and the edges that arrive at them, both as they lie in `EdgesByReceiver`.

    Attributes:
        nodes: Slots of the receivers.
        edges: Slots of the edges.
    """

    nodes: slice
    edges: slice


class EdgesByReceiver:
    """Edges, those of a receiver side by side and in the order in which they came.

    Kept are four bytes an edge (none, if they were in order before) and eight a node.

    Args:
        receivers: int64 `[E]`, where each edge arrives.
        count: Nodes that may receive.
        order: The receivers' order; `None`: as they are numbered.
        senders: int64 `[E]`, from which node of the same kind each comes; `None`: not known, or of another kind.

    Raises:
        IndexError: If an edge arrives at a node that is none of them.
        ValueError: If there are 2^31 edges or more.

    Example:
        >>> edges = EdgesByReceiver(torch.tensor([2, 0, 2, 1]), count=3)
        >>> edges.edge, list(edges.blocks(block_edges=2))
        (tensor([1, 3, 0, 2], dtype=torch.int32), [Block(nodes=slice(0, 2, None), edges=slice(0, 2, None)), \
Block(nodes=slice(2, 3, None), edges=slice(2, 4, None))])
    """

    def __init__(
        self, receivers: Tensor, count: int, order: RowOrder | None = None, senders: Tensor | None = None
    ) -> None:
        if receivers.numel() >= 2**31:
            raise ValueError(f"edges must be less than 2^31, got {receivers.numel()}")
        if order is not None and order.numel != count:
            raise ValueError(f"order must be one of {count} receivers, got one of {order.numel}")
        self.count, self.order, self.total, self.senders = count, order, receivers.numel(), senders
        slot = receivers if order is None else order.slots(receivers.int())
        arriving = torch.bincount(slot, minlength=count)
        if arriving.numel() > count:
            raise IndexError(f"edges must arrive at nodes below {count}, got {arriving.numel() - 1}")
        # where the edges of each receiver begin; once a graph, also where Python can read it
        self.starts = torch.cat([arriving.new_zeros(1), arriving.cumsum(0)])
        self._starts = self.starts.cpu().numpy()
        self.edge: Tensor | None = None
        if not bool((slot[1:] >= slot[:-1]).all()):
            self.edge = slot.sort(stable=True).indices.int()
        self._receivers = None if order is None else order.rows(slice(None))

    def blocks(self, block_edges: int) -> Iterator[Block]:
        """Cut it into blocks of at most so many edges and receivers; a receiver with more edges is a block by itself.

        No block is without an edge, as long as there are any: not every aggregation can take that.
        """
        starts, last = self._starts, 0
        while last < self.count:
            first = last
            while last < self.count and starts[last] == starts[first]:
                window = starts[last : last + block_edges + 1]
                fitting = int(window.searchsorted(starts[last] + block_edges, side="right")) - 1
                last = min(last + max(fitting, 1), self.count)
            if starts[last] == self.total:
                last = self.count
            yield Block(slice(first, last), slice(int(starts[first]), int(starts[last])))

    def receivers(self, block: Block) -> Tensor:
        """Its receivers, int64."""
        if self._receivers is not None:
            return self._receivers[block.nodes].long()
        return torch.arange(block.nodes.start, block.nodes.stop, device=self.starts.device)

    def local(self, block: Block) -> Tensor:
        """At which of its receivers each of its edges arrives, int64: ascending."""
        arriving = self.starts[block.nodes.start : block.nodes.stop + 1].diff()
        nodes = torch.arange(arriving.numel(), device=arriving.device)
        return nodes.repeat_interleave(arriving, output_size=block.edges.stop - block.edges.start)

    def pick(self, values: Tensor, block: Block) -> Tensor:
        """What a tensor over the edges, `[E, ...]`, holds for the edges of a block."""
        return values[block.edges] if self.edge is None else values.index_select(0, self.edge[block.edges])

    @cached_property
    def edge_order(self) -> RowOrder | None:
        """The order of what is stored by edge: by the receiver's part. `None`: one part, in the order of the edges."""
        if self.order is None:
            return None if self.edge is None else RowOrder((self.total,), row=self.edge)
        ends = [int(self._starts[start]) for start in self.order.starts]
        counts = [after - before for before, after in pairwise(ends)]
        edge = self.edge
        if edge is None:
            edge = torch.arange(self.total, dtype=torch.int32, device=self.starts.device)
        return RowOrder(counts, row=edge)

    @cached_property
    def degrees(self) -> Tensor:
        """How many edges arrive at each node, int64 `[nodes]`."""
        arriving = self.starts.diff()
        return arriving if self.order is None else arriving.index_select(0, self.order.slots(slice(None)))

    @property
    def most(self) -> int:
        """How many edges arrive at the node at which the most do."""
        return int(np.diff(self._starts).max(initial=0))

    @property
    def nbytes(self) -> int:
        """Bytes kept; the order of the nodes is counted where it is made, and the senders are the graph's."""
        kept = (self.edge, self.starts, self._receivers)
        return sum(tensor.nbytes for tensor in kept if tensor is not None)


@dataclass
class _Remembered:
    edge_index: Tensor
    version: int
    receiving: int
    found: EdgesByReceiver


class BlockCache:
    """Graphs met of late and their edges by receiver: by identity, or by content where a layer makes the same anew.

    Example:
        >>> cache, edges = BlockCache(), torch.tensor([[0, 1], [1, 0]])
        >>> cache.of(edges, 1, count=2) is cache.of(edges.clone(), 1, count=2)
        True
    """

    def __init__(self) -> None:
        self._met: list[_Remembered] = []

    def of(
        self,
        edge_index: Tensor,
        receiving: int,
        count: int,
        order: RowOrder | None = None,
        one_kind: bool = False,
    ) -> EdgesByReceiver:
        """The edges by receiver.

        Args:
            edge_index: int64 `[2, E]`.
            receiving: Which row of it receives.
            count: Nodes that may receive.
            order: Their order.
            one_kind: Whether senders and receivers are the same nodes.
        """
        self._met = [one for one in self._met if _version(one.edge_index) == one.version]
        fitting = [
            one
            for one in self._met
            if (one.receiving, one.found.count) == (receiving, count)
            and one.found.order is order
            and (one.found.senders is not None) == one_kind
        ]
        found = next((one for one in fitting if one.edge_index is edge_index), None)
        found = found or next((one for one in fitting if torch.equal(one.edge_index, edge_index)), None)
        if found is None:
            senders = edge_index[1 - receiving] if one_kind else None
            edges = EdgesByReceiver(edge_index[receiving], count, order, senders)
            found = _Remembered(edge_index, _version(edge_index), receiving, edges)
        others = [one for one in self._met if one is not found]
        self._met = [*others[1 - _REMEMBERED :], found]
        return found.found


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
