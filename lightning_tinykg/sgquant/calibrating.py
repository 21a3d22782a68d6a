"""Batches to calibrate on, in a Trainer: where they come from, and a step on them that leaves no trace in the logs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden

__all__ = ["batches_for", "silent"]


def batches_for(trainer: Trainer, pl_module: LightningModule) -> tuple[Iterator[Any], Callable[[Any], object]]:
    """Batches on the module's device, and the module's step for such a batch.

    They are the training data's, of the fit, the data module or the module itself; where there is none, those of the
    evaluation at hand.

    Args:
        trainer: In a stage.
        pl_module: Its module.

    Returns:
        Batches, and what does a forward on one.
    """
    source: Any = pl_module if trainer.datamodule is None else trainer.datamodule
    if trainer.train_dataloader is not None and trainer.state.fn == "fit":
        loaders, step = trainer.train_dataloader, "training_step"
    elif is_overridden("train_dataloader", source):
        loaders, step = source.train_dataloader(), "training_step"
    else:
        stages: dict[str, tuple[Any, str]] = {
            "validate": (trainer.val_dataloaders, "validation_step"),
            "test": (trainer.test_dataloaders, "test_step"),
            "predict": (trainer.predict_dataloaders, "predict_step"),
        }
        loaders, step = stages[str(trainer.state.fn.value) if trainer.state.fn else ""]
    return _moved(trainer, loaders), lambda batch: getattr(pl_module, step)(batch, 0)


def _moved(trainer: Trainer, loaders: Any) -> Iterator[Any]:
    combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "max_size_cycle")
    assert trainer.strategy is not None
    for batch, _, _ in combined:
        yield trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)


@contextmanager
def silent(pl_module: LightningModule) -> Iterator[None]:
    """A module that logs nothing: the step of a calibration is no step of the fit."""
    names = ("log", "log_dict")
    before = {name: pl_module.__dict__[name] for name in names if name in pl_module.__dict__}
    pl_module.__dict__.update(dict.fromkeys(names, _nothing))
    try:
        yield
    finally:
        for name in names:
            del pl_module.__dict__[name]
        pl_module.__dict__.update(before)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of `log`."""
