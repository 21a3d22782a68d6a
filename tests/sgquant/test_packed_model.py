"""A packed model: the simulated model's results, in the bytes that the plan says; saved, loaded and moved."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import AGNN, Embedded, Net, gat, graph, networks
from torch import Tensor, nn
from torch_geometric import nn as pyg
from torch_geometric.utils import softmax

from lightning_tinykg.bits.plan import BitPlan
from lightning_tinykg.sgquant import blocked
from lightning_tinykg.sgquant.files import PackedFileError, load_features, save_features
from lightning_tinykg.sgquant.granularity import topologywise
from lightning_tinykg.sgquant.memory import Memory
from lightning_tinykg.sgquant.model import PackedModel
from lightning_tinykg.sgquant.packed import PackedFeatures
from lightning_tinykg.sgquant.quantizer import SGQuantizer
from lightning_tinykg.sgquant.wiring import Spot

PLANS: dict[str, tuple[Any, dict[str, Any]]] = {
    "4 bits": (4, {}),
    "by degree": (topologywise([8, 4, 3, 1]), {}),
    "by degree, each bucket's range": (topologywise([16, 32, 5, 2]), {"granularity": "bucket"}),
    "each node's range": (topologywise([6, 4, 2, 1]), {"granularity": "node"}),
    "each channel's range": (3, {"granularity": "channel"}),
    "by degree, each channel's range": (topologywise([16, 32, 5, 1]), {"granularity": "channel"}),
    "no buckets": (2, {"buckets": None}),
}


def calibrated(model: nn.Module, plan: Any = 4, **options: Any) -> SGQuantizer:
    x, edge_index = graph()
    quantizer = SGQuantizer(model.eval(), plan, **options)
    quantizer.calibrate(lambda: model(x, edge_index))
    return quantizer


@torch.no_grad()
def simulated(quantizer: SGQuantizer) -> Tensor:
    with quantizer:
        out: Tensor = quantizer.model(*graph())
    return out


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", networks())
def test_a_packed_model_gives_what_the_simulated_one_gives(name: str, plan: str) -> None:
    bits, options = PLANS[plan]
    quantizer = calibrated(networks()[name](), bits, **options)
    packed = PackedModel.from_quantizer(quantizer, block_edges=9)
    x, edge_index = graph()
    expected = simulated(quantizer)
    assert torch.equal(packed(x, edge_index) + 0, expected)
    if name == "Sampled":
        if plan.startswith("by degree"):
            with pytest.raises(ValueError, match=r"conv1 / embedding \(x.0\) must be given as floats"):
                packed.pack_features(x, edge_index)
    elif name != "LightGCN":
        features = packed.pack_features(x, edge_index)
        assert torch.equal(packed(features, edge_index) + 0, expected)


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def default_dtype(request: Any) -> Iterator[torch.dtype]:
    """What Lightning's "64-true" and "bf16-true" set while a module runs."""
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "name", sorted(networks().keys() - {"RGCN"})
)  # which makes tensors of the default dtype itself
def test_the_default_dtype_changes_nothing(name: str, default_dtype: torch.dtype) -> None:
    bits, options = PLANS["by degree, each bucket's range"]
    model = networks()[name]()

    x, edge_index = graph()

    def results() -> tuple[Tensor, Tensor, Memory]:
        copied = copy.deepcopy(model).eval()
        quantizer = SGQuantizer(copied, bits, **options)
        quantizer.calibrate(lambda: copied(x, edge_index))
        with quantizer, torch.no_grad():
            simulated = copied(x, edge_index)
        return simulated, PackedModel.from_quantizer(quantizer, 9)(x, edge_index) + 0, quantizer.memory()

    want = results()
    torch.set_default_dtype(default_dtype)
    found = results()
    assert torch.equal(found[0], want[0])
    assert torch.equal(found[1], want[1])
    assert found[2] == want[2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(networks().keys() - {"RGCN"}))  # which makes float32 of bfloat16 itself
def test_a_model_of_another_dtype_gives_what_the_simulated_one_gives(name: str, dtype: torch.dtype) -> None:
    """Codes decode to float32, so its values are rounded, and not kept as codes."""
    model = networks()[name]().eval().to(dtype)
    x, edge_index = graph()
    x = x.to(dtype)
    for module in model.modules():
        if hasattr(module, "extra"):
            module.extra = tuple(one.to(dtype) if one.is_floating_point() else one for one in module.extra)
    quantizer = SGQuantizer(model, topologywise([8, 4, 3, 1]))
    quantizer.calibrate(lambda: model(x, edge_index))
    with quantizer, torch.no_grad():
        expected = model(x, edge_index)
    found = PackedModel.from_quantizer(quantizer, block_edges=9)(x, edge_index) + 0
    assert found.dtype == expected.dtype == dtype
    torch.testing.assert_close(found, expected)


class EverySecond(pyg.MessagePassing):
    """Its update gives half the rows, and its attention is updated by itself, or with something else."""

    def __init__(self, pair: bool) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        given = self.edge_updater(edge_index, x=x)
        weight = given[0] if self.pair else given
        out: Tensor = self.propagate(edge_index, x=x, weight=weight)
        return out.repeat_interleave(2, 0)

    def edge_update(self, x_i: Tensor, x_j: Tensor, index: Tensor) -> Any:
        weight = softmax((x_i * x_j).sum(1), index)
        return (weight, x_i) if self.pair else weight

    def message(self, x_j: Tensor, weight: Tensor) -> Tensor:
        return x_j * weight[:, None]

    def update(self, inputs: Tensor) -> Tensor:
        return inputs[::2]


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_what_a_block_shows_to_be_of_the_whole_is_stored_as_in_the_simulated_one(plan: str, pair: bool) -> None:
    bits, options = PLANS[plan]
    quantizer = calibrated(EverySecond(pair), bits, **options)
    packed = PackedModel.from_quantizer(quantizer, block_edges=9)
    expected = simulated(quantizer)
    blocked._warned.clear()
    with pytest.warns(UserWarning, match=r"its update gives \d+ rows for \d+ nodes") as told:
        assert torch.equal(packed(*graph()) + 0, expected)
    assert pair == any("it gives a tuple" in str(warning.message) for warning in told)
    with torch.no_grad():
        assert not torch.equal(expected, quantizer.model(*graph()))


def test_everything_that_has_a_width_is_stored_in_it() -> None:
    model = Net(lambda a, b: pyg.GATConv(a, b, heads=2, concat=False))
    quantizer = calibrated(model, 2, buckets=None)
    packed = PackedModel.from_quantizer(quantizer, block_edges=9)
    packed(*graph())
    owners = {site.spot for site in quantizer.sites.values() if site.is_owner}
    assert set(packed._packing.stored) == owners
    elements = sum(torch.Size(shape).numel() for shape, _, _ in packed._packing.stored.values())
    nbytes = sum(nbytes for _, _, nbytes in packed._packing.stored.values())
    assert elements / 4 < nbytes < elements / 4 * 1.5 + 8 * len(owners)
    shown = str(packed)
    assert all(str(owner) in shown for owner in owners)


WIDTHS: dict[str, Any] = {"3": 3, "4": 4, "8431": topologywise([8, 4, 3, 1]), "mixed": topologywise([16, 32, 5, 2])}


@pytest.mark.parametrize("granularity", ["tensor", "bucket", "channel", "node", "auto"])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("name", ["GCN", "GAT", "AGNN", "RGCN", "Sampled", "LightGCN"])
def test_the_bytes_that_are_counted_are_those_that_are_stored(name: str, widths: str, granularity: str) -> None:
    """Tensor by tensor, and with the order of the nodes in all."""
    quantizer = calibrated(networks()[name](), WIDTHS[widths], granularity=granularity)
    packed = PackedModel.from_quantizer(quantizer, block_edges=9)
    packed(*graph())
    memory, counted = quantizer.memory(), dict.fromkeys(packed._packing.stored, 0)
    parameters = {site.parameter: spot for spot, site in quantizer.sites.items() if site.parameter is not None}
    stored = {spot: nbytes for spot, (_, _, nbytes) in packed._packing.stored.items()}
    stored |= {parameters[table]: features.nbytes for table, features in packed.tables.items()}
    for rows in memory.stored:
        spot = Spot(rows.place.layer, rows.place.component, rows.name)
        counted[spot] = counted.get(spot, 0) + rows.packed_bytes
    # coefficients that a softmax gives within a block are gone after it: they are counted as if they were stored
    within = {spot for spot in counted if name in ("AGNN", "Within relations") and spot.component == "attention"}
    assert {spot: nbytes for spot, nbytes in counted.items() if spot not in within} == stored
    orders = [order for _, order in packed._packing._orders]
    orders += [table.order for table in packed.tables.values() if table.order is not None]
    assert sum(order.nbytes for order in orders) == memory.order_bytes
    assert memory.packed_bytes == sum(counted.values()) + memory.order_bytes


def test_the_attention_of_edges_takes_its_bits_and_no_more() -> None:
    x, edge_index = torch.randn(50, 6), torch.randint(0, 50, (2, 4000))
    model = Net(pyg.GCNConv).eval()
    quantizer = SGQuantizer(model, 2, buckets=None)
    quantizer.calibrate(lambda: model(x, edge_index))
    packed = PackedModel.from_quantizer(quantizer)
    packed(x, edge_index)
    (shape, bits, nbytes) = next(v for spot, v in packed._packing.stored.items() if spot.component == "attention")
    assert bits == (2,)
    assert nbytes < shape[0] * 2 / 8 + 32 + 8


def test_a_table_is_kept_as_codes_only_wherever_it_is_read() -> None:
    quantizer = calibrated(Embedded(), topologywise([8, 4, 2, 1]))
    model: Any = quantizer.model
    table = model.encoder.embedding.weight
    with quantizer, torch.no_grad():
        expected = model.encoder.embedding.weight + 0
        looked_up = model.encoder.embedding(torch.tensor([3, 1]))
    packed: Any = PackedModel.from_quantizer(quantizer)
    stored = packed.model.encoder.embedding.weight
    assert isinstance(stored, PackedFeatures)
    assert torch.equal(stored.decode(), expected)
    assert torch.equal(packed.model.encoder.embedding(torch.tensor([3, 1])), looked_up)
    assert not list(packed.model.parameters())
    assert packed.nbytes == stored.nbytes + 4 * len(table) + sum(b.nbytes for b in packed.model.buffers())
    assert model.encoder.embedding.weight is table  # the model it was made of is as it was
    assert table.requires_grad


def test_a_model_in_another_dtype_takes_the_simulated_values() -> None:
    x, edge_index = graph()
    model = Net(pyg.SAGEConv).double().eval()
    quantizer = SGQuantizer(model, topologywise([8, 4, 3, 1]))
    quantizer.calibrate(lambda: model(x.double(), edge_index))
    packed = PackedModel.from_quantizer(quantizer, block_edges=9)
    with quantizer, torch.no_grad():
        expected = model(x.double(), edge_index)
    assert torch.equal(packed(x.double(), edge_index), expected)


def test_features_are_packed_in_pieces() -> None:
    x, edge_index = graph()
    packed = PackedModel.from_quantizer(calibrated(AGNN(), topologywise([8, 4, 2, 1])))
    whole = packed.pack_features(x, edge_index)
    pieces = packed.pack_features((x[at : at + 7] for at in range(0, len(x), 7)), edge_index, rows=len(x))
    assert torch.equal(pieces.decode(), whole.decode())
    with pytest.raises(ValueError, match="pieces must be of 40 rows, got 7"):
        packed.pack_features([x[:7]], edge_index, rows=40)
    with pytest.raises(ValueError, match="pieces must be of 41 rows, got 80"):
        packed.pack_features([x, x], edge_index, rows=41)
    with pytest.raises(RuntimeError, match="degrees of its 10 nodes, and no graph of so many is known"):
        packed.pack_features([x], edge_index, rows=10)
    with pytest.raises(ValueError, match=r"got 5; there are .*lin1 \(6 wide\)"):
        packed.pack_features(x[:, :5], edge_index)


def test_a_model_that_notes_what_it_has_computed_is_packed_after_a_step_of_training() -> None:
    class Noting(nn.Module):  # as PyG's VGAE does
        def __init__(self) -> None:
            super().__init__()
            self.conv = pyg.GCNConv(6, 4)
            self.register_buffer("last", None)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            self.mean = self.conv(x, edge_index)
            self.last = self.mean.relu()
            return self.last

    model, x = Noting(), torch.randn(30, 6)
    edges = torch.randint(30, (2, 90))
    quantizer = SGQuantizer(model, 4)
    quantizer.calibrate(lambda: model(x, edges))
    with quantizer:
        out = model(x, edges)
    out.sum().backward()
    packed = PackedModel.from_quantizer(quantizer)
    assert torch.equal(packed.model.mean, model.mean)
    assert [module.mean.requires_grad for module in (packed.model, model)] == [False, True]
    with torch.no_grad():
        assert torch.equal(packed(x, edges), out)


def test_another_graph_takes_the_same_thresholds() -> None:
    quantizer = calibrated(gat(), topologywise([8, 4, 2, 1]))
    packed = PackedModel.from_quantizer(quantizer, block_edges=5)
    x, edge_index = graph(nodes=17, edges=60, isolated=1)
    with quantizer, torch.no_grad():
        expected = quantizer.model(x, edge_index)
    assert torch.equal(packed(x, edge_index) + 0, expected)


# -- saving ------------------------------------------------------------------------------------------------------------


def saved(tmp_path: Path, make: Callable[[], nn.Module]) -> tuple[PackedModel, Path]:
    packed = PackedModel.from_quantizer(calibrated(make(), topologywise([8, 32, 3, 1])), block_edges=50)
    packed.save(tmp_path / "packed")
    return packed, tmp_path / "packed"


@pytest.mark.parametrize("make", [gat, Embedded, AGNN, networks()["GCN"]])
def test_what_is_saved_is_what_is_loaded(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    packed, folder = saved(tmp_path, make)
    loaded = PackedModel.load(folder, make())
    assert torch.equal(loaded(*graph()) + 0, packed(*graph()) + 0)
    assert loaded.nbytes == packed.nbytes
    assert loaded.block_edges == 50
    again = copy.deepcopy(loaded)
    assert torch.equal(again(*graph()) + 0, packed(*graph()) + 0)


def test_a_skeleton_without_memory_is_filled(tmp_path: Path) -> None:
    packed, folder = saved(tmp_path, gat)
    with torch.device("meta"):
        skeleton = gat()
    assert torch.equal(PackedModel.load(folder, skeleton)(*graph()) + 0, packed(*graph()) + 0)


def test_a_table_that_is_looked_up_moves_with_the_model(tmp_path: Path) -> None:
    packed, _ = saved(tmp_path, Embedded)
    moved: Any = packed.to("cpu").train()
    assert not moved.training
    assert not moved.model.training
    assert moved.model.encoder.embedding.weight is moved.tables["encoder.embedding.weight"]


def test_files_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    _, folder = saved(tmp_path, gat)
    card, tensors = folder / "card.json", folder / "tensors.safetensors"
    good_card, good_tensors = card.read_bytes(), tensors.read_bytes()

    def refused(message: str, model: nn.Module | None = None) -> None:
        with pytest.raises(PackedFileError, match=message):
            PackedModel.load(folder, model or gat())
        card.write_bytes(good_card)
        tensors.write_bytes(good_tensors)

    refused("must be loaded into a Net, got a AGNN", AGNN())
    refused("of another model", Net(pyg.GCNConv))
    tensors.write_bytes(good_tensors[:-1])
    refused("tensors.safetensors: corrupt")
    tensors.write_bytes(good_tensors[:-1] + bytes([good_tensors[-1] ^ 1]))
    refused("tensors.safetensors: corrupt")
    card.write_bytes(good_card[:-9])
    refused("card.json: corrupt")
    card.write_bytes(good_card.replace(b'"block_edges": 50', b'"block_edges": 51'))
    refused("changed after it was written")
    plain = json.loads(good_card)
    card.write_text(json.dumps({**plain, "version": 7}))
    refused("of format version 7")
    card.write_text("{}")
    refused("of something else")
    card.unlink()
    refused("must hold card.json")
    with pytest.raises(PackedFileError, match="must be of a features, got one of a model"):
        load_features(folder)


def test_another_table_is_refused(tmp_path: Path) -> None:
    _, folder = saved(tmp_path, Embedded)
    with pytest.raises(PackedFileError, match=r"has shape \[40, 8\], the given model's is \[41, 8\]"):
        PackedModel.load(folder, Embedded(nodes=41))


def test_packed_features_are_saved_and_loaded(tmp_path: Path) -> None:
    x, edge_index = graph()
    packed = PackedModel.from_quantizer(calibrated(AGNN(), topologywise([8, 32, 3, 1]), granularity="node"))
    features = packed.pack_features(x, edge_index)
    save_features(tmp_path, features)
    loaded = load_features(tmp_path)
    assert torch.equal(loaded.decode(), features.decode())
    assert loaded.nbytes == features.nbytes
    assert torch.equal(packed(loaded, edge_index) + 0, packed(features, edge_index) + 0)


def test_a_quantizer_that_knows_nothing_is_refused_and_one_that_is_attached_stays_so() -> None:
    with pytest.raises(RuntimeError, match="calibration"):
        PackedModel.from_quantizer(SGQuantizer(gat(), 4))
    quantizer = calibrated(gat(), BitPlan(default=4))
    quantizer.attach()
    PackedModel.from_quantizer(quantizer)
    assert quantizer.is_attached
    quantizer.detach()


@pytest.mark.parametrize("senders", [9, 60])
@pytest.mark.parametrize(
    "make",
    [
        lambda: pyg.TransformerConv((6, 6), 4, heads=2),
        lambda: pyg.GATConv((6, 6), 4, heads=2, add_self_loops=False),
        lambda: pyg.GATv2Conv((6, 6), 4, add_self_loops=False),
        lambda: pyg.SAGEConv((6, 6), 4),
        lambda: pyg.ResGatedGraphConv((6, 6), 4),
    ],
    ids=["transformer", "gat", "gatv2", "sage", "gated"],
)
def test_senders_of_another_kind_have_their_own_degrees(make: Callable[[], nn.Module], senders: int) -> None:
    model, sent = make().eval(), torch.randn(senders, 6)
    x, edge_index = graph()
    edge_index = torch.stack([edge_index[0] % senders, edge_index[1]])
    quantizer = SGQuantizer(model, topologywise([8, 4, 3, 1]))
    quantizer.calibrate(lambda: model((sent, x), edge_index))
    for site in quantizer.sites.values():
        if site.is_owner and not site.of_edges:
            assert sum(site.rows) in (senders, len(x))
    with quantizer, torch.no_grad():
        expected = model((sent, x), edge_index)
    assert torch.equal(PackedModel.from_quantizer(quantizer, 9)((sent, x), edge_index) + 0, expected)
