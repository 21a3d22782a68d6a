"""Every layer and model of PyTorch, PyTorch Geometric and Lightning's demos under compression.

The fast sample are the layers that are used most; ``-m slow`` are all of them, and PyTorch's own module database.
"""

import pytest
from checking import WIDTHS, Report, check, in_mixed_precision
from layers import CASES, DATABASE, FAMILIES, case, samples

SAMPLED = {
    "torch_geometric.nn.conv": (
        "GCNConv", "SAGEConv", "GraphConv", "GATConv", "GATv2Conv", "TransformerConv", "GINConv", "RGCNConv: bases",
        "CGConv", "LGConv",
    ),
    "torch_geometric.nn.aggr": ("MeanAggregation", "MaxAggregation", "SoftmaxAggregation", "AttentionalAggregation"),
    "torch_geometric.nn.models": ("MLP", "GraphSAGE", "LightGCN"),
    "torch_geometric.nn.norm": ("BatchNorm", "GraphNorm"),
    "torch_geometric.nn.pool": ("TopKPooling",),
    "torch_geometric.nn": ("DistMult", "RotatE"),
    "torch.nn": (
        "Linear", "Embedding", "EmbeddingBag", "Conv2d", "BatchNorm1d", "LayerNorm", "GroupNorm", "RMSNorm", "Dropout",
        "ReLU", "GELU", "SiLU", "Softmax", "LSTM", "GRUCell", "MultiheadAttention: weights",
        "MultiheadAttention: no weights", "TransformerEncoderLayer", "CrossEntropyLoss", "Sequential: checkpointed",
    ),
    "lightning.pytorch.demos": ("BoringModel",),
}  # fmt: skip
"""The fast sample, by place."""


def verify(report: Report) -> None:
    """Nothing failed, nothing was refused."""
    assert report.failures == []
    assert report.refused == {}
    assert report.steps == report.cases * len(WIDTHS) > 0


@pytest.mark.parametrize("place", FAMILIES)
def test_every_public_name_has_a_case_or_a_reason(place: str) -> None:
    family = FAMILIES[place]
    names, covered, left_out = set(family.names), family.covered(), set(family.left_out)
    assert names - covered - left_out == set()
    assert covered - names == set()
    assert left_out - names == set()
    assert covered & left_out == set()


@pytest.mark.parametrize("name", [f"{place}.{name}" for place, names in SAMPLED.items() for name in names])
def test_fast_sample(name: str) -> None:
    verify(check(case(name), z_tests=()))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_layer_is_exact_in_mixed_precision(name: str) -> None:
    """A few refuse it."""
    assert check(in_mixed_precision(case(name)), widths=(32,), z_tests=()).failures == []


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_layer(name: str) -> None:
    verify(check(case(name), z_tests=(2,)))


@pytest.mark.slow
@pytest.mark.parametrize("name", DATABASE)
def test_module_of_the_database(name: str) -> None:
    report = Report()
    for sample in samples(name):
        report.add(check(sample, z_tests=()))
    verify(report)
