"""KGCN's raw files: ratings by raw id, a table from raw items to entities, and triples with relation names."""

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lightning_tinykg.data.files import KGRecFiles, unique_pairs
from lightning_tinykg.data.reading import Table, fail, read_bytes, read_table, require

__all__ = ["link_items", "number", "read_kgcn"]

IntArray = npt.NDArray[np.int64]

LINK = "'item id<TAB>entity id'"
TRIPLE = "'head<TAB>relation<TAB>tail'"
RATING = "'userID<TAB>artistID<TAB>weight'"


def number(names: list[str], index: dict[str, int]) -> IntArray:
    """Number names in the order in which they first appear.

    Args:
        names: The names.
        index: Names that have a number; new ones are added.

    Returns:
        The number of each name.

    Example:
        >>> number(["b", "a", "b"], {}).tolist()
        [0, 1, 0]
    """
    return np.array([index.setdefault(name, len(index)) for name in names], dtype=np.int64)


def read_kgcn(root: Path, *, min_rating: float | None = None) -> KGRecFiles:
    """Read ``user_artists.dat``, ``item_index2entity_id.txt`` and ``kg.txt`` (KGCN's ``music``).

    Every line of ``user_artists.dat`` is a positive, as in KGCN (threshold 0); items without an entity are dropped, and
    users who have no other. Items are numbered as in ``item_index2entity_id.txt`` and are the first entities.

    Args:
        root: The folder.
        min_rating: Drop interactions with a smaller weight.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a line is malformed.
    """
    links = _links(root)
    items = {raw: i for i, raw in enumerate(links.column(0))}
    path = require(root, "user_artists.dat")
    header = read_bytes(path).split(b"\n", 1)[0].decode("utf-8", "replace").split()
    if header != ["userID", "artistID", "weight"]:
        fail(path, 1, f"the header {RATING}", " ".join(header))
    ratings = read_table(path, RATING, fields=3, want=(0, 1, 2), skip=1)
    keep = np.array([item in items for item in ratings.column(1)], dtype=np.bool_)
    weights = ratings.numbers(2, float)
    if min_rating is not None:
        keep &= weights >= min_rating
    users: dict[str, int] = {}
    kept = [ratings.rows[i] for i in np.flatnonzero(keep)]
    user = number([row[0] for row in kept], users)
    item = np.array([items[row[1]] for row in kept], dtype=np.int64)
    files = KGRecFiles(
        train=unique_pairs(np.stack([user, item])),
        triples=np.zeros((3, 0), dtype=np.int64),
        num_users=len(users),
        num_items=len(items),
        num_entities=len(items),
        num_relations=0,
        user_ids=np.array(list(users), dtype=np.str_),
        item_ids=np.array(links.column(0), dtype=np.str_),
    )
    entities = {entity: i for i, entity in enumerate(links.column(1))}
    return _with_triples(root, files, entities).validated()


def link_items(root: Path, files: KGRecFiles, *, first_raw_item: int | None) -> KGRecFiles:
    """Give interactions a KGCN-style knowledge graph: ``item_index2entity_id.txt`` and ``kg.txt``.

    Items without a link stay items, without triples.

    Args:
        root: The folder.
        files: The interactions.
        first_raw_item: Raw id of item 0; None: see :func:`~lightning_tinykg.data.text.read_text`.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a line is malformed or a raw id out of range.
    """
    links = _links(root)
    raw = links.numbers(0, int).astype(np.int64)
    if first_raw_item is None:
        first_raw_item = int(raw.size > 0 and raw.min() > 0 and bool((files.train[1] == 0).any()))
    items = raw - first_raw_item
    if (wrong := np.flatnonzero((items < 0) | (items >= files.num_items))).size:
        last = first_raw_item + files.num_items - 1
        fail(links.path, links.lines[wrong[0]], f"item ids from {first_raw_item} to {last}", links.rows[wrong[0]][0])
    entities = dict(zip(links.column(1), items.tolist(), strict=True))
    return _with_triples(root, files, entities)


def _with_triples(root: Path, files: KGRecFiles, entities: dict[str, int]) -> KGRecFiles:
    """Read ``kg.txt``; entities that are no items are numbered after the items, as they appear."""
    table = read_table(require(root, "kg.txt"), TRIPLE, fields=3, want=(0, 1, 2))
    others: dict[str, int] = {}
    ends = []
    # Lines first, then columns: entities are numbered in the order of the file.
    for row in table.rows:
        for name in (row[0], row[2]):
            at = entities.get(name)
            ends.append(files.num_items + others.setdefault(name, len(others)) if at is None else at)
    relations: dict[str, int] = {}
    head, tail = np.array(ends, dtype=np.int64).reshape(-1, 2).T
    triples = np.stack([head, number(table.column(1), relations), tail])
    names = [""] * files.num_items + list(others)
    for name, at in entities.items():
        names[at] = name
    return dataclasses.replace(
        files,
        triples=triples,
        num_entities=len(names),
        num_relations=len(relations),
        entity_ids=np.array(names, dtype=np.str_),
        relation_ids=np.array(list(relations), dtype=np.str_),
    )


def _links(root: Path) -> Table:
    links = read_table(require(root, "item_index2entity_id.txt"), LINK, fields=2, want=(0, 1))
    seen: set[str] = set()
    for row, line in zip(links.rows, links.lines, strict=True):
        if row[0] in seen:
            fail(links.path, line, "each item id once", row[0])
        seen.add(row[0])
    return links
