"""Every layer and model of PyTorch Geometric that passes messages, quantized, fine-tuned and packed by SGQuant."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checking import Case
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


def floats(result: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def for_layers(test: Callable[[Case, nn.Module], None]) -> Any:
    """A test of each layer that passes messages, given its case and module; the others are refused."""

    @pytest.mark.parametrize("name", LAYERS)
    def tested(name: str) -> None:
        made = case(name)
        assert made.module is not None
        if any(isinstance(part, MessagePassing) for part in made.module.modules()):
            test(made, made.module)
        else:
            with pytest.raises(ValueError, match="model must hold PyG MessagePassing layers"):
                SGQuantizer(made.module)

    return tested


@for_layers
def test_packed_gives_what_simulated_gives(made: Case, module: nn.Module) -> None:
    module.eval()

    def run(model: nn.Module) -> list[Tensor]:
        torch.manual_seed(0)
        with torch.no_grad():
            return [leaf + 0 for leaf in floats(made.forward(model))]

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


@for_layers
def test_fine_tuning_reaches_every_parameter(made: Case, module: nn.Module) -> None:
    module.train()

    def run() -> list[Tensor]:
        torch.manual_seed(1)
        return floats(made.forward())

    def gradients() -> list[Tensor | None]:
        loss = sum((leaf * torch.linspace(-1, 1, leaf.numel()).view_as(leaf)).sum() for leaf in run())
        assert isinstance(loss, Tensor)
        return list(torch.autograd.grad(loss, made.leaves, allow_unused=True))

    want = gradients()
    quantizer = SGQuantizer(module, 32)
    quantizer.calibrate(run)
    with quantizer:
        assert all(a is b or torch.equal(a, b) for a, b in zip(gradients(), want, strict=True))
        quantizer.set_plan(topologywise((8, 4, 2, 1)))
        rounded = gradients()
    assert [grad is None for grad in rounded] == [grad is None for grad in want]
    assert all(grad.isfinite().all() for grad in rounded if grad is not None)
