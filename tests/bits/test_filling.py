"""Plans that are best if costs add up: against all plans there are, and what they are worth to a search."""

from itertools import product
from typing import Any

import numpy as np
import pytest
from test_search import SPACE, Landscape

from lightning_tinykg.bits import BitPlan
from lightning_tinykg.bits.filling import Filling
from lightning_tinykg.bits.search import AutoBitSelector
from lightning_tinykg.bits.space import Choice, SearchSpace

WIDTHS = (1, 2, 4, 8)
SMALL = SearchSpace(
    {("a", "x"): WIDTHS, ("a", "y"): WIDTHS, ("b", "x"): WIDTHS, ("b", "y"): WIDTHS, ("c", "x"): (2, 4)}
)
COSTS, SIZES = np.array([0.3, 0.02, 1.0, 0.1, 0.05]), np.array([10, 400, 50, 20, 300])


def drop_of(choice: Choice) -> float:
    return float(COSTS @ 4.0 ** -np.array(choice, dtype=float))


def bytes_of(choice: Choice) -> int:
    # plans of different widths have an order of the nodes besides
    return int(SIZES @ np.array(choice)) + (100 if len(set(choice)) > 1 else 0)


def fitted(choices: list[Choice]) -> Filling:
    filling = Filling(SMALL, bytes_of)
    filling.fit(choices, [0.9 - drop_of(choice) for choice in choices], reference=0.9, drop=0.01)
    return filling


MEASURED = [*SMALL.uniform(), *SMALL.screening(most=5), *[SMALL.draw(np.random.default_rng(n)) for n in range(8)]]


def test_of_costs_that_add_up_a_few_plans_tell_them_all() -> None:
    everything = list(product(*SMALL.widths))
    predicted = fitted(MEASURED).drops(everything)
    assert np.allclose(predicted, [drop_of(choice) for choice in everything], rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("drop", [0.002, 0.01, 0.05, 0.2])
def test_the_smallest_plan_is_nearly_the_smallest_of_all_there_are(drop: float) -> None:
    (found,) = fitted(MEASURED).smallest([drop], known=())
    assert drop_of(found) < 1.1 * drop
    enough = [choice for choice in product(*SMALL.widths) if drop_of(choice) <= drop]
    assert bytes_of(found) <= 1.1 * min(map(bytes_of, enough))


@pytest.mark.parametrize("budget", [1300, 1500, 2000, 3000, 4500])
def test_the_best_plan_within_some_bytes_is_nearly_the_best_of_all_there_are(budget: int) -> None:
    best, *others = fitted(MEASURED).best_within(budget, count=3, known=())
    within = [choice for choice in product(*SMALL.widths) if bytes_of(choice) <= budget]
    assert bytes_of(best) <= budget
    assert drop_of(best) <= 1.2 * min(map(drop_of, within))
    assert len({best, *others}) == 3


def test_what_is_known_is_not_given_again_and_nothing_twice() -> None:
    filling = fitted(MEASURED)
    first = filling.smallest([0.01, 0.01, 0.05], known=())
    again = filling.smallest([0.01, 0.01, 0.05], known=set(first))
    assert len(set(first)) == len(first)
    assert not set(first) & set(again)


def test_an_entry_that_cost_nothing_is_tried_at_its_narrowest() -> None:
    space = SearchSpace({"a": WIDTHS, "b": WIDTHS})
    filling = Filling(space, lambda choice: 10 * sum(choice))
    filling.fit([(8, 8), (1, 8), (8, 1)], [0.9, 0.9, 0.5], reference=0.9, drop=0.01)
    (found,) = filling.smallest([0.01], known=())
    assert found[0] == 1
    assert found[1] >= 4


def test_a_search_whose_bytes_never_change_goes_on() -> None:
    filling = Filling(SMALL, lambda choice: 100)
    filling.fit(MEASURED, [0.9 - drop_of(choice) for choice in MEASURED], reference=0.9, drop=0.01)
    assert filling.smallest([0.01], known=())


@pytest.mark.parametrize("budget", [None, 0.5])
def test_a_search_asks_for_bytes_no_more_often_than_it_may(budget: float | None) -> None:
    """Where they are those of a forward, few samples are allowed."""
    asked: list[BitPlan] = []

    def bytes_of_plan(plan: BitPlan) -> int:
        asked.append(plan)
        return 1000 * sum(entry.bits for entry in plan.entries)  # type: ignore[misc]  # no schedules here

    def found(samples: int) -> int:
        asked.clear()
        options: dict[str, Any] = {"measurements": 8, "rounds": 2, "per_round": 4, "progress": False}
        AutoBitSelector(SMALL, lambda plan: 0.5, bytes_of_plan, samples=samples, budget=budget, **options).run()
        return len(asked)

    assert found(samples=10) < 8 + 2 * (4 + 10) + 10
    assert found(samples=40) < 8 + 2 * (4 + 3 * 40) + 40


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, 0.005])
def test_a_search_that_fills_loses_less_in_about_as_many_bytes(monkeypatch: pytest.MonkeyPatch, noise: float) -> None:
    """Of formulas, at equal measurements, in the mean of six."""

    def found(seed: int) -> tuple[int, float]:
        landscape = Landscape(seed, noise)
        options: dict[str, Any] = {"measurements": 30, "rounds": 4, "per_round": 8, "tolerance": 0.005}
        options |= {"reference": 0.8, "seed": seed, "progress": False}
        smallest = AutoBitSelector(SPACE, landscape, landscape.bytes_of, **options).run().smallest_within(0.005)
        return smallest.nbytes, 0.8 - landscape.true(smallest.plan)

    filled = np.mean([found(seed) for seed in range(6)], axis=0)
    monkeypatch.setattr(AutoBitSelector, "_filled", lambda self, *given: [])
    crept = np.mean([found(seed) for seed in range(6)], axis=0)
    assert filled[0] < 1.03 * crept[0]
    assert filled[1] < 0.9 * crept[1]
