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


@triton.jit(do_not_specialize=["tiles", "low", "high"])
def pack_classes(
    x_ptr,
    out_ptr,
    count,
    size,
    tiles,
    low,
    high,
    CODES: tl.constexpr,
    OPEN: tl.constexpr,
    BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Part a row of ``count`` elements into classes, and pack ``COLUMNS`` bytes of their codes.

    The ends come as the words of their bits, the codes of below, within, above and NaN as two bits each.
    """
    LANES: tl.constexpr = 8 // BITS
    row = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    low, high = _end(low, x_ptr), _end(high, x_ptr)
    packed = tl.full([COLUMNS], 0, tl.int32)
    for lane in tl.static_range(LANES):
        place = lane * size + column
        inside = (column < size) & (place < count)
        x = _comparable(tl.load(x_ptr + row * count + place, mask=inside, other=0))
        if OPEN:
            entered, left = x > low, x >= high
        else:
            entered, left = x >= low, x > high
        code = tl.where(entered, CODES >> 2 & 3, CODES & 3)
        code = tl.where(left, CODES >> 4 & 3, code)
        code = tl.where(x != x, CODES >> 6, code)
        packed |= tl.where(inside, code, 0) << (lane * BITS)
    tl.store(out_ptr + row * size + column, packed.to(tl.uint8), mask=column < size)


@triton.jit(do_not_specialize=["tiles"])
def pack_two_levels(x_ptr, value_ptr, out_ptr, count, size, tiles, COLUMNS: tl.constexpr):
    """Pack which elements of a row of ``count`` are not zero, and put one of those where zero is."""
    row = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    packed = tl.full([COLUMNS], 0, tl.int32)
    zero = _comparable(tl.full([COLUMNS], 0.0, x_ptr.dtype.element_ty))
    least, most = zero, zero
    for lane in tl.static_range(8):
        place = lane * size + column
        x = _comparable(tl.load(x_ptr + row * count + place, mask=(column < size) & (place < count), other=0))
        packed |= tl.where(x != 0, 1, 0) << lane
        least, most = tl.minimum(least, x), tl.maximum(most, x)
    tl.store(out_ptr + row * size + column, packed.to(tl.uint8), mask=column < size)
    high = tl.max(most)
    level = tl.where(high > 0, high, tl.min(least))
    # whoever writes here, writes the same
    tl.store(
        value_ptr, level.to(value_ptr.dtype.element_ty), mask=(level != 0) & (_comparable(tl.load(value_ptr)) == 0)
    )


@triton.jit
def _end(word, x_ptr):
    """The number whose bits, in the dtype of what is pointed to, a word is; comparable."""
    element: tl.constexpr = x_ptr.dtype.element_ty
    if element == tl.float64:
        end = word.to(tl.int64).to(element, bitcast=True)
    elif element == tl.float32:
        end = word.to(tl.int32).to(element, bitcast=True)
    else:
        end = word.to(tl.int16).to(element, bitcast=True)
    return _comparable(end)


@triton.jit
def _comparable(x):
    """A number that all GPUs compare."""
    return x.to(tl.float32) if x.dtype.primitive_bitwidth == 16 else x


@triton.jit(do_not_specialize=["tiles"])
def unpack_levels(codes_ptr, levels_ptr, out_ptr, count, size, tiles, BITS: tl.constexpr, COLUMNS: tl.constexpr):
    """Put the levels of the codes in ``COLUMNS`` bytes of a row, which has ``count`` codes."""
    LANES: tl.constexpr = 8 // BITS
    row = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    byte = tl.load(codes_ptr + row * size + column, mask=column < size, other=0)
    for lane in tl.static_range(LANES):
        place = lane * size + column
        code = (byte >> (lane * BITS)) & (2**BITS - 1)
        x = tl.where(code == 1, tl.load(levels_ptr + 1), tl.load(levels_ptr))
        if BITS == 2:
            x = tl.where(code < 2, x, tl.where(code == 2, tl.load(levels_ptr + 2), tl.load(levels_ptr + 3)))
        tl.store(out_ptr + row * count + place, x, mask=(column < size) & (place < count))
