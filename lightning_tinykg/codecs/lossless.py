"""Compact forms that lose nothing the backward needs: masks, sign masks, two-level masks, narrowed integers, shapes.

A **mask** keeps one bit per element, and restores one of two representatives. It serves bool masks (False, True),
dropout's float masks (0 and 1 / (1 - p)), and every op whose backward only asks on which side of a threshold an
element lies: ReLU keeps whether its result is positive, and restores 1 or 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_tinykg.codecs.affine import Allocate
from lightning_tinykg.codecs.chunks import iterate_chunks
from lightning_tinykg.codecs.kernels import kernels_for

_SCRATCH = 4  # bytes for each element while its class is found: a few bools
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
        lanes = 8 // self.bits
        out = allocate(self.codes.numel() * lanes, dtype=self.levels.dtype, device=self.codes.device)
        kernels = kernels_for(out.device)
        for codes, part in zip(_blocks(self.codes, _BLOCK // lanes), _blocks(out, _BLOCK), strict=True):
            kernels.unpack_levels(codes, self.levels, self.bits, part)
        return out[: self.numel]


def encode_levels(
    tensor: Tensor, classify: Callable[[Tensor], Tensor], levels: Tensor, name: str = "mask"
) -> LevelCode:
    """Keep which of a few levels each element belongs to.

    Args:
        tensor: any shape, strides and dtype.
        classify: maps a piece of the tensor, of any shape, to the index of each element's level (bool or uint8).
        levels: what to restore, shape ``[2]`` (1 bit) or ``[4]`` (2 bits).
        name: the codec's name in a ledger.

    Returns:
        The code.

    Raises:
        ValueError: if there are neither 2 nor 4 levels.

    Example:
        >>> x = torch.tensor([-1.5, 0.0, 2.0])
        >>> encode_levels(x, lambda piece: piece > 0, torch.tensor([0.0, 1.0])).decode()
        tensor([0., 0., 1.])
    """
    if levels.numel() not in (2, 4):
        raise ValueError(f"levels must have 2 or 4 elements, got {levels.numel()}")
    bits, numel = levels.numel() // 2, tensor.numel()
    lanes = 8 // bits
    codes = torch.empty(-(-numel // lanes), dtype=torch.uint8, device=tensor.device)
    kernels = kernels_for(tensor.device)
    pieces = iterate_chunks(tensor, _BLOCK, _SCRATCH) if numel > _BLOCK else ((0, tensor),)
    for start, piece in pieces:
        classes = classify(piece).reshape(-1).contiguous().view(torch.uint8)
        if spare := -classes.numel() % lanes:
            classes = torch.cat([classes, classes.new_zeros(spare)])
        place = codes if numel <= _BLOCK else codes[start // lanes : (start + classes.numel()) // lanes]
        for block, part in zip(_blocks(classes, _BLOCK), _blocks(place, _BLOCK // lanes), strict=True):
            kernels.pack(block, bits, part)
    return LevelCode(codes, levels, numel, name)


def _blocks(flat: Tensor, width: int) -> Iterator[Tensor]:
    """A flat tensor as rows of ``width``, and what is left over as a row of its own."""
    if 0 < flat.numel() <= width:
        yield flat.view(1, -1)
        return
    whole = flat.numel() // width * width
    if whole:
        yield flat[:whole].view(-1, width)
    if whole < flat.numel():
        yield flat[whole:].view(1, -1)


def encode_bool(tensor: Tensor) -> LevelCode:
    """Keep a bool tensor in one bit per element.

    Example:
        >>> encode_bool(torch.tensor([True, False, True])).decode()
        tensor([ True, False,  True])
    """
    return encode_levels(tensor, lambda piece: piece, torch.tensor([False, True], device=tensor.device))


def encode_signs(tensor: Tensor) -> LevelCode:
    """Keep of a float only whether it is negative, zero, positive or NaN, in 2 bits.

    Example:
        >>> encode_signs(torch.tensor([-3.0, 0.0, 7.0, float("nan")])).decode()
        tensor([-1.,  0.,  1., nan])
    """

    def classify(piece: Tensor) -> Tensor:
        classes = (piece >= 0).view(torch.uint8).add_((piece > 0).view(torch.uint8))
        return classes.bitwise_or_((piece != piece).view(torch.uint8).mul_(3))  # NaN

    levels = torch.tensor([-1.0, 0.0, 1.0, torch.nan], dtype=tensor.dtype, device=tensor.device)
    return encode_levels(tensor, classify, levels, "sign")


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
    low, high = torch.aminmax(tensor)
    value = torch.where(high > 0, high, low)
    if tensor.device.type == "cpu" and not all(
        bool(((piece == 0) | (piece == value)).all()) for _, piece in iterate_chunks(tensor, 1, _SCRATCH)
    ):
        return None
    levels = torch.stack([torch.zeros_like(value), value])
    return encode_levels(tensor, lambda piece: piece != 0, levels)


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
