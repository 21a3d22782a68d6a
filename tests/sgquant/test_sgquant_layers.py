"""``SGQuantizer`` on every kind of layer: what is quantized, by hand, and that nothing is left behind."""

import copy
from typing import Any

import pytest
import torch
from networks import AGNN, NODES, Embedded, Net, calibrated, gat, graph, networks
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric import nn as pyg
from torch_geometric.nn.conv.gcn_conv import gcn_norm

from lightning_tinykg import BitPlan
from lightning_tinykg.sgquant import SGQuantizer, componentwise, topologywise
from lightning_tinykg.sgquant.quantize import Level, fake_quantize
from lightning_tinykg.sgquant.shares import divisors
from lightning_tinykg.sgquant.wiring import Spot


def stored(x: Tensor, bits: int) -> Tensor:
    return fake_quantize(x, [Level(bits, float(x.min()), float(x.max()))])


@pytest.fixture(params=networks())
def model(request: Any) -> nn.Module:
    made: nn.Module = networks()[request.param]()
    return made


# -- every kind of layer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["tensor", "bucket", "channel", "node"])
def test_16_bits_are_nearly_the_model_and_1_bit_is_not(model: nn.Module, granularity: Any) -> None:
    model.eval()
    want = model(*graph())
    with calibrated(model, 16, granularity=granularity) as quantizer:
        near = (model(*graph()) - want).norm() / want.norm()
        quantizer.set_plan(1)
        far = (model(*graph()) - want).norm() / want.norm()
    assert 0 < near < 1e-3
    assert far > 0.05


def test_32_bits_are_the_model(model: nn.Module) -> None:
    model.eval()
    want = model(*graph())
    with calibrated(model, 32):
        assert torch.equal(model(*graph()), want)


def test_detached_nothing_is_left(model: nn.Module) -> None:
    model.eval()
    want = model(*graph())
    parts = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    quantizer = calibrated(model, 2)
    quantizer.attach()
    quantizer.attach()
    assert not torch.equal(model(*graph()), want)
    quantizer.detach()
    assert torch.equal(model(*graph()), want)
    assert {name: (type(module), set(vars(module))) for name, module in model.named_modules()} == parts
    assert torch.equal(copy.deepcopy(model)(*graph()), want)


def test_every_parameter_has_its_gradient(model: nn.Module) -> None:
    x, edge_index = graph()
    model(x.requires_grad_(), edge_index).square().sum().backward()
    want = {name for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with calibrated(model, 4, protect=(0.0, 0.2)):
        model(x, edge_index).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == want
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_widths_by_degree(model: nn.Module) -> None:
    model.eval()
    quantizer = calibrated(model, 8)
    with quantizer:
        eight = model(*graph())
        quantizer.set_plan(topologywise([8, 8, 8, 8]))
        assert torch.equal(model(*graph()), eight)
        quantizer.set_plan(topologywise([8, 8, 8, 2]))
        assert not torch.equal(model(*graph()), eight)


def test_a_state_goes_on(model: nn.Module) -> None:
    model.eval()
    quantizer = calibrated(model, topologywise([8, 4, 2, 1]), granularity="bucket")
    again = SGQuantizer(model, 32, granularity="bucket")
    again.load_state_dict(quantizer.state_dict())
    assert again.memory() == quantizer.memory()
    with quantizer:
        want = model(*graph())
    with again:
        assert torch.equal(model(*graph()), want)


def test_wide_rows_have_their_own_range_with_auto() -> None:
    x, edge_index = torch.randn(NODES, 200), graph()[1]
    conv = pyg.GCNConv(200, 8).eval()
    quantizer = SGQuantizer(nn.ModuleList([conv]), 4, granularity="auto")
    quantizer.calibrate(lambda: conv(x, edge_index))
    per_row = {spot.component: quantizer.levels(spot)[0].per_row for spot in quantizer.sites}
    assert per_row == {"embedding": True, "message": False, "attention": False, "update": False}


# -- by hand ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True], ids=["as the degrees tell", "weighted"])
def test_a_gcn_by_hand(weighted: bool) -> None:
    x, edge_index = graph()
    conv = pyg.GCNConv(6, 4).eval()
    model = nn.ModuleDict({"conv": conv})
    given = torch.rand(edge_index.size(1)) if weighted else None
    quantizer = SGQuantizer(model, componentwise(embedding=4, message=3, attention=2, update=5), range="minmax")
    quantizer.calibrate(lambda: conv(x, edge_index, given))
    looped, weight = gcn_norm(edge_index, given, NODES)

    def propagate(features: Tensor, weight: Tensor) -> Tensor:
        return torch.zeros(NODES, 4).index_add(0, looped[1], weight[:, None] * features[looped[0]]) + conv.bias

    # ranges are those of the full-precision forward
    message, update = conv.lin(x), propagate(conv.lin(x), weight)

    def ranged(y: Tensor, like: Tensor, bits: int) -> Tensor:
        return fake_quantize(y, [Level(bits, like.min().item(), like.max().item())])

    hidden = ranged(conv.lin(stored(x, 4)), message, 3)
    want = ranged(propagate(hidden, stored(weight, 2) if weighted else weight), update, 5)
    with quantizer:
        torch.testing.assert_close(conv(x, edge_index, given), want)


def test_attention_within_a_message_is_quantized_where_it_is_made() -> None:
    x, edge_index = graph()
    seen: list[Tensor] = []

    conv = pyg.TransformerConv(6, 4, heads=2).eval()
    conv.register_aggregate_forward_pre_hook(lambda module, args: seen.append(module._alpha))
    quantizer = SGQuantizer(nn.ModuleList([conv]), componentwise(attention=1), range="minmax")
    quantizer.calibrate(lambda: conv(x, edge_index))
    with quantizer:
        conv(x, edge_index)
    conv(x, edge_index)
    degree = divisors("even", edge_index[1], None, NODES)[:, None]
    assert len((seen[1] * degree).round(decimals=4).unique()) == 2
    assert len((seen[2] * degree).round(decimals=4).unique()) > 2
    assert torch.equal(seen[1], stored(seen[0] * degree, 1) / degree)


def test_what_is_stored_is_the_tensor_before_a_dropout() -> None:
    """Else a kept value, 1 / (1 - p) as large, would be clipped, and a dropped one would not come back as 0."""
    x, edge_index = graph()
    model = Net(pyg.GCNConv, dropout=0.6)
    quantizer = calibrated(model, BitPlan({("conv1", "embedding"): 2}, default=32), range="minmax")
    met: list[Tensor] = []
    model.conv1.register_forward_pre_hook(lambda module, args: met.append(args[0]))
    inner = model.conv1.lin  # behind the quantization
    inner.register_forward_pre_hook(lambda module, args: met.append(args[0]))
    model.train()
    with quantizer:
        torch.manual_seed(5)
        model(x, edge_index)
    torch.manual_seed(5)
    mask = F.dropout(torch.ones_like(x), 0.6)
    assert 0 < (mask == 0).sum() < mask.numel()
    assert torch.equal(met[0], x * mask)
    torch.testing.assert_close(met[1], stored(x, 2) * mask)


@pytest.mark.parametrize("dropout", [0.0, 0.6])
def test_the_first_nodes_of_a_sampled_batch_are_stored_once_with_the_others(dropout: float) -> None:
    """`conv((x, x[:size]), edges)`: the nodes that receive are read as they are stored among those that send."""
    (x, edge_index), size = graph(), NODES // 2
    edge_index = edge_index[:, edge_index[1] < size]

    class Batch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = pyg.SAGEConv((6, 6), 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(x, dropout, self.training)
            out: Tensor = self.conv((x, x[:size]), edge_index)
            return out

    model = Batch()
    quantizer = SGQuantizer(model, BitPlan({("conv", "embedding"): 2}, default=32), range="minmax")
    quantizer.calibrate(lambda: model(x))
    assert [spot.name for spot in quantizer.sites if spot.component == "embedding"] == ["x.0"]
    met: list[Any] = []
    model.conv.register_propagate_forward_pre_hook(lambda module, args: met.append(args[2]["x"]))
    with quantizer:
        model.train()(x.requires_grad_()).sum().backward()
    senders, receivers = met[0]
    assert torch.equal(receivers, senders[:size])
    kept = senders != 0
    torch.testing.assert_close(senders, torch.where(kept, stored(x.detach(), 2) / (1 - dropout), 0))
    assert x.grad is not None
    assert x.grad[:size].abs().sum() > 0


def test_features_that_come_again_are_quantized_anew_only_if_something_changed() -> None:
    x, edge_index = graph()
    model = Net(pyg.GCNConv).eval()

    def fresh(plan: int | BitPlan = 4) -> Tensor:
        quantizer.detach()
        quantizer.set_plan(plan)
        with quantizer:
            out: Tensor = model(x, edge_index)
        return out

    quantizer = calibrated(model, 4)
    want = fresh()
    with quantizer:
        assert all(torch.equal(model(x, edge_index), want) for _ in range(3))
        x[0] = 0  # in place
        changed = model(x, edge_index)
        quantizer.set_plan(2)
        two = model(x, edge_index)
    assert torch.equal(changed, fresh())
    assert not torch.equal(changed, want)
    assert torch.equal(two, fresh(2))
    by_degree = topologywise([8, 4, 2, 1])
    other = edge_index.flip(0)
    quantizer.set_plan(by_degree)
    with quantizer:
        for _ in range(3):
            model(x, edge_index)
        turned = model(x, other)
    edge_index = other
    assert torch.equal(turned, fresh(by_degree))


def test_dropout_is_drawn_as_without_it() -> None:
    model = gat(dropout=0.5).train()
    torch.manual_seed(3)
    want = model(*graph())
    with calibrated(model, 32):
        torch.manual_seed(3)
        assert torch.equal(model(*graph()), want)


def test_tables_are_read_as_they_are_stored() -> None:
    model = Embedded().eval()
    table = model.encoder.embedding
    raw = table.weight
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with calibrated(model, topologywise([8, 4, 2, 1])) as quantizer:
        assert quantizer.sites[Spot("encoder.convs.0", "embedding", "x")].parameter == "encoder.embedding.weight"
        assert not torch.equal(table.weight, raw)
        assert torch.equal(table(torch.tensor([[3, 0], [39, 3]])), table.weight[torch.tensor([[3, 0], [39, 3]])])
        assert next(model.parameters()) is raw
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        table.weight.sum().backward()
        assert raw.grad is not None
    assert table.weight is raw


def test_a_layers_output_that_is_the_next_ones_input_is_quantized_once() -> None:
    model = AGNN().eval()
    sites = calibrated(model).sites
    again = sites[Spot("prop2", "embedding", "x")]
    assert again.is_stored
    assert again.owner == Spot("prop1", "update", "out")
    assert all(not site.is_owner for spot, site in sites.items() if spot.component == "message" and spot.name == "x")


def test_edge_weights_that_layers_share_are_one_and_quantized_in_each() -> None:
    model = networks()["KGATConv"]().eval()
    plan = BitPlan({("*", "attention"): 1}, default=32)
    with calibrated(model, plan) as quantizer:
        assert quantizer.sites[Spot("conv2", "attention", "edge_weight")].owner.layer == "conv1"
        met: list[Tensor] = []
        for conv in (model.conv1, model.conv2):
            conv.register_message_forward_pre_hook(lambda module, args: met.append(args[0]["edge_weight"]))
        model(*graph())
    assert [len(weight.unique()) for weight in met] == [2, 2]
