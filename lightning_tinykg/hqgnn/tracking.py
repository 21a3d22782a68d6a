"""What goes to Weights & Biases beside the curves that any logger gets. Nothing here needs wandb to be installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L

from lightning_tinykg.hqgnn.curve import Point, plot

__all__ = ["define_best", "send_curve", "send_index"]


def define_best(trainer: L.Trainer, names: Sequence[str]) -> None:
    """Have a run's summary show the best value of these metrics, not the last."""
    for logger in _loggers(trainer):
        for name in names:
            logger.experiment.define_metric(name, step_metric="trainer/global_step", summary="max")


def send_curve(trainer: L.Trainer, points: Sequence[Point], metric: str) -> None:
    """Send recall against bytes, as a table and as a picture."""
    for logger in _loggers(trainer):
        names = list(points[0].metrics)
        data = [[p.name, p.nbytes, p.nbytes / 2**20, *(p.metrics[name] for name in names)] for p in points]
        logger.log_table("hqgnn/recall_against_bytes", columns=["embeddings", "bytes", "MiB", *names], data=data)
        logger.log_image("hqgnn/recall_against_bytes_plot", [plot(points, metric)])


def send_index(trainer: L.Trainer, directory: Path, card: Mapping[str, Any]) -> None:
    """Send an exported index as an artifact of the run; its metadata are the card."""
    for logger in _loggers(trainer):
        import wandb  # it is there, since its logger is

        artifact: Any = wandb.Artifact("hqgnn-index", type="low-bit-index", metadata=dict(card))
        artifact.add_dir(str(directory))
        logger.experiment.log_artifact(artifact)


def _loggers(trainer: L.Trainer) -> list[Any]:
    from lightning.pytorch.loggers import WandbLogger

    return [x for x in trainer.loggers if isinstance(x, WandbLogger)] if trainer.is_global_zero else []
