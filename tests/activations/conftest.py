"""One thread, since parallel ``index_add`` does not repeat to the last bit; what is made again; helpers on the path."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_tinykg.activations.remaking import Making

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "codecs"), str(ROOT / "examples" / "benchmarks")]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Making]:
    """What was made again, as often as it was."""
    found: list[Making] = []
    run = Making._run

    def noted(self: Making, workspace: Any) -> Tensor:
        found.append(self)
        return run(self, workspace)

    monkeypatch.setattr(Making, "_run", noted)
    return found
