"""Schedules: pure functions of a counter."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_tinykg.bits.schedule import (
    WIDTHS,
    ConstantBits,
    CosineAnneal,
    LinearAnneal,
    Schedule,
    StepAnneal,
    WarmupThen,
    from_dict,
)

ANNEALS = (LinearAnneal, CosineAnneal)


@given(
    kind=st.sampled_from(ANNEALS),
    start=st.sampled_from(WIDTHS),
    end=st.sampled_from(WIDTHS),
    steps=st.integers(1, 300),
)
def test_an_anneal_goes_from_start_to_end_and_never_back(kind: Any, start: int, end: int, steps: int) -> None:
    schedule = kind(start, end, steps=steps)
    bits = [schedule.bits_at(count) for count in range(steps + 10)]
    assert bits[0] == start
    assert set(bits[steps:]) == {end}
    assert set(bits) <= set(WIDTHS)
    assert bits in (sorted(bits), sorted(bits, reverse=True))


@pytest.mark.parametrize("kind", ANNEALS)
def test_all_widths_between_have_their_turn(kind: Any) -> None:
    schedule = kind(8, 1, steps=1000)
    assert {schedule.bits_at(count) for count in range(1001)} == {8, 4, 2, 1}


def test_cosine_stays_near_its_ends_for_longer() -> None:
    cosine, linear = CosineAnneal(8, 2, steps=1000), LinearAnneal(8, 2, steps=1000)
    for bits in (8, 2):
        assert sum(cosine.bits_at(n) == bits for n in range(1000)) > sum(linear.bits_at(n) == bits for n in range(1000))


SCHEDULES: list[Schedule] = [
    ConstantBits(4),
    StepAnneal({0: 8, 10: 2}),
    StepAnneal({0: 8, 10: 2}, by="epoch"),
    LinearAnneal(8, 1, steps=7),
    CosineAnneal(2, 32, steps=7, by="epoch"),
    WarmupThen(5, 32, CosineAnneal(8, 2, steps=9)),
    WarmupThen(5, 32, 2),
    WarmupThen(5, 32, WarmupThen(5, 8, 4)),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_what_is_written_down_is_what_is_read(schedule: Schedule) -> None:
    again = from_dict(schedule.to_dict())
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert [again.bits_at(n) for n in range(20)] == [schedule.bits_at(n) for n in range(20)]
    assert eval(repr(schedule)) == schedule


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConstantBits(3), "bits must be one of 1, 2, 4, 8, 32, got 3"),
        (lambda: ConstantBits(True), "bits must be one of 1, 2, 4, 8, 32, got True"),
        (lambda: StepAnneal({10: 8}), "0 among them, to widths, got {10: 8}"),
        (lambda: StepAnneal({0: 8, -1: 8}), "counts from 0 on"),
        (lambda: StepAnneal({0: 8, 5: 7}), r"bits\[5\] must be one of 1, 2, 4, 8, 32, got 7"),
        (lambda: LinearAnneal(9, 2, steps=3), "start must be one of"),
        (lambda: CosineAnneal(8, 0, steps=3), "end must be one of"),
        (lambda: CosineAnneal(8, 2, steps=0), "steps must be a whole number of at least 1, got 0"),
        (lambda: LinearAnneal(8, 2, steps=3, by="batch"), "by must be 'step' or 'epoch', got 'batch'"),
        (lambda: WarmupThen(-1, 8, 2), "steps must be a whole number of at least 0, got -1"),
        (lambda: WarmupThen(3, 8, LinearAnneal(8, 2, steps=2, by="epoch")), "then must count by 'step'"),
        (lambda: from_dict({"schedule": "Cosine"}), "schedule must be one of .*CosineAnneal.*, got 'Cosine'"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
