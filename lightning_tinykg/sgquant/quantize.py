r"""Quantized and de-quantized again: what a tensor is worth once it has been stored, with a gradient to train through.

An element `x` becomes `zero + scale * code`, with the arithmetic of `lightning_tinykg.codecs.uniform`, which is that of
the packed form: what is simulated here is what packed codes decode to, to the last bit. Rows of different widths meet
as floats again ("re-matching" in SGQuant; Feng et al., arXiv 2007.05100).

Coefficients that sum to 1 over the edges of a receiver, as a softmax gives them, are about `1 / degree`: with one range
for all of them most would lie within the first step. They are quantized as multiples of that even share, `x * degree`,
and divided by the degree again, which the graph tells and which takes no byte; see `shares.py`.

The gradient is the straight-through estimator's with a clip mask: it passes from the least value of the range to its
greatest, and is 0 beyond, where moving `x` would change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_tinykg.codecs.uniform import affine, code_units, nearest_codes, spread
from lightning_tinykg.sgquant.ranges import range_of_rows, scale_of
from lightning_tinykg.sgquant.shares import Share

__all__ = ["Level", "fake_quantize"]


class Level(NamedTuple):
    """How the rows of a bucket are stored.

    Attributes:
        bits: 1 to 8 or 16; 32: as they are.
        low: Least value of the range, or of each channel's; `None`: each row has its own range.
        high: Its greatest value, or each channel's.
        share: Of rows that are edges: of what their values are quantized as multiples.
    """

    bits: int
    low: float | tuple[float, ...] | None = None
    high: float | tuple[float, ...] | None = None
    share: Share = ""

    @property
    def per_row(self) -> bool:
        """Whether each row has its own range."""
        return self.bits < 32 and self.low is None

    @property
    def top(self) -> int:
        """The greatest code."""
        return int(2**self.bits - 1)

    def scales(self, rows: int) -> int:
        """How many scales so many rows have: one, or one for each row or channel."""
        return rows if self.per_row else len(self.low) if isinstance(self.low, tuple) else 1

    def scale_and_zero(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero for float32 rows `[n, d]`: float32 `[1]` each, `[n]` or `[1, d]` by row or channel."""
        if self.low is None or self.high is None:
            return range_of_rows(x, self.top)
        low, high = (_constant(ends, x.device) for ends in (self.low, self.high))
        return scale_of(low, high, self.top), low


@lru_cache(maxsize=1024)
@torch.inference_mode(False)
def _constant(end: float | tuple[float, ...], device: torch.device) -> Tensor:
    """An end of a range, float32 `[1]`, or of each channel's, `[1, d]`: copied to a device once, which waits for it."""
    return torch.tensor([end], dtype=torch.float32).to(device)


def fake_quantize(
    x: Tensor,
    levels: Sequence[Level],
    bucket: Tensor | None = None,
    protected: Tensor | None = None,
    divisor: Tensor | None = None,
) -> Tensor:
    """Store the rows of a tensor and read them again.

    Args:
        x: Floating point `[n, ...]`; a row is all that has the same first index. Computed in float32.
        levels: One for all rows, or one for each bucket.
        bucket: int64 `[n]`, each row's; needed if there is more than one level.
        protected: bool `[n]`, rows that are left as they are.
        divisor: Float32 `[n]`, of each edge, see `divisors`; needed if levels have a share.

    Returns:
        The shape and dtype of `x`.

    Raises:
        ValueError: If there are several levels and no buckets, or levels with a share and no divisor.

    Example:
        >>> x = torch.tensor([[0.25, 0.9], [0.25, 0.9]], requires_grad=True)
        >>> y = fake_quantize(x, [Level(1, 0.0, 1.0), Level(2, 0.0, 0.6)], bucket=torch.tensor([0, 1]))
        >>> y
        tensor([[0.0000, 1.0000],
                [0.2000, 0.6000]], grad_fn=<FakeQuantizeBackward>)
        >>> y.sum().backward()
        >>> x.grad
        tensor([[1., 1.],
                [1., 0.]])
    """
    if x.numel() == 0 or all(level.bits == 32 for level in levels):
        return x
    if len(levels) > 1 and bucket is None:
        raise ValueError(f"bucket must be given for {len(levels)} levels, got None")
    if not any(level.share for level in levels):
        divisor = None
    elif divisor is None:
        raise ValueError("divisor must be given for levels with a share, got None")
    arguments = (x, tuple(levels), bucket, protected, divisor)
    result: Tensor = FakeQuantize.apply(*arguments)  # type: ignore[no-untyped-call]  # torch does not annotate it
    return result


class FakeQuantize(torch.autograd.Function):
    """`fake_quantize` with its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        levels: tuple[Level, ...],
        bucket: Tensor | None,
        protected: Tensor | None,
        divisor: Tensor | None,
    ) -> Tensor:
        """Quantize bucket by bucket; keep a mask for backward."""
        rows = whole = x.reshape(x.size(0), -1).float()
        wants_mask = ctx.needs_input_grad[0]
        if divisor is not None:
            if len(levels) > 1:  # what stays as it is stays so to the last bit
                divisor = divisor.where(_tables(levels, rows.device).has_share[bucket], 1.0)
            rows = rows * divisor[:, None]
        if len(levels) == 1:
            y, passes = _stored_alike(rows, levels[0], wants_mask)
        else:
            assert bucket is not None
            y, passes = _stored(rows, _tables(levels, rows.device), bucket, wants_mask)
        if divisor is not None:
            y = y / divisor[:, None]
        if protected is not None:
            y = torch.where(protected[:, None], whole, y)
            passes = None if passes is None else passes | protected[:, None]
        ctx.save_for_backward(passes)
        # not as a view, which whoever is given it could not change in place, as `relu_` does
        stored: Tensor = torch.ops.aten._unsafe_view(y.to(x.dtype), x.shape)
        return stored

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Straight through, where nothing was clipped."""
        (passes,) = ctx.saved_tensors
        return grad if passes is None else grad.where(passes.reshape(grad.shape), 0), None, None, None, None


def _stored_alike(rows: Tensor, level: Level, wants_mask: bool) -> tuple[Tensor, Tensor | None]:
    """What rows are worth once stored, and where the gradient passes; `None`: everywhere."""
    scale, zero = level.scale_and_zero(rows)
    y = affine(nearest_codes(rows, scale, zero, level.bits), scale, zero)
    if level.per_row or not wants_mask:
        return y, None  # nothing lies beyond a row's own range
    highest = torch.maximum(zero + scale * level.top, _constant(level.high, rows.device))
    return y, (rows >= spread(zero, rows)) & (rows <= spread(highest, rows))


class _Tables(NamedTuple):
    """The levels by bucket: a row takes its own by indexing, and no GPU is waited for.

    Of each bucket one value, or for `scale`, `zero` and `highest` one for each channel.
    """

    scale: Tensor
    zero: Tensor
    highest: Tensor
    top: Tensor
    is_sign: Tensor
    is_whole: Tensor
    has_share: Tensor
    per_row: bool
    any_sign: bool


@lru_cache(maxsize=1024)
@torch.inference_mode(False)
def _tables(levels: tuple[Level, ...], device: torch.device) -> _Tables:
    tops = torch.tensor([1 if level.bits == 32 else level.top for level in levels], dtype=torch.float32)
    low, high = (_by_bucket([getattr(level, end) for level in levels]) for end in ("low", "high"))
    is_sign = torch.tensor([level.bits == 1 for level in levels])
    is_whole = torch.tensor([level.bits == 32 for level in levels])
    has_share = torch.tensor([bool(level.share) for level in levels])
    top = tops if low.dim() == 1 else tops[:, None]
    scale = scale_of(low, high, top)
    highest = torch.maximum(low + scale * top, high)  # the greatest level may be rounded to less
    scale, low, highest, tops, is_sign, is_whole, has_share = (
        v.to(device) for v in (scale, low, highest, tops, is_sign, is_whole, has_share)
    )
    per_row, any_sign = any(level.per_row for level in levels), any(level.bits == 1 for level in levels)
    return _Tables(scale, low, highest, tops, is_sign, is_whole, has_share, per_row, any_sign)


def _by_bucket(ends: Sequence[float | tuple[float, ...] | None]) -> Tensor:
    """Ends of ranges, float32 `[buckets]` or `[buckets, channels]`; 0 where there is no range."""
    channels = next((len(end) for end in ends if isinstance(end, tuple)), None)
    nothing = 0.0 if channels is None else (0.0,) * channels
    return torch.tensor([nothing if end is None else end for end in ends], dtype=torch.float32)


def _stored(rows: Tensor, tables: _Tables, bucket: Tensor, wants_mask: bool) -> tuple[Tensor, Tensor | None]:
    """As `_stored_alike`, with a level for each row: what `nearest_codes` does, with bits that differ by row."""
    top = tables.top[bucket]
    scale, zero = range_of_rows(rows, top) if tables.per_row else (tables.scale[bucket], tables.zero[bucket])
    codes = code_units(rows, scale, zero).round().clamp(min=0).minimum(top[:, None])
    if tables.any_sign:
        codes = torch.where(tables.is_sign[bucket][:, None], nearest_codes(rows, scale, zero, bits=1), codes)
    is_whole = tables.is_whole[bucket][:, None]
    y = torch.where(is_whole, rows, affine(codes, scale, zero))
    if tables.per_row or not wants_mask:
        return y, None
    highest = tables.highest[bucket]
    return y, ((rows >= spread(zero, rows)) & (rows <= spread(highest, rows))) | is_whole
