"""Opting a region out of compression: ``keep_exact``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.autograd.graph import saved_tensors_hooks

from lightning_tinykg.activations.keeping import Saved
from lightning_tinykg.activations.observer import THREAD, Observer, Thread


@contextmanager
def keep_exact(*, hooks: bool = True) -> Iterator[None]:
    """Opt a region out: within it, what autograd saves is kept as it is, whatever ``bits`` and ``modules`` say.

    It opts out of the innermost :class:`compress_activations` (or ``TinyKGCallback``) that is entered; where there is
    none it does nothing, so a model can use it whether it is compressed or not. It is a decorator as well:
    ``@keep_exact()``. Forms that lose nothing are still used: rows that can be gathered again, duplicates, narrowed
    integers; and the ledger lists what is kept.

    Args:
        hooks: False takes the saved-tensor hooks off as well. Autograd then keeps the region's tensors itself, the
            ledger does not know of them, and what refuses to run under hooks runs: ``torch.func.grad``, ``vjp``,
            ``jacrev`` and ``hessian``. Needs PyTorch 2.8.

    Example:
        >>> import torch
        >>> from lightning_tinykg import compress_activations, keep_exact
        >>> x = torch.randn(1000, 64, requires_grad=True)
        >>> with compress_activations(bits=2) as ledger:
        ...     hidden = x.cumsum(0).tanh()
        ...     with keep_exact():
        ...         loss = hidden.exp().sum()
        >>> [(entry.op, entry.codec) for entry in ledger]
        [('Tanh.result', 'int4'), ('Exp.result', 'exact')]
    """
    if torch.compiler.is_compiling():  # the graph that is traced runs, and saves, later
        yield
        return
    region: Observer | Thread = THREAD.observers[-1] if THREAD.observers else THREAD
    removed: list[saved_tensors_hooks] = []
    region.exact += 1
    try:
        while not hooks and (observer := _on_top()) is not None:
            removed.append(saved_tensors_hooks(observer.pack, Saved.unpack))
            removed[-1].__exit__()
        yield
    finally:
        while removed:
            removed.pop().__enter__()
        region.exact -= 1


def _on_top() -> Observer | None:
    """The context whose hooks are the innermost in this thread; None if they are another tool's, or there are none."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is None:
        raise RuntimeError(f"keep_exact(hooks=False) needs PyTorch 2.8 or later, this is {torch.__version__}")
    observer = getattr((top(True) or (None,))[0], "__self__", None)
    return observer if isinstance(observer, Observer) else None
