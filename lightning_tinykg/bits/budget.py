r"""The least gradient variance under a number of bytes.

Rounding a tensor to `b` bits adds a variance to the gradient that falls with the square of the number of levels,

.. math:: \mathrm{Var}_i(b) = C_i / (2^b - 1)^2

(ActNN, Chen et al., ICML 2021, section 4). The roundings are independent, so the variances add up, and the best widths
under a budget are those of a knapsack: at each tensor one of a few widths, with its bytes and its variance. Along the
lower convex hull of these the greedy choice, the most variance for each byte first, is optimal but for what is left
over of the budget at the end. That is no trifle: where a large tensor's next step just does not fit, the error can be
twice that of the best choice. So what is left over is shared out by dynamic programming, over the few choices that
Lagrange's bound does not rule out:

.. math:: \sum_i \mathrm{Var}_i \ge \sum_i \min_b (\mathrm{Var}_i(b) + \lambda\, n_i(b)) - \lambda B

for bytes `n`, the budget `B`, and any price :math:`\lambda \ge 0` of a byte (Everett, Operations Research, 1963); the
price at which the greedy choice had to stop makes it the tightest.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import numpy as np

_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}

_MOST = 4096
"""Choices that are held in mind at the most, so that a plan takes a second and not an hour."""

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
        budget: the bytes that there were.
        least: the bytes that would do.
    """

    def __init__(self, budget: int, least: int) -> None:
        super().__init__(budget, least)
        self.budget, self.least = budget, least

    def __str__(self) -> str:
        return f"budget must be at least {self.least} bytes for this step, got {self.budget}"


def allocate(options: Mapping[_Key, Sequence[Option]], budget: int) -> dict[_Key, Option]:
    """Choose one option for each key, so that the variances add up to the least under a sum of bytes.

    It is the best choice there is, unless thousands of choices are nearly the best; then it may miss that by a little,
    less than by one step of one key.

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
    place, price = _greedy(list(hulls.values()), budget)
    chosen = [hull[at] for hull, at in zip(hulls.values(), place, strict=True)]
    if 0 < price < math.inf:  # else all fit, or the gradient that was measured by was not finite
        chosen = _better(list(options.values()), chosen, budget, price) or chosen
    return dict(zip(hulls, chosen, strict=True))


def _greedy(hulls: Sequence[Sequence[Option]], budget: int) -> tuple[list[int], float]:
    """The most variance for each byte first: a place on each hull, and the variance that a byte more would buy."""
    place, price = [0] * len(hulls), 0.0
    spent = sum(hull[0].nbytes for hull in hulls)
    if spent > budget:
        raise BudgetTooSmall(budget, spent)
    steps = [(-_slope(*hull[:2]), number) for number, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        slope, number = heapq.heappop(steps)  # of equal slopes the first, whatever the keys are
        hull, at = hulls[number], place[number]
        cost = hull[at + 1].nbytes - hull[at].nbytes
        if spent + cost > budget:
            price = price or -slope
            continue  # too dear, but others may still fit
        spent += cost
        place[number] = at + 1
        if at + 2 < len(hull):
            heapq.heappush(steps, (-_slope(*hull[at + 1 : at + 3]), number))
    return place, price


def _better(
    options: Sequence[Sequence[Option]], known: Sequence[Option], budget: int, price: float
) -> list[Option] | None:
    """A choice of less variance than a known one, or None if there is none.

    It goes from key to key, and holds of all choices so far those that may still turn out better: those that fit, that
    no other beats in both bytes and variance, and whose bound is below the known variance. If these are more than
    ``_MOST``, then those of the least bounds: only then may what it returns not be the best there is.
    """
    worth_it = sum(option.variance for option in known) * (1 - 1e-9)
    least_bytes = _sums_from([min(option.nbytes for option in choices) for choices in options])
    least_cost = _sums_from([min(option.variance + price * option.nbytes for option in choices) for choices in options])
    nbytes, variance = np.zeros(1), np.zeros(1)
    came_from = []
    for number, choices in enumerate(options):
        all_bytes = nbytes[:, None] + [option.nbytes for option in choices]
        all_variance = variance[:, None] + [option.variance for option in choices]
        bound = all_variance + price * (all_bytes - budget) + least_cost[number + 1]
        state, option = np.nonzero((all_bytes + least_bytes[number + 1] <= budget) & (bound < worth_it))
        if len(state) == 0:
            return None
        nbytes, variance, bound = all_bytes[state, option], all_variance[state, option], bound[state, option]
        order = np.lexsort((variance, nbytes))
        before = np.minimum.accumulate(variance[order])[:-1]
        order = order[np.append(True, variance[order][1:] < before)]
        if len(order) > _MOST:
            order = order[np.argsort(bound[order], kind="stable")[:_MOST]]
        nbytes, variance = nbytes[order], variance[order]
        came_from.append((state[order], option[order]))
    at, chosen = int(np.argmin(variance)), []
    if variance[at] >= worth_it:  # its bound was below, but it leaves bytes over
        return None
    for choices, (state, option) in zip(reversed(options), reversed(came_from), strict=True):
        chosen.append(choices[option[at]])
        at = state[at]
    return chosen[::-1]


def _sums_from(values: Sequence[float]) -> list[float]:
    """For each place the sum of the values from there on; 0 after the last."""
    return [*accumulate(reversed(values), initial=0.0)][::-1]


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
