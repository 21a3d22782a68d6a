"""The callback, unchanged, in Ray Train."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "ray_train.py"


@pytest.mark.slow
@pytest.mark.ddp
@pytest.mark.skipif(find_spec("ray") is None, reason="the extra `ray` is not installed")
def test_two_workers(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE), "--workers", "2", "--bits", "2"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = dict(line.split() for line in ran.stdout.splitlines() if line.startswith(("train/", "val/", "tinykg/")))
    assert float(found["tinykg/bits"]) == 2
    assert float(found["tinykg/ratio"]) > 2
    assert float(found["val/recall@20"]) > 0
