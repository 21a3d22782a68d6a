"""The context in which what autograd saves is kept small: ``compress_activations``."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, distributed, nn
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks

from lightning_tinykg.activations.costs import RECOMPUTE
from lightning_tinykg.activations.decisions import Decisions
from lightning_tinykg.activations.keeper import Keeper
from lightning_tinykg.activations.keeping import Saved, not_compiled
from lightning_tinykg.activations.ledger import Ledger
from lightning_tinykg.activations.modules import ModuleTracker, Pattern, check_modules, unmatched
from lightning_tinykg.activations.observer import THREAD, Observer
from lightning_tinykg.activations.planning import Planner
from lightning_tinykg.activations.widths import NO_STEP, StepSize
from lightning_tinykg.arguments import check_choice, check_whole
from lightning_tinykg.bits.budget import Budget
from lightning_tinykg.bits.plan import BitPlan, bits_now
from lightning_tinykg.bits.schedule import WIDTHS, Schedule, check_bits
from lightning_tinykg.codecs.affine import CODE_BITS
from lightning_tinykg.codecs.noise import make_key

RECIPES = ("rules", "paper")

_ADVICE = (
    "compress_activations works by saved-tensor hooks. torch.func.grad, vjp, jacrev and hessian, and "
    "disable_saved_tensors_hooks, run only where there are none. Put that part within "
    "`with lightning_tinykg.keep_exact(hooks=False):`, or use torch.autograd.grad, which is compressed like the rest."
)


_AT_ONCE = (
    "a compiled graph unpacks all that it saved at once, at the start of its backward. More than half of what this "
    "forward saved is in a single one: it takes less memory from the forward to the backward, but the peak of the "
    "backward is no lower than uncompressed. Compile layer by layer, `for layer in model.layers: layer.compile()` "
    "instead of `torch.compile(model)`: then one layer at a time is unpacked."
)


class compress_activations:
    """Keep what autograd saves for backward in 8, 4, 2 or 1 bits, while this context is entered.

    TinyKG (arXiv 2212.04540): the forward is exact, the tensors that are saved for the backward are quantized with
    stochastic rounding. Unlike in the paper, a table of rules (:mod:`lightning_tinykg.activations.rules`) says for
    each op what its backward needs of each tensor: often nothing but the shape or a bit, and where it needs more
    than rounded values, it gets it. Backward runs anywhere, inside the context or after it, any number of times.

    The context can be entered again and again, and draws fresh noise each time: in a loop, make it once and enter it
    each step (or pass ``seed=step``). Save its :meth:`state_dict` with the model's, and a resumed loop draws the noise
    that an uninterrupted one would have. The ranks of a process group draw different noise.

    It is entered for the thread that enters it. Contexts nest, the innermost decides, and :func:`keep_exact` opts a
    region out.

    A compiled module stays compiled. Its ops are not seen, so what it saves is kept as what is not known is. Compile
    layer by layer: a compiled graph unpacks all that it saved at once, at the start of its backward.

    Args:
        bits: width of what is rounded: 1, 2, 4 or 8; 32 is the exact mode, where only lossless forms are used and
            gradients equal the uncompressed ones to the last bit. A :class:`~lightning_tinykg.bits.Schedule` counts
            the entries as steps, unless :attr:`optimizer_steps` says otherwise. A
            :class:`~lightning_tinykg.bits.BitPlan` gives bits by module and by what was saved (``Mul.self``), also 3,
            5, 6, 7 and 12.
        budget: bytes that one step may store: a number, a text such as ``"512MiB"`` or ``"10%"``, or a fraction of the
            raw bytes. The bits are then chosen, and ``bits`` is not used: call :meth:`plan_for` with each step's loss.
        group_size: consecutive elements that share a scale and a zero point. None: 64, or 32 at 1 and 2 bits.
        seed: seed of the noise, which is private: PyTorch's generators are not touched.
        min_bytes: tensors smaller than this are kept as they are.
        recipe: ``"rules"``, or ``"paper"`` for TinyKG to the letter: every float, row by row, float32 scales.
        recompute: what is not kept, but made again in the backward from what is kept anyway or is far smaller:
            ``"cheap"``, gathered rows and short chains of cheap ops that are worth their time; ``"aggressive"``,
            longer chains and larger matrix products too, for the least memory; ``"off"``, nothing.
        modules: where to compress: module paths (wildcards allowed), class names or classes; a string that starts
            with ``!`` excludes. A module stands for all within it. None: everywhere.
        root: the module that paths start from. None: the outermost module called.

    Raises:
        ValueError: if an argument has a value it can't have, or ``modules`` names none of ``root``'s.
        RuntimeError: on entry, where saved-tensor hooks are switched off: within ``torch.func.grad``, for one.

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
        bits: int | Schedule | BitPlan = 2,
        *,
        budget: int | float | str | None = None,
        group_size: int | None = None,
        seed: int = 0,
        min_bytes: int = 1024,
        recipe: str = "rules",
        recompute: str = "cheap",
        modules: Sequence[Pattern] | None = None,
        root: nn.Module | None = None,
    ) -> None:
        if not isinstance(bits, (Schedule, BitPlan)):
            check_bits(bits)
        plan = bits if isinstance(bits, BitPlan) else BitPlan(default=bits)
        plan.check_widths(WIDTHS if recipe == "paper" else (*CODE_BITS, 32), "compress_activations")
        if group_size is not None:
            check_whole("group_size", group_size, 1, ", or None")
        check_whole("min_bytes", min_bytes)
        check_choice("recipe", recipe, RECIPES)
        if recipe == "paper" and bits == 32:
            raise ValueError("recipe='paper' has no exact mode: bits must be one of 1, 2, 4, 8, got 32")
        check_choice("recompute", recompute, RECOMPUTE)
        self.plan = plan
        """Which bits where; with a budget, what is chosen is in :attr:`plan_in_force`."""
        self.planner = None if budget is None else Planner(Budget.parse(budget))
        """Chooses the bits, if there is a budget."""
        if self.planner is not None and recipe == "paper":
            raise ValueError("recipe='paper' has one width for all: it takes no budget")
        self._unplanned: tuple[Keeper, Ledger] | None = None  # the last step, if bits are to be chosen by it
        self.optimizer_steps: int | None = None
        """Steps of the optimizer so far, which schedules go by. None: the entries so far."""
        self.epoch = 0
        """Epochs so far, which schedules go by that count epochs."""
        self.group_size = group_size
        self.seed = check_whole("seed", seed)
        self.min_bytes = min_bytes
        self.recipe = recipe
        self.recompute = recompute
        if isinstance(modules, str):
            raise ValueError(f"modules must be a list of patterns, got the string {modules!r}: write [{modules!r}]")
        for pattern in modules or ():
            if not isinstance(pattern, (str, type)):
                raise ValueError(f"modules must be module paths, class names or classes, got {pattern!r}")
        self.modules = modules
        self.root = root
        self.step = 0
        """How often it has been entered; each step has its own noise."""
        self.largest_step = NO_STEP
        """The largest step so far, beside which it is judged what is small."""
        self.rank: int | None = None
        """Which process this is, each of which has its own noise. None: the rank in torch.distributed, if that runs."""
        self._decisions = Decisions()
        self._entries: dict[int, list[tuple[Observer, ExitStack]]] = {}  # by thread
        self._matched = not modules
        self._told_at_once = False
        if modules and root is not None:
            check_modules(modules, root)

    @property
    def plan_in_force(self) -> BitPlan:
        """The plan as it is now: widths in place of schedules, or what was chosen under the budget."""
        if self.planner is not None:
            return self.planner.plan
        steps = self.step if self.optimizer_steps is None else self.optimizer_steps
        return self.plan.at(step=steps, epoch=self.epoch)

    @property
    def bits(self) -> int:
        """The width in force; in a plan, that of what no entry names."""
        return bits_now(self.plan_in_force.default)

    @property
    def mean_bits(self) -> float:
        """The width in force; under a budget, the mean over the elements of what is rounded."""
        return float(self.bits) if self.planner is None else self.planner.now.bits

    @not_compiled
    def __enter__(self) -> Ledger:
        """Start compressing; returns the ledger of what this entry keeps."""
        if self._unplanned is not None:
            raise RuntimeError(
                "compress_activations(budget=...) chooses the bits by the gradient: call its plan_for(loss, "
                "model.parameters()) after each forward, before the backward"
            )
        ledger = Ledger()
        rank = self.rank
        if rank is None:
            rank = distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
        keeper = Keeper(
            plan=self.plan_in_force,
            group_size=self.group_size,
            min_bytes=self.min_bytes,
            by_rules=self.recipe == "rules",
            recompute=self.recompute,
            key=make_key(self.seed, rank, self.step),
            ledger=ledger,
            largest_step=self.largest_step,
            decisions=self._decisions,
        )
        if self.planner is not None and self.planner.is_due:
            keeper.forms.rounded = {}
        observer = Observer(keeper, ModuleTracker(keeper.values, self.modules, self.root))
        with ExitStack() as stack:
            stack.enter_context(observer.tracker)
            stack.push(observer.leave)
            try:
                stack.enter_context(saved_tensors_hooks(observer.pack, Saved.unpack))
            except RuntimeError as error:
                raise RuntimeError(
                    "compress_activations works by saved-tensor hooks, which are switched off here: enter it outside "
                    f"of torch.func.grad, vjp, jacrev, hessian and disable_saved_tensors_hooks ({error})"
                ) from error
            stack.enter_context(observer)
            self._entries.setdefault(threading.get_ident(), []).append((observer, stack.pop_all()))
        THREAD.observers.append(observer)
        self.step += 1
        return ledger

    @not_compiled
    def __exit__(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        thread = threading.get_ident()
        if thread not in self._entries:
            raise RuntimeError("compress_activations was left in a thread that has not entered it")
        observer, stack = self._entries[thread].pop()
        if not self._entries[thread]:
            del self._entries[thread]
        in_order = THREAD.observers[-1] is observer
        THREAD.observers.remove(observer)
        outermost = observer.tracker.outermost
        stack.__exit__(exc_type, exc, traceback)
        if exc is None:
            self.largest_step = max(self.largest_step, observer.keeper.widths.step)
        if self.planner is not None and exc is None:
            if observer.keeper.forms.rounded is not None:
                self._unplanned = (observer.keeper, observer.keeper.ledger)
            else:
                self.planner.finished(observer.keeper.ledger)
        if not in_order:  # what was popped off PyTorch's stacks is another context's: until that is left, ours is on
            raise RuntimeError(
                "compress_activations was left before a context that was entered after it: contexts have to be left "
                "in reverse order. Is one of them entered in a generator or a task that was suspended?"
            )
        if exc is not None and _is_refusal(exc) and _ADVICE not in getattr(exc, "__notes__", ()):
            exc.add_note(_ADVICE)
        if exc is None and not self._matched and self.root is None and outermost:
            self._matched = True  # or told once
            if message := unmatched(self.modules or (), outermost):
                warnings.warn(message, stacklevel=2)
        if exc is None and not self._told_at_once and observer.unpacks_at_once:
            self._told_at_once = True
            warnings.warn(_AT_ONCE, stacklevel=2)

    def plan_for(self, loss: Tensor | None, parameters: Iterable[Tensor]) -> None:
        """With a budget: choose the bits of the steps that follow, if a choice is due.

        It is due after the first forward, after the 101st and the 1001st, and then every 10,000: rarely, since it runs
        the backward three times for each tensor that is kept rounded. In all other steps it returns at once. What it
        chooses, and the error that it predicts of the gradient, is in :attr:`planner`.

        Args:
            loss: the loss of the forward that the context was last entered for. Its backward can be run afterwards.
                None, if there is none: the step is skipped, and the choice is due after the next.
            parameters: what the gradient is taken of: ``model.parameters()``.

        Raises:
            BudgetTooSmall: if not even the least widths fit; it says what would.

        Example:
            >>> import torch
            >>> from lightning_tinykg import compress_activations
            >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64))
            >>> context, x = compress_activations(budget="10%"), torch.randn(1000, 64)
            >>> for _ in range(2):
            ...     with context as ledger:
            ...         loss = model(x).exp().square().mean()
            ...     context.plan_for(loss, model.parameters())
            ...     loss.backward()
            >>> ledger.ratio >= 10
            True
        """
        if self.planner is None or self._unplanned is None:
            return
        (keeper, ledger), self._unplanned = self._unplanned, None
        if loss is not None:
            key = make_key(self.seed, self.step, len(self.planner.kinds))
            self.planner.choose(loss, parameters, keeper, ledger, key)
            self.planner.finished(ledger)

    def hold(self, *values: Any) -> None:
        """Count tensors as the user's: they are referred to, not copied. Has to be called within the context.

        It need not be called for what is given to a module, or to an op that is seen. A compiled step takes its batch
        unseen.

        Args:
            values: tensors, or lists, tuples and dicts of them.
        """
        observer, _ = self._entries[threading.get_ident()][-1]
        observer.tracker.hold(values)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint of a training loop needs to hold, in plain primitives.

        Example:
            >>> context = compress_activations(bits=2)
            >>> with context:
            ...     pass
            >>> context.state_dict()
            {'step': 1, 'epoch': 0, 'largest_step': [0, 0]}
        """
        counters = {"step": self.step, "epoch": self.epoch, "optimizer_steps": self.optimizer_steps}
        state: dict[str, Any] = {name: count for name, count in counters.items() if count is not None}
        state["largest_step"] = list(self.largest_step)
        return state if self.planner is None else state | {"planner": self.planner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken: the next entry has the noise and the bits that it would have had.

        Args:
            state_dict: what :meth:`state_dict` returned.

        Raises:
            ValueError: if it has no ``"step"``, if a counter is no integer of at least 0, or
                ``"largest_step"`` not two integers.
        """
        counters = {"epoch": self.epoch, "optimizer_steps": self.optimizer_steps} | {"step": None} | state_dict
        for name in ("step", "epoch", "optimizer_steps"):
            count = counters[name]
            if name != "optimizer_steps" or count is not None:
                setattr(self, name, check_whole(f"state_dict[{name!r}]", count))
        largest = state_dict.get("largest_step", NO_STEP)  # a checkpoint of an earlier version has none
        if not isinstance(largest, (list, tuple)) or [type(size) for size in largest] != [int, int]:
            raise ValueError(f"state_dict['largest_step'] must be two integers, got {largest!r}")
        self.largest_step = StepSize(*largest)
        if self.planner is not None:
            self.planner.load_state_dict(state_dict.get("planner", {}))


def _is_refusal(exc: BaseException) -> bool:
    """Whether an exception was raised because something does not run under saved-tensor hooks."""
    frames = exc.__traceback__
    while frames is not None and frames.tb_next is not None:
        frames = frames.tb_next
    refuses = getattr(disable_saved_tensors_hooks, "__wrapped__", None)
    return frames is not None and refuses is not None and frames.tb_frame.f_code is refuses.__code__
