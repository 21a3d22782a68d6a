"""Compact forms that lose nothing the backward needs: masks, sign masks, two-level masks, narrowed integers, shapes.

A **mask** keeps one bit per element, and restores one of two representatives. It serves bool masks (False, True),
dropout's float masks (0 and 1 / (1 - p)), and every op whose backward only asks on which side of a threshold an
element lies: ReLU keeps whether its result is positive, and restores 1 or 0. What is asked of an element is a
:class:`~lightning_tinykg.codecs.cuts.Cut`; it is asked, and the answer packed, in one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_tinykg.codecs.affine import Allocate
from lightning_tinykg.codecs.chunks import iterate_chunks, iterate_flat
from lightning_tinykg.codecs.cuts import NONZERO, SIGNS, Cut
from lightning_tinykg.codecs.kernels import kernels_for
from lightning_tinykg.codecs.packing import packed_size

_BLOCK = 1 << 15  # elements whose codes are packed together; what is stored depends on it


@runtime_checkable
class Code(Protocol):
    """The compact form of one tensor."""

    @property
    def name(self) -> str:
        """The codec's name in a ledger."""

    @property
    def nbytes(self) -> int:
        """All the bytes that are kept."""

    def decode(self, allocate: Allocate = torch.empty) -> Tensor:
        """Restore the tensor, flat: shape ``[numel]``, in row-major order.

        Args:
            allocate: gives the memory, called as ``torch.empty(numel, dtype=, device=)``.
        """


@dataclass(frozen=True, slots=True)
class ShapeCode:
    """Nothing but the shape: restores zeros of stride 0, for a backward that only asks for the sizes."""

    numel: int
    dtype: torch.dtype
    device: torch.device

    name = "shape"
    nbytes = 0

    def decode(self, allocate: Allocate = torch.empty) -> Tensor:
        """Zeros that take no memory: shape ``[numel]``."""
        return torch.zeros((), dtype=self.dtype, device=self.device).expand(self.numel)


@dataclass(frozen=True, slots=True)
class RawCode:
    """The elements themselves, in a copy of their own."""

    values: Tensor

    name = "exact"

    @property
    def nbytes(self) -> int:
        """The bytes of the elements."""
        return self.values.nbytes

    def decode(self, allocate: Allocate = torch.empty) -> Tensor:
        """The elements: shape ``[numel]``."""
        return self.values


@dataclass(frozen=True, slots=True)
class LevelCode:
    """One of a few levels per element, in as many bits as their number needs.

    Attributes:
        codes: uint8, packed by blocks of 32,768 elements.
        levels: the values to restore, shape ``[2]`` or ``[4]``, in the tensor's dtype.
        numel: elements of the tensor.
        name: the codec's name in a ledger: ``mask`` or ``sign``.
    """

    codes: Tensor
    levels: Tensor
    numel: int
    name: str

    @property
    def bits(self) -> int:
        """Bits per element: 1 for two levels, 2 for four."""
        return self.levels.numel() // 2

    @property
    def nbytes(self) -> int:
        """The packed codes and the levels."""
        return self.codes.nbytes + self.levels.nbytes

    def decode(self, allocate: Allocate = torch.empty) -> Tensor:
        """The level of each element: shape ``[numel]``."""
        out = allocate(self.numel, dtype=self.levels.dtype, device=self.codes.device)
        kernels = kernels_for(out.device)
        for part, codes in _rows(out, self.codes, self.bits):
            kernels.unpack_levels(codes, self.levels, self.bits, part)
        return out


def encode_levels(tensor: Tensor, cut: Cut, levels: Tensor | Sequence[float], name: str = "mask") -> LevelCode:
    """Keep in which class of a cut each element is.

    Args:
        tensor: a float of 16, 32 or 64 bits; any shape and strides.
        cut: which classes there are, and the code of each.
        levels: what to restore for each code, 2 or 4 values: a tensor, whose dtype is the restored one, or numbers, for
            the tensor's own.
        name: the codec's name in a ledger.

    Returns:
        The code.

    Raises:
        ValueError: if the tensor can't be cut, or there are not as many levels as codes.

    Example:
        >>> x = torch.tensor([-1.5, 0.0, 2.0])
        >>> encode_levels(x, Cut(0.0, 0.0, above=1), (-7.0, 7.0)).decode()
        tensor([-7., -7.,  7.])
    """
    bits = cut.bits
    if len(levels) != 2**bits:
        raise ValueError(f"levels must be {2**bits}, one for each code of {bits} bits, got {len(levels)}")
    codes = _room(tensor, bits)
    kernels = kernels_for(tensor.device)
    for rows, place in _pieces(tensor, codes, bits):
        kernels.pack_classes(rows, cut, place)
    values = levels if isinstance(levels, Tensor) else _on_device(levels, tensor, tensor.dtype)
    return LevelCode(codes, values, tensor.numel(), name)


def _on_device(levels: Sequence[float], tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers where a tensor is: filled in on a GPU, since a copy from the CPU would wait for it."""
    if tensor.device.type == "cpu":
        return torch.tensor(levels, dtype=dtype, device="cpu")
    made = torch.empty(len(levels), dtype=dtype, device=tensor.device)
    for place, level in zip(made, levels, strict=True):
        place.fill_(level)
    return made


def _room(tensor: Tensor, bits: int) -> Tensor:
    return torch.empty(packed_size(tensor.numel(), bits), dtype=torch.uint8, device=tensor.device)


def _pieces(tensor: Tensor, codes: Tensor, bits: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A tensor's elements in rows that kernels can read, each with the place of its codes."""
    for start, flat in iterate_flat(tensor, _BLOCK):
        first = start * bits // 8
        place = codes[first : first + packed_size(flat.numel(), bits)] if flat.numel() < tensor.numel() else codes
        yield from _rows(flat, place, bits)


def _rows(flat: Tensor, codes: Tensor, bits: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Elements in rows of a block, and what is left over in a row of its own, each with its codes."""
    if 0 < flat.numel() <= _BLOCK:
        yield flat.view(1, -1), codes.view(1, -1)
        return
    whole = flat.numel() // _BLOCK * _BLOCK
    if whole:
        yield flat[:whole].view(-1, _BLOCK), codes[: whole * bits // 8].view(-1, _BLOCK * bits // 8)
    if whole < flat.numel():
        yield flat[whole:].view(1, -1), codes[whole * bits // 8 :].view(1, -1)


def encode_bool(tensor: Tensor, dtype: torch.dtype = torch.bool) -> LevelCode:
    """Keep a bool tensor in one bit per element.

    Args:
        tensor: the tensor, any shape and strides.
        dtype: dtype of what is restored, 0 and 1.

    Example:
        >>> encode_bool(torch.tensor([True, False, True])).decode()
        tensor([ True, False,  True])
    """
    codes = _room(tensor, 1)
    kernels = kernels_for(tensor.device)
    for rows, place in _pieces(tensor, codes, 1):
        flags = rows.view(torch.uint8)  # which are their codes
        kernels.pack(pad(flags, (0, spare)) if (spare := -flags.shape[1] % 8) else flags, 1, place)
    return LevelCode(codes, _on_device((0, 1), tensor, dtype), tensor.numel(), "mask")


def encode_signs(tensor: Tensor) -> LevelCode:
    """Keep of a float only whether it is negative, zero, positive or NaN, in 2 bits.

    Example:
        >>> encode_signs(torch.tensor([-3.0, 0.0, 7.0, float("nan")])).decode()
        tensor([-1.,  0.,  1., nan])
    """
    return encode_levels(tensor, SIGNS, (-1.0, 0.0, 1.0, torch.nan), "sign")


def encode_two_levels(tensor: Tensor) -> LevelCode | None:
    """Keep a float mask that holds zeros and one other value, such as dropout's, in one bit per element.

    Args:
        tensor: a float tensor; on a GPU it is taken at its word, since looking would mean waiting for the device.

    Returns:
        The code, or None where the tensor (on the CPU) holds a third value.

    Example:
        >>> encode_two_levels(torch.tensor([0.0, 1.25, 1.25])).decode()
        tensor([0.0000, 1.2500, 1.2500])
        >>> encode_two_levels(torch.tensor([0.0, 1.0, 2.0])) is None
        True
    """
    if tensor.numel() == 0:
        return None
    levels = torch.zeros(2, dtype=tensor.dtype, device=tensor.device)
    codes = _room(tensor, NONZERO.bits)
    kernels = kernels_for(tensor.device)
    for rows, place in _pieces(tensor, codes, NONZERO.bits):
        if not kernels.pack_two_levels(rows, levels[1:], place):
            return None
    return LevelCode(codes, levels, tensor.numel(), "mask")


@dataclass(frozen=True, slots=True)
class NarrowCode:
    """Integers in the narrowest integer dtype that holds them."""

    values: Tensor
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """The codec's name in a ledger: ``int64 as int16`` ..."""
        return f"{_short(self.dtype)} as {_short(self.values.dtype)}"

    @property
    def nbytes(self) -> int:
        """The narrow integers."""
        return self.values.nbytes

    def decode(self, allocate: Allocate = torch.empty) -> Tensor:
        """The integers in their own dtype: shape ``[numel]``."""
        return self.values.to(self.dtype)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def narrow_dtype(dtype: torch.dtype, low: int, high: int) -> torch.dtype:
    """The narrowest integer dtype that holds ``low`` to ``high``.

    Example:
        >>> narrow_dtype(torch.int64, -1, 30_000)
        torch.int16
    """
    return next(
        narrow
        for narrow in (*_INTEGERS, dtype)
        if narrow == dtype or (torch.iinfo(narrow).min <= low and high <= torch.iinfo(narrow).max)
    )


def encode_integers(tensor: Tensor, size: int | None = None) -> NarrowCode | None:
    """Narrow integers without loss.

    Args:
        tensor: an integer tensor, any shape and strides.
        size: for an index into a dimension of this size: its values lie in ``[-size, size - 1]``. A GPU is not asked
            for the values: there, nothing is narrowed without a size. On the CPU the values decide.

    Returns:
        The code, or None where nothing is to be gained.

    Example:
        >>> encode_integers(torch.tensor([3, 500, 2])).values.dtype
        torch.int16
        >>> encode_integers(torch.tensor([3, 0, 2]), size=100).values.dtype
        torch.uint8
    """
    if tensor.dtype not in _INTEGERS or tensor.numel() == 0:
        return None
    if tensor.device.type == "cpu":
        low, high = (int(end) for end in torch.aminmax(tensor))
    elif size is not None:
        low, high = -size, size - 1
    else:
        return None
    narrow = narrow_dtype(tensor.dtype, low, high)
    if narrow.itemsize >= tensor.dtype.itemsize:
        return None
    values = torch.empty(tensor.numel(), dtype=narrow, device=tensor.device)
    for start, piece in iterate_chunks(tensor, 1):
        values[start : start + piece.numel()].view(piece.shape).copy_(piece)
    return NarrowCode(values, tensor.dtype)
