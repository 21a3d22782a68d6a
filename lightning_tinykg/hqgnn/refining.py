"""From faiss's candidates to the exact answer: decode and score them, and ask for more where some could be missing."""

from __future__ import annotations

import math

import numpy as np

from lightning_tinykg.hqgnn.fastscan import Candidates, CodeIndex
from lightning_tinykg.hqgnn.ranking import Bools, Excluded, best_pairs, exhaustive, in_unit
from lightning_tinykg.hqgnn.scoring import Floats, Ints

__all__ = ["refined"]

USERS = 256
"""Users at a time."""
GROWTH = 8
"""How many times more candidates are fetched where there were too few; a search hardly costs more for them."""
SMALL, MOST = 8192, 0.25
"""A shard of so few rows is fetched whole. Of a greater one, when more than this share is wanted, faiss is given up."""


def refined(
    index: CodeIndex, vectors: Floats, k: int, excluded: Excluded | None, refine_factor: float | None
) -> tuple[Ints, Floats]:
    """The ``k`` best rows, as :func:`~.ranking.exhaustive` finds them, by way of candidates.

    Args:
        index: of the codes.
        vectors: finite float32 ``[u, dim]``.
        k: how many, at most the rows of the table.
        excluded: what to leave out.
        refine_factor: how many times ``k`` candidates to fetch at first; None: take faiss's own scores.

    Returns:
        Items int64 and scores float32, ``[u, k]``, best first; -1 and -inf where fewer are left.
    """
    if len(vectors) == 1 and vectors.any():  # nothing to sort, and each call counts
        found = _one(index, vectors, k, excluded, refine_factor) if index.single and index.single[0] > 0 else None
        if found is not None:
            return found
        answer, values, done = _some(index, vectors, k, excluded, refine_factor)
        return (answer, values) if done[0] else exhaustive(index.table, vectors, k, excluded)
    items = np.full((len(vectors), k), -1, dtype=np.int64)
    scores, done = np.full((len(vectors), k), -np.inf, dtype=np.float32), np.zeros(len(vectors), dtype=bool)
    asked = np.flatnonzero(vectors.any(axis=1))  # of a query of zeros faiss makes no tables
    count = excluded.counts(len(vectors)) if excluded else np.zeros(len(vectors), dtype=np.int64)
    asked = asked[np.argsort(count[asked], kind="stable")]  # who has seen little does not wait for who has much
    for start in range(0, len(asked), USERS):
        rows = asked[start : start + USERS]
        own = excluded.of_rows(rows, len(vectors)) if excluded and len(vectors) > 1 else excluded
        items[rows], scores[rows], done[rows] = _some(index, vectors[rows], k, own, refine_factor)
    if not done.all():
        rows = np.flatnonzero(~done)
        own = excluded.of_rows(rows, len(vectors)) if excluded else None
        items[rows], scores[rows] = exhaustive(index.table, vectors[rows], k, own)
    return items, scores


def _one(
    index: CodeIndex, vector: Floats, k: int, excluded: Excluded | None, refine_factor: float | None
) -> tuple[Ints, Floats] | None:
    """As :func:`refined`, for one user and one scale above 0; None: it takes :func:`_some`.

    One scale leaves faiss's order as it is but for its rounding. So its answer begins with all that can be among the
    best: what lies above the ``k``-th, less twice what rounding can do.
    """
    assert index.single
    scale, offset = index.single
    unit, size = in_unit(vector)
    shift = offset * unit.sum(dtype=np.float64)
    queries, error = index.queries(unit)
    off = float(error[0, 0] + index.table.tolerance(unit)[0] / scale)  # in levels, as are all bounds below
    fetch = math.ceil((refine_factor or 1.0) * k) + (len(excluded.item) if excluded else 0)
    while fetch <= MOST * len(index.table):
        found = index.search(0, queries, fetch)
        if found.gaps:
            return None
        level, item = found.levels[0], found.places[0]
        if excluded:
            left = ~excluded.contains(found.places)[0]
            level, item = level[left], item[left]
        count = np.count_nonzero(level >= level[k - 1] - (2 * off if refine_factor else 0.0))
        item = item[:count]
        if refine_factor is None:
            score = ((scale * level[:count] + shift) * size).astype(np.float32)
        else:
            score = index.table.exact(vector, np.zeros(count, dtype=np.int64), item)
        order = np.lexsort((item, -score))[:k]
        item, score = item[order], score[order]
        least = (score[-1] / size[0] - shift) / scale
        if refine_factor is None or found.last[0] + off < least:
            return item[None], score[None]
        fetch *= GROWTH
    return None


def _some(
    index: CodeIndex, vectors: Floats, k: int, excluded: Excluded | None, refine_factor: float | None
) -> tuple[Ints, Floats, Bools]:
    """As :func:`refined`, and whom faiss could not answer: False."""
    shards, users = len(index.indexes), len(vectors)
    unit, size = in_unit(vectors)
    queries, error = index.queries(unit)
    count = int(excluded.counts(users).max()) if excluded else 0
    factor = 1.0 if refine_factor is None else refine_factor / math.sqrt(shards)  # of several shards, most give little
    fetch = np.minimum(max(math.ceil(factor * k), -(-k // shards)) + count, index.sizes)
    found: list[Candidates] = []
    wanted: Bools | None = None  # by all users of all shards
    given_up = np.zeros(users, dtype=bool)
    while True:
        for shard in range(shards):
            rows = None if wanted is None else np.flatnonzero(wanted[:, shard])
            if rows is not None and not len(rows):
                continue
            if fetch[shard] > MOST * index.sizes[shard]:
                if index.sizes[shard] > SMALL:
                    given_up[slice(None) if rows is None else rows] = True
                fetch[shard] = min(index.sizes[shard], SMALL)
            answer = index.search(shard, queries if rows is None else queries[rows], int(fetch[shard]))
            if rows is None:
                found.append(answer)
            else:
                found[shard].update(rows, answer)
        item, rough, off, missed = index.scores(found, unit, error)
        if excluded:
            rough[excluded.contains(item)] = -np.inf
        low = rough if refine_factor is None else rough - off
        least = np.partition(low, -k, axis=1)[:, -k, None] if low.shape[1] >= k else -np.inf
        row, column = np.nonzero((low + 2 * off if refine_factor else low) >= least)
        finite = rough[row, column] > -np.inf
        row, column = row[finite], column[finite]
        best = item[row, column]
        if refine_factor is None:
            score = (rough[row, column] * size[row]).astype(np.float32)
            return *best_pairs(row, best, score, rows=users, k=k), ~given_up
        items, scores = best_pairs(row, best, index.table.exact(vectors, row, best), rows=users, k=k)
        wanted = (missed > -np.inf) & (missed >= (scores[:, -1] / size)[:, None]) & ~given_up[:, None]
        if not wanted.any():
            return items, scores, ~given_up
        fetch = np.where(wanted.any(axis=0), fetch * GROWTH, fetch)
