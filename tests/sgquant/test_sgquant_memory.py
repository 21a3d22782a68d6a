"""The byte counts: by hand, and the released code's figures for GAT on Cora."""

import pytest
import torch
from networks import NODES, Embedded, gat, graph
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric import nn as pyg

from lightning_tinykg.bits.plan import Place
from lightning_tinykg.sgquant import SGQuantizer, layerwise, topologywise, uniform
from lightning_tinykg.sgquant.granularity import DegreeBuckets
from lightning_tinykg.sgquant.runs import run_of
from lightning_tinykg.sgquant.wiring import Spot


class CoraGAT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = pyg.GATConv(1433, 8, heads=8)
        self.conv2 = pyg.GATConv(64, 7, heads=1)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.conv2(F.elu(self.conv1(x, edge_index)), edge_index)


def test_the_released_codes_figures_for_gat_on_cora() -> None:
    """A graph of Cora's shape; 207.6 Mb at 32 bits, 37.64 Mb (printed) for 4 and 32 bits by layer."""
    ring = torch.arange(2708)
    edge_index = torch.cat([torch.stack([ring, (ring + hop) % 2708]) for hop in (1, 2, 3, 4)], dim=1)[:, :10556]
    model = CoraGAT().eval()
    quantizer = SGQuantizer(model, 32, buckets=None)
    quantizer.calibrate(lambda: model(torch.rand(2708, 1433), edge_index))
    assert quantizer.memory().released_bits == 6_487_760 * 32
    by_layer = quantizer.memory(layerwise({"conv1": 4, "conv2": 32})).released_bits
    assert by_layer == 6_070_004 * 4 + 417_756 * 32
    assert by_layer / 1e6 == pytest.approx(37.65, abs=0.005)
    assert quantizer.memory(1).released_bits == 6_487_760


def test_what_edges_gather_counts_in_the_width_of_the_node_that_they_gather() -> None:
    """A quarter of the nodes, with most of the edges, is not a quarter of what is gathered."""
    x, edge_index = graph()
    conv = pyg.GraphConv(6, 4).eval()
    quantizer = SGQuantizer(nn.ModuleList([conv]), topologywise([8, 4, 2, 1]))
    quantizer.calibrate(lambda: conv(x, edge_index))
    degree = edge_index[1].bincount(minlength=NODES)
    bits = torch.tensor([8, 4, 2, 1])[DegreeBuckets.of(degree, quantizer.points)]
    # the input, which messages are made of, and both ends of each edge
    assert quantizer.memory().released_bits == 6 * int(bits.sum() + bits[edge_index].sum())


def test_of_two_kinds_of_nodes_each_is_gathered_by_its_end() -> None:
    edge_index = torch.stack([torch.randint(20, (90,)), torch.randint(30, (90,))])
    conv = pyg.GATv2Conv((6, 5), 4, add_self_loops=False).eval()
    quantizer = SGQuantizer(nn.ModuleList([conv]), 1, buckets=None)
    quantizer.calibrate(lambda: conv((torch.randn(20, 6), torch.randn(30, 5)), edge_index))
    # the inputs, x W of both, a row of each for each edge, and three tensors of attention
    assert quantizer.memory().released_bits == 20 * 6 + 30 * 5 + (20 + 30) * 4 + 90 * (4 + 4) + 3 * 90


@pytest.mark.parametrize("hyperedges", [5, 90])
def test_one_tensor_between_two_kinds_is_gathered_by_the_end_that_asks_for_it(hyperedges: int) -> None:
    """A hypergraph's nodes tell its hyperedges, fewer or more than there are nodes, and these tell the nodes."""
    index = torch.stack([torch.randint(NODES, (200,)), torch.randint(hyperedges, (200,))])
    conv = pyg.HypergraphConv(6, 4).eval()
    quantizer = SGQuantizer(nn.ModuleList([conv]), 1, buckets=None)
    quantizer.calibrate(lambda: conv(torch.randn(NODES, 6), index))
    gathered = [site.gathered for spot, site in quantizer.sites.items() if spot.component == "message"]
    assert gathered == [[400]] * 4  # what is told, and a norm, in both directions


class Between(pyg.MessagePassing):  # type: ignore[misc]  # PyG is untyped here
    """Queries of one kind of nodes and keys of another, each a tensor of its own, as in HGT."""

    def forward(self, key: Tensor, query: Tensor, edge_index: Tensor) -> Tensor:
        out: Tensor = self.propagate(edge_index, key=key, query=query)
        return out

    def message(self, key_j: Tensor, query_i: Tensor) -> Tensor:
        return key_j * query_i


@pytest.mark.parametrize(("keys", "queries"), [(7, 60), (60, 7)])
def test_two_tensors_of_two_kinds_are_gathered_each_by_its_end(keys: int, queries: int) -> None:
    edge_index = torch.stack([torch.randint(keys, (200,)), torch.randint(queries, (200,))])
    conv = Between().eval()
    quantizer = SGQuantizer(nn.ModuleList([conv]), 1, buckets=None)
    quantizer.calibrate(lambda: conv(torch.randn(keys, 6), torch.randn(queries, 6), edge_index))
    gathered = [site.gathered for spot, site in quantizer.sites.items() if spot.component == "message"]
    assert gathered == [[400]] * 2


def test_bytes_by_hand() -> None:
    x, edge_index = graph()
    model = gat().eval()
    quantizer = SGQuantizer(model, 3, buckets=None)
    quantizer.calibrate(lambda: model(x, edge_index))
    edges = edge_index.size(1) - int((edge_index[0] == edge_index[1]).sum()) + NODES  # GAT's own loops
    memory = quantizer.memory()
    # input, x W with 2 heads, output; then the same; and the coefficients of both layers
    widths = [6, 16, 8, 8, 6, 3]
    assert memory.full_bytes == 4 * (NODES * sum(widths) + 2 * edges * 2)
    # 3 bits are planes of 2 and 1, a row is whole bytes in each, and each tensor has a scale and a zero
    row = sum(-(-width * 2 // 8) + -(-width // 8) for width in widths)
    # coefficients lie many edges to a row, so that no bit is lost but in the last
    run = run_of(2)
    assert run * 2 * 3 % 8 == 0
    of_edges = -(-edges // run) * (run * 2 * 3 // 8)
    assert memory.packed_bytes == NODES * row + 2 * of_edges + 8 * (len(widths) + 2)
    assert memory.average_bits == 3
    assert memory.ratio == memory.full_bytes / memory.packed_bytes


def test_different_widths_cost_an_order_of_the_nodes_once_and_a_range_each() -> None:
    x, edge_index = graph()
    model = pyg.GCN(6, 8, num_layers=2, out_channels=3, norm=None).eval()
    quantizer = SGQuantizer(model, topologywise([8, 4, 2, 1]))
    quantizer.calibrate(lambda: model(x, edge_index))
    memory = quantizer.memory()
    assert memory.order_bytes == 4 * NODES
    assert memory.packed_bytes == memory.order_bytes + sum(rows.packed_bytes for rows in memory.stored)
    rows = [
        stored for stored in memory.stored if stored.place.layer == "convs.0" and stored.place.component == "message"
    ]
    assert [stored.bits for stored in rows] == [8, 4, 2, 1]
    assert sum(stored.rows for stored in rows) == NODES
    assert [stored.packed_bytes for stored in rows] == [n.rows * b + 8 for n, b in zip(rows, (8, 4, 2, 1), strict=True)]
    assert quantizer.memory(4).order_bytes == 0


def test_each_row_has_a_scale_where_the_granularity_is_the_node() -> None:
    x, edge_index = graph()
    model = pyg.GCN(6, 8, num_layers=1, norm=None).eval()
    bytes_of = {}
    for granularity in ("tensor", "node"):
        # options of several types
        quantizer = SGQuantizer(model, 4, granularity=granularity, buckets=None)  # type: ignore[arg-type]
        quantizer.calibrate(lambda: model(x, edge_index))
        bytes_of[granularity] = quantizer.memory().packed_bytes
    assert bytes_of["node"] - bytes_of["tensor"] == 3 * 8 * (NODES - 1)  # input, x W, output; not the edges


def test_what_is_met_twice_is_counted_once() -> None:
    x, edge_index = graph()
    model = Embedded().eval()
    quantizer = SGQuantizer(model, uniform(8), buckets=None)
    quantizer.calibrate(lambda: model(x, edge_index))
    names = [stored.place for stored in quantizer.memory().stored]
    assert names == [
        Place("encoder.convs.0", "embedding"),
        Place("encoder.convs.0", "attention"),
        Place("encoder.convs.0", "update"),
        Place("encoder.convs.1", "attention"),
        Place("encoder.convs.1", "update"),
    ]
    assert quantizer.sites[Spot("encoder.convs.0", "embedding", "x")].parameter == "encoder.embedding.weight"


def test_the_table_names_every_tensor_and_the_sum() -> None:
    x, edge_index = graph()
    model = gat().eval()
    quantizer = SGQuantizer(model, 2, buckets=None)
    quantizer.calibrate(lambda: model(x, edge_index))
    text = str(quantizer.memory())
    for word in ("conv1", "softmax", "attention", "all", "2.00"):
        assert word in text
