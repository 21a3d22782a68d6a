"""The search for bits, on accuracies that are formulas: what it finds, and that it repeats itself."""

import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_tinykg.bits import BitPlan
from lightning_tinykg.bits.filling import Filling
from lightning_tinykg.bits.front import Front
from lightning_tinykg.bits.measuring import TrialFile
from lightning_tinykg.bits.predicting import ModelMissing
from lightning_tinykg.bits.search import AutoBitSelector, SearchFailed, random_search
from lightning_tinykg.bits.space import Choice, SearchSpace

WIDTHS = (1, 2, 3, 4, 5, 6, 8, 16)
PLACES = [
    (f"convs.{n}", part, f"degree-{b}") for n in range(2) for part in ("attention", "embedding") for b in range(3)
]
SPACE = SearchSpace(dict.fromkeys(PLACES, WIDTHS))


def bits_of(plan: BitPlan) -> Choice:
    return tuple(entry.bits for entry in plan.entries)  # type: ignore[misc]  # no schedules here


@dataclass(frozen=True)
class Landscape:
    """Entries of very different sizes and sensitivities, whose errors add up and multiply; noise of each plan's own."""

    seed: int = 0
    noise: float = 0.0

    def __post_init__(self) -> None:
        rng = np.random.default_rng((17, self.seed))
        count = len(PLACES)
        weights, sizes = np.exp(rng.normal(0, 1.2, (2, count)))
        object.__setattr__(self, "weights", 2 * weights / weights.sum())
        object.__setattr__(self, "sizes", sizes / sizes.sum())
        object.__setattr__(self, "pairs", np.triu(rng.random((count, count)) < 0.2, 1) * 0.3)

    def true(self, plan: BitPlan) -> float:
        error = self.weights * 4.0 ** (1 - np.array(bits_of(plan), dtype=float))
        damage = error.sum() + np.sqrt(error) @ self.pairs @ np.sqrt(error)
        return float(0.2 + 0.6 * math.exp(-damage))

    def __call__(self, plan: BitPlan, repeat: int = 0) -> float:
        rng = np.random.default_rng((self.seed, repeat, *bits_of(plan)))
        return self.true(plan) + self.noise * rng.normal()

    def bytes_of(self, plan: BitPlan) -> int:
        return int(1e6 * (self.sizes * np.array(bits_of(plan))).sum() / 8) + 8 * len(PLACES)


def selector(measure: Any = None, **options: Any) -> AutoBitSelector:
    landscape = measure if isinstance(measure, Landscape) else Landscape()
    small = {"measurements": 16, "rounds": 2, "per_round": 4, "samples": 200, "model": "tree", "progress": False}
    return AutoBitSelector(SPACE, measure or landscape, landscape.bytes_of, **{**small, **options})


def seen(front: Front) -> list[tuple[BitPlan, int, tuple[float, ...], str | None]]:
    """All of a front but the time it took."""
    return [(trial.plan, trial.nbytes, trial.accuracies, trial.error) for trial in front.trials]


# -- what it finds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["forest", "tree"])
def test_smaller_than_the_best_of_one_width(model: Any) -> None:
    shares = []
    for seed in range(2):
        landscape = Landscape(seed)
        search = AutoBitSelector(
            SPACE, landscape, landscape.bytes_of, seed=seed, samples=600, model=model, progress=False
        )
        found = search.run().smallest_within()
        bound = landscape.true(SPACE.plan(SPACE.widest)) - 0.005
        assert landscape.true(found.plan) >= bound
        uniform = [SPACE.plan(choice) for choice in SPACE.uniform()]
        shares.append(found.nbytes / min(landscape.bytes_of(plan) for plan in uniform if landscape.true(plan) >= bound))
    assert np.mean(shares) < 0.9


def test_what_a_part_can_do_without_is_measured_before_anything_is_predicted() -> None:
    """Plans that are narrow where it costs nothing are far smaller than uniform ones, and not to be left to chance."""
    space = SearchSpace({("a", "x"): (1, 8), ("a", "y"): (1, 8), ("b", "x"): (1, 8), ("b", "y"): (1, 2, 8)})
    assert space.screening(most=4) == [(1, 8, 8, 8), (8, 1, 8, 8), (8, 8, 1, 8), (8, 8, 8, 1)]
    assert space.screening(most=3) == [(1, 1, 8, 8), (8, 8, 1, 1)]
    assert space.screening(most=1) == []
    seen: list[tuple[int, ...]] = []

    def measure(plan: BitPlan) -> float:
        seen.append(tuple(entry.bits for entry in plan.entries))  # type: ignore[arg-type]  # no schedules here
        return 0.5

    AutoBitSelector(space, measure, lambda plan: 1, measurements=16, rounds=1, progress=False).run()
    assert set(space.screening(most=5)) <= set(seen[:7])


def test_a_tolerance_of_nothing_still_asks_for_smaller_and_smaller_plans() -> None:
    """Above the reference all accuracies are worth the same, and a search must not stay where it began."""
    space = SearchSpace({("a", str(number)): (1, 2, 3, 4, 6, 8) for number in range(12)})

    def bits_of(plan: BitPlan) -> list[int]:
        return [int(entry.bits) for entry in plan.entries]  # type: ignore[arg-type]  # no schedules here

    def measure(plan: BitPlan) -> float:
        return 0.8 - 0.2 * (min(bits_of(plan)[:2]) < 4)  # two entries need 4 bits, the others nothing

    front = AutoBitSelector(
        space, measure, lambda plan: sum(bits_of(plan)), measurements=40, rounds=4, tolerance=0.0, progress=False
    ).run()
    sizes = [trial.nbytes for trial in front.trials[40:]]
    assert len(set(sizes)) > len(sizes) / 4
    assert front.smallest_within(0).nbytes < 4 * 12  # what all entries take at the width that two of them need


@pytest.mark.parametrize("measurements", [4, 6, 12])
def test_no_plan_is_measured_twice_and_none_more_than_asked_for(measurements: int) -> None:
    """Narrowing what has one width only gives a plan that is known."""
    space = SearchSpace({("a", "x"): (1, 2, 4, 8), ("b", "x"): (8,), ("c", "y"): (1, 2, 4, 8), ("d", "y"): (2, 8)})
    seen: list[Choice] = []

    def measure(plan: BitPlan) -> float:
        seen.append(bits_of(plan))
        return 0.8 - 0.1 / sum(bits_of(plan))

    search = AutoBitSelector(
        space,
        measure,
        lambda plan: sum(bits_of(plan)),
        measurements=measurements,
        rounds=1,
        per_round=3,
        progress=False,
    )
    assert len(search.run().trials) == len(seen) == len(set(seen)) == measurements + 3


@pytest.mark.parametrize("model", ["tree", pytest.param("forest", marks=pytest.mark.slow)])
def test_beats_random_search_at_equal_measurements(model: Any) -> None:
    """Over five landscapes with noise, for either target."""
    sizes, accuracies = [], []
    for seed in range(5):
        landscape = Landscape(seed, noise=0.001)
        common: dict[str, Any] = {"seed": seed, "progress": False}
        abs_options = {"measurements": 40, "rounds": 4, "per_round": 10, "samples": 600, "model": model, **common}
        blind = random_search(SPACE, landscape, landscape.bytes_of, measurements=80, **common)
        guided = AutoBitSelector(SPACE, landscape, landscape.bytes_of, **abs_options).run()
        assert len(guided.trials) == len(blind.trials) == 80
        sizes.append(math.log(guided.smallest_within().nbytes / blind.smallest_within().nbytes))
        within = AutoBitSelector(SPACE, landscape, landscape.bytes_of, budget="15%", **abs_options).run()
        best = within.best_within("15%")
        assert best.nbytes <= 0.15 * within.full_bytes
        accuracies.append(landscape.true(best.plan) - landscape.true(blind.best_within("15%").plan))
    assert np.mean(sizes) < 0
    assert np.mean(accuracies) > 0


def test_within_a_budget_the_fit_is_made_at_the_drop_that_can_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at that of the best plan so far, which is far off to begin with: all good plans would be alike to it."""
    landscape, used = Landscape(), list[float]()
    fit = Filling.fit

    def noted(self: Filling, choices: Any, accuracies: Any, reference: float, drop: float) -> None:
        used.append(drop)
        fit(self, choices, accuracies, reference, drop)

    monkeypatch.setattr(Filling, "fit", noted)
    front = selector(landscape, budget="25%", measurements=40, rounds=1).run()
    first = [trial for trial in front.trials[:40] if trial.nbytes <= 0.25 * front.full_bytes]
    assert 0 < used[-1] < 0.5 * (front.reference - max(trial.accuracy for trial in first))


def test_a_small_space_is_measured_whole_and_its_front_is_right() -> None:
    space = SearchSpace(dict.fromkeys(("a", "b", "c"), (1, 2, 4)))

    def accuracy(plan: BitPlan) -> float:
        a, b, c = bits_of(plan)
        return round(1 - 0.3 / a**2 - 0.1 / b**2 - 0.02 / (b * c), 2)  # rounded, so that some are equal

    def bytes_of(plan: BitPlan) -> int:
        a, b, c = bits_of(plan)
        return 5 * a + 5 * b + c

    front = AutoBitSelector(space, accuracy, bytes_of, progress=False, measurements=10, per_round=5).run()
    assert {bits_of(trial.plan) for trial in front.trials} == set(space.all())
    assert len(front.trials) == space.size
    everything = [(bytes_of(plan), accuracy(plan)) for plan in map(space.plan, space.all())]
    undominated = {
        (size, value)
        for size, value in everything
        if not any(s <= size and v >= value and (s, v) != (size, value) for s, v in everything)
    }
    assert [(point.nbytes, point.accuracy) for point in front.points] == sorted(undominated)
    best = max(value for size, value in everything if size <= 30)
    assert front.best_within(30).accuracy == best
    reference = accuracy(space.plan(space.widest))
    assert front.smallest_within(0.05).nbytes == min(s for s, v in everything if v >= reference - 0.05 - 1e-9)


def test_one_entry() -> None:
    space = SearchSpace({"a": (2, 4, 8)})
    front = AutoBitSelector(space, lambda plan: 1.0, lambda plan: bits_of(plan)[0], progress=False).run()
    assert [trial.nbytes for trial in front.trials] == [8, 4, 2]
    assert front.smallest_within().nbytes == 2


@pytest.mark.parametrize("tolerance", [0.0, 0.005, "0.5%"])
def test_no_plan_but_the_widest_is_accurate_enough(tolerance: Any) -> None:
    widest = SPACE.plan(SPACE.widest)
    front = selector(lambda plan: 0.9 if plan == widest else 0.1, tolerance=tolerance).run()
    assert front.smallest_within().plan == widest


# -- it repeats itself -----------------------------------------------------------------------------------------------


class Interrupted:
    """A landscape that is interrupted at its n-th plan, and counts."""

    def __init__(self, at: float = math.inf) -> None:
        self.calls, self.at = 0, at

    def __call__(self, plan: BitPlan) -> float:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return Landscape(noise=0.01)(plan)


def test_the_same_seed_the_same_plans() -> None:
    assert seen(selector().run()) == seen(selector().run())
    assert seen(selector(seed=1).run()) != seen(selector().run())


@pytest.mark.parametrize("at", [1, 5, 18, 24])
def test_going_on_after_an_interruption_is_as_if_there_were_none(tmp_path: Path, at: int) -> None:
    path = tmp_path / "runs" / "abs.jsonl"
    with pytest.raises(KeyboardInterrupt):
        selector(Interrupted(at), path=path).run()
    with path.open("a") as file:
        file.write('{"plan": {"default": 32, "ent')  # cut off while it was written
    rest = Interrupted()
    resumed = selector(rest, path=path).run()
    assert rest.calls == 24 - (at - 1)
    assert seen(resumed) == seen(selector(Interrupted()).run())
    nothing = Interrupted(1)
    assert seen(selector(nothing, path=path).run()) == seen(resumed)
    assert nothing.calls == 0


def test_a_finished_search_goes_on_with_more_rounds(tmp_path: Path) -> None:
    path = tmp_path / "abs.jsonl"
    selector(Interrupted(), path=path).run()
    more = Interrupted()
    longer = selector(more, path=path, rounds=4).run()
    assert more.calls == 8
    assert seen(longer) == seen(selector(Interrupted(), rounds=4).run())


def test_repeats_are_told_apart_and_averaged() -> None:
    landscape = Landscape(noise=0.01)
    front = selector(landscape, repeats=3, measurements=8, rounds=0).run()
    for measured in front.trials:
        assert measured.accuracies == tuple(landscape(measured.plan, repeat) for repeat in range(3))
        assert measured.accuracy == pytest.approx(np.mean(measured.accuracies), rel=1e-12)


def test_workers_change_nothing(tmp_path: Path) -> None:
    options = {"repeats": 2, "measurements": 10, "rounds": 1}
    landscape = Landscape(noise=0.01)
    side_by_side = selector(landscape, workers=2, path=tmp_path / "abs.jsonl", **options).run()
    assert seen(side_by_side) == seen(selector(landscape, **options).run())
    assert seen(selector(landscape, path=tmp_path / "abs.jsonl", **options).run()) == seen(side_by_side)


# -- failures --------------------------------------------------------------------------------------------------------


def dies_at_one_bit(plan: BitPlan) -> float:
    if set(bits_of(plan)) == {1}:
        os._exit(3)
    return Landscape()(plan)


def test_a_worker_that_dies_costs_its_plan_only() -> None:
    front = selector(dies_at_one_bit, workers=2, measurements=8, rounds=0).run()
    (failure,) = front.failures
    assert set(bits_of(failure.plan)) == {1}
    assert failure.error is not None
    assert "the process died" in failure.error
    assert len(front.trials) == 8


@pytest.mark.parametrize("bad", [math.nan, math.inf, "raise"])
def test_failures_are_kept_and_the_search_goes_on(tmp_path: Path, bad: Any) -> None:
    def measure(plan: BitPlan) -> float:
        if 1 in bits_of(plan):
            if bad == "raise":
                raise FloatingPointError("the loss is gone")
            return float(bad)
        return Landscape()(plan)

    front = selector(measure, path=tmp_path / "abs.jsonl").run()
    assert len(front.trials) == 24
    assert {1 in bits_of(trial.plan) for trial in front.failures} == {True}
    assert not any(1 in bits_of(plan) for plan in front.plans)
    expected = "FloatingPointError: the loss is gone" if bad == "raise" else "accuracy must be finite"
    assert all(expected in str(trial.error) for trial in front.failures)
    assert f"{len(front.failures)} could not be measured" in str(front)
    again = selector(Interrupted(1), path=tmp_path / "abs.jsonl").run()  # failures are results too
    assert seen(again) == seen(front)


def test_when_all_fail_it_says_why() -> None:
    def measure(plan: BitPlan) -> float:
        raise RuntimeError("no such file: cora")

    with pytest.raises(SearchFailed, match=r"none of 8 plans .* no such file: cora"):
        selector(measure, reference=0.8).run()


def test_without_full_precision_there_is_no_reference() -> None:
    def measure(plan: BitPlan) -> float:
        return math.nan if 16 in bits_of(plan) else 0.8

    with pytest.raises(SearchFailed, match=r"the widest plan, .* or give reference"):
        selector(measure).run()
    assert selector(measure, reference=0.8).run().smallest_within().accuracy == 0.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measurements": 0}, "measurements must be a whole number of at least 1, got 0"),
        ({"rounds": -1}, "rounds must be a whole number of at least 0, got -1"),
        ({"per_round": 2.5}, "per_round must be a whole number of at least 1, got 2.5"),
        ({"workers": 0}, "workers must be a whole number of at least 1, got 0"),
        ({"model": "net"}, "model must be one of forest, tree, got 'net'"),
        ({"tolerance": -0.1}, "tolerance must be a number .*, at least 0, .* got -0.1"),
        ({"tolerance": "0.005"}, "tolerance must be .* got '0.005'"),
        ({"budget": "much"}, "budget must be bytes"),
        ({"budget": 10}, "budget must be at least .* bytes, the narrowest plan's, got 10"),
        ({"measure": lambda plan: 1.0, "repeats": 2}, "measure must take a plan and `repeat` with repeats=2"),
        ({"measure": lambda: 1.0}, "measure must take a plan with repeats=1"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selector(**options)


def test_workers_need_what_can_be_pickled() -> None:
    with pytest.raises(TypeError, match="measure must be picklable for workers=2"):
        selector(lambda plan: 1.0, workers=2)


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    with pytest.raises(ModelMissing, match=r"pip install 'lightning-tinykg\[search\]'"):
        selector()
    assert selector(rounds=0).run().points  # random search predicts nothing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed 0 and not 1"),
        ({"name": "gat"}, "name '' and not 'gat'"),
        ({"space": SearchSpace(dict.fromkeys(PLACES, (1, 16)))}, "entries"),
        ({"bytes_of": lambda plan: 7}, "full_bytes"),
    ],
)
def test_the_file_of_another_search_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {
        "space": SPACE, "measure": Landscape(), "bytes_of": Landscape().bytes_of, "measurements": 8, "rounds": 0,
        "path": tmp_path / "abs.jsonl", "progress": False,
    }  # fmt: skip
    AutoBitSelector(**options).run()
    before = options["path"].read_text()
    with pytest.raises(ValueError, match=f"path must be a new file or one of this search, got .*{message}"):
        AutoBitSelector(**{**options, **change})
    assert options["path"].read_text() == before


def test_files_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    for text in ("a note\n", "a note", '{"plan": 1}', '{"search": 3}\n', "[]\n"):
        other.write_text(text)
        with pytest.raises(ValueError, match=r"notes.txt is no file of a search"):
            TrialFile(other, {"seed": 0})
        assert other.read_text() == text
    other.write_text(json.dumps({"search": {"seed": 0}}) + '\n{"plan": 3}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*notes.txt is no trial"):
        TrialFile(other, {"seed": 0})


# -- the logger ------------------------------------------------------------------------------------------------------


class Recorder:
    """What Lightning's WandbLogger takes."""

    def __init__(self) -> None:
        self.steps: list[tuple[int | None, dict[str, float]]] = []
        self.tables: dict[str, Any] = {}
        self.images: list[str] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.steps.append((step, metrics))

    def log_table(self, key: str, columns: list[str], data: list[Any]) -> None:
        self.tables[key] = (columns, data)

    def log_image(self, key: str, images: list[Any]) -> None:
        self.images.append(key)


def test_each_measurement_is_logged(tmp_path: Path) -> None:
    logger = Recorder()

    def fail(plan: BitPlan) -> float:
        return math.nan if set(bits_of(plan)) == {1} else Landscape()(plan)

    front = selector(fail, logger=logger).run()
    assert [step for step, _ in logger.steps] == list(range(24))
    for (_, metrics), measured in zip(logger.steps, front.trials, strict=True):
        assert metrics["abs/bytes"] == measured.nbytes
        assert metrics["abs/average_bits"] == np.mean(bits_of(measured.plan))
        assert metrics["abs/failed"] == measured.failed
        assert metrics.get("abs/accuracy") == (None if measured.failed else measured.accuracy)
    on_front = {front.trials[step or 0] for step, metrics in logger.steps if metrics.get("abs/on_front")}
    assert on_front >= set(front.points)
    columns, data = logger.tables["abs/front"]
    assert [row[columns.index("bytes")] for row in data] == [point.nbytes for point in front.points]
    assert logger.images == ["abs/front_plot"]
