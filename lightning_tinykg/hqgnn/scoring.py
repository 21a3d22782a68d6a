"""Scores from packed codes, with numpy alone: fast ones in blocks, exact ones of some pairs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["CodeTable", "pack_rows", "unpack_rows"]

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]

PAIRS = 8192
"""Pairs whose exact scores are reckoned at a time: 4 MiB of float64 at 64 dimensions."""


def pack_rows(codes: npt.NDArray[Any], bits: int) -> Bytes:
    """Pack codes in planes, as :func:`lightning_tinykg.codecs.packing.pack_codes` does, rows filled up with 0.

    Args:
        codes: uint8, shape ``[n, d]``, values below ``2**bits``.
        bits: 1, 2, 4 or 8.

    Returns:
        uint8, shape ``[n, ceil(d * bits / 8)]``.

    Example:
        >>> pack_rows(np.array([[1, 0, 3, 2, 1]], dtype=np.uint8), bits=2).tolist()
        [[29, 8]]
    """
    rows, dim = codes.shape
    lanes = 8 // bits
    width = -(-dim // lanes)
    packed = np.zeros((rows, width), dtype=np.uint8)
    for lane in range(lanes):
        plane = codes[:, lane * width : (lane + 1) * width].astype(np.uint8, copy=False)
        packed[:, : plane.shape[1]] |= plane << np.uint8(lane * bits)
    return packed


def unpack_rows(packed: Bytes, bits: int, dim: int) -> Bytes:
    """Undo :func:`pack_rows`.

    Args:
        packed: uint8, shape ``[n, m]``.
        bits: 1, 2, 4 or 8.
        dim: codes of a row.

    Returns:
        uint8, shape ``[n, dim]``.

    Example:
        >>> unpack_rows(np.array([[29, 8]], dtype=np.uint8), bits=2, dim=5).tolist()
        [[1, 0, 3, 2, 1]]
    """
    shifts = (np.arange(8 // bits, dtype=np.uint8) * np.uint8(bits))[:, None]
    planes = (packed[:, None, :] >> shifts) & np.uint8(2**bits - 1)
    return planes.reshape(len(packed), -1)[:, :dim]


@dataclass(frozen=True)
class CodeTable:
    """Rows of packed b-bit codes, ``x = zero + scale * code``: what `QuantizedTable` is, with neither torch nor floats.

    Args:
        packed: uint8 ``[n, ceil(dim * bits / 8)]``, see :func:`pack_rows`; may be a memory map.
        scale: float32, ``[1]`` for the table, ``[n]`` for each row or ``[n, groups]``.
        zero: float32, the value of code 0, in the shape of ``scale``. None: the levels lie symmetrically around 0.
        bits: 1, 2, 4 or 8.
        dim: codes of a row.

    Raises:
        ValueError: If shapes, types or values do not belong together.

    Example:
        >>> codes = np.array([[0, 3], [1, 2]], dtype=np.uint8)
        >>> scale, zero = np.array([1, 2], dtype=np.float32), np.array([-1, 0], dtype=np.float32)
        >>> table = CodeTable(pack_rows(codes, 2), scale, zero, bits=2, dim=2)
        >>> table.decode(np.array([1])).tolist(), table.granularity
        ([[2.0, 4.0]], 'node')
    """

    packed: Bytes
    scale: Floats
    zero: Floats | None
    bits: int
    dim: int

    def __post_init__(self) -> None:
        if self.bits not in (1, 2, 4, 8):
            raise ValueError(f"bits must be 1, 2, 4 or 8, got {self.bits!r}")
        width = -(-self.dim * self.bits // 8)
        if self.packed.dtype != np.uint8 or self.packed.ndim != 2 or self.packed.shape[1] != width:
            raise ValueError(
                f"packed codes must be uint8 [n, {width}] for {self.dim} dimensions at {self.bits} bits, "
                f"got {self.packed.dtype} {list(self.packed.shape)}"
            )
        for name, value in (("scale", self.scale), ("zero", self.zero)):
            if value is not None and (value.dtype != np.float32 or not np.isfinite(value).all()):
                raise ValueError(f"{name} must be finite float32, got {value.dtype} {list(value.shape)}")
        if (self.scale < 0).any():
            raise ValueError("scale must not be negative")
        rows, shape = len(self), self.scale.shape
        grouped = len(shape) == 2 and shape[0] == rows and shape[1] > 0 and self.dim % shape[1] == 0
        zero_shape = shape if self.zero is None else self.zero.shape
        if shape != zero_shape or not (shape in ((1,), (rows,)) or grouped):
            raise ValueError(
                f"scale and zero must both be [1], [{rows}] or [{rows}, groups] with groups dividing {self.dim}, "
                f"got {list(shape)} and {list(zero_shape)}"
            )

    def __len__(self) -> int:
        return int(self.packed.shape[0])

    @property
    def granularity(self) -> str:
        """What shares a scale: ``"table"``, ``"node"`` or ``"group"``."""
        return "group" if self.scale.ndim == 2 else "table" if self.scale.size == 1 else "node"

    @property
    def row_bytes(self) -> float:
        """Bytes of one row in use: its codes and its share of scales, and of zeros unless symmetric."""
        stored = self.scale.nbytes + (0 if self.zero is None else self.zero.nbytes)
        return int(self.packed.shape[1]) + float(stored) / max(1, len(self))

    def zero_of(self, pick: Ints | slice) -> Floats:
        """The value of code 0, for some of the scales: stored, or rounded as `codecs.uniform.symmetric_zero` does it.

        Example:
            >>> CodeTable(np.zeros((1, 1), np.uint8), np.array([2], np.float32), None, bits=2, dim=4).zero_of(slice(1))
            array([-3.], dtype=float32)
        """
        if self.zero is not None:
            return np.asarray(self.zero[pick])
        return np.asarray(self.scale[pick]) * np.float32(-(2**self.bits - 1) / 2)

    @cached_property
    def largest(self) -> float:
        """A bound of what any code can stand for, in absolute value."""
        if not self.scale.size:
            return 0.0
        return float((np.abs(self.zero_of(slice(None))) + self.scale * np.float32(2**self.bits - 1)).max())

    @cached_property
    def _of_byte(self) -> Floats:
        """The codes in each byte, float32 ``[256, 8 / bits]``; with one scale for all, what they stand for."""
        codes = unpack_rows(np.arange(256, dtype=np.uint8)[:, None], self.bits, 8 // self.bits).astype(np.float32)
        return codes * self.scale.ravel() + self.zero_of(slice(None)).ravel() if self.scale.size == 1 else codes

    def decode(self, rows: Ints | slice) -> Floats:
        """The values of some rows, rounded as `QuantizedTable.decode` rounds them.

        Args:
            rows: int64 ``[r]``, or a slice.

        Returns:
            float32 ``[r, dim]``.
        """
        packed = np.asarray(self.packed[rows])
        planes = self._of_byte.take(packed, axis=0).swapaxes(1, 2)
        codes = planes.reshape(len(packed), packed.shape[1] * planes.shape[1])[:, : self.dim]
        if self.scale.size == 1:
            return codes  # which are values already
        if self.scale.ndim == 1:
            codes *= np.asarray(self.scale[rows])[:, None]
            codes += self.zero_of(rows)[:, None]
            return codes
        grouped = codes.reshape(len(codes), self.scale.shape[1], -1)
        grouped *= np.asarray(self.scale[rows])[:, :, None]
        grouped += self.zero_of(rows)[:, :, None]
        return grouped.reshape(codes.shape)

    def exact(self, vectors: Floats, row: Ints, item: Ints) -> Floats:
        """Dot products of some pairs, summed in float64 and rounded once. Equal rows give equal scores.

        A matrix product would not do: it sums in another order at the edge of a block, and a tie is no tie any more.

        Args:
            vectors: float32 ``[u, dim]``.
            row: rows of ``vectors``, int64 ``[p]``.
            item: rows of the table, int64 ``[p]``.

        Returns:
            float32 ``[p]``.
        """
        scores = np.empty(len(row), dtype=np.float32)
        for start in range(0, len(row), PAIRS):
            part = slice(start, start + PAIRS)
            own = vectors if len(vectors) == 1 else vectors[row[part]]
            products = self.decode(item[part]) * own.astype(np.float64)
            scores[part] = products.sum(axis=1)
        return scores

    def score_block(self, vectors: Floats, start: int, stop: int) -> Floats:
        """Dot products with all rows of a block, in float32: right within :meth:`tolerance`.

        Codes are multiplied plane by plane, as they lie in the bytes, and scaled afterwards: nothing is decoded unless
        a row has several scales.

        Args:
            vectors: float32 ``[u, dim]``.
            start: first row.
            stop: behind the last row.

        Returns:
            float32 ``[u, stop - start]``.
        """
        if self.scale.ndim == 2:
            return vectors @ self.decode(slice(start, stop)).T
        packed = np.asarray(self.packed[start:stop])
        width, mask = packed.shape[1], np.uint8(2**self.bits - 1)
        scores: Floats | None = None
        for lane, first in enumerate(range(0, self.dim, width)):
            part = vectors[:, first : first + width]
            plane = (packed >> np.uint8(lane * self.bits)) & mask if self.bits < 8 else packed
            product = part @ plane[:, : part.shape[1]].astype(np.float32).T
            scores = product if scores is None else np.add(scores, product, out=scores)
        assert scores is not None
        pick = slice(None) if self.scale.size == 1 else slice(start, stop)
        scores *= self.scale[pick]
        scores += vectors.sum(axis=1, dtype=np.float64).astype(np.float32)[:, None] * self.zero_of(pick)
        return scores

    def tolerance(self, vectors: Floats) -> Doubles:
        """How far a float32 score can be from the exact one, by vector: float64 ``[u]``."""
        length: Doubles = np.abs(vectors).sum(axis=1, dtype=np.float64)
        return length * ((self.dim + 16) * 2.0**-23 * self.largest)
