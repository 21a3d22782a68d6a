"""Packed rows: what they decode to is `affine(nearest_codes(x))` to the last bit, in the bytes that were counted."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import LiveBytes
from torch import Tensor

from lightning_tinykg.codecs import kernels
from lightning_tinykg.codecs.rows import ROW_BITS, PackedRows, rows_nbytes
from lightning_tinykg.codecs.uniform import affine, nearest_codes

CODES = tuple(bits for bits in ROW_BITS if bits != 32)


def levels(x: Tensor, bits: int, by_row: bool) -> tuple[Tensor, Tensor]:
    """A range that cuts the values' ends off."""
    rows = x.size(0) if by_row else 1
    zero = -torch.rand(rows) - 0.5
    return (torch.rand(rows) + 1.0) / (2**bits - 1), zero


@settings(max_examples=150, deadline=None)
@given(
    bits=st.sampled_from(CODES),
    rows=st.integers(0, 20),
    dim=st.integers(0, 70),
    by_row=st.booleans(),
    seed=st.integers(0, 2**20),
    kernel=st.sampled_from(["native", "reference"]),
)
def test_decoded_are_the_nearest_levels_to_the_last_bit(
    bits: int, rows: int, dim: int, by_row: bool, seed: int, kernel: str
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(rows, dim)
    scale, zero = levels(x, bits, by_row)
    expected = affine(nearest_codes(x, scale, zero, bits), scale, zero)
    with kernels.use(kernel):
        packed = PackedRows.encode(x, bits, scale, zero)
        assert torch.equal(packed.decode(), expected)
        assert packed.nbytes == rows_nbytes(rows, dim, bits, scale.numel())
        index = torch.randint(0, rows, (7,)) if rows else torch.zeros(0, dtype=torch.int64)
        assert torch.equal(packed.decode(index.int()), expected[index])
        assert torch.equal(packed.decode(slice(2, 9)), expected[2:9])
        out = torch.empty(dim, rows).t()  # not contiguous
        assert packed.decode(out=out) is out
        assert torch.equal(out, expected)
        again = PackedRows.from_state(packed.state(), bits, dim).to("cpu")
        assert torch.equal(again.decode(), expected)


def test_many_rows_are_worked_on_in_pieces() -> None:
    torch.manual_seed(0)
    x = torch.randn(10_000, 200)
    for bits in CODES:
        scale, zero = levels(x, bits, by_row=True)
        with LiveBytes() as live:
            packed = PackedRows.encode(x, bits, scale, zero)
        assert live.peak < packed.nbytes + x.nbytes / 2
        expected = affine(nearest_codes(x, scale, zero, bits), scale, zero)
        index = torch.randperm(10_000)
        assert torch.equal(packed.decode(index), expected[index])


def test_32_bits_are_the_floats_themselves() -> None:
    x = torch.randn(9, 5)
    packed = PackedRows.encode(x, 32)
    assert torch.equal(packed.decode(torch.tensor([8, 0])), x[[8, 0]])
    assert packed.nbytes == rows_nbytes(9, 5, 32) == x.nbytes
    x[0] = 0  # its own floats
    assert not torch.equal(packed.decode(), x)


def test_rows_are_put_where_they_belong() -> None:
    x = torch.randn(10, 6)
    for bits in ROW_BITS:
        scale, zero = levels(x, bits, by_row=True)
        room = PackedRows.empty(10, 6, bits)
        own = (None, None) if bits == 32 else (scale, zero)
        for rows in (torch.tensor([9, 0, 4]), slice(5, 9), torch.tensor([1, 2, 3])):
            room.put(rows, x[rows], *(None if value is None else value[rows] for value in own))
        assert torch.equal(room.decode(), x if bits == 32 else PackedRows.encode(x, bits, *own).decode())


@pytest.mark.parametrize("bits", [0, 9, 3.5, True, "4"])
def test_a_width_that_there_is_not_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=r"bits must be one of 1, 2, 3, 4, 5, 6, 7, 8, 16, 32, got"):
        PackedRows.encode(torch.ones(2, 2), bits, torch.ones(1), torch.zeros(1))
    with pytest.raises(ValueError, match="bits must be one of"):
        rows_nbytes(1, 1, bits)


@pytest.mark.parametrize("bits", CODES)
def test_what_has_no_nearest_code_is_refused(bits: int) -> None:
    x = torch.ones(3, 4)
    x[1, 2] = torch.nan
    with pytest.raises(ValueError, match="must have no NaN"):
        PackedRows.encode(x, bits, torch.ones(1), torch.zeros(1))


@pytest.mark.parametrize("bits", CODES)
@pytest.mark.parametrize(
    ("scale", "zero"), [(0.0, 0.0), (-1.0, 0.0), (math.inf, 0.0), (math.nan, 0.0), (1.0, math.inf)]
)
@pytest.mark.parametrize("by_row", [False, True])
def test_a_scale_that_makes_no_levels_is_refused(bits: int, scale: float, zero: float, by_row: bool) -> None:
    scales, zeros = torch.ones(3 if by_row else 1), torch.zeros(3 if by_row else 1)
    scales[-1], zeros[-1] = scale, zero
    with pytest.raises(ValueError, match="scale must be positive, and scale and zero finite"):
        PackedRows.encode(torch.ones(3, 4), bits, scales, zeros)


def test_arguments_that_do_not_fit_are_refused() -> None:
    one, nothing = torch.ones(1), torch.zeros(1)
    packed = PackedRows.encode(torch.ones(3, 4), 3, one, nothing)
    with pytest.raises(ValueError, match="float matrix"):
        PackedRows.encode(torch.ones(3), 3, one, nothing)
    with pytest.raises(ValueError, match="scale and zero must be given at 3 bits"):
        PackedRows.encode(torch.ones(3, 4), 3)
    with pytest.raises(ValueError, match=r"\[2\] where each row has its own"):
        packed.put(slice(0, 2), torch.ones(2, 4), torch.ones(2), torch.zeros(2))
    with pytest.raises(ValueError, match=r"x must have shape \[2, 4\]"):
        packed.put(slice(0, 2), torch.ones(3, 4))
    with pytest.raises(ValueError, match="slice with step 1, got step 2"):
        packed.decode(slice(0, 3, 2))
    with pytest.raises(ValueError, match="rows must be int32 or int64"):
        packed.decode(torch.tensor([True]))
    with pytest.raises(ValueError, match=r"out must be float32 of shape \[3, 4\]"):
        packed.decode(out=torch.empty(2, 4))
    with pytest.raises(TypeError, match="scale must be float32"):
        PackedRows(packed.planes, one.double(), nothing, 3, 4)
    with pytest.raises(ValueError, match=r"zero must have shape \[1\] or \[3\]"):
        PackedRows(packed.planes, one, torch.zeros(2), 3, 4)
    with pytest.raises(ValueError, match="planes of 3 bits must be 2, got 1"):
        PackedRows(packed.planes[:1], one, nothing, 3, 4)
    with pytest.raises(ValueError, match="a plane of 2 bits must have shape"):
        PackedRows(packed.planes, one, nothing, 3, 5)
    with pytest.raises(ValueError, match="a state of 4 bits must have"):
        PackedRows.from_state(packed.state(), 4, 4)
