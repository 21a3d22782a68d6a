"""What is kept so far, and who pays for it: the records, and the ledger's entries."""

from __future__ import annotations

import weakref
from collections import Counter, deque
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_tinykg.activations import changes
from lightning_tinykg.activations.keeping import Record, Saved
from lightning_tinykg.activations.ledger import Entry, Ledger
from lightning_tinykg.activations.storages import Layout, storage_id
from lightning_tinykg.codecs.lossless import RawCode

_BACKWARDS = (Tensor.backward, torch.autograd.backward, torch.autograd.grad)

_DYING = 4
"""Ops within which a node that only gave an index has died."""


class Books:
    """The books of one forward.

    Args:
        ledger: where they are written.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        # weak: what no save holds any more, after a backward within the context, nobody asks for
        self._records: WeakValueDictionary[tuple[Any, ...], Record] = WeakValueDictionary()
        self._references: dict[int, list[Entry]] = {}
        self._storages: dict[int, tuple[StorageWeakRef, Entry]] = {}
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

    def refer(self, tensor: Tensor, entry: Entry) -> None:
        """Charge a reference for what it keeps alive: the whole storage, unless another reference does already."""
        references = self._references.setdefault(storage_id(tensor), [])
        entry.stored_bytes = 0 if references else tensor.untyped_storage().nbytes()
        references.append(entry)

    def record(self, tensor: Tensor, layout: Layout) -> Record:
        """The record of a tensor's elements, a new one if there is none."""
        key = _key(storage_id(tensor), layout, tensor.dtype, tensor._version)
        record = self._records.get(key)
        if record is None:
            record = self._records[key] = Record(StorageWeakRef(tensor.untyped_storage()))
        return record

    def find(self, storage: int, layout: Layout, dtype: torch.dtype, version: int) -> Record | None:
        """The record of such elements, if there is one."""
        return self._records.get(_key(storage, layout, dtype, version))

    def next_op(self, func: Any) -> None:
        """An op begins: strike off what a node saved that died at once.

        A ``topk`` of which only the indices are used saves them, and is gone before the next few ops are.
        """
        self._ops += 1
        if func in _BACKWARDS:  # from here on, nodes die because they have done their work
            self._recent.clear()
        for _ in range(len(self._recent)):
            noted, saved, entry = self._recent.popleft()
            if saved() is None:
                self._strike(entry)
            elif self._ops - noted < _DYING:
                self._recent.append((noted, saved, entry))

    def _strike(self, entry: Entry) -> None:
        for storage, references in list(self._references.items()):
            others = [reference for reference in references if reference is not entry]
            if len(others) == len(references):
                continue
            if others:
                others[0].stored_bytes += entry.stored_bytes
                self._references[storage] = others
            else:
                del self._references[storage]
        for key in [key for key, record in self._records.items() if record.entry is entry]:
            del self._records[key]
        for storage in [storage for storage, (_, payer) in self._storages.items() if payer is entry]:
            del self._storages[storage]
        entry.raw_bytes = entry.stored_bytes = 0

    def lend(self, record: Record) -> None:
        """Something is to be made again from a record that refers to a tensor: it has to be told of changes."""
        changes.LENT[record] = self

    def copy(self, record: Record) -> None:
        """Give a record its own copy of what it refers to, which is about to be changed."""
        if record.reference is None:
            return
        run = record.reference.restore()
        entry = self.enter("", "changed in place", "exact", run)
        with torch.no_grad(), torch._C.DisableTorchFunction():
            record.value, record.reference = RawCode(run.reshape(-1).clone()), None
        entry.stored_bytes, record.entry = record.value.nbytes, entry

    def close(self) -> None:
        """The forward is over: leave out what the user still holds, and let go of everything."""
        alive = Counter(key[0] for key, record in self._records.items() if record.reference is not None)
        for storage, (weak, entry) in self._storages.items():
            # besides our references, the storage's Python object counts
            if not weak.expired() and torch._C._storage_Use_Count(storage) > alive[storage] + 1:
                entry.raw_bytes = 0
                for reference in self._references.get(storage, ()):
                    reference.stored_bytes = 0
        self._records.clear()
        self._references.clear()
        self._storages.clear()


def _key(storage: int, layout: Layout, dtype: torch.dtype, version: int) -> tuple[Any, ...]:
    geometry = () if layout.dense else (layout.shape, layout.stride)
    return (storage, layout.offset, layout.numel, dtype, version, geometry)
