"""`PackedModel`: features, embeddings and attention are stored as codes, and decoded a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

from lightning_tinykg.sgquant.blocks import in_blocks
from lightning_tinykg.sgquant.copying import copied
from lightning_tinykg.sgquant.files import PackedFileError
from lightning_tinykg.sgquant.granularity import DegreeBuckets
from lightning_tinykg.sgquant.graphs import Graphs
from lightning_tinykg.sgquant.order import RowOrder
from lightning_tinykg.sgquant.packed import PackedFeatures
from lightning_tinykg.sgquant.quantize import Level
from lightning_tinykg.sgquant.quantizer import SGQuantizer
from lightning_tinykg.sgquant.receivers import BlockCache
from lightning_tinykg.sgquant.saving import load_model, save_model
from lightning_tinykg.sgquant.storing import PackedSite, Packing
from lightning_tinykg.sgquant.wiring import Spot

__all__ = ["PackedModel"]


class PackedModel(nn.Module):
    """A calibrated model, with what it stores really stored in the bits of its plan.

    Called as the model is, it gives what the model gives under `with quantizer:`. Each stored tensor of nodes becomes
    `PackedFeatures`, and so does the attention of edges; embedding tables that are places are kept as codes only.
    Messages are passed a block of receivers at a time, with the rows that they need decoded for them. Always in
    evaluation, without gradient; the model it was made of is not touched.

    Values equal the simulated ones to the last bit on one thread, but where a matrix product is rounded by how many
    rows it is given: see `blocks.py`. Tensors of another dtype than float32 are quantized, but not kept as codes.

    Args:
        model: The model, without its packed tables.
        sites: What is stored, and how.
        points: The last degree of each bucket but the last.
        tables: Packed embedding tables, by the names of their parameters.
        block_edges: Edges of a block.

    Example:
        >>> from torch_geometric.nn import GCN
        >>> model = GCN(4, 8, num_layers=2, out_channels=2).eval()
        >>> x, edge_index = torch.randn(5, 4), torch.tensor([[1, 2, 3], [0, 0, 4]])
        >>> quantizer = SGQuantizer(model, plan=4)
        >>> quantizer.calibrate(lambda: model(x, edge_index))
        >>> packed = PackedModel.from_quantizer(quantizer)
        >>> features = packed.pack_features(x, edge_index)
        >>> features
        PackedFeatures([5, 4], bits 4, 18 bytes)
        >>> with quantizer, torch.no_grad():
        ...     torch.allclose(packed(features, edge_index), model(x, edge_index))
        True
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[Spot, PackedSite],
        points: Sequence[int],
        tables: Mapping[str, PackedFeatures],
        block_edges: int = 1 << 14,
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.tables = dict(tables)
        self.block_edges = block_edges
        self._packing, self._cache = Packing(sites, points, Graphs()), BlockCache()
        self._aliases = {name: _same_parameters(model, name) for name in self.tables}
        self._put_tables()

    @classmethod
    def from_quantizer(cls, quantizer: SGQuantizer, block_edges: int = 1 << 14) -> PackedModel:
        """Pack a model by the plan that is in force.

        Args:
            quantizer: Calibrated. Attached or not, it stays so.
            block_edges: Edges of a block, at most, unless a single receiver has more.

        Raises:
            RuntimeError: If there was no calibration.
        """
        quantizer.places()  # refuses what is not calibrated
        sites = {}
        for spot, site in quantizer.sites.items():
            levels = quantizer.levels(spot)
            sites[spot] = PackedSite(site.owner, site.is_stored, site.of_edges, site.dim, levels, site.parameter)
        was_attached = quantizer.is_attached
        quantizer.detach()
        try:
            parameters = dict(quantizer.model.named_parameters())
            tables: dict[str, PackedFeatures] = {}
            memo: dict[int, Any] = {}  # tables are not copied: in their place stands what is made of them
            for site in quantizer.sites.values():
                if site.parameter is not None and not sites[site.spot].is_whole:
                    table = parameters[site.parameter]
                    packed = _pack_table(table, sites[site.spot].levels, site.degrees, quantizer.points)
                    if table.dtype == torch.float32:
                        tables[site.parameter] = memo[id(table)] = packed
                    else:  # codes decode to float32
                        memo[id(table)] = nn.Parameter(packed.decode().to(table.dtype), requires_grad=False)
            model = copied(quantizer.model, memo)
        finally:
            if was_attached:
                quantizer.attach()
        return cls(model, sites, quantizer.points, tables, block_edges)

    def _put_tables(self) -> None:
        for name, table in self.tables.items():
            for path, attribute in self._aliases[name]:
                module = self.model.get_submodule(path)
                module._parameters.pop(attribute, None)
                # an attribute of its own: PyTorch moves and counts its parameters as dense tensors
                module.__dict__[attribute] = table

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModel:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # of PyTorch
        device = fn(torch.empty(0)).device
        self.tables = {name: table.parts_to(device) for name, table in self.tables.items()}
        self._put_tables()
        return self

    def train(self, mode: bool = True) -> PackedModel:
        """It stays in evaluation."""
        super().train(False)
        return self

    # -- inference ---------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives; node features may be `PackedFeatures`."""
        with self.running() as model:
            return model(*args, **kwargs)

    @contextmanager
    def running(self) -> Iterator[nn.Module]:
        """The model, for calls of other methods than its forward: packed within the context.

        Yields:
            The model; without gradient.
        """
        packing = self._packing
        packing.stored.clear()
        with (
            torch.no_grad(),
            in_blocks(self.model, self.block_edges, packing, self._cache),
            packing.shown(self.model),
        ):
            yield self.model

    def input_room(
        self, shape: Sequence[int], edge_index: Any, place: str | None = None, device: Any = "cpu"
    ) -> tuple[PackedFeatures, Sequence[Level]]:
        """Room for the codes of the model's input features, to be filled in pieces: `room.store(rows, x, levels)`.

        Args:
            shape: `[N, d]`.
            edge_index: The graph, whose degrees decide about the widths.
            place: The layer that takes the features in; `None`: the first whose input is so wide.
            device: Where.

        Returns:
            The room, and the levels that its `store` wants.

        Raises:
            ValueError: If no layer takes such features in.
        """
        sites = self._packing.sites
        fitting = [
            spot
            for spot, site in sites.items()
            if site.owner == spot and spot.component == "embedding" and site.parameter is None
            if site.dim == shape[1] and place in (None, spot.layer)
        ]
        if not fitting:
            known = sorted({f"{spot.layer} ({site.dim} wide)" for spot, site in sites.items() if site.owner == spot})
            raise ValueError(
                f"features must be as wide as what a layer stores as its input, got {shape[1]}"
                f"{'' if place is None else f' for {place}'}; there are {', '.join(known)}"
            )
        levels, order = sites[fitting[0]].levels, None
        if len(levels) > 1 and "." in fitting[0].name:
            raise ValueError(
                f"features of {fitting[0]} must be given as floats: they are of senders, whose degrees are "
                "those of the layer's own edges"
            )
        if len(levels) > 1:
            layers = (m for m in self.model.modules() if isinstance(m, MessagePassing))
            order = self._packing.order_of(edge_index, shape[0], fitting[0], next(layers).flow)
        return PackedFeatures.empty(shape, levels, order, device), levels

    def pack_features(
        self, x: Tensor | Iterable[Tensor], edge_index: Any, place: str | None = None, rows: int | None = None
    ) -> PackedFeatures:
        """The codes of the model's input features, to be passed in their place.

        The features must reach that layer as they are: what the model does to them before is done to the values that
        the codes stand for. Dropout does nothing in evaluation.

        Args:
            x: Float `[N, d]`; or pieces of it, one after the other, that need not be in memory together.
            edge_index: The graph.
            place: The layer that takes them in; `None`: the first whose input is so wide.
            rows: `N`, for pieces.

        Returns:
            `PackedFeatures` of shape `[N, d]`.

        Raises:
            ValueError: If no layer takes such features in, or the pieces are not `rows` rows.
        """
        if isinstance(x, Tensor):
            room, levels = self.input_room(x.shape, edge_index, place, x.device)
            by_rows = torch.split(x, max(1, (1 << 20) // max(x.size(1), 1)))
            pieces: Iterable[Tensor] = by_rows
            rows = x.size(0)
        else:
            pieces, room, levels = x, None, ()
        if rows is None:
            raise ValueError("rows must be given with pieces, got None")
        done = 0
        for piece in pieces:
            if room is None:
                room, levels = self.input_room((rows, piece.size(1)), edge_index, place, piece.device)
            if done + piece.size(0) > rows:
                raise ValueError(f"pieces must be of {rows} rows, got {done + piece.size(0)} and perhaps more")
            room.store(slice(done, done + piece.size(0)), piece, levels)
            done += piece.size(0)
        if room is None or done != rows:
            raise ValueError(f"pieces must be of {rows} rows, got {done}")
        return room

    # -- what is stored ----------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes that are kept between calls: weights and buffers, packed tables and their rows' order."""
        dense = {id(t): t.nbytes for t in (*self.model.parameters(), *self.model.buffers())}
        orders = {id(t.order): t.order.nbytes for t in self.tables.values() if t.order is not None}
        return sum(dense.values()) + sum(table.nbytes for table in self.tables.values()) + sum(orders.values())

    def table(self) -> Table:
        """What is kept, and what the last call stored besides, as a rich table."""
        table = Table("what", "shape", "bits", "float32", "packed", title="Packed model")

        def row(what: str, shape: Sequence[int], bits: Iterable[int], nbytes: int) -> None:
            full = 4 * torch.Size(shape).numel()
            table.add_row(what, " x ".join(map(str, shape)), ", ".join(map(str, bits)), f"{full:,}", f"{nbytes:,}")

        for name, packed in self.tables.items():
            row(name, packed.shape, (part.bits for part in packed.parts), packed.nbytes)
        for name, tensor in self.model.state_dict().items():
            row(name, tensor.shape, (8 * tensor.element_size(),), tensor.nbytes)
        for spot, (shape, bits, nbytes) in self._packing.stored.items():
            row(str(spot), shape, bits, nbytes)
        return table

    def __str__(self) -> str:
        console = Console(width=120)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get().rstrip()

    # -- in and out --------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write codes and weights, and a card that says what they are.

        Args:
            folder: Made if it is not there.
        """
        save_model(
            Path(folder),
            self.model,
            self._packing.sites,
            self._packing.points,
            self.tables,
            {"block_edges": self.block_edges},
        )

    @classmethod
    def load(cls, folder: str | Path, model: nn.Module) -> PackedModel:
        """Read what `save` wrote.

        Args:
            folder: Where it was written to.
            model: One of the same class and sizes, whose weights do not matter: they are replaced. It is taken over,
                not copied. Made under `torch.device("meta")`, its tables are never in memory.

        Raises:
            PackedFileError: If the folder is missing or corrupt, or of another model.
        """
        sites, points, tables, dense, said = load_model(Path(folder), model)
        packed = cls(model, sites, points, tables, said["block_edges"])
        try:
            model.load_state_dict(dense, assign=True)
        except RuntimeError as error:
            raise PackedFileError(f"{folder}: of another model: {error}") from None
        model.requires_grad_(False)
        return packed


def _pack_table(
    table: Tensor, levels: Sequence[Level], degrees: Tensor | None, points: Sequence[int]
) -> PackedFeatures:
    order = None
    if len(levels) > 1:
        assert degrees is not None
        order = RowOrder.of_buckets(DegreeBuckets.of(degrees.to(table.device), points), len(points) + 1)
    return PackedFeatures.encode(table.detach().float(), levels, order)


def _same_parameters(model: nn.Module, name: str) -> list[tuple[str, str]]:
    """Where in a model a parameter is: module paths and attributes, several if it is shared."""
    path, _, attribute = name.rpartition(".")
    parameter = model.get_submodule(path)._parameters[attribute]
    return [
        (where, key)
        for where, module in model.named_modules()
        for key, value in module._parameters.items()
        if value is parameter
    ]
