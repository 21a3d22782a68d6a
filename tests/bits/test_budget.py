"""Budgets: what a user writes, and the best widths under it."""

from collections.abc import Iterable
from itertools import product
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tinykg.bits.budget import Budget, BudgetTooSmall, Option, allocate


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [
        (4096, 4096),
        ("4096", 4096),
        ("512MiB", 512 * 2**20),
        ("512 mib", 512 * 2**20),
        (" 1.5GiB", 3 * 2**29),
        ("2kB", 2000),
        ("10%", 1000),
        (0.25, 2500),
    ],
)
def test_what_a_user_writes(text: Any, bytes_: int) -> None:
    assert Budget.parse(text).bytes_of(raw=10_000) == bytes_


@pytest.mark.parametrize("text", [0, -1, "0", "100%", "many", "12 parsecs", "", True, "1.2.3MiB", float("nan")])
def test_what_is_no_budget(text: Any) -> None:
    with pytest.raises(ValueError, match="budget must be bytes, a text such as '512MiB' or '10%'"):
        Budget.parse(text)


def tensor_options(size: int, sensitivity: float) -> list[Option]:
    rounded = [Option(bits, size * bits, sensitivity / (2**bits - 1) ** 2) for bits in (1, 2, 4, 8)]
    return [*rounded, Option(32, size * 32, 0.0)]


tensors = st.lists(st.tuples(st.integers(1, 1000), st.floats(0.0, 1e6)), min_size=1, max_size=5)


def total_variance(options: Iterable[Option]) -> float:
    return sum(option.variance for option in options)


@given(tensors, st.floats(1.0, 40.0))
@settings(deadline=None)
def test_within_the_budget_and_the_best_there_is(sizes: list[tuple[int, float]], bits: float) -> None:
    options = {number: tensor_options(*size) for number, size in enumerate(sizes)}
    budget = int(bits * sum(size for size, _ in sizes))
    chosen = allocate(options, budget)
    assert sum(option.nbytes for option in chosen.values()) <= budget
    best = min(
        total_variance(choice)
        for choice in product(*options.values())
        if sum(option.nbytes for option in choice) <= budget
    )
    assert total_variance(chosen.values()) <= best * (1 + 1e-8)


features = st.lists(st.tuples(st.integers(500, 1000), st.floats(0.8, 1.2)), min_size=1, max_size=30)
scores = st.lists(st.tuples(st.integers(1, 20), st.floats(10.0, 1e4)), max_size=5)


@given(features, scores, st.integers(0, 4), st.integers(0, 200))
@settings(deadline=None)
def test_never_worse_than_one_width_for_all(
    large: list[tuple[int, float]], small: list[tuple[int, float]], at: int, more: int
) -> None:
    """Where the large ones matter about alike, that is hard to beat in as many bytes."""
    options = {
        number: tensor_options(size, size * sensitivity) for number, (size, sensitivity) in enumerate([*large, *small])
    }
    uniform = [choices[at] for choices in options.values()]
    chosen = allocate(options, sum(option.nbytes for option in uniform) + more)
    assert total_variance(chosen.values()) <= total_variance(uniform) * (1 + 1e-8)


def test_a_few_bytes_for_a_small_tensor_do_not_cost_a_large_one_its_step() -> None:
    """First the small one gets 32 bits, the most variance for each byte; then no large one's 8 bits would fit."""
    options = {"small": tensor_options(10, 10.0), **{number: tensor_options(10_000, 1.0) for number in range(4)}}
    chosen = allocate(options, sum(choices[3].nbytes for choices in options.values()))
    assert {option.bits for option in chosen.values()} == {8}


@given(tensors, st.floats(1.0, 40.0))
@settings(deadline=None)
def test_with_few_choices_held_in_mind_it_misses_at_most_one_step(sizes: list[tuple[int, float]], bits: float) -> None:
    options = {number: tensor_options(*size) for number, size in enumerate(sizes)}
    budget = int(bits * sum(size for size, _ in sizes))
    best = total_variance(allocate(options, budget).values())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_tinykg.bits.budget._MOST", 2)
        chosen = allocate(options, budget)
    assert sum(option.nbytes for option in chosen.values()) <= budget
    largest_step = max(o[i].variance - o[i + 1].variance for o in options.values() for i in range(4))
    assert total_variance(chosen.values()) <= best + largest_step + 1e-9


def test_hundreds_of_tensors_are_chosen_for_within_a_percent_of_the_bound() -> None:
    """The bound is what fractions of widths would reach: the greedy choice up to the first step that does not fit."""
    draw = Random(0)
    options = {number: tensor_options(draw.randint(100, 100_000), 10 ** draw.uniform(0, 6)) for number in range(300)}
    sizes = sum(choices[0].nbytes for choices in options.values())
    price = min(price for price in (10 ** (k / 50) for k in range(-600, 600)) if spent(options, price) <= 6 * sizes)
    bound = total_variance(at_price(options, price)) + price * (spent(options, price) - 6 * sizes)
    chosen = allocate(options, 6 * sizes)
    assert sum(option.nbytes for option in chosen.values()) <= 6 * sizes
    assert total_variance(chosen.values()) <= 1.01 * bound


def at_price(options: dict[int, list[Option]], price: float) -> list[Option]:
    return [min(choices, key=lambda o: o.variance + price * o.nbytes) for choices in options.values()]


def spent(options: dict[int, list[Option]], price: float) -> int:
    return sum(option.nbytes for option in at_price(options, price))


@given(tensors)
@settings(deadline=None)
def test_more_bytes_never_hurt(sizes: list[tuple[int, float]]) -> None:
    options = {number: tensor_options(*size) for number, size in enumerate(sizes)}
    total = sum(size for size, _ in sizes)
    everything = allocate(options, 32 * total)
    assert sum(option.variance for option in everything.values()) == 0
    least = allocate(options, total)
    assert {option.bits for option in least.values()} <= {1, 2, 4, 8, 32}


def test_small_sensitive_tensors_end_up_exact_because_that_is_cheap() -> None:
    options = {"features": tensor_options(10_000, 100.0), "score": tensor_options(10, 100.0)}
    chosen = allocate(options, 25_000)
    assert chosen["score"].bits == 32
    assert chosen["features"].bits == 2


def test_a_tensor_that_does_not_matter_gets_least() -> None:
    options = {"matters": tensor_options(100, 1.0), "does not": tensor_options(100, 0.0)}
    assert allocate(options, 1000)["does not"].bits == 1


def test_options_that_are_worth_nothing_are_never_chosen() -> None:
    options = {"x": [Option(2, 100, 1.0), Option(4, 90, 0.5), Option(8, 200, 0.6), Option(32, 300, 0.0)]}
    assert allocate(options, 250)["x"].bits == 4
    assert allocate(options, 300)["x"].bits == 32


def test_too_small_a_budget_says_what_would_do() -> None:
    options = {"a": tensor_options(100, 1.0), "b": tensor_options(50, 1.0)}
    with pytest.raises(BudgetTooSmall, match="budget must be at least 150 bytes for this step, got 149") as raised:
        allocate(options, 149)
    assert raised.value.least == 150
    assert {option.bits for option in allocate(options, 150).values()} == {1}


@pytest.mark.parametrize("variance", [float("inf"), float("nan")])
@pytest.mark.filterwarnings("error")
def test_a_gradient_that_is_not_finite_still_gets_a_choice_that_fits(variance: float) -> None:
    """As that of the first steps of a run in float16 is: it is measured again later."""
    options = {"bad": tensor_options(100, variance), "good": tensor_options(100, 1.0)}
    assert sum(option.nbytes for option in allocate(options, 1000).values()) <= 1000


def test_the_same_whatever_the_keys_are() -> None:
    """Ranks and runs agree, though keys hash differently."""
    plain = {number: tensor_options(10, 1.0) for number in range(5)}
    named = {f"{9 - number}": tensor_options(10, 1.0) for number in range(5)}
    for budget in range(50, 500, 10):
        assert [o.bits for o in allocate(plain, budget).values()] == [o.bits for o in allocate(named, budget).values()]
