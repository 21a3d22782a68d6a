"""In which order rows are stored: those of one bucket side by side, since a bucket has one width."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

__all__ = ["RowOrder"]


class RowOrder:
    """Rows `0 .. n - 1` and the slots in which they are stored, part after part.

    What is kept is the slot of each row, or the row of each slot: four bytes a row for all that is stored in this
    order, however many matrices that is. The other is made when it is asked for.

    Args:
        counts: Slots of each part.
        slot: int32 `[n]`, the slot of each row; or `None`.
        row: int32 `[n]`, the row of each slot; or `None`. One of the two must be given.

    Raises:
        ValueError: If neither or both are given, or the counts do not sum up to `n`.

    Example:
        >>> order = RowOrder.of_buckets(torch.tensor([1, 0, 1]), buckets=2)
        >>> order.counts, order.slots(slice(None)), order.rows(slice(None))
        ((1, 2), tensor([1, 0, 2], dtype=torch.int32), tensor([1, 0, 2], dtype=torch.int32))
    """

    def __init__(self, counts: Sequence[int], slot: Tensor | None = None, row: Tensor | None = None) -> None:
        kept = slot if row is None else row
        if kept is None or (slot is not None and row is not None):
            raise ValueError("one of slot and row must be given, got neither or both")
        if kept.dim() != 1 or kept.dtype != torch.int32 or kept.numel() != sum(counts):
            raise ValueError(
                f"slot or row must be int32 [{sum(counts)}], as the counts say, got {kept.dtype} {list(kept.shape)}"
            )
        self.counts, self.slot, self.row = tuple(counts), slot, row
        self.starts = (0, *accumulate(self.counts))

    @classmethod
    def of_buckets(cls, bucket: Tensor, buckets: int) -> RowOrder:
        """The order of rows by bucket, and within a bucket as they come.

        Args:
            bucket: int `[n]`, each from 0 to `buckets - 1`.
            buckets: How many there are.
        """
        counts = torch.bincount(bucket, minlength=buckets).tolist()
        if len(counts) != buckets:
            raise ValueError(f"bucket must be below {buckets}, got {len(counts) - 1}")
        return cls(counts, slot=_inverse(bucket.argsort(stable=True)))

    @property
    def numel(self) -> int:
        """How many rows there are."""
        return self.starts[-1]

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return 4 * self.numel

    def slots(self, rows: Tensor | slice) -> Tensor:
        """The slots of these rows, int32."""
        return self._look_up(self.slot, self.row, rows)

    def rows(self, slots: Tensor | slice) -> Tensor:
        """The rows in these slots, int32."""
        return self._look_up(self.row, self.slot, slots)

    @staticmethod
    def _look_up(kept: Tensor | None, other: Tensor | None, which: Tensor | slice) -> Tensor:
        if kept is None:
            assert other is not None
            kept = _inverse(other)
        return kept[which] if isinstance(which, slice) else kept.index_select(0, which)

    def to(self, device: torch.device | str) -> RowOrder:
        """The same on a device."""
        slot, row = (None if kept is None else kept.to(device) for kept in (self.slot, self.row))
        return RowOrder(self.counts, slot, row)

    def __repr__(self) -> str:
        return f"RowOrder({self.numel} rows in parts of {', '.join(map(str, self.counts))})"


def _inverse(permutation: Tensor) -> Tensor:
    """The inverse of a permutation, int32."""
    inverse = torch.empty(permutation.numel(), dtype=torch.int32, device=permutation.device)
    inverse[permutation] = torch.arange(permutation.numel(), dtype=torch.int32, device=permutation.device)
    return inverse
