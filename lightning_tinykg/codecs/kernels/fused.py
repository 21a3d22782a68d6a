"""The kernels for CUDA: what :mod:`.fused_groups` and :mod:`.fused_masks` do in Triton, launched."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
from torch import Tensor

from lightning_tinykg.codecs.cuts import WORDS, Cut
from lightning_tinykg.codecs.exact_groups import places
from lightning_tinykg.codecs.kernels import fused_groups, fused_masks, fused_rows
from lightning_tinykg.codecs.kernels.reference import Reference
from lightning_tinykg.codecs.noise import make_key
from lightning_tinykg.codecs.packing import BITS, PLANES

_BLOCK = 1 << 31
"""Positions under one key; no launch goes beyond it, so that 32 bits hold any offset."""

_GATHERED = 4096
"""Elements that a program gathers."""

_LOOKED_AT = 1024
"""Groups that a program looks at for those that can't be quantized."""


class Fused:
    """Triton kernels."""

    name = "triton"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    """Read and written as they are; the arithmetic is float32's."""

    def packs(self, bits: int) -> bool:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`."""
        return bits in BITS or _has_upper_byte(bits)

    def quantize(
        self, x: Tensor, key: int, start: int, bits: int, codes: Tensor, zero: Tensor, scale: Tensor
    ) -> int | None:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`."""
        groups, group_size = x.shape
        if group_size > _BLOCK // 2:
            Reference().quantize(x.to(torch.float32, copy=True), key, start, bits, codes, zero, scale)
            return None
        zero, scale = _words(zero), _words(scale)
        upper = _has_upper_byte(bits)
        packed = bits - 8 if upper else 16 if bits > 8 else bits if bits in BITS else 8
        rows, columns, warps = _shape(group_size, packed, x.itemsize)
        most = _BLOCK // max(group_size, codes.shape[1])  # a code may be more than a byte
        first, whole_tensor = 0, groups <= most and start + groups * group_size <= _BLOCK
        while first < groups:
            block, position = divmod(start + first * group_size, _BLOCK)
            whole = min(groups - first, most, (_BLOCK - position) // group_size)
            # a group that lies in two blocks has a launch of its own
            count = max(whole, 1)
            tensors: tuple[Tensor, ...] = (x, codes, zero, scale)
            if not whole_tensor:
                tensors = tuple([t[first : first + count] for t in tensors])
            with _on(x):
                fused_groups.quantize[(triton.cdiv(count, rows),)](
                    *tensors,
                    count,
                    position,
                    *_key_words(key, block),
                    *_key_words(key, block + 1),
                    GROUP=group_size,
                    BYTES=codes.shape[1] - upper * group_size,
                    BITS=packed,
                    UPPER=upper,
                    LEVELS=float(2**bits - 1),
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
        upper = _has_upper_byte(bits)
        packed, size = bits - 8 * upper, codes.shape[1] - upper * group_size
        rows, columns, warps = _shape(group_size, packed, out.itemsize)
        step = _BLOCK // max(group_size, codes.shape[1])
        for first in range(0, groups, step):
            tensors: tuple[Tensor, ...] = (codes, zero, scale, out)
            if groups > step:
                tensors = tuple([t[first : first + step] for t in tensors])
            count = min(step, groups - first)
            with _on(out):
                fused_groups.dequantize[(triton.cdiv(count, rows), triton.cdiv(size, columns))](
                    *tensors,
                    count,
                    GROUP=group_size,
                    BYTES=size,
                    BITS=packed,
                    UPPER=upper,
                    LARGEST=float("inf") if out.dtype == torch.float32 else torch.finfo(out.dtype).max,
                    ROWS=rows,
                    COLUMNS=columns,
                    num_warps=warps,
                    enable_fp_fusion=False,
                )

    def put_aside(self, x: Tensor, zero: Tensor) -> tuple[Tensor, Tensor] | None:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`."""
        (groups, group_size), room = x.shape, places(x.shape[0])
        # one more, in which the places that are taken are counted from -1 on
        index = torch.full((room + 1,), -1, dtype=torch.int32, device=x.device)
        value = torch.empty(room, group_size, dtype=x.dtype, device=x.device)
        if groups:
            with _on(x):
                fused_groups.put_aside[(triton.cdiv(groups, _LOOKED_AT),)](
                    x,
                    _words(zero),
                    index,
                    value,
                    groups,
                    room,
                    GROUP=group_size,
                    LOOKED_AT=_LOOKED_AT,
                    COLUMNS=_columns(group_size),
                )
        return index[1:], value

    def put_back(self, index: Tensor, value: Tensor, out: Tensor) -> bool:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`."""
        size, word = value.shape[1], WORDS[out.itemsize]
        with _on(out):
            fused_groups.put_back[(index.shape[0],)](
                index, value.view(word), out.view(word), out.shape[0], GROUP=size, COLUMNS=_columns(size)
            )
        return True

    def gather(self, table: Tensor, index: Tensor, out: Tensor) -> None:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`."""
        rows, count, word = table.shape[0], index.numel(), WORDS[table.itemsize]
        width = table.numel() // max(rows, 1)
        if not count or not width:
            return
        if width == 1:  # which PyTorch does faster
            Reference().gather(table, index, out)
            return
        columns = min(triton.next_power_of_2(width), 1024)
        several = max(1, _GATHERED // columns)
        with _on(out):
            fused_rows.gather[(triton.cdiv(count, several), triton.cdiv(width, columns))](
                table.view(word), index, out.view(word), count, rows, WIDTH=width, ROWS=several, COLUMNS=columns
            )

    def pack(self, codes: Tensor, bits: int, out: Tensor) -> None:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`."""
        rows, size = out.shape
        columns = min(triton.next_power_of_2(max(size, 1)), 2048)
        tiles = triton.cdiv(size, columns)
        if out.numel():
            with _on(out):
                fused_masks.pack[(rows * tiles,)](codes, out, size, tiles, BITS=bits, COLUMNS=columns)

    def pack_classes(self, x: Tensor, cut: Cut, out: Tensor) -> None:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`."""
        rows, size = out.shape
        # each of 128 threads loads 16 bytes of every plane
        columns = min(triton.next_power_of_2(max(size, 1)), 128 * 16 // x.itemsize)
        tiles = triton.cdiv(size, columns)
        if x.numel():
            with _on(x):
                fused_masks.pack_classes[(rows * tiles,)](
                    x,
                    out,
                    x.shape[1],
                    size,
                    tiles,
                    *cut.words(x.dtype, x.device),
                    CODES=cut.packed_codes,
                    OPEN=cut.open,
                    BITS=cut.bits,
                    COLUMNS=columns,
                )

    def pack_two_levels(self, x: Tensor, value: Tensor, out: Tensor) -> bool:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`."""
        rows, size = out.shape
        columns = min(triton.next_power_of_2(max(size, 1)), 128 * 16 // x.itemsize)
        tiles = triton.cdiv(size, columns)
        if x.numel():
            with _on(x):
                fused_masks.pack_two_levels[(rows * tiles,)](x, value, out, x.shape[1], size, tiles, COLUMNS=columns)
        return True  # a GPU is not asked: that would be to wait for it

    def unpack_levels(self, codes: Tensor, levels: Tensor, bits: int, out: Tensor) -> None:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`."""
        rows, size = codes.shape
        columns = min(triton.next_power_of_2(max(size, 1)), 512)
        tiles = triton.cdiv(size, columns)
        word = WORDS[levels.itemsize]
        if codes.numel():
            with _on(out):
                fused_masks.unpack_levels[(rows * tiles,)](
                    codes, levels.view(word), out.view(word), out.shape[1], size, tiles, BITS=bits, COLUMNS=columns
                )


def _has_upper_byte(bits: int) -> bool:
    """Whether codes of this width are a byte, and one plane of the bits below it."""
    return len(PLANES.get(bits, ())) == 2 and PLANES[bits][0] == 8 and bits != 16


def _columns(group_size: int) -> int:
    """Elements of a group to copy at a time."""
    columns: int = min(triton.next_power_of_2(group_size), 1024)
    return columns


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
    """Groups of a program, bytes of a group that it makes at a time (or pairs of them), and its warps.

    Each of 128 threads loads 16 bytes of every plane, and four times at least: that much is under way at a time, and
    the registers hold it between its two uses. A larger group gets more threads, then more elements for each, then is
    read twice.
    """
    lanes = max(8 // bits, 1)
    columns = min(triton.next_power_of_2(-(-group_size // lanes)), 16384 // lanes)
    warp_bytes = 32 * 16 * max(4, lanes)
    elements = max(lanes * columns, 4 * warp_bytes // itemsize)
    return elements // (lanes * columns), columns, min(16, elements * itemsize // warp_bytes)
