"""Sees each op, and so knows exactly which op saved what."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from lightning_tinykg.activations.attention import ATTENTION, Attention
from lightning_tinykg.activations.functions import function_of, opened
from lightning_tinykg.activations.keeper import Keeper
from lightning_tinykg.activations.keeping import Reference, Saved, not_compiled
from lightning_tinykg.activations.ledger import Entry
from lightning_tinykg.activations.modules import ModuleTracker
from lightning_tinykg.activations.storages import node_name, tensors_in, unwrapped

_HIDING = "CopySlices"
"""The node of an op in place on a view. What it holds is an op of PyTorch's own, but not known which."""

_PATIENCE = 8
"""Ops after which a save that no op has claimed is taken for unknown."""


class Thread(threading.local):
    """What is entered in this thread.

    Attributes:
        observers: of each context, the innermost last.
        exact: how often :func:`keep_exact` is entered around no context of this thread. On CUDA, a checkpoint runs
            its forward again on a thread of autograd's, which has the hooks of the thread that called backward.
    """

    def __init__(self) -> None:
        self.observers: list[Observer] = []
        self.exact = 0


THREAD = Thread()


_APPLY = torch.autograd.Function.apply.__func__.__code__


class Observer(TorchFunctionMode):
    """Sees each op, and so knows exactly which op saved what.

    While an op runs, what it saves is kept raw; when it returns, a walk from its result along the autograd graph
    finds the handles again, under their node and attribute, and they are encoded: no more than one op's tensors are
    raw at a time, and none is attributed by guess.
    """

    def __init__(self, keeper: Keeper, tracker: ModuleTracker) -> None:
        super().__init__()
        self.tracker = tracker
        self.exact = 0
        self.keeper = keeper
        # weak, since a node can die as soon as its op returns: an argsort's, for one
        self._pending: list[weakref.ref[Saved]] = []
        self._floor = torch.autograd._get_sequence_nr()
        self._left = False
        self._graphs: dict[int, list[Entry]] = {}  # what each compiled graph saved

    @property
    def unpacks_at_once(self) -> bool:
        """Whether most of what was saved comes back at once: at the start of one compiled graph's backward."""
        graphs = [sum(entry.raw_bytes for entry in entries) for entries in self._graphs.values()]
        return 2 * max(graphs, default=0) > self.keeper.ledger.raw_bytes

    @not_compiled
    def pack(self, tensor: Tensor) -> Saved:
        """Autograd saves a tensor."""
        exact = bool(self.exact) or not self.tracker.covers
        if THREAD.exact and self not in THREAD.observers:
            exact = True
        saved = Saved(tensor, self.tracker.path, exact, self.keeper.workspace)
        caller = sys._getframe(1)
        if caller.f_code is _APPLY:
            saved.function, saved.call = caller.f_locals["cls"].__name__, torch.autograd._get_sequence_nr()
        if self._left:  # out of order, which was told; there is nobody any more to encode it
            _keep_as_it_is(saved)
        else:
            self._pending.append(weakref.ref(saved))
        return saved

    @not_compiled
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # an op of a graph that is being traced runs, and saves, later
        if torch.compiler.is_compiling() or torch._C._is_tracing() or self._left:
            return func(*args, **kwargs)
        function = function_of(func)
        if function.asks:
            return func(*args, **kwargs)
        if function.opens:
            with self:
                return opened(func)(*args, **kwargs)
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return self._transformed(func, args, kwargs)
        # saved by something that is no op: a custom function, a compiled graph (which reads attributes first)
        if self._pending and not function.reads:
            self._claim(tensors_in((args, kwargs)), None, "")
        self.keeper.before(function, args, kwargs)
        out = func(*args, **kwargs)
        if function.reads and not isinstance(out, Tensor):
            return out
        if isinstance(out, (Tensor, tuple, list)):
            self.keeper.observe(func, args, kwargs, out)
            if self._pending:
                if function.name == ATTENTION:
                    self._claim_attention(out, args, kwargs)
                self._claim(tensors_in(out), (args, kwargs), function.name)
                if function.name in ("dropout", "native_dropout"):
                    with _aside():
                        self.keeper.observe_dropout(args, kwargs, out if isinstance(out, Tensor) else out[0])
        elif self._pending and out is None:  # an assignment to an index, which changes its first argument
            self._claim(tensors_in((args, kwargs)), (args, kwargs), "")
        return out

    def _transformed(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An op within ``vmap`` or ``jvp``: another runs than the one that is called, so there is no recipe."""
        seen = _beneath((args, kwargs))
        function = function_of(func)
        if self._pending and not function.reads:
            self._claim(tensors_in(seen), None, "")
        with _aside():
            self.keeper.before(function, *seen)
        out = func(*args, **kwargs)
        made = _beneath(out) if isinstance(out, (Tensor, tuple, list)) else None
        if made is not None or out is None:
            self.keeper.values.made(made, seen)
            if self._pending:
                self._claim(tensors_in(seen if made is None else made), seen, function.name)
        return out

    def _claim(self, roots: list[Tensor], given: Any, op: str) -> None:
        """Encode the pending saves that the graph of ``roots`` names.

        Args:
            roots: tensors behind which they may be.
            given: what the op that saved them was given: arguments, with tensors among them; None where no op has run.
            op: its name.
        """
        with _aside():
            pending = self._still_raw()
            hidden = self._name(pending, roots, given, op)
            if pending:  # a node that nothing leads to, of a check within the op, is held by its own result
                hidden |= self._name(pending, [saved.raw() for saved in pending.values()], given, op)
            if hidden:  # the rest is what is in there
                for saved in pending.values():
                    self._keep(saved, None, _HIDING, given, op)
                pending.clear()
            self._pending = []
            for saved in pending.values():
                saved.attempts += given is not None
                if saved.attempts > _PATIENCE:
                    self._keep(saved, None, "", None, "")
                else:
                    self._pending.append(weakref.ref(saved))
            if not self._pending and given is not None:  # else it may be in a custom function, whose node is older
                self._floor = torch.autograd._get_sequence_nr()

    def _claim_attention(self, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Encode what an attention has saved that was computed by products, in the order in which it was made."""
        with _aside():
            attention = Attention.of(out, args, kwargs)
            for node, made in () if attention is None else attention.steps():
                self.keeper.observe_made(made)
                self._keep_all_of(node, self._still_raw(), (args, kwargs), ATTENTION)

    def _still_raw(self) -> dict[int, Saved]:
        """The pending saves, by identity."""
        alive = [saved for reference in self._pending if (saved := reference()) is not None]
        return {id(saved): saved for saved in alive if saved.kept is None}

    def _name(self, pending: dict[int, Saved], roots: list[Tensor], given: Any, op: str) -> bool:
        """Keep those pending saves that the graph of ``roots`` names, of nodes that are not older than the floor.

        Returns:
            Whether a node hides others, whose saves can't be seen: that of an op in place on a view.
        """
        hidden, floor = False, self._floor
        stack = [node for tensor in roots if (node := tensor.grad_fn) is not None]
        seen = set()
        while stack and pending:
            node = stack.pop()
            if node in seen or node._sequence_nr() < floor:
                continue
            seen.add(node)
            hidden |= node_name(node) == _HIDING
            self._keep_all_of(node, pending, given, op)
            if pending:
                stack.extend(edge[0] for edge in node.next_functions if edge[0] is not None)
        return hidden

    def _keep_all_of(self, node: Any, pending: dict[int, Saved], given: Any, op: str) -> None:
        """Keep those pending saves that one node has."""
        for attribute, raw_attribute in _raw_attributes(type(node)):
            try:
                raw = getattr(node, raw_attribute)
            except RuntimeError:  # its backward has run, and let go of it
                break
            for item in raw if isinstance(raw, (tuple, list)) else (raw,):
                saved = pending.pop(id(item.data), None) if item is not None else None
                if saved is not None:
                    self._keep(saved, node, attribute, given, op)

    def _keep(self, saved: Saved, node: Any, attribute: str, given: Any, op: str) -> None:
        entry = self.keeper.keep(saved, node, attribute, given, op)
        if saved.function == "CompiledFunction":
            self._graphs.setdefault(saved.call, []).append(entry)

    def leave(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        """The forward is over: encode what no op has claimed, unless it failed and hardly anybody will ask for it."""
        with _aside():
            for reference in self._pending:
                if (saved := reference()) is None or saved.kept is not None:
                    continue
                if exc_type is None:
                    self._keep(saved, None, "", None, "")
                else:
                    _keep_as_it_is(saved)
        self._left = True
        self._pending.clear()
        with _aside():
            self.keeper.finish()


def _keep_as_it_is(saved: Saved) -> None:
    """Keep an alias, not the tensor: an output that holds its own node is never freed."""
    saved.fill(Reference(saved.raw().detach(), saved.version, "saved for backward"))


class _aside:  # it is used as a function
    """Run as if alone: without a graph, without tangents (autograd keeps these itself), outside of vmap and jvp."""

    __slots__ = ("_forward", "_grad", "_transforms")

    def __enter__(self) -> None:
        # set as they are, not by contexts: this is entered for each op
        self._grad = torch.is_grad_enabled()
        self._forward = torch._C._is_fwd_grad_enabled()
        torch._C._set_grad_enabled(False)
        torch._C._set_fwd_grad_enabled(False)
        self._transforms: Any = None
        if torch._C._functorch.peek_interpreter_stack() is not None:
            self._transforms = temporarily_clear_interpreter_stack()
            self._transforms.__enter__()

    def __exit__(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        if self._transforms is not None:
            self._transforms.__exit__(exc_type, exc, traceback)
        torch._C._set_fwd_grad_enabled(self._forward)
        torch._C._set_grad_enabled(self._grad)


def _beneath(value: Any) -> Any:
    """The same with the tensors that lie beneath those of ``vmap`` and ``jvp``: these it is that are saved."""
    return tree_map_only(Tensor, unwrapped, value)


_RAW_ATTRIBUTES: dict[type, tuple[tuple[str, str], ...]] = {}


def _raw_attributes(kind: type) -> tuple[tuple[str, str], ...]:
    """The saved tensors' attributes of a node class: (name, name of the raw attribute)."""
    if kind not in _RAW_ATTRIBUTES:
        _RAW_ATTRIBUTES[kind] = tuple(
            (name.removeprefix("_raw_saved_"), name) for name in dir(kind) if name.startswith("_raw_saved_")
        )
    return _RAW_ATTRIBUTES[kind]
