"""Where a model's tensors are met: each one is shown to a visitor, and what comes back takes its place.

Inputs and outputs are met in a wrapper around a layer's forward, put on the instance: a `with`, whatever happens in
it. What messages are made of is met in PyG's propagate hook, a softmax in a copy of the method that calls it. Nothing
of the model's classes is edited, and all of it is undone by `remove`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing
from torch_geometric.nn.dense.linear import Linear
from torch_geometric.utils import is_sparse, is_torch_sparse_tensor
from torch_geometric.utils.sparse import set_sparse_value

from lightning_tinykg.sgquant.ends import (
    are_of_one_kind,
    asked_for,
    end_of,
    ends_of,
    has_rows,
    is_head,
    is_of_nodes,
    is_pair,
)
from lightning_tinykg.sgquant.graphs import Graph, Graphs, find_edges
from lightning_tinykg.sgquant.substitutes import Dropped, with_softmax

__all__ = ["Meeting", "Spot", "Visitor", "Wiring", "layers_of"]


class Spot(NamedTuple):
    """One tensor of a place: where in the model it is met.

    Attributes:
        layer: Path of the layer.
        component: One of `COMPONENTS`.
        name: What the layer calls it: `x`, `x.0` for the first of a pair, `softmax` for one computed within; `x#1`
            where it is met a second time in one call of the model.
    """

    layer: str
    component: str
    name: str

    def __str__(self) -> str:
        return f"{self.layer} / {self.component} ({self.name})"


@dataclass(frozen=True)
class Meeting:
    """The circumstances in which a tensor is met.

    Attributes:
        graph: The graph at hand; `None` if none has been seen.
        end: 1 for nodes that receive messages, 0 for nodes of another kind that only send.
        receivers: int64 `[E]`, the node of each edge, if the rows are edges; else `None`.
        senders: int64 `[E]`, the node that each edge comes from, if it is known and of the same kind; else `None`.
        gathered: int64 `[E]` each, the rows that edges take of a tensor that messages are made of; else nothing.
        layer: The layer itself.
    """

    graph: Graph | None
    end: int
    receivers: Tensor | None
    senders: Tensor | None
    gathered: tuple[Tensor, ...]
    layer: nn.Module

    @property
    def rows(self) -> int:
        """Of edges: how many nodes there are, as far as is known."""
        assert self.receivers is not None
        known = None if self.graph is None else self.graph.rows
        ends = [end for end in (self.receivers, self.senders) if end is not None]
        return known or max(int(end.max()) for end in ends) + 1


class Visitor(Protocol):
    """Who is shown each tensor."""

    def __call__(self, spot: Spot, x: Tensor, meeting: Meeting) -> Tensor:
        """Return what takes the tensor's place."""


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that hold places: message passing modules, and linear layers outside of these.

    Args:
        model: Any module.

    Returns:
        Path -> module, in the order of `named_modules`. Whether a linear layer takes node features, a forward shows.

    Raises:
        ValueError: If there is no message passing module.

    Example:
        >>> from torch_geometric.nn import GCNConv
        >>> list(layers_of(nn.ModuleDict({"lin": nn.Linear(4, 2), "conv": GCNConv(2, 2)})))
        ['lin', 'conv']
    """
    found: dict[str, nn.Module] = {}
    passing: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{outer}." if outer else "") for outer in passing):
            continue
        if isinstance(module, MessagePassing):
            passing.append(path)
            found[path] = module
        elif isinstance(module, (nn.Linear, Linear)):
            found[path] = module
    if not passing:
        raise ValueError(
            f"model must hold PyG MessagePassing layers, which are what is quantized, got a {type(model).__name__} "
            "without any"
        )
    return found


class Wiring:
    """Shows a model's tensors to a visitor, until `remove`.

    Args:
        model: A model with message passing layers.
        visit: Shown each floating tensor of nodes or edges, in the order in which the forward comes upon them.
        graphs: Remembers degrees.
        begin: Called when an outermost call of a part of the model begins; its argument: whether that is in training.
        end: Called when it has ended without an exception.
    """

    def __init__(
        self,
        model: nn.Module,
        visit: Visitor,
        graphs: Graphs,
        begin: Callable[[bool], None] = lambda training: None,
        end: Callable[[], None] = lambda: None,
    ) -> None:
        self._visit, self._graphs, self._begin, self._end = visit, graphs, begin, end
        self._calls: list[tuple[nn.Module, Any]] = []  # modules that are being called, and the edges given to each
        self._handles: list[Any] = []
        self._replaced: list[tuple[nn.Module, str, Any, Any]] = []  # module, attribute, ours, what was there
        self._flow = "source_to_target"
        self.times: dict[Spot, int] = {}  # how often each was met in this outermost call
        layers = layers_of(model)
        for part in dict.fromkeys(part for path in layers for part in _around(path)):
            module = model.get_submodule(part)
            self._put(module, "forward", _not_traced(self._scoped(module, part if part in layers else None)))
        for path, layer in layers.items():
            if isinstance(layer, MessagePassing):
                self._flow = layer.flow
                self._wire_passing(path, layer)

    def remove(self) -> None:
        """Take everything off again."""
        for handle in self._handles:
            handle.remove()
        for module, name, ours, previous in reversed(self._replaced):
            if module.__dict__.get(name) is ours:
                if previous is None:
                    del module.__dict__[name]
                else:
                    module.__dict__[name] = previous
        self._handles, self._replaced = [], []

    def _put(self, module: nn.Module, name: str, ours: Any) -> None:
        self._replaced.append((module, name, ours, module.__dict__.get(name)))
        module.__dict__[name] = ours

    # -- calls and graphs --------------------------------------------------------------------------------------------

    def _scoped(self, module: nn.Module, layer: str | None) -> Any:
        """The module's forward, within a call; of a layer, with its input and output shown."""
        forward = module.forward

        @functools.wraps(forward)
        def scoped(*args: Any, **kwargs: Any) -> Any:
            with self._call(module, args, kwargs):
                if layer is None:
                    return forward(*args, **kwargs)
                args, kwargs = self._input(layer, module, args, kwargs)
                return self._output(layer, module, forward(*args, **kwargs))

        return scoped

    @contextmanager
    def _call(self, module: nn.Module, args: Any, kwargs: Any) -> Iterator[None]:
        outermost = not self._calls
        if outermost:
            self.times.clear()
            self._begin(module.training)
        with ExitStack() as stack:
            if outermost and module.training:
                stack.enter_context(Dropped())
            self._calls.append((module, find_edges(args, kwargs)))
            stack.callback(self._calls.pop)
            yield
        if outermost:
            self._end()

    def graph_of(self, layer: nn.Module, edges: Any = None) -> Graph | None:
        """The graph of a layer: its own edges; else those of the outermost call that has any; else the last one's."""
        calls = [given for module, given in self._calls if given is not None]
        if isinstance(layer, MessagePassing):
            own = [given for module, given in self._calls if module is layer and given is not None]
            calls = own or calls or ([] if edges is None else [edges])
        if calls:
            return self._graphs.of(calls[0], getattr(layer, "flow", self._flow))
        return self._graphs.last

    def _met(
        self, spot: Spot, x: Any, layer: nn.Module, end: int = 1, edges: Any = None, gathered: tuple[Tensor, ...] = ()
    ) -> Any:
        if not isinstance(x, Tensor) or x.dim() == 0 or is_sparse(x):
            return x
        graph = self.graph_of(layer, edges)
        if graph is not None and end == 1 and isinstance(layer, MessagePassing):
            graph.rows = x.size(0)
        return self._show(spot, x, Meeting(graph, end, None, None, gathered, layer))

    def _met_edges(
        self,
        spot: Spot,
        x: Tensor,
        layer: nn.Module,
        receivers: Tensor | None,
        senders: Tensor | None = None,
        edges: Any = None,
    ) -> Tensor:
        if receivers is None:
            return x
        return self._show(spot, x, Meeting(self.graph_of(layer, edges), 1, receivers, senders, (), layer))

    def _show(self, spot: Spot, x: Tensor, meeting: Meeting) -> Tensor:
        if not x.is_floating_point():
            return x
        times = self.times[spot] = self.times.get(spot, -1) + 1
        return self._visit(spot._replace(name=f"{spot.name}#{times}") if times else spot, x, meeting)

    def _met_pair(
        self, spot: Spot, value: Any, layer: nn.Module, edges: Any = None, gathered: tuple[Tensor, ...] = ()
    ) -> Any:
        """A tensor of nodes, or a pair of senders' and receivers'; of each edge's two ends the first is the sender."""
        if not is_pair(value):
            return self._met(spot, value, layer, 1, edges, gathered)
        sizes = {item.size(0) for item in value if isinstance(item, Tensor) and item.dim()}
        met: list[Any] = []
        for k, item in enumerate(value):
            if k and is_head(item, value[0]):  # of a sampled batch: the first nodes, as they are stored
                met.append(met[0] if item is value[0] else met[0][: item.size(0)])
                continue
            # two kinds of nodes, or one: then the degree of a sender is its degree as a receiver
            end = k if len(sizes) > 1 else 1
            taken, other = gathered[k : k + 1], value[1] if len(value) > 1 else None
            if k == 0 and (other is None or is_head(other, item)):
                taken = 2 * taken if other is None else gathered  # of one tensor both ends take rows
            met.append(self._met(spot._replace(name=f"{spot.name}.{k}"), item, layer, end, edges, taken))
        return tuple(met)

    # -- the layers --------------------------------------------------------------------------------------------------

    def _input(self, path: str, layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        spot = Spot(path, "embedding", "x")
        if args and isinstance(args[0], (Tensor, tuple, list)):
            return (self._met_pair(spot, args[0], layer), *args[1:]), kwargs
        for name, value in kwargs.items():
            if isinstance(value, (Tensor, tuple, list)):
                return args, {**kwargs, name: self._met_pair(spot, value, layer)}
        return args, kwargs

    def _output(self, path: str, layer: nn.Module, output: Any) -> Any:
        spot = Spot(path, "update", "out")
        if isinstance(output, tuple) and output:  # with attention weights
            return (self._met(spot, output[0], layer), *output[1:])
        return self._met(spot, output, layer)

    def _wire_passing(self, path: str, layer: Any) -> None:
        self._handles.append(layer.register_propagate_forward_pre_hook(functools.partial(self._on_propagate, path)))
        for method in ("message", "edge_update"):
            copy = with_softmax(getattr(layer, method), functools.partial(self._on_softmax, path, layer))
            if copy is not None:
                self._put(layer, method, copy)

    def _on_propagate(self, path: str, layer: Any, inputs: tuple[Any, Any, dict[str, Any]]) -> Any:
        edges, size, kwargs = inputs
        lifted = {name[:-2] for name in layer._user_args if name.endswith(("_i", "_j"))}
        receivers, coming_from = ends_of(edges, layer.flow)
        ends, count = (coming_from, receivers), receivers.numel()
        one_kind = are_of_one_kind(size, [kwargs.get(name) for name in lifted], layer.node_dim)
        senders = coming_from if one_kind else None
        met = dict(kwargs)
        for name, value in kwargs.items():
            if name in lifted or is_pair(value) or not has_rows(value, count):
                if is_of_nodes(value, layer.node_dim):
                    spot = Spot(path, "message", name)
                    if one_kind or is_pair(value):
                        met[name] = self._met_pair(spot, value, layer, edges, ends)
                    else:
                        taken, end = asked_for(layer, name, ends), end_of(layer, name)
                        met[name] = self._met(spot, value, layer, end, edges, taken)
            else:
                met[name] = self._met_edges(Spot(path, "attention", name), value, layer, receivers, senders, edges)
        if is_torch_sparse_tensor(edges) and kwargs.get("edge_weight", ...) is None:
            # the weights are the matrix's own values
            spot = Spot(path, "attention", "edge_weight")
            weight = self._met_edges(spot, _values(edges), layer, receivers, senders, edges)
            edges = set_sparse_value(edges, weight)
        return edges, size, met

    def _on_softmax(self, path: str, layer: nn.Module, alpha: Tensor, index: Tensor | None) -> Tensor:
        return self._met_edges(Spot(path, "attention", "softmax"), alpha, layer, index)


def _not_traced(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Have a compiled model run it as it is written: a trace would keep what is met in its first call."""
    # to ask for it would load the compiler, which takes seconds
    return torch.compiler.disable(forward) if "torch._dynamo" in sys.modules else forward


def _around(path: str) -> Iterator[str]:
    """The path of a layer and of all modules around it, the model itself first."""
    parts = path.split(".") if path else []
    return (".".join(parts[:end]) for end in range(len(parts) + 1))


def _values(edges: Tensor) -> Tensor:
    values: Tensor = edges._values() if edges.layout == torch.sparse_coo else edges.values()
    return values
