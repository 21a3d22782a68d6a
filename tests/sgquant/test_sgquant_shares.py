"""Coefficients as multiples of an even share, and ranges by channel: when, how exactly, and in how many bytes."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import calibrated, gat, graph, networks
from torch import Tensor, nn
from torch_geometric import nn as pyg
from torch_geometric.utils import softmax

from lightning_tinykg.sgquant import SGQuantizer, componentwise, sites, topologywise
from lightning_tinykg.sgquant.files import _checksum, load_features, save_features
from lightning_tinykg.sgquant.model import PackedModel
from lightning_tinykg.sgquant.order import RowOrder
from lightning_tinykg.sgquant.packed import PackedFeatures
from lightning_tinykg.sgquant.quantize import Level, fake_quantize
from lightning_tinykg.sgquant.receivers import EdgesByReceiver
from lightning_tinykg.sgquant.runs import run_of
from lightning_tinykg.sgquant.shares import Share, divisors
from lightning_tinykg.sgquant.sites import Site

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 16)


class Weighted(nn.Module):
    """A sum over neighbours with coefficients that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = pyg.GraphConv(16, 8)

    def forward(self, x: Tensor, edge_index: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = self.conv(x, edge_index, weight)
        return out


class One(nn.Module):
    """One layer."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, edge_index: Tensor, weight: Tensor | None = None) -> Tensor:
        out: Tensor = self.conv(x, edge_index) if weight is None else self.conv(x, edge_index, weight)
        return out


def skewed(nodes: int = 300, alike: bool = True) -> tuple[Tensor, Tensor]:
    """Nodes that receive from 1 to 200 others, and features that neighbours share, or of which each has its own."""
    generator = torch.Generator().manual_seed(0)
    degrees = torch.logspace(0, 2.3, nodes).long()
    receivers = torch.arange(nodes).repeat_interleave(degrees)
    senders = torch.randint(nodes, (receivers.numel(),), generator=generator)
    x = torch.randn(nodes, 16, generator=generator)
    return (x * 0.3 + 1 if alike else x), torch.stack([senders, receivers])


def coefficients(edge_index: Tensor, sharpness: float = 1.0) -> Tensor:
    """A softmax over the edges of each receiver."""
    generator = torch.Generator().manual_seed(1)
    return softmax(sharpness * torch.randn(edge_index.size(1), generator=generator), edge_index[1])


def site_of(quantizer: SGQuantizer) -> Site:
    return next(site for spot, site in quantizer.sites.items() if spot.component == "attention" and site.is_owner)


def quantizer_of(x: Tensor, edge_index: Tensor, weight: Tensor, bits: int = 2, **options: Any) -> SGQuantizer:
    model = Weighted().eval()
    quantizer = SGQuantizer(model, componentwise(attention=bits), buckets=None, **options)
    quantizer.calibrate(lambda: model(x, edge_index, weight))
    return quantizer


# -- when ------------------------------------------------------------------------------------------------------------


def lost_of(x: Tensor, edge_index: Tensor, weight: Tensor, bits: int) -> tuple[float, float]:
    """What a layer's output loses by what is chosen, and by one range for all coefficients."""
    quantizer = quantizer_of(x, edge_index, weight, bits)
    model: Any = quantizer.model
    observed = site_of(quantizer).observed
    assert observed is not None
    one_range = fake_quantize(weight, [Level(bits, *observed.ends(None, bits))])
    with torch.no_grad():
        want = model(x, edge_index, weight)
        with quantizer:
            chosen = (model(x, edge_index, weight) - want).norm()
        return float(chosen), float((model(x, edge_index, one_range) - want).norm())


@pytest.mark.parametrize(("alike", "fraction"), [(True, 0.5), (False, 0.75)])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_attention_of_nodes_of_all_degrees_loses_a_fraction_of_what_one_range_loses(
    bits: int, alike: bool, fraction: float
) -> None:
    x, edge_index = skewed(alike=alike)
    chosen, one_range = lost_of(x, edge_index, coefficients(edge_index), bits)
    assert chosen < fraction * one_range


@pytest.mark.parametrize("alike", [True, False])
def test_peaked_attention_loses_no_more_than_with_one_range(alike: bool) -> None:
    """Multiples of a share are then far apart, up to the degree itself."""
    x, edge_index = skewed(alike=alike)
    weight = coefficients(edge_index, sharpness=4)
    assert 4 not in site_of(quantizer_of(x, edge_index, weight)).share_widths
    for bits in (1, 2, 4, 8):
        chosen, one_range = lost_of(x, edge_index, weight, bits)
        assert chosen < 1.1 * one_range


def test_a_graph_of_which_no_node_would_be_looked_at_is_decided_about_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sites, "_SOME", 100)  # of 300 edges: those of every third node
    receivers = torch.tensor([1] * 4 + [4] * 46 + [5] * 250)
    x, edge_index = torch.randn(300, 16), torch.stack([torch.arange(300), receivers])
    assert 2 in site_of(quantizer_of(x, edge_index, coefficients(edge_index, sharpness=0.3))).share_widths


def test_equal_shares_are_exact_in_one_bit() -> None:
    x, edge_index = skewed()
    weight = coefficients(edge_index, sharpness=0)
    model: Any = (quantizer := quantizer_of(x, edge_index, weight, bits=1)).model
    want = model(x, edge_index, weight)
    with quantizer:
        torch.testing.assert_close(model(x, edge_index, weight), want, rtol=1e-5, atol=1e-5)


def test_what_does_not_sum_to_1_has_one_range() -> None:
    x, edge_index = skewed()
    quantizer = quantizer_of(x, edge_index, torch.rand(edge_index.size(1)))
    assert site_of(quantizer).shares is None
    assert not any(level.share for spot in quantizer.sites for level in quantizer.levels(spot))


SYMMETRIC = {
    "GCN": lambda: pyg.GCNConv(16, 8),
    "GCN without loops": lambda: pyg.GCNConv(16, 8, add_self_loops=False),
    "GCN to sources": lambda: pyg.GCNConv(16, 8, flow="target_to_source"),
    "LightGCN": pyg.LGConv,
    "SG": lambda: pyg.SGConv(16, 8, K=2),
    "TAG": lambda: pyg.TAGConv(16, 8, K=2),
    "APPNP": lambda: pyg.APPNP(2, 0.1),
    "ARMA": lambda: pyg.ARMAConv(16, 8),
}


@pytest.mark.parametrize("buckets", [None, 4])
@pytest.mark.parametrize("name", SYMMETRIC)
def test_what_the_degrees_tell_is_exact_in_one_bit(name: str, buckets: int | None) -> None:
    x, edge_index = skewed()
    edge_index = edge_index[:, edge_index[1] != 7]  # from where edges go, and none arrives
    model = One(SYMMETRIC[name]()).eval()
    quantizer = SGQuantizer(model, componentwise(embedding=32, message=32, attention=1, update=32), buckets=buckets)
    quantizer.calibrate(lambda: model(x, edge_index))
    assert site_of(quantizer).share == "symmetric"
    packed = PackedModel.from_quantizer(quantizer, block_edges=100)
    with torch.no_grad():
        want = model(x, edge_index)
        with quantizer:
            torch.testing.assert_close(model(x, edge_index), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(packed(x, edge_index) + 0, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("buckets", [None, 3])
def test_weights_beside_the_degrees_have_a_range(buckets: int | None) -> None:
    x, edge_index = skewed()
    model = One(pyg.GCNConv(16, 8)).eval()
    weight = torch.rand(edge_index.size(1))
    quantizer = SGQuantizer(model, componentwise(attention=4), buckets=buckets)
    quantizer.calibrate(lambda: model(x, edge_index, weight))
    assert site_of(quantizer).share == ""


class Bipartite(nn.Module):
    """From nodes of one kind to those of another, with weights that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = pyg.GraphConv((16, 16), 8)

    def forward(self, x: Tensor, receiving: Tensor, edge_index: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = self.conv((x, receiving), edge_index, weight)
        return out


def test_senders_of_another_kind_have_no_degree() -> None:
    edge_index = torch.stack([torch.randint(40, (200,)), torch.randint(30, (200,))])
    model = Bipartite().eval()
    quantizer = SGQuantizer(model, componentwise(attention=1), buckets=None)
    degrees = [edge_index[end].bincount(minlength=40).float() for end in (0, 1)]
    weight = (degrees[0][edge_index[0]] * degrees[1][edge_index[1]]).rsqrt()
    quantizer.calibrate(lambda: model(torch.randn(40, 16), torch.randn(30, 16), edge_index, weight))
    assert site_of(quantizer).share == ""


def test_a_batch_without_the_degrees_of_its_senders_is_refused() -> None:
    """As of a calibration on a graph of one kind, and sampled batches after it."""
    x, edge_index = torch.randn(30, 16), torch.randint(30, (2, 200))
    model = Bipartite().eval()
    weight = divisors("symmetric", edge_index[1], edge_index[0], 30).reciprocal()
    quantizer = SGQuantizer(model, componentwise(attention=1), buckets=None)
    quantizer.calibrate(lambda: model(x, x, edge_index, weight))
    assert site_of(quantizer).share == "symmetric"
    packed = PackedModel.from_quantizer(quantizer)
    senders = torch.cat([x, x])
    with pytest.raises(RuntimeError, match="degrees of senders of another kind are not known"), quantizer:
        model(senders, x, edge_index, weight)
    with pytest.raises(RuntimeError, match="degrees of senders of another kind are not known"):
        packed(senders, x, edge_index, weight)


def test_all_or_nothing_keeps_its_two_values() -> None:
    """A node that listens to one neighbour only: 0 and 1 are exact in one bit, multiples of a share are not."""
    x, edge_index = skewed()
    weight = coefficients(edge_index, sharpness=1e4).round()
    quantizer = quantizer_of(x, edge_index, weight, bits=1)
    assert site_of(quantizer).shares is not None
    assert not site_of(quantizer).share_widths
    model: Any = quantizer.model
    want = model(x, edge_index, weight)
    with quantizer:
        assert torch.equal(model(x, edge_index, weight), want)


def test_one_batch_that_does_not_sum_to_1_decides_for_all() -> None:
    x, edge_index = skewed()
    weight = coefficients(edge_index)
    for first, second in ((weight, 2 * weight), (2 * weight, weight)):
        quantizer = quantizer_of(x, edge_index, first, range="minmax")
        model: Any = quantizer.model
        quantizer.calibrate(lambda m=model, w=second: m(x, edge_index, w), more=True)  # type: ignore[misc]  # bound at once
        site = site_of(quantizer)
        assert (site.shares, site.share_widths) == (None, ())
        assert site.observed is not None
        assert site.observed.ends(None, 16)[1] == 2 * float(weight.max())


@pytest.mark.parametrize("name", ["GAT", "GATv2", "AGNN", "Transformer"])
def test_layers_with_a_softmax_have_shares(name: str) -> None:
    assert site_of(calibrated(networks()[name]().eval())).shares is not None


def test_ranks_store_shares_only_where_all_of_them_would() -> None:
    x, edge_index = skewed()
    ours, theirs = (site_of(quantizer_of(x, edge_index, coefficients(edge_index, sharp))) for sharp in (1.0, 1e4))
    assert 2 in ours.share_widths
    assert 2 not in theirs.share_widths
    both = set(ours.share_widths) & set(theirs.share_widths)
    ours.agree([ours, theirs])
    assert set(ours.share_widths) == both


def test_ranks_that_have_other_shares_store_none() -> None:
    x, edge_index = torch.randn(30, 16), torch.randint(30, (2, 200))
    symmetric = divisors("symmetric", edge_index[1], edge_index[0], 30).reciprocal()
    ours, theirs = (site_of(quantizer_of(x, edge_index, w)) for w in (symmetric, coefficients(edge_index, 0.3)))
    assert (ours.share, theirs.share) == ("symmetric", "even")
    assert 2 in set(ours.share_widths) & set(theirs.share_widths)
    ours.agree([ours, theirs])
    assert ours.share_widths == ()


def test_an_earlier_state_goes_on_as_it_was() -> None:
    """Of before there were shares, or ranges by channel."""
    x, edge_index = skewed()
    weight = coefficients(edge_index)
    state = quantizer_of(x, edge_index, weight, granularity="tensor").state_dict()
    state["options"]["granularity"] = "auto"
    for site in state["sites"]:
        del site["shares"], site["share_widths"]
    model = Weighted().eval()
    quantizer = SGQuantizer(model, componentwise(attention=2), buckets=None)
    quantizer.load_state_dict(state)
    assert not any(level.share for spot in quantizer.sites for level in quantizer.levels(spot))
    with quantizer:
        model(x, edge_index, weight)


def test_a_state_has_its_shares_and_channels_with_it() -> None:
    model = gat().eval()
    quantizer = calibrated(model, topologywise([8, 4, 2, 1]), granularity="channel")
    again = SGQuantizer(model, 32, granularity="channel")
    again.load_state_dict(quantizer.state_dict())
    assert [again.levels(spot) for spot in again.sites] == [quantizer.levels(spot) for spot in quantizer.sites]
    assert any(level.share for spot in again.sites for level in again.levels(spot))


# -- channels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "by_channel"), [(1023, False), (1024, True)])
def test_channels_have_their_own_range_where_it_is_little_beside_the_codes(rows: int, by_channel: bool) -> None:
    x, edge_index = torch.randn(rows, 8) * torch.logspace(-2, 2, 8), torch.randint(rows, (2, 3000))
    conv = pyg.GCNConv(8, 8).eval()
    quantizer = SGQuantizer(nn.ModuleList([conv]), 4, buckets=None)
    quantizer.calibrate(lambda: conv(x, edge_index))
    levels = {spot.component: quantizer.levels(spot)[0] for spot in quantizer.sites}
    assert isinstance(levels["embedding"].low, tuple) == by_channel
    assert not isinstance(levels["attention"].low, tuple)
    with quantizer, torch.no_grad():
        stored = fake_quantize(x, quantizer.levels(next(iter(quantizer.sites))))
    lost = ((stored - x).norm(dim=0) / x.norm(dim=0)).max()
    assert lost < 0.2 if by_channel else lost > 0.9  # the smallest channel is nothing beside the largest


def test_all_of_a_model_by_channel_is_packed_as_it_is_counted() -> None:
    x, edge_index = torch.randn(1500, 6), torch.randint(1500, (2, 6000))
    model = gat().eval()
    quantizer = SGQuantizer(model, topologywise([8, 4, 3, 1]))
    quantizer.calibrate(lambda: model(x, edge_index))
    packed = PackedModel.from_quantizer(quantizer)
    with quantizer, torch.no_grad():
        want = model(x, edge_index)
    assert torch.equal(packed(x, edge_index) + 0, want)
    stored = sum(nbytes for _, _, nbytes in packed._packing.stored.values())
    assert stored == quantizer.memory().packed_bytes - quantizer.memory().order_bytes


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_a_model_is_saved_with_its_channels_and_shares(granularity: Any, tmp_path: Path) -> None:
    packed = PackedModel.from_quantizer(calibrated(gat().eval(), topologywise([8, 32, 3, 1]), granularity=granularity))
    packed.save(tmp_path)
    loaded = PackedModel.load(tmp_path, gat())
    assert loaded._packing.sites == packed._packing.sites
    assert torch.equal(loaded(*graph()) + 0, packed(*graph()) + 0)


def test_a_model_in_the_second_version_of_the_format_is_read(tmp_path: Path) -> None:
    """Whose levels said of shares that they are even, or nothing."""
    packed = PackedModel.from_quantizer(calibrated(gat().eval(), topologywise([8, 32, 3, 1])))
    packed.save(tmp_path)
    card = json.loads((tmp_path / "card.json").read_text())
    del card["checksum"]
    card["version"] = 2
    for site in card["sites"]:
        site["levels"] = [[*level[:3], level[3] == "even"] for level in site["levels"]]
    assert any(level[3] for site in card["sites"] for level in site["levels"])
    (tmp_path / "card.json").write_text(json.dumps({**card, "checksum": _checksum(card)}))
    loaded = PackedModel.load(tmp_path, gat())
    assert loaded._packing.sites == packed._packing.sites


def test_a_model_in_the_first_version_of_the_format_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose levels had three items, and whose tables knew no shares."""
    monkeypatch.setattr(sites, "share_of", lambda *_: "")
    quantizer = calibrated(networks()["LightGCN"]().eval(), topologywise([8, 32, 3, 1]), granularity="tensor")
    packed = PackedModel.from_quantizer(quantizer)
    packed.save(tmp_path)
    card = json.loads((tmp_path / "card.json").read_text())
    del card["checksum"]
    card["version"] = 1
    for site in card["sites"]:
        site["levels"] = [level[:3] for level in site["levels"]]
    for table in card["tables"].values():
        del table["shares"]
    (tmp_path / "card.json").write_text(json.dumps({**card, "checksum": _checksum(card)}))
    loaded = PackedModel.load(tmp_path, networks()["LightGCN"]())
    assert torch.equal(loaded(*graph()) + 0, packed(*graph()) + 0)


# -- packed edges ------------------------------------------------------------------------------------------------------


def edges_of(nodes: int, seed: int, buckets: int, share: Share) -> tuple[PackedFeatures, Tensor]:
    """Coefficients of two heads, of receivers some of which have no edge, and what they are worth in the same order."""
    torch.manual_seed(seed)
    receivers = torch.randint(nodes, (nodes * 4,)).clamp(max=max(nodes - 3, 0))
    senders = torch.randint(nodes, (nodes * 4,))
    x = softmax(torch.randn(receivers.numel(), 2), receivers)
    bucket = torch.randint(buckets, (nodes,))
    levels = [Level(bits, 0.0, 2.5, share) if bits % 2 else Level(bits, 0.0, 1.0) for bits in (3, 8, 1)]
    levels = [*levels[:buckets], *([Level(32)] if buckets > 3 else [])]
    order = RowOrder.of_buckets(bucket, buckets) if buckets > 1 else None
    edges = EdgesByReceiver(receivers, nodes, order, senders)
    want = fake_quantize(x, levels, bucket[receivers], divisor=divisors(share, receivers, senders, nodes))
    return PackedFeatures.encode(x, levels, edges.edge_order, run_of(2), edges), want


@settings(max_examples=40, deadline=None)
@given(
    nodes=st.integers(1, 60),
    seed=st.integers(0, 2**20),
    buckets=st.integers(1, 4),
    share=st.sampled_from(["even", "symmetric"]),
)
def test_packed_shares_are_what_is_simulated(nodes: int, seed: int, buckets: int, share: Share) -> None:
    packed, want = edges_of(nodes, seed, buckets, share)
    assert torch.equal(packed.decode(), want)
    index = torch.randint(len(want), (7,))
    assert torch.equal(packed.decode(index), want[index])
    assert torch.equal(packed[3:9], want[3:9])
    for again in (packed.alias(), packed.parts_to("cpu"), copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(again.decode(), want)


@pytest.mark.parametrize("share", ["even", "symmetric"])
def test_packed_shares_are_saved(share: Share, tmp_path: Path) -> None:
    packed, want = edges_of(30, 0, 4, share)
    save_features(tmp_path, packed)
    assert torch.equal(load_features(tmp_path).decode(), want)


def test_shares_need_to_know_their_receivers() -> None:
    with pytest.raises(ValueError, match="edges must be given for levels with a share, got None"):
        PackedFeatures.encode(torch.rand(4, 1), [Level(2, 0.0, 2.0, share="even")], run=run_of(1))
