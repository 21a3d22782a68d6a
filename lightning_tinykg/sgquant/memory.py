"""What quantized places take: bytes of the packed form with all its metadata, and the released code's count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from rich.console import Console
from rich.table import Table

from lightning_tinykg.bits.plan import Place
from lightning_tinykg.codecs.rows import rows_nbytes
from lightning_tinykg.sgquant.quantize import Level
from lightning_tinykg.sgquant.runs import runs_nbytes
from lightning_tinykg.sgquant.sites import Site
from lightning_tinykg.sgquant.wiring import Spot

__all__ = ["Memory", "Stored", "measure"]

_MIB = 1 << 20


@dataclass(frozen=True)
class Stored:
    """Rows that are stored alike.

    Attributes:
        place: Where.
        name: What the layer calls the tensor.
        rows: How many rows.
        dim: Elements of each.
        bits: Their width.
        packed_bytes: What they take, scales and zeros included.
    """

    place: Place
    name: str
    rows: int
    dim: int
    bits: int
    packed_bytes: int

    @property
    def full_bytes(self) -> int:
        """What they take in float32."""
        return self.rows * self.dim * 4


@dataclass(frozen=True)
class Memory:
    """Bytes of what a model stores of its nodes and edges, for the largest batch of the calibration.

    A tensor that is met at several places is counted once. Packed are the codes, each row whole bytes; a scale and a
    zero of each range; and, if nodes, or the edges that arrive at them, are stored in different ways, where each node
    is: four bytes a node, once for the nodes of a graph, and once for each embedding table. Weights are not counted (an
    embedding table that is a place is), nor is the graph.

    Attributes:
        stored: The rows, place by place.
        order_bytes: Bytes of where each node is.
        released_bits: Bits by the count of the paper's released code, which reproduces the figures in its comments: of
            each layer its input `x`, what messages are made of if that is not the input (`xW`), `x_i` and `x_j`
            gathered for every edge, in the width of the node that they are of, and three attention tensors if the layer
            computes attention, or the one that it is given. No weights, no metadata. Linear layers outside message
            passing: input and output.
    """

    stored: tuple[Stored, ...]
    order_bytes: int
    released_bits: float = field(default=0.0)

    @cached_property
    def full_bytes(self) -> int:
        """The same tensors in float32."""
        return sum(rows.full_bytes for rows in self.stored)

    @cached_property
    def packed_bytes(self) -> int:
        """All that is stored."""
        return sum(rows.packed_bytes for rows in self.stored) + self.order_bytes

    @property
    def ratio(self) -> float:
        """`full_bytes` over `packed_bytes`."""
        return self.full_bytes / max(self.packed_bytes, 1)

    @cached_property
    def average_bits(self) -> float:
        """Mean width of an element, without metadata."""
        elements = self.full_bytes // 4
        return sum(rows.rows * rows.dim * rows.bits for rows in self.stored) / max(elements, 1)

    def table(self) -> Table:
        """What is stored, as a rich table."""
        table = Table("layer", "component", "degrees", "tensor", "rows", "bits", "float32", "packed")
        for rows in self.stored:
            sizes = (f"{size / _MIB:.3f} MiB" for size in (rows.full_bytes, rows.packed_bytes))
            table.add_row(*rows.place, rows.name, f"{rows.rows} x {rows.dim}", str(rows.bits), *sizes)
        table.add_row("all", "", "", "", "", f"{self.average_bits:.2f}", *self._sums())
        return table

    def _sums(self) -> tuple[str, str]:
        return f"{self.full_bytes / _MIB:.3f} MiB", f"{self.packed_bytes / _MIB:.3f} MiB"

    def __str__(self) -> str:
        console = Console(width=120)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get().rstrip()


def measure(
    sites: Mapping[Spot, Site],
    bits: Mapping[Spot, Sequence[int]],
    levels: Mapping[Spot, Sequence[Level]],
    topologies: Sequence[str],
) -> Memory:
    """The memory of some sites.

    Args:
        sites: What a calibration found.
        bits: Widths of each, by bucket.
        levels: How each is stored: one level, or one for each bucket.
        topologies: Names of the buckets.
    """
    stored = []
    tables, orders = 0, set()  # rows of tables, which have an order of their own; and the nodes of a graph, by bucket
    for spot, site in sites.items():
        if not site.is_owner:
            continue
        if len(levels[spot]) > 1:
            # an edge is stored as its receiver says, so that it is the nodes' order that is kept
            kept = _outputs(sites, spot.layer) if site.of_edges else [site]
            tables += sum(sum(one.rows) for one in kept if one.parameter is not None)
            orders |= {tuple(one.rows) for one in kept if one.parameter is None}
        parts = levels[spot] if len(levels[spot]) > 1 else None
        before = 0  # rows of the buckets before, where all are one part
        for bucket, (rows, width) in enumerate(zip(site.rows, bits[spot], strict=True)):
            place = Place(spot.layer, spot.component, topologies[bucket])
            if parts is not None:
                nbytes = _part_nbytes(site, parts[bucket], rows, is_whole=False)
            else:
                # of one part each bucket takes what it adds; its range is counted with the first
                level, is_whole = levels[spot][0], width == 32
                nbytes = _part_nbytes(site, level, before + rows, is_whole)
                nbytes -= _part_nbytes(site, level, before, is_whole) if bucket else 0
                before += rows
            stored.append(Stored(place, spot.name, rows, site.dim, width, nbytes))
    return Memory(tuple(stored), 4 * (tables + sum(map(sum, orders))), _released_bits(sites, bits))


def _outputs(sites: Mapping[Spot, Site], layer: str) -> list[Site]:
    """What a layer puts out: a row for each node at which edges arrive."""
    return [site for spot, site in sites.items() if (spot.layer, spot.component) == (layer, "update")]


def _part_nbytes(site: Site, level: Level, rows: int, is_whole: bool) -> int:
    """What the rows of a part take; all metadata of it included. A tensor that is whole is not packed."""
    if site.of_edges and not is_whole:
        return runs_nbytes(rows, site.dim, level.bits)
    return rows_nbytes(rows, site.dim, level.bits, level.scales(rows))


def _released_bits(sites: Mapping[Spot, Site], bits: Mapping[Spot, Sequence[int]]) -> float:
    """The count of `Memory.released_bits`: bits, not bytes."""

    def bits_of(site: Site, rows: Sequence[int]) -> float:
        """So many rows of each bucket, in the widths of a site."""
        return site.dim * sum(count * width for count, width in zip(rows, bits[site.owner], strict=True))

    def whole(spot: Spot) -> float:
        """All rows of a tensor."""
        owner = sites[sites[spot].owner]
        return bits_of(owner, owner.rows)

    total = 0.0
    for layer in dict.fromkeys(spot.layer for spot in sites):
        of_layer = [spot for spot in sites if spot.layer == layer]
        messages = [spot for spot in of_layer if spot.component == "message"]
        first = [spot for spot in of_layer if "#" not in spot.name]  # where the layer is called for the first time
        inputs = [s for s in first if s.component == "embedding" and (sites[s].is_owner or not s.name.endswith(".1"))]
        total += sum(whole(spot) for spot in inputs)
        total += sum(whole(spot) for spot in messages if spot in first and sites[spot].is_owner)
        total += sum(bits_of(sites[spot], sites[spot].gathered) for spot in messages if sites[spot].gathered)
        softmax = any(spot.name.startswith("softmax") for spot in of_layer)
        for spot in (spot for spot in of_layer if spot.component == "attention" and sites[spot].dim):
            if not softmax or spot.name.startswith("softmax"):
                total += (3 if softmax else 1) * whole(spot)
        if not messages:
            total += sum(whole(spot) for spot in of_layer if spot.component == "update")
    return total
