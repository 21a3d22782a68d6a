"""An exported folder: its card, its files mapped into memory, and the checks that refuse what does not belong together.

A folder holds ``card.json``, ``items.safetensors``, ``users.safetensors``, ``seen.safetensors`` and, if it was written
where faiss is installed, ``items.faiss`` (or ``items-0.faiss``, ...). Reading it takes numpy, and faiss for the latter.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_tinykg.hqgnn.fastscan import CodeIndex, faiss, unsupported
from lightning_tinykg.hqgnn.scoring import CodeTable, Floats
from lightning_tinykg.hqgnn.shards import file_names, shards_of

__all__ = ["FORMAT", "VERSION", "Export", "ExportError", "checksum", "map_tensors", "sha256"]

FORMAT, VERSION = "lightning_tinykg.lowbit", 2
READABLE = (1, 2)
"""Versions that are read. Version 1 has a zero for every scale; from 2 on it is left out where it follows from it."""
FILES = ("items.safetensors", "users.safetensors", "seen.safetensors")
DTYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64, "F32": np.float32}
LONGEST_HEADER = 2**20

Arrays = dict[str, npt.NDArray[Any]]


class ExportError(ValueError):
    """An export that is corrupt, truncated or put together of parts that do not belong together."""


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(card: dict[str, Any]) -> str:
    """The SHA-256 of all that a card says, but for this.

    Example:
        >>> checksum({"bits": 4, "checksum": "old"}) == checksum({"bits": 4})
        True
    """
    said = {key: value for key, value in card.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def map_tensors(path: Path) -> tuple[Arrays, dict[str, str]]:
    """Map the tensors of a safetensors file into memory; nothing but the header is read.

    Args:
        path: the file.

    Returns:
        The tensors by name, read-only, and the file's metadata.

    Raises:
        ExportError: If the file is no safetensors file or does not end where its header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(LONGEST_HEADER, size - 8):
            raise ExportError(f"{path}: corrupt: its header would take {length} of {size} bytes")
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            found = sorted((info["data_offsets"], name, info["dtype"], info["shape"]) for name, info in header.items())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ExportError(f"{path}: corrupt: its header can't be read ({error})") from None
    tensors, expected = {}, 0
    for (start, stop), name, kind, shape in found:
        if kind not in DTYPES or start != expected:
            raise ExportError(f"{path}: corrupt: tensor {name!r} of type {kind} at {start}, where {expected} is due")
        dtype = np.dtype(DTYPES[kind])
        count = int(np.prod(shape, dtype=np.int64))
        if stop - start != count * dtype.itemsize:
            raise ExportError(f"{path}: corrupt: tensor {name!r} of shape {shape} takes {stop - start} bytes")
        if 8 + length + stop > size:
            raise ExportError(f"{path}: truncated: {size} bytes, where tensor {name!r} ends at {8 + length + stop}")
        mapped = np.memmap(path, dtype, "r", 8 + length + start, tuple(shape)) if count else np.zeros(shape, dtype)
        tensors[name], expected = np.asarray(mapped), stop
    if 8 + length + expected != size:
        raise ExportError(f"{path}: corrupt: {size} bytes, where its tensors end at {8 + length + expected}")
    return tensors, metadata


@dataclass(frozen=True)
class Export:
    """A folder that was checked.

    Args:
        folder: where it is.
        card: what it says of itself.
        items: the items' codes.
        users: the users' vectors, float32 ``[num_users, dim]``, or their codes.
        seen: where each user's items start, int64 ``[num_users + 1]``, and the items.
        ids: by ``"user"`` and ``"item"``: ids in the data set, where they are not the row numbers.
    """

    folder: Path
    card: dict[str, Any]
    items: CodeTable
    users: CodeTable | Floats
    seen: tuple[npt.NDArray[np.int64], npt.NDArray[Any]]
    ids: dict[str, Arrays]

    @classmethod
    def open(cls, folder: Path, *, verify: bool = True) -> Export:
        """Map a folder's files and check that they are whole and belong together.

        Args:
            folder: what was exported to.
            verify: whether to read all files and hold them against the card.

        Raises:
            ExportError: If they are not; the message names the file and what is wrong with it.
        """
        card = _card(folder)
        for name, entry in card["files"].items():
            path = folder / name
            if not path.is_file():
                raise ExportError(f"{path}: missing, though card.json lists it")
            if path.stat().st_size != entry["bytes"]:
                raise ExportError(f"{path}: {path.stat().st_size} bytes, where card.json says {entry['bytes']}")
            if verify and sha256(path) != entry["sha256"]:
                raise ExportError(f"{path}: corrupt: its SHA-256 is not the one in card.json")
        parts = {}
        for name in FILES:
            parts[name], metadata = map_tensors(folder / name)
            if metadata.get("content") != card["content"]:
                raise ExportError(f"{folder / name}: of another export than card.json")
        version = card["version"]
        items = _table(folder / FILES[0], parts[FILES[0]], card["bits"], card["dim"], card["num_items"], version)
        users: CodeTable | Floats
        if card["users"] == "codes":
            users = _table(
                folder / FILES[1], parts[FILES[1]], card["user_bits"], card["dim"], card["num_users"], version
            )
        else:
            users = _tensor(folder / FILES[1], parts[FILES[1]], "vectors", (card["num_users"], card["dim"]))
        path, seen = folder / FILES[2], parts[FILES[2]]
        starts = _tensor(path, seen, "ptr", (card["num_users"] + 1,))
        seen_items = _tensor(path, seen, "item", (card["num_seen"],))
        if starts[0] != 0 or starts[-1] != len(seen_items) or (np.diff(starts) < 0).any():
            raise ExportError(f"{path}: 'ptr' does not ascend from 0 to {len(seen_items)}")
        if verify and len(seen_items) and not 0 <= seen_items.min() <= seen_items.max() < len(items):
            raise ExportError(f"{path}: an item that is not in 0..{len(items) - 1}")
        named = {what: parts[f"{what}s.safetensors"] for what in ("user", "item")}
        ids = {what: {name: t for name, t in own.items() if name.startswith("ids")} for what, own in named.items()}
        return cls(folder, card, items, users, (starts, seen_items), ids)

    def ids_of(self, what: str) -> npt.NDArray[Any] | None:
        """The ids of ``"user"`` or ``"item"`` in the data set, by row; None where they are the row numbers."""
        parts = self.ids[what]
        if not parts:
            return None
        if "ids" in parts:
            return parts["ids"]
        text, ends = parts["ids.text"].tobytes(), parts["ids.ends"].tolist()
        return np.array([text[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)], dtype=np.str_)

    def faiss_index(self) -> CodeIndex:
        """The faiss index: the exported one, or one made of the codes if there is none.

        Raises:
            ExportError: If the exported one can't be read, or is not one of these codes.
            FaissMissing: If faiss is not installed.
            ValueError: If faiss can't hold such codes.
        """
        names = self.card["faiss"]
        if not names or unsupported(self.items):
            return CodeIndex(self.items)
        expected = file_names(len(shards_of(self.items)[1]) - 1)
        if names != expected:
            raise ExportError(
                f"{self.folder}: card.json lists {len(names)} faiss files, the codes want {len(expected)}"
            )
        module, indexes = faiss(), []
        for name in names:
            try:
                indexes.append(module.read_index(str(self.folder / name)))
            except RuntimeError as error:
                raise ExportError(f"{self.folder / name}: faiss can't read it: {error}") from None
        try:
            return CodeIndex(self.items, indexes)
        except ValueError as error:
            raise ExportError(f"{self.folder}: faiss index does not match {FILES[0]}: {error}") from None


def _card(folder: Path) -> dict[str, Any]:
    path = folder / "card.json"
    if not path.is_file():
        raise ExportError(f"{folder}: no export, it has no card.json")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f"{path}: corrupt: no JSON ({error})") from None
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise ExportError(f"{path}: of something else: its format is not {FORMAT!r}")
    if card.get("version") not in READABLE:
        known = " and ".join(map(str, READABLE))
        raise ExportError(f"{path}: of format version {card.get('version')}, this release reads versions {known}")
    if card.get("checksum") != checksum(card):
        raise ExportError(f"{path}: changed after it was written: its checksum does not fit; export again")
    missing = [name for name in FILES if name not in card["files"]]
    if missing:
        raise ExportError(f"{path}: does not list {missing[0]}")
    return card


def _tensor(path: Path, parts: Arrays, name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    if name not in parts:
        raise ExportError(f"{path}: has no tensor {name!r}")
    if parts[name].shape != shape:
        raise ExportError(f"{path}: {name!r} has shape {list(parts[name].shape)}, where card.json wants {list(shape)}")
    return parts[name]


def _table(path: Path, parts: Arrays, bits: int, dim: int, rows: int, version: int) -> CodeTable:
    packed = _tensor(path, parts, "codes", (rows, -(-dim * bits // 8)))
    missing = [name for name in (("scale", "zero") if version == 1 else ("scale",)) if name not in parts]
    if missing:
        raise ExportError(f"{path}: has no tensor {missing[0]!r}")
    try:
        return CodeTable(packed, parts["scale"], parts.get("zero"), bits, dim)
    except ValueError as error:
        raise ExportError(f"{path}: {error}") from None
