"""Fixtures that more than one package's tests use."""

import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch


def pytest_collection_finish() -> None:
    """What is imported and collected stays, so it is not looked through whenever a test collects garbage."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture
def wandb_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A WandbLogger whose run is offline."""
    wandb = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    yield WandbLogger(project="tinykg", save_dir=tmp_path, mode="offline")
    wandb.finish()  # else the next logger would go on with this run


@pytest.fixture
def quiet(tmp_path: Any) -> dict[str, Any]:
    """Arguments of a Trainer that prints nothing and leaves nothing."""
    return {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": tmp_path,
    }
