"""12 bits: 8 bits, and 4 of what these leave."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tinykg.codecs import kernels
from lightning_tinykg.codecs.affine import AffineCode
from lightning_tinykg.codecs.noise import make_key
from lightning_tinykg.codecs.refined import RefinedCode, round_to, rounded_size


@pytest.fixture(autouse=True, scope="module", params=["native", "reference"])
def kernel(request: pytest.FixtureRequest) -> Iterator[None]:
    with kernels.use(request.param):
        yield


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("bits", range(1, 9))
def test_other_widths_are_plain_codes(bits: int) -> None:
    code = round_to(normal(1000), bits, key=1, group_size=64)
    assert isinstance(code, AffineCode)
    assert (code.bits, code.name, code.nbytes) == (bits, f"int{bits}", rounded_size(1000, bits, 64))


@given(st.integers(1, 500), st.sampled_from([1, 16, 50, 64]), st.integers(0, 2**32))
@settings(deadline=None, max_examples=50)
def test_within_two_fifteenths_of_a_step_of_8_bits(numel: int, group_size: int, seed: int) -> None:
    x = normal(numel)
    code = round_to(x, 12, key=make_key(seed), group_size=group_size)
    assert isinstance(code, RefinedCode)
    assert code.name == "int12"
    assert code.nbytes == rounded_size(numel, 12, group_size)
    for part, restored in zip(x.split(group_size), code.decode().split(group_size), strict=True):
        step = float(part.max() - part.min()) / 255  # and a little more, since scales are rounded outward to bfloat16
        assert (restored - part).abs().max() <= 1.05 * 2 / 15 * step + 1e-6


def test_a_fiftieth_of_the_variance_of_8_bits() -> None:
    x = normal(100_000)
    variance = [float((round_to(x, bits, key=3, group_size=64).decode() - x).square().mean()) for bits in (8, 12)]
    assert variance[1] < variance[0] / 50


def test_unbiased() -> None:
    x = normal(640)
    draws = torch.stack([round_to(x, 12, key=make_key(k), group_size=64).decode() - x for k in range(2000)]).double()
    z = draws.mean(0) / (draws.std(0) / 2000**0.5).clamp(min=1e-12)
    assert z.abs().max() < 5
    assert z.square().mean() == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_and_shape(dtype: torch.dtype) -> None:
    x = normal(30, 20, dtype=dtype)[:, ::2].T
    restored = round_to(x, 12, key=0, group_size=50).decode()
    assert restored.dtype == dtype
    assert restored.shape == (300,)
    want = x.reshape(-1)
    assert torch.allclose(restored, want, atol=5e-3, rtol=2 * torch.finfo(dtype).eps)


def test_what_is_not_finite_stays_what_it_is() -> None:
    x = normal(256)
    x[3], x[70], x[71] = float("nan"), float("inf"), float("-inf")
    restored = round_to(x, 12, key=0, group_size=64).decode()
    assert torch.equal(restored[:128].nan_to_num(7.0), x[:128].nan_to_num(7.0))
    assert torch.equal(restored[:128].isnan(), x[:128].isnan())
    assert torch.allclose(restored[128:], x[128:], atol=5e-3)


def test_constants_are_exact() -> None:
    assert torch.equal(round_to(torch.full((200,), 0.1), 12, key=0, group_size=64).decode(), torch.full((200,), 0.1))
