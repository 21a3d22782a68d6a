"""What is known of each storage that a forward touches: whose it is, how it was made, and what is kept of it.

Not all that autograd saves belongs to the graph: parameters, the batch and the edge index are the user's, and cost
nothing to refer to. What an op made while compression was on belongs to the graph.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_tinykg.activations.storages import (
    Layout,
    is_parameter,
    is_plain,
    is_users_weight,
    is_weight,
    ordinary,
    storage_id,
    tensors_in,
)

if TYPE_CHECKING:
    from lightning_tinykg.activations.keeping import Record
    from lightning_tinykg.activations.ledger import Entry
    from lightning_tinykg.activations.recipes import Recipe


class Value:
    """One storage.

    Attributes:
        number: how many were met before it.
        storage: weak reference to it; while it is held, no other storage gets its identity.
        users: whether it is the user's memory, free to refer to; None where that is not known yet.
        recipe: how it was made, if that can be repeated.
        payer: the ledger's entry that is charged for its raw bytes.
        references: the entries that refer to it; the first is charged for it.
        wanted: by tensor that could have been made of it again, had it not been for its own code: the bytes of that.
        raw: a tensor in it, while it is held for a finer code.
        apart: whether there are tensors in it whose versions are counted apart: ``x`` and ``x.data``.
        blurred: whether it was changed since: no version tells any more what is in it.
    """

    __slots__ = (
        "_one_less",
        "_records",
        "apart",
        "blurred",
        "number",
        "payer",
        "raw",
        "recipe",
        "references",
        "storage",
        "users",
        "wanted",
    )

    def __init__(self, storage: StorageWeakRef, number: int, one_less: Callable[[ref[Record]], None]) -> None:
        self.number = number
        self._one_less = one_less
        self.storage = storage
        self.users: bool | None = None
        self.recipe: Recipe | None = None
        self.payer: Entry | None = None
        self.references: list[Entry] = []
        self.wanted: dict[object, int] = {}
        self.raw: Tensor | None = None
        self.apart = self.blurred = False
        # weak: what no save holds any more, after a backward within the context, nobody asks for
        self._records: dict[object, ref[Record]] = {}

    def record(self, layout: Layout, dtype: torch.dtype, version: int) -> Record | None:
        """What is kept of these elements of it, if anything is."""
        if not self._records:
            return None
        record = self._records.get(_key(layout, dtype, version))
        return None if record is None else record()

    def keep(self, layout: Layout, dtype: torch.dtype, version: int, record: Record) -> None:
        """Note what is kept of these elements."""
        key = object() if self.blurred else _key(layout, dtype, version)  # which nobody will ask for
        self._records[key] = ref(record, self._one_less)

    @property
    def records(self) -> list[Record]:
        """All that is kept of it."""
        return [record for reference in self._records.values() if (record := reference()) is not None]

    def forget(self) -> None:
        """Forget how its elements were made; what was kept of them is nobody else's any more."""
        self.recipe = None
        self._records = {object(): record for record in self._records.values()}

    def drop(self, record: Record) -> None:
        """Forget what was kept."""
        self._records = {key: kept for key, kept in self._records.items() if kept() is not record}


def _key(layout: Layout, dtype: torch.dtype, version: int) -> tuple[Any, ...]:
    if layout.dense:
        return layout.offset, layout.numel, dtype, version
    return layout.offset, layout.numel, dtype, version, layout.shape, layout.stride


class Values:
    """The storages of one forward, by identity."""

    def __init__(self) -> None:
        self._by_storage: dict[int, Value] = {}
        self.met: list[Value] = []
        """All of them, in the order in which they were met."""
        self.died = [0]
        """How many records are gone, since no save holds them any more."""
        died = self.died  # and not the values themselves: they would hold themselves

        def one_less(record: ref[Record]) -> None:
            died[0] += 1

        self._one_less = one_less
        self.alive = 0
        """How many results were there, when it was looked last."""
        self.work = 0.0
        """What it would take to make all again that is known how to make."""
        self.any_apart = False
        self._lingering: deque[tuple[Value, int]] = deque()
        self._lingering_bytes = self._most_lingering = 0
        self._in_use = False

    def __iter__(self) -> Iterator[Value]:
        return iter(self.met)

    def forget_recipes(self) -> None:
        """Let go of how they were made, and of what that is held for."""
        self._release(0)
        for value in self:
            value.recipe = None

    def linger(self, tensor: Tensor, most: int) -> None:
        """Hold on to a tensor of which a coarse code is kept: what is made of it next may ask for a finer one.

        A layer's input is kept in 2 bits; the norm of its output asks for 8, and they may as well be the input's, if
        that is still there. Those before it are let go of, until there are no more than ``most`` bytes.

        Args:
            tensor: the tensor.
            most: bytes to hold: those of the largest tensor, as there may be of what is made again in the backward.
        """
        value = self.of(tensor)
        if value.raw is None:
            nbytes = tensor.untyped_storage().nbytes()
            self._lingering.append((value, nbytes))
            self._lingering_bytes += nbytes
        value.raw = tensor.detach()
        self._most_lingering = most
        if not self._in_use:
            self._release(most)

    def begin_use(self) -> None:
        """What is held is made use of: until :meth:`end_use`, none of it is let go of."""
        self._in_use = True

    def end_use(self) -> None:
        """It was made use of."""
        self._in_use = False
        self._release(self._most_lingering)

    def _release(self, most: int) -> None:
        while self._lingering and self._lingering_bytes > most:
            value, nbytes = self._lingering.popleft()
            self._lingering_bytes -= nbytes
            value.raw = None

    def clear(self) -> None:
        """Let go of everything."""
        self._by_storage.clear()
        self.met.clear()

    def of(self, tensor: Tensor) -> Value:
        """What is known of a plain tensor's storage."""
        storage = tensor.untyped_storage()
        value = self._by_storage.get(storage._cdata)
        if value is None:
            value = self._by_storage[storage._cdata] = Value(StorageWeakRef(storage), len(self.met), self._one_less)
            self.met.append(value)
        return value

    def known(self, tensor: Tensor) -> Value | None:
        """The same, if the storage was met before."""
        return self._by_storage.get(tensor.untyped_storage()._cdata)

    def set_apart(self, tensors: Iterable[Tensor]) -> None:
        """A tensor's ``data`` is asked for, which has version 0 of whatever version the tensor is; or it is set.

        What is known of the tensor's own version 0 is let go of, unless that is what it is at.
        """
        for tensor in filter(is_plain, tensors):
            value = self.of(tensor)
            self.any_apart = value.apart = True
            if tensor._version:
                value.forget()

    def lend(self, tensors: Iterable[Tensor]) -> None:
        """Memory is handed out, such as by ``x.numpy()``: no version tells any more whether it was changed."""
        for tensor in filter(is_plain, tensors):
            value = self.of(tensor)
            value.blurred = True
            value.forget()

    def before_change(self, tensors: Iterable[Tensor]) -> None:
        """Tensors are about to be changed: of memory whose versions are counted apart, nothing is known from now on."""
        for tensor in tensors:
            value = self.known(tensor) if is_plain(tensor) else None
            if value is not None and value.apart:
                value.blurred = True
                value.forget()

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Note tensors as the user's: the inputs of the model."""
        for tensor in tensors:
            if is_plain(tensor) and not tensor.requires_grad:
                value = self.of(tensor)
                value.users = value.users is not False

    def made(self, out: Any, given: Any) -> None:
        """Note what an op made. What requires a gradient need not be noted: its history tells.

        A view of the user's tensor remains the user's.

        Args:
            out: the op's result, or several.
            given: its arguments, with tensors among them.
        """
        for tensor in map(ordinary, tensors_in(out)):
            if tensor.requires_grad or not is_plain(tensor):
                continue
            value = self.of(tensor)
            if value.users is not None:
                continue
            storage = value.storage.cdata
            shared = [t for t in map(ordinary, tensors_in(given)) if is_plain(t) and storage_id(t) == storage]
            if all(t.requires_grad and not is_weight(t) for t in shared):
                value.users = False

    def is_users(self, tensor: Tensor, given: Any, value: Value | None = None) -> bool:
        """Whether a tensor that is about to be kept is the user's own memory, free to refer to.

        Args:
            tensor: a plain tensor.
            given: what the op that saves it was given: arguments, with tensors among them; None where that is not
                known.
            value: its storage, if that has been looked up.
        """
        if is_parameter(tensor) or ((base := tensor._base) is not None and is_parameter(base)):
            return True  # even if it was made just now: FSDP gathers its weights within the forward
        value = value or self.of(tensor)
        if value.users is not None:
            return value.users
        if is_weight(tensor):
            value.users = is_users_weight(tensor)
        elif tensor.requires_grad:
            value.users = False
        else:  # saved, not made by an op that was seen, and an input: it was there before
            storage = storage_id(tensor)
            if not any(is_plain(t) and storage_id(t) == storage for t in tensors_in(given)):
                return False
            value.users = True
        return value.users
