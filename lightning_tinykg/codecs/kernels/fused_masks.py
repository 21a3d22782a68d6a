"""Masks and levels on a GPU, in Triton's language: codes to bytes, and bytes to one of two or four levels."""

# Triton's language has no types that mypy could read
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tiles"])
def pack(codes_ptr, out_ptr, size, tiles, BITS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pack ``COLUMNS`` bytes of a row."""
    LANES: tl.constexpr = 8 // BITS
    row = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    packed = tl.full([COLUMNS], 0, tl.uint8)
    for lane in tl.static_range(LANES):
        code = tl.load(codes_ptr + row * LANES * size + (lane * size + column), mask=column < size, other=0)
        packed |= code << (lane * BITS)
    tl.store(out_ptr + row * size + column, packed, mask=column < size)


@triton.jit(do_not_specialize=["tiles"])
def unpack_levels(codes_ptr, levels_ptr, out_ptr, size, tiles, BITS: tl.constexpr, COLUMNS: tl.constexpr):
    """Put the levels of the codes in ``COLUMNS`` bytes of a row."""
    LANES: tl.constexpr = 8 // BITS
    row = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    byte = tl.load(codes_ptr + row * size + column, mask=column < size, other=0)
    for lane in tl.static_range(LANES):
        code = (byte >> (lane * BITS)) & (2**BITS - 1)
        x = tl.where(code == 1, tl.load(levels_ptr + 1), tl.load(levels_ptr))
        if BITS == 2:
            x = tl.where(code < 2, x, tl.where(code == 2, tl.load(levels_ptr + 2), tl.load(levels_ptr + 3)))
        tl.store(out_ptr + row * LANES * size + (lane * size + column), x, mask=column < size)
