"""faiss indexes made of the codes themselves: candidates, and a bound of what was missed.

A uniform code of 1, 2 or 4 bits is a product code with ``4 / bits`` dimensions to a 4-bit sub-quantizer, whose codebook
holds all combinations of levels: nothing is trained, nothing is lost, and a row's packed bytes are its faiss code as
they are. 8-bit codes are those of faiss's ``QT_8bit_direct_signed``. The levels are whole numbers around 0; with
``middle`` the value that level 0 stands for, a score is::

    scale[i] * (query . levels[i]) + middle[i] * sum(query)

One scale for all items leaves the order alone. With a scale for each node there is an index for each shard of nearly
equal scales.

faiss rounds: `IndexPQFastScan` its tables to 8 bits, the signed scalar quantizer the query to whole numbers. How far
that can lead is known for each query, so the scores that a shard holds back have a bound, and the caller can tell a
complete answer from one to be asked for again.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lightning_tinykg.hqgnn.scoring import Bytes, CodeTable, Doubles, Floats, Ints
from lightning_tinykg.hqgnn.shards import file_names, shards_of

__all__ = ["Candidates", "CodeIndex", "FaissMissing", "unsupported"]

MAX_SUBQUANTIZERS = 256
"""faiss sums tables of uint8 in uint16, which 257 of them can overflow."""
BLOCK = 64
"""Rows that faiss's kernel takes at a time. Its own choice, 32, loads its tables twice as often: a fifth slower."""
SPOTS = 512
"""Rows of a shard that are held against the codes when it is read from a file."""

FLOOR = np.float32(-1e30)
"""Stands for -inf, which can't be multiplied by a scale of 0."""


class FaissMissing(ImportError):
    """faiss is asked for, and not installed."""


def faiss() -> Any:
    """The module faiss.

    Raises:
        FaissMissing: If it is not installed.
    """
    try:
        import faiss as module
    except ImportError as error:
        raise FaissMissing("faiss is not installed: pip install 'lightning-tinykg[faiss]'") from error
    return module


def unsupported(table: CodeTable) -> str | None:
    """Why faiss can't hold these codes; None where it can.

    Example:
        >>> codes, one = np.zeros((1, 2), dtype=np.uint8), np.ones((1, 2), dtype=np.float32)
        >>> unsupported(CodeTable(codes, one, one, bits=8, dim=2))
        'items have a scale for each group'
    """
    if not len(table):
        return "there are no items"
    if table.granularity == "group":
        return "items have a scale for each group"
    if table.bits < 8 and 2 * table.packed.shape[1] > MAX_SUBQUANTIZERS:
        return f"rows of {table.packed.shape[1]} bytes are longer than {MAX_SUBQUANTIZERS // 2}"
    return None


@dataclass
class Candidates:
    """What a shard answered, for each of some users.

    Args:
        levels: float32 ``[u, f]``, products of query and levels, as faiss rounds them. -inf: none.
        places: int64 ``[u, f]``, where in the order of the shards the rows are.
        last: float32 ``[u]``, what no row that is left out exceeds; -inf where none is left out.
        gaps: whether there may be a level of -inf.
    """

    levels: Floats
    places: Ints
    last: Floats
    gaps: bool = False

    def update(self, rows: Ints, more: Candidates) -> None:
        """Put the answers of some users, which may be longer, in the place of those before."""
        width = more.levels.shape[1] - self.levels.shape[1]
        if width > 0:
            self.levels = np.pad(self.levels, ((0, 0), (0, width)), constant_values=-np.inf)
            self.places = np.pad(self.places, ((0, 0), (0, width)))
        self.levels[rows, : more.levels.shape[1]], self.levels[rows, more.levels.shape[1] :] = more.levels, -np.inf
        self.places[rows, : more.levels.shape[1]] = more.places
        self.last[rows], self.gaps = more.last, True


class CodeIndex:
    """The faiss indexes of one table of codes.

    Searching changes nothing in it, so threads may share it.

    Args:
        table: the codes, with one scale or one for each node.
        indexes: one for each shard, see :func:`shards_of`; None: made of the codes.

    Attributes:
        single: the scale, and the value of level 0, where all rows share them; else None.

    Raises:
        FaissMissing: If faiss is not installed.
        ValueError: If faiss can't hold such codes, or an index does not hold these.
    """

    def __init__(self, table: CodeTable, indexes: list[Any] | None = None) -> None:
        if why := unsupported(table):
            raise ValueError(f"no faiss index: {why}")
        self.table = table
        self.order, self.starts = shards_of(table)
        self.sizes = np.diff(self.starts)
        self._levels = 2**table.bits
        self._middle = 128.0 if table.bits == 8 else (self._levels - 1) / 2
        self._unit = np.float32(1 / 127 if table.bits == 8 else 1.0)  # of what faiss is asked
        self._dims = _dimensions(table)
        shifts = np.arange(8 // table.bits) * table.bits
        levels = (np.arange(256)[:, None] >> shifts & (self._levels - 1)) - self._middle
        self._of_byte: Floats = levels.astype(np.float32)  # in the order of `_dims`, as of a nibble
        parts = [slice(*ends) for ends in pairwise(self.starts)]
        rows = [part if self.order is None else self.order[part] for part in parts]
        if indexes is None:
            indexes = [self._build(table.packed[part]) for part in rows]
        elif len(indexes) != len(parts):
            raise ValueError(f"there are {len(indexes)} indexes for {len(parts)} shards of the codes")
        else:
            for index, part in zip(indexes, rows, strict=True):
                self._check(index, part)
        self.indexes = indexes
        self.single: tuple[float, float] | None = None
        if table.scale.size == 1:
            scale, offset = self._affine(slice(None))
            self.single = float(scale[0]), float(offset[0])
        if self.single:
            rows = [slice(None)]
        ends = [(values.min(), values.max()) for own in rows for values in self._affine(own)]
        self._bounds = np.array(ends).reshape(len(rows), 4).T

    def _affine(self, rows: Ints | slice) -> tuple[Doubles, Doubles]:
        """The scales of some rows, and the values of their level 0."""
        scale = self.table.scale[rows].astype(np.float64)
        return scale, self.table.zero_of(rows).astype(np.float64) + scale * self._middle

    # -- made of codes, and held against them ------------------------------------------------------------------------

    def _build(self, packed: Bytes, block: int = BLOCK) -> Any:
        module, table = faiss(), self.table
        packed = np.ascontiguousarray(packed)
        if table.bits == 8:
            scalar = module.IndexScalarQuantizer(
                table.dim, module.ScalarQuantizer.QT_8bit_direct_signed, module.METRIC_INNER_PRODUCT
            )
            scalar.add_sa_codes(packed)
            return scalar
        count = 2 * packed.shape[1]
        product = module.IndexPQ(len(self._dims), count, 4, module.METRIC_INNER_PRODUCT)
        module.copy_array_to_vector(self._codebook(count).ravel(), product.pq.centroids)
        product.is_trained = True
        product.add_sa_codes(packed)
        return module.IndexPQFastScan(product, block)

    def _codebook(self, count: int) -> Floats:
        """Centroids of all sub-quantizers, float32 ``[count, 16, 4 / bits]``: the levels that a nibble stands for."""
        return np.tile(self._of_byte[:16, : 4 // self.table.bits], (count, 1, 1))

    def _check(self, index: Any, rows: Ints | slice) -> None:
        """Hold an index against the codes: its kind, its size, its codebook and some of its rows."""
        module, table, packed = faiss(), self.table, self.table.packed[rows]
        kind, dim = ("IndexScalarQuantizer", table.dim) if table.bits == 8 else ("IndexPQFastScan", len(self._dims))
        expected = (kind, len(packed), dim, module.METRIC_INNER_PRODUCT)
        found = (type(index).__name__, index.ntotal, index.d, index.metric_type)
        if found != expected:
            raise ValueError(
                "its kind, rows, dimension and metric are {}, {}, {}, {}".format(*found)
                + ", where the codes want {}, {}, {}, {}".format(*expected)
            )
        if table.bits == 8:
            if index.sq.qtype != module.ScalarQuantizer.QT_8bit_direct_signed:
                raise ValueError("it is no QT_8bit_direct_signed")
        elif not np.array_equal(
            module.vector_to_array(index.pq.centroids), self._codebook(2 * packed.shape[1]).ravel()
        ):
            raise ValueError("its codebook does not hold the levels of the codes")
        block = 1 if table.bits == 8 else index.bbs
        blocks = -(-len(packed) // block)
        spots = np.unique(np.linspace(0, blocks - 1, max(2, SPOTS // block)).astype(np.int64))
        some = self._build(np.concatenate([packed[spot * block : (spot + 1) * block] for spot in spots]), block)
        held, wanted = _codes(index), _codes(some).reshape(len(spots), -1)
        if len(held) != blocks * wanted.shape[1] or not np.array_equal(held.reshape(blocks, -1)[spots], wanted):
            raise ValueError("its codes are not those of the items")

    def save(self, folder: Path) -> list[str]:
        """Write one file for each shard.

        Returns:
            The names of the files.
        """
        names = file_names(len(self.indexes))
        for name, index in zip(names, self.indexes, strict=True):
            faiss().write_index(index, str(folder / name))
        return names

    # -- search ------------------------------------------------------------------------------------------------------

    def queries(self, unit: Floats) -> tuple[Floats, Doubles]:
        """What faiss is asked, and how far its answers are off.

        Args:
            unit: queries, float32 ``[u, dim]``, with a largest entry of 1, see :func:`~.ranking.in_unit`.

        Returns:
            float32 ``[u, *]`` and float64 ``[u, 1]``.
        """
        if self.table.bits == 8:
            # its SIMD code cuts the entries of a query to whole numbers, so they are made whole ones first
            whole = np.rint(unit * 127)
            return whole, np.abs(unit.astype(np.float64) - whole / 127.0).sum(axis=1, keepdims=True) * 128
        padded = unit
        if len(self._dims) > unit.shape[1]:
            padded = np.zeros((len(unit), len(self._dims)), dtype=np.float32)
            padded[:, : unit.shape[1]] = unit
        queries = padded.take(self._dims, axis=1)
        count = 2 * self.table.packed.shape[1]
        spans = np.abs(queries).reshape(len(queries), count, -1).sum(axis=2, dtype=np.float64) * (self._levels - 1)
        # each of the tables is rounded to 255 steps of the widest one's span: half a step off at most
        return queries, 0.5001 * count * spans.max(axis=1, keepdims=True) / 255

    def search(self, shard: int, queries: Floats, fetch: int) -> Candidates:
        """The rows of a shard with the greatest products of levels.

        Args:
            shard: which.
            queries: as :meth:`queries` makes them, float32 ``[u, *]``.
            fetch: how many rows.
        """
        start, index = int(self.starts[shard]), self.indexes[shard]
        if fetch >= index.ntotal:
            return self._whole(shard, queries)
        levels, places = index.search(queries, fetch)
        if self._unit != 1:
            levels *= self._unit
        last, gaps = levels[:, -1].copy(), bool(places[:, -1].min() < 0)  # they come last
        if gaps:  # what has the least product there can be, IndexPQFastScan does not give
            absent = places < 0
            levels[absent], places[absent] = -np.inf, 0
            last = np.where(absent, -FLOOR, levels).min(axis=1)
        if start:
            places += start
        return Candidates(levels, places, last, gaps)

    def _whole(self, shard: int, queries: Floats) -> Candidates:
        """All rows of a shard, by numpy."""
        places = np.arange(*self.starts[shard : shard + 2])
        packed = np.asarray(self.table.packed[places if self.order is None else self.order[places]])
        levels = queries @ self._of_byte.take(packed, axis=0).reshape(len(packed), -1).T * self._unit
        rows = len(queries)
        return Candidates(levels, np.tile(places, (rows, 1)), np.full(rows, -np.inf, dtype=np.float32))

    def scores(self, found: list[Candidates], unit: Floats, error: Doubles) -> tuple[Ints, Doubles, Doubles, Doubles]:
        """What the answers of all shards say of the scores.

        Args:
            found: by shard, for the same users.
            unit: the users, float32 ``[u, dim]``.
            error: see :meth:`queries`.

        Returns:
            Items, their scores (-inf: none) and how far these are off at most, ``[u, c]``; and for each shard what no
            other item's score exceeds, float64 ``[u, shards]``.
        """
        total, slack = unit.sum(axis=1, dtype=np.float64, keepdims=True), self.table.tolerance(unit)[:, None]
        if len(found) == 1:
            levels, places, last = found[0].levels, found[0].places, found[0].last[:, None]
        else:
            levels = np.concatenate([part.levels for part in found], axis=1)
            places = np.concatenate([part.places for part in found], axis=1)
            last = np.stack([part.last for part in found], axis=1)
        items = places if self.order is None else self.order[places]
        scale, offset = self._affine(items) if self.single is None else self.single
        score = scale * np.maximum(levels, FLOOR) + offset * total
        if any(part.gaps for part in found):
            score[np.isneginf(levels)] = -np.inf
        least, greatest, lowest, highest = self._bounds
        most = np.maximum(last, FLOOR) + error
        missed = np.maximum(most * least, most * greatest) + np.maximum(total * lowest, total * highest) + slack
        missed[np.isneginf(last)] = -np.inf
        return items, score, scale * error + slack, missed


def _codes(index: Any) -> Bytes:
    """A view of the codes as an index holds them, block by block; its `reconstruct` is wrong in blocks of 64 rows."""
    codes: Bytes = faiss().rev_swig_ptr(index.codes.data(), index.codes.size())
    return codes


def _dimensions(table: CodeTable) -> Ints:
    """Which dimension of the embedding each dimension of the faiss index is: for packed codes, nibble by nibble.

    Those of ``table.dim`` and above fill up the last byte's planes.
    """
    width = table.packed.shape[1]
    dimensions: Ints = np.arange(width)[:, None] + width * np.arange(8 // table.bits)
    return dimensions.ravel()
