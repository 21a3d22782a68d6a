r"""The least gradient variance under a number of bytes.

Rounding a tensor to `b` bits adds a variance to the gradient that falls with the square of the number of levels,

.. math:: \mathrm{Var}_i(b) = C_i / (2^b - 1)^2

(ActNN, Chen et al., ICML 2021, section 4). The roundings are independent, so the variances add up, and the best widths
under a budget are those of a knapsack: at each tensor one of a few widths, with its bytes and its variance. Along the
lower convex hull of these the greedy choice, the most variance for each byte first, is optimal but for what is left
over of the budget at the end.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}

_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True)
class Budget:
    """A number of bytes, or a fraction of the raw bytes.

    Attributes:
        amount: bytes, or a fraction in (0, 1).
        relative: whether it is a fraction.

    Example:
        >>> Budget.parse("1.5GiB").bytes_of(raw=0), Budget.parse(0.1).bytes_of(raw=1000), Budget.parse(4096).amount
        (1610612736, 100, 4096.0)
    """

    amount: float
    relative: bool = False

    @classmethod
    def parse(cls, budget: int | float | str) -> Budget:
        """A budget as a user writes it.

        Args:
            budget: bytes, a fraction of the raw bytes (below 1), or a text such as ``"512MiB"`` or ``"10%"``.

        Raises:
            ValueError: if it is none of these, or not positive.
        """
        amount, relative = 0.0, False
        if isinstance(budget, str):
            found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*|%)\s*", budget)
            if found and found[2] == "%":
                amount, relative = float(found[1]) / 100, True
            elif found and found[2].lower() in _UNITS:
                amount = float(found[1]) * _UNITS[found[2].lower()]
        elif not isinstance(budget, bool):
            amount, relative = float(budget), 0 < budget < 1
        if not amount > 0 or (relative and amount >= 1):
            raise ValueError(
                "budget must be bytes, a text such as '512MiB' or '10%', or a fraction of the raw bytes (below 1), "
                f"got {budget!r}"
            )
        return cls(amount, relative)

    def bytes_of(self, raw: int) -> int:
        """The bytes it allows where the uncompressed graph keeps ``raw``."""
        return int(self.amount * raw) if self.relative else int(self.amount)


@dataclass(frozen=True)
class Option:
    """One width of one tensor.

    Attributes:
        bits: the width.
        nbytes: the bytes that it is stored in.
        variance: what rounding it so adds to the gradient's variance.
    """

    bits: int
    nbytes: int
    variance: float


class BudgetTooSmall(ValueError):
    """Not even the least widths fit.

    Attributes:
        least: the bytes that would do.
    """

    def __init__(self, budget: int, least: int) -> None:
        super().__init__(f"budget must be at least {least} bytes for this step, got {budget}")
        self.least = least


def allocate(options: Mapping[_Key, Sequence[Option]], budget: int) -> dict[_Key, Option]:
    """Choose one option for each key, so that the variances add up to the least under a sum of bytes.

    Args:
        options: the options of each key, in any order.
        budget: bytes that all together may take.

    Returns:
        The chosen option of each key.

    Raises:
        BudgetTooSmall: if even the smallest of all take more.

    Example:
        >>> feature = [Option(2, 100, 9.0), Option(8, 400, 0.1)]
        >>> score = [Option(2, 1, 50.0), Option(8, 4, 0.5), Option(32, 16, 0.0)]
        >>> chosen = allocate({"feature": feature, "score": score}, budget=120)
        >>> {key: option.bits for key, option in chosen.items()}
        {'feature': 2, 'score': 32}
    """
    hulls = {key: _lower_hull(choices) for key, choices in options.items()}
    place = dict.fromkeys(hulls, 0)
    spent = sum(hull[0].nbytes for hull in hulls.values())
    if spent > budget:
        raise BudgetTooSmall(budget, spent)
    order = {key: number for number, key in enumerate(hulls)}  # of equal gains the first, whatever the keys are
    steps = [(-_gain(hull, 0), order[key], key) for key, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, number, key = heapq.heappop(steps)
        hull, at = hulls[key], place[key]
        cost = hull[at + 1].nbytes - hull[at].nbytes
        if spent + cost > budget:
            continue  # too dear, but others may still fit
        spent += cost
        place[key] = at + 1
        if at + 2 < len(hull):
            heapq.heappush(steps, (-_gain(hull, at + 1), number, key))
    return {key: hull[place[key]] for key, hull in hulls.items()}


def _lower_hull(options: Sequence[Option]) -> list[Option]:
    """The options that are worth their bytes, by bytes: each further one buys less variance per byte."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (o.nbytes, o.variance)):
        if hull and option.variance >= hull[-1].variance:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], option):
            hull.pop()
        if hull and option.nbytes == hull[-1].nbytes:
            hull.pop()
        hull.append(option)
    return hull


def _slope(a: Option, b: Option) -> float:
    """The variance that a byte buys."""
    return (a.variance - b.variance) / max(b.nbytes - a.nbytes, 1e-9)


def _gain(hull: Sequence[Option], at: int) -> float:
    return _slope(hull[at], hull[at + 1])
