"""What a search for bits found: the plans that were measured, and those of them that no other beats."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from lightning_tinykg.bits.budget import Budget
from lightning_tinykg.bits.plan import BitPlan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Front", "NothingWithin", "Trial", "allowed_drop", "at_least"]


@dataclass(frozen=True)
class Trial:
    """One plan, measured.

    Attributes:
        plan: which bits where.
        nbytes: what is stored under it.
        average_bits: the mean over the entries of the search space, each counted once.
        accuracies: one for each repeat; none if the measurement failed.
        seconds: that the measurement took.
        error: why it failed; None if it did not.
    """

    plan: BitPlan
    nbytes: int
    average_bits: float
    accuracies: tuple[float, ...] = ()
    seconds: float = 0.0
    error: str | None = None

    @property
    def accuracy(self) -> float:
        """The mean over the repeats; NaN if the measurement failed."""
        return math.fsum(self.accuracies) / len(self.accuracies) if self.accuracies else math.nan

    @property
    def failed(self) -> bool:
        """Whether there is no accuracy."""
        return not self.accuracies

    def to_dict(self) -> dict[str, Any]:
        """Plain primitives, from which :meth:`from_dict` makes an equal trial."""
        return {
            "plan": self.plan.to_dict(),
            "accuracy": None if self.failed else self.accuracy,
            "accuracies": list(self.accuracies),
            "bytes": self.nbytes,
            "average_bits": self.average_bits,
            "seconds": self.seconds,
            "error": self.error,
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Trial:
        """A trial from plain primitives."""
        return cls(
            plan=BitPlan.from_dict(plain["plan"]),
            nbytes=int(plain["bytes"]),
            average_bits=float(plain["average_bits"]),
            accuracies=tuple(float(accuracy) for accuracy in plain["accuracies"]),
            seconds=float(plain["seconds"]),
            error=plain["error"],
        )


class NothingWithin(ValueError):
    """No plan that was measured is within the tolerance, or the budget.

    Attributes:
        nearest: the plan that is nearest to it: the most accurate, or the smallest.
    """

    def __init__(self, message: str, nearest: Trial) -> None:
        super().__init__(message)
        self.nearest = nearest


def allowed_drop(tolerance: float | str, reference: float) -> float:
    """How far below the reference an accuracy may be.

    Args:
        tolerance: a number, in the accuracy's unit, or a text such as ``"0.5%"``: of the reference.
        reference: full precision's accuracy.

    Raises:
        ValueError: if it is neither, or negative.

    Example:
        >>> allowed_drop(0.005, reference=0.8), allowed_drop("0.5%", reference=0.8)
        (0.005, 0.004)
    """
    try:
        if isinstance(tolerance, str):
            if not tolerance.rstrip().endswith("%"):
                raise ValueError
            drop = float(tolerance.rstrip()[:-1]) / 100 * abs(reference)
        else:
            drop = math.nan if isinstance(tolerance, bool) else float(tolerance)
    except (TypeError, ValueError):
        drop = math.nan
    if not 0 <= drop < math.inf:
        raise ValueError(
            "tolerance must be a number in the accuracy's unit, at least 0, or a text such as '0.5%', of the "
            f"reference, got {tolerance!r}"
        )
    return drop


def at_least(accuracy: float, bound: float) -> bool:
    """Whether an accuracy meets a bound, which is a difference and so has been rounded itself."""
    return accuracy >= bound - 1e-9 * max(1.0, abs(bound))


class Front:
    """The plans that were measured, and those that no other beats in both bytes and accuracy.

    Accuracies are those that the search was given, on validation data. A plan is chosen because it came out well, so
    what it promises is to be measured again on data that the search has not seen.

    Args:
        trials: all that was measured.
        reference: full precision's accuracy.
        full_bytes: what the widest plan stores.
        tolerance: how far below the reference an accuracy may be, where none is given; see :func:`allowed_drop`.

    Attributes:
        points: the trials on the front, from the smallest to the most accurate. Of trials that are equal in both, the
            first.

    Raises:
        ValueError: if no trial has an accuracy.

    Example:
        >>> found = {1: 0.60, 2: 0.79, 3: 0.78, 8: 0.80}
        >>> trials = [Trial(BitPlan(default=bits), 100 * bits, bits, (accuracy,)) for bits, accuracy in found.items()]
        >>> front = Front(trials, reference=0.80, full_bytes=800)
        >>> [point.nbytes for point in front.points]
        [100, 200, 800]
        >>> front.smallest_within(0.02).plan, front.best_within("50%").accuracy
        (BitPlan({}, default=2), 0.79)
    """

    def __init__(
        self, trials: Sequence[Trial], reference: float, full_bytes: int, tolerance: float | str = 0.005
    ) -> None:
        self.trials = tuple(trials)
        self.reference = reference
        self.full_bytes = full_bytes
        self.tolerance = tolerance
        allowed_drop(tolerance, reference)
        self._measured = [trial for trial in self.trials if not trial.failed]
        if not self._measured:
            raise ValueError(f"trials must have one that did not fail, got {len(self.trials)} that did")
        points: list[Trial] = []
        for trial in sorted(self._measured, key=lambda trial: (trial.nbytes, -trial.accuracy)):
            if not points or trial.accuracy > points[-1].accuracy:
                points.append(trial)
        self.points: tuple[Trial, ...] = tuple(points)

    @property
    def plans(self) -> list[BitPlan]:
        """The plans on the front, from the smallest."""
        return [point.plan for point in self.points]

    @property
    def failures(self) -> list[Trial]:
        """The measurements that failed."""
        return [trial for trial in self.trials if trial.failed]

    def smallest_within(self, tolerance: float | str | None = None) -> Trial:
        """The smallest plan whose accuracy is within a tolerance of full precision's.

        Args:
            tolerance: a number, in the accuracy's unit (0.005 of 0.81 allows 0.805), or a text: ``"0.5%"`` of the
                reference. None: the search's own.

        Raises:
            NothingWithin: if there is none. Its ``nearest`` is the most accurate.
        """
        drop = allowed_drop(self.tolerance if tolerance is None else tolerance, self.reference)
        for point in self.points:
            if at_least(point.accuracy, self.reference - drop):
                return point
        nearest = self.points[-1]
        raise NothingWithin(
            f"no plan of the {len(self._measured)} measured is within {drop:g} of {self.reference:g}: the nearest has "
            f"{nearest.accuracy:g}, in {nearest.nbytes} bytes",
            nearest,
        )

    def best_within(self, budget: int | float | str) -> Trial:
        """The most accurate plan within a number of bytes.

        Args:
            budget: bytes, a text such as ``"2MiB"`` or ``"10%"``, or a fraction of the widest plan's bytes.

        Raises:
            NothingWithin: if there is none. Its ``nearest`` is the smallest.
        """
        most = Budget.parse(budget).bytes_of(self.full_bytes)
        for point in reversed(self.points):
            if point.nbytes <= most:
                return point
        nearest = self.points[0]
        raise NothingWithin(
            f"no plan of the {len(self._measured)} measured is within {most} bytes: the smallest has "
            f"{nearest.nbytes}, and an accuracy of {nearest.accuracy:g}",
            nearest,
        )

    # -- to look at ----------------------------------------------------------------------------------------------

    def rows(self) -> list[dict[str, Any]]:
        """The front as plain rows: bytes, how many times fewer than the widest plan's, bits, accuracy, drop, plan."""
        return [
            {
                "bytes": point.nbytes,
                "times_fewer": self.full_bytes / point.nbytes if point.nbytes else math.inf,
                "average_bits": point.average_bits,
                "accuracy": point.accuracy,
                "drop": self.reference - point.accuracy,
                "plan": repr(point.plan),
            }
            for point in self.points
        ]

    def table(self) -> Table:
        """The front as a rich table, from the smallest plan; a star marks the smallest within the tolerance."""
        title = f"{len(self.points)} plans that no other of {len(self.trials)} beats"
        if self.failures:
            title += f" ({len(self.failures)} could not be measured)"
        table = Table("", "bytes", "fewer", "average bits", "accuracy", "drop", title=title)
        for column in table.columns[1:]:
            column.justify = "right"
        bound = self.reference - allowed_drop(self.tolerance, self.reference)
        starred = next((point for point in self.points if at_least(point.accuracy, bound)), None)
        for point, row in zip(self.points, self.rows(), strict=True):
            table.add_row(
                "*" if point is starred else "",
                f"{row['bytes']:,}",
                f"{row['times_fewer']:.1f}x",
                f"{row['average_bits']:.2f}",
                f"{row['accuracy']:.4f}",
                f"{row['drop']:.4f}",
            )
        return table

    def __str__(self) -> str:
        buffer = io.StringIO()
        Console(file=buffer, width=110).print(self.table())
        return buffer.getvalue().rstrip()

    def plot(self, path: str | Path | None = None) -> Figure:
        """Accuracy against bytes: all plans, the front, the reference and what the tolerance allows.

        Args:
            path: a file to write it to, by its suffix.

        Returns:
            A matplotlib figure, which no window shows until it is asked to.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        kib = 2**10
        axes.scatter(
            [trial.nbytes / kib for trial in self._measured],
            [trial.accuracy for trial in self._measured],
            s=12,
            color="0.7",
            label="measured",
        )
        axes.step(
            [point.nbytes / kib for point in self.points],
            [point.accuracy for point in self.points],
            "o-",
            where="post",
            color="#1f5aa6",
            label="front",
        )
        drop = allowed_drop(self.tolerance, self.reference)
        axes.axhspan(self.reference - drop, self.reference, color="#2a9d5c", alpha=0.15, label="within the tolerance")
        axes.axhline(self.reference, color="#2a9d5c", lw=1, label="full precision")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("KiB (log scale)")
        axes.set_ylabel("accuracy")
        axes.legend(loc="lower right", frameon=False)
        if path is not None:
            figure.savefig(path)
        return figure

    def to_json(self) -> str:
        """All of it as JSON, from which :meth:`from_json` makes an equal one."""
        plain = {"reference": self.reference, "full_bytes": self.full_bytes, "tolerance": self.tolerance}
        return json.dumps({**plain, "trials": [trial.to_dict() for trial in self.trials]}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Front:
        """A front from what :meth:`to_json` gave."""
        plain = json.loads(text)
        trials = [Trial.from_dict(trial) for trial in plain.pop("trials")]
        return cls(trials, **plain)
