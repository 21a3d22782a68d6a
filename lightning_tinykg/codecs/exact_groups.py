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
    are :func:`places` of them, unused ones are for group -1, and groups beyond them restore as NaN, which is loud.
    """
    if exact.device.type == "cpu":
        which = exact.nonzero().view(-1)
        if not which.numel():
            return
    else:
        which = torch.nonzero_static(exact, size=places(exact.numel()), fill_value=-1).view(-1)
    place = which[:, None] * group_size + torch.arange(group_size, device=which.device)
    inside = place < chunk.numel()
    place.clamp_(0, chunk.numel() - 1)
    if chunk.is_contiguous():
        rows = chunk.view(-1)[place]
    else:  # row-major places to indices, so that nothing but these groups is copied
        rows = chunk[torch.unravel_index(place, chunk.shape)]
    index.append(torch.where(which < 0, which, which + first).to(torch.int32))
    value.append(rows.masked_fill_(~inside, 0))


def places(groups: int) -> int:
    """How many of so many groups a GPU has room for to keep as they are.

    Example:
        >>> places(100), places(1 << 20)
        (1, 1025)
    """
    return 1 + groups // 1024


def restore_exact(out: Tensor, index: Tensor, value: Tensor, groups: int) -> None:
    """Put the groups that were kept as they are back in their places; the last may be short.

    Args:
        out: what the codes were restored to, shape ``[numel]``, on which it writes.
        index: which groups these are, int32 ``[k]``; -1 for none.
        value: their elements, shape ``[k, group_size]``.
        groups: how many groups there are.
    """
    index, size, numel = index.long(), value.shape[1], out.shape[0]
    index, value = _none_twice(out, index, value)
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


def _none_twice(out: Tensor, index: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Groups and their elements once more in the place of none: of a group that is there, or the first as it is."""
    last, where = index.max(0)
    size = value.shape[1]
    first = torch.nn.functional.pad(out[:size], (0, max(0, size - out.shape[0])))
    other = torch.where(last < 0, first, value.index_select(0, where.view(1)).view(-1))
    none = index < 0
    return torch.where(none, last.clamp(min=0), index), torch.where(none[:, None], other, value)
