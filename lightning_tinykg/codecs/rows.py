r"""Rows of b-bit uniform codes, really packed: any rows are decoded without the others.

A width that does not divide a byte is stored as planes of those that do (3 = 2 + 1, 6 = 4 + 2, 16 = 8 + 8), the upper
bits first. Within a plane a row is whole bytes, so rows can be gathered, and a row's codes lie as
`lightning_tinykg.codecs.packing` puts them. What a row decodes to is, to the last bit,
`affine(nearest_codes(x, scale, zero, bits), scale, zero)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_tinykg.arguments import is_width
from lightning_tinykg.codecs.chunks import chunk_elements
from lightning_tinykg.codecs.kernels import kernels_for
from lightning_tinykg.codecs.packing import PLANES, packed_size
from lightning_tinykg.codecs.planes import cut_planes
from lightning_tinykg.codecs.uniform import nearest_codes, spread

__all__ = ["ROW_BITS", "PackedRows", "row_chunks", "rows_nbytes"]

ROW_BITS = (*range(1, 9), 16, 32)
"""The widths a row can have; 32 is the floats as they are."""


def check_row_bits(bits: int) -> int:
    """Return `bits` if rows can have it.

    Raises:
        ValueError: If it is not one of 1 to 8, 16 and 32.
    """
    if not is_width(bits, ROW_BITS):
        raise ValueError(f"bits must be one of {', '.join(map(str, ROW_BITS))}, got {bits!r}")
    return bits


def rows_nbytes(rows: int, dim: int, bits: int, scales: int = 1) -> int:
    """What rows take when they are packed: `PackedRows.nbytes`, without encoding them.

    Args:
        rows: How many.
        dim: Elements of a row.
        bits: 1 to 8 or 16; or 32, which are the floats as they are, without scale and zero.
        scales: How many scales there are: 1, or one for each row, or one for each column.

    Example:
        >>> rows_nbytes(rows=10, dim=64, bits=3), rows_nbytes(rows=10, dim=64, bits=32)
        (248, 2560)
    """
    if bits == 32:
        return rows * dim * 4
    return rows * packed_size(dim, check_row_bits(bits)) + 8 * scales


def row_chunks(rows: int, dim: int, device: torch.device) -> Iterator[slice]:
    """Cut rows into runs that are cheap to work on.

    Example:
        >>> [(part.start, part.stop) for part in row_chunks(5, 50_000, torch.device("cpu"))]
        [(0, 2), (2, 4), (4, 5)]
    """
    step = max(1, chunk_elements(device) // max(dim, 1))
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


class PackedRows:
    r"""A matrix `[n, d]` as b-bit codes, `x = zero + scale * code`; or at 32 bits, as it is.

    Args:
        planes: uint8, each `[n, bytes of a row]`, the upper bits first. At 32 bits one, float32 `[n, d]`.
        scale: Float32, `[1]`, or `[n]` for a scale of each row, or `[1, d]` for one of each column. At 32 bits `[0]`.
        zero: Float32, the value of code 0; the shape of `scale`.
        bits: 1 to 8, 16 or 32.
        dim: Elements of a row, `d`.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If `bits` is no width, or a shape does not fit.

    Example:
        >>> x = torch.tensor([[0.0, 1.0, 2.0], [3.0, 3.0, 0.0]])
        >>> rows = PackedRows.encode(x, bits=2, scale=torch.ones(1), zero=torch.zeros(1))
        >>> rows, rows.decode(torch.tensor([1]))
        (PackedRows(2 x 3, 2 bits, 10 bytes), tensor([[3., 3., 0.]]))
    """

    def __init__(self, planes: Sequence[Tensor], scale: Tensor, zero: Tensor, bits: int, dim: int) -> None:
        widths = (32,) if bits == 32 else PLANES[check_row_bits(bits)]
        if len(planes) != len(widths):
            raise ValueError(f"planes of {bits} bits must be {len(widths)}, got {len(planes)}")
        rows = planes[0].size(0) if planes[0].dim() else 0
        dtype = torch.float32 if bits == 32 else torch.uint8
        for plane, width in zip(planes, widths, strict=True):
            wide = dim if bits == 32 else packed_size(dim, width)
            if plane.dtype != dtype:
                raise TypeError(f"planes of {bits} bits must be {dtype}, got {plane.dtype}")
            if plane.shape != (rows, wide):
                raise ValueError(
                    f"a plane of {width} bits must have shape [{rows}, {wide}] for dim {dim}, got {list(plane.shape)}"
                )
        shapes = ((0,),) if bits == 32 else ((1,), (rows,), (1, dim))
        for name, value in (("scale", scale), ("zero", zero)):
            if value.dtype != torch.float32:
                raise TypeError(f"{name} must be float32, got {value.dtype}")
            if value.shape not in shapes or value.shape != scale.shape:
                right = " or ".join(str(list(shape)) for shape in shapes)
                raise ValueError(f"{name} must have shape {right}, as scale has, got {list(value.shape)}")
        self.planes, self.scale, self.zero = tuple(planes), scale, zero
        self.bits, self.dim, self.rows = bits, dim, rows

    @classmethod
    def empty(
        cls, rows: int, dim: int, bits: int, scale: Tensor | None = None, zero: Tensor | None = None, device: Any = None
    ) -> PackedRows:
        """Room for rows, to be filled by `put`.

        Args:
            rows: How many.
            dim: Elements of a row.
            bits: 1 to 8, 16 or 32.
            scale: Float32 `[1]` or `[1, d]`, common to all; `None`: each row has its own, which `put` is given.
            zero: The shape of `scale`.
            device: Where.
        """
        if bits == 32:
            nothing = torch.empty(0, dtype=torch.float32, device=device)
            return cls([torch.zeros(rows, dim, dtype=torch.float32, device=device)], nothing, nothing, bits, dim)
        widths = PLANES[check_row_bits(bits)]
        planes = [torch.zeros(rows, packed_size(dim, width), dtype=torch.uint8, device=device) for width in widths]
        if scale is None or zero is None:
            scale, zero = (torch.full((rows,), value, dtype=torch.float32, device=device) for value in (1.0, 0.0))
        return cls(planes, scale.to(device), zero.to(device), bits, dim)

    @classmethod
    def encode(cls, x: Tensor, bits: int, scale: Tensor | None = None, zero: Tensor | None = None) -> PackedRows:
        """The nearest codes of a matrix, some rows at a time: nothing as large as `x` is made.

        Args:
            x: Floating point `[n, d]`, without NaN; what lies beyond the range takes the range's end.
            bits: 1 to 8, 16 or 32.
            scale: Float32, positive, `[1]`, `[n]` or `[1, d]`. `None` at 32 bits only.
            zero: Float32, the shape of `scale`.

        Returns:
            The codes, on the device of `x`.

        Raises:
            ValueError: If an argument does not fit, `x` has a NaN, or a scale is not positive.
        """
        _check_floats(x)
        if bits != 32 and (scale is None or zero is None):
            raise ValueError(f"scale and zero must be given at {bits} bits, got None")
        (rows, dim), shared = x.shape, scale is not None and scale.shape[:1] == (1,)
        packed = cls.empty(rows, dim, bits, scale if shared else None, zero if shared else None, x.device)
        packed.put(slice(None), x, None if shared else scale, None if shared else zero)
        return packed

    @torch.no_grad()
    def put(self, rows: Tensor | slice, x: Tensor, scale: Tensor | None = None, zero: Tensor | None = None) -> None:
        """Encode these rows.

        Args:
            rows: Which: int32 or int64 `[k]`, or a slice with step 1.
            x: Floating point `[k, d]`, without NaN.
            scale: Float32 `[k]`, positive, where each row has a scale of its own.
            zero: Float32 `[k]`, likewise.

        Raises:
            ValueError: If an argument does not fit, `x` has a NaN, or a scale is not positive.
        """
        _check_floats(x)
        index, start, count = self._which(rows)
        if x.shape != (count, self.dim):
            raise ValueError(f"x must have shape [{count}, {self.dim}], got {list(x.shape)}")
        if self.bits == 32:
            self.planes[0][slice(start, start + count) if index is None else index] = x.to(torch.float32)
            return
        if scale is not None and zero is not None:
            if self.scale.shape != (self.rows,) or scale.shape != (count,) or zero.shape != (count,):
                raise ValueError(
                    f"scale and zero must have shape [{count}] where each row has its own, got {list(scale.shape)} "
                    f"and {list(zero.shape)}"
                )
            for own, value in ((self.scale, scale), (self.zero, zero)):
                own[slice(start, start + count) if index is None else index] = value
        worst, usable = x.new_zeros((), dtype=torch.float32), x.new_ones((), dtype=torch.bool)
        for part in row_chunks(count, self.dim, x.device) if self.dim else ():
            which = slice(start + part.start, start + part.stop) if index is None else index[part]
            own_scale, own_zero = self._scales(which)
            usable = usable & ((own_scale > 0) & own_scale.isfinite() & own_zero.isfinite()).all()
            floats = x[part].float()
            codes = nearest_codes(floats, own_scale, own_zero, self.bits)
            # NaN if any is; one bit is a comparison, which is false for NaN: then look at the values themselves
            worst = torch.maximum(worst, (floats if self.bits == 1 else codes).amax())
            whole = codes.to(torch.int32 if self.bits > 8 else torch.uint8)
            for plane, packed in zip(self.planes, cut_planes(whole, self.bits), strict=True):
                plane[which] = packed
        if bool(worst.isnan() | ~usable):
            raise ValueError(
                "x must have no NaN, scale must be positive, and scale and zero finite: got what has no nearest code"
            )

    def _scales(self, which: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Scale and zero of these rows, `[1]`, `[1, d]` or one each."""
        if self.scale.size(0) == 1:
            return self.scale, self.zero
        return _rows_of(self.scale, which), _rows_of(self.zero, which)

    @torch.no_grad()
    def decode(self, rows: Tensor | slice | None = None, out: Tensor | None = None) -> Tensor:
        """The values that the codes stand for.

        Args:
            rows: Which, in this order: int32 or int64 `[k]`, or a slice with step 1. `None`: all.
            out: Where to put them, float32 `[k, d]`. `None` allocates it.

        Returns:
            Float32 `[k, d]`.

        Raises:
            ValueError: If `out` or the slice does not fit.
        """
        index, start, count = self._which(rows)
        if out is None:
            out = self.scale.new_empty(count, self.dim)
        elif out.shape != (count, self.dim) or out.dtype != torch.float32:
            raise ValueError(
                f"out must be float32 of shape [{count}, {self.dim}], got {out.dtype} of shape {list(out.shape)}"
            )
        if out.numel() == 0:
            return out
        for part in row_chunks(count, self.dim, out.device):
            which = slice(start + part.start, start + part.stop) if index is None else index[part]
            self._restore(which, out[part])
        return out

    def _which(self, rows: Tensor | slice | None) -> tuple[Tensor | None, int, int]:
        """Index, first row and count."""
        if isinstance(rows, Tensor):
            if rows.dim() != 1 or rows.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"rows must be int32 or int64 [k], got {rows.dtype} of shape {list(rows.shape)}")
            return rows, 0, rows.numel()
        start, stop, step = (rows or slice(None)).indices(self.rows)
        if step != 1:
            raise ValueError(f"rows must be a slice with step 1, got step {step}")
        return None, start, max(stop - start, 0)

    def _restore(self, which: Tensor | slice, out: Tensor) -> None:
        """Decode a few rows."""
        if self.bits == 32:
            out.copy_(_rows_of(self.planes[0], which))
            return
        target = out if out.is_contiguous() else out.new_empty(out.shape)
        kernels = kernels_for(out.device)
        planes = [_rows_of(plane, which) for plane in self.planes]
        scale, zero = self._scales(which)
        widths = PLANES[self.bits]
        if len(widths) == 1 and scale.dim() == 1:
            scale, zero = (value.expand(len(out)).contiguous() for value in (scale, zero))
            kernels.dequantize(planes[0], zero, scale, self.bits, target)
        else:
            # whole numbers below 2**24, which float32 adds exactly; then scaled and shifted, as `affine` does
            nothing, shift = torch.zeros(len(out), dtype=torch.float32, device=out.device), self.bits
            upper = target.new_empty(target.shape)
            for number, (plane, width) in enumerate(zip(planes, widths, strict=True)):
                shift -= width
                step = torch.full_like(nothing, float(2**shift))
                kernels.dequantize(plane, nothing, step, width, upper if number else target)
                if number:
                    target += upper
            target.mul_(spread(scale, target)).add_(spread(zero, target))
        if target is not out:
            out.copy_(target)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return sum(plane.nbytes for plane in self.planes) + self.scale.nbytes + self.zero.nbytes

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.scale.device

    def to(self, device: torch.device | str) -> PackedRows:
        """The same on a device."""
        planes = [plane.to(device) for plane in self.planes]
        return PackedRows(planes, self.scale.to(device), self.zero.to(device), self.bits, self.dim)

    def state(self) -> dict[str, Tensor]:
        """Plain tensors, from which with `bits` and `dim` `from_state` makes the same."""
        planes = {f"plane{number}": plane for number, plane in enumerate(self.planes)}
        return {**planes, "scale": self.scale, "zero": self.zero}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], bits: int, dim: int) -> PackedRows:
        """Undo `state`.

        Raises:
            TypeError: If a dtype is wrong.
            ValueError: If a tensor is missing, or there is one too many, or a shape does not fit.
        """
        count = 1 if bits == 32 else len(PLANES[check_row_bits(bits)])
        names = [f"plane{number}" for number in range(count)]
        if set(state) != {*names, "scale", "zero"}:
            raise ValueError(f"a state of {bits} bits must have {names}, scale and zero, got {sorted(state)}")
        return cls([state[name] for name in names], state["scale"], state["zero"], bits, dim)

    def __len__(self) -> int:
        return self.rows

    def __repr__(self) -> str:
        return f"PackedRows({self.rows} x {self.dim}, {self.bits} bits, {self.nbytes:,} bytes)"


def _check_floats(x: Tensor) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x must be a float matrix [n, d], got {x.dtype} of shape {list(x.shape)}")


def _rows_of(values: Tensor, which: Tensor | slice) -> Tensor:
    return values[which] if isinstance(which, slice) else values.index_select(0, which)
