"""The questions that a mask answers of each element, as a table and no code, so that every kernel can ask them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""What can be cut."""

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By its size in bytes, the integers that the bits of a dtype make."""


def number_of(dtype: torch.dtype) -> int:
    """The place of a dtype in :data:`DTYPES`.

    Raises:
        ValueError: if tensors of this dtype can't be cut.

    Example:
        >>> number_of(torch.float64)
        1
    """
    if dtype not in DTYPES:
        raise ValueError(f"the tensor's dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    return DTYPES.index(dtype)


@dataclass(frozen=True)
class Cut:
    """Two ends that part all floats into four classes, and the code of each class.

    The comparisons are IEEE's: the two zeros are equal, and NaN is in a class of its own.

    Attributes:
        low: the lower end.
        high: the upper end, which may be the same.
        below: code of what lies below the lower end: 0 to 3.
        within: code of what lies between the ends.
        above: code of what lies above the upper end.
        nan: code of NaN.
        open: the upper end itself is above, and the lower one below, if it is another; else both are within.
        wide_on_cpu: a CPU compares 16-bit floats as float32, with ends that are not rounded to 16 bits.

    Raises:
        ValueError: if the ends are in the wrong order, or NaN, or a code is none.

    Example:
        >>> signs = Cut(0.0, 0.0, below=0, within=1, above=2, nan=3)
        >>> signs.bits, Cut(-3.0, 3.0, within=1, open=True).bits
        (2, 1)
    """

    low: float
    high: float
    below: int = 0
    within: int = 0
    above: int = 0
    nan: int = 0
    open: bool = False
    wide_on_cpu: bool = False

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"low must be at most high, got low={self.low} and high={self.high}")
        if not all(0 <= code <= 3 for code in self.codes):
            raise ValueError(f"below, within, above and nan must be codes from 0 to 3, got {self.codes}")

    @property
    def codes(self) -> tuple[int, int, int, int]:
        """The codes of below, within, above and NaN."""
        return self.below, self.within, self.above, self.nan

    @cached_property
    def packed_codes(self) -> int:
        """The same in two bits each, that of below in the lowest."""
        return self.below | self.within << 2 | self.above << 4 | self.nan << 6

    @cached_property
    def bits(self) -> int:
        """Bits that hold every code: 1 or 2."""
        return 1 if max(self.codes) < 2 else 2

    def ends(self, dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
        """The ends as the kernels of a device see them: numbers of the dtype.

        Args:
            dtype: one of :data:`DTYPES`.
            device: the device.

        Returns:
            The lower and the upper end.

        Raises:
            ValueError: if tensors of this dtype can't be cut.

        Example:
            >>> Cut(0.1, 0.1).ends(torch.bfloat16, torch.device("cpu"))
            (0.10009765625, 0.10009765625)
        """
        return _rounded(self, dtype, device.type)[0]

    def words(self, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
        """The bits of :meth:`ends`, as signed integers of the dtype's size."""
        return _rounded(self, dtype, device.type)[1]


@lru_cache(maxsize=1024)
def _rounded(cut: Cut, dtype: torch.dtype, device: str) -> tuple[tuple[float, float], tuple[int, int]]:
    number_of(dtype)
    ends = torch.tensor((cut.low, cut.high), dtype=dtype, device="cpu")
    words = ends.view(WORDS[dtype.itemsize])
    if cut.wide_on_cpu and device == "cpu" and dtype.itemsize == 2:
        # No element lies between an end and the numbers of 16 bits next to it: one of those parts the elements alike.
        # Of closed ends it is the one further within, of open ends the one further out.
        wide = torch.tensor((cut.low, cut.high), dtype=torch.float32, device="cpu").tolist()
        for i, way in enumerate((-1, 1) if cut.open else (1, -1)):
            if (wide[i] - float(ends[i])) * way > 0:
                words[i] = _next_word(int(words[i]), way)
    (low, high), (low_word, high_word) = ends.tolist(), words.tolist()
    return (low, high), (low_word, high_word)


def _next_word(word: int, way: int) -> int:
    """The word of the next float of 16 bits: up, where the way is 1, or down, where it is -1."""
    place = (word if word >= 0 else -(1 << 15) - word) + way  # their order is that of sign and magnitude
    return place if place >= 0 else -(1 << 15) - place


NONZERO = Cut(0.0, 0.0, below=1, above=1, nan=1)
"""Zero, or not."""

SIGNS = Cut(0.0, 0.0, below=0, within=1, above=2, nan=3)
"""Negative, zero, positive or NaN."""
