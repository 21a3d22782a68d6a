"""The context in which what autograd saves is kept small: ``compress_activations``."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from lightning_tinykg.activations.keeper import Keeper
from lightning_tinykg.activations.keeping import Saved
from lightning_tinykg.activations.ledger import Ledger
from lightning_tinykg.activations.storages import tensors_in
from lightning_tinykg.codecs.noise import make_key

WIDTHS = (1, 2, 4, 8, 32)
"""What ``bits`` can be; 32 is the exact mode."""

RECIPES = ("rules", "paper")

_PATIENCE = 8  # ops after which a save that no op has claimed is taken for unknown


class compress_activations:
    """Keep what autograd saves for backward in 8, 4, 2 or 1 bits, while this context is entered.

    TinyKG (arXiv 2212.04540): the forward is exact, the tensors that are saved for the backward are quantized with
    stochastic rounding. Unlike in the paper, a table of rules (:mod:`lightning_tinykg.activations.rules`) says for
    each op what its backward needs of each tensor: often nothing but the shape or a bit, and where it needs more
    than rounded values, it gets it. Backward runs anywhere, inside the context or after it, any number of times.

    The context can be entered again and again, and draws fresh noise each time: in a loop, make it once and enter it
    each step (or pass ``seed=step``).

    Args:
        bits: width of what is rounded: 1, 2, 4 or 8; 32 is the exact mode, where only lossless forms are used and
            gradients equal the uncompressed ones to the last bit.
        group_size: consecutive elements that share a scale and a zero point. None: 64, or 32 at 1 and 2 bits.
        seed: seed of the noise, which is private: PyTorch's generators are not touched.
        min_bytes: tensors smaller than this are kept as they are.
        recipe: ``"rules"``, or ``"paper"`` for TinyKG to the letter: every float, row by row, float32 scales.
        modules: where to compress: module paths (wildcards allowed), class names or classes; a string that starts
            with ``!`` excludes. A module stands for all within it. None: everywhere.
        root: the module that paths start from. None: the outermost module called.

    Raises:
        ValueError: if an argument has a value it can't have.

    Example:
        >>> import torch
        >>> from lightning_tinykg import compress_activations
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64))
        >>> x = torch.randn(1000, 64)
        >>> with compress_activations(bits=2) as ledger:
        ...     loss = model(x).square().mean()
        >>> loss.backward()
        >>> ledger.ratio > 8
        True
    """

    def __init__(
        self,
        bits: int = 2,
        *,
        group_size: int | None = None,
        seed: int = 0,
        min_bytes: int = 1024,
        recipe: str = "rules",
        modules: Sequence[str | type[nn.Module]] | None = None,
        root: nn.Module | None = None,
    ) -> None:
        if bits not in WIDTHS or isinstance(bits, bool):
            raise ValueError(f"bits must be one of {', '.join(map(str, WIDTHS))}, got {bits!r}")
        if group_size is not None and group_size < 1:
            raise ValueError(f"group_size must be at least 1, or None, got {group_size}")
        if min_bytes < 0:
            raise ValueError(f"min_bytes must be at least 0, got {min_bytes}")
        if recipe not in RECIPES:
            raise ValueError(f"recipe must be one of {', '.join(map(repr, RECIPES))}, got {recipe!r}")
        if recipe == "paper" and bits == 32:
            raise ValueError("recipe='paper' has no exact mode: bits must be one of 1, 2, 4, 8, got 32")
        self.bits = bits
        self.group_size = group_size
        self.seed = seed
        self.min_bytes = min_bytes
        self.recipe = recipe
        self.modules = modules
        self.root = root
        self.step = 0
        self.rank = 0
        self._exits: list[ExitStack] = []

    def __enter__(self) -> Ledger:
        """Start compressing; returns the ledger of what this entry keeps."""
        ledger = Ledger()
        keeper = Keeper(
            bits=self.bits,
            group_size=self.group_size,
            min_bytes=self.min_bytes,
            by_rules=self.recipe == "rules",
            key=make_key(self.seed, self.rank, self.step),
            ledger=ledger,
        )
        tracker = _ModuleTracker(keeper, self.modules, self.root)
        observer = _Observer(keeper, tracker)
        with ExitStack() as stack:
            stack.enter_context(tracker)
            stack.push(observer.leave)
            stack.enter_context(saved_tensors_hooks(observer.pack, Saved.unpack))
            stack.enter_context(observer)
            self._exits.append(stack.pop_all())
        self.step += 1
        return ledger

    def __exit__(self, *exc_info: Any) -> None:
        self._exits.pop().__exit__(*exc_info)


class _Observer(TorchFunctionMode):
    """Sees each op, and so knows exactly which op saved what.

    While an op runs, what it saves is kept raw; when it returns, a walk from its result along the autograd graph
    finds the handles again, under their node and attribute, and they are encoded: no more than one op's tensors are
    raw at a time, and none is attributed by guess.
    """

    def __init__(self, keeper: Keeper, tracker: _ModuleTracker) -> None:
        super().__init__()
        self._keeper = keeper
        self._tracker = tracker
        # weak, since a node can die as soon as its op returns: an argsort's, for one
        self._pending: list[weakref.ref[Saved]] = []
        self._floor = torch.autograd._get_sequence_nr()

    def pack(self, tensor: Tensor) -> Saved:
        """Autograd saves a tensor."""
        saved = Saved(tensor, self._tracker.path, exact=not self._tracker.covers)
        self._pending.append(weakref.ref(saved))
        return saved

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # an op of a graph that is being traced runs, and saves, later
            return func(*args, **kwargs)
        if self._pending:  # saved by something that is no op: a custom function, a compiled graph
            self._claim(tensors_in((args, kwargs)), None, "")
        self._keeper.before(func, args, kwargs)
        out = func(*args, **kwargs)
        if not isinstance(out, (Tensor, tuple, list)):
            if self._pending:  # an assignment to an index has no result, but changes its first argument
                inputs = list(tensors_in((args, kwargs)))
                self._claim(inputs, inputs, "")
            return out
        inputs = list(tensors_in((args, kwargs)))
        self._keeper.observe(func, args, kwargs, out, inputs)
        if self._pending:
            self._claim(tensors_in(out), inputs, getattr(func, "__name__", ""))
        return out

    def _claim(self, roots: Iterable[Tensor], inputs: list[Tensor] | None, op: str) -> None:
        """Encode the pending saves that the graph of ``roots`` names."""
        with torch.no_grad():
            self._encode(roots, inputs, op)

    def _encode(self, roots: Iterable[Tensor], inputs: list[Tensor] | None, op: str) -> None:
        pending = {id(saved): saved for reference in self._pending if (saved := reference()) is not None}
        for saved, node, attribute in _named_saves(roots, self._floor):
            if pending.pop(id(saved), None) is not None:
                self._keeper.keep(saved, node, attribute, inputs, op)
                if not pending:
                    break
        self._pending = []
        for saved in pending.values():
            saved.attempts += 1
            if saved.attempts > _PATIENCE:
                self._keeper.keep(saved, None, "", None, "")
            else:
                self._pending.append(weakref.ref(saved))
        if not self._pending:
            self._floor = torch.autograd._get_sequence_nr()

    def leave(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        """The forward is over: encode what no op has claimed, unless it failed and nobody will ask for it."""
        if exc_type is None:
            with torch.no_grad():
                for reference in self._pending:
                    if (saved := reference()) is not None:
                        self._keeper.keep(saved, None, "", None, "")
        self._pending.clear()
        self._keeper.finish()


def _named_saves(roots: Iterable[Tensor], floor: int) -> Iterator[tuple[Saved, Any, str]]:
    """The saves of the nodes behind some tensors that are not older than ``floor``, with node and attribute."""
    stack = [tensor.grad_fn for tensor in roots if tensor.grad_fn is not None]
    seen = set()
    while stack:
        node = stack.pop()
        if node in seen or node._sequence_nr() < floor:
            continue
        seen.add(node)
        for name, attribute in _raw_attributes(type(node)):
            raw = getattr(node, attribute)
            for item in raw if isinstance(raw, (tuple, list)) else (raw,):
                data = item.data if item is not None else None
                if isinstance(data, Saved):
                    yield data, node, name
        stack.extend(edge[0] for edge in node.next_functions if edge[0] is not None)


_RAW_ATTRIBUTES: dict[type, tuple[tuple[str, str], ...]] = {}


def _raw_attributes(kind: type) -> tuple[tuple[str, str], ...]:
    """The saved tensors' attributes of a node class: (name, name of the raw attribute)."""
    if kind not in _RAW_ATTRIBUTES:
        _RAW_ATTRIBUTES[kind] = tuple(
            (name.removeprefix("_raw_saved_"), name) for name in dir(kind) if name.startswith("_raw_saved_")
        )
    return _RAW_ATTRIBUTES[kind]


class _ModuleTracker:
    """Knows the path of the module whose forward runs, and whether it is to be compressed."""

    def __init__(self, keeper: Keeper, modules: Sequence[str | type[nn.Module]] | None, root: nn.Module | None) -> None:
        self._keeper = keeper
        self._include = [m for m in modules or () if not (isinstance(m, str) and m.startswith("!"))]
        self._exclude = [m[1:] for m in modules or () if isinstance(m, str) and m.startswith("!")]
        self._names: dict[int, str] = _names(root) if root is not None else {}
        self._outside = type(root).__name__ if root is not None else ""
        # the root itself need not be called: a LightningModule's training_step is a mere method
        self._decided = self._decide(root, self._outside, None) if root is not None else None
        self._stack: list[tuple[str, bool | None]] = []
        self._hooks: list[Any] = []

    @property
    def path(self) -> str:
        """Path of the innermost module that runs; outside of any, the root's class, if the root is known."""
        return self._stack[-1][0] if self._stack else self._outside

    @property
    def covers(self) -> bool:
        """Whether what is saved now is to be compressed."""
        decided = self._stack[-1][1] if self._stack else self._decided
        return not self._include if decided is None else decided

    def __enter__(self) -> None:
        self._hooks = [
            nn.modules.module.register_module_forward_pre_hook(self._enter),
            nn.modules.module.register_module_forward_hook(self._leave, always_call=True),
        ]

    def __exit__(self, *exc_info: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        if not self._stack:
            self._keeper.provenance.hold(tensors_in(args))
            if id(module) not in self._names:
                self._names = _names(module) | self._names  # within a wrapper (DDP) the root's own paths hold
        path = self._names.get(id(module), type(module).__name__)
        decided = self._stack[-1][1] if self._stack else self._decided
        self._stack.append((path, self._decide(module, path, decided)))

    def _decide(self, module: nn.Module, path: str, decided: bool | None) -> bool | None:
        """Whether a module is to be compressed, within one for which that is ``decided``."""
        if decided is False or any(_matches(module, path, pattern) for pattern in self._exclude):
            return False
        return True if any(_matches(module, path, pattern) for pattern in self._include) else decided

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stack and not torch.compiler.is_compiling():
            self._stack.pop()


def _names(root: nn.Module) -> dict[int, str]:
    """The paths of a module and all within it, by identity; the root goes by its class."""
    return {id(module): name or type(root).__name__ for name, module in root.named_modules()}


def _matches(module: nn.Module, path: str, pattern: str | type[nn.Module]) -> bool:
    if isinstance(pattern, str):
        return fnmatchcase(path, pattern) or type(module).__name__ == pattern
    return isinstance(module, pattern)
