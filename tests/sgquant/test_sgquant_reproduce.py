"""`examples/reproduce/sgquant.py` on a small graph, hardly trained: what it keeps; it goes on where it stopped."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_geometric.data import Data

FOLDER = Path(__file__).parents[2] / "examples" / "reproduce"
NODES, FEATURES = 300, 160


def citations(root: Path, name: str, seed: int = 0) -> Data:
    """Like Cora, but smaller: wide rows of two values, each with its own range, and masks."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (NODES,), generator=generator)
    x = torch.rand(NODES, FEATURES, generator=generator) < 0.05 + 0.1 * (torch.arange(FEATURES) % 3 == y[:, None])
    data = Data(torch.nn.functional.normalize(x.float()), torch.randint(NODES, (2, 1200), generator=generator), y=y)
    part = torch.randint(3, (NODES,), generator=generator)
    data.train_mask, data.val_mask, data.test_mask = part == 0, part == 1, part == 2
    return data


def run(module: Any, monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> list[dict[str, Any]]:
    common = ["--data", "", "--out", str(out), "--sets", "cora", "--models", "gcn", "--seeds", "0", "--epochs"]
    monkeypatch.setattr("sys.argv", ["sgquant.py", *common, "2", "--search-epochs", "1", *arguments])
    module.main()
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("scipy")
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("sgquant")
    brief = {"lr": 0.01, "weight_decay": 5e-4, "epochs": 4, "patience": 4, "every": 1}
    monkeypatch.setattr(module, "settings", lambda kind, name: brief)
    monkeypatch.setattr(module, "load", citations)
    search = ("--measurements", "9", "--rounds", "1", "--per-round", "2", "--tolerance", "0.05")

    rows = run(module, monkeypatch, tmp_path, "--plans", "uniform 2", "--equal-bytes", *search)
    found = {(row["plan"], row["way"]): row for row in rows}
    ways = ("as it is", "fine-tuned")
    expected = {("uniform 2", way) for way in ways} | {("search", way) for way in ways}
    assert set(found) == expected | {("float32", "trained"), ("float32", "fine-tuned")}
    two = found["uniform 2", "as it is"]
    # a range for each of the wide rows is what a row takes beside its codes
    assert two["full_bytes"] > NODES * FEATURES * 4
    assert NODES * FEATURES * 2 / 8 < two["bytes"] < two["full_bytes"] / 12
    assert two["released_bits"] == found["float32", "trained"]["released_bits"] / 16
    assert found["search", "as it is"]["bytes"] <= two["full_bytes"] / 2
    assert "gcn on cora" in capsys.readouterr().out

    # what is expected of them is of all nodes, and fine-tuning keeps what it started from, if that was better
    assert found["float32", "fine-tuned"]["expected"] >= found["uniform 2", "fine-tuned"]["expected"]
    assert found["uniform 2", "fine-tuned"]["expected"] >= two["expected"]
    trials = [json.loads(line) for line in (tmp_path / "abs-packed-cora-gcn-0.jsonl").read_text().splitlines()[1:]]
    full = found["float32", "fine-tuned"]["expected"]
    enough = [trial["bytes"] for trial in trials if trial["accuracy"] >= full - 0.05]
    assert len(trials) == 11
    assert found["search", "as it is"]["bytes"] == min(enough)

    again = run(module, monkeypatch, tmp_path, "--plans", "uniform 2", "uniform 1", "--equal-bytes", *search)
    assert again[: len(rows)] == rows, "a finished run is not repeated"
    assert [row["plan"] for row in again[len(rows) :]] == ["uniform 1", "uniform 1"]

    counts = ("--counts", "--within", "8", "--released-within", "8", "--equal-bytes", "--plans")
    found = {row["plan"]: row for row in run(module, monkeypatch, tmp_path, *counts, *search)}
    full_size = found["float32"]
    assert found["search within 1/8"]["bytes"] <= full_size["full_bytes"] / 8
    assert found["search, released count within 1/8"]["released_bits"] <= full_size["released_bits"] / 8
