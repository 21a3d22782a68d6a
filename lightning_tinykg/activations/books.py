"""What is kept so far, and who pays for it: the records, and the ledger's entries."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_tinykg.activations.keeping import Record, Saved
from lightning_tinykg.activations.ledger import Entry, Ledger
from lightning_tinykg.activations.storages import Layout, storage_id

_DYING = 4
"""Ops within which a node that only gave an index has died."""


class Books:
    """The books of one forward.

    Args:
        ledger: where they are written.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._records: dict[tuple[Any, ...], Record] = {}
        self._storages: dict[int, tuple[StorageWeakRef, Entry]] = {}
        self._referenced: set[int] = set()
        self._recent: deque[tuple[int, weakref.ref[Saved], Entry]] = deque()
        self._ops = 0

    def enter(self, module: str, op: str, codec: str, tensor: Tensor) -> Entry:
        """A new entry, which costs nothing yet."""
        entry = Entry(module, op, codec, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        self._ledger.entries.append(entry)
        return entry

    def charge(self, saved: Saved, tensor: Tensor, entry: Entry) -> None:
        """Charge a storage's bytes to the first save that keeps it alive."""
        self._recent.append((self._ops, weakref.ref(saved), entry))
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = (StorageWeakRef(storage), entry)
            entry.raw_bytes = storage.nbytes()

    def reference_bytes(self, tensor: Tensor) -> int:
        """The bytes a further reference keeps alive: the whole storage, unless another reference does already."""
        storage = storage_id(tensor)
        if storage in self._referenced:
            return 0
        self._referenced.add(storage)
        return tensor.untyped_storage().nbytes()

    def record(self, tensor: Tensor, layout: Layout) -> Record:
        """The record of a tensor's elements, a new one if there is none."""
        key = _key(storage_id(tensor), layout, tensor.dtype, tensor._version)
        if key not in self._records:
            self._records[key] = Record(StorageWeakRef(tensor.untyped_storage()))
        return self._records[key]

    def find(self, storage: int, layout: Layout, dtype: torch.dtype, version: int) -> Record | None:
        """The record of such elements, if there is one."""
        return self._records.get(_key(storage, layout, dtype, version))

    def next_op(self, func: Any) -> None:
        """An op begins: strike off what a node saved that died at once.

        A ``topk`` of which only the indices are used saves them, and is gone before the next few ops are.
        """
        self._ops += 1
        if func is Tensor.backward:  # from here on, nodes die because they have done their work
            self._recent.clear()
        for _ in range(len(self._recent)):
            noted, saved, entry = self._recent.popleft()
            if saved() is None:
                self._strike(entry)
            elif self._ops - noted < _DYING:
                self._recent.append((noted, saved, entry))

    def _strike(self, entry: Entry) -> None:
        entry.raw_bytes = entry.stored_bytes = 0
        for key in [key for key, record in self._records.items() if record.entry is entry]:
            if self._records.pop(key).reference is not None:
                self._referenced.discard(key[0])
        for storage in [storage for storage, (_, payer) in self._storages.items() if payer is entry]:
            del self._storages[storage]

    def close(self) -> None:
        """The forward is over: leave out what the user still holds, and let go of everything."""
        references: dict[int, list[Entry]] = {}
        for key, record in self._records.items():
            if record.reference is not None and record.entry is not None:
                references.setdefault(key[0], []).append(record.entry)
        for storage, (weak, entry) in self._storages.items():
            ours = references.get(storage, [])
            # besides our references, the storage's Python object counts
            if not weak.expired() and torch._C._storage_Use_Count(storage) > len(ours) + 1:
                entry.raw_bytes = 0
                for reference in ours:
                    reference.stored_bytes = 0
        self._records.clear()
        self._storages.clear()


def _key(storage: int, layout: Layout, dtype: torch.dtype, version: int) -> tuple[Any, ...]:
    geometry = () if layout.dense else (layout.shape, layout.stride)
    return (storage, layout.offset, layout.numel, dtype, version, geometry)
