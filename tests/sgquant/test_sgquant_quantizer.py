"""``SGQuantizer``: which layers and graphs it takes, how it is calibrated, and what it refuses."""

import pickle

import pytest
import torch
from networks import AGNN, NODES, Net, calibrated, gat, graph, networks
from torch import Tensor, nn
from torch_geometric import nn as pyg
from torch_geometric.data import Data
from torch_geometric.utils import to_torch_csr_tensor

from lightning_tinykg import BitPlan
from lightning_tinykg.sgquant import SGQuantizer, componentwise, layerwise, topologywise
from lightning_tinykg.sgquant.wiring import Spot

# -- which layers, which graphs --------------------------------------------------------------------------------------


def test_linear_layers_are_places_if_they_take_nodes() -> None:
    class Pooled(AGNN):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            out: Tensor = self.head(super().forward(x, edge_index).mean(dim=0, keepdim=True))
            return out

    layers = {place.layer for place in calibrated(Pooled().eval()).places()}
    assert layers == {"lin1", "prop1", "prop2", "lin2"}


def test_a_head_that_takes_as_many_graphs_as_another_batch_has_nodes_is_no_place() -> None:
    class Pooled(AGNN):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Tensor:
            out: Tensor = self.head(pyg.global_mean_pool(super().forward(x, edge_index), batch))
            return out

    def batches() -> None:
        edge_index = torch.tensor([[1, 2], [0, 1]])
        model(torch.randn(3, 6), edge_index, torch.zeros(3, dtype=torch.long))
        model(torch.randn(8, 6), edge_index, torch.tensor([0, 0, 0, 0, 1, 1, 2, 2]))

    model = Pooled().eval()
    quantizer = SGQuantizer(model, topologywise((8, 4, 2, 1)))
    quantizer.calibrate(batches)
    layers = {place.layer for place in quantizer.places()}
    assert "lin1" in layers
    assert "head" not in layers
    with quantizer:
        batches()


@pytest.mark.parametrize("name", networks())
def test_a_batch_without_edges_or_nodes_may_follow_another(name: str) -> None:
    model = networks()[name]().eval()
    x, edge_index = graph()
    nothing = torch.empty(2, 0, dtype=torch.long)

    def batches() -> None:
        model(x, edge_index)
        model(x, nothing)
        if name not in ("LightGCN", "Sampled"):  # whose nodes are its own; which samples
            model(x[:0], nothing)

    quantizer = SGQuantizer(model, topologywise((8, 4, 2, 1)))
    quantizer.calibrate(batches)
    with quantizer:
        batches()


def test_a_linear_layer_called_before_its_graph_is_seen_is_a_place_too() -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.edges = AGNN(), graph()[1]

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.net.lin2(self.net.prop1(self.net.lin1(x), self.edges))
            return out

    model, (x, _) = Held().eval(), graph()
    quantizer = SGQuantizer(model, topologywise([8, 4, 2, 1]))
    quantizer.calibrate(lambda: model(x))
    site = quantizer.sites[Spot("net.lin1", "embedding", "x")]
    assert sum(site.rows) == NODES
    assert max(site.rows) < NODES
    with quantizer:
        model(x)
    quantizer.graphs.last = None
    with quantizer, pytest.raises(RuntimeError, match=r"net.lin1 / embedding \(x\) needs the degrees of its 40 nodes"):
        model(x)


def test_data_and_sparse_matrices_are_graphs() -> None:
    x, edge_index = graph()

    class OfData(AGNN):
        def forward(self, data: Data) -> Tensor:  # type: ignore[override]  # a graph, as PyG's own
            return super().forward(data.x, data.edge_index)

    of_data = OfData().eval()
    quantizer = SGQuantizer(of_data, topologywise([8, 4, 2, 1]))
    quantizer.calibrate(lambda: of_data(Data(x=x, edge_index=edge_index)))
    assert quantizer.memory().order_bytes == 4 * NODES

    edge_index = torch.unique(edge_index[:, edge_index[0] != edge_index[1]], dim=1)
    adjacency = to_torch_csr_tensor(edge_index.flip(0), size=(NODES, NODES))
    model = Net(pyg.GCNConv).eval()
    dense, sparse = (SGQuantizer(model, topologywise([16, 16, 16, 32])) for _ in range(2))
    dense.calibrate(lambda: model(x, edge_index))
    sparse.calibrate(lambda: model(x, adjacency))
    assert sparse.memory() == dense.memory()
    with dense:
        want = model(x, edge_index)
    with sparse:
        # the sums are in another order, so that a value may go to the next of 65,536 levels
        torch.testing.assert_close(model(x, adjacency), want, rtol=0, atol=1e-3)


# the graph of the others is part of the model
@pytest.mark.parametrize("name", [name for name in networks() if name not in ("RGCN", "KGATConv", "LightGCN")])
@pytest.mark.parametrize("shape", ["one node", "no edges", "isolated"])
def test_small_graphs(name: str, shape: str) -> None:
    nodes = 1 if shape == "one node" else 5
    x = torch.randn(nodes, 6)
    edge_index = torch.tensor([[0, 1], [1, 0]]) if shape == "isolated" else torch.empty(2, 0, dtype=torch.long)
    model = networks()[name]().eval()
    want = model(x, edge_index)
    quantizer = SGQuantizer(model, 16)
    quantizer.calibrate(lambda: model(x, edge_index))
    with quantizer:
        torch.testing.assert_close(model(x, edge_index), want, rtol=1e-3, atol=1e-3)
        quantizer.set_plan(topologywise([8, 4, 2, 1]))
        assert model(x, edge_index).isfinite().all()


def test_another_graph_is_bucketed_by_the_same_degrees() -> None:
    x, edge_index = graph()
    model = Net(pyg.SAGEConv).eval()
    quantizer = SGQuantizer(model, BitPlan({("conv1", "embedding", "degree-1"): 1}, default=32), buckets=[2])
    quantizer.calibrate(lambda: model(x, edge_index))
    star = torch.tensor([[1, 2, 3, 4], [0, 0, 0, 1]])
    met: list[Tensor] = []
    model.conv1.register_propagate_forward_pre_hook(lambda module, args: met.append(args[2]["x"][0]))
    with quantizer:
        model(x[:5], star)
    assert torch.equal(met[0][1:], x[1:5])  # at most two edges each
    assert not torch.equal(met[0][0], x[0])


# -- calibration -----------------------------------------------------------------------------------------------------


def test_calibration_leaves_modes_and_random_numbers_alone() -> None:
    model = gat(dropout=0.5).train()
    model.conv2.eval()
    before = torch.get_rng_state()
    quantizer = SGQuantizer(model)
    quantizer.calibrate(lambda: (torch.rand(3), model(*graph())))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert model.conv1.training
    assert not model.conv2.training


def test_more_batches_widen_the_ranges_and_another_calibration_forgets() -> None:
    x, edge_index = graph()
    model = Net(pyg.GCNConv).eval()
    quantizer = SGQuantizer(model, buckets=None, range="minmax")
    spot = Spot("conv1", "embedding", "x")
    quantizer.calibrate(lambda: model(x, edge_index))
    quantizer.calibrate(lambda: model(3 * x, edge_index), more=True)
    assert quantizer.levels(spot)[0].high == float((3 * x).max())
    quantizer.calibrate(lambda: model(x, edge_index))
    assert quantizer.levels(spot)[0].high == float(x.max())


def test_a_smaller_batch_leaves_no_linear_layer_out() -> None:
    x, edge_index = graph()
    model = AGNN().eval()
    quantizer = calibrated(model)
    places, rows = quantizer.places(), {spot: list(site.rows) for spot, site in quantizer.sites.items()}
    fewer = edge_index[:, (edge_index < NODES - 10).all(dim=0)]
    quantizer.calibrate(lambda: model(x[:-10], fewer), more=True)
    assert quantizer.places() == places
    assert {spot: list(site.rows) for spot, site in quantizer.sites.items()} == rows  # of the largest batch


def test_a_calibration_that_fails_adds_nothing_to_the_earlier_ones() -> None:
    x, edge_index = graph()
    model = gat().eval()
    quantizer = calibrated(model, range="mse")
    before = repr(quantizer.state_dict())
    broken = x.clone()
    broken[3, 2] = float("nan")

    def run() -> None:
        model(9 * x, edge_index)
        model(broken, edge_index)

    with pytest.raises(ValueError, match="values must be finite"):
        quantizer.calibrate(run, more=True)
    assert repr(quantizer.state_dict()) == before


def test_protected_nodes_are_left_in_training_only_and_by_step() -> None:
    x, edge_index = graph()
    model = Net(pyg.SAGEConv)
    quantizer = calibrated(model, BitPlan({("conv1", "embedding"): 1}, default=32), protect=(0.3, 0.3))
    met: list[Tensor] = []
    model.conv1.register_propagate_forward_pre_hook(lambda module, args: met.append(args[2]["x"][0]))
    with quantizer:
        before = torch.get_rng_state()
        model.train()
        model(x, edge_index)
        model(x, edge_index)
        assert torch.equal(torch.get_rng_state(), before)
        model.eval()
        model(x, edge_index)
    whole = [(rows == x).all(dim=1) for rows in met]
    assert 0 < whole[0].sum() < NODES
    assert not torch.equal(whole[0], whole[1])
    assert not whole[2].any()


# -- what is wrong ---------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_named() -> None:
    model = Net(pyg.GCNConv)
    with pytest.raises(ValueError, match=r"match nothing: con1 \(nearest: conv"):
        SGQuantizer(model, layerwise({"con1": 4}))
    with pytest.raises(
        ValueError, match=r"bits must be one of 1, 2, 3, 4, 5, 6, 7, 8, 16, 32, a BitPlan or a path, got 3\.5"
    ):
        SGQuantizer(model, 3.5)  # type: ignore[arg-type]  # refused
    with pytest.raises(
        ValueError, match="must hold PyG MessagePassing layers, which are what is quantized, got a Linear"
    ):
        SGQuantizer(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="granularity must be one of tensor, bucket, channel, node, auto, got 'row'"):
        SGQuantizer(model, granularity="row")  # type: ignore[arg-type]  # refused
    with pytest.raises(ValueError, match="range must be one of minmax, percentile, ema, mse, got 'max'"):
        SGQuantizer(model, range="max")  # type: ignore[arg-type]  # refused
    with pytest.raises(ValueError, match=r"percentile must be a number above 0\.5 and of at most 1, got 0\.1"):
        SGQuantizer(model, percentile=0.1)
    with pytest.raises(ValueError, match="match nothing: degree-4"):
        SGQuantizer(model, topologywise([8, 4, 4, 2, 1]))


def test_a_quantizer_that_was_not_calibrated_says_so() -> None:
    quantizer = SGQuantizer(Net(pyg.GCNConv))
    for act in (quantizer.attach, quantizer.places, quantizer.memory):
        with pytest.raises(RuntimeError, match="needs a calibration first"):
            act()
    with pytest.raises(
        RuntimeError, match="run must call the model's message passing layers, got one that called none"
    ):
        quantizer.calibrate(lambda: None)


def test_values_that_are_not_finite_are_refused_with_their_place() -> None:
    x, edge_index = graph()
    model = Net(pyg.GCNConv)
    x[3, 2] = float("nan")
    quantizer = SGQuantizer(model)
    with pytest.raises(ValueError, match=r"conv1 / embedding \(x\): values must be finite"):
        quantizer.calibrate(lambda: model(x, edge_index))
    assert not quantizer.is_calibrated
    assert "forward" not in vars(model.conv1)


def test_a_plan_by_component_is_for_models_without_that_component_too_but_a_misspelt_one_is_refused() -> None:
    assert calibrated(Net(pyg.SAGEConv), componentwise(attention=1)).memory().average_bits == 32
    with pytest.raises(ValueError, match="match nothing: atention"):
        SGQuantizer(Net(pyg.SAGEConv), BitPlan({("*", "atention"): 4}))


def test_an_error_in_the_model_leaves_it_able_to_go_on() -> None:
    x, edge_index = graph()
    model = gat().train()
    with calibrated(model, 8):
        want = model(x, edge_index)
        with pytest.raises(RuntimeError):
            model(x[:, :3], edge_index)
        assert torch.equal(model(x, edge_index), want)


def test_a_model_can_be_pickled_when_detached() -> None:
    model = Net(pyg.GCNConv).eval()
    with calibrated(model, 2):
        model(*graph())
    assert torch.equal(pickle.loads(pickle.dumps(model))(*graph()), model(*graph()))


def test_a_state_of_other_options_or_another_model_is_refused() -> None:
    state = calibrated(Net(pyg.GCNConv)).state_dict()
    with pytest.raises(ValueError, match="the state is of a quantizer with"):
        SGQuantizer(Net(pyg.GCNConv), range="ema").load_state_dict(state)
    with pytest.raises(ValueError, match="the state has layers that the model has not: conv1, conv2"):
        SGQuantizer(AGNN()).load_state_dict(state)
