"""Coefficients of edges as multiples of an even share, `1 / degree`: the degrees, where they are needed.

What sums to 1 over the edges of a receiver, as a softmax does, is about `1 / degree`. Stored is `x * degree`, and what
is read is divided by the degree again, which the graph tells: it takes no byte.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Shares", "receiver_degrees"]


def receiver_degrees(receivers: Tensor, rows: int) -> Tensor:
    """The degree of each edge's receiver: how many edges arrive there.

    Args:
        receivers: int64 `[E]`, at which node each edge arrives.
        rows: How many nodes there are.

    Returns:
        Float32 `[E]`.

    Example:
        >>> receiver_degrees(torch.tensor([0, 2, 2]), rows=3)
        tensor([1., 2., 2.])
    """
    ones = torch.ones(receivers.numel(), device=receivers.device)
    return torch.zeros(rows, device=receivers.device).index_add_(0, receivers, ones).index_select(0, receivers)


class Shares(NamedTuple):
    """Which parts of packed edges are stored so, and the edges of each receiver.

    Attributes:
        starts: int64 `[receivers + 1]`, at which slot the edges of each receiver begin. It is the graph's, not counted.
        parts: Of each part, whether it is stored so.

    Example:
        >>> Shares(torch.tensor([0, 1, 1, 3]), (True,)).degrees(torch.tensor([2, 0]))
        tensor([2., 1.])
    """

    starts: Tensor
    parts: tuple[bool, ...]

    def degrees(self, slots: Tensor) -> Tensor:
        """The degree of the receiver of the edge in each slot, float32 `[k]`."""
        # of receivers without an edge, which begin where the next does, it is the next that is found
        after = torch.searchsorted(self.starts, slots, right=True)
        return (self.starts[after] - self.starts[after - 1]).float()

    def to(self, device: torch.device | str) -> Shares:
        """The same on a device."""
        return self._replace(starts=self.starts.to(device))
