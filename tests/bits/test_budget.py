"""Budgets: what a user writes, and the best widths under it."""

from itertools import product
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


@given(tensors, st.floats(1.0, 40.0))
@settings(deadline=None)
def test_within_the_budget_and_near_the_best(sizes: list[tuple[int, float]], bits: float) -> None:
    options = {number: tensor_options(*size) for number, size in enumerate(sizes)}
    budget = int(bits * sum(size for size, _ in sizes))
    chosen = allocate(options, budget)
    assert sum(option.nbytes for option in chosen.values()) <= budget
    variance = sum(option.variance for option in chosen.values())
    best = min(
        sum(option.variance for option in choice)
        for choice in product(*options.values())
        if sum(option.nbytes for option in choice) <= budget
    )
    # what the greedy choice may miss is one step of one tensor
    largest_step = max(o[i].variance - o[i + 1].variance for o in options.values() for i in range(4))
    assert variance <= best + largest_step + 1e-9


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


def test_the_same_whatever_the_keys_are() -> None:
    """Ranks and runs agree, though keys hash differently."""
    plain = {number: tensor_options(10, 1.0) for number in range(5)}
    named = {f"{9 - number}": tensor_options(10, 1.0) for number in range(5)}
    for budget in range(50, 500, 10):
        assert [o.bits for o in allocate(plain, budget).values()] == [o.bits for o in allocate(named, budget).values()]
