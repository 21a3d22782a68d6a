"""Plans that are best if what each entry costs adds up: found outright, where a search by neighbours would creep."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import islice

import numpy as np

from lightning_tinykg.bits.predicting import Floats, drop_that_matters, groups_of
from lightning_tinykg.bits.space import Choice, SearchSpace

__all__ = ["Filling"]

_PRICES = 200
"""Prices of accuracy in bytes that are tried: as many plans, from the narrowest to the widest."""

_BASES = 3
"""Random plans in which it is looked at what each width of each entry takes."""

_RIDGE = 1e-3
"""What an entry that was not seen to cost anything is held to: nothing, at this share of what the data say."""


class Filling:
    r"""Fits what each entry costs, and gives the plans that take the least bytes by it.

    Rounding to `b` bits has a squared error in proportion to :math:`4^{-b}`, and errors of their own add up. So the
    accuracy below the reference is taken for

    .. math:: r - a(b) = \sum_e c_e 4^{-b_e}, \qquad c_e = \gamma_e + \sum_{g \ni e} \gamma_g, \qquad \gamma \ge 0

    with the groups of entries that share a layer, a component, a topology or two of these, so that a few dozen plans
    say something of each entry. It is fitted by non-negative least squares, where plans that are far below count
    little: errors do not add up there. For a price :math:`\lambda` of accuracy, the best plan then has for each entry
    the width with the least :math:`\mathrm{bytes}_e(b) + \lambda c_e 4^{-b}`.

    An entry that was not seen to cost anything is taken for free, so that it is tried at its narrowest, and then known.

    Args:
        space: the plans there are.
        bytes_of: from a choice to its bytes.
        calls: how often it may be called to begin with, and for each fit; the more, the better they are known.

    Example:
        >>> space = SearchSpace({"features": (1, 2, 4, 8), "head": (1, 2, 4, 8)})
        >>> filling = Filling(space, lambda choice: 1000 * choice[0] + 10 * choice[1])
        >>> filling.fit([(8, 8), (1, 8), (8, 1)], [0.9, 0.85, 0.3], reference=0.9, drop=0.01)
        >>> filling.smallest([0.02], known=())
        [(2, 8)]
    """

    def __init__(self, space: SearchSpace, bytes_of: Callable[[Choice], int], calls: int = 2000) -> None:
        self._space, self._prices = space, min(_PRICES, calls)
        groups = [*groups_of(space), list(range(len(space.patterns)))]
        self._members = np.array([[entry in group for entry in range(len(space.patterns))] for group in groups], float)
        self._bytes_of = bytes_of
        # of each entry alone: what it takes on top of some plans, in which what is common to all of a kind is there
        rng = np.random.default_rng(0)
        bases = [space.draw(rng) for _ in range(max(min(_BASES, calls // self.calls_of(space)), 1))]
        self._bytes: list[Floats] = [
            np.mean([[bytes_of((*b[:entry], bits, *b[entry + 1 :])) for bits in widths] for b in bases], axis=0)
            for entry, widths in enumerate(space.widths)
        ]
        self._costs: Floats = np.zeros(len(space.widths))

    @staticmethod
    def calls_of(space: SearchSpace) -> int:
        """How often the bytes have to be asked for at the least, to begin with."""
        return sum(len(widths) for widths in space.widths)

    def fit(self, choices: Sequence[Choice], accuracies: Sequence[float], reference: float, drop: float) -> None:
        """Learn from plans that were measured.

        Args:
            choices: the plans.
            accuracies: of each.
            reference: full precision's accuracy.
            drop: how far below it matters.
        """
        from scipy.optimize import nnls  # scikit-learn, which a search needs anyway, has it with it

        errors = _errors(choices)
        below = reference - np.asarray(accuracies, dtype=np.float64)
        weight = 1 / (np.maximum(below, 0.0) + drop_that_matters(drop, accuracies))
        columns = np.column_stack([errors, errors @ self._members.T]) * weight[:, None]
        ridge = np.sqrt(_RIDGE * np.square(columns).sum(axis=0).mean()) * np.eye(columns.shape[1])
        target = np.concatenate([below * weight, np.zeros(len(ridge))])
        found, _ = nnls(np.vstack([columns, ridge]), target)
        entries = errors.shape[1]
        self._costs = found[:entries] + found[entries:] @ self._members

    def drops(self, choices: Sequence[Choice]) -> Floats:
        """How far below the reference plans are by the fit, float64 ``[n]``."""
        return np.asarray(_errors(choices) @ self._costs)

    def smallest(self, drops: Sequence[float], known: Collection[Choice]) -> list[Choice]:
        """For each drop the smallest plan that is by the fit no further below, none of them known or twice.

        Args:
            drops: how far below the reference.
            known: which plans not.
        """
        path, found = self._path(), dict[Choice, None]()
        below = self.drops(path)
        for drop in drops:
            within = [choice for choice, d in zip(path, below, strict=True) if d <= drop]
            least = min(within, key=self._bytes_of) if within else path[int(below.argmin())]
            fresh = (choice for choice in self._narrowed(least, drop) if choice not in known and choice not in found)
            found.update(dict.fromkeys(islice(fresh, 1)))
        return list(found)

    def _narrowed(self, choice: Choice, drop: float) -> list[Choice]:
        """A plan with one entry after the other narrower, whichever saves the most, as long as that is within a drop.

        A price finds the corners of what is best only; between them something is left. The last comes first.
        """
        steps = [choice]
        while True:
            narrower = self._steps(choice, -1)
            within = (
                [one for one, d in zip(narrower, self.drops(narrower), strict=True) if d <= drop] if narrower else []
            )
            if not within:
                return steps[::-1]
            choice = min(within, key=self._alone)
            steps.append(choice)

    def _alone(self, choice: Choice) -> float:
        """The bytes of its entries, each by itself."""
        known = zip(choice, self._space.widths, self._bytes, strict=True)
        return float(sum(nbytes[widths.index(bits)] for bits, widths, nbytes in known))

    def best_within(self, budget: int, count: int, known: Collection[Choice]) -> list[Choice]:
        """The plans within some bytes that are by the fit the most accurate, none of them known.

        Args:
            budget: the bytes.
            count: how many, at most.
            known: which plans not.
        """
        path = self._path()
        over = [choice for choice in path if self._bytes_of(choice) > budget]
        below = [choice for choice in path if self._bytes_of(choice) <= budget]
        if over:
            below += self._shrunk(min(over, key=self._bytes_of), budget)
        if below:
            below += self._widened(max(below, key=self._bytes_of), budget)
        fresh = [choice for choice in dict.fromkeys(below) if choice not in known]
        return sorted(fresh, key=lambda choice: float(self.drops([choice])[0]))[:count]

    def _shrunk(self, choice: Choice, budget: int) -> list[Choice]:
        """A plan with one entry after the other narrower, whichever costs the least for what it saves, to a budget."""
        while self._bytes_of(choice) > budget:
            narrower = self._steps(choice, -1)
            if not narrower:
                return []
            choice = narrower[int(self._rates(choice, narrower).argmin())]
        return [choice]

    def _widened(self, choice: Choice, budget: int) -> list[Choice]:
        """A plan with one entry after the other wider, whichever gains the most for what it takes; the last first."""
        steps: list[Choice] = []
        while True:
            wider = self._steps(choice, 1)
            best_first: list[int] = np.argsort(-self._rates(choice, wider)).tolist() if wider else []
            within = (wider[place] for place in best_first if self._bytes_of(wider[place]) <= budget)
            following = next(within, None)
            if following is None:
                return steps[::-1]
            choice = following
            steps.append(choice)

    def _rates(self, choice: Choice, others: Sequence[Choice]) -> Floats:
        """How far others are below the reference beside a plan, for each byte that they are apart, float64 ``[n]``."""
        apart = np.array([self._alone(other) for other in others]) - self._alone(choice)
        return np.asarray((self.drops([choice]) - self.drops(others)) / np.where(apart, apart, 1e-9))

    def _steps(self, choice: Choice, by: int) -> list[Choice]:
        """The plans with one entry one width narrower or wider."""
        return [
            (*choice[:entry], widths[widths.index(choice[entry]) + by], *choice[entry + 1 :])
            for entry, widths in enumerate(self._space.widths)
            if 0 <= widths.index(choice[entry]) + by < len(widths)
        ]

    def _path(self) -> list[Choice]:
        """The best plan for each price, from the narrowest to the widest."""
        costs = np.maximum(self._costs, 1e-12 * max(float(self._costs.max()), 1e-12))
        saved = max(float(np.ptp(nbytes)) for nbytes in self._bytes) or 1.0
        prices = np.geomspace(saved * 1e-6, saved * 1e6, self._prices) / max(float(costs.max()), 1e-12)
        plans: dict[Choice, None] = {}
        for price in prices:
            choice = []
            for widths, nbytes, cost in zip(self._space.widths, self._bytes, costs, strict=True):
                paid = nbytes + price * cost * np.exp2(-2 * np.asarray(widths, dtype=np.float64))
                choice.append(widths[int(paid.argmin())])
            plans[tuple(choice)] = None
        return list(plans)


def _errors(choices: Sequence[Choice]) -> Floats:
    return np.exp2(-2 * np.asarray(choices, dtype=np.float64))
