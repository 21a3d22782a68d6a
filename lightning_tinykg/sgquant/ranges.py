r"""Which range a place's levels span: from calibration, of all or of each channel, or from each row as it is encoded.

With the range `low .. high` a code of `b` bits stands for `low + scale * code`, `scale = (high - low) / (2**b - 1)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_tinykg.arguments import check_choice, check_number
from lightning_tinykg.codecs.uniform import affine, nearest_codes

__all__ = ["Observed", "Range", "least_error", "range_of_rows", "scale_of"]

Range = Literal["minmax", "percentile", "ema", "mse"]

_SAMPLE = 1 << 20
"""Values that percentiles are taken of, evenly spaced: sorting more would change nothing that is of use."""

_QUANTILES = 513
"""Values that a distribution is known by, where the range is to lose the least of it. Odd: there is a middle."""

_MOMENTUM = 0.9
"""Weight of the past in the moving average, batch by batch of the calibration."""


def scale_of(low: Tensor, high: Tensor, top: int | Tensor) -> Tensor:
    """Size of a step; 1 for a constant, which is then exact, since its code is 0.

    Args:
        low: Float32, any shape.
        high: Float32, the same shape, nowhere below `low`.
        top: The greatest code, `2**bits - 1`; or of each value its own, float32, broadcastable to `low`.

    Returns:
        Float32, positive, the same shape.

    Example:
        >>> scale_of(torch.tensor([0.0, 2.0]), torch.tensor([3.0, 2.0]), top=3)
        tensor([1., 1.])
    """
    # halves: the span of float32's whole range would overflow
    scale: Tensor = (high / 2 - low / 2) / (top / 2)
    return scale.where(scale > 0, 1.0)


def range_of_rows(x: Tensor, top: int | Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero of each row, from its own least and greatest value.

    Args:
        x: Float32 `[n, d]`.
        top: The greatest code, `2**bits - 1`; or each row's own, float32 `[n]`.

    Returns:
        Scale and zero, float32 `[n]` each.

    Example:
        >>> range_of_rows(torch.tensor([[0.0, 3.0], [5.0, 5.0]]), top=3)
        (tensor([1., 1.]), tensor([0., 5.]))
    """
    if x.size(1) == 0:
        return x.new_ones(x.size(0)), x.new_zeros(x.size(0))
    low, high = x.aminmax(dim=1)
    return scale_of(low, high, top), low


def least_error(values: Tensor, bits: int, weights: Tensor | None = None) -> tuple[float, float]:
    """The range in which rounding to `2**bits` levels loses the least: `argmin sum w (x - Q(x))^2`.

    A fixed grid is tried, each end at the middle value and a share `2^0, 2^-1, ..., 2^-16` of the way to the outermost
    one, since what is best at few bits may be a small share of a range with outliers; then twice a finer grid around
    the best. Of ranges that lose the same the widest is taken.

    Args:
        values: Float `[n]`, ascending, at least one.
        bits: The width.
        weights: What each counts, `[n]`; `None`: all the same.

    Returns:
        The least and the greatest level.

    Example:
        >>> least_error(torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0, 1.0]), bits=1)
        (-1.0, 1.0)
    """
    values = values.double()
    middle = values[len(values) // 2]
    unit = (values[-1] - values[0]).clamp(min=torch.finfo(torch.float64).tiny)
    values = (values - middle) / unit  # the square of a great value would overflow, that of a small one be 0
    best = values.new_ones(2)
    for exponents in (
        torch.arange(0, -17, -1),
        torch.arange(8, -9, -1).double() / 8,
        torch.arange(8, -9, -1).double() / 64,
    ):
        shares = (best[:, None] * torch.exp2(exponents)).clamp(max=1)
        pairs = torch.cartesian_prod(values[0] * shares[0], values[-1] * shares[1])
        zero, scale = pairs[:, 0], scale_of(pairs[:, 0], pairs[:, 1], 2**bits - 1)
        rows = values.expand(len(pairs), -1)
        error = (rows - affine(nearest_codes(rows, scale, zero, bits), scale, zero)).square()
        lost = error.sum(dim=1) if weights is None else error @ weights.double()
        found = int(lost.argmin())
        best = torch.stack([shares[0][found // len(exponents)], shares[1][found % len(exponents)]])
    return float(middle + unit * values[0] * best[0]), float(middle + unit * values[-1] * best[1])


class Observed:
    """The range of what was seen at a place: in each bucket, in all of them, and of each channel in all of them.

    Args:
        buckets: How many there are.
        kind: `"minmax"`: the least and the greatest value; `"percentile"`: these without the outermost share, averaged
            over the batches; `"ema"`: the least and greatest of each batch, as a moving average; `"mse"`: what loses
            the least at each width, see `least_error`, of the batches' quantiles.
        percentile: Share of the values that lie below the range's upper end, and above its lower.
        channels: Elements of a row, where each is to have a range of its own; else 0.

    Raises:
        ValueError: If `kind` or `percentile` have a value they can't have.

    Example:
        >>> observed = Observed(buckets=2)
        >>> observed.add(torch.tensor([[0.0, 1.0], [5.0, 9.0]]), torch.tensor([0, 1]))
        >>> observed.low, observed.high    # of bucket 0, bucket 1, both
        (tensor([0., 5., 0.]), tensor([1., 9., 9.]))
    """

    def __init__(self, buckets: int, kind: Range = "minmax", percentile: float = 0.999, channels: int = 0) -> None:
        check_choice("range", kind, get_args(Range))
        check_number("percentile", percentile, above=0.5, most=1)
        self.kind, self.percentile, self.buckets = kind, percentile, buckets
        ranges = buckets + 1 + channels  # of each bucket, of all, of each channel
        self.low, self.high = (torch.full((ranges,), end, dtype=torch.float32) for end in (torch.inf, -torch.inf))
        self.seen = [0] * ranges  # batches that had any such row
        self.quantiles = torch.zeros(
            ranges, _QUANTILES if kind == "mse" else 0, dtype=torch.float32
        )  # mean over the batches
        self._fitted: dict[tuple[int, int], tuple[float, float]] = {}

    def add(self, x: Tensor, bucket: Tensor | None, weight: Tensor | None = None) -> None:
        """Look at a batch.

        Args:
            x: Float `[n, d]`.
            bucket: int64 `[n]`; `None`: all in the first.
            weight: Float `[n]`, what each row counts for `"mse"`; `None`: all the same.

        Raises:
            ValueError: If a value is not finite.
        """
        weight = x.new_empty(len(x), 0) if weight is None else weight[:, None].expand_as(x)
        buckets = [slice(None)] if bucket is None else [bucket == number for number in range(self.buckets)]
        channels = x.unbind(1) if self.has_channels else ()
        parts = [*((x[rows], weight[rows]) for rows in buckets), (x, weight), *((x, weight[:, :0]) for x in channels)]
        for index, (part, counts) in enumerate(parts):
            if part.numel():
                part = part.detach().float()
                self._add_to(index, *self._ends(part))
                if self.kind == "mse":
                    self.quantiles[index] += (_quantiles(part, counts).cpu() - self.quantiles[index]) / self.seen[index]
        self._fitted.clear()

    def _ends(self, x: Tensor) -> tuple[float, float]:
        low, high = x.aminmax()
        if not bool(low.isfinite() & high.isfinite()):
            raise ValueError("values must be finite to be quantized, got NaN or infinity")
        if self.kind == "percentile" and self.percentile < 1:
            values = _thinned(x)
            cut = int((values.numel() - 1) * (1 - self.percentile))
            low, high = values[cut], values[values.numel() - 1 - cut]
        return float(low), float(high)

    def _add_to(self, index: int, low: float, high: float) -> None:
        first = self.seen[index] == 0
        self.seen[index] += 1
        if first or self.kind in ("minmax", "mse"):
            low, high = min(low, float(self.low[index])), max(high, float(self.high[index]))
        else:
            past = _MOMENTUM if self.kind == "ema" else 1 - 1 / self.seen[index]
            low = past * float(self.low[index]) + (1 - past) * low
            high = past * float(self.high[index]) + (1 - past) * high
        self.low[index], self.high[index] = low, high

    def agree(self, ranks: Sequence[Observed]) -> None:
        """Take the widest of all ranks' ranges.

        Args:
            ranks: What each saw at this place, this one among them.

        Example:
            >>> one, other = Observed(buckets=1, kind="minmax"), Observed(buckets=1, kind="minmax")
            >>> one.add(torch.tensor([[0.0, 1.0]]), None)
            >>> other.add(torch.tensor([[-1.0, 0.5]]), None)
            >>> one.agree([one, other])
            >>> one.ends(None, bits=8)
            (-1.0, 1.0)
        """
        low, high = (torch.stack([getattr(rank, name) for rank in ranks]) for name in ("low", "high"))
        if self.kind == "mse":
            quantiles = torch.stack([rank.quantiles for rank in ranks])
            # a rank that has seen nothing has no say
            unseen = torch.tensor([[count == 0 for count in rank.seen] for rank in ranks])[:, :, None]
            lower, upper = quantiles.tensor_split([_QUANTILES // 2], dim=2)
            lower, upper = lower.masked_fill(unseen, torch.inf), upper.masked_fill(unseen, -torch.inf)
            agreed = torch.cat([lower.amin(0), upper.amax(0)], dim=1)
            self.quantiles = agreed.where(agreed.isfinite(), 0.0)
        self.low, self.high = low.amin(0), high.amax(0)
        self._fitted.clear()

    def ends(self, bucket: int | None, bits: int) -> tuple[float, float]:
        """The range of a bucket, or of all; that of all, for a bucket in which nothing was seen; (0, 0) for nothing.

        Args:
            bucket: Which; `None`: all.
            bits: The width that it is for.

        Example:
            >>> Observed(buckets=1).ends(0, bits=4)
            (0.0, 0.0)
        """
        last = self.buckets
        for index in (last if bucket is None else bucket, last):
            if (found := self._ends_of(index, bits)) is not None:
                return found
        return 0.0, 0.0

    @property
    def has_channels(self) -> bool:
        """Whether each channel has a range of its own."""
        return len(self.seen) > self.buckets + 1

    def ends_of_channels(self, bits: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The least and the greatest level of each channel, over all buckets; (0, 0) for nothing.

        Args:
            bits: The width that they are for.

        Example:
            >>> observed = Observed(buckets=1, channels=2)
            >>> observed.add(torch.tensor([[0.0, 10.0], [1.0, 30.0]]), None)
            >>> observed.ends_of_channels(bits=4)
            ((0.0, 10.0), (1.0, 30.0))
        """
        channels = range(self.buckets + 1, len(self.seen))
        low, high = zip(*(self._ends_of(index, bits) or (0.0, 0.0) for index in channels), strict=True)
        return low, high

    def _ends_of(self, index: int, bits: int) -> tuple[float, float] | None:
        """One range; `None`: nothing of it was seen."""
        if (index, bits) not in self._fitted:
            low, high = float(self.low[index]), float(self.high[index])
            if not low <= high:
                return None
            fits = self.kind == "mse"
            self._fitted[index, bits] = least_error(self.quantiles[index], bits, _levels()[1]) if fits else (low, high)
        return self._fitted[index, bits]

    def state_dict(self) -> dict[str, Any]:
        """The ranges, in tensors and primitives."""
        tensors = {"low": self.low.clone(), "high": self.high.clone(), "quantiles": self.quantiles.clone()}
        return {**tensors, "seen": list(self.seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with these."""
        self.low, self.high, self.quantiles = (state[name].clone() for name in ("low", "high", "quantiles"))
        self.seen = list(state["seen"])
        self._fitted.clear()


@cache
@torch.inference_mode(False)
def _levels() -> tuple[Tensor, Tensor]:
    """Which quantiles a distribution is known by, and the share of the values that each stands for, float64.

    They lie the closer, the nearer to the ends: the outermost stands for about one value in 100,000. Evenly spaced, a
    single outlier would count as much as a five-hundredth of all values.
    """
    edges = (1 - torch.linspace(0, torch.pi, _QUANTILES + 1, dtype=torch.float64).cos()) / 2
    return (edges[1:] + edges[:-1]) / 2, edges.diff()


def _quantiles(x: Tensor, weight: Tensor) -> Tensor:
    """The values at `_levels`, float32 `[_QUANTILES]`; `weight`: what each counts, or nothing: all the same."""
    levels = _levels()[0].to(x.device)
    if not weight.numel():
        values = _thinned(x)
        return values[(levels * values.numel()).long()]
    step = -(-x.numel() // _SAMPLE)
    values, order = x.flatten()[::step].sort()
    until = weight.flatten()[::step].double()[order].cumsum(0)
    return values[torch.searchsorted(until, levels * until[-1]).clamp(max=values.numel() - 1)]


def _thinned(x: Tensor) -> Tensor:
    """The values, or an even sample of them, ascending."""
    values = x.flatten()
    ordered: Tensor = values[:: -(-values.numel() // _SAMPLE)].sort().values
    return ordered
