"""Results whose rounding another op would blow up: they are kept exactly once such an op is given them.

Rounding is off by a step of the group's range, while a sigmoid, a softmax or an exponential spans many orders of
magnitude: of ``1e-6`` rounding leaves nothing. Mostly that is as little as it looks, since the gradient of
``sigmoid(x) * h`` at such a place is next to nothing too. But ``log(sigmoid(x) + 1e-10)`` divides by it again, and a
step of a hundredth becomes a thousand. What an op like the logarithm sees, it keeps exactly itself (``rules.py``); of
what stands between, an addition or a maximum, nothing is saved at all. So the use of a fragile result decides, and of
what an addition, a maximum or an index makes of it: for ``log(1 - z)`` it is kept exactly, for ``(1 - z) * x`` not.

Nor is one made again of rounded scores then: of ``p = sigmoid(x)`` a cross entropy gives back ``1 / (p * (1 - p))``,
and the sigmoid multiplies that by ``p * (1 - p)``. Where the one is exact and the other is not, nothing is left of
their product.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_tinykg.activations.amplifying import only_leads
from lightning_tinykg.activations.following import Follower
from lightning_tinykg.activations.forms import Forms
from lightning_tinykg.activations.functions import Function
from lightning_tinykg.activations.keeping import Coded, Record, Saved
from lightning_tinykg.activations.ledger import Entry
from lightning_tinykg.activations.remaking import Remade
from lightning_tinykg.activations.storages import is_plain, ordinary, storage_id, tensors_in, viewed
from lightning_tinykg.activations.workspace import Workspace

FRAGILE = frozenset({"Sigmoid.result", "Softmax.result", "Exp.result", "Exp2.result", "Expm1.result"})
"""Saves that are fragile."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class _Rounded:
    """A fragile result that was rounded, or is made again of what was.

    Attributes:
        kept: what is kept of it, while a save has it, or the save that is made again.
        whole: the result itself; None once it has been let go of.
    """

    kept: weakref.ref[Record | Saved]
    whole: Tensor | None


class Fragiles:
    """The fragile results of one forward that were rounded, and what was made of them.

    A result that may have to be kept exactly is held while there is something of it that such an op could be given:
    ``1 - z`` is gone as soon as it has been multiplied. What is added to features, layer by layer, is not, so all that
    are held together take no more than the largest saved tensor.

    Args:
        forms: replaces their codes.
        follower: replaces what makes them again; None if nothing is made again.
        workspace: knows the largest tensor.
    """

    def __init__(self, forms: Forms, follower: Follower | None, workspace: Workspace) -> None:
        self._forms = forms
        self._follower = follower
        self._workspace = workspace
        self._results: weakref.WeakValueDictionary[int, Record | Saved] = weakref.WeakValueDictionary()
        self._entries: weakref.WeakKeyDictionary[Saved, Entry] = weakref.WeakKeyDictionary()
        self._held: weakref.WeakValueDictionary[int, _Rounded] = weakref.WeakValueDictionary()
        self._led_to: dict[int, tuple[StorageWeakRef, list[_Rounded]]] = {}
        self._leading: list[_Rounded] = []

    def note(self, tensor: Tensor, saved: Saved, entry: Entry) -> None:
        """A fragile result was saved: remember it, if it was rounded, or is made again of what was."""
        kept = saved.kept
        if isinstance(kept, Coded) and kept.record.bits < 32:
            self._results[storage_id(tensor)] = kept.record
        elif isinstance(kept, Remade) and not kept.making.exact:
            self._results[storage_id(tensor)] = saved
            self._entries[saved] = entry

    def before(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """An op is about to run: keep exactly what it would blow up the error of."""
        if self._leading:  # to a result that was not seen
            self._keep(self._leading)
            self._leading = []
        if self._led_to:
            self._led_to = {key: found for key, found in self._led_to.items() if not found[0].expired()}
        if function.amplifies and (self._results or self._led_to):
            found = [
                rounded
                for tensor in tensors_in(function.amplified.of(args, kwargs))
                if is_plain(tensor)
                for rounded in self._found(tensor)
            ]
            if not only_leads(function.name, args):
                self._keep(found)
            elif found:
                self._leading = found
                self._make_room()

    def after(self, out: Any) -> None:
        """It has run: what it made of fragile results is as fragile."""
        if not self._leading:
            return
        for tensor in map(ordinary, tensors_in(out)):
            if not is_plain(tensor):
                return  # and is not seen
            storage = StorageWeakRef(tensor.untyped_storage())
            if storage.cdata not in self._results:  # else it is a view of one
                _, before = self._led_to.get(storage.cdata, (storage, []))
                self._led_to[storage.cdata] = storage, list(dict.fromkeys([*before, *self._leading]))
        self._leading = []

    def clear(self) -> None:
        """The forward is over."""
        self._results.clear()
        self._led_to.clear()
        self._leading.clear()

    def _found(self, tensor: Tensor) -> list[_Rounded]:
        """What was rounded of what a tensor is, or was made of."""
        key = storage_id(tensor)
        _, found = self._led_to.get(key, (None, []))
        kept = self._results.get(key)
        if kept is None:
            return found
        rounded = self._held.get(key)
        if rounded is None or rounded.whole is None:  # another storage may have its place then
            rounded = self._held[key] = _Rounded(weakref.ref(kept), viewed(tensor).detach())
        return [*found, rounded]

    def _make_room(self) -> None:
        """Let go of what was held first, where all together take more than the largest saved tensor."""
        room = self._workspace.largest
        for rounded in reversed(list(self._held.values())):
            if rounded.whole is not None:
                room -= rounded.whole.nbytes
                if room < 0:
                    rounded.whole = None

    def _keep(self, found: list[_Rounded]) -> None:
        for rounded in found:
            kept = rounded.kept()
            if rounded.whole is None:
                continue
            with torch.no_grad(), torch._C.DisableTorchFunction():
                if isinstance(kept, Saved):
                    assert self._follower is not None
                    self._follower.make_exactly(saved=kept, result=rounded.whole, entry=self._entries[kept])
                elif kept is not None and kept.bits < 32 and kept.entry is not None:
                    self._forms.value(rounded.whole, 32, kept.entry)
