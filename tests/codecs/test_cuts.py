import math

import pytest
import torch

from lightning_tinykg.codecs.cuts import DTYPES, NONZERO, SIGNS, Cut

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("low", "high"), [(1.0, 0.0), (math.nan, 0.0), (0.0, math.nan), (math.inf, -math.inf)])
def test_ends_in_order(low: float, high: float) -> None:
    with pytest.raises(ValueError, match=f"low must be at most high, got low={low} and high={high}"):
        Cut(low, high)


@pytest.mark.parametrize("code", [-1, 4])
@pytest.mark.parametrize("which", ["below", "within", "above", "nan"])
def test_codes_that_are_none(which: str, code: int) -> None:
    with pytest.raises(ValueError, match="must be codes from 0 to 3, got"):
        Cut(0.0, 0.0, **{which: code})


def test_bits() -> None:
    assert NONZERO.bits == 1
    assert SIGNS.bits == 2
    assert Cut(0.0, 1.0, nan=2).bits == 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_ends_are_the_dtypes(dtype: torch.dtype) -> None:
    """And their words are the same numbers."""
    for end in (0.1, -3.0, 0.0, 1e-42, math.inf):
        got = Cut(end, end).ends(dtype, CPU)[0]
        assert got == float(torch.tensor(end, dtype=dtype))
        word = Cut(end, end).words(dtype, CPU)[0]
        integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        assert float(torch.tensor(word, dtype=integers).view(dtype)) == got


def test_only_a_cpu_compares_16_bits_with_what_has_more() -> None:
    cut = Cut(0.1, 0.1, wide_on_cpu=True)
    near = float(torch.tensor(0.1, dtype=torch.bfloat16))
    assert near > 0.1
    assert cut.ends(torch.bfloat16, CUDA) == (near, near)
    low, high = cut.ends(torch.bfloat16, CPU)
    assert high < 0.1 < low == near
    assert cut.ends(torch.float32, CPU) == cut.ends(torch.float32, CUDA)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_dtypes_that_cannot_be_cut(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"got {dtype}"):
        NONZERO.ends(dtype, CPU)
