"""Reads back what a run of Weights & Biases recorded offline."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import WandbLogger

wandb = pytest.importorskip("wandb")


def records(logger: WandbLogger) -> tuple[Path, list[dict[str, Any]]]:
    """End the run; the folder of its files, and all that it recorded."""
    files = Path(logger.experiment.dir)
    wandb.finish()
    command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", files.parent]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return files, [json.loads(line) for line in output.splitlines()]


def finished(logger: WandbLogger) -> tuple[Path, list[dict[str, Any]]]:
    """End the run; the folder of its files, and the rows of its history."""
    files, found = records(logger)
    return files, [record["history"]["item"] for record in found if record["type"] == "history"]
