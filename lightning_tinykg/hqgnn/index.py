"""The recommender as a service loads it: packed codes, ids and seen items, without torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from lightning_tinykg.arguments import check_number, check_whole
from lightning_tinykg.hqgnn.fastscan import CodeIndex, unsupported
from lightning_tinykg.hqgnn.folder import Export, ExportError
from lightning_tinykg.hqgnn.ranking import Excluded, exhaustive
from lightning_tinykg.hqgnn.refining import refined
from lightning_tinykg.hqgnn.scoring import CodeTable, Floats, Ints

if TYPE_CHECKING:
    from lightning_tinykg.hqgnn.quantized import QuantizedRanking

__all__ = ["ExportError", "LowBitIndex", "export"]

Ids = npt.NDArray[Any]

USERS = 4096
"""Users whose seen items are gathered at a time: for all users of a catalogue they would fill the memory."""


class LowBitIndex:
    r"""Top-k recommendation from b-bit codes: what `HQGNN.export` writes, loaded.

    A user is full precision (or codes too, if exported so), an item is its codes: the score is
    `u . (zero + scale * code)`, with one scale, one for each node or one for each group. The ranking is that of exact
    scores, summed in float64; of equal scores the lower id comes first. So the answer is one and the same with faiss,
    without it, for one user or a thousand at a time.

    With faiss the codes themselves are the index (`IndexPQFastScan` at 1, 2 and 4 bits, `QT_8bit_direct_signed` at 8):
    it proposes candidates, which are decoded from the codes and scored exactly, and more are fetched until none that
    was missed can belong to the answer. Without faiss, or where it can't hold the codes, numpy goes through all of
    them. Items a user has seen are left out of the candidates before they are counted.

    Nothing changes after loading: threads may share an index. Files are mapped into memory, not read.

    Args:
        export: A checked folder.
        backend: `"faiss"`, `"numpy"`, or `"auto"`: faiss where it is installed and can hold the codes.

    Attributes:
        card: What the export says of itself: data set, bits, metrics, versions.
        backend: `"faiss"` or `"numpy"`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> from lightning_tinykg.hqgnn.export import write_export
        >>> from lightning_tinykg.hqgnn.table import QuantizedTable
        >>> codes = torch.tensor([[0, 3], [1, 2], [3, 3]], dtype=torch.uint8)
        >>> items = QuantizedTable(codes, torch.ones(1), torch.full((1,), -1.5), bits=2)
        >>> seen = (torch.tensor([0, 1]), torch.tensor([2]))
        >>> with TemporaryDirectory() as folder:
        ...     _ = write_export(f"{folder}/index", torch.ones(1, 2), items, seen)
        ...     index = LowBitIndex.load(f"{folder}/index")
        ...     index.recommend([0], k=2)
        (array([[0, 1]]), array([[0., 0.]], dtype=float32))
    """

    def __init__(self, export: Export, backend: Literal["auto", "faiss", "numpy"] = "auto") -> None:
        if backend not in ("auto", "faiss", "numpy"):
            raise ValueError(f"backend must be 'auto', 'faiss' or 'numpy', got {backend!r}")
        self.card = export.card
        self._users, self._items = export.users, export.items
        self._seen_ptr, self._seen_item = export.seen
        self._export = export
        self._faiss: CodeIndex | None = None
        why = unsupported(export.items)
        if backend == "faiss" and why:
            raise ValueError(f"backend='faiss' can't hold these codes: {why}; use backend='numpy'")
        if backend == "faiss" or (backend == "auto" and not why and find_spec("faiss") is not None):
            self._faiss = export.faiss_index()
        self.backend = "faiss" if self._faiss else "numpy"

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        backend: Literal["auto", "faiss", "numpy"] = "auto",
        verify: bool = True,
    ) -> LowBitIndex:
        """Load an export, after checking it.

        Args:
            folder: What `export` was given.
            backend: `"faiss"`, `"numpy"`, or `"auto"`: faiss where it is installed and can hold the codes.
            verify: Whether to hold each file against its SHA-256 in the card, which reads all of it. Sizes, shapes
                and the faiss index are checked in any case.

        Raises:
            ExportError: If a file is missing, corrupt, truncated or does not belong to the others.
            ImportError: For `backend="faiss"` without faiss.
            ValueError: For another backend, or `"faiss"` for codes that it can't hold.
        """
        return cls(Export.open(Path(folder), verify=verify), backend)

    @property
    def num_users(self) -> int:
        """Number of users."""
        return len(self._users)

    @property
    def num_items(self) -> int:
        """Number of items."""
        return len(self._items)

    @cached_property
    def user_ids(self) -> Ids | None:
        """The users' ids in the data set, by row, integers or strings; None where they are the row numbers."""
        return self._export.ids_of("user")

    @cached_property
    def item_ids(self) -> Ids | None:
        """The items' ids in the data set, by row, integers or strings; None where they are the row numbers."""
        return self._export.ids_of("item")

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self._items.dim

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self._items.bits

    @property
    def bytes_per_item(self) -> float:
        """Bytes of an item in use: its codes and its share of the scales."""
        return self._items.row_bytes

    def __repr__(self) -> str:
        return (
            f"LowBitIndex({self.num_users:,} users, {self.num_items:,} items of dimension {self.dim}, {self.bits} bits "
            f"per {self._items.granularity}, {self.bytes_per_item:.4g} bytes an item, {self.backend})"
        )

    def recommend(
        self, user_ids: npt.ArrayLike, k: int = 20, exclude_seen: bool = True, *, refine_factor: float | None = 4.0
    ) -> tuple[Ints, Floats]:
        """The `k` best items for each user.

        Args:
            user_ids: Row numbers of users, integers `[U]`; see :meth:`rows_of` for ids of the data set.
            k: How many items.
            exclude_seen: Leave out each user's training items.
            refine_factor: See :meth:`search`.

        Returns:
            `(items, scores)`, int64 and float32, `[U, min(k, num_items)]` each, best first. Where a user has fewer than
            `k` items left, the item is `-1` and the score `-inf`.

        Raises:
            TypeError: For user ids that are no integers.
            ValueError: For `k < 1` or a user id out of range.
        """
        ids = np.asarray(user_ids).reshape(-1)
        if ids.size and ids.dtype.kind not in "iu":
            raise TypeError(f"user_ids must be integers, got {ids.dtype}")
        ids = ids.astype(np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.num_users:
            raise ValueError(f"user_ids must be in 0..{self.num_users - 1}, got {ids.min()}..{ids.max()}")
        parts = []
        for start in range(0, max(1, len(ids)), USERS):
            own = ids[start : start + USERS]
            users = self._users.decode(own) if isinstance(self._users, CodeTable) else np.asarray(self._users[own])
            excluded = Excluded.of(own, self._seen_ptr, self._seen_item) if exclude_seen else None
            parts.append(self._search(users, k, excluded, refine_factor))
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([items for items, _ in parts]), np.concatenate([scores for _, scores in parts])

    def search(self, vectors: npt.ArrayLike, k: int = 20, *, refine_factor: float | None = 4.0) -> tuple[Ints, Floats]:
        """The `k` items with the greatest dot product with each vector.

        Args:
            vectors: Finite floats, `[U, dim]` or `[dim]`.
            k: How many items.
            refine_factor: With faiss, how many times `k` candidates it is first asked for. They are decoded and scored
                exactly, and if an item that was not fetched could belong to the answer, more are asked for: the
                answer is exact whatever this is. None: faiss's own ranking, faster by the refinement, with about 98 in
                100 items right.

        Returns:
            `(items, scores)`, int64 and float32, `[U, min(k, num_items)]` each, best first.

        Raises:
            ValueError: For `k < 1`, a `refine_factor` below 1, vectors of another width or not finite.
        """
        queries = np.atleast_2d(np.asarray(vectors, dtype=np.float32))
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ValueError(f"vectors must have shape [U, {self.dim}], got {list(np.shape(vectors))}")
        if not np.isfinite(queries).all():
            raise ValueError("vectors must be finite, got NaN or infinity")
        return self._search(queries, k, None, refine_factor)

    def rows_of(self, ids: Sequence[Any], what: Literal["user", "item"] = "user") -> Ints:
        """The row numbers of ids of the data set.

        Args:
            ids: As in the data set's files: integers or strings; `7` and `"7"` are the same.
            what: Whose ids they are.

        Returns:
            int64 `[len(ids)]`.

        Raises:
            KeyError: For an id that is not there.
            ValueError: If the export has no such ids: they are the row numbers. Or for another `what`.
        """
        if what not in ("user", "item"):
            raise ValueError(f"what must be 'user' or 'item', got {what!r}")
        place = self._user_rows if what == "user" else self._item_rows
        if place is None:
            raise ValueError(f"the export has no {what} ids: they are the row numbers")
        wanted = np.asarray(ids).reshape(-1).tolist()
        if missing := [value for value in wanted if str(value) not in place]:
            raise KeyError(f"no {what} {missing[0]!r} in the export")
        return np.array([place[str(value)] for value in wanted], dtype=np.int64)

    @cached_property
    def _user_rows(self) -> dict[str, int] | None:
        return _places(self.user_ids)

    @cached_property
    def _item_rows(self) -> dict[str, int] | None:
        return _places(self.item_ids)

    # -- how -----------------------------------------------------------------------------------------------------------

    def _search(
        self, vectors: Floats, k: int, excluded: Excluded | None, refine_factor: float | None
    ) -> tuple[Ints, Floats]:
        k = min(check_whole("k", k, 1), self.num_items)
        if refine_factor is not None:
            check_number("refine_factor", refine_factor, least=1, otherwise=", or None")
        if excluded is not None and not len(excluded.item):
            excluded = None
        if self._faiss is None or not k:
            return exhaustive(self._items, vectors, k, excluded)
        return refined(self._faiss, vectors, k, excluded, refine_factor)


def _places(ids: Ids | None) -> dict[str, int] | None:
    return None if ids is None else {str(value): row for row, value in enumerate(ids.tolist())}


def export(module: QuantizedRanking, directory: str | os.PathLike[str], **options: Any) -> LowBitIndex:
    """Write what a service needs of a trained `HQGNN` to a folder, and load it.

    Args:
        module: With its graph.
        directory: The folder: new, empty, or an export, which is replaced.
        options: Those of :func:`lightning_tinykg.hqgnn.export.export_module`.

    Returns:
        The index.

    Raises:
        FileExistsError: If the folder holds something else.
        ValueError: If the module has no codes: at 32 bits.
    """
    from lightning_tinykg.hqgnn.export import export_module  # which needs torch

    return export_module(module, directory, **options)
