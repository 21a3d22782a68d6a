"""b-bit codes in bytes.

A byte holds ``8 / bits`` codes. They are not neighbours: byte ``j`` of a row of ``n`` codes holds the codes
``j, j + m, j + 2m, ...`` with ``m = n * bits / 8`` (planes), so that packing and unpacking are shifts of contiguous
slices, which every vector unit does well, and never a shuffle of neighbouring bytes.

A width that does not divide a byte is cut into widths that do (6 = 4 + 2), the upper bits first: the bytes of the one,
then those of the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (1, 2, 4, 8)
"""The widths that divide a byte."""

PLANES = {
    1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,),
    9: (8, 1), 10: (8, 2), 11: (8, 2, 1), 12: (8, 4), 16: (8, 8),
}  # fmt: skip  # a table, read as one
"""By width of a code: the widths that it is cut into, the upper bits first."""


def check_bits(bits: int) -> int:
    """Return ``bits`` if it is a width that divides a byte.

    Raises:
        ValueError: if ``bits`` is not one of 1, 2, 4, 8.
    """
    if bits not in BITS or isinstance(bits, bool):
        raise ValueError(f"bits must be one of 1, 2, 4, 8, got {bits!r}")
    return bits


def code_dtype(bits: int) -> torch.dtype:
    """The dtype of codes that are not packed: a byte each, or two for more than 8 bits.

    Example:
        >>> code_dtype(5), code_dtype(12)
        (torch.uint8, torch.int16)
    """
    return torch.uint8 if bits <= 8 else torch.int16


def packed_size(count: int, bits: int) -> int:
    """The bytes that ``count`` codes of ``bits`` bits take.

    Example:
        >>> packed_size(64, 2), packed_size(5, 4), packed_size(64, 6)
        (16, 3, 48)
    """
    return sum(-(-count * plane // 8) for plane in PLANES.get(bits, (bits,)))


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last dimension.

    Args:
        codes: uint8, shape ``[..., n]``, values below ``2**bits``; ``n`` a multiple of ``8 / bits``.
        bits: 1, 2, 4 or 8.

    Returns:
        uint8, shape ``[..., n * bits / 8]``.

    Raises:
        ValueError: if ``bits`` is no width, or ``n`` does not fill whole bytes.

    Example:
        >>> pack_codes(torch.tensor([1, 0, 3, 2], dtype=torch.uint8), bits=2)
        tensor([177], dtype=torch.uint8)
    """
    check_bits(bits)
    lanes = 8 // bits
    if codes.shape[-1] % lanes:
        raise ValueError(f"codes must fill whole bytes: a last dimension divisible by {lanes}, got {codes.shape[-1]}")
    if lanes == 1:
        return codes
    planes = codes.unflatten(-1, (lanes, -1))
    packed: Tensor = planes[..., 0, :].clone()
    for lane in range(1, lanes):
        packed |= planes[..., lane, :] << (lane * bits)
    return packed


def unpack_codes(packed: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
    """Undo :func:`pack_codes`.

    Args:
        packed: uint8, shape ``[..., m]``.
        bits: 1, 2, 4 or 8.
        out: where to put the codes, uint8, shape ``[..., m * 8 / bits]``; None allocates it.

    Returns:
        uint8, shape ``[..., m * 8 / bits]``.

    Example:
        >>> unpack_codes(torch.tensor([177], dtype=torch.uint8), bits=2)
        tensor([1, 0, 3, 2], dtype=torch.uint8)
    """
    lanes = 8 // check_bits(bits)
    if out is None:
        out = packed.new_empty(*packed.shape[:-1], packed.shape[-1] * lanes)
    planes = out.unflatten(-1, (lanes, -1))
    for lane in range(lanes):
        plane = planes[..., lane, :]
        torch.bitwise_right_shift(packed, lane * bits, out=plane)
        if lane < lanes - 1:
            plane &= 2**bits - 1
    return out
