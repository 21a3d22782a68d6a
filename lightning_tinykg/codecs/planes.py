"""Codes of any width in bytes: those that do not divide a byte in planes of widths that do (6 = 4 + 2)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_tinykg.codecs.chunks import chunk_elements
from lightning_tinykg.codecs.kernels import kernels_for
from lightning_tinykg.codecs.packing import PLANES, code_dtype, packed_size, unpack_codes


def cut_planes(codes: Tensor, bits: int) -> Iterator[Tensor]:
    """Pack rows of codes, plane by plane.

    Args:
        codes: uint8, or int16 or int32 for more than 8 bits; shape ``[rows, count]``.
        bits: a key of :data:`~lightning_tinykg.codecs.packing.PLANES`.

    Yields:
        The bytes of each plane, the upper bits first: uint8, shape ``[rows, packed_size(count, width)]``.

    Example:
        >>> [plane.tolist() for plane in cut_planes(torch.tensor([[5, 3]], dtype=torch.uint8), bits=5)]
        [[[18]], [[3]]]
    """
    kernels, widths, shift = kernels_for(codes.device), PLANES[bits], bits
    rows, count = codes.shape
    for width in widths:
        shift -= width
        part = (codes >> shift).bitwise_and_(2**width - 1) if len(widths) > 1 else codes
        size = packed_size(count, width)
        if size * 8 != count * width or part.dtype != torch.uint8:
            row = torch.zeros(rows, size * 8 // width, dtype=torch.uint8, device=codes.device)
            row[:, :count] = part
            part = row
        packed = part.new_empty(rows, size)
        kernels.pack(part.contiguous(), width, packed)
        yield packed


def pack_planes(codes: Tensor, bits: int, out: Tensor) -> None:
    """Pack rows of codes, a chunk at a time, the bytes of the planes side by side.

    Args:
        codes: uint8, or int16 for more than 8 bits; shape ``[rows, count]``.
        bits: 1 to 12.
        out: where to put the bytes: uint8, shape ``[rows, packed_size(count, bits)]``.
    """
    # a code is a quarter of an element, or half of one
    step = max(1, 4 * chunk_elements(codes.device) // (codes.itemsize * max(codes.shape[1], 1)))
    for some, place in zip(codes.split(step), out.split(step), strict=True):
        first = 0
        for plane in cut_planes(some, bits):
            place[:, first : first + plane.shape[1]] = plane
            first += plane.shape[1]


def unpack_planes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo :func:`pack_planes`.

    Args:
        packed: uint8, shape ``[rows, packed_size(count, bits)]``.
        bits: 1 to 12.
        count: codes of a row.

    Returns:
        uint8, or int16 for more than 8 bits; shape ``[rows, count]``.

    Example:
        >>> unpack_planes(torch.tensor([[18, 3]], dtype=torch.uint8), bits=5, count=2)
        tensor([[5, 3]], dtype=torch.uint8)
    """
    codes = packed.new_empty(packed.shape[0], count, dtype=code_dtype(bits))
    first, shift = 0, bits
    for width in PLANES[bits]:
        size, shift = packed_size(count, width), shift - width
        part = packed[:, first : first + size]
        part = part if width == 8 else unpack_codes(part, width)[:, :count]
        if first:
            codes |= part << shift if shift else part
        else:
            torch.bitwise_left_shift(part.to(codes.dtype), shift, out=codes)
        first += size
    return codes
