"""One layer in blocks: its `propagate` and `edge_updater`, and what is stored while they run; see `blocks.py`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch_geometric import EdgeIndex
from torch_geometric.nn import MessagePassing
from torch_geometric.utils import is_sparse

from lightning_tinykg.sgquant.of_one_block import OfOneBlock
from lightning_tinykg.sgquant.order import RowOrder
from lightning_tinykg.sgquant.packed import PackedFeatures
from lightning_tinykg.sgquant.padding import padded_to
from lightning_tinykg.sgquant.quantize import Level
from lightning_tinykg.sgquant.receivers import Block, BlockCache, EdgesByReceiver
from lightning_tinykg.sgquant.runs import RunWriter, run_of

__all__ = ["BlockedLayer", "Storage"]

_OUTRIGHT = ("edge_index", "edge_index_j", "adj_t")
"""What a layer may compute anything from, such as a degree: it must see the whole graph then."""


class Storage:
    """What is stored while a layer runs, and how; this one stores nothing."""

    def order(self, layer: MessagePassing, edge_index: Tensor, receiving: int, count: int) -> RowOrder | None:
        """The order of the receivers; `None`: as they are numbered."""
        return None

    def passing(self, layer: MessagePassing, edges: EdgesByReceiver) -> None:
        """Called before the hooks on `propagate`, which may then store what it is given."""

    def edge_levels(self, layer: MessagePassing, edges: EdgesByReceiver) -> Sequence[Level] | None:
        """How the result of `edge_updater` is stored; `None`: as it is."""
        return None

    def edges_stored(self, layer: MessagePassing, packed: PackedFeatures) -> None:
        """Called with what `edge_updater` gave, if that was stored."""

    def entering(self, layer: MessagePassing, edges: EdgesByReceiver, block: Block) -> None:
        """Called before each block."""

    def leaving(self) -> None:
        """Called after the last block."""

    def starting_over(self) -> None:
        """Called where a block has shown that it can't be done in blocks: the layer runs again, on the whole."""


class BlockedLayer:
    """A layer's `propagate` and `edge_updater`, in blocks.

    Args:
        layer: The layer.
        block_edges: Edges of a block.
        cache: Where graphs are remembered.
        storage: What is stored while it runs.
    """

    def __init__(self, layer: MessagePassing, block_edges: int, cache: BlockCache, storage: Storage) -> None:
        self.layer, self.block_edges, self.cache, self.storage = layer, block_edges, cache, storage
        self._whole = {name: getattr(layer, name) for name in ("propagate", "edge_updater")}
        self._receiving = 1 if layer.flow == "source_to_target" else 0
        inspector = layer.inspector
        self._names = {
            name: inspector.get_param_names(name) for name in ("message", "aggregate", "update", "edge_update")
        }

    # -- what covers the layer's own ---------------------------------------------------------------------------------

    def propagate(self, edge_index: Any, size: Any = None, **kwargs: Any) -> Any:
        """As the layer's own."""
        layer = self.layer
        if is_sparse(edge_index) and layer.fuse:
            return self._whole["propagate"](edge_index, size=size, **kwargs)  # a sparse product: no messages arise
        edge_index, sizes, why = self._examined(edge_index, size, kwargs, ("message", "aggregate"))
        if why:
            return self._give_up("propagate", why, edge_index, size, kwargs)
        edges = self._edges(edge_index, sizes)
        if edges.count == 0:
            return self._whole["propagate"](edge_index, size=size, **kwargs)
        self.storage.passing(layer, edges)
        try:
            with padded_to(layer, edges.most):
                return self._propagate(edges, sizes, edge_index, size, kwargs)
        finally:
            self.storage.leaving()

    def _propagate(
        self, edges: EdgesByReceiver, sizes: list[int], edge_index: Tensor, size: Any, kwargs: dict[str, Any]
    ) -> Any:
        layer, given = self.layer, (edge_index, size, kwargs)
        for hook in layer._propagate_forward_pre_hooks.values():
            edge_index, size, kwargs = hook(layer, (edge_index, size, kwargs)) or (edge_index, size, kwargs)
        if edge_index is not given[0]:
            edges = self._edges(edge_index, sizes)
        before, out, dim = dict(layer.__dict__), None, layer.node_dim
        for block in edges.blocks(self.block_edges):
            part = self._updated(edge_index, edges, block, sizes, kwargs)
            pieces, nodes = tree_leaves(part), block.nodes.stop - block.nodes.start
            if not all(_has_rows(piece, dim, nodes) for piece in pieces):
                why = f"its update gives {_described(part, dim)} for {nodes} nodes"
                self.storage.starting_over()
                return self._give_up("propagate", why, *given)
            if out is None:
                if block.nodes.stop == edges.count and edges.order is None:
                    out = part
                    break
                out = tree_map(lambda piece: _room(piece, dim, edges.count), part)
            for whole, piece in zip(tree_leaves(out), pieces, strict=True):
                whole.index_copy_(dim, edges.receivers(block), piece)
            del part, pieces
        else:
            for name, value in layer.__dict__.items():
                if isinstance(value, Tensor) and before.get(name) is not value:
                    layer.__dict__[name] = OfOneBlock()
        for hook in layer._propagate_forward_hooks.values():
            result = hook(layer, (edge_index, sizes, kwargs), out)
            out = out if result is None else result
        return out

    def edge_updater(self, edge_index: Any, size: Any = None, **kwargs: Any) -> Any:
        """As the layer's own."""
        edge_index, sizes, why = self._examined(edge_index, size, kwargs, ("edge_update",))
        if why:
            return self._give_up("edge_updater", why, edge_index, size, kwargs)
        edges = self._edges(edge_index, sizes)
        if edges.count == 0:
            return self._whole["edge_updater"](edge_index, size=size, **kwargs)
        try:
            return self._update_edges(edges, sizes, edge_index, size, kwargs)
        finally:
            self.storage.leaving()

    def _update_edges(
        self, edges: EdgesByReceiver, sizes: list[int], edge_index: Tensor, size: Any, kwargs: dict[str, Any]
    ) -> Any:
        layer = self.layer
        levels = self.storage.edge_levels(layer, edges)
        pre, post = layer._edge_update_forward_pre_hooks, layer._edge_update_forward_hooks
        out: Any = None
        writer: RunWriter | None = None
        for block in edges.blocks(self.block_edges):
            self.storage.entering(layer, edges, block)
            given = self._collected("edge_update", edge_index, edges, block, sizes, kwargs)
            for hook in pre.values():
                _, _, given = hook(layer, (edge_index, size, given)) or (None, None, given)
            part = layer.edge_update(**given)
            for hook in post.values():
                result = hook(layer, (edge_index, size, given), part)
                part = part if result is None else result
            if not isinstance(part, Tensor):
                self.storage.starting_over()
                return self._give_up("edge_updater", f"it gives {_described(part, 0)}", edge_index, size, kwargs)
            if out is None:
                shape = torch.Size((edges.total, *part.shape[1:]))
                if levels is None or part.dtype != torch.float32:  # which is what codes decode to
                    out = part.new_empty(shape)
                else:
                    run = run_of(shape[1:].numel())
                    out = PackedFeatures.empty(shape, levels, edges.edge_order, part.device, run, edges)
                    writer = RunWriter(out, levels)
            if writer is not None:
                writer.write(part)
            elif edges.edge is None:
                out[block.edges] = part
            else:
                out[edges.edge[block.edges]] = part
        if writer is not None:
            self.storage.edges_stored(layer, out)
        return out

    # -- a block -----------------------------------------------------------------------------------------------------

    def _updated(
        self, edge_index: Tensor, edges: EdgesByReceiver, block: Block, sizes: list[int], kwargs: Mapping[str, Any]
    ) -> Any:
        """The rows of a block's receivers: message, aggregate, update, as PyG's `propagate` runs them."""
        layer = self.layer
        self.storage.entering(layer, edges, block)
        given = self._collected("message", edge_index, edges, block, sizes, kwargs)
        for hook in layer._message_forward_pre_hooks.values():
            given = _hooked(hook(layer, (given,)), given)
        out = layer.message(**given)
        for hook in layer._message_forward_hooks.values():
            result = hook(layer, (given,), out)
            out = out if result is None else result
        del given
        given = self._collected("aggregate", edge_index, edges, block, sizes, kwargs)
        for hook in layer._aggregate_forward_pre_hooks.values():
            given = _hooked(hook(layer, (given,)), given)
        out = layer.aggregate(out, **given)
        for hook in layer._aggregate_forward_hooks.values():
            result = hook(layer, (given,), out)
            out = out if result is None else result
        return layer.update(out, **self._collected("update", edge_index, edges, block, sizes, kwargs))

    def _collected(
        self,
        function: str,
        edge_index: Tensor,
        edges: EdgesByReceiver,
        block: Block,
        sizes: list[int],
        kwargs: Mapping[str, Any],
    ) -> dict[str, Any]:
        """What one of the layer's functions is given in a block."""
        found: dict[str, Any] = {}
        nodes = block.nodes.stop - block.nodes.start
        for name in self._names[function]:
            if name in ("index", "edge_index_i"):
                found[name] = edges.local(block)
            elif name in ("dim_size", "size_i"):
                found[name] = nodes
            elif name == "size_j":
                found[name] = sizes[1 - self._receiving]
            elif name == "size":
                found[name] = [nodes if end == self._receiving else size for end, size in enumerate(sizes)]
            elif name == "ptr":
                found[name] = None
            elif name.endswith("_j"):
                senders = edges.pick(edge_index[1 - self._receiving], block)
                found[name] = self._lifted(kwargs.get(name[:-2]), 0, senders)
            elif name.endswith("_i"):
                receivers = edges.pick(edge_index[self._receiving], block)
                found[name] = self._lifted(kwargs.get(name[:-2]), 1, receivers)
            elif name in kwargs:
                found[name] = self._sliced(function, kwargs[name], edges, block)
        collected: dict[str, Any] = self.layer.inspector.collect_param_data(function, found)
        return collected

    def _lifted(self, value: Any, end: int, index: Tensor) -> Any:
        """Rows of nodes, one for each edge."""
        value = value[end] if isinstance(value, (tuple, list)) else value
        return self.layer._index_select(value, index) if isinstance(value, Tensor) else None

    def _sliced(self, function: str, value: Any, edges: EdgesByReceiver, block: Block) -> Any:
        """What is given as it is: over edges, or in `update` over nodes."""
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        if function == "update":
            dim = self.layer.node_dim
            fits = value.dim() >= abs(dim) and value.size(dim) == edges.count
            return value.index_select(dim, edges.receivers(block)) if fits else value
        if value.size(0) != edges.total:
            return value
        if isinstance(value, PackedFeatures) and value.order is edges.edge_order:
            return value.decode_slots(block.edges)
        return edges.pick(value, block)

    # -- the whole ---------------------------------------------------------------------------------------------------

    def _edges(self, edge_index: Tensor, sizes: list[int]) -> EdgesByReceiver:
        count = sizes[self._receiving]
        order = self.storage.order(self.layer, edge_index, self._receiving, count)
        return self.cache.of(edge_index, self._receiving, count, order, one_kind=sizes[0] == sizes[1])

    def _examined(
        self, edge_index: Any, size: Any, kwargs: Mapping[str, Any], functions: Sequence[str]
    ) -> tuple[Any, list[int], str]:
        """The edges as an ordinary tensor, senders and receivers counted, and why this can't be done in blocks."""
        layer = self.layer
        if is_sparse(edge_index):
            return edge_index, [], "it is given a sparse matrix of edges"
        if isinstance(edge_index, EdgeIndex):
            size = edge_index.sparse_size() if size is None else size
            edge_index = edge_index.as_tensor()
        sizes = layer._check_input(edge_index, size)
        if layer.explain:
            return edge_index, [], "it is being explained"
        if functions[0] == "message" and "propagate" in vars(type(layer)) and not hasattr(layer, "_jinja_propagate"):
            return edge_index, [], "it has a propagate of its own"
        names = [name for function in functions for name in self._names[function]]
        for name in names:
            if name in _OUTRIGHT:
                return edge_index, [], f"its {functions[0]} wants {name}"
            if name[-2:] in ("_i", "_j") and name not in layer.special_args:
                self._count(name, kwargs.get(name[:-2]), sizes)
        both = [one if one is not None else sizes[1 - end] for end, one in enumerate(sizes)]
        if None in both:
            return edge_index, [], "the number of its nodes is not known"
        if layer.flow != "source_to_target" and both[0] != both[1]:
            return edge_index, [], "it sends from targets to sources between two kinds of nodes"
        for name in names:
            value = kwargs.get(name)
            if isinstance(value, Tensor) and value.dim() and value.size(0) != edge_index.size(1):
                if name.endswith("ptr"):
                    return edge_index, [], f"its {functions[0]} wants the edges in the order of {name}"
                if value.size(0) in both and value.size(0) > 1:
                    return edge_index, [], f"its {functions[0]} wants {name}, which is of all nodes"
        return edge_index, both, ""

    def _count(self, name: str, value: Any, sizes: list[int | None]) -> None:
        if isinstance(value, (tuple, list)):
            for end in (0, 1):
                if isinstance(value[end], Tensor):
                    self.layer._set_size(sizes, end, value[end])
        elif isinstance(value, Tensor):
            self.layer._set_size(sizes, self._receiving if name.endswith("_i") else 1 - self._receiving, value)

    def _give_up(self, name: str, why: str, edge_index: Any, size: Any, kwargs: Mapping[str, Any]) -> Any:
        """Run it on the whole graph."""
        key = f"{type(self.layer).__name__} passes its messages on the whole graph at once, and not in blocks: {why}"
        if key not in _warned:
            _warned.add(key)
            warnings.warn(key, stacklevel=4)
        return self._whole[name](edge_index, size=size, **kwargs)


_warned: set[str] = set()


def _has_rows(piece: Any, dim: int, rows: int) -> bool:
    return isinstance(piece, Tensor) and -piece.dim() <= dim < piece.dim() and piece.size(dim) == rows


def _room(piece: Tensor, dim: int, nodes: int) -> Tensor:
    """Room for what a block's piece is of, of all nodes."""
    shape = list(piece.shape)
    shape[dim] = nodes
    return piece.new_empty(shape)


def _described(part: Any, dim: int) -> str:
    rows = isinstance(part, Tensor) and -part.dim() <= dim < part.dim()
    return f"{part.size(dim)} rows" if rows else f"a {type(part).__name__}"


def _hooked(result: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What a hook before a function made of its arguments."""
    if result is None:
        return given
    changed: dict[str, Any] = result[0] if isinstance(result, tuple) else result
    return changed
