"""The demo and the recommenders' reproduction run, show what they promise, and do not repeat what is done."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # or the table is folded
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend((EXAMPLES / script).parent)  # as Python does with a script's folder
    runpy.run_path(str(EXAMPLES / script))["main"]()


@pytest.mark.parametrize("model", ["lightgcn", pytest.param("kgat", marks=pytest.mark.slow)])
def test_demo(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ("--data", "synthetic:1000", "--model", model, "--epochs", "1", "--tuning-epochs", "1", "--bits", "8")
    search = ("--measurements", "6", "--rounds", "1")
    run(monkeypatch, "sgquant_demo.py", *size, *search, "--out", str(tmp_path / "curve.png"))
    shown = capsys.readouterr().out
    rows = {line.split("│")[1].strip() for line in shown.splitlines() if line.startswith("│")}
    assert rows == {"float32", "uniform 8", "by degree 1, 2, 4, 8", "searched"}
    (ratios,) = [{line.split("│")[5].strip() for line in shown.splitlines() if line.startswith("│ uniform 8")}]
    assert ratios == {"4.0x"}
    assert shown.count("post-training") == shown.count("fine-tuned") == 3
    assert "the same 20 items as simulated for 100.00% of" in shown.replace("\n", " ")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_reproduction_resumes_and_refuses_to_mix_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(epochs: int, *options: str) -> list[dict[str, Any]]:
        size = ("--data", "synthetic:500", "--epochs", "2", "--tuning-epochs", str(epochs), "--models", "lightgcn")
        search = ("--bits", "2", "--measurements", "6", "--rounds", "1", "--per-round", "2")
        run(monkeypatch, "reproduce/sgquant_recommenders.py", *size, *search, *options, "--out", str(tmp_path))
        return [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]

    plans = ["float32", "uniform 2", "by degree 8, 4, 2, 1", "by degree 1, 2, 4, 8", "ABS"]
    first = call(1, "--seeds", "0", "1", "--ways", "post-training")
    assert [(row["seed"], row["plan"]) for row in first] == [(seed, plan) for seed in (0, 1) for plan in plans]
    measured = (tmp_path / "abs-lightgcn-seed0.jsonl").read_text()
    second = call(1, "--seeds", "0")
    assert second[: len(first)] == first
    assert {(row["plan"], row["way"]) for row in second[len(first) :]} == {(plan, "fine-tuned") for plan in plans}
    assert (tmp_path / "abs-lightgcn-seed0.jsonl").read_text() == measured
    for row in second:  # fine-tuning keeps what it started from, if that was better
        before = next(old for old in first if (old["seed"], old["plan"]) == (row["seed"], row["plan"]))
        assert row["bytes"] == before["bytes"]
        assert row["val"] >= before["val"] or row["plan"] == "float32"
    shown = capsys.readouterr().out
    assert "of float32" in shown
    assert "±" in shown
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["lightgcn-seed0.ckpt", "lightgcn-seed1.ckpt"]
    with pytest.raises(SystemExit, match="made with other settings"):
        call(2, "--seeds", "0")


def test_the_searched_plan_is_the_smallest_within_the_tolerance(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    size = ("--data", "synthetic:1000", "--models", "kgat", "--seeds", "0", "--epochs", "2", "--ways", "post-training")
    search = ("--bits", "4", "--measurements", "9", "--rounds", "1", "--per-round", "2", "--tolerance", "5%")
    run(monkeypatch, "reproduce/sgquant_recommenders.py", *size, *search, "--out", str(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    lines = (tmp_path / "abs-kgat-seed0.jsonl").read_text().splitlines()
    trials = [json.loads(line) for line in lines if '"accuracy"' in line]
    full, found = rows[0], rows[-1]
    assert len(trials) == 11
    enough = [trial for trial in trials if trial["accuracy"] >= 0.95 * full["val"] - 1e-9]
    best = min(enough, key=lambda trial: trial["bytes"])
    assert (found["bytes"], found["val"]) == (best["bytes"], pytest.approx(best["accuracy"]))
