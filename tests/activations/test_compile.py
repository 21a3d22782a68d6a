"""A compiled module within the context: it stays compiled, its gradients are right, and what it saves is kept small."""

import pytest
import torch
from torch import Tensor, nn

from lightning_tinykg import Ledger, compress_activations


def step(model: nn.Module, x: Tensor, context: compress_activations | None = None) -> tuple[Tensor, Ledger]:
    model.zero_grad()
    ledger = Ledger()
    if context is None:
        loss = model(x).square().mean()
    else:
        with context as ledger:
            loss = model(x).square().mean()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), ledger


@pytest.mark.compile
@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_module(fullgraph: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.LeakyReLU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
    x = torch.randn(500, 64)
    want, _ = step(compiled, x)
    exact, _ = step(compiled, x, compress_activations(bits=32))
    assert torch.equal(exact, want)
    rounded, ledger = step(compiled, x, compress_activations(bits=8))
    assert 0 < float((rounded - want).norm() / want.norm()) < 0.02
    assert ("CompiledFunction.tensors", "int8") in {(entry.op, entry.codec) for entry in ledger}
    assert ledger.ratio > 2
    # what was compiled under compression is right without it
    again, _ = step(compiled, x)
    assert torch.equal(again, want)
