"""The demo and the reproduction run, show what they promise, and do not repeat what is done."""

import json
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # or the table is folded
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend((EXAMPLES / script).parent)  # as Python does with a script's folder
    runpy.run_path(str(EXAMPLES / script))["main"]()


def test_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = ("--data", "synthetic:1000", "--epochs", "1", "--tuning-epochs", "1", "--bits", "2")
    run(monkeypatch, "hqgnn.py", *size, "--out", str(tmp_path / "curve.png"))
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("full precision", "PTQ, 2 bits", "STE, 2 bits", "GSTE, 2 bits", "of fp32"))
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_reproduction_resumes_and_refuses_to_mix_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(epochs: int, *estimators: str) -> list[dict[str, object]]:
        size = ("--data", "synthetic:1000", "--dim", "8", "--teacher-epochs", "2", "--epochs", str(epochs))
        options = ("--bits", "1", "--scale", "node", "--seeds", "0", "1", "--estimators", *estimators)
        where = ("--results", str(tmp_path / "results"), "--out", str(tmp_path / "out"))
        run(monkeypatch, "reproduce/hqgnn_lightgcn.py", *size, *options, *where)
        return [json.loads(line) for line in (tmp_path / "results/hqgnn-synthetic1000.jsonl").read_text().splitlines()]

    first = call(1, "ptq")
    assert [(row["estimator"], row["seed"]) for row in first] == [("fp32", 0), ("fp32", 1), ("ptq", 0), ("ptq", 1)]
    second = call(1, "ptq", "gste")
    assert second[:4] == first
    assert [row["epochs"] for row in first] == [2, 2, 0, 0]  # the teacher's, and of quantizing after training
    assert str(tmp_path) not in json.dumps(second)
    assert {row["estimator"] for row in second[4:]} == {"fp32 tuned", "gste"}
    shown = capsys.readouterr().out
    assert "of fp32" in shown
    assert "±" in shown
    kept = tmp_path / "out/synthetic1000"
    assert (kept / "recall_against_bytes.png").exists()
    assert {path.name for path in kept.glob("*.ckpt")} == {"teacher-seed0.ckpt", "teacher-seed1.ckpt"}
    with pytest.raises(SystemExit, match=r"hqgnn-synthetic1000.jsonl was made with other settings"):
        call(2, "ptq")
    (tmp_path / "results/hqgnn-synthetic1000.jsonl").unlink()
    with pytest.raises(SystemExit, match="synthetic1000 was begun with other settings"):  # its teachers were
        call(2, "ptq")
