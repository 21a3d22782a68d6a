import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_tinykg.codecs.packing import BITS, pack_codes, packed_size, unpack_codes


@st.composite
def codes_and_bits(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    bits = draw(st.sampled_from(BITS))
    rows = draw(st.integers(0, 5))
    columns = draw(st.integers(0, 40)) * (8 // bits)
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**bits, (rows, columns), dtype=torch.uint8, generator=generator), bits


@given(codes_and_bits())
def test_round_trip(case: tuple[torch.Tensor, int]) -> None:
    codes, bits = case
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (codes.shape[0], packed_size(codes.shape[1], bits))
    assert torch.equal(unpack_codes(packed, bits), codes)


@given(codes_and_bits())
def test_unpack_into_a_buffer(case: tuple[torch.Tensor, int]) -> None:
    codes, bits = case
    out = torch.full_like(codes, 255)
    result = unpack_codes(pack_codes(codes, bits), bits, out=out)
    assert result.data_ptr() == out.data_ptr()
    assert torch.equal(out, codes)


@pytest.mark.parametrize("bits", BITS)
def test_every_byte_is_some_code(bits: int) -> None:
    """Packing is a bijection: every byte unpacks to codes that pack to it again."""
    packed = torch.arange(256, dtype=torch.uint8)[:, None]
    codes = unpack_codes(packed, bits)
    assert codes.max() == 2**bits - 1
    assert torch.equal(pack_codes(codes, bits), packed)


@pytest.mark.parametrize("bits", BITS)
def test_packing_does_not_change_its_input(bits: int) -> None:
    codes = torch.randint(2**bits, (3, 64), dtype=torch.uint8)
    before = codes.clone()
    pack_codes(codes, bits)
    assert torch.equal(codes, before)


@pytest.mark.parametrize("bits", [0, 3, 5, 16, 32, -1, True])
def test_no_other_width(bits: int) -> None:
    with pytest.raises(ValueError, match="bits must be one of 1, 2, 4, 8"):
        pack_codes(torch.zeros(8, dtype=torch.uint8), bits)


def test_codes_must_fill_bytes() -> None:
    with pytest.raises(ValueError, match="divisible by 4"):
        pack_codes(torch.zeros(7, dtype=torch.uint8), 2)
