"""Message passing in blocks: the plain layers' results, and nothing as long as the edges."""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.nn import (
    AGNNConv,
    GATConv,
    GATv2Conv,
    GCNConv,
    GINConv,
    LGConv,
    MessagePassing,
    RGATConv,
    RGCNConv,
    SAGEConv,
    TransformerConv,
)
from torch_geometric.nn.aggr import (
    Aggregation,
    GRUAggregation,
    LCMAggregation,
    LSTMAggregation,
    PatchTransformerAggregation,
    SetTransformerAggregation,
)

from lightning_tinykg.models.kgat import KGATConv
from lightning_tinykg.sgquant import blocked
from lightning_tinykg.sgquant.blocks import in_blocks
from lightning_tinykg.sgquant.receivers import BlockCache, EdgesByReceiver

sys.path.insert(0, str(Path(__file__).parents[1] / "codecs"))
from memory import LiveBytes  # a helper of the codecs' tests

NODES, EDGES, DIM = 40, 300, 12
BLOCKS = (1, 7, 64, 10_000)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def edges() -> Tensor:
    """A graph with popular receivers, repeated edges, loops, and isolated nodes at both ends of the numbering."""
    receivers = (torch.rand(EDGES).square() * (NODES - 6)).long() + 3
    return torch.stack([torch.randint(0, NODES, (EDGES,)), receivers])


def gin() -> nn.Module:
    return GINConv(nn.Sequential(nn.Linear(DIM, 8), nn.ReLU(), nn.Linear(8, 4)))


Forward = Callable[[Any, Tensor, Tensor], Tensor]


def plain(conv: Any, x: Tensor, index: Tensor) -> Tensor:
    out: Tensor = conv(x, index)
    return out


def weighted(conv: Any, x: Tensor, index: Tensor) -> Tensor:
    out: Tensor = conv(x, index, torch.linspace(0.1, 2, index.size(1)))
    return out


def typed(conv: Any, x: Tensor, index: Tensor) -> Tensor:
    out: Tensor = conv(x, index, torch.arange(index.size(1)) % 3)
    return out


def featured(conv: Any, x: Tensor, index: Tensor) -> Tensor:
    out: Tensor = conv(x, index, torch.linspace(-1, 1, index.size(1) * 5).view(-1, 5))
    return out


def paired(conv: Any, x: Tensor, index: Tensor) -> Tensor:
    out: Tensor = conv((x, x[: NODES - 1]), index)
    return out


class Two(MessagePassing):  # type: ignore[misc]  # PyG is untyped here
    """Its update gives two tensors of nodes, as equivariant layers do: features and a direction."""

    def __init__(self) -> None:
        super().__init__(node_dim=0)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        features, direction = self.propagate(index, x=x)
        return torch.cat([features, direction.flatten(1)], dim=1)

    def message(self, x_j: Tensor) -> Tensor:
        return x_j

    def update(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return inputs, inputs.view(-1, 3, DIM // 3)


def in_order(conv: Any, x: Tensor, index: Tensor) -> Tensor:
    out: Tensor = conv(x, index[:, index[1].argsort(stable=True)])
    return out


PADDING: dict[str, Callable[[], Aggregation]] = {
    "lstm": lambda: LSTMAggregation(DIM, DIM),
    "gru": lambda: GRUAggregation(DIM, DIM),
    "commutative": lambda: LCMAggregation(DIM, DIM),
    "patches": lambda: PatchTransformerAggregation(DIM, DIM, 2, DIM, 1),
    "set transformer": lambda: SetTransformerAggregation(DIM),
}


LAYERS: dict[str, tuple[Callable[[], nn.Module], Forward]] = {
    "gcn": (lambda: GCNConv(DIM, 5), plain),
    "gcn weighted": (lambda: GCNConv(DIM, 5), weighted),
    "gcn from targets to sources": (lambda: GCNConv(DIM, 5, flow="target_to_source"), weighted),
    "gcn decomposed": (lambda: GCNConv(DIM, 6, decomposed_layers=2), plain),
    "gat": (lambda: GATConv(DIM, 5, heads=3), plain),
    "gat with edge features": (lambda: GATConv(DIM, 5, heads=3, edge_dim=5), featured),
    "gat between two kinds": (lambda: GATConv((DIM, DIM), 5, heads=2, add_self_loops=False), paired),
    "gatv2": (lambda: GATv2Conv(DIM, 5, heads=3), plain),
    "gatv2 with edge features": (lambda: GATv2Conv(DIM, 5, heads=2, edge_dim=5), featured),
    "agnn": (lambda: AGNNConv(), plain),
    "sage mean": (lambda: SAGEConv(DIM, 5, aggr="mean"), plain),
    "sage max": (lambda: SAGEConv(DIM, 5, aggr="max"), plain),
    "sage of both": (lambda: SAGEConv(DIM, 5, aggr=["mean", "max", "std"]), plain),
    **{
        f"sage {name} of padded messages": (lambda make=make: SAGEConv(DIM, 5, aggr=make()), in_order)
        for name, make in PADDING.items()
    },
    "sage between two kinds": (lambda: SAGEConv((DIM, DIM), 5), paired),
    "gin": (gin, plain),
    "two tensors": (Two, plain),
    "rgcn": (lambda: RGCNConv(DIM, 5, num_relations=3), typed),
    "rgcn in blocks": (lambda: RGCNConv(DIM, 4, num_relations=3, num_blocks=4), typed),
    "transformer": (lambda: TransformerConv(DIM, 5, heads=2), plain),
    "transformer with edge features": (lambda: TransformerConv(DIM, 5, heads=2, edge_dim=5), featured),
    "lightgcn": (lambda: LGConv(), plain),
    "lightgcn weighted": (lambda: LGConv(), weighted),
    "kgat": (lambda: KGATConv(DIM, 5), weighted),
}


@pytest.mark.parametrize("block_edges", BLOCKS)
@pytest.mark.parametrize("name", LAYERS)
def test_blocks_give_the_bits_of_the_whole(name: str, block_edges: int) -> None:
    make, forward = LAYERS[name]
    conv, x, index = make().eval(), torch.randn(NODES, DIM), edges()
    with torch.no_grad():
        expected = forward(conv, x, index)
        with in_blocks(conv, block_edges), warnings.catch_warnings():
            warnings.simplefilter("error")
            found = forward(conv, x, index)
    if name.endswith(("edge features", "padded messages")):  # a product within the block: a BLAS may round it otherwise
        torch.testing.assert_close(found, expected)
    else:
        assert torch.equal(found, expected)
    assert not {"propagate", "edge_updater"} & vars(conv).keys() or name == "gcn decomposed"


def test_a_block_has_the_edges_that_it_may_have_and_whole_receivers() -> None:
    index = edges()
    found = EdgesByReceiver(index[1], NODES)
    for size in BLOCKS:
        met = list(found.blocks(size))
        assert [block.nodes.start for block in met] + [NODES] == [0] + [block.nodes.stop for block in met]
        assert sum(block.edges.stop - block.edges.start for block in met) == EDGES
        for block in met:
            own = index[1][found.edge[block.edges]] if found.edge is not None else index[1][block.edges]
            receivers = found.receivers(block)
            assert torch.equal(receivers[found.local(block)], own)
            assert 0 < own.numel() <= size or own.unique().numel() == 1


def test_edges_in_order_are_not_sorted_again_and_a_graph_is_remembered_until_it_changes() -> None:
    index, cache = edges(), BlockCache()
    ordered = index[:, index[1].argsort(stable=True)]
    assert EdgesByReceiver(ordered[1], NODES).edge is None
    met = cache.of(index, 1, NODES)
    assert cache.of(index, 1, NODES) is met
    assert cache.of(index.clone(), 1, NODES) is met
    assert cache.of(index, 0, NODES) is not met
    index[1, 0] = NODES - 1
    again = cache.of(index, 1, NODES)
    assert again is not met
    assert int(again.starts.diff()[-1]) == 1


def test_nothing_as_long_as_the_edges_is_made() -> None:
    nodes, count, dim = 200, 20_000, 32
    index = torch.randint(0, nodes, (2, count))
    x = torch.randn(nodes, dim)
    messages = 4 * count * dim
    for conv in (SAGEConv(dim, dim), GCNConv(dim, dim), AGNNConv(), GATConv(dim, 8, heads=4), TransformerConv(dim, 32)):
        conv.eval()
        with torch.no_grad(), in_blocks(conv, block_edges=500):
            with LiveBytes() as live:
                conv(x, index)
            blocked = live.peak
        with torch.no_grad(), LiveBytes() as live:
            conv(x, index)
        assert blocked < messages / 2
        assert live.peak > messages


class OfDegree(MessagePassing):  # type: ignore[misc]  # PyG is untyped here
    """Its message looks up a table of all nodes, which a block can't follow."""

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        out: Tensor = self.propagate(index, x=x, degree=index[1].bincount(minlength=x.size(0)).sqrt())
        return out

    def message(self, x_j: Tensor, degree: Tensor, index: Tensor) -> Tensor:
        return x_j / degree[index].unsqueeze(-1)


class OfEdges(MessagePassing):  # type: ignore[misc]  # PyG is untyped here
    """Its message sees all edges, and its update the nodes."""

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        out: Tensor = self.propagate(index, x=x)
        return out

    def message(self, x_j: Tensor, edge_index: Tensor) -> Tensor:
        return x_j * edge_index.size(1)


class OfNodes(MessagePassing):  # type: ignore[misc]  # PyG is untyped here
    """Its update sees the nodes, which its message sees at both ends; it notes what it has seen."""

    seen: Tensor | None = None

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        out: Tensor = self.propagate(index, x=x)
        return out

    def message(self, x_i: Tensor, x_j: Tensor) -> Tensor:
        self.seen = x_j
        return x_i - x_j

    def update(self, inputs: Tensor, x: Tensor) -> Tensor:
        return inputs + x


@pytest.mark.parametrize(("layer", "why"), [(OfDegree, "wants degree, which is of all nodes"), (OfEdges, "edge_index")])
def test_what_blocks_cannot_follow_runs_on_the_whole_and_says_so(layer: type[Any], why: str) -> None:
    conv, x, index = layer(), torch.randn(NODES, DIM), edges()
    blocked._warned.clear()
    with in_blocks(conv, 7):
        with pytest.warns(UserWarning, match=why):
            found = conv(x, index)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            conv(x, index)  # once is enough
    assert torch.equal(found, conv(x, index))


def test_an_update_sees_its_nodes_and_a_note_of_one_block_is_not_taken_for_the_whole() -> None:
    conv, x, index = OfNodes(), torch.randn(NODES, DIM), edges()
    with in_blocks(conv, 7):
        found = conv(x, index)
        with pytest.raises(RuntimeError, match="is of one block of edges when it passes messages in blocks"):
            conv.seen.sum()  # type: ignore[union-attr]  # it is not None
    assert torch.equal(found, conv(x, index))
    assert conv.seen is not None


def test_a_layer_that_asserts_that_it_has_noted_its_attention_runs_in_blocks() -> None:
    """Its products within a block may be rounded as the rows of one are."""
    conv, x, index = RGATConv(DIM, 5, num_relations=3).eval(), torch.randn(NODES, DIM), edges()
    with in_blocks(conv, 7), torch.no_grad():
        found = typed(conv, x, index)
    torch.testing.assert_close(found, typed(conv, x, index))


def test_hooks_of_the_user_see_what_they_would() -> None:
    conv, x, index = GCNConv(DIM, 5).eval(), torch.randn(NODES, DIM), edges()
    conv.register_propagate_forward_pre_hook(lambda _, given: (*given[:2], {**given[2], "x": given[2]["x"].relu()}))
    conv.register_message_forward_hook(lambda _, __, out: out * 2)
    conv.register_aggregate_forward_pre_hook(lambda _, given: ({**given[0]},))
    conv.register_aggregate_forward_hook(lambda _, __, out: out + 1)
    conv.register_propagate_forward_hook(lambda _, __, out: out - 3)
    with torch.no_grad(), in_blocks(conv, 7):
        found = conv(x, index)
    assert torch.equal(found, conv(x, index))


@pytest.mark.parametrize("count", [0, 1])
def test_graphs_of_no_edges_and_of_one_node(count: int) -> None:
    x, index = torch.randn(1, DIM), torch.zeros(2, count, dtype=torch.long)
    for conv in (SAGEConv(DIM, 3), GCNConv(DIM, 3), GATConv(DIM, 3, add_self_loops=False), AGNNConv()):
        conv.eval()
        with torch.no_grad(), in_blocks(conv, 1):
            found = conv(x, index)
        assert torch.equal(found, conv(x, index))


def test_a_sparse_matrix_is_multiplied_as_it_is_or_runs_on_the_whole() -> None:
    index, x = edges().unique(dim=1), torch.randn(NODES, DIM)
    matrix = torch.zeros(NODES, NODES).index_put((index[1], index[0]), torch.ones(())).to_sparse_csr()
    blocked._warned.clear()
    sage, gat = SAGEConv(DIM, 3).eval(), GATConv(DIM, 3, add_self_loops=False).eval()
    with torch.no_grad(), in_blocks(sage, 7), in_blocks(gat, 7):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fused = sage(x, matrix)
        with pytest.warns(UserWarning, match="sparse matrix"):
            whole = gat(x, matrix)
    assert torch.equal(fused, sage(x, matrix))
    assert torch.equal(whole, gat(x, matrix))


def test_edges_that_lead_nowhere_are_refused() -> None:
    conv, x = SAGEConv(DIM, 3), torch.randn(NODES, DIM)
    with in_blocks(conv, 7):
        with pytest.raises(IndexError, match=f"below {NODES}, got {NODES}"):
            conv(x, torch.tensor([[0], [NODES]]))
        with pytest.raises(IndexError, match="larger than 39"):
            conv(x, torch.tensor([[NODES], [0]]))
    with pytest.raises(ValueError, match="block_edges must be a whole number of at least 1, got 0"), in_blocks(conv, 0):
        pass
