r"""The stochastic-rounding group quantizer: 12 to 1 bits.

The quantizer of TinyKG (arXiv 2212.04540), by groups instead of rows: a group of consecutive elements shares a zero
point ``z`` and a scale ``s``; an element ``x`` becomes the code

.. math:: q = \lfloor p \rfloor + [u < p - \lfloor p \rfloor], \quad p = (x - z) / s, \quad u \sim U[0, 1)

and is restored as ``z + s q``, whose expectation is ``x``: unbiased, with a variance of at most ``s**2 / 4``.

What other quantizers of saved tensors get wrong, and this one does not:

- zero point and scale are rounded outward to bfloat16 **before** the codes are made, so they cover the group;
- codes are clamped at both ends before rounding, so that none can spill into its neighbour;
- the noise is compared with the fraction in float32, so what is exactly on a level stays there;
- a constant group is restored exactly: its 32 bits are spread over zero point (16), scale (15) and code (1);
- a group with a NaN, an infinity or a range beyond float32 is kept as it is, beside the codes;
- the last, short group is filled up with an element of its own, not with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from lightning_tinykg.codecs.chunks import chunk_elements, iterate_groups
from lightning_tinykg.codecs.exact_groups import constants_beyond_float32, keep_exact, restore_exact
from lightning_tinykg.codecs.kernels import Kernels, kernels_for
from lightning_tinykg.codecs.packing import code_dtype, packed_size
from lightning_tinykg.codecs.planes import pack_planes, unpack_planes

CODE_BITS = range(1, 13)
"""The bits of a code."""

FINE_BITS = 12
"""The finest: between 8 bits and the exact 32 there is a factor of four in bytes, and what decides has to go somewhere.
Beyond it, half of float32's bits, a code is hardly worth its work."""

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""What can be quantized."""

Allocate = Callable[..., Tensor]
"""Gives memory: called as ``torch.empty(numel, dtype=..., device=...)``."""


@dataclass(frozen=True, slots=True)
class AffineCode:
    """A tensor of ``numel`` elements in ``bits`` bits.

    Attributes:
        codes: uint8, shape ``[groups, bytes of a group]``.
        zero: zero point per group, bfloat16 or float32, shape ``[groups]``.
        scale: scale per group, likewise; in bfloat16 its sign bit marks a constant group.
        exact_index: int32, shape ``[k]``: the groups that are kept as they are.
        exact_value: the elements of these groups in the tensor's own dtype, shape ``[k, group_size]``.
        numel: elements of the tensor.
        dtype: dtype of the tensor.
        bits: 1 to 12.
        group_size: elements of a group.
    """

    codes: Tensor
    zero: Tensor
    scale: Tensor
    exact_index: Tensor
    exact_value: Tensor
    numel: int
    dtype: torch.dtype
    bits: int
    group_size: int

    @property
    def name(self) -> str:
        """The codec's name in a ledger."""
        return f"int{self.bits}"

    @property
    def nbytes(self) -> int:
        """All that is kept: codes, scales, zero points, exact groups."""
        return sum(t.nbytes for t in (self.codes, self.zero, self.scale, self.exact_index, self.exact_value))

    def decode(self, allocate: Allocate = torch.empty) -> Tensor:
        """Restore the tensor, flat: shape ``[numel]``, in its own dtype."""
        return dequantize(self, allocate(self.numel, dtype=self.dtype, device=self.codes.device))

    def rows(self, index: Tensor, width: int) -> Tensor | None:
        """Restore some rows of a table.

        Args:
            index: which, in ``[0, numel / width)``: shape ``[n]``.
            width: elements of a row.

        Returns:
            Shape ``[n, width]``; None where groups and rows don't fit into one another.

        Example:
            >>> table = torch.randn(1000, 64)
            >>> code = quantize(table, bits=8, key=0)
            >>> index = torch.tensor([7, 990])
            >>> torch.equal(code.rows(index, 64), code.decode().view(1000, 64)[index])
            True
        """
        size = self.group_size
        if (width % size and size % width) or self.numel % size:
            return None
        per_row, per_group = max(width // size, 1), max(size // width, 1)
        groups = (index // per_group)[:, None] * per_row + torch.arange(per_row, device=index.device)
        groups = groups.view(-1)
        some = replace(
            self,
            codes=self.codes[groups],
            zero=self.zero[groups],
            scale=self.scale[groups],
            numel=groups.numel() * size,
            exact_index=self.exact_index[:0],
        )
        restored = dequantize(some)
        if self.exact_index.numel():
            kept, places = self.exact_index.sort()
            near = torch.searchsorted(kept, groups).clamp_(max=len(kept) - 1)
            exact = self.exact_value.index_select(0, places.index_select(0, near))
            is_kept = (kept.index_select(0, near) == groups)[:, None]
            restored = torch.where(is_kept, exact, restored.view(-1, size))
        rows = restored.view(index.numel(), -1, width)
        if per_group == 1:
            return rows.view(-1, width)
        return rows[torch.arange(index.numel(), device=index.device), index % per_group]


@lru_cache(maxsize=4096)
def quantized_size(numel: int, bits: int, group_size: int, metadata: torch.dtype = torch.bfloat16) -> int:
    """The bytes of an :class:`AffineCode`, were no group of it kept exactly.

    Example:
        >>> quantized_size(64 * 1000, bits=2, group_size=64)
        20000
    """
    groups = -(-numel // group_size)
    return groups * (packed_size(group_size, bits) + 2 * metadata.itemsize)


def quantize(
    tensor: Tensor,
    bits: int,
    *,
    key: int,
    group_size: int = 64,
    metadata: torch.dtype = torch.bfloat16,
    through: Callable[[Tensor], Tensor] | None = None,
) -> AffineCode:
    """Quantize a tensor with stochastic rounding.

    It works in chunks: besides the code itself, it needs at most a quarter of the tensor's memory (or half a MiB
    where that is more). Where the kernels don't pack codes of a width that does not divide a byte, each is a byte, or
    two, until it is cut into planes: as much again at 3, 5, 6 and 7 bits, twice that at 9 to 12.

    Args:
        tensor: float32, float16, bfloat16 or float64, any shape and strides; read in logical (row-major) order.
        bits: 1 to 12.
        key: 64 bits of key for the noise, from :func:`~lightning_tinykg.codecs.noise.make_key`.
        group_size: elements that share a scale and a zero point.
        metadata: dtype of scale and zero point: bfloat16, or float32 as in the paper.
        through: a function of each element, of whose results the code is made, a chunk at a time.

    Returns:
        The code; :func:`dequantize` restores the tensor, flat.

    Raises:
        ValueError: if ``bits``, ``group_size``, ``metadata`` or the tensor's dtype can't be used.

    Example:
        >>> x = torch.linspace(-1, 1, 1000)
        >>> code = quantize(x, bits=8, key=0)
        >>> code.nbytes < x.nbytes / 3, bool((dequantize(code) - x).abs().max() < 2e-3)
        (True, True)
    """
    if type(bits) is not int or bits not in CODE_BITS:
        raise ValueError(f"bits must be one of 1 to 12, got {bits!r}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"tensor must be one of {FLOAT_DTYPES}, got {tensor.dtype}")
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")
    if metadata not in (torch.bfloat16, torch.float32):
        raise ValueError(f"metadata must be torch.bfloat16 or torch.float32, got {metadata}")
    device, numel = tensor.device, tensor.numel()
    if torch.compiler.is_compiling():
        tensor = tensor if through is None else through(tensor)
        signed = key - (1 << 64) if key >= 1 << 63 else key
        codes, zero, scale, index, value = torch.ops.tinykg.quantize(tensor, bits, signed, group_size, metadata)
        return AffineCode(codes, zero, scale, index, value, numel, tensor.dtype, bits, group_size)
    groups = -(-numel // group_size)
    codes = torch.empty(groups, packed_size(group_size, bits), dtype=torch.uint8, device=device)
    zero = torch.empty(groups, dtype=metadata, device=device)
    scale = torch.empty(groups, dtype=metadata, device=device)
    exact_index: list[Tensor] = []
    exact_value: list[Tensor] = []
    kernels = kernels_for(device)
    packs = kernels.packs(bits)

    for start, chunk, rows in iterate_groups(tensor, group_size, kernels.dtypes, through):
        first, count = start // group_size, rows.shape[0]
        parts = (
            (codes, zero, scale) if count == groups else tuple(t[first : first + count] for t in (codes, zero, scale))
        )
        beyond = constants_beyond_float32(chunk, rows) if chunk.dtype == torch.float64 else None
        place = parts[0] if packs else torch.empty(rows.shape, dtype=code_dtype(bits), device=device)
        exact = kernels.quantize(rows, key, start, bits, place, *parts[1:])  # which may use the rows as scratch
        if not packs:
            pack_planes(place, bits, parts[0])
        if beyond is not None:
            parts[0].masked_fill_(beyond[:, None], 0)
            parts[1].masked_fill_(beyond, math.nan)
            parts[2].masked_fill_(beyond, 1.0)
        elif exact == 0:
            continue
        elif chunk.dtype == rows.dtype and (aside := kernels.put_aside(rows, parts[1])) is not None:
            exact_index.append(torch.where(aside[0] < 0, aside[0], aside[0] + first) if first else aside[0])
            exact_value.append(aside[1])
            continue
        keep_exact(parts[1].isnan(), chunk, group_size, first, exact_index, exact_value)

    return AffineCode(
        codes,
        zero,
        scale,
        _joined(exact_index) if exact_index else torch.empty(0, dtype=torch.int32, device=device),
        _joined(exact_value) if exact_value else torch.empty(0, group_size, dtype=tensor.dtype, device=device),
        numel,
        tensor.dtype,
        bits,
        group_size,
    )


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def dequantize(code: AffineCode, out: Tensor | None = None) -> Tensor:
    """Restore what :func:`quantize` made a code of.

    Args:
        code: the code.
        out: where to put the elements: contiguous, shape ``[numel]``, dtype and device of the tensor. None allocates
            it; fresh memory can cost more than all of the arithmetic.

    Returns:
        Shape ``[numel]``, in the dtype and on the device of the tensor: ``out``, if that is given.

    Raises:
        ValueError: if ``out`` can't hold it.

    Example:
        >>> dequantize(quantize(torch.full((3, 50), 0.1), bits=1, key=0)).unique()
        tensor([0.1000])
    """
    device, dtype, group_size = code.codes.device, code.dtype, code.group_size
    if torch.compiler.is_compiling():
        tensors = (code.codes, code.zero, code.scale, code.exact_index, code.exact_value)
        restored: Tensor = torch.ops.tinykg.dequantize(*tensors, code.numel, code.bits)
        return restored if out is None else out.copy_(restored)
    if out is None:
        out = torch.empty(code.numel, dtype=dtype, device=device)
    elif out.shape != (code.numel,) or out.dtype != dtype or out.device != device or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous, of shape [{code.numel}], {dtype} and on {device}, "
            f"got shape {list(out.shape)}, {out.dtype}, on {out.device}, strides {out.stride()}"
        )
    kernels = kernels_for(device)
    unpacks = kernels.packs(code.bits)
    reads = dtype in kernels.dtypes or dtype == torch.float32
    limit = code.numel if unpacks and dtype in kernels.dtypes else chunk_elements(device)
    whole = code.numel // group_size
    if unpacks and dtype in kernels.dtypes and whole == code.codes.shape[0]:  # mostly
        kernels.dequantize(code.codes, code.zero, code.scale, code.bits, out.view(-1, group_size))
        return _with_exact(out, code, kernels)
    ends = [*range(0, whole, max(1, limit // group_size)), whole, code.codes.shape[0]]  # the last may be a short group
    for first, last in pairwise(ends):
        if first == last:
            continue
        part, place = slice(first, last), out[first * group_size : last * group_size]
        numel = (last - first) * group_size
        direct = reads and place.numel() == numel
        x = place if direct else torch.empty(numel, dtype=dtype if reads else torch.float32, device=device)
        codes = code.codes[part] if unpacks else unpack_planes(code.codes[part], code.bits, group_size)
        bits = code.bits if unpacks else 8 * codes.itemsize
        kernels.dequantize(codes, code.zero[part], code.scale[part], bits, x.view(-1, group_size))
        if not direct:
            if dtype.itemsize == 2:  # rounded outward, the ends may lie beyond what a narrow dtype holds
                finfo = torch.finfo(dtype)
                x.clamp_(finfo.min, finfo.max)
            place.copy_(x[: place.numel()])
    return _with_exact(out, code, kernels)


def _with_exact(out: Tensor, code: AffineCode, kernels: Kernels) -> Tensor:
    """What was restored, with the groups that were kept as they are."""
    index, value = code.exact_index, code.exact_value
    if index.numel() and not kernels.put_back(index, value, out):
        restore_exact(out, index, value, code.codes.shape[0])
    return out
