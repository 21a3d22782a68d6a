"""Plans: which bits where."""

from pathlib import Path
from typing import Any

import pytest

from lightning_tinykg.bits import BitPlan, CosineAnneal, PlanEntry, StepAnneal, WarmupThen

PLAN = BitPlan(
    {
        "layers": 2,
        "layers.[12]": 4,
        ("layers", "Softmax.*"): 8,
        ("layers.1", "Mul.*", "0"): 1,
        ("*.norm", "*"): StepAnneal({0: 8, 100: 2}),
        "head": 32,
    },
    default=CosineAnneal(8, 4, steps=10),
)


@pytest.mark.parametrize(
    ("place", "bits"),
    [
        (("layers.0", "Mm.self", "0"), 2),
        (("layers.0.attention.linear", "Mm.self", "0"), 2),
        (("layers.1", "Mm.self", "0"), 4),
        (("layers.1.attention", "Mm.self", "3"), 4),
        (("layers.1", "Softmax.result", "0"), 8),
        (("layers.1", "Mul.self", "0"), 1),
        (("layers.1", "Mul.self", "1"), 4),
        (("layers.10", "Mm.self", "0"), 2),
        (("layers.0.norm", "NativeLayerNorm.input", "0"), StepAnneal({0: 8, 100: 2})),
        (("head", "Mm.self", "0"), 32),
        (("header", "Mm.self", "0"), CosineAnneal(8, 4, steps=10)),
        (("", "Mm.self", "0"), CosineAnneal(8, 4, steps=10)),
    ],
)
def test_the_last_entry_that_matches_decides(place: tuple[str, str, str], bits: Any) -> None:
    assert PLAN.bits_for(*place) == bits


def test_order_is_what_counts() -> None:
    general_last = BitPlan([PlanEntry(8, "head"), PlanEntry(2)])
    assert general_last.bits_for("head") == 2
    assert BitPlan([PlanEntry(2), PlanEntry(8, "head")]).bits_for("head") == 8


def test_at_a_step() -> None:
    early, late = PLAN.at(step=0), PLAN.at(step=100)
    assert (early.bits_for("layers.0.norm"), late.bits_for("layers.0.norm")) == (8, 2)
    assert (early.bits_for("other"), late.bits_for("other")) == (8, 4)
    assert early.bits_for("head") == late.bits_for("head") == 32
    by_epoch = BitPlan(default=StepAnneal({0: 8, 2: 1}, by="epoch"))
    assert by_epoch.at(step=1000, epoch=1).bits_for("any") == 8
    assert by_epoch.at(step=1000, epoch=2).bits_for("any") == 1


@pytest.mark.parametrize("name", ["plan.yaml", "plan.yml", "plan.json"])
def test_files(tmp_path: Path, name: str) -> None:
    plan = BitPlan([*PLAN.entries, PlanEntry(WarmupThen(3, 32, 2), "x", "y", "z")], PLAN.default)
    plan.save(tmp_path / name)
    again = BitPlan.load(tmp_path / name)
    assert again == plan
    assert again.bits_for("x", "y", "z") == WarmupThen(3, 32, 2)
    assert again != PLAN


def test_a_plan_written_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(
        """
default: 4
entries:
  - {layer: "layers.*", bits: 2}
  - layer: head
    component: "Mm.*"
    bits: {schedule: StepAnneal, bits: {0: 8, 5: 2}}
"""
    )
    plan = BitPlan.load(path).at(step=5)
    assert [plan.bits_for(*p) for p in (("layers.0",), ("head", "Mm.self"), ("head", "Mul.self"))] == [2, 2, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("default: 3.5", "bits of .* must be one of"),
        ("entires: []", r"a plan has 'default' and 'entries', got \['entires'\]"),
        ("entries: [{layer: a}]", "entry 0 of a plan has layer, component, topology and bits"),
        ("entries: [{layer: a, bits: 2, where: b}]", "entry 0 of a plan"),
        (
            "entries: [{layer: a, bits: 13}]",
            "must be one of 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 16, 32, or a schedule, got 13",
        ),
        ("entries: [{layer: a, bits: {schedule: Nothing}}]", "schedule must be one of"),
        ("entries: [{layer: a, bits: {schedule: LinearAnneal, begin: 8}}]", "begin"),
        ("just text", "a plan has 'default' and 'entries', got 'just text'"),
        ("{", "no bit plan"),
    ],
)
def test_a_bad_file_says_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        BitPlan.load(path)
    assert str(path) in str(raised.value)


def test_other_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in .yaml, .yml or .json, got 'plan.txt'"):
        PLAN.save(tmp_path / "plan.txt")


def test_entries_that_match_nothing_are_refused() -> None:
    places = [("layers.0", "Mm.self", "0"), ("head", "Mul.other", "0")]
    BitPlan({"layers": 2, ("*", "Mul.*"): 4}).check(places)
    with pytest.raises(ValueError, match=r"layer \(nearest: layers\.0\); head / Mm\.\*"):
        BitPlan({"layers": 2, "layer": 2, ("head", "Mm.*"): 4}).check(places)


def test_widths_that_are_not_offered_are_refused() -> None:
    BitPlan({"a": 4}).check_widths((2, 4, 8), "compress_activations")
    with pytest.raises(ValueError, match="bits of compress_activations must be one of 2, 4, 8, got 3 in the plan"):
        BitPlan({"a": 3}).check_widths((2, 4, 8), "compress_activations")


def test_it_prints_as_a_table() -> None:
    lines = str(PLAN).splitlines()
    assert "the last line that matches decides" in lines[0]
    assert any("layers.[12]" in line and "4" in line for line in lines)
    assert lines.index(next(x for x in lines if "CosineAnneal" in x)) < lines.index(
        next(x for x in lines if "head" in x)
    )
