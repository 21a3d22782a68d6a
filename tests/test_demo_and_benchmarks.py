"""The demo and the benchmarks are what a reader runs first: each must run, and show what it promises."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: str) -> None:
    path = EXAMPLES / script
    monkeypatch.setenv("COLUMNS", "200")  # or the table is folded
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    runpy.run_path(str(path))["main"]()


def test_demo_shows_the_runs_side_by_side(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    run(monkeypatch, "demo.py", "--epochs", "1", "--bits", "2")
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("uncompressed", "2 bits", "most popular", "Recall@20", "ratio"))
    assert not list(tmp_path.iterdir()), "the demo leaves nothing behind"


def test_memory_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    size = ("--nodes", "500", "--edges", "5000", "--dim", "32", "--layers", "2", "--draws", "2")
    run(monkeypatch, "benchmarks/memory.py", *size, "--bits", "32", "2", "--json", str(tmp_path / "rows.json"))
    rows = json.loads((tmp_path / "rows.json").read_text())["results"]
    by = {(row["step"], row["recipe"]): row for row in rows}
    steps = {row["step"] for row in rows}
    assert {"kgat", "gat", "kgcn", "rgcn"} <= steps
    for step in steps:
        assert by[step, "exact"]["equal"], f"{step}: exact mode is not exact"
        assert by[step, "exact"]["ratio"] >= 1
        if step != "complex":  # whose numbers the paper's recipe leaves as they are
            assert 0 < by[step, "rules"]["error"] < by[step, "paper"]["error"]
        assert by[step, "rules"]["raw_mib"] == pytest.approx(by[step, "paper"]["raw_mib"])


@pytest.mark.slow
def test_peak_benchmark_in_processes_of_their_own(tmp_path: Path) -> None:
    script = EXAMPLES / "benchmarks" / "peak.py"
    arguments = [
        "--data",
        "synthetic:2000",
        "--steps",
        "2",
        "--bits",
        "none",
        "2",
        "--json",
        str(tmp_path / "peak.json"),
    ]
    done = subprocess.run([sys.executable, str(script), *arguments], stdout=subprocess.PIPE, text=True, check=True)
    assert "losses of the first step: identical to the last bit" in done.stdout
    plain, compressed = json.loads((tmp_path / "peak.json").read_text())
    assert plain["losses"][0] == compressed["losses"][0]
    assert len(plain["losses"]) == 2
    assert compressed["stored"] < compressed["raw"] / 5


def test_retrieval_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("faiss")
    size = ("--items", "3000", "--threads", "1", "--queries", "10", "--k", "10", "--bits", "4", "1")
    run(monkeypatch, "benchmarks/retrieval.py", *size, "--json", str(tmp_path / "r.json"))
    rows = json.loads((tmp_path / "r.json").read_text())["results"]
    exact = [row for row in rows if row["engine"].endswith(("refined", "numpy"))]
    assert len(exact) == 8
    assert all(row["right_of_codes"] == 1 for row in exact)


def test_curve_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    size = ("--nodes", "300", "--edges", "2000", "--dim", "16", "--layers", "1", "--draws", "1", "--bits", "2")
    files = ("--json", str(tmp_path / "c.json"), "--plot", str(tmp_path / "c.png"))
    run(monkeypatch, "benchmarks/curve.py", "--steps", "kgcn", "--ratios", "5", "1000", *size, *files)
    rows = json.loads((tmp_path / "c.json").read_text())
    assert [row["asked"] for row in rows] == ["2 bits", "5x", "1000x"]
    assert rows[1]["ratio"] >= 5
    assert "must be at least" in rows[2]["refused"]
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
