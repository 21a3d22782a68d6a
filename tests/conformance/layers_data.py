"""What the cases of the layers are made of: a module and its inputs as a step, seeded data, and index searches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch_geometric.typing
from checking import Case
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

NODES, EDGES, GRAPHS = 30, 120, 3
IN, OUT, EDGE = 16, 32, 8

Builder = Callable[[], Case]
"""Makes a case with seeded weights and data; the table's key is its name."""


def step(
    module: nn.Module, *args: Any, run: Callable[..., Any] | None = None, z_test: bool = True, **kwargs: Any
) -> Case:
    """A module's forward; its leaves are all parameters, and all inputs that require a gradient.

    The inputs are copied within the forward, so that they count as activations, as a layer's input does in a model.
    Buffers are set back before each forward: a step must not depend on how many have run.

    Args:
        module: the module, in the mode that it is to run in.
        args: its inputs, in any structure.
        run: what to call with the module and its inputs; None: the module itself.
        z_test: whether to test for a bias; not where roundings meet in one path of the gradient, which a deep model's
            do: a product of two rounded values is unbiased only if they were rounded independently.
        kwargs: more inputs.
    """
    inputs = (args, kwargs)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    leaves = [*parameters, *(value for value in tree_leaves(inputs) if _is_leaf(value))]
    state = [(buffer, buffer.clone()) for buffer in module.buffers()]

    def forward(module: nn.Module = module) -> Any:
        with torch.no_grad():
            for buffer, before in state:
                buffer.copy_(before)
        copied, named = tree_map(lambda value: torch.ops.aten.clone(value) if _is_leaf(value) else value, inputs)
        return run(module, *copied, **named) if run is not None else module(*copied, **named)

    return Case(type(module).__name__, forward, leaves, z_test=z_test, module=module)


def _is_leaf(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


# -- data -------------------------------------------------------------------------------------------------------------


def x(channels: int = IN, rows: int = NODES) -> Tensor:
    """Features."""
    return torch.randn(rows, channels, requires_grad=True)


def positive(*shape: int) -> Tensor:
    """Weights between a half and one and a half."""
    return (torch.rand(*shape) + 0.5).requires_grad_()


def edges(nodes: int = NODES, count: int = EDGES) -> Tensor:
    """A random graph without self-loops."""
    source = torch.randint(nodes, (count,))
    return torch.stack([source, (source + torch.randint(1, nodes, (count,))) % nodes])


def types(kinds: int, count: int = EDGES) -> Tensor:
    """A type for each edge, or node."""
    return torch.randint(kinds, (count,))


def batch() -> Tensor:
    """The graph that each node belongs to."""
    return torch.arange(NODES) * GRAPHS // NODES


def grid() -> Tensor:
    """Places in space, at least 0.5 apart."""
    corners = torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0), torch.arange(4.0))[:NODES]
    return corners + 0.25 * (2 * torch.rand(NODES, 3) - 1)


def mlp(channels_in: int, channels_out: int) -> nn.Module:
    """A small network."""
    return nn.Sequential(nn.Linear(channels_in, OUT), nn.ReLU(), nn.Linear(OUT, channels_out))


# -- index searches ---------------------------------------------------------------------------------------------------


def searching(build: Builder) -> Builder:
    """A case whose module looks for neighbours, walks or triplets; see :func:`searches`."""

    def built() -> Case:
        with searches():
            case = build()

        def forward(*module: nn.Module) -> Any:
            with searches():
                return case.forward(*module)

        return replace(case, forward=forward)

    return built


@contextmanager
def searches() -> Iterator[None]:
    """The searches of pyg-lib and torch-sparse in plain ops, so that the layers that call them run without.

    They return indices, through which no gradient flows: what autograd saves does not depend on who finds them.
    """
    import torch_geometric.nn.models.dimenet as dimenet
    import torch_geometric.nn.models.gnnff as gnnff
    import torch_geometric.nn.models.node2vec as node2vec

    found = SimpleNamespace(knn=_knn, radius=_radius, random_walk=_random_walk)
    with (
        patch.multiple(torch_geometric.typing, WITH_KNN=True, WITH_RADIUS=True),
        patch.object(node2vec, "WITH_PYG_LIB", True),
        patch.object(dimenet, "triplets", _triplets),
        patch.object(gnnff, "triplets", _triplets),
        patch.object(torch.ops, "pyg", found),
    ):
        yield


@torch.no_grad()
def _knn(x: Tensor, y: Tensor, ptr_x: Any, ptr_y: Any, k: int, cosine: bool, workers: int) -> Tensor:
    nearest = torch.cdist(y, x).topk(k, largest=False).indices
    return torch.stack([torch.arange(len(y)).repeat_interleave(k), nearest.flatten()])


@torch.no_grad()
def _radius(
    x: Tensor, y: Tensor, ptr_x: Any, ptr_y: Any, r: float, most: int, workers: int, ignore_same: bool
) -> Tensor:
    near = torch.cdist(y, x) <= r
    if ignore_same:
        near.fill_diagonal_(False)
    return near.nonzero().t()


def _random_walk(rowptr: Tensor, col: Tensor, start: Tensor, length: int, p: float, q: float) -> Tensor:
    walk = [start]
    for _ in range(length):
        here = walk[-1]
        degree = rowptr[here + 1] - rowptr[here]
        chosen = (torch.rand(len(here)) * degree).long()
        following = col[(rowptr[here] + chosen).clamp(max=len(col) - 1)]
        walk.append(torch.where(degree > 0, following, here))
    return torch.stack(walk, 1)


def _triplets(edge_index: Tensor, num_nodes: int) -> tuple[Tensor, ...]:
    row, col = edge_index  # j -> i
    ji, kj = (row[:, None] == col[None, :]).nonzero().t()
    keep = col[ji] != row[kj]
    ji, kj = ji[keep], kj[keep]
    return col, row, col[ji], row[ji], row[kj], kj, ji
