"""The best of many: which items come first, ties broken by the lower id, and exhaustive search by it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_tinykg.hqgnn.scoring import CodeTable, Floats, Ints

__all__ = ["Excluded", "best_pairs", "exhaustive", "in_unit"]

Bools = npt.NDArray[np.bool_]

BLOCK = 16384
"""Rows scored at a time; a plane of them stays in the cache."""
SCORES = 4 * 2**20
"""Scores held at a time: 16 MiB."""


@dataclass(frozen=True)
class Excluded:
    """What must not be recommended to whom: pairs, sorted by item.

    Args:
        row: rows of the vectors, int64 ``[x]``.
        item: int64 ``[x]``, ascending.
    """

    row: Ints
    item: Ints

    @classmethod
    def of(cls, users: Ints, ptr: Ints, items: Ints) -> Excluded:
        """The items that some users have seen.

        Args:
            users: int64 ``[u]``.
            ptr: int64 ``[num_users + 1]``, where each user's items start.
            items: ``[e]``, any integers.

        Example:
            >>> Excluded.of(np.array([1, 0]), np.array([0, 1, 3]), np.array([4, 9, 2])).item.tolist()
            [2, 4, 9]
        """
        start, count = np.asarray(ptr[users]), np.asarray(ptr[users + 1]) - np.asarray(ptr[users])
        row = np.repeat(np.arange(len(users)), count)
        within = np.arange(len(row)) - np.repeat(count.cumsum() - count, count)
        item = np.asarray(items[start[row] + within]).astype(np.int64)
        order = np.argsort(item, kind="stable")
        return cls(row[order], item[order])

    def between(self, start: int, stop: int) -> tuple[Ints, Ints]:
        """The pairs with items from ``start`` to below ``stop``."""
        part = slice(*np.searchsorted(self.item, (start, stop)))
        return self.row[part], self.item[part]

    def counts(self, rows: int) -> Ints:
        """How many of each row's items are left out, int64 ``[rows]``."""
        return np.bincount(self.row, minlength=rows)

    def of_rows(self, rows: Ints, total: int) -> Excluded:
        """The pairs of some rows, which are numbered anew.

        Args:
            rows: int64 ``[r]``.
            total: how many rows there were.
        """
        place = np.full(total, -1)
        place[rows] = np.arange(len(rows))
        kept = place[self.row] >= 0
        return Excluded(place[self.row[kept]], self.item[kept])

    def contains(self, items: Ints) -> Bools:
        """Which of some candidates are left out.

        Args:
            items: int64 ``[u, c]``, the candidates of each row.

        Returns:
            bool ``[u, c]``.
        """
        if not len(self.item):
            return np.zeros(items.shape, dtype=bool)
        width = max(int(items.max(initial=0)), int(self.item[-1])) + 1
        keys = np.sort(self.row * width + self.item)
        wanted = np.arange(len(items))[:, None] * width + items
        found = keys[np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)]
        hidden: Bools = found == wanted
        return hidden


def in_unit(vectors: Floats) -> tuple[Floats, Floats]:
    """Vectors with a largest entry of 1 in absolute value, and what they were divided by (1 for a vector of zeros).

    The order of a ranking does not depend on the length of the query, and nothing overflows on the way to it.
    """
    size = np.abs(vectors).max(axis=1, initial=0)
    size[size == 0] = 1
    return vectors / size[:, None], size


def best_pairs(row: Ints, item: Ints, score: Floats, *, rows: int, k: int) -> tuple[Ints, Floats]:
    """The ``k`` best items of each row: the greatest score first, among equals the lower id.

    Args:
        row: int64 ``[p]``.
        item: int64 ``[p]``, each once in a row.
        score: float32 ``[p]``.
        rows: how many rows there are.
        k: how many to keep.

    Returns:
        Items int64 and scores float32, ``[rows, k]``; -1 and -inf where there are fewer.

    Example:
        >>> best_pairs(np.zeros(3, dtype=int), np.array([5, 2, 9]), np.array([1, 1, 3], "f4"), rows=1, k=2)[0]
        array([[9, 2]])
    """
    if rows == 1:
        order = np.lexsort((item, -score))[:k]
        items, scores = np.full((1, k), -1, dtype=np.int64), np.full((1, k), -np.inf, dtype=np.float32)
        items[0, : len(order)], scores[0, : len(order)] = item[order], score[order]
        return items, scores
    order = np.lexsort((item, -score, row))
    row, item, score = row[order], item[order], score[order]
    place = np.arange(len(row)) - np.searchsorted(row, row)
    kept = place < k
    items, scores = np.full((rows, k), -1, dtype=np.int64), np.full((rows, k), -np.inf, dtype=np.float32)
    items[row[kept], place[kept]] = item[kept]
    scores[row[kept], place[kept]] = score[kept]
    return items, scores


def exhaustive(
    table: CodeTable, vectors: Floats, k: int, excluded: Excluded | None = None, block: int = BLOCK
) -> tuple[Ints, Floats]:
    """The ``k`` rows with the greatest dot product, by looking at all of them.

    Each block is scored in float32; what could be among the best, by a bound on the rounding, is scored exactly. The
    result is therefore that of exact scores, in bounded memory.

    Args:
        table: what to search.
        vectors: finite float32 ``[u, dim]``.
        k: how many, at most the rows of the table.
        excluded: what to leave out.
        block: rows scored at a time.

    Returns:
        Items int64 and scores float32, ``[u, k]``, best first; -1 and -inf where fewer are left.
    """
    chunk = max(1, SCORES // block)
    if len(vectors) > chunk:
        parts = []
        for start in range(0, len(vectors), chunk):
            rows = np.arange(start, min(start + chunk, len(vectors)))
            own = excluded.of_rows(rows, len(vectors)) if excluded else None
            parts.append(exhaustive(table, vectors[rows], k, own, block))
        return np.concatenate([items for items, _ in parts]), np.concatenate([scores for _, scores in parts])
    unit, size = in_unit(vectors)
    slack = 2 * table.tolerance(unit)
    items, scores = np.full((len(vectors), k), -1, dtype=np.int64), np.full((len(vectors), k), -np.inf, np.float32)
    for start in range(0, len(table), block):
        stop = min(start + block, len(table))
        rough = table.score_block(unit, start, stop)
        if excluded:
            row, item = excluded.between(start, stop)
            rough[row, item - start] = -np.inf
        floor = scores[:, -1].astype(np.float64) / size - slack
        hit = rough >= floor.astype(np.float32)[:, None]
        if stop - start > k and hit.sum() > 4 * k * len(vectors):  # such as in the first block
            floor = np.maximum(floor, np.partition(rough, -k, axis=1)[:, -k] - slack)
            hit = rough >= floor.astype(np.float32)[:, None]
        row, column = np.nonzero(hit)
        finite = rough[row, column] > -np.inf
        row, item = row[finite], column[finite] + start
        if not len(row):
            continue
        exact = table.exact(vectors, row, item)
        old = np.nonzero(items >= 0)
        row, item = np.concatenate([old[0], row]), np.concatenate([items[old], item])
        items, scores = best_pairs(row, item, np.concatenate([scores[old], exact]), rows=len(vectors), k=k)
    return items, scores
