"""What a search found: the front, the plan for a tolerance or a budget, and how it is shown and kept."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_tinykg.bits import BitPlan
from lightning_tinykg.bits.front import Front, NothingWithin, Trial, allowed_drop


def trial(nbytes: int, accuracy: float) -> Trial:
    return Trial(BitPlan(default=8), nbytes, 8.0, (accuracy,), 0.5)


FRONT = Front([trial(100, 0.70), trial(400, 0.80), trial(300, 0.65), trial(200, 0.795)], 0.80, 400)


def test_within_a_tolerance_or_a_budget() -> None:
    assert [point.nbytes for point in FRONT.points] == [100, 200, 400]
    assert FRONT.smallest_within().nbytes == 200
    assert FRONT.smallest_within(0.0049).nbytes == 400
    assert FRONT.smallest_within("13%").nbytes == 100
    assert FRONT.best_within(399).nbytes == 200
    assert FRONT.best_within("1kB").nbytes == 400
    with pytest.raises(
        NothingWithin, match=r"within 99 bytes: the smallest has 100, and an accuracy of 0\.7"
    ) as raised:
        FRONT.best_within(99)
    assert raised.value.nearest.nbytes == 100
    poor = Front(FRONT.trials, reference=0.9, full_bytes=400)
    with pytest.raises(NothingWithin, match=r"is within 0\.01 of 0\.9: the nearest has 0\.8, in 400 bytes") as raised:
        poor.smallest_within(0.01)
    assert raised.value.nearest.accuracy == 0.80


def test_a_bound_is_met_where_only_rounding_says_otherwise() -> None:
    assert 0.507 - 0.1 > 0.407
    front = Front([trial(200, 0.507), trial(100, 0.407)], 0.507, 200)
    assert front.smallest_within(0.1).nbytes == 100


def test_a_front_needs_a_trial() -> None:
    with pytest.raises(ValueError, match="trials must have one that did not fail, got 1 that did"):
        Front([Trial(BitPlan(), 1, 8.0, error="no")], 0.8, 1)


@pytest.mark.parametrize("tolerance", [True, math.nan, "-1%", "some", math.inf, None])
def test_what_is_no_tolerance(tolerance: Any) -> None:
    with pytest.raises(ValueError, match="tolerance must be"):
        allowed_drop(tolerance, 0.8)


def test_table_plot_and_json(tmp_path: Path) -> None:
    lines = str(FRONT).splitlines()
    assert "3 plans that no other of 4 beats" in lines[0]
    (starred,) = [line for line in lines if "*" in line]
    assert "200" in starred
    assert "2.0x" in starred
    figure = FRONT.plot(tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    (line,) = [line for line in figure.axes[0].get_lines() if line.get_label() == "front"]
    assert list(line.get_ydata()) == [0.70, 0.795, 0.80]
    failed = Front([*FRONT.trials, replace(FRONT.trials[0], accuracies=(), error="no")], 0.80, 400, "1%")
    again = Front.from_json(failed.to_json())
    assert again.trials == failed.trials
    assert again.to_json() == failed.to_json()
