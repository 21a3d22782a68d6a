"""Which plans a search for bits measures next."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import islice

import numpy as np

from lightning_tinykg.bits.front import Trial, at_least
from lightning_tinykg.bits.predicting import Floats, Predictor
from lightning_tinykg.bits.space import Choice, SearchSpace

__all__ = ["best_predicted", "candidates", "parents_of", "random_choices", "spread"]

_PARENTS = 6
_MARGINS = (0.75, -0.25)
"""How much better than the bound a plan is predicted to be, in the predictor's scores: from the smallest that are
safely within to those that are just predicted not to be."""


def random_choices(space: SearchSpace, count: int, known: Collection[Choice], rng: np.random.Generator) -> list[Choice]:
    """Random plans that are not known, or all that are left if there are fewer.

    Args:
        space: the plans there are.
        count: how many.
        known: which plans not.
        rng: where the randomness is from.

    Example:
        >>> space = SearchSpace({"a": (1, 2), "b": (1, 2)})
        >>> sorted(random_choices(space, 9, {(1, 1)}, np.random.default_rng(0)))
        [(1, 2), (2, 1), (2, 2)]
    """
    drawn = _distinct(lambda: space.draw(rng), count, known)
    if len(drawn) < count:  # a small space, of which little is left
        left = (choice for choice in space.all() if choice not in known and choice not in drawn)
        drawn.update(dict.fromkeys(islice(left, count - len(drawn))))
    return list(drawn)


def candidates(
    space: SearchSpace, count: int, trials: Mapping[Choice, Trial], parents: Iterable[Choice], rng: np.random.Generator
) -> list[Choice]:
    """Plans that were not measured, to predict: a third random, the others like the best so far.

    Args:
        space: the plans there are.
        count: how many.
        trials: what was measured.
        parents: the best so far.
        rng: where the randomness is from.
    """
    if space.size <= count:
        return [choice for choice in space.all() if choice not in trials]
    pool = list(parents)

    def offspring() -> Choice:
        child = pool[rng.integers(len(pool))]
        if rng.random() < 0.25:
            child = space.cross(child, pool[rng.integers(len(pool))], rng)
        for _ in range(int(rng.geometric(0.5))):
            child = space.neighbour(child, rng)
        return child

    drawn = _distinct(lambda: space.draw(rng), count // 3 if pool else count, trials)
    if pool:
        drawn.update(_distinct(offspring, count - len(drawn), {*trials, *drawn}))
    return list(drawn)


def best_predicted(
    predictor: Predictor,
    choices: list[Choice],
    nbytes: Floats,
    count: int,
    bound: float | None,
    budget: int | None,
    rng: np.random.Generator,
) -> list[Choice]:
    """The plans to measure, of many.

    Args:
        predictor: of their scores.
        choices: the many.
        nbytes: of each.
        count: how many to choose.
        bound: look for the smallest plans that are at least this accurate.
        budget: look for the most accurate plans within these bytes; then there is no bound.
        rng: where the randomness is from.

    Returns:
        Distinct ones of ``choices``, as many as are asked for or there are.
    """
    if not choices:
        return []
    scores = predictor.predict(choices)
    picked: dict[int, None] = {}
    if budget is None:
        assert bound is not None
        smallest_first = np.lexsort((-scores, nbytes))
        # a bound that is full precision's own accuracy can't be predicted to be surpassed
        safe = min(predictor.score(bound) + _MARGINS[0], scores.max())
        for least in safe - (_MARGINS[0] - _MARGINS[1]) * spread(count, rng):
            enough = scores[smallest_first] >= least
            fresh = (int(place) for place in smallest_first[enough] if int(place) not in picked)
            picked.update(dict.fromkeys(islice(fresh, 1)))
        rest = np.lexsort((nbytes, -scores))
    else:
        over = np.maximum(nbytes - budget, 0.0)
        rest = np.lexsort((nbytes, -scores, over))  # within it by score; beyond it those that are nearest to it
    fresh = (int(place) for place in rest if int(place) not in picked)
    picked.update(dict.fromkeys(islice(fresh, count - len(picked))))
    return [choices[place] for place in picked]


def spread(count: int, rng: np.random.Generator) -> Floats:
    """Numbers from 0 to 1, evenly spread, float64 ``[count]``; other ones each time, so that few in many rounds do too.

    Example:
        >>> spread(4, np.random.default_rng(0)).round(2)
        array([0.16, 0.41, 0.66, 0.91])
    """
    return (np.arange(count) + rng.random()) / count


def parents_of(trials: Mapping[Choice, Trial], bound: float | None, budget: int | None) -> list[Choice]:
    """The plans like which the next may be: the best few for the target, and the front.

    Args:
        trials: what was measured.
        bound: the accuracy that is enough.
        budget: the bytes that are allowed; then there is no bound.
    """
    measured = sorted(
        ((choice, trial) for choice, trial in trials.items() if not trial.failed),
        key=lambda pair: (pair[1].nbytes, -pair[1].accuracy),
    )
    if budget is None:
        assert bound is not None
        best = [choice for choice, trial in measured if at_least(trial.accuracy, bound)]
    else:
        within = [(choice, trial) for choice, trial in measured if trial.nbytes <= budget]
        best = [choice for choice, _ in sorted(within, key=lambda pair: -pair[1].accuracy)]
    front, most = [], float("-inf")
    for choice, trial in measured:
        if trial.accuracy > most:
            front.append(choice)
            most = trial.accuracy
    return best[:_PARENTS] * (1 + len(front) // _PARENTS) + front  # about as often one of these as one of those


def _distinct(draw: Callable[[], Choice], count: int, known: Collection[Choice]) -> dict[Choice, None]:
    """What is drawn, each once, in order; fewer than asked for if new ones get too rare."""
    drawn: dict[Choice, None] = {}
    for _ in range(20 * count):
        if len(drawn) >= count:
            break
        if (choice := draw()) not in known:
            drawn[choice] = None
    return drawn
