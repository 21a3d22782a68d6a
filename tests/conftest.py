"""Fixtures that more than one package's tests use."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets; tests that want it are skipped where it is not."""
    root = Path(os.environ.get("TINYKG_DATA") or Path(__file__).parents[1].parent / "shared" / "data")
    if not root.is_dir():
        pytest.skip(f"no real data in {root}; set TINYKG_DATA to their folder")
    return root


@pytest.fixture(autouse=True)
def lightning_logs() -> Iterator[None]:
    """What a script sets for its own process is undone: examples, run within a test, quieten Lightning."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More threads add in any order, and sums would not repeat to the last bit. What is drawn, is drawn from seed 0."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
