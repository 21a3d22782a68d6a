"""RecBole atomic files: tab-separated tables with a header of ``name:type`` fields."""

from pathlib import Path

import numpy as np

from lightning_tinykg.data.files import KGRecFiles, unique_pairs
from lightning_tinykg.data.kgcn import number
from lightning_tinykg.data.reading import SUFFIXES, Table, fail, find_file, read_bytes, read_table, require

__all__ = ["atomic_names", "read_recbole"]


def atomic_names(root: Path) -> list[str]:
    """Names of the data sets in a folder: ``NAME`` for each ``NAME.inter``, plain or compressed.

    Args:
        root: The folder.
    """
    ends = tuple(".inter" + suffix for suffix in SUFFIXES)
    files = [path.name for path in root.iterdir() if path.name.endswith(ends)]
    return sorted({name.rsplit(".inter", 1)[0] for name in files})


def read_recbole(root: Path, *, min_rating: float | None = None) -> KGRecFiles:
    """Read ``NAME.inter`` and, if present, ``NAME.kg`` with ``NAME.link``.

    With ``NAME.train.inter`` and ``NAME.test.inter`` the split is theirs (``NAME.valid.inter`` is added to train: the
    data module makes its own validation set). Fields go by RecBole's default names: ``user_id``, ``item_id``,
    ``rating``; ``head_id``, ``relation_id``, ``tail_id``; ``item_id``, ``entity_id``. Users, items and relations are
    numbered in the order in which they appear.

    Args:
        root: The folder.
        min_rating: Drop interactions with a smaller ``rating``.

    Raises:
        FileNotFoundError: If ``NAME.link`` is missing beside ``NAME.kg``.
        ValueError: If a header or a line is malformed, or the folder holds several data sets.
    """
    names = atomic_names(root)
    parts = {name: name.rsplit(".", 1) for name in names}
    split = {p[1]: name for name, p in parts.items() if len(p) == 2 and p[1] in ("train", "valid", "test")}
    if {"train", "test"} <= split.keys():
        base = split["train"].removesuffix(".train")
        tables = [(name, part == "test") for part in ("train", "valid", "test") if (name := split.get(part))]
    elif len(names) == 1:
        base, tables = names[0], [(names[0], False)]
    else:
        raise ValueError(f"{root}: expected one NAME.inter, or NAME.train.inter and NAME.test.inter, got {names}")

    users: dict[str, int] = {}
    items: dict[str, int] = {}
    pairs: dict[bool, list[np.ndarray[tuple[int, ...], np.dtype[np.int64]]]] = {False: [], True: []}
    for name, is_test in tables:
        table = _atomic(root, f"{name}.inter", ("user_id", "item_id"), rating=min_rating is not None)
        if min_rating is not None:
            keep = np.flatnonzero(table.numbers(2, float) >= min_rating)
            table = table._replace(rows=[table.rows[i] for i in keep])
        pairs[is_test].append(np.stack([number(table.column(0), users), number(table.column(1), items)]))
    test = unique_pairs(np.concatenate(pairs[True], axis=1)) if pairs[True] else None

    entities: dict[str, int] = {}
    relations: dict[str, int] = {}
    triples = np.zeros((3, 0), dtype=np.int64)
    others: dict[str, int] = {}
    if find_file(root, f"{base}.kg") is not None:
        for item, entity in _atomic(root, f"{base}.link", ("item_id", "entity_id")).rows:
            if item in items:
                entities[entity] = items[item]
        table = _atomic(root, f"{base}.kg", ("head_id", "relation_id", "tail_id"))
        ends = []
        for row in table.rows:
            for name in (row[0], row[2]):
                at = entities.get(name)
                ends.append(len(items) + others.setdefault(name, len(others)) if at is None else at)
        head, tail = np.array(ends, dtype=np.int64).reshape(-1, 2).T
        triples = np.stack([head, number(table.column(1), relations), tail])
    names = [""] * len(items) + list(others)
    for name, at in entities.items():
        names[at] = name
    return KGRecFiles(
        train=unique_pairs(np.concatenate(pairs[False], axis=1)),
        test=test,
        triples=triples,
        num_users=len(users),
        num_items=len(items),
        num_entities=len(names),
        num_relations=len(relations),
        user_ids=np.array(list(users), dtype=np.str_),
        item_ids=np.array(list(items), dtype=np.str_),
        entity_ids=np.array(names, dtype=np.str_),
        relation_ids=np.array(list(relations), dtype=np.str_),
    ).validated()


def _atomic(root: Path, name: str, fields: tuple[str, ...], *, rating: bool = False) -> Table:
    """The wanted fields of an atomic file, found by its header."""
    path = require(root, name)
    header = read_bytes(path).split(b"\n", 1)[0].decode("utf-8", "replace").rstrip("\r")
    columns = [field.split(":")[0] for field in header.split("\t")]
    wanted = (*fields, "rating") if rating else fields
    if missing := [field for field in wanted if field not in columns]:
        fail(path, 1, f"a tab-separated header with {', '.join(f + ':TYPE' for f in missing)}", header)
    want = tuple(columns.index(field) for field in wanted)
    return read_table(path, repr(header.replace("\t", "<TAB>")), fields=len(columns), want=want, skip=1)
