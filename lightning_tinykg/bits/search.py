"""``AutoBitSelector``: bits chosen by measuring a few plans and predicting thousands.

The loop is the automatic bit selection (ABS) of SGQuant (Feng et al., arXiv 2007.05100): measure some plans, fit
regression trees from a plan to its accuracy, predict the accuracy of many more, measure the smallest of those that are
predicted to be accurate enough, and so on for some rounds. Half of those that are measured in a round are not picked
among many: they are the smallest that there can be if what each entry costs adds up (``filling.py``).

It asks for two functions and knows nothing else of what is quantized, so it serves plans of any kind:

- SGQuant: the patterns are ``quantizer.places()``; ``measure`` evaluates under ``quantizer.set_plan(plan)``;
  ``bytes_of`` is ``quantizer.memory(plan).packed_bytes``. Where validation labels are few,
  :class:`~lightning_tinykg.bits.expected.ExpectedAccuracy` tells plans apart that they can't.
- TinyKG: the patterns are modules; ``measure`` is minus the error of the gradient of a step, or what a short training
  reaches on validation data, under ``compress_activations(bits=plan)``; ``bytes_of`` is the ``ledger.stored_bytes`` of
  one forward under it. That does run the model, so ``samples`` should be few.
- HQ-GNN: the patterns are ``"users"`` and ``"items"``; ``measure`` sets ``user_quantizer.bits`` and
  ``item_quantizer.bits`` of an ``HQGNN(encoder, estimator="ptq", quantize_users=True)`` and validates it; ``bytes_of``
  is the sum of both quantizers' ``table_bytes``.

``tests/bits/test_search_uses.py`` has each of them in a few lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, get_args

import numpy as np
from rich.console import Console
from rich.progress import Progress

from lightning_tinykg.arguments import check_choice, check_whole
from lightning_tinykg.bits.budget import Budget
from lightning_tinykg.bits.filling import Filling
from lightning_tinykg.bits.front import Front, Trial, allowed_drop
from lightning_tinykg.bits.measuring import Measure, Measurer, TrialFile
from lightning_tinykg.bits.plan import BitPlan
from lightning_tinykg.bits.predicting import Model, Predictor, drop_that_matters
from lightning_tinykg.bits.proposing import best_predicted, candidates, parents_of, random_choices, spread
from lightning_tinykg.bits.space import Choice, SearchSpace

__all__ = ["AutoBitSelector", "SearchFailed", "random_search"]


class SearchFailed(RuntimeError):
    """No plan could be measured, or not the one that gives the reference."""


class SearchLogger(Protocol):
    """What a search asks of a logger, as Lightning's are; one with ``log_table`` and ``log_image`` gets those too."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Take some numbers."""


class AutoBitSelector:
    """The least bits that keep the accuracy, or the best accuracy within some bytes.

    The first ``measurements`` are one width everywhere, for each width; one layer, component or the like at its
    narrowest and all else at its widest, for each; and random plans. Then come ``rounds`` times
    ``per_round`` plans that are chosen by prediction. The same arguments and a ``measure`` that repeats itself give
    the same plans, with any number of workers and after any interruption.

    **Logged metrics**, of each plan measured, if there is a logger: ``abs/accuracy``, ``abs/bytes``,
    ``abs/average_bits``, ``abs/on_front`` (1 if no plan until then beats it), ``abs/failed``. At the end
    the table ``abs/front`` and the image ``abs/front_plot``, if the logger takes such.

    Args:
        space: the plans there are.
        measure: from a plan to its accuracy, more is better. **On validation data**: what is chosen on test data says
            nothing about other data.
        bytes_of: from a plan to its bytes; called for each of ``samples`` plans, so it should not run the model.
        measurements: how many plans are measured before the first prediction. The plans of one width are among them.
        rounds: how often plans are chosen by prediction; 0 is random search.
        per_round: how many of them are measured. Many rounds of few find more than few of many, as long as there are as
            many as ``workers``.
        samples: how many plans are predicted.
        seed: of all that is random here.
        tolerance: how far below full precision's the accuracy may be: a number in the accuracy's unit, or a text such
            as ``"0.5%"``, of full precision's. The smallest plan within it is looked for.
        budget: look for the most accurate plan within these bytes instead: a number, a text such as ``"2MiB"`` or
            ``"10%"``, or a fraction of the widest plan's.
        reference: full precision's accuracy. None: that of the widest plan.
        model: what predicts: ``"forest"``, or ``"tree"``, the paper's.
        repeats: how often each plan is measured, for the mean. ``measure`` is then given ``repeat=0``, 1, ... to seed
            its randomness with.
        workers: how many processes measure. Then ``measure`` has to be picklable, and should itself keep to its share
            of the cores (``torch.set_num_threads``). A script guards what it runs by ``if __name__ == "__main__":``.
        path: a file (JSON lines) to which each measurement is written at once. What it holds is not measured again, so
            a search that was interrupted goes on where it stopped, and one that is finished goes on with more rounds.
        name: what is measured, such as ``"gat on cora"``: a file of another name is refused.
        logger: one of Lightning's loggers.
        progress: whether to show a progress bar.

    Raises:
        ValueError: if an argument has a value that it can't have, or the file is that of another search.
        TypeError: if there are workers and ``measure`` can't be pickled.
        ModelMissing: if scikit-learn is not installed.

    Example:
        >>> space = SearchSpace({"features": (1, 2, 4, 8), "head": (1, 2, 4, 8)})
        >>> def bytes_of(plan):
        ...     return 1000 * plan.bits_for("features") + 10 * plan.bits_for("head")
        >>> def accuracy(plan):
        ...     return 0.9 - 0.1 * 4.0 ** -plan.bits_for("features") - 0.8 * 4.0 ** -plan.bits_for("head")
        >>> front = AutoBitSelector(space, accuracy, bytes_of, measurements=6, rounds=2, per_round=4).run()
        >>> front.smallest_within(0.01).plan
        BitPlan({('features', '*', '*'): 2, ('head', '*', '*'): 4}, default=32)
    """

    def __init__(
        self,
        space: SearchSpace,
        measure: Measure,
        bytes_of: Callable[[BitPlan], int],
        *,
        measurements: int = 40,
        rounds: int = 8,
        per_round: int = 5,
        samples: int = 2000,
        seed: int = 0,
        tolerance: float | str = 0.005,
        budget: int | float | str | None = None,
        reference: float | None = None,
        model: Model = "forest",
        repeats: int = 1,
        workers: int = 1,
        path: str | Path | None = None,
        name: str = "",
        logger: SearchLogger | None = None,
        progress: bool = True,
    ) -> None:
        for argument, value, least in (
            ("measurements", measurements, 1),
            ("rounds", rounds, 0),
            ("per_round", per_round, 1),
            ("samples", samples, 1),
            ("seed", seed, 0),
        ):
            check_whole(argument, value, least)
        check_choice("model", model, get_args(Model))
        allowed_drop(tolerance, 1.0 if reference is None else reference)
        self.space = space
        self.bytes_of = bytes_of
        self.measurements = measurements
        self.rounds = rounds
        self.per_round = per_round
        self.samples = samples
        self.seed = seed
        self.tolerance = tolerance
        self.reference = reference
        self.model = model
        self.logger = logger
        self.progress = progress
        self._measurer = Measurer(measure, repeats, workers)
        self._predictor = Predictor(space, model, seed) if rounds else None
        self._bytes: dict[Choice, int] = {}
        # where the bytes are too dear to be asked for that often, trees alone choose
        fills = bool(rounds) and Filling.calls_of(space) <= samples
        self._filling = Filling(space, self._bytes_of, samples) if fills else None
        self.full_bytes = self._bytes_of(space.widest)
        self.budget = None if budget is None else Budget.parse(budget).bytes_of(self.full_bytes)
        least_bytes = self._bytes_of(tuple(widths[0] for widths in space.widths))
        if self.budget is not None and self.budget < least_bytes:
            raise ValueError(f"budget must be at least {least_bytes} bytes, the narrowest plan's, got {budget!r}")
        search = {"name": name, "seed": seed, "repeats": repeats, "full_bytes": self.full_bytes, **space.to_dict()}
        self._file = None if path is None else TrialFile(path, search)

    def run(self) -> Front:
        """Search.

        Returns:
            All that was measured, and the front of it.

        Raises:
            SearchFailed: if nothing could be measured, or no reference is given and the widest plan could not be.
        """
        total = min(self.measurements + self.rounds * self.per_round, self.space.size)
        trials: dict[Choice, Trial] = {}
        with self._measurer, Progress(console=Console(stderr=True), disable=not self.progress) as bar:
            task = bar.add_task("plans measured", total=total)
            for choices in self._batches(trials):
                for choice, trial in self._measured(choices, lambda: bar.advance(task)):
                    self._log(trial, trials)
                    trials[choice] = trial
                if all(trial.failed for trial in trials.values()):
                    first = next(iter(trials.values()))
                    raise SearchFailed(f"none of {len(trials)} plans could be measured, the first: {first.error}")
        front = Front(tuple(trials.values()), self._reference_of(trials), self.full_bytes, self.tolerance)
        _send(self.logger, front)
        return front

    def _batches(self, trials: dict[Choice, Trial]) -> Iterator[list[Choice]]:
        """What to measure next, given what has been measured when it is asked for."""
        yield self.space.uniform()[: self.measurements]
        self._reference_of(trials)  # before the random ones are measured for nothing
        if self.rounds:  # there will be something that learns from it
            most = min(self.measurements // 3, self.measurements - len(trials))
            yield [choice for choice in self.space.screening(most) if choice not in trials]
        yield random_choices(self.space, self.measurements - len(trials), trials, np.random.default_rng(self.seed))
        for number in range(self.rounds):
            yield self._chosen(trials, np.random.default_rng((self.seed, number)))

    def _chosen(self, trials: dict[Choice, Trial], rng: np.random.Generator) -> list[Choice]:
        """The plans of a round, by prediction."""
        assert self._predictor is not None  # there are rounds
        reference = self._reference_of(trials)
        measured = [trial for trial in trials.values() if not trial.failed]
        # a plan that fails, as those do whose loss is NaN, is to be kept away from
        worst = min(trial.accuracy for trial in measured)
        accuracies = [worst if trial.failed else trial.accuracy for trial in trials.values()]
        drop = self._drop_of(trials, accuracies, reference)
        bound = reference - drop if self.budget is None else None
        self._predictor.fit(list(trials), accuracies, reference, drop)
        parents = parents_of(trials, bound, self.budget)
        choices = candidates(self.space, self.samples, trials, parents, rng)
        filled: list[Choice] = []
        if self._filling is not None:
            self._filling.fit(list(trials), accuracies, reference, drop)
            filled = self._filled(self._filling, drop_that_matters(drop, accuracies), trials, rng)
        choices = [choice for choice in choices if choice not in filled]
        nbytes = np.array([self._bytes_of(choice) for choice in choices], dtype=np.float64)
        rest = self.per_round - len(filled)
        return filled + best_predicted(self._predictor, choices, nbytes, rest, bound, self.budget, rng)

    def _drop_of(self, trials: dict[Choice, Trial], accuracies: list[float], reference: float) -> float:
        """How far below the reference the plans are that matter.

        Within a budget that is not known. The best that was measured may be far off to begin with, and what is
        fitted with such a drop can't tell good plans apart; so it is what the fit itself says can be reached.
        """
        if self.budget is None:
            return allowed_drop(self.tolerance, reference)
        within = [trial.accuracy for trial in trials.values() if not trial.failed and trial.nbytes <= self.budget]
        drops = [max(reference - max(within or [min(accuracies)]), 0.0)]
        if self._filling is not None:
            self._filling.fit(list(trials), accuracies, reference, 0.0)
            drops += map(float, self._filling.drops(self._filling.best_within(self.budget, 1, ())))
        return min(drops)

    def _filled(
        self, filling: Filling, drop: float, trials: dict[Choice, Trial], rng: np.random.Generator
    ) -> list[Choice]:
        """Half of the plans of a round: those that are best if costs add up, some of them more daring than others."""
        count = (self.per_round + 1) // 2
        filled: list[Choice] = []
        if self.budget is not None:
            filled = filling.best_within(self.budget, (count + 1) // 2, trials)
            count -= len(filled)  # the others are not held to it: what bits cost shows where they are gone without
        drops = drop * np.exp2(2 * spread(count, rng) - 1)
        return filled + filling.smallest(list(drops), {*trials, *filled})

    def _measured(self, choices: list[Choice], advance: Callable[[], None]) -> Iterator[tuple[Choice, Trial]]:
        """The trials of some choices, in their order, though with workers they come in any."""
        plans = [self.space.plan(choice) for choice in choices]
        kept = [self._file.get(plan) if self._file is not None else None for plan in plans]
        missing = [number for number, trial in enumerate(kept) if trial is None]
        outcomes = self._measurer([plans[number] for number in missing])
        for number, choice in enumerate(choices):
            while (trial := kept[number]) is None:
                position, outcome = next(outcomes)
                at = missing[position]
                bits = sum(choices[at]) / len(choices[at])
                fresh = kept[at] = Trial(plans[at], self._bytes_of(choices[at]), bits, *outcome)
                if self._file is not None:
                    self._file.add(fresh)
            advance()
            yield choice, trial

    def _reference_of(self, trials: dict[Choice, Trial]) -> float:
        if self.reference is not None:
            return self.reference
        widest = trials[self.space.widest]
        if widest.failed:
            raise SearchFailed(
                f"the widest plan, whose accuracy is the reference, could not be measured ({widest.error}): mend that, "
                "or give reference"
            )
        return widest.accuracy

    def _bytes_of(self, choice: Choice) -> int:
        if choice not in self._bytes:
            self._bytes[choice] = int(self.bytes_of(self.space.plan(choice)))
        return self._bytes[choice]

    def _log(self, trial: Trial, before: dict[Choice, Trial]) -> None:
        if self.logger is None:
            return
        metrics: dict[str, float] = {
            "abs/bytes": trial.nbytes,
            "abs/average_bits": trial.average_bits,
            "abs/failed": int(trial.failed),
        }
        if not trial.failed:
            beaten = any(t.nbytes <= trial.nbytes and t.accuracy >= trial.accuracy for t in before.values())
            metrics |= {"abs/accuracy": trial.accuracy, "abs/on_front": int(not beaten)}
        self.logger.log_metrics(metrics, step=len(before))


def random_search(
    space: SearchSpace,
    measure: Measure,
    bytes_of: Callable[[BitPlan], int],
    *,
    measurements: int = 80,
    **options: Any,
) -> Front:
    """The baseline: one width everywhere and random plans, nothing predicted.

    Args:
        space: the plans there are.
        measure: from a plan to its accuracy.
        bytes_of: from a plan to its bytes.
        measurements: how many plans are measured.
        options: further ones of :class:`AutoBitSelector`.

    Example:
        >>> space = SearchSpace({"features": (1, 2, 4, 8)})
        >>> front = random_search(space, lambda plan: 1.0, lambda plan: plan.bits_for("features"), measurements=4)
        >>> front.smallest_within(0).nbytes
        1
    """
    return AutoBitSelector(space, measure, bytes_of, measurements=measurements, rounds=0, **options).run()


def _send(logger: Any, front: Front) -> None:
    """The front as a table and as a plot, to a logger that takes them."""
    rows = front.rows()
    if hasattr(logger, "log_table"):
        logger.log_table("abs/front", columns=list(rows[0]), data=[list(row.values()) for row in rows])
    if hasattr(logger, "log_image"):
        logger.log_image("abs/front_plot", [front.plot()])
