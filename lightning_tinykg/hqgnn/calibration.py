"""Where to clip: the range that b bits are spread over, from the values themselves."""

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Calibration", "best_clip"]

Calibration = Literal["mse", "minmax", "percentile"]

LIMIT = 1 << 18
"""Elements that are looked at: enough for a quantile of 99.9 % to be good to a hundredth of its value."""


@torch.no_grad()
def best_clip(
    magnitude: Tensor,
    bits: int,
    method: Calibration = "mse",
    *,
    weight: Tensor | None = None,
    percentile: float = 0.999,
    limit: int = LIMIT,
) -> Tensor:
    r"""The `c` such that `[-c, c]` is what `2**bits` levels should be spread over.

    - `"mse"`: the least squared error of the rounded values, `argmin_c sum w (x - Q_c(x))^2`. At one bit, where the
      levels are `+-c`, it is the weighted mean of `|x|` (Rastegari et al., ECCV 2016, arXiv 1603.05279, section 3.1);
      at more, the best of 96 candidates, refined by a parabola through the three best.
    - `"minmax"`: the greatest magnitude, of all elements: nothing is clipped.
    - `"percentile"`: a quantile of the magnitudes. At one bit, `"minmax"` and `"percentile"` are the mean too: an
      outermost level there is the only one.

    Args:
        magnitude: `|x|`, of any shape.
        bits: 1, 2, 4 or 8.
        method: One of the above.
        weight: How much an element's squared error counts, the shape of `magnitude`.
        percentile: The share that is not clipped, for `"percentile"`.
        limit: At most so many elements are looked at, the same ones each time, spread over rows and columns.

    Returns:
        Float32 `[1]`, positive.

    Example:
        >>> x = torch.tensor([0.1, 0.2, 0.3, 1.0])
        >>> best_clip(x, 1), best_clip(x, 4, "minmax")
        (tensor([0.4000]), tensor([1.]))
    """
    looked_at = _sample(magnitude.numel(), limit, magnitude.device)
    flat = magnitude.float().flatten()[looked_at]
    weights = torch.ones_like(flat) if weight is None else weight.float().flatten()[looked_at]
    tiny = torch.finfo(torch.float32).tiny
    if bits == 1:
        return ((flat * weights).sum() / weights.sum().clamp(min=tiny)).clamp(min=tiny).reshape(1)
    if method == "minmax":
        return magnitude.float().max().clamp(min=tiny).reshape(1)
    most = flat.max().clamp(min=tiny)
    if method == "percentile":
        return flat.quantile(percentile).clamp(min=tiny).reshape(1)
    shares = torch.linspace(0.02, 1.0, 96, dtype=torch.float32, device=flat.device)
    errors = torch.stack([_error(flat, weights, most * share, bits) for share in shares])
    best = errors.argmin().clamp(1, len(shares) - 2)
    left, middle, right = (errors[best + offset] for offset in (-1, 0, 1))
    bend = (left - 2 * middle + right).clamp(min=tiny)
    shift = (0.5 * (left - right) / bend).clamp(-1, 1)
    return (most * (shares[best] + shift * (shares[1] - shares[0]))).reshape(1)


def _sample(count: int, limit: int, device: torch.device) -> Tensor | slice:
    """Positions of `limit` of so many elements, or all. A stride would not do: it may meet a few columns only."""
    if count <= limit:
        return slice(None)
    step = int(0.618 * count)
    while math.gcd(step, count) > 1:  # else it comes back to where it has been
        step += 1
    return torch.arange(limit, device=device) * step % count


def _error(magnitude: Tensor, weight: Tensor, clip: Tensor, bits: int) -> Tensor:
    """The squared error of rounding to `2**bits` levels, symmetric around 0, from `-clip` to `clip`."""
    step = 2 * clip / (2**bits - 1)
    # magnitudes lie half a step off the levels: the levels are odd multiples of step / 2
    level = ((magnitude / step - 0.5).round().clamp(0, 2 ** (bits - 1) - 1) + 0.5) * step
    error: Tensor = (weight * (magnitude - level).square()).sum()
    return error
