"""`examples/reproduce/sgquant.py` on Cora, hardly trained: what it keeps, and that it goes on where it stopped."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "reproduce"


def run(module: Any, monkeypatch: pytest.MonkeyPatch, data: Path, out: Path, *arguments: str) -> list[dict[str, Any]]:
    common = ["--data", str(data), "--out", str(out), "--sets", "cora", "--models", "gcn", "--seeds", "0", "--epochs"]
    monkeypatch.setattr("sys.argv", ["sgquant.py", *common, "2", "--search-epochs", "1", *arguments])
    module.main()
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_a_table_for_cora(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (real_data / "planetoid" / "Cora").is_dir():
        pytest.skip("no Cora among the real data")
    pytest.importorskip("scipy")
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("sgquant")
    brief = {"lr": 0.01, "weight_decay": 5e-4, "epochs": 4, "patience": 4, "every": 1}
    monkeypatch.setattr(module, "settings", lambda kind, name: brief)
    search = ("--measurements", "9", "--rounds", "1", "--per-round", "2")

    rows = run(module, monkeypatch, real_data, tmp_path, "--plans", "uniform 2", "--equal-bytes", *search)
    found = {(row["plan"], row["way"]): row for row in rows}
    ways = ("as it is", "fine-tuned")
    expected = {("uniform 2", way) for way in ways} | {("search", way) for way in ways}
    assert set(found) == expected | {("float32", "trained"), ("float32", "fine-tuned")}
    two = found["uniform 2", "as it is"]
    # Cora's features are 1,433 wide; a range for each of their rows is what a row takes beside its codes
    assert two["full_bytes"] > 2708 * 1433 * 4
    assert 2708 * 1433 * 2 / 8 < two["bytes"] < two["full_bytes"] / 15
    assert two["released_bits"] == found["float32", "trained"]["released_bits"] / 16
    assert found["search", "as it is"]["bytes"] <= two["full_bytes"] / 2
    assert "gcn on cora" in capsys.readouterr().out

    again = run(module, monkeypatch, real_data, tmp_path, "--plans", "uniform 2", "uniform 1", "--equal-bytes", *search)
    assert again[: len(rows)] == rows, "a finished run is not repeated"
    assert [row["plan"] for row in again[len(rows) :]] == ["uniform 1", "uniform 1"]
