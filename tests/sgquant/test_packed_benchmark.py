"""The benchmark of packed inference runs, and shows what it promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "packed_inference.py"


@pytest.mark.slow
def test_packed_inference_takes_less_and_predicts_the_same(tmp_path: Path) -> None:
    size = ("--nodes", "20000", "--edges", "200000", "--features", "64", "--model", "sage", "--bits", "4", "2")
    file = tmp_path / "rows.json"
    command = [sys.executable, str(SCRIPT), *size, "--json", str(file)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert "agrees with the simulation" in done.stdout
    plain, packed = json.loads(file.read_text())["results"]
    assert packed["agreement"] > 0.999
    for key in ("feature_bytes", "loaded", "peak", "forward_peak"):
        assert packed[key] < plain[key]
    assert packed["feature_bytes"] < plain["feature_bytes"] / 8
