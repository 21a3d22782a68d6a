"""What every reader returns: interactions, triples and sizes as plain numpy arrays."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["KGRecFiles", "contains_pairs", "sorted_unique", "unique_pairs"]

IntArray = npt.NDArray[np.int64]
Names = npt.NDArray[np.str_]


def sorted_unique(keys: IntArray) -> IntArray:
    """The distinct values, sorted: ``np.unique`` by sorting, several times faster on large integers than by hashing.

    Args:
        keys: Shape ``[N]``.

    Returns:
        Shape ``[M]``.

    Example:
        >>> sorted_unique(np.array([3, 1, 3])).tolist()
        [1, 3]
    """
    keys = np.sort(keys, kind="stable")
    distinct: IntArray = keys[np.diff(keys, prepend=keys[:1] - 1) != 0]
    return distinct


def contains_pairs(pairs: IntArray, wanted: IntArray) -> npt.NDArray[np.bool_]:
    """Which of the wanted pairs are among the pairs.

    Args:
        pairs: Shape ``[2, N]``, non-negative.
        wanted: Shape ``[2, M]``, non-negative.

    Returns:
        Shape ``[M]``.

    Example:
        >>> contains_pairs(np.array([[0, 1], [2, 3]]), np.array([[1, 0], [3, 3]])).tolist()
        [True, False]
    """
    width = int(max(pairs[1].max(initial=0), wanted[1].max(initial=0))) + 1
    keys, asked = sorted_unique(pairs[0] * width + pairs[1]), wanted[0] * width + wanted[1]
    if keys.size == 0:
        return np.zeros(asked.shape, dtype=np.bool_)
    found: npt.NDArray[np.bool_] = keys[np.minimum(np.searchsorted(keys, asked), keys.size - 1)] == asked
    return found


def unique_pairs(pairs: IntArray) -> IntArray:
    """Drop repeated pairs and sort what is left: a play log becomes a set of interactions.

    Args:
        pairs: Shape ``[2, N]``, non-negative.

    Returns:
        The distinct pairs, shape ``[2, M]``, sorted by the first row, then by the second.

    Example:
        >>> unique_pairs(np.array([[1, 0, 1], [2, 3, 2]])).tolist()
        [[0, 1], [3, 2]]
    """
    if pairs.shape[1] == 0:
        return pairs.astype(np.int64)
    width = int(pairs[1].max()) + 1
    keys = sorted_unique(pairs[0].astype(np.int64) * width + pairs[1])
    return np.stack([keys // width, keys % width])


@dataclass(frozen=True)
class KGRecFiles:
    """A parsed data set. Items are the first ``num_items`` of the ``num_entities`` entities.

    Attributes:
        train: Pairs (user, item), shape ``[2, E]``, int64, distinct and sorted. All interactions when ``test`` is None.
        triples: (head, relation, tail), shape ``[3, T]``, int64, as in the file.
        num_users: Number of users.
        num_items: Number of items.
        num_entities: Number of entities, items included.
        num_relations: Number of relations.
        test: Pairs (user, item), shape ``[2, Y]``, int64, distinct and sorted; None when the files bring no split.
        user_ids: The ids in the files, shape ``[num_users]``; None where they are the row numbers.
        item_ids: The same for items, shape ``[num_items]``.
        entity_ids: The same for entities, shape ``[num_entities]``; for items that no link names, an empty string.
        relation_ids: The names of the relations, shape ``[num_relations]``.

    Example:
        >>> pairs = np.array([[0, 1], [1, 0]])
        >>> KGRecFiles(pairs, np.zeros((3, 0), dtype=np.int64), 2, 2, 2, 0).validated().num_users
        2
    """

    train: IntArray
    triples: IntArray
    num_users: int
    num_items: int
    num_entities: int
    num_relations: int
    test: IntArray | None = None
    user_ids: Names | None = None
    item_ids: Names | None = None
    entity_ids: Names | None = None
    relation_ids: Names | None = None

    def validated(self) -> "KGRecFiles":
        """Check shapes and ranges.

        Returns:
            The object itself.

        Raises:
            ValueError: If an array has a wrong shape or an id is out of range.
        """
        pairs = [("train", self.train)] + ([("test", self.test)] if self.test is not None else [])
        sizes = (self.num_users, self.num_items)
        for name, array in pairs:
            _check(name, array, sizes)
        _check("triples", self.triples, (self.num_entities, self.num_relations, self.num_entities))
        if self.num_entities < self.num_items:
            raise ValueError(f"num_entities must be at least num_items, got {self.num_entities} and {self.num_items}")
        for what in ("user", "item", "entity", "relation"):
            names = getattr(self, f"{what}_ids")
            size = getattr(self, f"num_{'entities' if what == 'entity' else what + 's'}")
            if names is not None and names.shape != (size,):
                raise ValueError(f"{what}_ids must have shape ({size},), got {names.shape}")
        return self

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The fields that are not None, as arrays: what the cache stores."""
        return {f.name: np.asarray(v) for f in fields(self) if (v := getattr(self, f.name)) is not None}

    @classmethod
    def from_arrays(cls, arrays: dict[str, npt.NDArray[Any]]) -> "KGRecFiles":
        """Undo :meth:`arrays`; checks what it is given.

        Args:
            arrays: What :meth:`arrays` returned.

        Raises:
            ValueError: If an array has a wrong shape or an id is out of range.
            KeyError: If one is missing.
        """
        sizes = ("num_users", "num_items", "num_entities", "num_relations")
        values: dict[str, Any] = {name: int(value[()]) if name in sizes else value for name, value in arrays.items()}
        return cls(**values).validated()


def _check(name: str, array: IntArray, sizes: tuple[int, ...]) -> None:
    if array.ndim != 2 or array.shape[0] != len(sizes) or array.dtype != np.int64:
        raise ValueError(f"{name} must be int64 of shape [{len(sizes)}, N], got {array.dtype} {list(array.shape)}")
    for row, size in zip(array, sizes, strict=True):
        if row.size and (row.min() < 0 or row.max() >= size):
            raise ValueError(f"{name} holds an id outside 0..{size - 1}: {row.min()}..{row.max()}")
