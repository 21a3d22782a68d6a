"""Writing the folder that a service loads: whole, or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from torch import Tensor

from lightning_tinykg.hqgnn import folder as folders
from lightning_tinykg.hqgnn.fastscan import CodeIndex, unsupported
from lightning_tinykg.hqgnn.index import LowBitIndex
from lightning_tinykg.hqgnn.replacing import replaceable, replacing
from lightning_tinykg.hqgnn.scoring import CodeTable, pack_rows
from lightning_tinykg.hqgnn.table import QuantizedTable

if TYPE_CHECKING:
    from lightning_tinykg.data import KGRecDataModule
    from lightning_tinykg.hqgnn.quantized import QuantizedRanking

__all__ = ["export_module", "write_export"]

VERSIONS = ("lightning-tinykg", "torch", "numpy", "safetensors", "faiss-cpu")

Ids = Sequence[Any] | npt.NDArray[Any] | None


def write_export(
    folder: str | os.PathLike[str],
    users: Tensor | QuantizedTable,
    items: QuantizedTable,
    seen: tuple[Tensor, Tensor],
    *,
    user_ids: Ids = None,
    item_ids: Ids = None,
    dataset: str | None = None,
    metrics: Mapping[str, float] | None = None,
    settings: Mapping[str, Any] | None = None,
    faiss: bool | None = None,
) -> Path:
    """Write packed codes, ids, seen items, the card and the faiss index.

    All of it is written to a folder beside, which then takes its name: there is never half an export. An export that
    was there before is replaced; a process that has it loaded keeps the old one.

    Args:
        folder: Where to. It may not exist yet, be empty, or hold an export.
        users: Full-precision users, float `[num_users, dim]`, or their codes.
        items: The items' codes.
        seen: Where each user's items start, int `[num_users + 1]`, and the items, int `[X]`: left out of what is
            recommended.
        user_ids: The users' ids in the data set, integers or strings `[num_users]`; None: they are the row numbers.
        item_ids: The same for items.
        dataset: The data set's name.
        metrics: What the model reached.
        settings: How it was trained; what JSON can't hold is left out.
        faiss: Whether to write a faiss index; None: if faiss is installed and can hold the codes.

    Returns:
        The folder.

    Raises:
        FileExistsError: If the folder holds something else.
        ImportError: For `faiss=True` without faiss.
        ValueError: If shapes do not belong together, values are not finite, or for `faiss=True`, faiss can't hold the
            codes.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> items = QuantizedTable(torch.tensor([[0], [1]], dtype=torch.uint8), torch.ones(1), -torch.ones(1), bits=1)
        >>> with TemporaryDirectory() as here:
        ...     out = write_export(f"{here}/out", torch.ones(1, 1), items, (torch.tensor([0, 0]), torch.tensor([])),
        ...                        faiss=False)
        ...     sorted(path.name for path in out.iterdir())
        ['card.json', 'items.safetensors', 'seen.safetensors', 'users.safetensors']
    """
    target = Path(folder).absolute()
    if not replaceable(target, _is_export):
        raise FileExistsError(f"{folder} is neither empty nor an export: choose another folder, or remove it")
    item_table = _packed(items)
    parts = {
        "items.safetensors": _table_parts(item_table) | _id_parts(item_ids, len(item_table), "item_ids"),
        "users.safetensors": _user_parts(users, item_table.dim),
        "seen.safetensors": _seen_parts(seen, len(item_table)),
    }
    num_users = len(parts["seen.safetensors"]["ptr"]) - 1
    rows = len(users.codes if isinstance(users, QuantizedTable) else users)
    if rows != num_users:
        raise ValueError(f"seen must have a start for each of {rows} users and the end, got {num_users + 1} starts")
    parts["users.safetensors"] |= _id_parts(user_ids, num_users, "user_ids")
    why = unsupported(item_table)
    if faiss and why:
        raise ValueError(f"faiss=True: {why}")
    if faiss is None:
        faiss = find_spec("faiss") is not None and why is None
    card: dict[str, Any] = {
        "format": folders.FORMAT,
        "version": folders.VERSION,
        "dataset": dataset,
        "bits": items.bits,
        "granularity": item_table.granularity,
        "dim": item_table.dim,
        "num_users": num_users,
        "num_items": len(item_table),
        "num_seen": len(parts["seen.safetensors"]["item"]),
        "bytes_per_item": item_table.row_bytes,
        "users": "codes" if isinstance(users, QuantizedTable) else "float32",
        "user_bits": users.bits if isinstance(users, QuantizedTable) else 32,
        "metrics": {name: _number(value) for name, value in (metrics or {}).items()},
        "settings": {name: value for name, value in (settings or {}).items() if _plain(value)},
        "versions": {name: found for name in VERSIONS if (found := _version(name))},
        "content": _content(parts),
    }
    with replacing(target) as partial:
        for name, tensors in parts.items():
            save_file(tensors, str(partial / name), metadata={"content": card["content"]})
        card["faiss"] = CodeIndex(item_table).save(partial) if faiss else []
        written = sorted(partial.iterdir())
        card["files"] = {p.name: {"bytes": p.stat().st_size, "sha256": folders.sha256(p)} for p in written}
        card["checksum"] = folders.checksum(card)
        (partial / "card.json").write_text(json.dumps(card, indent=1), encoding="utf-8")
    return Path(folder)


def export_module(
    module: QuantizedRanking,
    folder: str | os.PathLike[str],
    *,
    users: Literal["float32", "codes"] | None = None,
    data: KGRecDataModule | None = None,
    dataset: str | None = None,
    faiss: bool | None = None,
) -> LowBitIndex:
    """Export a trained `HQGNN` and load what was written.

    Args:
        module: With its graph.
        folder: See :func:`write_export`.
        users: Whether to keep users in full precision or as codes; None: as the module scores them.
        data: Where the ids of users and items are from; None: from the Trainer's data module, if there is one.
        dataset: The data set's name; None: that of the folder the data are in.
        faiss: Whether to write a faiss index; None: if faiss is installed and can hold the codes.

    Returns:
        The index, loaded from the folder.

    Raises:
        ValueError: For another `users`, and as :func:`write_export`.
    """
    users = users or ("codes" if module.quantize_users else "float32")
    if users not in ("float32", "codes"):
        raise ValueError(f"users must be 'float32' or 'codes', got {users!r}")
    user_table, item_table = module.tables()
    data = data or getattr(module._trainer, "datamodule", None)
    files, root = getattr(data, "files", None), getattr(data, "root", None)
    assert module._seen_ptr is not None
    assert module._seen_item is not None
    write_export(
        folder,
        user_table if users == "codes" else module.user_embeddings(),
        item_table,
        (module._seen_ptr, module._seen_item),
        user_ids=getattr(files, "user_ids", None),
        item_ids=getattr(files, "item_ids", None),
        dataset=dataset or (root.name if isinstance(root, Path) else "synthetic" if root else None),
        metrics=module.last_metrics,
        settings=dict(module.hparams),
        faiss=faiss,
    )
    return LowBitIndex.load(folder)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _number(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _plain(value: Any) -> bool:
    """Whether JSON holds it as it is."""
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))


def _packed(table: QuantizedTable) -> CodeTable:
    codes, zero = _array(table.codes), None if table.zero is None else _array(table.zero)
    return CodeTable(pack_rows(codes, table.bits), _array(table.scale), zero, table.bits, codes.shape[1])


def _array(tensor: Tensor) -> npt.NDArray[Any]:
    return np.ascontiguousarray(tensor.detach().cpu().numpy())


def _table_parts(packed: CodeTable) -> folders.Arrays:
    zero = {} if packed.zero is None else {"zero": packed.zero}
    return {"codes": packed.packed, "scale": packed.scale, **zero}


def _user_parts(users: Tensor | QuantizedTable, dim: int) -> folders.Arrays:
    if isinstance(users, QuantizedTable):
        packed = _packed(users)
        if packed.dim != dim:
            raise ValueError(f"users must have the items' {dim} dimensions, got {packed.dim}")
        return _table_parts(packed)
    if users.dim() != 2 or users.size(1) != dim:
        raise ValueError(f"users must have shape [num_users, {dim}], as the items have, got {list(users.shape)}")
    vectors = _array(users.float())
    if not np.isfinite(vectors).all():
        raise ValueError("users must be finite, got NaN or infinity")
    return {"vectors": vectors}


def _seen_parts(seen: tuple[Tensor, Tensor], num_items: int) -> folders.Arrays:
    ptr, item = (_array(part).astype(np.int64) for part in seen)
    count = np.diff(ptr)
    if ptr.ndim != 1 or not len(ptr) or ptr[0] != 0 or ptr[-1] != len(item) or (count < 0).any():
        raise ValueError(f"seen must start at 0, ascend and end at {len(item)}, the number of items seen")
    if len(item) and not 0 <= item.min() <= item.max() < num_items:
        raise ValueError(f"seen items must be in 0..{num_items - 1}, got {item.min()}..{item.max()}")
    item = item[np.lexsort((item, np.repeat(np.arange(len(count)), count)))]
    return {"ptr": ptr, "item": item.astype(np.int32) if num_items <= 2**31 else item}


def _id_parts(ids: Ids, rows: int, name: str) -> folders.Arrays:
    if ids is None:
        return {}
    array = np.asarray(ids)
    if array.shape != (rows,):
        raise ValueError(f"{name} must have shape ({rows},), got {array.shape}")
    if array.dtype.kind in "iu":
        return {"ids": array.astype(np.int64)}
    texts = [str(value).encode() for value in array.tolist()]
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    return {"ids.text": np.frombuffer(b"".join(texts), dtype=np.uint8), "ids.ends": ends}


def _content(parts: Mapping[str, folders.Arrays]) -> str:
    """One name for all that was exported, which each file bears: files of two exports do not mix."""
    found = sha256()
    for file, tensors in sorted(parts.items()):
        for name, tensor in sorted(tensors.items()):
            found.update(f"{file}/{name} {tensor.dtype} {tensor.shape}\n".encode())
            found.update(tensor.data if tensor.size else b"")
    return found.hexdigest()


def _is_export(folder: Path) -> bool:
    try:
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(card, dict) and card.get("format") == folders.FORMAT
