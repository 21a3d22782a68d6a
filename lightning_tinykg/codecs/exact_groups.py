"""Groups that can't be quantized, kept as they are beside the codes: NaN, infinities, ranges beyond float32."""

from __future__ import annotations

import torch
from torch import Tensor


def constants_beyond_float32(chunk: Tensor, rows: Tensor) -> Tensor:
    """Which groups of float64 are constant in float32, but are not what float32 holds: bool, shape ``[groups]``."""
    low, high = torch.aminmax(rows, dim=1)
    return (low == high) & (chunk.reshape(-1)[:: rows.shape[1]] != low)


def keep_exact(
    exact: Tensor, chunk: Tensor, group_size: int, first: int, index: list[Tensor], value: list[Tensor]
) -> None:
    """Put the groups that can't be quantized aside.

    On the CPU there are as many places as such groups. A GPU can't be asked how many without waiting for it: there
    are ``1 + groups / 1024`` places, unused ones hold group 0, and groups beyond them restore as NaN, which is loud.
    """
    if exact.device.type == "cpu":
        which = exact.nonzero().view(-1)
        if not which.numel():
            return
    else:
        which = torch.nonzero_static(exact, size=1 + exact.numel() // 1024, fill_value=0).view(-1)
    place = which[:, None] * group_size + torch.arange(group_size, device=which.device)
    inside = place < chunk.numel()
    if chunk.is_contiguous():
        rows = chunk.view(-1)[place.clamp_(max=chunk.numel() - 1)]
    else:  # row-major places to indices, so that nothing but these groups is copied
        rows = chunk[torch.unravel_index(place.clamp_(max=chunk.numel() - 1), chunk.shape)]
    index.append((which + first).to(torch.int32))
    value.append(rows.masked_fill_(~inside, 0))


def restore_exact(out: Tensor, index: Tensor, value: Tensor, groups: int) -> None:
    """Put the groups that were kept as they are back in their places; the last may be short.

    Args:
        out: what the codes were restored to, shape ``[numel]``, on which it writes.
        index: which groups these are, int32 ``[k]``.
        value: their elements, shape ``[k, group_size]``.
        groups: how many groups there are.
    """
    index, size, numel = index.long(), value.shape[1], out.shape[0]
    whole = numel // size
    if whole == groups:
        out.view(whole, size).index_copy_(0, index, value)
        return
    place = index[:, None] * size + torch.arange(size, device=index.device)
    # what is beyond the end is written where the group's first element is, with that element
    inside = place < numel
    place, value = (
        torch.where(inside, place, place[:, :1]),
        torch.where(inside, value, value[:, :1]),
    )
    out.index_copy_(0, place.view(-1), value.reshape(-1))
