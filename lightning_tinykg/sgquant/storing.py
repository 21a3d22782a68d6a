"""A model's stored tensors as packed codes: what each is made of as the forward comes upon it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

from lightning_tinykg.sgquant.blocks import Storage
from lightning_tinykg.sgquant.graphs import Graph, Graphs
from lightning_tinykg.sgquant.order import RowOrder
from lightning_tinykg.sgquant.packed import PackedFeatures
from lightning_tinykg.sgquant.quantize import Level, fake_quantize
from lightning_tinykg.sgquant.receivers import Block, EdgesByReceiver
from lightning_tinykg.sgquant.runs import run_of
from lightning_tinykg.sgquant.shares import divisors
from lightning_tinykg.sgquant.wiring import Meeting, Spot, Wiring, layers_of

__all__ = ["PackedSite", "Packing"]


@dataclass(frozen=True)
class PackedSite:
    """A tensor that is stored, or met again; what is left of a `Site` when all is decided.

    Args:
        owner: Where the tensor is met first.
        is_stored: Whether it arrives as it was stored there.
        of_edges: Whether its rows are edges.
        dim: Elements of a row.
        levels: How it is stored: one level, or one for each bucket.
        parameter: Name of the parameter that it is, if it is one.
    """

    owner: Spot
    is_stored: bool
    of_edges: bool
    dim: int
    levels: tuple[Level, ...]
    parameter: str | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it stays as it is."""
        return all(level.bits == 32 for level in self.levels)


class Packing(Storage):
    """Shown each tensor of a model, puts its codes in its place.

    Nodes' tensors become `PackedFeatures`. So do edges' that are given to messages, in the order of the blocks. What a
    softmax gives within a block lives no longer than the block: it takes the values that its codes stand for.

    Args:
        sites: What is met, and how it is stored.
        points: The last degree of each bucket but the last.
        graphs: Remembers degrees.
    """

    def __init__(self, sites: Mapping[Spot, PackedSite], points: Sequence[int], graphs: Graphs) -> None:
        self.sites, self.points, self._graphs = sites, tuple(points), graphs
        self.stored: dict[Spot, tuple[tuple[int, ...], tuple[int, ...], int]] = {}
        """What the last forward stored: shape, widths and bytes by place."""
        self._wiring: Wiring | None = None
        self._paths: dict[int, str] = {}
        self._orders: list[tuple[Tensor, RowOrder]] = []
        self._edges: EdgesByReceiver | None = None
        self._block: Block | None = None
        self._met_at_start: dict[Spot, int] = {}  # before a layer's messages, and before each of its blocks
        self._met_before: dict[Spot, int] = {}
        self._given: Spot | None = None  # what `edge_updater` gives at present
        self._packed: dict[Spot, tuple[Tensor, EdgesByReceiver, PackedFeatures]] = {}

    @contextmanager
    def shown(self, model: nn.Module) -> Iterator[None]:
        """Be shown a model's tensors within the context."""
        self._paths = {id(layer): path for path, layer in layers_of(model).items()}
        self._wiring = Wiring(model, self, self._graphs, end=self._packed.clear)
        try:
            yield
        finally:
            self._wiring.remove()
            self._wiring = None
            self._packed.clear()
            self.leaving()

    # -- as a visitor ------------------------------------------------------------------------------------------------

    def __call__(self, spot: Spot, x: Tensor, meeting: Meeting) -> Tensor:
        """What takes a tensor's place."""
        site = self.sites.get(spot)
        if site is None or site.is_stored or isinstance(x, PackedFeatures) or x.size(0) == 0:
            return x
        owner = self.sites[site.owner]
        if owner.is_whole or owner.parameter is not None:
            return x
        if meeting.receivers is not None:
            return self._store_edges(site, owner, x, meeting)
        order = self._order(meeting.graph, x.size(0), meeting.end, spot) if len(owner.levels) > 1 else None
        if x.dtype != torch.float32:  # codes decode to float32: values of another dtype are not kept as codes
            return fake_quantize(x, owner.levels, None if order is None else _buckets(order))
        return self._noted(site.owner, PackedFeatures.encode(x, owner.levels, order))

    def _noted(self, owner: Spot, packed: PackedFeatures) -> PackedFeatures:
        self.stored[owner] = tuple(packed.shape), tuple(part.bits for part in packed.parts), packed.nbytes
        return packed

    def _store_edges(self, site: PackedSite, owner: PackedSite, x: Tensor, meeting: Meeting) -> Tensor:
        edges, receivers, bucket = self._edges, meeting.receivers, None
        assert receivers is not None
        if edges is not None and self._block is not None:
            if self._is_result(site.owner) and x.dtype == torch.float32:
                return x  # `edge_updater` gives it, and stores it
            # numbered within the block; of all its edges or of some, such as those of one relation
            receivers = edges.receivers(self._block)[receivers]
        elif edges is not None and x.size(0) == edges.total and x.dtype == torch.float32:
            known = self._packed.get(site.owner)
            if known is None or known[0] is not x or known[1] is not edges:
                run = run_of(x[:1].numel())
                packed = PackedFeatures.encode(x, owner.levels, edges.edge_order, run, edges)
                known = self._packed[site.owner] = (x, edges, self._noted(site.owner, packed))
            return known[2]
        known_rows = 0 if meeting.graph is None else meeting.graph.rows
        rows = edges.count if edges is not None else known_rows or int(receivers.max()) + 1
        if len(owner.levels) > 1:
            bucket = _buckets(self._order(meeting.graph, rows, 1, site.owner))[receivers]
        share = next((level.share for level in owner.levels if level.share), None)
        divisor = None if share is None else divisors(share, receivers, meeting.senders, rows)
        return fake_quantize(x, owner.levels, bucket, divisor=divisor)

    def _is_result(self, owner: Spot) -> bool:
        """Whether a softmax is what `edge_updater` gives: then it arrives at `propagate` as it was stored."""
        return any(
            site.owner == owner and site.is_stored and spot.layer == owner.layer and spot.component == "attention"
            for spot, site in self.sites.items()
        )

    # -- as a storage ------------------------------------------------------------------------------------------------

    def order(self, layer: MessagePassing, edge_index: Tensor, receiving: int, count: int) -> RowOrder | None:
        """By bucket, if the layer has attention whose width depends on it."""
        path = self._path(layer)
        owners = [self.sites[s.owner] for spot, s in self.sites.items() if spot.layer == path and s.of_edges]
        if not any(len(owner.levels) > 1 for owner in owners):
            return None
        assert self._wiring is not None
        return self._order(self._wiring.graph_of(layer, edge_index), count, 1, Spot(path, "attention", ""))

    def passing(self, layer: MessagePassing, edges: EdgesByReceiver) -> None:
        """What the hooks on `propagate` meet is of these edges."""
        assert self._wiring is not None
        self._edges, self._block, self._met_at_start = edges, None, dict(self._wiring.times)

    def edge_levels(self, layer: MessagePassing, edges: EdgesByReceiver) -> Sequence[Level] | None:
        """How the softmax in `edge_update` is stored: in a layer that is called again, that of this call."""
        assert self._wiring is not None
        path, self._met_at_start = self._path(layer), dict(self._wiring.times)
        for spot, site in self.sites.items():
            if spot.layer == path and site.of_edges and site.owner == spot and self._is_result(spot):
                name, _, times = spot.name.partition("#")
                if int(times or 0) > self._wiring.times.get(spot._replace(name=name), -1):
                    self._given = spot
                    return None if site.is_whole else site.levels
        return None

    def entering(self, layer: MessagePassing, edges: EdgesByReceiver, block: Block) -> None:
        """What is met in a block is of its edges; and it is the same that is met in each block of a layer."""
        assert self._wiring is not None
        if block.nodes.start == 0:
            self._met_before = dict(self._wiring.times)
        else:
            self._wiring.times.clear()
            self._wiring.times.update(self._met_before)
        self._edges, self._block = edges, block

    def leaving(self) -> None:
        """After the last block."""
        self._edges = self._block = None

    def starting_over(self) -> None:
        """What has been met of a layer is met again."""
        assert self._wiring is not None
        self.leaving()
        self._met_before = self._met_at_start
        self._wiring.times.clear()
        self._wiring.times.update(self._met_at_start)

    def edges_stored(self, layer: MessagePassing, packed: PackedFeatures) -> None:
        """What `edge_updater` gave."""
        assert self._given is not None
        self._noted(self._given, packed)

    def _path(self, layer: MessagePassing) -> str:
        return self._paths[id(layer)]

    # -- nodes by bucket ---------------------------------------------------------------------------------------------

    def order_of(self, edge_index: Any, rows: int, spot: Spot, flow: str) -> RowOrder:
        """The order of a graph's nodes by bucket, for a tensor to be met there."""
        return self._order(self._graphs.of(edge_index, flow), rows, 1, spot)

    def _order(self, graph: Graph | None, rows: int, end: int, spot: Spot) -> RowOrder:
        bucket = None if graph is None else graph.buckets(self.points, rows, end)
        if bucket is None:
            raise RuntimeError(
                f"{spot} needs the degrees of its {rows} nodes, and no graph of so many is known: give the model "
                "edge_index as an argument of its forward"
            )
        known = next((order for of, order in self._orders if of is bucket), None)
        if known is None:
            known = RowOrder.of_buckets(bucket, len(self.points) + 1)
            self._orders = [*self._orders[-3:], (bucket, known)]
        return known


def _buckets(order: RowOrder) -> Tensor:
    """The bucket of each row, int64."""
    slots = order.slots(slice(None))
    ends = torch.tensor(order.starts[1:-1], dtype=torch.int32, device=slots.device)
    return torch.bucketize(slots, ends, right=True)
