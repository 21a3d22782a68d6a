"""On a GPU a step is compressed as on a CPU, and nobody waits for the device."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch_geometric.nn import GATConv, GCNConv, MaxAggregation, RGCNConv, SAGEConv

from lightning_tinykg import Ledger, compress_activations

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

NODES, EDGES, WIDTH = 500, 6000, 64

MODELS: dict[str, Callable[[], nn.ModuleList]] = {
    "gcn": lambda: nn.ModuleList(GCNConv(WIDTH, WIDTH) for _ in range(2)),
    "gat": lambda: nn.ModuleList(GATConv(WIDTH, WIDTH // 4, heads=4) for _ in range(2)),
    "maximum": lambda: nn.ModuleList(SAGEConv(WIDTH, WIDTH, aggr=MaxAggregation()) for _ in range(2)),
    "relations": lambda: nn.ModuleList(RGCNConv(WIDTH, WIDTH, 3, num_bases=2) for _ in range(2)),
}


class Model(nn.Module):
    """Layers with a norm, an activation and a dropout each."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.nodes = nn.Parameter(torch.randn(NODES, WIDTH, generator=generator))
        self.layers = layers
        self.register_buffer("edges", torch.randint(NODES, (2, EDGES), generator=generator))
        self.register_buffer("weights", torch.randn(NODES, WIDTH, generator=generator))
        self.register_buffer("types", torch.randint(3, (EDGES,), generator=generator))

    def forward(self) -> Tensor:
        x: Tensor = self.nodes
        for layer in self.layers:
            x = layer(x, self.edges, self.types) if isinstance(layer, RGCNConv) else layer(x, self.edges)
            x = F.dropout(F.gelu(F.layer_norm(x, (WIDTH,))), 0.1)
        return (x * self.weights).sum()


def made(name: str) -> Model:
    torch.manual_seed(0)
    return Model(MODELS[name]())


def gradient(model: Model, bits: int | None) -> tuple[Tensor, Ledger | None]:
    torch.manual_seed(1)
    if bits is None:
        loss, ledger = model(), None
    else:
        with compress_activations(bits, min_bytes=256) as ledger:
            loss = model()
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([grad.flatten() for grad in grads]), ledger


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("bits", "most"), [(32, 1e-4), (8, 0.02)])
def test_the_gradient(name: str, bits: int, most: float) -> None:
    model = made(name).cuda()
    want, _ = gradient(model, None)
    got, ledger = gradient(model, bits)
    assert ledger is not None
    assert bits == 32 or ledger.stored_bytes < ledger.raw_bytes / 3
    assert (got - want).norm() < most * want.norm()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION])
def test_a_transformer(backend: SDPBackend, batch_first: bool) -> None:
    """Its queries, keys and values are made again, of rows in order or not, and so are weights that no kernel fuses."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, batch_first=batch_first).cuda()
    x = torch.randn(8, 128, WIDTH, device="cuda")
    weights = torch.randn(8, 128, WIDTH, device="cuda")
    found: list[Tensor] = []
    for bits in (None, 32):
        torch.manual_seed(1)
        context = nullcontext() if bits is None else compress_activations(bits)
        with sdpa_kernel(backend), context as ledger:
            loss = (layer(x * 1.5) * weights).sum()
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(layer.parameters()))]))
    assert ledger is not None
    assert ledger.ratio > 2
    assert (found[1] - found[0]).norm() < 1e-5 * found[0].norm()


@pytest.mark.parametrize("name", ["gcn", "gat", "relations"])
def test_what_is_kept_is_what_a_cpu_keeps(name: str) -> None:
    """But for a mask of bools in the place of one of floats, and integers, whose values a GPU is not asked for."""
    kept = []
    for device in ("cpu", "cuda"):
        _, ledger = gradient(made(name).to(device), 8)
        assert ledger is not None
        kept.append(
            Counter((e.op.partition(".")[0], e.codec) for e in ledger if e.dtype == "float32" and e.stored_bytes)
        )
    on_cpu, on_gpu = kept
    for counted in kept:
        for dropped in [key for key in counted if key[0] in ("Mul", "NativeDropout") and key[1] == "mask"]:
            del counted[dropped]
    assert on_gpu == on_cpu


@pytest.mark.parametrize("name", ["gcn", "gat", "relations"])
def test_nobody_waits(name: str) -> None:
    """But for what waits uncompressed too."""
    model = made(name).cuda()
    for bits in (None, 8):  # libraries are loaded, kernels built
        gradient(model, bits)
    plain = waits(model, None)
    assert waits(model, 8) <= plain


def waits(model: Model, bits: int | None) -> int:
    """How often a step waits for the device."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            gradient(model, bits)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(w.message) for w in warned)
