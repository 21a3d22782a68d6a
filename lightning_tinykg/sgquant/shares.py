"""Coefficients of edges as multiples of what the degrees alone would give: these, where they are needed.

What sums to 1 over the edges of a receiver, as a softmax does, is about `1 / degree`, an even share. What a GCN gives
an edge is `1 / sqrt(degree of its receiver * degree of its sender)`. Stored is `x` times the inverse of that, and what
is read is divided by it again: the graph tells the degrees, so they take no byte.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_tinykg.sgquant.receivers import EdgesByReceiver

__all__ = ["SHARES", "Share", "Shares", "divisors", "share_of"]

Share = Literal["", "even", "symmetric"]
"""Of what a stored coefficient is a multiple: of 1; of `1 / degree`; of `1 / sqrt(degree * degree of the sender)`."""

SHARES: tuple[Share, ...] = get_args(Share)

_NEARLY = 0.01
"""How far from 1 a sum of coefficients, or a coefficient's multiple, may be: a softmax in 16 bits is less off."""


def divisors(share: Share, receivers: Tensor, senders: Tensor | None, rows: int) -> Tensor:
    """What each edge's coefficient is multiplied by before it is stored, and divided by when it is read.

    Args:
        share: `"even"` or `"symmetric"`.
        receivers: int64 `[E]`, at which node each edge arrives.
        senders: int64 `[E]`, from which node of the same kind it comes; needed for `"symmetric"`. A degree is the
            number of edges that arrive; 1, if there are none.
        rows: How many nodes there are.

    Returns:
        Float32 `[E]`.

    Raises:
        RuntimeError: If the senders are needed and not known.

    Example:
        >>> receivers, senders = torch.tensor([0, 2, 2]), torch.tensor([2, 0, 1])
        >>> divisors("even", receivers, None, rows=3), divisors("symmetric", receivers, senders, rows=3)
        (tensor([1., 2., 2.]), tensor([1.4142, 1.4142, 1.4142]))
    """
    ones = torch.ones(receivers.numel(), dtype=torch.float32, device=receivers.device)
    degree = torch.zeros(rows, dtype=torch.float32, device=receivers.device).index_add_(0, receivers, ones)
    arriving = degree.index_select(0, receivers)
    if share == "even":
        return arriving
    return _symmetric(arriving, degree, _known(senders))


def _symmetric(arriving: Tensor, degree: Tensor, senders: Tensor) -> Tensor:
    return (arriving * degree.index_select(0, senders).clamp(min=1)).sqrt()


def _known(senders: Tensor | None) -> Tensor:
    if senders is None:
        raise RuntimeError(
            "edge coefficients are stored as multiples of 1 / sqrt(degree of the receiver * degree of the sender), as "
            "they were in the calibration, and the degrees of senders of another kind are not known: calibrate on "
            "batches such as these"
        )
    return senders


def share_of(x: Tensor, receivers: Tensor, senders: Tensor | None, rows: int) -> Share:
    """Of what coefficients are multiples.

    Args:
        x: Float `[E, heads]`.
        receivers: int64 `[E]`.
        senders: int64 `[E]`; `None`: not known, or of another kind.
        rows: How many nodes there are.

    Returns:
        `"even"`, if those of each receiver sum to 1; `"symmetric"`, if each is nearly
        `1 / sqrt(degree * degree of the sender)`, or 0; else `""`.

    Example:
        >>> receivers, senders = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0])
        >>> share_of(torch.tensor([[0.3], [0.7], [1.0]]), receivers, senders, rows=2)
        'even'
    """
    return next((share for share, holds in _HOLDS.items() if holds(x.float(), receivers, senders, rows)), "")


def _sums_to_one(x: Tensor, receivers: Tensor, senders: Tensor | None, rows: int) -> bool:
    total = x.new_zeros(rows, x.size(1)).index_add_(0, receivers, x)
    return _is_nearly_one(total.index_select(0, receivers))


def _is_symmetric(x: Tensor, receivers: Tensor, senders: Tensor | None, rows: int) -> bool:
    if senders is None:
        return False
    multiples = x * divisors("symmetric", receivers, senders, rows)[:, None]
    return _is_nearly_one(multiples.where(multiples != 0, 1))  # 0: from where no edge arrives


def _is_nearly_one(x: Tensor) -> bool:
    return bool((x - 1).abs().amax() < _NEARLY)  # which NaN is not


_HOLDS: dict[Share, Callable[[Tensor, Tensor, Tensor | None, int], bool]] = {
    "even": _sums_to_one,
    "symmetric": _is_symmetric,
}


class Shares(NamedTuple):
    """Which parts of packed edges are stored so, and what tells the degrees. It is the graph's, and not counted.

    Attributes:
        parts: Of each part, whether it is stored so.
        starts: int64 `[receivers + 1]`, at which slot the edges of each receiver begin.
        senders: int64 `[E]`, the sender of each edge, if they are symmetric; else `None`.
        degrees: int64 `[nodes]`, that of each node by number; if they are symmetric.
        edge: int32 `[E]`, the edge in each slot; `None`: as they are numbered.

    Example:
        >>> Shares((True,), torch.tensor([0, 1, 1, 3])).divisors(torch.tensor([2, 0]))
        tensor([2., 1.])
    """

    parts: tuple[bool, ...]
    starts: Tensor
    senders: Tensor | None = None
    degrees: Tensor | None = None
    edge: Tensor | None = None

    @classmethod
    def of(cls, shares: tuple[Share, ...], edges: EdgesByReceiver) -> Shares:
        """Of the edges of a graph.

        Args:
            shares: Of each part; those that have one have the same.
            edges: The edges.
        """
        parts = tuple(map(bool, shares))
        if "symmetric" not in shares:
            return cls(parts, edges.starts)
        return cls(parts, edges.starts, _known(edges.senders), edges.degrees, edges.edge)

    def divisors(self, slots: Tensor) -> Tensor:
        """As the function of that name, of the edge in each slot: float32 `[k]`."""
        # of receivers without an edge, which begin where the next does, it is the next that is found
        after = torch.searchsorted(self.starts, slots, right=True)
        arriving = (self.starts[after] - self.starts[after - 1]).float()
        if self.senders is None or self.degrees is None:
            return arriving
        edge = slots if self.edge is None else self.edge.index_select(0, slots)
        return _symmetric(arriving, self.degrees, self.senders.index_select(0, edge))

    def tensors(self) -> dict[str, Tensor]:
        """What it holds, by name."""
        found = {name: getattr(self, name) for name in ("starts", "senders", "degrees", "edge")}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def to(self, device: torch.device | str) -> Shares:
        """The same on a device."""
        return Shares(self.parts, **{name: tensor.to(device) for name, tensor in self.tensors().items()})
