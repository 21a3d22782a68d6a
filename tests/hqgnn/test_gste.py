"""The estimator: what goes forward is a rounding, what comes back is GSTE to x and PACT/LSQ to the clip range."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_tinykg.codecs.uniform import gather_up, nearest_codes, spread, symmetric_zero
from lightning_tinykg.hqgnn.gste import quantize
from lightning_tinykg.hqgnn.table import QuantizedTable

BITS = (1, 2, 4, 8)
SHAPES = {"table": (1,), "node": (6,), "group": (6, 4)}


def ranges(shape: tuple[int, ...], bits: int) -> tuple[Tensor, Tensor]:
    scale = torch.rand(shape) + 0.1
    return scale, symmetric_zero(scale, bits)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("granularity", SHAPES)
@pytest.mark.parametrize("bits", BITS)
def test_forward_is_the_nearest_level_and_what_the_codes_decode_to(bits: int, granularity: str) -> None:
    scale, zero = ranges(SHAPES[granularity], bits)
    x = 3 * torch.randn(6, 16)
    found = quantize(x, scale, zero, bits=bits)
    codes = nearest_codes(x, scale, zero, bits).to(torch.uint8)
    assert torch.equal(found, QuantizedTable(codes, scale, zero, bits).decode())
    levels = spread(zero, x)[..., None] + spread(scale, x)[..., None] * torch.arange(2**bits)
    nearest = (levels - x[..., None]).abs().min(dim=-1).values
    torch.testing.assert_close((found - x).abs(), nearest, rtol=1e-4, atol=1e-5)


def test_one_bit_is_the_sign_however_small() -> None:
    x = torch.tensor([[1e-30, -1e-30, 1e30, -1e30]])
    found = quantize(x, torch.tensor([2.0]), torch.tensor([-1.0]), bits=1)
    assert found.tolist() == [[1.0, -1.0, 1.0, -1.0]]


@pytest.mark.parametrize("granularity", SHAPES)
@pytest.mark.parametrize("bits", BITS)
def test_delta_0_is_the_straight_through_estimator_to_the_last_bit(bits: int, granularity: str) -> None:
    scale, zero = ranges(SHAPES[granularity], bits)
    x, grad = torch.randn(6, 16), torch.randn(6, 16)
    results = []
    for delta in (None, torch.zeros(())):
        leaves = [t.clone().requires_grad_() for t in (x, scale, zero)]
        out = quantize(*leaves, bits=bits, delta=delta)
        out.backward(grad)
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for ste, gste in zip(*results, strict=True):
        assert torch.equal(ste, gste)
    u = (x - spread(zero, x)) / spread(scale, x)
    assert torch.equal(results[0][1], grad.where((u >= 0) & (u <= 2**bits - 1), 0))


@pytest.mark.parametrize("bits", BITS)
def test_gradient_is_the_published_formula(bits: int) -> None:
    scale, zero = ranges((6,), bits)
    x, grad, delta = torch.randn(6, 16).requires_grad_(), torch.randn(6, 16), torch.tensor(0.7)
    quantize(x, scale, zero, bits=bits, delta=delta).backward(grad)
    e = (x.detach() - zero[:, None]) / scale[:, None]
    q = e.round().clamp(0, 2**bits - 1)
    g_q = grad * scale[:, None]  # with respect to the code
    g_e = g_q * (1 + delta * g_q.sign() * (e - q))
    inside = (e >= 0) & (e <= 2**bits - 1)
    torch.testing.assert_close(x.grad, (g_e / scale[:, None]).where(inside, 0))


def test_delta_is_read_in_the_backward() -> None:
    x, delta = torch.tensor([[0.3, 0.8]], requires_grad=True), torch.zeros(())
    out = quantize(x, torch.tensor([1.0]), torch.tensor([0.0]), bits=2, delta=delta)
    delta.fill_(1.0)
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[1.3, 0.8]]))


def test_delta_up_to_2_never_turns_a_gradient() -> None:
    x, grad = torch.randn(50, 16).requires_grad_(), torch.randn(50, 16)
    quantize(x, torch.tensor([0.3]), torch.tensor([-0.45]), bits=2, delta=torch.tensor(2.0)).backward(grad)
    assert x.grad is not None
    assert (x.grad * grad >= 0).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_clip_bound_gets_pacts_gradient_beyond_it_and_lsqs_within(bits: int) -> None:
    clip = torch.tensor([1.0], requires_grad=True)
    x = torch.tensor([[-9.0, 9.0, 9.0, 0.31]])
    step = 2 * clip / (2**bits - 1)
    out = quantize(x, step, -clip, bits=bits, delta=torch.tensor(1.0))  # delta has no say in it
    grad = torch.tensor([[10.0, 1.0, 100.0, 1000.0]])
    out.backward(grad)
    width = float(step)
    u = (0.31 + 1) / width
    assert clip.grad is not None
    expected = -10 + 1 + 100 + 1000 * (round(u) - u) * width  # d clip of the rounding error, in x / clip units
    assert clip.grad.item() == pytest.approx(expected, rel=1e-4)


def test_at_one_bit_the_level_gets_its_exact_derivative() -> None:
    x, grad, level = torch.randn(6, 16), torch.randn(6, 16), torch.rand(6).requires_grad_()
    quantize(x, 2 * level, -level, bits=1).backward(grad)
    torch.testing.assert_close(level.grad, (grad * x.sign()).sum(dim=1))


def test_a_window_lets_gradients_pass_beyond_the_levels() -> None:
    x = torch.tensor([[-5.0, -1.5, 0.5, 1.5, 5.0]], requires_grad=True)
    quantize(x, torch.tensor([2.0]), torch.tensor([-1.0]), bits=1, window=0.5).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 1.0, 0.0]]


@pytest.mark.parametrize("shape", SHAPES.values())
def test_gather_up_is_the_transpose_of_spread(shape: tuple[int, ...]) -> None:
    value, x = torch.randn(shape), torch.randn(6, 16)
    spreaded = (spread(value, x) * x).sum()
    torch.testing.assert_close(spreaded, (value * gather_up(x, value)).sum())


def test_no_width_no_codes(monkeypatch: Any) -> None:
    with pytest.raises(ValueError, match="bits must be one of 1, 2, 4, 8, got 3"):
        quantize(torch.ones(1, 1), torch.ones(1), torch.ones(1), bits=3)


def test_a_table_says_what_does_not_fit() -> None:
    codes = torch.zeros(3, 4, dtype=torch.uint8)
    one = torch.ones(1)
    with pytest.raises(TypeError, match=r"codes must be uint8, got torch\.int64"):
        QuantizedTable(codes.long(), one, one, 2)
    with pytest.raises(ValueError, match=r"scale must have shape \[1\], \[3\]"):
        QuantizedTable(codes, torch.ones(2), torch.ones(2), 2)
    with pytest.raises(ValueError, match=r"codes must be below 2\*\*1, got 2"):
        QuantizedTable(codes + 2, one, one, 1)
    with pytest.raises(ValueError, match="one shape"):
        QuantizedTable(codes, one, torch.ones(3), 1)


def test_bytes_of_a_table_are_those_of_packed_rows_and_both_scales() -> None:
    codes = torch.zeros(3, 12, dtype=torch.uint8)
    for shape, count in (((1,), 1), ((3,), 3), ((3, 4), 12)):
        scale = torch.ones(shape)
        assert QuantizedTable(codes, scale, scale, 1).nbytes == 3 * 2 + count * 8
        assert QuantizedTable(codes, scale, scale, 4).nbytes == 3 * 6 + count * 8
        assert QuantizedTable(codes, scale, None, 4).nbytes == 3 * 6 + count * 4


@pytest.mark.parametrize("bits", BITS)
def test_a_symmetric_table_needs_no_zero(bits: int) -> None:
    codes = torch.arange(2**bits, dtype=torch.uint8).repeat(50, 1)
    scale = torch.rand(50, generator=torch.Generator().manual_seed(bits))
    found = QuantizedTable(codes, scale, None, bits).decode()
    assert torch.equal(found, QuantizedTable(codes, scale, symmetric_zero(scale, bits), bits).decode())
    torch.testing.assert_close(found, -found.flip(1))
