"""Negatives: drawn uniformly from what is not linked, exactly, without a loop."""

import numpy as np
import numpy.typing as npt

from lightning_tinykg.data.files import sorted_unique

__all__ = ["NegativeSampler"]

IntArray = npt.NDArray[np.int64]


class NegativeSampler:
    r"""Draw for each row a column that the row is not linked to, uniformly and exactly.

    Instead of drawing and rejecting, the ``k``-th unlinked column is computed. A row with sorted linked columns
    :math:`p_0 < p_1 < \dots` has :math:`p_j - j` unlinked columns below :math:`p_j`, so the ``k``-th unlinked column
    (from 0) is :math:`k + |\{j : p_j - j \le k\}|`: one binary search, the same cost for a user who has seen nearly
    everything.

    Args:
        rows: Row of each link (for BPR: the user), shape ``[N]``, non-negative.
        columns: Column of each link (the item), shape ``[N]``, non-negative.
        num_rows: Number of rows.
        num_columns: Number of columns.
        what: How errors name a row and the columns.

    Raises:
        ValueError: If a row is linked to every column: it has no negative.

    Example:
        >>> sampler = NegativeSampler(np.array([0, 0, 1]), np.array([0, 2, 1]), num_rows=2, num_columns=3)
        >>> sampler.sample(np.array([0, 0]), np.random.default_rng(0)).tolist()  # user 0 has not seen item 1 only
        [1, 1]
    """

    def __init__(
        self,
        rows: IntArray,
        columns: IntArray,
        *,
        num_rows: int,
        num_columns: int,
        what: tuple[str, str] = ("user", "items"),
    ) -> None:
        if num_rows * num_columns > np.iinfo(np.int64).max:
            raise ValueError(f"num_rows * num_columns must fit into 63 bits, got {num_rows} * {num_columns}")
        self.num_columns = num_columns
        self._keys = sorted_unique(rows * np.int64(num_columns) + columns)
        linked_rows = self._keys // num_columns
        self._counts = np.bincount(linked_rows, minlength=num_rows).astype(np.int64)
        self._starts = np.cumsum(self._counts) - self._counts
        if (full := np.flatnonzero(self._counts >= num_columns)).size:
            raise ValueError(
                f"{what[0]} {full[0]} is linked to all {num_columns} {what[1]}, so no negative can be drawn for it "
                f"({full.size} such in all): drop it, or keep more {what[1]}"
            )
        # Row and number of unlinked columns below, in one sorted key: p_j - j never reaches the next row's range.
        self._unlinked = self._keys - (np.arange(self._keys.size) - self._starts[linked_rows])

    def sample(self, rows: IntArray, rng: np.random.Generator) -> IntArray:
        """Draw one unlinked column for each row.

        Args:
            rows: Shape ``[B]``.
            rng: Where the randomness comes from.

        Returns:
            Columns, shape ``[B]``, int64.
        """
        rank = rng.integers(self.num_columns - self._counts[rows])
        below = np.searchsorted(self._unlinked, rows * np.int64(self.num_columns) + rank, side="right")
        return rank + below - self._starts[rows]

    def linked(self, rows: IntArray, columns: IntArray) -> npt.NDArray[np.bool_]:
        """Whether each (row, column) is a link.

        Args:
            rows: Shape ``[B]``.
            columns: Shape ``[B]``.

        Returns:
            Shape ``[B]``.
        """
        keys = rows * np.int64(self.num_columns) + columns
        at = np.minimum(np.searchsorted(self._keys, keys), max(self._keys.size - 1, 0))
        return self._keys[at] == keys if self._keys.size else np.zeros(keys.shape, dtype=np.bool_)
