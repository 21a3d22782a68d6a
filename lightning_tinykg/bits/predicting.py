"""From the bits of a plan to its accuracy, learned from a few dozen plans: regression trees of scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_tinykg.bits.space import Choice, SearchSpace

__all__ = ["Model", "ModelMissing", "Predictor", "drop_that_matters", "groups_of"]

Model = Literal["forest", "tree"]
Floats = NDArray[np.float64]


class ModelMissing(ImportError):
    """scikit-learn is asked for, and not installed."""


class Predictor:
    r"""Predicts how far a plan's accuracy is below full precision's.

    What is learned is not the accuracy `a` but

    .. math:: s = -\log(\max(r - a, 0) / t + 1/2)

    with the reference `r` and the drop `t` that matters: most plans that are measured are far below, and the squared
    error of the accuracy itself would be that of telling the bad from the worse.

    Rounding to `b` bits has an error in proportion to :math:`2^{-b}`. A plan's features are that of each entry, its
    mean over entries that share a layer, a component, a topology or two of these, and its mean and its largest over
    all. A tree splits by one feature at a time, and would need many splits to see that all of a layer is narrow.

    Args:
        space: the plans.
        model: ``"forest"`` or ``"tree"``.
        seed: of the trees.

    Raises:
        ModelMissing: if scikit-learn is not installed.

    Example:
        >>> space = SearchSpace({"a": (1, 2, 4, 8), "b": (1, 2, 4, 8)})
        >>> predictor = Predictor(space)
        >>> predictor.fit([(8, 8), (4, 4), (2, 2), (1, 1)], [0.80, 0.79, 0.7, 0.3], reference=0.8, drop=0.01)
        >>> worse, better = predictor.predict([(1, 2), (8, 4)])
        >>> bool(worse < better)
        True
    """

    def __init__(self, space: SearchSpace, model: Model = "forest", seed: int = 0) -> None:
        try:
            from sklearn.ensemble import RandomForestRegressor
            from sklearn.tree import DecisionTreeRegressor
        except ImportError as error:
            raise ModelMissing("scikit-learn is not installed: pip install 'lightning-tinykg[search]'") from error
        self._groups = groups_of(space)
        self._model: Any
        if model == "tree":
            self._model = DecisionTreeRegressor(min_samples_leaf=2, random_state=seed)
        else:
            # one thread: the order of a sum must not depend on how many there are
            self._model = RandomForestRegressor(100, max_features=1 / 3, random_state=seed, n_jobs=1)
        self._reference = self._drop = 0.0

    def fit(self, choices: Sequence[Choice], accuracies: Sequence[float], reference: float, drop: float) -> None:
        """Learn from plans that were measured.

        Args:
            choices: the plans.
            accuracies: of each.
            reference: full precision's accuracy.
            drop: how far below it matters.
        """
        self._reference = reference
        self._drop = drop_that_matters(drop, accuracies)
        self._model.fit(self._features(choices), self.score(np.asarray(accuracies, dtype=np.float64)))

    def score(self, accuracies: Floats | float) -> Floats:
        """What is learned in place of accuracies."""
        below = np.maximum(self._reference - np.asarray(accuracies, dtype=np.float64), 0.0)
        return np.asarray(-np.log(below / self._drop + 0.5))

    def predict(self, choices: Sequence[Choice]) -> Floats:
        """The scores of plans, float64 ``[n]``; more is better."""
        return np.asarray(self._model.predict(self._features(choices)), dtype=np.float64)

    def _features(self, choices: Sequence[Choice]) -> Floats:
        exact = -np.exp2(-np.asarray(choices, dtype=np.float64))
        means = [exact[:, group].mean(axis=1) for group in self._groups]
        return np.column_stack([exact, *means, exact.mean(axis=1), exact.min(axis=1)])


def drop_that_matters(drop: float, accuracies: Sequence[float]) -> float:
    """No less than a hundredth of what there is to tell apart: a tolerance of 0 is one too.

    Example:
        >>> drop_that_matters(0.0, [0.5, 0.75])
        0.0025
    """
    return max(drop, 0.01 * float(np.ptp(accuracies)), 1e-12)


def groups_of(space: SearchSpace) -> list[list[int]]:
    """The entries that share one or two parts of their patterns, for each such part that some but not all share."""
    found: dict[tuple[int, ...], None] = {}
    for axes in (*combinations(range(3), 1), *combinations(range(3), 2)):
        members: dict[tuple[str, ...], list[int]] = {}
        for entry, pattern in enumerate(space.patterns):
            members.setdefault(tuple(pattern[axis] for axis in axes), []).append(entry)
        found.update(dict.fromkeys(tuple(group) for group in members.values()))
    return [list(group) for group in found if 1 < len(group) < len(space.patterns)]
