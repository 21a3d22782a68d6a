r"""The arithmetic of the group quantizer in PyTorch's own ops: the definition, for any device.

The other kernels do the same in one pass, and give the same bits: same order of the operations, each rounded to
float32, none contracted with the next.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_tinykg.codecs.chunks import chunk_elements
from lightning_tinykg.codecs.cuts import NONZERO, Cut
from lightning_tinykg.codecs.noise import uniform
from lightning_tinykg.codecs.packing import BITS, pack_codes, unpack_codes

MIN_SCALE = 2.0**-100
"""The least scale: below it, ``1 / s`` overflows; a group this narrow is as good as constant."""


class Reference:
    """Eager ops, a pass over the memory each: right everywhere, fast nowhere."""

    name = "reference"
    dtypes: tuple[torch.dtype, ...] = ()
    """It works on float32 scratch."""

    def packs(self, bits: int) -> bool:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`."""
        return bits in BITS

    def quantize(
        self, x: Tensor, key: int, start: int, bits: int, codes: Tensor, zero: Tensor, scale: Tensor
    ) -> int | None:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`; ``x`` is changed."""
        count, group_size = x.shape
        top, packed = 2**bits - 1, bits if 8 % bits == 0 else 8
        low, high = torch.aminmax(x, dim=1)
        low.add_(0.0)  # of the two zeros, the positive one
        first = x[:, 0].clone()
        constant, metadata = low == high, zero.dtype
        steps = torch.full_like(low, top)  # by a number, a GPU divides as it multiplies by its reciprocal
        if metadata == torch.float32:
            low_end, step = low, ((high - low) / steps).clamp_(min=MIN_SCALE)
        else:
            low_end = _round_down(low)
            step = _round_up(((high - low_end) / steps).clamp_(min=MIN_SCALE))
        # the range may overflow where the values do not, hence the test on what would be restored;
        # rounding outward turns some NaNs into numbers
        exact = ~torch.isfinite(low_end + step * top) | low.isnan()
        x.masked_fill_(exact[:, None], 0.0)
        step = step.masked_fill(exact, 1.0)

        x.sub_(low_end.masked_fill(exact, 0.0)[:, None]).div_(step[:, None]).clamp_(0, top)
        level = x.floor()
        x.sub_(level)
        noise = uniform(key, start, count * group_size, x.device).view(count, group_size)
        padded_group = codes.shape[1] * 8 // packed  # a group whose codes do not fill whole bytes is padded to do so
        code = torch.empty(count, padded_group, dtype=codes.dtype, device=x.device)
        if padded_group > group_size:
            code[:, group_size:] = 0
        torch.add(level, noise < x, out=level)
        code[:, :group_size].copy_(level)
        if metadata == torch.bfloat16:
            low_end, step = _spread_constants(first, constant & ~exact, low_end, step, code)
        codes.copy_(pack_codes(code, packed))
        zero.copy_(low_end.masked_fill(exact, math.nan))
        scale.copy_(step)
        return None

    def dequantize(self, codes: Tensor, zero: Tensor, scale: Tensor, bits: int, out: Tensor) -> None:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`."""
        levels = codes if bits > 8 else unpack_codes(codes, bits)[:, : out.shape[1]]
        torch.mul(levels, scale.float()[:, None], out=out).add_(zero.float()[:, None])
        if scale.dtype == torch.bfloat16:
            _restore_constants(out, zero, scale, levels)

    def put_aside(self, x: Tensor, zero: Tensor) -> tuple[Tensor, Tensor] | None:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`."""
        return None

    def put_back(self, index: Tensor, value: Tensor, out: Tensor) -> bool:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`."""
        return False

    def gather(self, table: Tensor, index: Tensor, out: Tensor) -> None:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`."""
        # on a CPU the general kernel is slow, and to ask whether any index counts from the end is not
        if table.device.type == "cpu" and index.numel() and index.min() >= 0:
            torch.index_select(table, 0, index.view(-1), out=out.view(-1, *table.shape[1:]))
        else:
            torch.ops.aten.index.Tensor_out(table, [index], out=out)

    def pack(self, codes: Tensor, bits: int, out: Tensor) -> None:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`."""
        out.copy_(pack_codes(codes, bits))

    def pack_classes(self, x: Tensor, cut: Cut, out: Tensor) -> None:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`."""
        count, padded = x.shape[1], out.shape[1] * (8 // cut.bits)
        for rows, place in zip(_some_rows(x), _some_rows(out, count), strict=True):
            classes = _classes(rows, cut)
            if padded > count:
                classes = pad(classes, (0, padded - count))
            self.pack(classes, cut.bits, place)

    def pack_two_levels(self, x: Tensor, value: Tensor, out: Tensor) -> bool:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`."""
        self.pack_classes(x, NONZERO, out)
        return find_level(x, value)

    def unpack_levels(self, codes: Tensor, levels: Tensor, bits: int, out: Tensor) -> None:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`."""
        for rows, place in zip(_some_rows(codes, out.shape[1]), _some_rows(out), strict=True):
            which = unpack_codes(rows, bits)[:, : out.shape[1]].reshape(-1).int()
            torch.index_select(levels, 0, which, out=place.view(-1))


def _classes(x: Tensor, cut: Cut) -> Tensor:
    """The code of each element's class: uint8, of the shape of ``x``."""
    low, high = cut.ends(x.dtype, x.device)
    x = x.float() if x.itemsize == 2 else x  # the same numbers, and compared faster
    codes = torch.full(x.shape, cut.below, dtype=torch.uint8, device=x.device)

    def put(code: int, where: Tensor) -> None:
        codes.bitwise_xor_((codes ^ code).mul_(where.view(torch.uint8)))  # a hundredth of what masked_fill_ takes

    def beyond(end: float, strictly: bool, nan: bool) -> Tensor:
        if nan:  # of which no comparison holds
            return (x <= end if strictly else x < end).logical_not_()
        return x > end if strictly else x >= end

    if cut.within != cut.below:
        put(cut.within, beyond(low, cut.open, nan=cut.nan == cut.within))
    if cut.above != cut.within or cut.above != cut.below:
        put(cut.above, beyond(high, not cut.open, nan=cut.nan == cut.above))
    if cut.nan not in (cut.below, cut.within, cut.above):
        put(cut.nan, x != x)
    return codes


def find_level(x: Tensor, value: Tensor) -> bool:
    """What :meth:`~lightning_tinykg.codecs.kernels.Kernels.pack_two_levels` does besides packing.

    A GPU is not asked what it has found: that would be to wait for it.
    """
    low, high = torch.aminmax(x)
    found = torch.where(high > 0, high, low)
    value.copy_(torch.where((value == 0) & (found != 0), found, value))
    return x.device.type != "cpu" or all(bool(((part == 0) | (part == value)).all()) for part in _some_rows(x))


def _some_rows(tensor: Tensor, width: int | None = None) -> tuple[Tensor, ...]:
    """The rows, as many at a time as are cheap to work on if they have ``width`` elements."""
    limit = 6 * chunk_elements(tensor.device)  # a code takes less room than an element that is quantized
    rows: tuple[Tensor, ...] = tensor.split(max(1, limit // (width or max(1, tensor.shape[1]))))
    return rows


def _round_down(x: Tensor) -> Tensor:
    """The largest bfloat16 not above x, as float32."""
    word = x.view(torch.int32)
    # in sign and magnitude, down is towards zero for a positive number and away from it for a negative one
    away = (word >> 31) & 0xFFFF
    return ((word + away) & ~0xFFFF).view(torch.float32)


def _round_up(x: Tensor) -> Tensor:
    """The smallest bfloat16 not below x >= 0, as float32."""
    return ((x.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)


def _spread_constants(
    first: Tensor, constant: Tensor, zero: Tensor, scale: Tensor, code: Tensor
) -> tuple[Tensor, Tensor]:
    """Spread the 32 bits of a constant group over zero point, scale (marked by its sign bit) and codes."""
    zero, scale = zero.bfloat16(), scale.bfloat16()
    if constant.device.type == "cpu" and not constant.any():
        return zero, scale
    word = first.view(torch.int32)
    upper, lower = (word >> 16).to(torch.int16), word & 0xFFFF
    marked = ((lower >> 1) - (1 << 15)).to(torch.int16)
    zero = torch.where(constant, upper, zero.view(torch.int16)).view(torch.bfloat16)
    scale = torch.where(constant, marked, scale.view(torch.int16)).view(torch.bfloat16)
    code.copy_(torch.where(constant[:, None], (lower & 1).to(code.dtype)[:, None], code))
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
