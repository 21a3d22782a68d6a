r"""The stochastic-rounding group quantizer: INT8, INT4, INT2, INT1.

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
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_tinykg.codecs.noise import uniform
from lightning_tinykg.codecs.packing import check_bits, pack_codes, packed_size, unpack_codes

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""What can be quantized."""

MIN_SCALE = 2.0**-100
"""The least scale: below it, ``1 / s`` overflows; a group this narrow is as good as constant."""

_SCRATCH_BYTES_PER_ELEMENT = 24
_CHUNK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 23}


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
        bits: 1, 2, 4 or 8.
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

    def decode(self) -> Tensor:
        """Restore the tensor, flat: shape ``[numel]``, in its own dtype."""
        return dequantize(self)


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
) -> AffineCode:
    """Quantize a tensor with stochastic rounding.

    It works in chunks: besides the code itself, it needs at most a quarter of the tensor's memory (or half a MiB
    where that is more).

    Args:
        tensor: float32, float16, bfloat16 or float64, any shape and strides; read in logical (row-major) order.
        bits: 1, 2, 4 or 8.
        key: 64 bits of key for the noise, from :func:`~lightning_tinykg.codecs.noise.make_key`.
        group_size: elements that share a scale and a zero point.
        metadata: dtype of scale and zero point: bfloat16, or float32 as in the paper.

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
    check_bits(bits)
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"tensor must be one of {FLOAT_DTYPES}, got {tensor.dtype}")
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")
    if metadata not in (torch.bfloat16, torch.float32):
        raise ValueError(f"metadata must be torch.bfloat16 or torch.float32, got {metadata}")
    device, numel = tensor.device, tensor.numel()
    groups = -(-numel // group_size)
    group_bytes = packed_size(group_size, bits)
    padded_group = group_bytes * 8 // bits  # a group whose codes do not fill whole bytes is padded to do so
    codes = torch.empty(groups, group_bytes, dtype=torch.uint8, device=device)
    zero = torch.empty(groups, dtype=metadata, device=device)
    scale = torch.empty(groups, dtype=metadata, device=device)
    exact_index: list[Tensor] = []
    exact_value: list[Tensor] = []

    for start, chunk in iterate_chunks(tensor, group_size):
        first, count = start // group_size, -(-chunk.numel() // group_size)
        x = torch.empty(count * group_size, dtype=torch.float32, device=device)
        x[: chunk.numel()].view(chunk.shape).copy_(chunk)
        x[chunk.numel() :] = x[chunk.numel() - 1]  # the short group is filled up with an element of its own
        x = x.view(count, group_size)
        low, high = torch.aminmax(x, dim=1)
        chunk_zero, chunk_scale, constant = _zero_and_scale(low, high, bits, metadata)
        # the range may overflow where the values do not, hence the test on what would be restored
        exact = ~torch.isfinite(chunk_zero + chunk_scale * (2**bits - 1))
        exact |= low.isnan()  # rounding outward turns some NaNs into numbers
        if chunk.dtype == torch.float64:
            firsts = chunk.reshape(-1)[::group_size]
            exact |= constant & (firsts != low)  # a constant that float32 does not hold
        _keep_exact(x, exact, chunk, first, exact_index, exact_value)
        chunk_scale = chunk_scale.masked_fill(exact, 1.0)

        x.sub_(chunk_zero.masked_fill(exact, 0.0)[:, None]).div_(chunk_scale[:, None]).clamp_(0, 2**bits - 1)
        level = x.floor()
        x.sub_(level)
        noise = uniform(key, start, count * group_size, device).view(count, group_size)
        code = torch.empty(count, padded_group, dtype=torch.uint8, device=device)
        if padded_group > group_size:
            code[:, group_size:] = 0
        torch.add(level, noise < x, out=level)
        code[:, :group_size].copy_(level)
        if metadata == torch.bfloat16:
            chunk_zero, chunk_scale = _spread_constants(low, constant & ~exact, chunk_zero, chunk_scale, code)
        codes[first : first + count] = pack_codes(code, bits)
        zero[first : first + count] = chunk_zero.masked_fill(exact, math.nan)
        scale[first : first + count] = chunk_scale

    return AffineCode(
        codes,
        zero,
        scale,
        torch.cat(exact_index) if exact_index else torch.empty(0, dtype=torch.int32, device=device),
        torch.cat(exact_value) if exact_value else tensor.new_empty(0, group_size),
        numel,
        tensor.dtype,
        bits,
        group_size,
    )


def dequantize(code: AffineCode) -> Tensor:
    """Restore what :func:`quantize` made a code of.

    Args:
        code: the code.

    Returns:
        Shape ``[numel]``, in the dtype and on the device of the tensor.

    Example:
        >>> dequantize(quantize(torch.full((3, 50), 0.1), bits=1, key=0)).unique()
        tensor([0.1000])
    """
    groups = code.codes.shape[0]
    group_size = code.group_size
    out = torch.empty(groups * group_size, dtype=code.dtype, device=code.codes.device)
    rows = out.view(groups, group_size)
    finfo = torch.finfo(code.dtype)
    step = max(1, _CHUNK_ELEMENTS.get(out.device.type, 1 << 17) // group_size)
    for first in range(0, groups, step):
        part = slice(first, first + step)
        codes = unpack_codes(code.codes[part], code.bits)[:, :group_size]
        zero, scale = code.zero[part].float(), code.scale[part].float()
        if code.dtype == torch.float32:
            x = torch.mul(codes, scale[:, None], out=rows[part]).add_(zero[:, None])
        else:
            x = torch.mul(codes, scale[:, None]).add_(zero[:, None])
            if code.dtype.itemsize == 2:  # rounded outward, the ends may lie beyond what a narrow dtype holds
                x.clamp_(finfo.min, finfo.max)
        if code.scale.dtype == torch.bfloat16:
            _restore_constants(x, code.zero[part], code.scale[part], codes)
        if code.dtype != torch.float32:
            rows[part] = x
    if code.exact_index.numel():
        rows.index_copy_(0, code.exact_index.long(), code.exact_value)
    return out[: code.numel]


def iterate_chunks(tensor: Tensor, multiple: int) -> Iterator[tuple[int, Tensor]]:
    """Cut a tensor into pieces of ``multiple`` elements' multiples that are cheap to copy, in row-major order.

    Args:
        tensor: any shape and strides.
        multiple: each piece but the last has a multiple of this many elements.

    Yields:
        The position of the piece's first element and the piece, a view of the tensor.
    """
    numel = tensor.numel()
    if numel == 0:
        return
    limit = min(
        _CHUNK_ELEMENTS.get(tensor.device.type, 1 << 17),
        max(tensor.nbytes // 4, 1 << 19) // _SCRATCH_BYTES_PER_ELEMENT,
    )
    if tensor.is_contiguous():
        rows, row = tensor.view(-1), 1
    else:
        rows, row = tensor, numel // tensor.shape[0]
    # the fewest rows that hold a multiple of `multiple` elements
    unit = multiple // math.gcd(multiple, row)
    if row * unit > max(limit, multiple) and row > 1:
        if row % multiple == 0:
            for i, part in enumerate(tensor):
                yield from ((i * row + start, piece) for start, piece in iterate_chunks(part, multiple))
            return
        rows, row, unit = tensor.contiguous().view(-1), 1, multiple
    step = max(1, limit // (row * unit)) * unit
    for first in range(0, rows.shape[0], step):
        yield first * row, rows[first : first + step]


def _zero_and_scale(low: Tensor, high: Tensor, bits: int, metadata: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Zero point and scale in float32, already rounded outward to ``metadata``, and which groups are constant."""
    constant = low == high
    if metadata == torch.float32:
        return low, ((high - low) / (2**bits - 1)).clamp_(min=MIN_SCALE), constant
    zero = _round_down(low)
    scale = _round_up(((high - zero) / (2**bits - 1)).clamp_(min=MIN_SCALE))
    return zero, scale, constant


def _round_down(x: Tensor) -> Tensor:
    """The largest bfloat16 not above x, as float32."""
    word = x.view(torch.int32)
    # in sign and magnitude, down is towards zero for a positive number and away from it for a negative one
    away = (word >> 31) & 0xFFFF
    return ((word + away) & ~0xFFFF).view(torch.float32)


def _round_up(x: Tensor) -> Tensor:
    """The smallest bfloat16 not below x >= 0, as float32."""
    return ((x.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)


def _keep_exact(x: Tensor, exact: Tensor, chunk: Tensor, first: int, index: list[Tensor], value: list[Tensor]) -> None:
    """Put the groups that can't be quantized aside, and zeros in their place.

    On the CPU there are as many places as such groups. A GPU can't be asked how many without waiting for it: there
    are ``1 + groups / 1024`` places, unused ones hold group 0, and groups beyond them restore as NaN, which is loud.
    """
    count, group_size = x.shape
    if x.device.type == "cpu":
        which = exact.nonzero().view(-1)
        if not which.numel():
            return
    else:
        which = torch.nonzero_static(exact, size=1 + count // 1024, fill_value=0).view(-1)
    rows = torch.empty(count * group_size, dtype=chunk.dtype, device=chunk.device)
    rows[: chunk.numel()].view(chunk.shape).copy_(chunk)
    rows[chunk.numel() :] = 0
    index.append((which + first).to(torch.int32))
    value.append(rows.view(count, group_size)[which])
    x.masked_fill_(exact[:, None], 0.0)


def _spread_constants(
    low: Tensor, constant: Tensor, zero: Tensor, scale: Tensor, code: Tensor
) -> tuple[Tensor, Tensor]:
    """Spread the 32 bits of a constant group over zero point, scale (marked by its sign bit) and codes."""
    zero, scale = zero.bfloat16(), scale.bfloat16()
    if constant.device.type == "cpu" and not constant.any():
        return zero, scale
    word = low.view(torch.int32)
    upper, lower = (word >> 16).to(torch.int16), word & 0xFFFF
    marked = ((lower >> 1) - (1 << 15)).to(torch.int16)
    zero = torch.where(constant, upper, zero.view(torch.int16)).view(torch.bfloat16)
    scale = torch.where(constant, marked, scale.view(torch.int16)).view(torch.bfloat16)
    code.copy_(torch.where(constant[:, None], (lower & 1).to(torch.uint8)[:, None], code))
    return zero, scale


def _restore_constants(x: Tensor, zero: Tensor, scale: Tensor, codes: Tensor) -> None:
    """Undo :func:`_spread_constants`, in place."""
    marked = scale.view(torch.int16)
    constant = marked < 0
    if constant.device.type == "cpu" and not constant.any():
        return
    lower = (marked.to(torch.int32) & 0x7FFF) << 1 | (codes[:, 0].to(torch.int32) & 1)
    word = (zero.view(torch.int16).to(torch.int32) << 16) | lower
    x.copy_(torch.where(constant[:, None], word.view(torch.float32)[:, None], x))
