"""torch.compile and torch.export see through the quantizer."""

import pytest
import torch
from torch import Tensor, library

from lightning_tinykg.codecs import dequantize, quantize
from lightning_tinykg.codecs.noise import make_key

KEY = make_key(1, 2)


class RoundTrip(torch.nn.Module):
    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        return dequantize(quantize(x * 2.0, self.bits, key=KEY, group_size=32)).view(x.shape) + 1.0


def sample(rows: int = 100) -> Tensor:
    x = torch.randn(rows, 50)
    x[3, 7] = torch.nan
    return x


@pytest.mark.parametrize("bits", [1, 8])
def test_operators_are_as_declared(bits: int) -> None:
    """Schema, fake tensors, dispatch and tracing, by PyTorch's own check, which takes NaN for different from NaN."""
    x = torch.randn(100, 50)
    library.opcheck(torch.ops.tinykg.quantize, (x, bits, -5, 32, torch.bfloat16))
    parts = torch.ops.tinykg.quantize(x, bits, -5, 32, torch.bfloat16)
    library.opcheck(torch.ops.tinykg.dequantize, (*parts, x.numel(), bits))


def test_operators_give_what_the_functions_give() -> None:
    x = sample()
    code = quantize(x, 2, key=KEY, group_size=32)
    parts = torch.ops.tinykg.quantize(x, 2, KEY - (1 << 64) if KEY >= 1 << 63 else KEY, 32, torch.bfloat16)
    for part, name in zip(parts, ("codes", "zero", "scale", "exact_index", "exact_value"), strict=True):
        want = getattr(code, name)
        assert torch.equal(part.view(torch.uint8), want.view(torch.uint8)), name
    restored = torch.ops.tinykg.dequantize(*parts, x.numel(), 2)
    assert torch.equal(restored.view(torch.int32), dequantize(code).view(torch.int32))


@pytest.mark.compile
@pytest.mark.parametrize("bits", [2, 8])
def test_compiled_in_one_graph(bits: int) -> None:
    model, x = RoundTrip(bits), sample()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for rows in (100, 37):  # of any size
        x = sample(rows)
        assert torch.equal(compiled(x).nan_to_num(7.0), model(x).nan_to_num(7.0))


@pytest.mark.compile
def test_exported() -> None:
    model, x = RoundTrip(4), sample()
    exported = torch.export.export(model, (x,))
    assert {"tinykg.quantize.default", "tinykg.dequantize.default"} <= {
        str(node.target) for node in exported.graph.nodes
    }
    assert torch.equal(exported.module()(x).nan_to_num(7.0), model(x).nan_to_num(7.0))
