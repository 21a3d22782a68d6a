"""What the scripts of this folder share: a quiet Trainer, a line for each run as it goes, mean and spread."""

import logging
import statistics
import warnings
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich.progress import Progress

WATCHED: dict[str, Any] = {"monitor": "val/recall@20", "mode": "max"}
"""What checkpoints and early stopping go by."""


class Report(Callback):
    """Shows each epoch's validation score, and keeps it."""

    def __init__(self, progress: Progress, name: str) -> None:
        self.progress, self.name = progress, name
        self.task = progress.add_task(name, total=None)
        self.curve: list[float] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.curve.append(float(trainer.callback_metrics["val/recall@20"]))
        text = f"{self.name}: epoch {trainer.current_epoch + 1}, validation Recall@20 {self.curve[-1]:.4f}"
        self.progress.update(self.task, description=f"{text}, best {max(self.curve):.4f}")


def quiet_trainer(accelerator: str, **options: Any) -> L.Trainer:
    """A Trainer on one device that prints nothing."""
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(**(quiet | options), num_sanity_val_steps=0, accelerator=accelerator, devices=1)


def silence() -> None:
    """No warnings, and of Lightning's messages errors only."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def spread(values: list[float]) -> str:
    """Mean and standard deviation, as far as there are several.

    Example:
        >>> spread([0.1, 0.3])
        '0.2000 ± 0.1414'
    """
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean
