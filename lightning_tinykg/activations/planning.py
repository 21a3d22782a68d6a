"""Bits under a budget: measured once in a while, chosen for each kind of step, kept within the bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from glob import escape
from math import inf, sqrt
from typing import Any

from torch import Tensor

from lightning_tinykg.activations.keeper import Keeper
from lightning_tinykg.activations.ledger import Ledger
from lightning_tinykg.activations.sensitivity import Sensitive, measure
from lightning_tinykg.bits.budget import Budget, BudgetTooSmall, Option, allocate
from lightning_tinykg.bits.plan import BitPlan, Place, PlanEntry

MEASURING = BitPlan([PlanEntry(8, component="*.*")], default=8)
"""What a step is kept at in which the sensitivities are measured: 8 bits, all of it, and no more."""

REPLANNED = (0, 100, 1000)
"""Steps of a kind before which it is measured; after the last, whenever the step is a multiple of ten times that."""

_NEW = 10

UNIFORM = (4, 2, 1)
"""Widths for all, which are tried one after the other where a choice took more than the budget."""


@dataclass
class KindOfStep:
    """What is known of one kind of step. KGAT has two: their losses are other graphs, with other places.

    Attributes:
        steps: how many there were.
        plan: the bits, or None before it has been measured.
        sensitive: what each width of each tensor would cost.
        fixed: bytes that no width changes: masks, signs, what must be exact. They grow by what a step took beyond what
            was reckoned, if that was beyond the budget.
        raw: bytes the uncompressed graph would keep.
        target: bytes to choose widths for.
        predicted: the gradient's error that is expected, relative to its norm.
        stored: bytes that are expected.
        bits: the mean width of the tensors that are rounded.
        uniform: the width that all have, since no choice that fits is as good; None where bits are chosen.
        too_wide: the least width of all that took more than the budget.
    """

    steps: int = 0
    plan: BitPlan | None = None
    sensitive: list[Sensitive] = field(default_factory=list)
    fixed: int = 0
    raw: int = 0
    norm: float = 0.0
    target: int = 0
    predicted: float = 0.0
    stored: int = 0
    bits: float = 8.0
    uniform: int | None = None
    too_wide: int | None = None

    def predicted_at(self, width: int) -> float:
        """The gradient's error that is expected of one width for all."""
        at_most = [[o for o in tensor.options if o.bits <= width] or tensor.options[:1] for tensor in self.sensitive]
        variance = sum(max(options, key=lambda option: option.bits).variance for options in at_most)
        return sqrt(variance) / self.norm if self.norm else 0.0


class Planner:
    """Chooses bits for each kind of step, so that the gradient's variance is the least under a number of bytes.

    Args:
        budget: the bytes that one step may store.

    Attributes:
        kind: the kind of the next step; a name.
        agree: gives all ranks of a distributed run the value of the first.
        most: gives all ranks the largest of their values; None where there is one rank only.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.kind = ""
        self.agree: Callable[[Any], Any] = lambda value: value
        self.most: Callable[[int], int] | None = None
        self.kinds: dict[str, KindOfStep] = {}

    @property
    def now(self) -> KindOfStep:
        """The kind of step that is next."""
        return self.kinds.setdefault(self.kind, KindOfStep())

    @property
    def is_due(self) -> bool:
        """Whether the next step is one to measure in."""
        steps = self.now.steps
        if self.now.uniform is not None:
            return False
        return self.now.plan is None or steps in REPLANNED or steps % (10 * REPLANNED[-1]) == 0

    @property
    def plan(self) -> BitPlan:
        """The plan of the next step."""
        plan = self.now.plan
        return MEASURING if self.is_due or plan is None else plan

    def choose(self, loss: Tensor, parameters: Iterable[Tensor], keeper: Keeper, ledger: Ledger, key: int) -> None:
        """Measure in the step that has just been forward, and choose the bits of those that follow.

        Args:
            loss: its loss.
            parameters: what the gradient is taken of.
            keeper: what it was kept by.
            ledger: what it kept.
            key: of the noise.

        Raises:
            BudgetTooSmall: if no choice fits; on all ranks, if it is so on the first.
        """
        now = self.now
        rounded = list((keeper.forms.rounded or {}).values())
        rounded = [tensor for tensor in rounded if 0 < tensor.record.bits < 32 and tensor.record.value is not None]
        size, group = keeper.widths.size, keeper.widths.group
        sensitive, squared = measure(loss, parameters, rounded, size, group, key)
        changing = sum(tensor.record.value.nbytes for tensor in rounded if tensor.record.value is not None)
        now.fixed, now.raw, now.norm = max(ledger.stored_bytes - changing, 0), ledger.raw_bytes, sqrt(squared)
        now.sensitive = sensitive
        now.target = self.budget.bytes_of(now.raw)
        refused: tuple[int, int] | None = None
        try:
            self._allocate(now)
        except BudgetTooSmall as error:  # told to the others, who wait for the plan
            refused = error.budget, error.least
        state, refused = self.agree((self.state_dict(), refused))
        if refused is not None:
            raise BudgetTooSmall(*refused)
        self.load_state_dict(state)

    def _allocate(self, now: KindOfStep) -> None:
        options = dict(enumerate(tensor.options for tensor in now.sensitive))
        try:
            chosen = allocate(options, now.target - now.fixed)
        except BudgetTooSmall as error:
            raise BudgetTooSmall(self.budget.bytes_of(now.raw), error.least + now.fixed) from None
        entries = [
            PlanEntry(chosen[number].bits, *(escape(part) for part in place))
            for number, tensor in enumerate(now.sensitive)
            for place in sorted(tensor.places)
        ]
        now.plan = BitPlan(entries, default=8)
        now.predicted = sqrt(sum(option.variance for option in chosen.values())) / now.norm if now.norm else 0.0
        exact = [max(option.nbytes for option in tensor.options) for tensor in now.sensitive]
        weighted = sum(chosen[number].bits * size for number, size in enumerate(exact))
        now.bits = weighted / sum(exact) if exact else 32.0
        now.stored = now.fixed + sum(option.nbytes for option in chosen.values())

    def finished(self, ledger: Ledger) -> None:
        """A step is over: count it; if it took more than the budget, choose for less from the next on.

        Raises:
            BudgetTooSmall: if no choice is for less, and no one width for all either.
        """
        now = self.now
        measured = self.is_due
        now.steps += 1
        if measured or now.plan is None:
            return
        excess = ledger.stored_bytes - self.budget.bytes_of(ledger.raw_bytes)
        if self.most is not None:  # a word between the ranks, while a plan is new
            since = now.steps - max(step for step in self._measured_at(now.steps))
            excess = self.most(excess) if since <= _NEW else 0
        if excess <= 0:
            return
        if now.uniform is None:  # batches differ, and so do indices and masks: what was not reckoned with is fixed now
            now.fixed += excess + now.target - now.stored
        else:
            now.too_wide = now.uniform
        self._narrow(now, ledger)

    def _narrow(self, now: KindOfStep, ledger: Ledger) -> None:
        """Choose for less, or try one width for all, if that is expected to be better than what can be chosen.

        Where widths differ, less can be made of what is kept for others, and what a choice takes is reckoned too high.
        What one width takes is seen when it is tried: no more than the step took that was measured.
        """
        now.uniform = None
        try:
            self._allocate(now)
            to_beat = now.predicted
        except BudgetTooSmall:
            to_beat = inf
        for width in UNIFORM:
            if (now.too_wide is None or width < now.too_wide) and (predicted := now.predicted_at(width)) < to_beat:
                now.plan, now.uniform = BitPlan(default=width), width
                now.bits, now.predicted = float(width), predicted
                return
        if to_beat == inf:
            raise BudgetTooSmall(self.budget.bytes_of(ledger.raw_bytes), ledger.stored_bytes)

    @staticmethod
    def _measured_at(steps: int) -> Iterable[int]:
        """The steps up to a number of them that were measured in."""
        last = 10 * REPLANNED[-1]
        return (*(step for step in REPLANNED if step < steps), *range(last, steps, last))

    # -- for a checkpoint ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Plain primitives: plans, counters, and what they were chosen from."""
        return {
            name: {
                **{key: getattr(kind, key) for key in _PLAIN},
                "plan": None if kind.plan is None else kind.plan.to_dict(),
                "sensitive": [
                    [
                        [list(place) for place in sorted(tensor.places)],
                        [[option.bits, option.nbytes, option.variance] for option in tensor.options],
                    ]
                    for tensor in kind.sensitive
                ],
            }
            for name, kind in self.kinds.items()
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.kinds = {
            name: KindOfStep(
                **{key: kind[key] for key in _PLAIN if key in kind},
                plan=None if kind["plan"] is None else BitPlan.from_dict(kind["plan"]),
                sensitive=[
                    Sensitive(frozenset(Place(*place) for place in places), tuple(Option(*o) for o in options))
                    for places, options in kind["sensitive"]
                ],
            )
            for name, kind in state_dict.items()
        }


_PLAIN = ("steps", "fixed", "raw", "norm", "target", "predicted", "stored", "bits", "uniform", "too_wide")
