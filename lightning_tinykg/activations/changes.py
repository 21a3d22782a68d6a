"""Who changes a tensor, and what to do before that: whatever is to be made again from it gets a copy.

Plain autograd saves the rows that were gathered from a table, and does not care what becomes of the table. Here the
table is referred to instead, so a change of it, legal in plain autograd, has to be seen before it happens: ops that
write in place while the context is entered, and optimizers at any time (two losses of one forward, with a step
between their backwards). What is not seen (``weight.data`` changed by hand) raises in the backward.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_tinykg.activations.storages import is_plain, storage_id

if TYPE_CHECKING:
    from lightning_tinykg.activations.books import Books
    from lightning_tinykg.activations.keeping import Record

LENT: WeakKeyDictionary[Record, Books] = WeakKeyDictionary()
"""The records that something is to be made from again, and the books that a copy of them is entered in."""


def before_change(tensors: Iterable[Tensor]) -> None:
    """Tensors are about to be changed: copy what is still to be made again from them."""
    storages = {storage_id(tensor) for tensor in tensors if is_plain(tensor)}
    if not storages:
        return
    for record, books in list(LENT.items()):
        if record.storage.cdata in storages:
            del LENT[record]
            books.copy(record)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if LENT:  # hardly ever: after the backward there is nothing left to be made
        before_change(parameter for group in optimizer.param_groups for parameter in group["params"])


register_optimizer_step_pre_hook(_before_step)
