r"""The arithmetic of the group quantizer in PyTorch's own ops: the definition, for any device.

The other kernels do the same in one pass, and give the same bits: same order of the operations, each rounded to
float32, none contracted with the next.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_tinykg.codecs.noise import uniform
from lightning_tinykg.codecs.packing import pack_codes, unpack_codes

MIN_SCALE = 2.0**-100
"""The least scale: below it, ``1 / s`` overflows; a group this narrow is as good as constant."""


class Reference:
    """Eager ops, a pass over the memory each: right everywhere, fast nowhere."""

    name = "reference"
    dtypes: tuple[torch.dtype, ...] = ()
    """It works on float32 scratch."""

    def quantize(
        self, x: Tensor, key: int, start: int, bits: int, codes: Tensor, zero: Tensor, scale: Tensor
    ) -> int | None:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`; ``x`` is changed."""
        count, group_size = x.shape
        low, high = torch.aminmax(x, dim=1)
        low.add_(0.0)  # of the two zeros, the positive one
        first = x[:, 0].clone()
        constant, metadata = low == high, zero.dtype
        if metadata == torch.float32:
            low_end, step = low, ((high - low) / (2**bits - 1)).clamp_(min=MIN_SCALE)
        else:
            low_end = _round_down(low)
            step = _round_up(((high - low_end) / (2**bits - 1)).clamp_(min=MIN_SCALE))
        # the range may overflow where the values do not, hence the test on what would be restored;
        # rounding outward turns some NaNs into numbers
        exact = ~torch.isfinite(low_end + step * (2**bits - 1)) | low.isnan()
        x.masked_fill_(exact[:, None], 0.0)
        step = step.masked_fill(exact, 1.0)

        x.sub_(low_end.masked_fill(exact, 0.0)[:, None]).div_(step[:, None]).clamp_(0, 2**bits - 1)
        level = x.floor()
        x.sub_(level)
        noise = uniform(key, start, count * group_size, x.device).view(count, group_size)
        padded_group = codes.shape[1] * 8 // bits  # a group whose codes do not fill whole bytes is padded to do so
        code = torch.empty(count, padded_group, dtype=torch.uint8, device=x.device)
        if padded_group > group_size:
            code[:, group_size:] = 0
        torch.add(level, noise < x, out=level)
        code[:, :group_size].copy_(level)
        if metadata == torch.bfloat16:
            low_end, step = _spread_constants(first, constant & ~exact, low_end, step, code)
        codes.copy_(pack_codes(code, bits))
        zero.copy_(low_end.masked_fill(exact, math.nan))
        scale.copy_(step)
        return None

    def dequantize(self, codes: Tensor, zero: Tensor, scale: Tensor, bits: int, out: Tensor) -> None:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`."""
        levels = unpack_codes(codes, bits)[:, : out.shape[1]]
        torch.mul(levels, scale.float()[:, None], out=out).add_(zero.float()[:, None])
        if scale.dtype == torch.bfloat16:
            _restore_constants(out, zero, scale, levels)

    def pack(self, codes: Tensor, bits: int, out: Tensor) -> None:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`."""
        out.copy_(pack_codes(codes, bits))

    def unpack_levels(self, codes: Tensor, levels: Tensor, bits: int, out: Tensor) -> None:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`."""
        torch.index_select(levels, 0, unpack_codes(codes, bits).view(-1).int(), out=out.view(-1))


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
