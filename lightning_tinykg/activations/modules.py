"""Which module's forward runs, and is it to be compressed?"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from lightning_tinykg.activations.keeping import not_compiled
from lightning_tinykg.activations.storages import tensors_in, unwrapped
from lightning_tinykg.activations.values import Values
from lightning_tinykg.bits.plan import BitPlan, PlanEntry

Pattern = str | type[nn.Module]
"""A module's path (wildcards allowed), its class's name, or its class; a string that starts with ``!`` excludes."""


class ModuleTracker:
    """Knows the path of the module whose forward runs in this thread, and whether it is to be compressed.

    Attributes:
        outermost: the modules that no other was running around, by identity.
        path: path of the innermost module that runs; outside of any, the root's class, if the root is known.
        covers: whether what is saved now is to be compressed.
    """

    def __init__(self, values: Values, modules: Sequence[Pattern] | None, root: nn.Module | None) -> None:
        self.outermost: dict[int, nn.Module] = {}
        self._values = values
        self._include, self._exclude = _split(modules or ())
        self._names: dict[int, str] = _names(root) if root is not None else {}
        self._outside = _class(_within(root)).__name__ if root is not None else ""
        # the root itself need not be called: a LightningModule's training_step is a mere method
        self._decided = self._decide(_within(root), self._outside, None) if root is not None else None
        self._stack: list[tuple[nn.Module, str, bool | None]] = []
        self._thread = threading.get_ident()
        self._turn()

    def _turn(self) -> None:
        """Another module is the innermost: attributes, since they are read at each save."""
        _, self.path, decided = self._stack[-1] if self._stack else (None, self._outside, self._decided)
        self.covers = not self._include if decided is None else decided

    def __enter__(self) -> None:
        with _LOCK:
            _TRACKERS.append(self)
            for hooks, hook in _HOOKS:
                hooks[_HOOK] = hook

    def __exit__(self, *exc_info: Any) -> None:
        with _LOCK:
            _TRACKERS.remove(self)
            if not _TRACKERS:
                for hooks, _ in _HOOKS:
                    del hooks[_HOOK]
        self.outermost = {}  # the graph holds its hooks, and so this

    def hold(self, values: tuple[Any, ...]) -> None:
        """Note tensors as the user's."""
        self._values.hold(map(unwrapped, tensors_in(values)))

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A module's forward begins."""
        if self._is_elsewhere():
            return
        if not self._stack:
            self.outermost[id(module)] = module
            self.hold(args)
            if id(module) not in self._names:
                self._names = _names(module) | self._names  # within a wrapper (DDP) the root's own paths hold
        path = self._names.get(id(module), _class(module).__name__)
        decided = self._stack[-1][2] if self._stack else self._decided
        self._stack.append((module, path, self._decide(module, path, decided)))
        self._turn()

    def _decide(self, module: nn.Module, path: str, decided: bool | None) -> bool | None:
        """Whether a module is to be compressed, within one for which that is ``decided``."""
        if decided is False or any(_matches(module, path, pattern) for pattern in self._exclude):
            return False
        return True if any(_matches(module, path, pattern) for pattern in self._include) else decided

    def leave(self, module: nn.Module) -> None:
        """A module's forward is over."""
        if self._is_elsewhere():
            return
        # a module that was not seen to be entered is none of ours, and one that was not seen to be left (an interrupt
        # that was caught) goes with the one around it
        for depth in reversed(range(len(self._stack))):
            if self._stack[depth][0] is module:
                del self._stack[depth:]
                self._turn()
                break

    def _is_elsewhere(self) -> bool:
        """Whether a module runs that is none of ours: its hooks are global, those on saved tensors are a thread's."""
        return threading.get_ident() != self._thread


# The hooks on modules are the same two functions under the same key, whatever contexts are entered: torch.compile
# guards on both. With hooks of each entry's own (register_module_forward_hook numbers them) every step compiled its
# graphs anew, until the recompile limit, and ran eagerly from then on.

_TRACKERS: list[ModuleTracker] = []  # of all contexts that are entered, in any thread
_LOCK = threading.Lock()
_HOOK = "lightning_tinykg"


@not_compiled
def _enter_module(module: nn.Module, args: tuple[Any, ...]) -> None:
    if not torch.compiler.is_compiling():
        for tracker in list(_TRACKERS):
            tracker.enter(module, args)


@not_compiled
def _leave_module(module: nn.Module, args: Any, output: Any) -> None:
    if not torch.compiler.is_compiling():
        for tracker in list(_TRACKERS):
            tracker.leave(module)


_HOOKS: tuple[tuple[dict[Any, Any], Any], ...] = (
    (nn.modules.module._global_forward_pre_hooks, _enter_module),
    (nn.modules.module._global_forward_hooks, _leave_module),
    (nn.modules.module._global_forward_hooks_always_called, True),
)


_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
    "_FabricModule": "_forward_module",
}
"""Modules that only pass on to another, whose paths are the user's: class name -> attribute."""

_WRAPPED = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""What such wrappers, around a part, add to the paths within it."""


def check_modules(modules: Sequence[Pattern], root: nn.Module) -> None:
    """Refuse a pattern that matches nothing, which would silently compress all, or nothing.

    Args:
        modules: the patterns, as for :class:`compress_activations`.
        root: the module whose parts they are of.

    Raises:
        ValueError: if one of them matches no module.

    Example:
        >>> check_modules(["!haed"], nn.ModuleDict({"head": nn.Linear(2, 2)}))
        Traceback (most recent call last):
        ...
        ValueError: modules: '!haed' matches no module of ModuleDict; the nearest: 'head'
    """
    if message := unmatched(modules, {id(root): root}):
        raise ValueError(message)


def check_plan(plan: BitPlan, root: nn.Module) -> None:
    """Refuse a plan with a layer that there is none of.

    Raises:
        ValueError: naming the entries, and the nearest layers.

    Example:
        >>> check_plan(BitPlan({("haed", "Mm.self"): 8}), nn.ModuleDict({"head": nn.Linear(2, 2)}))
        Traceback (most recent call last):
        ...
        ValueError: these entries of the plan match nothing: haed (nearest: head)
    """
    layers = BitPlan([PlanEntry(entry.bits, entry.layer) for entry in plan.entries])
    layers.check((path,) for path, _ in _paths(root))


def unmatched(modules: Sequence[Pattern], roots: dict[int, nn.Module]) -> str:
    """What is wrong with the patterns that match no module; empty if there are none."""
    found = {(path, module) for root in roots.values() for path, module in _paths(root)}
    include, exclude = _split(modules)
    messages = []
    for pattern, sign in [*((p, "") for p in include), *((p, "!") for p in exclude)]:
        if any(_matches(module, path, pattern) for path, module in found):
            continue
        written = repr(sign + pattern) if isinstance(pattern, str) else pattern.__name__
        names = sorted({path for path, _ in found} | {_class(module).__name__ for _, module in found})
        near = get_close_matches(pattern if isinstance(pattern, str) else pattern.__name__, names, cutoff=0.5)
        told = (
            f"the nearest: {', '.join(map(repr, near))}" if near else f"there are: {', '.join(map(repr, names[:20]))}"
        )
        of = " or ".join(_class(_within(root)).__name__ for root in roots.values())
        messages.append(f"modules: {written} matches no module of {of}; {told}")
    return "; ".join(messages)


def _split(modules: Sequence[Pattern]) -> tuple[list[Pattern], list[Pattern]]:
    """The patterns that include, and those that exclude, without their sign."""
    include = [m for m in modules if not (isinstance(m, str) and m.startswith("!"))]
    exclude: list[Pattern] = [m[1:] for m in modules if isinstance(m, str) and m.startswith("!")]
    return include, exclude


def _within(root: nn.Module) -> nn.Module:
    """The module that wrappers are around."""
    while (attribute := _WRAPPERS.get(type(root).__name__)) is not None:
        root = getattr(root, attribute)
    return root


def _paths(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A module, which goes by its class, and all within it; wrappers around it are no part of a path."""
    root = _within(root)
    for name, module in root.named_modules():
        yield ".".join(part for part in name.split(".") if part not in _WRAPPED) or _class(root).__name__, module


def _names(root: nn.Module) -> dict[int, str]:
    """The paths of a module and all within it, by identity."""
    return {id(module): path for path, module in _paths(root)}


def _class(module: nn.Module) -> type[nn.Module]:
    """A module's class as its author wrote it: FSDP2 makes an ``FSDPLinear(FSDPModule, Linear)`` of a ``Linear``."""
    kind = type(module)
    return kind.__bases__[1] if len(kind.__bases__) == 2 and kind.__bases__[0].__name__ == "FSDPModule" else kind


def _matches(module: nn.Module, path: str, pattern: Pattern) -> bool:
    if isinstance(pattern, str):
        return fnmatchcase(path, pattern) or _class(module).__name__ == pattern
    return isinstance(module, pattern)
