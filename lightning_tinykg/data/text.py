"""KGAT and LightGCN text files: one user a line, and the knowledge graph as integers."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from lightning_tinykg.data.files import KGRecFiles, contains_pairs, unique_pairs
from lightning_tinykg.data.kgcn import link_items
from lightning_tinykg.data.reading import IntLines, fail, find_file, read_bytes, read_int_lines, read_table, require

__all__ = ["read_text", "read_weighted"]

IntArray = npt.NDArray[np.int64]

LINE = "'user item item ...' (non-negative integers)"
TRIPLE = "'head relation tail' (non-negative integers)"


def read_text(root: Path, *, given_test: bool = False, first_raw_item: int | None = None) -> KGRecFiles:
    """Read ``train.txt`` and ``test.txt``, or ``interactions_all.txt``, and the knowledge graph if there is one.

    The graph is ``kg_final.txt`` (``head relation tail``, entity ``i`` is item ``i`` for the first ones), or KGCN's
    pair ``kg.txt`` and ``item_index2entity_id.txt``. ``user_list.txt``, ``item_list.txt``, ``entity_list.txt`` and
    ``relation_list.txt`` (``org_id remap_id ...``, with a header) give sizes and original ids where they are present.

    Args:
        root: The folder.
        given_test: With ``interactions_all.txt``: test is what ``test.txt`` says and train the rest. Otherwise the data
            module splits.
        first_raw_item: Raw id in ``item_index2entity_id.txt`` of item 0. None: 1 if the raw ids do not begin at 0 and
            there are interactions with item 0 (ml-1m), else 0.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a line is malformed or an id out of range.
    """
    everything = find_file(root, "interactions_all.txt") if find_file(root, "train.txt") is None else None
    names = {what: _names(root, what) for what in ("user", "item", "entity", "relation")}
    train = _pairs(everything or require(root, "train.txt"), names)
    test = None if everything and not given_test else _pairs(require(root, "test.txt"), names)
    if everything and test is not None:
        train = train[:, ~contains_pairs(test, train)]
    both = train if test is None else np.concatenate([train, test], axis=1)
    num_users, num_items = (
        len(ids) if (ids := names[what]) is not None else int(row.max(initial=-1)) + 1
        for what, row in zip(("user", "item"), both, strict=True)
    )
    files = KGRecFiles(
        train=train,
        test=test,
        triples=np.zeros((3, 0), dtype=np.int64),
        num_users=num_users,
        num_items=num_items,
        num_entities=num_items,
        num_relations=0,
        user_ids=names["user"],
        item_ids=names["item"],
    )
    if (path := find_file(root, "kg_final.txt")) is not None:
        return _with_triples(files, path, names["entity"], names["relation"]).validated()
    if find_file(root, "kg.txt") is not None:
        return link_items(root, files, first_raw_item=first_raw_item).validated()
    return files.validated()


def read_weighted(root: Path) -> KGRecFiles:
    """Read LightGCN's small ``lastfm``: ``data1.txt`` and ``test1.txt``, lines ``user item weight``, ids from 1.

    Args:
        root: The folder.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a line is malformed or an id out of range.
    """
    pairs = []
    for name in ("data1.txt", "test1.txt"):
        expected = "'user<TAB>item<TAB>weight' (ids from 1)"
        table = read_table(require(root, name), expected, fields=3, want=(0, 1, 2))
        ids = np.stack([table.numbers(0, int), table.numbers(1, int)]).astype(np.int64) - 1
        table.numbers(2, float)
        if (wrong := np.flatnonzero(ids.min(axis=0) < 0)).size:
            fail(table.path, table.lines[wrong[0]], expected, "\t".join(table.rows[wrong[0]]))
        pairs.append(unique_pairs(ids))
    num_users, num_items = (int(row.max(initial=-1)) + 1 for row in np.concatenate(pairs, axis=1))
    triples = np.zeros((3, 0), dtype=np.int64)
    return KGRecFiles(pairs[0], triples, num_users, num_items, num_items, 0, test=pairs[1]).validated()


def _pairs(path: Path, names: dict[str, npt.NDArray[np.str_] | None]) -> IntArray:
    lines = read_int_lines(path, LINE)
    users, items, is_item = lines.ragged()
    for what, values in (("user", users), ("item", items)):
        if (ids := names[what]) is not None:
            lines.check_below(values, lines.lines[is_item], len(ids), what, f"{what}_list.txt")
    return unique_pairs(np.stack([users, items]))


def _with_triples(
    files: KGRecFiles,
    path: Path,
    entity_ids: npt.NDArray[np.str_] | None,
    relation_ids: npt.NDArray[np.str_] | None,
) -> KGRecFiles:
    lines: IntLines = read_int_lines(path, TRIPLE)
    triples = lines.table(3)
    numbers = lines.lines[::3]
    if entity_ids is not None:
        for row in triples[[0, 2]]:
            lines.check_below(row, numbers, len(entity_ids), "entity", "entity_list.txt")
        if len(entity_ids) < files.num_items:
            raise ValueError(
                f"{path.parent}: expected at least as many entities as items, since items are the first entities, got "
                f"{len(entity_ids)} in entity_list.txt and {files.num_items} items"
            )
    if relation_ids is not None:
        lines.check_below(triples[1], numbers, len(relation_ids), "relation", "relation_list.txt")
    num_entities = max(files.num_items, int(triples[[0, 2]].max(initial=-1)) + 1)
    return KGRecFiles(
        train=files.train,
        test=files.test,
        triples=triples,
        num_users=files.num_users,
        num_items=files.num_items,
        num_entities=num_entities if entity_ids is None else len(entity_ids),
        num_relations=int(triples[1].max(initial=-1)) + 1 if relation_ids is None else len(relation_ids),
        user_ids=files.user_ids,
        item_ids=files.item_ids,
        entity_ids=entity_ids,
        relation_ids=relation_ids,
    )


def _names(root: Path, what: str) -> npt.NDArray[np.str_] | None:
    """The original ids by number, from ``WHAT_list.txt``; None without the file."""
    path = find_file(root, f"{what}_list.txt")
    if path is None:
        return None
    expected = "'org_id remap_id ...' with remap_id from 0, each once"
    ids: dict[int, str] = {}
    last, where, text = -1, 0, ""
    for number, line in enumerate(read_bytes(path).decode("utf-8", "replace").split("\n")[1:], start=2):
        parts = line.split()
        if not parts:
            continue
        if len(parts) < 2 or not parts[1].isdecimal() or int(parts[1]) in ids:
            fail(path, number, expected, line)
        ids[int(parts[1])] = parts[0]
        if int(parts[1]) > last:
            last, where, text = int(parts[1]), number, line
    if last >= len(ids):
        fail(path, where, f"remap_id below {len(ids)}, the number of lines", text)
    return np.array([ids[i] for i in range(len(ids))], dtype=np.str_)
