"""A folder of packed tensors: `card.json`, which says what they are, and `tensors.safetensors`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_tinykg.codecs.rows import PackedRows
from lightning_tinykg.sgquant.order import RowOrder
from lightning_tinykg.sgquant.packed import PackedFeatures
from lightning_tinykg.sgquant.shares import Shares

__all__ = [
    "PackedFileError",
    "describe",
    "load_features",
    "read_folder",
    "restore",
    "save_features",
    "tensors_of",
    "write_folder",
]

FORMAT, VERSION = "lightning_tinykg.sgquant", 3
READS = (1, 2, VERSION)
CARD, TENSORS = "card.json", "tensors.safetensors"


class PackedFileError(ValueError):
    """A folder that is corrupt, of something else, or of another model."""


def write_folder(folder: Path, content: str, tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> None:
    """Write tensors and what is said of them.

    Args:
        folder: Made if it is not there.
        content: What the folder holds: `"model"` or `"features"`.
        tensors: By name.
        said: Plain primitives.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, folder / TENSORS)
    card = {**said, "format": FORMAT, "version": VERSION, "content": content, "sha256": _sha256(folder / TENSORS)}
    (folder / CARD).write_text(json.dumps({**card, "checksum": _checksum(card)}, indent=1), encoding="utf-8")


def read_folder(folder: Path, content: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_folder` wrote.

    Raises:
        PackedFileError: If it is missing, corrupt or of something else; the message names the file.
    """
    path = folder / CARD
    if not path.is_file() or not (folder / TENSORS).is_file():
        raise PackedFileError(f"{folder}: must hold {CARD} and {TENSORS}, and does not")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PackedFileError(f"{path}: corrupt: no JSON ({error})") from None
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise PackedFileError(f"{path}: of something else: its format is not {FORMAT!r}")
    if card.get("version") not in READS:
        read = " and ".join(map(str, READS))
        raise PackedFileError(f"{path}: of format version {card.get('version')}, this release reads versions {read}")
    if card.pop("checksum", None) != _checksum(card):
        raise PackedFileError(f"{path}: changed after it was written: its checksum does not fit")
    if card["content"] != content:
        raise PackedFileError(f"{path}: must be of a {content}, got one of a {card['content']}")
    if _sha256(folder / TENSORS) != card["sha256"]:
        raise PackedFileError(f"{folder / TENSORS}: corrupt: its SHA-256 is not the one in {CARD}")
    try:
        return load_file(folder / TENSORS), card
    except SafetensorError as error:
        raise PackedFileError(f"{folder / TENSORS}: corrupt ({error})") from None


def tensors_of(name: str, packed: PackedFeatures) -> dict[str, Tensor]:
    """The tensors of packed features, their names beginning with one of theirs."""
    tensors = {
        f"{name}.{number}.{key}": tensor
        for number, part in enumerate(packed.parts)
        for key, tensor in part.state().items()
    }
    if packed.order is not None:
        tensors[f"{name}.slot"] = packed.order.slots(slice(None))
    if packed.shares is not None:
        tensors |= {f"{name}.{key}": tensor for key, tensor in packed.shares.tensors().items()}
    return tensors


def describe(packed: PackedFeatures) -> dict[str, Any]:
    """What else it takes to make them again, in plain primitives."""
    counts = list(packed.order.counts) if packed.order is not None else None
    bits = [part.bits for part in packed.parts]
    shares = None if packed.shares is None else list(packed.shares.parts)
    return {"shape": list(packed.shape), "bits": bits, "counts": counts, "run": packed.run, "shares": shares}


def restore(name: str, tensors: Mapping[str, Tensor], said: Mapping[str, Any]) -> PackedFeatures:
    """Undo `tensors_of` and `describe`.

    Raises:
        PackedFileError: If they do not belong together.
    """
    try:
        rows, *row_shape = said["shape"]
        dim = said["run"]
        for size in row_shape:
            dim *= size
        parts = []
        for number, bits in enumerate(said["bits"]):
            prefix = f"{name}.{number}."
            state = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            parts.append(PackedRows.from_state(state, bits, dim))
        order = None if said["counts"] is None else RowOrder(said["counts"], slot=tensors[f"{name}.slot"])
        shares = None
        if said.get("shares") is not None:  # which the first version of the format does not know
            keys = [key for key in Shares._fields if f"{name}.{key}" in tensors]
            shares = Shares(tuple(said["shares"]), **{key: tensors[f"{name}.{key}"] for key in keys})
        return PackedFeatures(parts, order, row_shape, said["run"], rows, shares)
    except (KeyError, ValueError, TypeError) as error:
        raise PackedFileError(f"{name}: card and tensors do not belong together: {error}") from None


def save_features(folder: str | Path, packed: PackedFeatures) -> None:
    """Write packed features, such as those that a service is to answer from.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from lightning_tinykg.sgquant.quantize import Level
        >>> packed = PackedFeatures.encode(torch.randn(4, 3), [Level(4, -2.0, 2.0)])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_features(folder, packed)
        ...     load_features(folder)
        PackedFeatures([4, 3], bits 4, 16 bytes)
    """
    write_folder(Path(folder), "features", tensors_of("features", packed), {"features": describe(packed)})


def load_features(folder: str | Path) -> PackedFeatures:
    """Read what `save_features` wrote.

    Raises:
        PackedFileError: If it is missing, corrupt or of something else.
    """
    tensors, card = read_folder(Path(folder), "features")
    return restore("features", tensors, card["features"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(card: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()
