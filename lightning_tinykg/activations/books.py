"""Who pays for what is kept: the ledger's entries."""

from __future__ import annotations

import weakref
from collections import deque

import torch
from torch import Tensor

from lightning_tinykg.activations import changes
from lightning_tinykg.activations.keeping import Kept, Record, Saved
from lightning_tinykg.activations.ledger import Entry, Ledger
from lightning_tinykg.activations.storages import Layout
from lightning_tinykg.activations.values import Value, Values
from lightning_tinykg.activations.workspace import Workspace
from lightning_tinykg.codecs.lossless import RawCode

_DYING = 4
"""Ops within which a node that only gave an index has died."""

_DTYPES: dict[torch.dtype, str] = {}


def _dtype_name(dtype: torch.dtype) -> str:
    if dtype not in _DTYPES:
        _DTYPES[dtype] = str(dtype).removeprefix("torch.")
    return _DTYPES[dtype]


class Books:
    """The books of one forward.

    Args:
        ledger: where they are written.
        values: the storages.
        workspace: has to know the largest tensor.
    """

    def __init__(self, ledger: Ledger, values: Values, workspace: Workspace) -> None:
        self._ledger = ledger
        self._values = values
        self._workspace = workspace
        self._recent: deque[tuple[int, weakref.ref[Saved], Entry]] = deque()
        self._ops = 0

    def enter(self, module: str, op: str, codec: str, tensor: Tensor) -> Entry:
        """A new entry, which costs nothing yet."""
        shape = () if tensor.is_nested and type(tensor) is Tensor else tuple(tensor.shape)  # a strided one has none
        entry = Entry(module, op, codec, shape, _dtype_name(tensor.dtype))
        self._ledger.entries.append(entry)
        return entry

    def charge(self, saved: Saved, tensor: Tensor, entry: Entry) -> None:
        """Charge a storage's bytes to the first save that keeps it alive."""
        self._workspace.largest = max(self._workspace.largest, tensor.nbytes)
        self._strike_dead()
        self._recent.append((self._ops, weakref.ref(saved), entry))
        value = self._values.of(tensor)
        if value.payer is None:
            value.payer = entry
            entry.raw_bytes = tensor.untyped_storage().nbytes()

    def refer(self, tensor: Tensor, entry: Entry) -> None:
        """Charge a reference for what it keeps alive: the whole storage, unless another reference does already."""
        references = self._values.of(tensor).references
        entry.stored_bytes = 0 if references else tensor.untyped_storage().nbytes()
        references.append(entry)

    def record(self, tensor: Tensor, layout: Layout) -> Record:
        """The record of a tensor's elements, a new one if there is none."""
        value = self._values.of(tensor)
        record = value.record(layout, tensor.dtype, tensor._version)
        if record is None:
            record = Record(value.storage)
            value.keep(layout, tensor.dtype, tensor._version, record)
        return record

    def linger(self, tensor: Tensor) -> None:
        """Hold on to what is kept coarsely, up to the bytes of the largest tensor, as is held in the backward."""
        self._values.linger(tensor, self._workspace.largest)

    def next_op(self, backward: bool) -> None:
        """An op begins: strike off what a node saved that died at once.

        A ``topk`` of which only the indices are used saves them, and is gone before the next few ops are.

        Args:
            backward: whether it is a backward: from there on, nodes die because they have done their work.
        """
        self._ops += 1
        recent = self._recent
        if recent:
            self._strike_dead()
            while recent and (backward or self._ops - recent[0][0] >= _DYING):
                recent.popleft()

    def _strike_dead(self) -> None:
        dead = [noted for noted in self._recent if noted[1]() is None]
        for noted in dead:
            self._recent.remove(noted)
            self._strike(noted[2])

    def _strike(self, entry: Entry) -> None:
        for value in self._values:
            if value.payer is entry:
                value.payer = None
            others = [reference for reference in value.references if reference is not entry]
            if len(others) < len(value.references):
                value.references = others
                if others:
                    others[0].stored_bytes += entry.stored_bytes
            for record in value.records:
                if record.entry is entry:
                    value.drop(record)
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

    def is_held(self, value: Value) -> bool:
        """Whether anybody but our references holds a storage."""
        alive = sum(record.reference is not None for record in value.records)
        # besides our references, the storage's Python object counts
        return not value.storage.expired() and torch._C._storage_Use_Count(value.storage.cdata) > alive + 1

    def let_go(self, record: Record, value: Value, remade: Kept, recipe: str, work: float) -> None:
        """What a record keeps is made again after all.

        Args:
            record: the record.
            value: its storage.
            remade: how its elements are made.
            recipe: the same, in words.
            work: the bytes that are moved for that.
        """
        entry = record.entry
        record.value, record.reference, record.remade = None, None, remade
        if entry is not None:
            value.references = [reference for reference in value.references if reference is not entry]
            entry.stored_bytes, entry.codec, entry.recipe, entry.work = 0, "recipe", recipe, int(work)

    def close(self) -> None:
        """The forward is over: leave out what the user still holds, and let go of everything."""
        for value in self._values:
            if value.payer is not None and self.is_held(value):
                value.payer.raw_bytes = 0
                for reference in value.references:
                    reference.stored_bytes = 0
        self._values.clear()
