"""Results whose rounding another op would blow up: they are kept exactly once such an op is given them.

Rounding is off by a step of the group's range, while a sigmoid, a softmax or an exponential spans many orders of
magnitude: of ``1e-6`` rounding leaves nothing. Mostly that is as little as it looks, since the gradient of
``sigmoid(x) * h`` at such a place is next to nothing too. But ``log(sigmoid(x) + 1e-10)`` divides by it again, and a
step of a hundredth becomes a thousand. What an op like the logarithm sees, it keeps exactly itself (``rules.py``); of
what stands between, an addition or a clamp, nothing is saved at all. So the use of a fragile result decides, and of
what an addition, a clamp or an index makes of it: for ``log(1 - z)`` it is kept exactly, for ``(1 - z) * x`` it is not.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_tinykg.activations.forms import Forms
from lightning_tinykg.activations.functions import Function
from lightning_tinykg.activations.keeping import Record
from lightning_tinykg.activations.storages import is_plain, ordinary, storage_id, tensors_in, viewed

FRAGILE = frozenset({"Sigmoid.result", "Softmax.result", "Exp.result", "Exp2.result", "Expm1.result"})
"""Saves that are fragile."""


class _Rounded(NamedTuple):
    """A fragile result that was rounded.

    Attributes:
        record: what is kept of it, while a save has it.
        whole: the result itself.
    """

    record: weakref.ref[Record]
    whole: Tensor


class Fragiles:
    """The fragile results of one forward that were rounded, and what was made of them.

    A result that may have to be kept exactly is held while there is something of it that such an op could be given:
    ``1 - z`` is gone as soon as it has been multiplied.

    Args:
        forms: replaces their codes.
    """

    def __init__(self, forms: Forms) -> None:
        self._forms = forms
        self._results: weakref.WeakValueDictionary[int, Record] = weakref.WeakValueDictionary()
        self._led_to: dict[int, tuple[StorageWeakRef, list[_Rounded]]] = {}
        self._leading: list[_Rounded] = []

    def note(self, tensor: Tensor, record: Record) -> None:
        """A fragile result was rounded."""
        self._results[storage_id(tensor)] = record

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
            if function.only_leads:
                self._leading = found
            else:
                self._keep(found)

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
                self._led_to[storage.cdata] = storage, before + self._leading
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
        record = self._results.get(key)
        return found if record is None else [*found, _Rounded(weakref.ref(record), viewed(tensor).detach())]

    def _keep(self, found: list[_Rounded]) -> None:
        for rounded in found:
            record = rounded.record()
            if record is not None and record.bits < 32 and record.entry is not None:
                with torch.no_grad(), torch._C.DisableTorchFunction():
                    self._forms.value(rounded.whole, 32, record.entry)
