"""What goes to Weights & Biases beside the curves that any logger gets. Nothing here needs wandb to be installed."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger

from lightning_tinykg.activations.ledger import Ledger
from lightning_tinykg.bits.plan import BitPlan

_MAXIMA = ("tinykg/raw_mib", "tinykg/stored_mib", "tinykg/peak_mib")
"""Of these the summary shows the largest, which decides whether a model fits, and the last."""


def begin(logger: Logger) -> None:
    """Declare the curves' summaries, if the logger is a WandbLogger. On rank 0 only.

    Args:
        logger: any of the Trainer's loggers.
    """
    if isinstance(logger, WandbLogger):
        for name in _MAXIMA:
            logger.experiment.define_metric(name, step_metric="trainer/global_step", summary="max,last")


def finish(logger: Logger, ledger: Ledger, plan: BitPlan | None) -> None:
    """Send the ledger as a table and as a plot, and the plan as an artifact, if the logger is a WandbLogger.

    Args:
        logger: any of the Trainer's loggers.
        ledger: of the largest step.
        plan: which bits where, in force at the end; None for one width everywhere.
    """
    if not isinstance(logger, WandbLogger):
        return
    if rows := ledger.summary():
        logger.log_table("tinykg/ledger", columns=list(rows[0]), data=[list(row.values()) for row in rows])
        logger.log_image("tinykg/ledger_plot", [ledger.plot()])
    if plan is not None:
        _send_plan(logger, plan)


def _send_plan(logger: WandbLogger, plan: BitPlan) -> None:
    import wandb  # it is there, since its logger is

    artifact: Any = wandb.Artifact("tinykg-plan", type="bit-plan", metadata=plan.to_dict())
    with TemporaryDirectory() as folder:  # copied when it is added
        plan.save(Path(folder) / "plan.yaml")
        artifact.add_file(str(Path(folder) / "plan.yaml"))
        logger.experiment.log_artifact(artifact)
