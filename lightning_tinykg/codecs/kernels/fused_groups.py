r"""What the group quantizer does on a GPU, in Triton's language.

The bits are those of :mod:`~lightning_tinykg.codecs.kernels.reference`. For that, divisions are rounded correctly
(Triton's ``/`` is not), no multiplication is contracted with an addition (``enable_fp_fusion``), and NaNs are looked
for, since a GPU's minimum and maximum pass over them.

To spend few instructions on an element, divisions are by a shared reciprocal, and codes are added up as floats.

A byte holds codes of all planes of its group, so a thread that quantizes the same column of every plane packs in its
registers: :func:`quantize` walks over the planes. Restoring needs no such thing: :func:`dequantize` writes all planes
of a group at once, which are contiguous.
"""

# Triton's language has no types that mypy could read
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl

from lightning_tinykg.codecs.kernels.reference import MIN_SCALE

_MIN_SCALE = tl.constexpr(MIN_SCALE)
_INFINITY = tl.constexpr(float("inf"))
_NAN_WORD = tl.constexpr(0x7FC00000)
_ONE_WORD = tl.constexpr(0x3F800000)


@triton.jit
def _ordered(word):
    """Map a float32's bits to an int32 of the same order, NaNs at the ends; its own inverse."""
    return word ^ ((word >> 31) & 0x7FFFFFFF)


@triton.jit
def _load_plane(x_ptr, row, column, groups, lane: tl.constexpr, GROUP: tl.constexpr, BYTES: tl.constexpr):
    """Load a plane of groups.

    Returns:
        Its elements in float32, where each lies in its group, and which are elements at all.
    """
    place = lane * BYTES + column
    inside = (column < BYTES) & (place < GROUP)
    x = tl.load(x_ptr + (row * GROUP + place), mask=inside & (row < groups), other=0.0)
    return x.to(tl.float32), place, inside


@triton.jit(do_not_specialize=["groups", "start", "key_low", "key_high", "next_low", "next_high"])
def quantize(
    x_ptr,
    codes_ptr,
    zero_ptr,
    scale_ptr,
    groups,
    start,
    key_low,
    key_high,
    next_low,
    next_high,
    GROUP: tl.constexpr,
    BYTES: tl.constexpr,
    BITS: tl.constexpr,
    LEVELS: tl.constexpr,
    UPPER: tl.constexpr,
    STRADDLES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Quantize ``ROWS`` groups, ``COLUMNS`` bytes of each at a time; of 16 bits, pairs of bytes.

    Where there is an ``UPPER`` byte of each code, those of a group come first, and ``BITS`` are the others.
    """
    FIRST: tl.constexpr = GROUP if UPPER else 0
    LANES: tl.constexpr = 8 // BITS if BITS < 8 else 1
    PADDED: tl.constexpr = GROUP < LANES * BYTES or BYTES % COLUMNS != 0
    NARROW: tl.constexpr = zero_ptr.dtype.element_ty == tl.int16
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, valid = rows[:, None], rows < groups

    least = tl.full([ROWS, COLUMNS], _INFINITY, tl.float32)
    most = tl.full([ROWS, COLUMNS], -_INFINITY, tl.float32)
    for tile in range(0, BYTES, COLUMNS):
        column = tile + tl.arange(0, COLUMNS)[None, :]
        for lane in tl.static_range(LANES):
            if lane * BYTES < GROUP:
                x, _, inside = _load_plane(x_ptr, row, column, groups, lane, GROUP, BYTES)
                below, above = x, x
                if PADDED:
                    below = tl.where(inside, x, _INFINITY)
                    above = tl.where(inside, x, -_INFINITY)
                least = tl.minimum(least, below, propagate_nan=tl.PropagateNan.ALL)
                most = tl.maximum(most, above, propagate_nan=tl.PropagateNan.ALL)
    # a reduction over floats would lose a NaN; over integers it does not, and it ends at one of the ends
    low = _ordered(tl.min(_ordered(least.to(tl.int32, bitcast=True)), axis=1)).to(tl.float32, bitcast=True)
    high = _ordered(tl.max(_ordered(most.to(tl.int32, bitcast=True)), axis=1)).to(tl.float32, bitcast=True)
    low += 0.0  # of the two zeros, the positive one

    levels = tl.full([ROWS], LEVELS, tl.float32)
    low_end = low
    if NARROW:  # rounded down to bfloat16
        word = low.to(tl.int32, bitcast=True)
        low_end = ((word + ((word >> 31) & 0xFFFF)) & -0x10000).to(tl.float32, bitcast=True)
    step = tl.maximum(tl.div_rn(high - low_end, levels), _MIN_SCALE)
    if NARROW:  # rounded up
        step = ((step.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000).to(tl.float32, bitcast=True)
    # the range may overflow where the values do not, hence the test on what would be restored
    finite = (tl.abs(low_end + step * levels) < _INFINITY) & (low == low) & (high == high)
    constant = finite & (low == high)

    # A power of two on both sides of the division keeps what it is made of (see _divide) from over- and underflowing.
    # Over infinity all is NaN or zero, which the clamping below makes a code of.
    ratio = tl.where(step < 2.0**-40, 2.0**48, tl.where(step > 2.0**80, 2.0**-48, 1.0))
    ratio = tl.where(low == high, 1.0, ratio)  # its zero point need not be of the size of its scale
    divisor = tl.where(finite, step * ratio, _INFINITY)
    inverse = tl.div_rn(tl.full([ROWS], 1.0, tl.float32), divisor)
    base = tl.where(finite, -low_end * ratio, 0.0)[:, None]
    ratio, divisor, inverse = ratio[:, None], divisor[:, None], inverse[:, None]

    zero_word = tl.where(finite, low_end.to(tl.int32, bitcast=True), _NAN_WORD)
    scale_word = tl.where(finite, step.to(tl.int32, bitcast=True), _ONE_WORD)
    bit = tl.full([ROWS], 0, tl.int32)
    if NARROW:
        # the 32 bits of a constant are spread over zero point, scale (marked by its sign bit) and codes
        first = tl.load(x_ptr + rows * GROUP, mask=valid, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)
        bit = first & 1
        zero_word = tl.where(constant, first, zero_word) >> 16
        scale_word = tl.where(constant, ((first & 0xFFFF) >> 1) - 0x8000, scale_word >> 16)

    for tile in range(0, BYTES, COLUMNS):
        column = tile + tl.arange(0, COLUMNS)[None, :]
        packed = tl.full([ROWS, COLUMNS], 0.0, tl.float32)  # of small integers the sum is exact
        for lane in tl.static_range(LANES):
            if lane * BYTES < GROUP:
                x, place, inside = _load_plane(x_ptr, row, column, groups, lane, GROUP, BYTES)
                position = start + (row * GROUP + place)
                noise = _uniform(position, key_low, key_high, next_low, next_high, STRADDLES)
                x = tl.fma(x, ratio, base)  # times a power of two is exact: this is rounded as x - zero is
                # no element is below the zero point; divided by a rounded scale, one may be beyond the last level
                x = tl.minimum(_divide(x, divisor, inverse), LEVELS)
                level = tl.floor(x)
                code = tl.where(noise < x - level, level + 1.0, level)
                if UPPER:
                    code = tl.where(finite[:, None], code, 0.0)
                    if NARROW:
                        code = tl.where(constant[:, None], bit.to(tl.float32)[:, None], code)
                if PADDED:
                    code = tl.where(inside, code, 0.0)
                if UPPER:
                    upper = tl.floor(code * 2.0**-BITS)
                    code -= upper * 2.0**BITS
                    upper_ptr = codes_ptr + (row * (FIRST + BYTES) + place)
                    tl.store(upper_ptr, upper.to(tl.int32).to(tl.uint8), mask=valid[:, None] & inside)
                packed += code * 2.0 ** (lane * BITS)
        byte = tl.where(finite[:, None], packed, 0.0).to(tl.int32)
        if NARROW and not UPPER:
            byte = tl.where(constant[:, None], (bit * (255 // (2**BITS - 1) if BITS < 8 else 1))[:, None], byte)
        byte = byte.to(codes_ptr.dtype.element_ty)
        code_ptr = codes_ptr + (row * (FIRST + BYTES) + FIRST + column)
        tl.store(code_ptr, byte, mask=valid[:, None] & (column < BYTES))
    tl.store(zero_ptr + rows, zero_word.to(zero_ptr.dtype.element_ty), mask=valid)
    tl.store(scale_ptr + rows, scale_word.to(scale_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["groups", "room"])
def put_aside(
    x_ptr,
    zero_ptr,
    index_ptr,
    value_ptr,
    groups,
    room,
    GROUP: tl.constexpr,
    LOOKED_AT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Of ``LOOKED_AT`` groups, copy those whose zero point is NaN.

    ``index_ptr`` points to the number of the last place that is taken, which the places follow.
    """
    row = tl.program_id(0) * LOOKED_AT + tl.arange(0, LOOKED_AT)
    word = tl.load(zero_ptr + row, mask=row < groups, other=0).to(tl.int32)
    if zero_ptr.dtype.element_ty == tl.int16:
        is_nan = (word & 0x7FFF) > 0x7F80
    else:
        is_nan = (word & 0x7FFFFFFF) > 0x7F800000
    count = tl.sum(is_nan.to(tl.int32))
    if count > 0:
        number = tl.cumsum(is_nan.to(tl.int32))
        place = tl.atomic_add(index_ptr, count) + 1
        for i in range(count):
            if place + i < room:
                group = tl.sum(tl.where(is_nan & (number == i + 1), row, 0))
                tl.store(index_ptr + 1 + place + i, group)
                for tile in range(0, GROUP, COLUMNS):
                    column = tile + tl.arange(0, COLUMNS)
                    x = tl.load(x_ptr + group.to(tl.int64) * GROUP + column, mask=column < GROUP)
                    tl.store(value_ptr + (place + i).to(tl.int64) * GROUP + column, x, mask=column < GROUP)


@triton.jit
def put_back(index_ptr, value_ptr, out_ptr, numel, GROUP: tl.constexpr, COLUMNS: tl.constexpr):
    """Copy one group to its place, if it is one."""
    place = tl.program_id(0)
    group = tl.load(index_ptr + place).to(tl.int64)
    if group >= 0:
        for tile in range(0, GROUP, COLUMNS):
            column = tile + tl.arange(0, COLUMNS)
            inside = (column < GROUP) & (group * GROUP + column < numel)
            x = tl.load(value_ptr + place.to(tl.int64) * GROUP + column, mask=inside)
            tl.store(out_ptr + group * GROUP + column, x, mask=inside)


@triton.jit
def _divide(x, divisor, inverse):
    """The correctly rounded ``x / divisor``, of whose reciprocal, correctly rounded, many divisions make use.

    After Markstein (1990): what remains of ``x`` under a quotient that is off by 1.5 ulp at most is all but exact in a
    fused operation, and so is the quotient that it corrects: by less than 10 / (2 d) of an ulp, where d is the
    divisor's 24-bit significand. A quotient nearer than that to the middle of two floats, where it would matter, is
    one of few for each divisor; all were tried. It takes a normal quotient: below 2**-126 this is zero where
    the quotient is, give or take 2**-24 of 2**-150, and else not.
    """
    quotient = x * inverse
    return tl.fma(tl.fma(-quotient, divisor, x), inverse, quotient)


@triton.jit
def _uniform(position, key_low, key_high, next_low, next_high, STRADDLES: tl.constexpr):
    """The uniform numbers of positions, as :func:`lightning_tinykg.codecs.noise.uniform` makes them.

    Args:
        position: int32; negative where the next block of positions has begun.
        key_low: two words of the block's key, see :mod:`.fused`, as the next three.
        key_high: likewise.
        next_low: likewise, for the next block.
        next_high: likewise.
        STRADDLES: whether any position lies in the next block.
    """
    if STRADDLES:
        key_low = tl.where(position < 0, next_low, key_low)
        key_high = tl.where(position < 0, next_high, key_high)
        position = position & 0x7FFFFFFF
    word = position.to(tl.uint32, bitcast=True)
    word = word ^ (word >> 16) ^ key_low.to(tl.uint32, bitcast=True)
    word = word * 0x85EBCA6B
    word = word ^ (word >> 13) ^ key_high.to(tl.uint32, bitcast=True)
    word = word * 0xC2B2AE35
    word = word ^ (word >> 16)
    return (word >> 8).to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-24


@triton.jit(do_not_specialize=["groups"])
def dequantize(
    codes_ptr,
    zero_ptr,
    scale_ptr,
    out_ptr,
    groups,
    GROUP: tl.constexpr,
    BYTES: tl.constexpr,
    BITS: tl.constexpr,
    UPPER: tl.constexpr,
    LARGEST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Restore ``ROWS`` groups, ``COLUMNS`` bytes of each, or pairs of them; nothing larger than ``LARGEST``.

    ``UPPER`` and ``BITS`` are as :func:`quantize` has them.
    """
    FIRST: tl.constexpr = GROUP if UPPER else 0
    LANES: tl.constexpr = 8 // BITS if BITS < 8 else 1
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < groups
    zero_word = tl.load(zero_ptr + row, mask=valid, other=0).to(tl.int32)
    scale_word = tl.load(scale_ptr + row, mask=valid, other=0).to(tl.int32)
    if zero_ptr.dtype.element_ty == tl.int16:
        # of a constant all codes are the same; times -0.0, they leave any number as it is, -0.0 too
        bit = tl.load(codes_ptr + (row * (FIRST + BYTES) + FIRST), mask=valid, other=0).to(tl.int32) & 1
        value = (zero_word << 16) | ((scale_word & 0x7FFF) << 1) | bit
        constant = scale_word < 0
        zero_word = tl.where(constant, value, zero_word << 16)
        scale_word = tl.where(constant, -0x80000000, scale_word << 16)
    zero = zero_word.to(tl.float32, bitcast=True)[:, None, None]
    scale = scale_word.to(tl.float32, bitcast=True)[:, None, None]

    row = row[:, None, None]
    lane = tl.arange(0, LANES)[None, :, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, None, :]
    place = lane * BYTES + column
    code_ptr = codes_ptr + (row * (FIRST + BYTES) + FIRST + column)
    byte = tl.load(code_ptr, mask=(row < groups) & (column < BYTES), other=0)
    level = (byte.to(tl.int32) >> (lane * BITS)) & (2**BITS - 1)
    inside = (row < groups) & (column < BYTES) & (place < GROUP)
    if UPPER:
        upper = tl.load(codes_ptr + (row * (FIRST + BYTES) + place), mask=inside, other=0)
        level += upper.to(tl.int32) << BITS
    x = level.to(tl.float32) * scale + zero
    if LARGEST < _INFINITY:  # rounded outward, the ends may lie beyond what a narrow dtype holds; a NaN stays
        x = tl.clamp(x, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr + (row * GROUP + place), x.to(out_ptr.dtype.element_ty), mask=inside)
