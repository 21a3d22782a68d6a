r"""Uniform levels: the nearest of `2**bits`, and back. Deterministic, where `affine.py` rounds stochastically.

A value `x` is `u = (x - zero) / scale` in code units; its code is the nearest whole number in `0 .. 2**bits - 1`, and
stands for `zero + scale * code`. `scale` and `zero` have one value for the whole matrix, one for each row, one for
each group of neighbouring columns of a row, or one for each group of columns, the same for all rows.
"""

from torch import Tensor

__all__ = ["affine", "code_units", "gather_up", "nearest_codes", "spread", "symmetric_zero"]


def nearest_codes(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The codes of the nearest levels, as float32 `[n, d]`.

    One bit is a comparison with the middle and not a division, so that the sign of `x` decides, however small `x` is.

    Example:
        >>> import torch
        >>> nearest_codes(torch.tensor([[-2.0, 0.4, 9.0]]), torch.tensor([1.0]), torch.tensor([-1.0]), bits=2)
        tensor([[0., 1., 3.]])
    """
    if bits == 1:
        return (x > spread(zero + scale / 2, x)).to(x.dtype)
    return code_units(x, scale, zero).round().clamp(0, 2**bits - 1)


def affine(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """`zero + scale * codes`, rounded twice (no fused multiply-add), so that every reader gets the same bits.

    Args:
        codes: Float32 `[n, d]`, whole numbers.
        scale: Float32 `[1]`, `[n]`, `[n, groups]` or `[1, groups]`.
        zero: The shape of `scale`.

    Returns:
        Float32 `[n, d]`.
    """
    if scale.dim() == 2 and scale.size(0) == 1:
        return codes * spread(scale, codes) + spread(zero, codes)
    if scale.dim() == 2:
        rows, groups = scale.shape
        grouped = codes.reshape(rows, groups, codes.size(1) // groups)
        return (grouped * scale[:, :, None] + zero[:, :, None]).reshape(codes.shape)
    return codes * scale[:, None] + zero[:, None]


def code_units(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """`(x - zero) / scale`, `[n, d]`."""
    return (x - spread(zero, x)) / spread(scale, x)


def symmetric_zero(scale: Tensor, bits: int) -> Tensor:
    """The value of code 0 where the levels lie symmetrically around 0: `-(2**bits - 1) / 2 * scale`.

    Exact at 1 bit, where the levels are then `-scale / 2` and `scale / 2`; rounded once, in float32, at more.

    Example:
        >>> import torch
        >>> symmetric_zero(torch.tensor([2.0]), bits=2)
        tensor([-3.])
    """
    zero: Tensor = scale * (-(2**bits - 1) / 2)
    return zero


def spread(value: Tensor, x: Tensor) -> Tensor:
    """A value per table `[1]`, node `[n]` or group `[n or 1, groups]`, for each element: broadcastable to `[n, d]`.

    Example:
        >>> import torch
        >>> spread(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 4))
        tensor([[1., 1., 2., 2.]])
    """
    if value.dim() == 2:
        return value if value.size(1) == x.size(1) else value.repeat_interleave(x.size(1) // value.size(1), dim=1)
    return value[:, None]


def gather_up(x: Tensor, like: Tensor) -> Tensor:
    """The transpose of `spread`: sums `[n, d]` to the shape of `like`."""
    if like.dim() == 2:
        of_groups: Tensor = x.unflatten(1, (like.size(1), -1)).sum(dim=2)
        return of_groups
    total: Tensor = x.sum().reshape(1) if like.numel() == 1 else x.sum(dim=1)
    return total
