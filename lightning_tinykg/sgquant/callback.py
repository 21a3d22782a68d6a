"""``SGQuantCallback``: one line in a Trainer, and the last epochs train a GNN to be stored in few bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_tinykg.arguments import check_whole
from lightning_tinykg.bits.plan import BitPlan
from lightning_tinykg.sgquant.agreeing import NoMessagesError, Report
from lightning_tinykg.sgquant.calibrating import batches_for, silent
from lightning_tinykg.sgquant.granularity import DegreeBuckets
from lightning_tinykg.sgquant.model import PackedModel
from lightning_tinykg.sgquant.places import Granularity, as_plan, check_ranges
from lightning_tinykg.sgquant.protecting import check_protect
from lightning_tinykg.sgquant.quantizer import SGQuantizer
from lightning_tinykg.sgquant.ranges import Range

__all__ = ["SGQuantCallback"]

_MIB = 1 << 20


class SGQuantCallback(Callback):
    """Quantize what a GNN stores of nodes and edges, by layer, component and node degree: SGQuant (arXiv 2007.05100).

    It works on any module that holds PyG message passing layers, and changes nothing of it: see `SGQuantizer`. The last
    `finetune_epochs` epochs of the fit train with the quantization in place. It is calibrated before the first step of
    these, on that step's batch in evaluation; so the model must be well trained by then, or give an already trained one
    and `max_epochs=finetune_epochs`. Validation, test and prediction see the quantized model from then on, also after
    the fit, with the same callback. With `finetune_epochs=0` nothing is trained: the calibration is at the end of the
    fit, or at the start of a validation or test of a model that was never calibrated.

    **Logged metrics**, at the end of each epoch of training or testing in which it is quantized:

    - `sgquant/average_bits`: mean width of what is stored.
    - `sgquant/packed_MiB`: bytes of the packed form, all metadata included.
    - `sgquant/ratio`: of the bytes in float32 to these.

    Args:
        plan: Widths of the places, 1 to 8, 16 and 32; a number for all, or a path of a saved plan.
        finetune_epochs: Epochs of training in quantized form, the last of the fit.
        calibration_batches: Batches that the ranges are found on; of the fine-tuning's, before each is trained on.
        buckets: As in `SGQuantizer`, and so are the others.
        range: How ranges are found.
        percentile: For `range="percentile"`.
        granularity: What has a range of its own.
        protect: Probabilities of Degree-Quant's protective mask.
        seed: Of the protective mask.
        calibration_step: Does a forward on a batch, for calibration: `calibration_step(module, batch)`. `None`: the
            module's `training_step`, with its logging off.

    Raises:
        ValueError: If an argument has a value it can't have.

    Example:
        >>> callback = SGQuantCallback(plan=4, finetune_epochs=10)
        >>> callback.is_active
        False
    """

    def __init__(
        self,
        plan: BitPlan | int | str | Path = 8,
        *,
        finetune_epochs: int = 0,
        calibration_batches: int = 1,
        buckets: DegreeBuckets | int | Sequence[int] | None = 4,
        range: Range = "mse",
        percentile: float = 0.999,
        granularity: Granularity = "auto",
        protect: tuple[float, float] | None = None,
        seed: int = 0,
        calibration_step: Callable[[LightningModule, Any], object] | None = None,
    ) -> None:
        check_whole("finetune_epochs", finetune_epochs)
        check_whole("calibration_batches", calibration_batches, 1)
        self.plan = as_plan(plan)
        self.finetune_epochs, self.calibration_batches = finetune_epochs, calibration_batches
        self.calibration_step = calibration_step
        self.quantizer: SGQuantizer | None = None
        """Of the module that was last trained or evaluated."""
        self.is_active = False
        """Whether the module is to be quantized: from the calibration on."""
        check_ranges(range, percentile, granularity)
        self._make = partial(
            SGQuantizer,
            buckets=DegreeBuckets.from_argument(buckets),
            range=range,
            percentile=percentile,
            granularity=granularity,
            protect=check_protect(protect),
            seed=check_whole("seed", seed),
        )
        self._seen = 0  # batches of the calibration
        self._restored: dict[str, Any] | None = None  # the quantizer's state, until there is a module for it

    # -- the quantizer of a module -----------------------------------------------------------------------------------

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the module's quantizer; put it in place if it is active."""
        if self.quantizer is None or self.quantizer.model is not pl_module:
            state = self._restored or (None if self.quantizer is None else self.quantizer.state_dict())
            self.quantizer = self._make(pl_module, self.plan)
            if state is not None and self.is_active:
                self.quantizer.load_state_dict(state)
        elif self._restored is not None and self.is_active:
            self.quantizer.load_state_dict(self._restored)
        self._restored, self.plan = None, self.quantizer.plan
        self.quantizer.gather = _gathered if trainer.world_size > 1 else None
        if self.is_active:
            self.quantizer.attach()

    def _calibrate(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, step: Callable[[Any], object]
    ) -> None:
        """Calibrate on a batch, unless it is of a kind that passes no messages."""
        assert self.quantizer is not None
        self._check_step(pl_module)
        if self.calibration_step is not None:
            step = partial(self.calibration_step, pl_module)
        try:
            with silent(pl_module), trainer.precision_plugin.forward_context():
                self.quantizer.calibrate(lambda: step(batch), more=self.is_active)
        except NoMessagesError:
            return
        self._seen += 1
        self.is_active = True
        self.quantizer.attach()

    def _check_step(self, pl_module: LightningModule) -> None:
        if self.calibration_step is None and not pl_module.automatic_optimization:
            raise RuntimeError(
                "SGQuantCallback calibrates by the module's training_step, which steps its optimizers itself with "
                "automatic_optimization=False: give calibration_step=lambda module, batch: module(...)"
            )

    # -- the fit -----------------------------------------------------------------------------------------------------

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a plan or a model that can't be; go on quantized if a checkpoint was.

        Raises:
            ValueError: If the plan names what there is not, the module has no message passing layers, or there is no
                last epoch to count from.
            RuntimeError: If the module steps its optimizers itself and there is no `calibration_step`.
        """
        self._check_step(pl_module)
        if self.finetune_epochs and (trainer.max_epochs is None or trainer.max_epochs < 0):
            raise ValueError(
                f"finetune_epochs={self.finetune_epochs} counts from the last epoch: give the Trainer max_epochs, "
                f"got {trainer.max_epochs}"
            )
        if self._restored is None:  # a fit begins in full precision
            self.is_active, self._seen, self.quantizer = False, 0, None
        self._begin(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Calibrate on the batch, if it is one of the first of the fine-tuning."""
        late = trainer.current_epoch >= (trainer.max_epochs or 0) - self.finetune_epochs
        if self.finetune_epochs and late and self._seen < self.calibration_batches:
            self._calibrate(trainer, pl_module, batch, lambda batch: pl_module.training_step(batch, batch_idx))

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what is stored."""
        self._log(pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrate, if nothing was fine-tuned."""
        if not self.is_active and not self.finetune_epochs:
            self._calibrate_on_data(trainer, pl_module)

    def _calibrate_on_data(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches, step = batches_for(trainer, pl_module)
        self._seen = 0
        for batch in batches:
            self._calibrate(trainer, pl_module, batch, step)
            if self._seen >= self.calibration_batches:
                return
        if not self.is_active:
            raise RuntimeError("SGQuantCallback must see a batch whose step passes messages, got none in the data")

    # -- evaluation --------------------------------------------------------------------------------------------------

    def _before_evaluation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":  # attached already, if it is time
            return
        self._begin(trainer, pl_module)
        if not self.is_active:
            self._calibrate_on_data(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the quantized module, calibrated now if it never was."""
        self._before_evaluation(trainer, pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As `on_validation_start`."""
        self._before_evaluation(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As `on_validation_start`."""
        self._before_evaluation(trainer, pl_module)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what is stored."""
        self._log(pl_module)

    def _log(self, pl_module: LightningModule) -> None:
        if not self.is_active or self.quantizer is None:
            return
        memory = self.quantizer.memory()
        metrics = {
            "sgquant/average_bits": memory.average_bits,
            "sgquant/packed_MiB": memory.packed_bytes / _MIB,
            "sgquant/ratio": memory.ratio,
        }
        pl_module.log_dict(metrics, rank_zero_only=True)

    # -- afterwards --------------------------------------------------------------------------------------------------

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was; the next stage puts the quantization in again."""
        if self.quantizer is not None:
            self.quantizer.detach()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the module as it was: after an exception there is no teardown."""
        if self.quantizer is not None:
            self.quantizer.detach()

    def pack(self) -> PackedModel:
        """The module with its places really packed, for inference.

        Raises:
            RuntimeError: If there was no calibration yet.
        """
        if self.quantizer is None or not self.is_active:
            raise RuntimeError("pack needs a calibrated module: fit, or test, with this callback first")
        return PackedModel.from_quantizer(self.quantizer)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Plan, ranges and whether they are in force: a resumed fit goes on where it stopped."""
        quantizer = self.quantizer.state_dict() if self.is_active and self.quantizer is not None else self._restored
        return {"is_active": self.is_active, "seen": self._seen, "quantizer": quantizer}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.is_active, self._seen = bool(state_dict["is_active"]), int(state_dict["seen"])
        self._restored = state_dict["quantizer"]


def _gathered(report: Report) -> list[Report]:
    """All ranks' reports, in their order."""
    reports: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(reports, report)
    return reports
