"""Every layer and model of PyTorch Geometric that passes messages, quantized and packed by SGQuant."""

import pytest
import torch
from layers import CASES, case
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch_geometric.nn import MessagePassing

from lightning_tinykg.sgquant import PackedModel, SGQuantizer, topologywise

_NO_GRAPH = "its features are met before it has found its edges, when no node has a degree yet"

UNUSUAL = {
    "GravNetConv": _NO_GRAPH,
    "DynamicEdgeConv": _NO_GRAPH,
    "ViSNet: forces": "differentiates within its forward, and inference is without a gradient",
    "TGNMemory": "keeps its state between calls",
    "LPFormer": "its nodes are pairs of the graph's, which have no degree",
}
"""Models that can't be packed by degree, and why."""

LAYERS = [
    name
    for name, place in CASES.items()
    if place in ("torch_geometric.nn.conv", "torch_geometric.nn.models") and name.rpartition(".")[2] not in UNUSUAL
]


@pytest.mark.parametrize("name", LAYERS)
def test_packed_gives_what_simulated_gives(name: str) -> None:
    made = case(name)
    module = made.module
    assert module is not None
    module.eval()
    if not any(isinstance(part, MessagePassing) for part in module.modules()):
        with pytest.raises(ValueError, match="model must hold PyG MessagePassing layers"):
            SGQuantizer(module)
        return

    def run(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(0)
        with torch.no_grad():
            leaves = tree_leaves(made.forward(model))
        return [leaf + 0 for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]

    want = run(module)
    quantizer = SGQuantizer(module, topologywise((8, 4, 2, 1)))
    quantizer.calibrate(lambda: run(module))
    with quantizer:
        simulated = run(module)
    # in one block: a product of fewer rows may be rounded otherwise, and a value come to another code
    with PackedModel.from_quantizer(quantizer).running() as packed:
        for found, expected in zip(run(packed), simulated, strict=True):
            assert torch.equal(found, expected)
    # in many blocks, of what is not rounded
    quantizer.set_plan(32)
    with PackedModel.from_quantizer(quantizer, block_edges=7).running() as packed:
        for found, expected in zip(run(packed), want, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
