r"""The arithmetic of the group quantizer in Triton, one pass over the memory: for CUDA.

The bits are those of :mod:`~lightning_tinykg.codecs.kernels.reference`. For that, divisions are rounded correctly
(Triton's ``/`` is not), no multiplication is contracted with an addition (``enable_fp_fusion``), and NaNs are looked
for, since a GPU's minimum and maximum pass over them.

The instructions, about thirty an element, are expected to take as long as the memory does: hence divisions by a shared
reciprocal, and codes that are added up as floats.

A byte holds codes of all planes of its group, so a thread that quantizes the same column of every plane packs in its
registers: :func:`_quantize` walks over the planes. Restoring needs no such thing: :func:`_dequantize` writes all planes
of a group at once, which are contiguous.
"""

# Triton's language has no types that mypy could read
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_tinykg.codecs.kernels.reference import MIN_SCALE, Reference
from lightning_tinykg.codecs.noise import make_key
from lightning_tinykg.codecs.packing import packed_size

_BLOCK = 1 << 31
"""Positions under one key; no launch goes beyond it, so that 32 bits hold any offset."""

_MIN_SCALE = tl.constexpr(MIN_SCALE)
_INFINITY = tl.constexpr(float("inf"))
_NAN_WORD = tl.constexpr(0x7FC00000)
_ONE_WORD = tl.constexpr(0x3F800000)


class Fused:
    """Triton kernels."""

    name = "triton"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    """Read and written as they are; the arithmetic is float32's."""

    def quantize(
        self, x: Tensor, key: int, start: int, bits: int, codes: Tensor, zero: Tensor, scale: Tensor
    ) -> int | None:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`."""
        groups, group_size = x.shape
        if group_size > _BLOCK // 2:
            Reference().quantize(x.to(torch.float32, copy=True), key, start, bits, codes, zero, scale)
            return None
        zero, scale = _words(zero), _words(scale)
        rows, columns, warps = _shape(group_size, bits, x.itemsize)
        first = 0
        while first < groups:
            block, position = divmod(start + first * group_size, _BLOCK)
            whole = min(groups - first, (_BLOCK - position) // group_size)
            # a group that lies in two blocks has a launch of its own
            count = max(whole, 1)
            part = slice(first, first + count)
            with _on(x):
                _quantize[(triton.cdiv(count, rows),)](
                    x[part],
                    codes[part],
                    zero[part],
                    scale[part],
                    count,
                    position,
                    *_key_words(key, block),
                    *_key_words(key, block + 1),
                    GROUP=group_size,
                    BYTES=codes.shape[1],
                    BITS=bits,
                    STRADDLES=whole == 0,
                    ROWS=rows,
                    COLUMNS=columns,
                    num_warps=warps,
                    enable_fp_fusion=False,
                )
            first += count
        return None

    def dequantize(self, codes: Tensor, zero: Tensor, scale: Tensor, bits: int, out: Tensor) -> None:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`."""
        groups, group_size = out.shape
        if group_size > _BLOCK // 2:
            wide = torch.empty_like(out, dtype=torch.float32)
            Reference().dequantize(codes, zero, scale, bits, wide)
            finfo = torch.finfo(out.dtype)
            out.copy_(wide.clamp_(finfo.min, finfo.max))
            return
        zero, scale = _words(zero), _words(scale)
        rows, columns, warps = _shape(group_size, bits, out.itemsize)
        step = _BLOCK // group_size
        for first in range(0, groups, step):
            part = slice(first, first + step)
            x = out[part]
            with _on(x):
                _dequantize[(triton.cdiv(x.shape[0], rows), triton.cdiv(codes.shape[1], columns))](
                    codes[part],
                    zero[part],
                    scale[part],
                    x,
                    x.shape[0],
                    GROUP=group_size,
                    BYTES=codes.shape[1],
                    BITS=bits,
                    LARGEST=float("inf") if x.dtype == torch.float32 else torch.finfo(x.dtype).max,
                    ROWS=rows,
                    COLUMNS=columns,
                    num_warps=warps,
                    enable_fp_fusion=False,
                )

    def pack(self, codes: Tensor, bits: int, out: Tensor) -> None:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`."""
        rows, size = out.shape
        columns = min(triton.next_power_of_2(max(size, 1)), 2048)
        tiles = triton.cdiv(size, columns)
        if out.numel():
            with _on(out):
                _pack[(rows * tiles,)](codes, out, size, tiles, BITS=bits, COLUMNS=columns)

    def unpack_levels(self, codes: Tensor, levels: Tensor, bits: int, out: Tensor) -> None:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`."""
        rows, size = codes.shape
        columns = min(triton.next_power_of_2(max(size, 1)), 512)
        tiles = triton.cdiv(size, columns)
        word = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[levels.itemsize]
        if codes.numel():
            with _on(out):
                _unpack_levels[(rows * tiles,)](
                    codes, levels.view(word), out.view(word), size, tiles, BITS=bits, COLUMNS=columns
                )


def _on(x: Tensor) -> torch.cuda.device | nullcontext[None]:
    """Launch on the tensor's device, which need not be the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _words(metadata: Tensor) -> Tensor:
    """Zero points or scales as the integers with the same bits, so that NaNs and marks are written as they are."""
    return metadata.view(torch.int16 if metadata.dtype == torch.bfloat16 else torch.int32)


def _key_words(key: int, block: int) -> tuple[int, int]:
    """The key's two words, each mixed with itself as the hash is about to mix what it is injected into.

    A shift distributes over exclusive or: ``(i ^ k) ^ (i ^ k) >> n`` is ``(i ^ i >> n) ^ (k ^ k >> n)``, and the latter
    is the same for all positions.
    """
    if block:
        key = make_key(key, block)
    low, high = key & 0xFFFFFFFF, key >> 32
    return _signed(low ^ low >> 16), _signed(high ^ high >> 13)


def _signed(word: int) -> int:
    """The 32-bit word as the int32 with the same bits."""
    return word - (1 << 32) if word >= 1 << 31 else word


def _shape(group_size: int, bits: int, itemsize: int) -> tuple[int, int, int]:
    """Groups of a program, bytes of a group that it makes at a time, and its warps.

    Each of 128 threads loads 16 bytes of every plane, and four times at least: that much is under way at a time, and
    the registers hold it between its two uses. A larger group gets more threads, then more elements for each, then is
    read twice.
    """
    lanes = 8 // bits
    columns = min(triton.next_power_of_2(packed_size(group_size, bits)), 16384 // lanes)
    warp_bytes = 32 * 16 * max(4, lanes)
    elements = max(lanes * columns, 4 * warp_bytes // itemsize)
    return elements // (lanes * columns), columns, min(16, elements * itemsize // warp_bytes)


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
def _quantize(
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
    STRADDLES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Quantize ``ROWS`` groups, ``COLUMNS`` bytes of each at a time."""
    LANES: tl.constexpr = 8 // BITS
    LEVELS: tl.constexpr = 2.0**BITS - 1
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
                if PADDED:
                    code = tl.where(inside, code, 0.0)
                packed += code * 2.0 ** (lane * BITS)
        byte = tl.where(finite[:, None], packed, 0.0).to(tl.int32)
        if NARROW:
            byte = tl.where(constant[:, None], (bit * (255 // (2**BITS - 1)))[:, None], byte)
        tl.store(codes_ptr + (row * BYTES + column), byte.to(tl.uint8), mask=valid[:, None] & (column < BYTES))
    tl.store(zero_ptr + rows, zero_word.to(zero_ptr.dtype.element_ty), mask=valid)
    tl.store(scale_ptr + rows, scale_word.to(scale_ptr.dtype.element_ty), mask=valid)


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
        key_low: from :func:`_key_words`, as the next three.
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
def _dequantize(
    codes_ptr,
    zero_ptr,
    scale_ptr,
    out_ptr,
    groups,
    GROUP: tl.constexpr,
    BYTES: tl.constexpr,
    BITS: tl.constexpr,
    LARGEST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Restore ``ROWS`` groups, ``COLUMNS`` bytes of each; nothing larger than ``LARGEST``."""
    LANES: tl.constexpr = 8 // BITS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < groups
    zero_word = tl.load(zero_ptr + row, mask=valid, other=0).to(tl.int32)
    scale_word = tl.load(scale_ptr + row, mask=valid, other=0).to(tl.int32)
    if zero_ptr.dtype.element_ty == tl.int16:
        # of a constant all codes are the same; times -0.0, they leave any number as it is, -0.0 too
        bit = tl.load(codes_ptr + row * BYTES, mask=valid, other=0).to(tl.int32) & 1
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
    byte = tl.load(codes_ptr + (row * BYTES + column), mask=(row < groups) & (column < BYTES), other=0)
    level = (byte.to(tl.int32) >> (lane * BITS)) & (2**BITS - 1)
    x = level.to(tl.float32) * scale + zero
    if LARGEST < _INFINITY:  # rounded outward, the ends may lie beyond what a narrow dtype holds; a NaN stays
        x = tl.clamp(x, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    inside = (row < groups) & (column < BYTES) & (place < GROUP)
    tl.store(out_ptr + (row * GROUP + place), x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tiles"])
def _pack(codes_ptr, out_ptr, size, tiles, BITS: tl.constexpr, COLUMNS: tl.constexpr):
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
def _unpack_levels(codes_ptr, levels_ptr, out_ptr, size, tiles, BITS: tl.constexpr, COLUMNS: tl.constexpr):
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
