"""How many bits when: annealing, as a pure function of a counter.

A schedule holds no state. Whoever asks it brings the counter (optimizer steps or epochs so far), so a resumed run, an
accumulated one and every rank of a distributed one agree.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

from lightning_tinykg.arguments import check_whole, is_width

WIDTHS = (1, 2, 4, 8, 32)
"""The widths there are; 32 is exact."""

By = Literal["step", "epoch"]


def check_bits(bits: object, name: str = "bits") -> None:
    """Refuse what is not a width.

    Raises:
        ValueError: naming the argument and its value.

    Example:
        >>> check_bits(3)
        Traceback (most recent call last):
        ValueError: bits must be one of 1, 2, 4, 8, 32, got 3
    """
    if not is_width(bits, WIDTHS):
        raise ValueError(f"{name} must be one of {', '.join(map(str, WIDTHS))}, got {bits!r}")


def nearest_width(bits: float) -> int:
    """The width nearest to a number of bits, the wider one if there are two.

    Example:
        >>> [nearest_width(bits) for bits in (1.4, 3.0, 5.9, 6.0, 20.0)]
        [1, 4, 4, 8, 32]
    """
    return min(reversed(WIDTHS), key=lambda width: abs(width - bits))


class Schedule(ABC):
    """Bits as a function of the optimizer steps, or of the epochs, so far.

    Attributes:
        by: what is counted: ``"step"`` or ``"epoch"``.
    """

    by: By = "step"

    @abstractmethod
    def bits_at(self, count: int) -> int:
        """The width after ``count`` steps (or epochs); 0 is the first."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain primitives, from which :func:`from_dict` makes an equal schedule."""

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={getattr(self, key)!r}" for key in self.to_dict() if key != "schedule")
        return f"{type(self).__name__}({settings})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(repr(self))


def from_dict(plain: Mapping[str, Any]) -> Schedule:
    """A schedule from plain primitives.

    Raises:
        ValueError: if there is no such schedule.

    Example:
        >>> schedule = WarmupThen(steps=100, bits=8, then=LinearAnneal(8, 2, steps=50))
        >>> from_dict(schedule.to_dict()) == schedule
        True
    """
    settings = dict(plain)
    kind = settings.pop("schedule", None)
    if kind not in _SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(_SCHEDULES)}, got {kind!r}")
    if isinstance(settings.get("then"), Mapping):
        settings["then"] = from_dict(settings["then"])
    schedule: Schedule = _SCHEDULES[kind](**settings)
    return schedule


class ConstantBits(Schedule):
    """One width from beginning to end.

    Args:
        bits: 1, 2, 4, 8 or 32.

    Example:
        >>> ConstantBits(4).bits_at(1000)
        4
    """

    def __init__(self, bits: int) -> None:
        check_bits(bits)
        self.bits = bits

    def bits_at(self, count: int) -> int:
        """The width, whatever the count."""
        return self.bits

    def to_dict(self) -> dict[str, Any]:
        """Its arguments."""
        return {"schedule": "ConstantBits", "bits": self.bits}


class StepAnneal(Schedule):
    """Widths that change at given counts.

    Args:
        bits: count -> the width from then on; it has to say what the width is at 0.
        by: what is counted.

    Raises:
        ValueError: if a count is negative, 0 is missing, or a width is none.

    Example:
        >>> schedule = StepAnneal({0: 8, 1000: 4, 5000: 2})
        >>> [schedule.bits_at(count) for count in (0, 999, 1000, 9000)]
        [8, 8, 4, 2]
    """

    def __init__(self, bits: Mapping[int, int], by: By = "step") -> None:
        try:  # YAML and JSON have keys of text
            counts = {int(count): width for count, width in bits.items()}
        except (AttributeError, ValueError, TypeError):
            counts = {}
        if 0 not in counts or min(counts) < 0:
            raise ValueError(f"bits must map counts from 0 on, 0 among them, to widths, got {bits!r}")
        for count, width in counts.items():
            check_bits(width, f"bits[{count}]")
        self.bits = dict(sorted(counts.items()))
        self.by = _checked_by(by)

    def bits_at(self, count: int) -> int:
        """The width of the last change that is not after ``count``."""
        return next(width for start, width in reversed(self.bits.items()) if start <= count)

    def to_dict(self) -> dict[str, Any]:
        """Its arguments."""
        return {"schedule": "StepAnneal", "bits": self.bits, "by": self.by}


class _Anneal(Schedule):
    """From one width to another, along a curve, in a number of steps."""

    def __init__(self, start: int = 8, end: int = 2, *, steps: int, by: By = "step") -> None:
        check_bits(start, "start")
        check_bits(end, "end")
        check_whole("steps", steps, 1)
        self.start = start
        self.end = end
        self.steps = steps
        self.by = _checked_by(by)

    @staticmethod
    @abstractmethod
    def _curve(progress: float) -> float:
        """How far from start to end, 0 to 1, after a part of the steps, 0 to 1."""

    def bits_at(self, count: int) -> int:
        """The width nearest to the curve; the wider one where two are."""
        share = self._curve(min(count / self.steps, 1.0))
        return nearest_width(self.start + (self.end - self.start) * share)

    def to_dict(self) -> dict[str, Any]:
        """Its arguments."""
        kind = type(self).__name__
        return {"schedule": kind, "start": self.start, "end": self.end, "steps": self.steps, "by": self.by}


class LinearAnneal(_Anneal):
    r"""Widths along a straight line: the width nearest to :math:`b_0 + (b_1 - b_0)\, t / T`.

    Args:
        start: width at the beginning.
        end: width after ``steps``, and from then on; more than ``start`` anneals upward.
        steps: how many steps (or epochs) it takes.
        by: what is counted.

    Example:
        >>> schedule = LinearAnneal(start=8, end=2, steps=90)
        >>> [schedule.bits_at(count) for count in (0, 30, 31, 75, 76, 90, 1000)]
        [8, 8, 4, 4, 2, 2, 2]
    """

    @staticmethod
    def _curve(progress: float) -> float:
        return progress


class CosineAnneal(_Anneal):
    r"""Widths along half a cosine: the width nearest to :math:`b_1 + (b_0 - b_1)(1 + \cos(\pi t / T)) / 2`.

    It stays near the ends longer than a straight line does.

    Args:
        start: width at the beginning.
        end: width after ``steps``, and from then on; more than ``start`` anneals upward.
        steps: how many steps (or epochs) it takes.
        by: what is counted.

    Example:
        >>> schedule = CosineAnneal(start=8, end=2, steps=2000)
        >>> [schedule.bits_at(count) for count in (0, 1000, 1999, 5000)]
        [8, 4, 2, 2]
    """

    @staticmethod
    def _curve(progress: float) -> float:
        return (1 - math.cos(math.pi * progress)) / 2


class WarmupThen(Schedule):
    """A width for a while, then another schedule, which starts to count there.

    Args:
        steps: how long.
        bits: the width until then.
        then: what follows: a schedule, or a width.
        by: what is counted; ``then`` has to count the same.

    Example:
        >>> schedule = WarmupThen(steps=100, bits=32, then=StepAnneal({0: 8, 50: 2}))
        >>> [schedule.bits_at(count) for count in (0, 99, 100, 150)]
        [32, 32, 8, 2]
    """

    def __init__(self, steps: int, bits: int, then: Schedule | int, by: By = "step") -> None:
        check_bits(bits)
        check_whole("steps", steps)
        self.steps = steps
        self.bits = bits
        self.by = _checked_by(by)
        if isinstance(then, int):
            then = ConstantBits(then)
        elif not isinstance(then, Schedule):
            raise ValueError(f"then must be a width or a schedule, got {then!r}")
        elif then.by != by and not isinstance(then, ConstantBits):
            raise ValueError(f"then must count by {by!r} as WarmupThen does, got {then!r}")
        self.then = then

    def bits_at(self, count: int) -> int:
        """The width of the warm-up, or of what follows."""
        return self.bits if count < self.steps else self.then.bits_at(count - self.steps)

    def to_dict(self) -> dict[str, Any]:
        """Its arguments."""
        then = self.then.to_dict()
        return {"schedule": "WarmupThen", "steps": self.steps, "bits": self.bits, "then": then, "by": self.by}


def _checked_by(by: By) -> By:
    if by not in ("step", "epoch"):
        raise ValueError(f"by must be 'step' or 'epoch', got {by!r}")
    return by


_SCHEDULES: dict[str, Any] = {
    kind.__name__: kind for kind in (ConstantBits, StepAnneal, LinearAnneal, CosineAnneal, WarmupThen)
}
