"""Runs a training step plainly and at each width, and compares."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import _TunerExitException
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lightning_tinykg.activations import Ledger, compress_activations
from lightning_tinykg.activations.costs import RECOMPUTE
from lightning_tinykg.arguments import check_whole
from lightning_tinykg.bits.schedule import WIDTHS, check_bits
from lightning_tinykg.callback import TinyKGCallback
from lightning_tinykg.profiling.report import Point, Profile
from lightning_tinykg.profiling.undo import Undo, refill

Ways = dict[str, dict[str, Any]]
"""By name: settings of :class:`~lightning_tinykg.compress_activations` that are compared."""

_PLAIN = (Tensor, list, tuple, dict)
"""What a default DataLoader yields, and then nothing else: no need to look for other types of batch."""


def profile(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule | None = None,
    *,
    train_dataloaders: Any = None,
    steps: int = 3,
    widths: Sequence[int] = tuple(reversed(WIDTHS)),
    paper: bool = True,
    recompute: Sequence[str] = ("off", "aggressive"),
    scan: int = 200,
    ckpt_path: str | Path | None = None,
) -> Profile:
    """Measure what autograd keeps in a model's training step, what each width would keep, and at what error.

    Nothing is trained. The Trainer sets the model up as it does for a fit, up to the first batch. There, the training
    step is run with the same weights and the same random state once plainly, once again to see whether it repeats,
    and once at each width; each gradient is compared with the plain one. Batches of several types, as KGAT's, are
    measured each. The Trainer's callbacks and loggers take no part, except that ``group_size``, ``min_bytes``,
    ``modules`` and ``recompute`` of a :class:`~lightning_tinykg.TinyKGCallback` hold here, too. Afterwards weights,
    buffers, metric states, gradients, random states and the Trainer are what they were; this takes two copies of the
    weights.

    Under manual optimization the step takes its gradients itself: then bytes are measured, and no error.

    Args:
        trainer: says on which device and in which precision. One device only.
        model: any LightningModule.
        datamodule: its data. None: ``train_dataloaders``, or the model's own.
        train_dataloaders: as for ``Trainer.fit``.
        steps: batches to measure, of each type.
        widths: bits to try: 1, 2, 4, 8, 32.
        paper: whether to try the paper's recipe at these widths as well.
        recompute: settings of ``recompute`` to try as well, besides the default.
        scan: batches to look through for other types of batch, which may come late in an epoch.
        ckpt_path: a checkpoint whose weights to measure at: errors move in training.

    Returns:
        The figures, as tables, a plot and files. They are also sent to the Trainer's WandbLogger, if it has one.

    Raises:
        ValueError: if an argument has a value it can't have, the Trainer has several devices, or there is no batch.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_tinykg.profiling import profile
        >>> trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        >>> points = profile(trainer, BoringModel(), steps=1, widths=[32], recompute=()).points
        >>> [(point.bits, point.error) for point in points]
        [(32, 0.0)]
    """
    check_whole("steps", steps, 1)
    if not widths:
        raise ValueError("widths must be some of 1, 2, 4, 8, 32, got none")
    for width in widths:
        check_bits(width, "widths")
    if trainer.world_size > 1 or not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise ValueError(
            "trainer must have one device and an unsharded model, since one process is measured: use "
            f"Trainer(devices=1), got {type(trainer.strategy).__name__} with {trainer.world_size} devices"
        )
    for setting in recompute:
        if setting not in RECOMPUTE:
            raise ValueError(f"recompute must be some of {', '.join(map(repr, RECOMPUTE))}, got {setting!r}")
    ways: Ways = {"rules": {}} | {f"rules, {setting}": {"recompute": setting} for setting in recompute}
    if paper:
        ways["paper"] = {"recipe": "paper"}
    probe = _Probe(steps, sorted(set(widths), reverse=True), ways, scan, ckpt_path, _settings(trainer))
    with isolate_rng(), Undo(model), _borrowed(trainer, probe):
        trainer.fit(model, train_dataloaders, datamodule=datamodule)
    if not probe.profile.points:
        raise ValueError(
            "profile measures training batches, and got none: see the data, and Trainer(limit_train_batches)"
        )
    _send_to_wandb(trainer, probe.profile)
    return probe.profile


class _Probe(Callback):
    """Takes the fit over at its first batch, measures, and ends it."""

    def __init__(
        self,
        steps: int,
        widths: list[int],
        ways: Ways,
        scan: int,
        ckpt_path: str | Path | None,
        settings: dict[str, Any],
    ) -> None:
        self.steps, self.widths, self.scan, self.ckpt_path, self.settings = steps, widths, scan, ckpt_path, settings
        self.ways = ways
        self.profile = Profile()
        self.variants: dict[tuple[str, int], compress_activations] = {}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.ckpt_path is not None:  # not resumed from: that would go on in the midst of its epoch
            checkpoint = trainer.strategy.load_checkpoint(self.ckpt_path)
            pl_module.on_load_checkpoint(checkpoint)
            trainer.strategy.load_model_state_dict(checkpoint, strict=pl_module.strict_loading)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            raise ValueError("training_step takes a dataloader_iter: a batch that it fetches can't be measured again")
        self.variants = {
            (way, bits): compress_activations(bits, root=pl_module, **(self.settings | options))
            for way, options in self.ways.items()
            for bits in self.widths
            if (way, bits) != ("paper", 32)  # the paper has no exact mode
        }
        pl_module._current_fx_name = "training_step"  # where self.log() is called, as far as Lightning is concerned
        measured: Counter[str] = Counter()
        for index, one in enumerate(_batches(trainer, pl_module, batch)):
            kind = type(one).__name__
            if measured[kind] < self.steps:
                measured[kind] += 1
                pl_module.on_train_batch_start(one, index)
                self._measure(trainer, pl_module, one, index)
            if measured[kind] == self.steps and (type(one) in _PLAIN or index + 1 >= self.scan):
                break
        raise _TunerExitException  # ends the fit as the Tuner does: with teardown, without an error

    def _measure(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        run = partial(self._run, trainer, module, batch, index)
        if any(map(is_lazy, module.parameters())):
            run(nullcontext())  # makes them
        undo = Undo(module)
        exact: Any = None
        if not module.automatic_optimization:
            self._note(
                "Manual optimization: the step takes its gradients itself, so their error is not measured; and the "
                "bytes are those of all its forwards together, which need not be alive at once."
            )
        elif (exact := run(undo)[1]) is not None and (off := _error(run(undo)[1], exact) or 0.0) > 1e-3:
            self._note(
                f"The training step does not repeat itself: with the same weights, batch and random state its gradient "
                f"is {off:.1%} off. What it draws or changes besides is not undone, and is in the errors above."
            )
        number = self.profile.points[-1].step + 1 if self.profile.points else 0
        ledgers: dict[tuple[str, int], Ledger] = {}
        for (recipe, bits), compression in self.variants.items():
            ledger, gradient = run(undo, compression, exact is not None)
            error = None if gradient is None else _error(gradient, exact)
            ledgers[recipe, bits] = ledger
            sizes = ledger.raw_bytes, ledger.stored_bytes
            self.profile.points.append(Point(number, type(batch).__name__, bits, recipe, *sizes, error, ledger.work))
        if _raw(ledgers) > _raw(self.profile.ledgers):
            self.profile.ledgers = ledgers

    def _run(
        self,
        trainer: Trainer,
        module: LightningModule,
        batch: Any,
        index: int,
        undo: AbstractContextManager[Any],
        compression: compress_activations | None = None,
        differentiate: bool = True,
    ) -> tuple[Any, Any]:
        """The training step, once: its ledger, and the gradient where there is one."""
        with isolate_rng(), undo:
            arguments: tuple[Any, ...] = (_copied(batch),)
            if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2):
                arguments += (index,)
            with trainer.precision_plugin.train_step_context(), compression or nullcontext() as ledger:
                if compression is not None:
                    compression.hold(arguments)
                output = module.training_step(*arguments)
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if not (differentiate and module.automatic_optimization):
                return ledger, None
            if loss is None:
                self._note("A training step gave no loss: the error of its gradient is not measured.")
                return ledger, None
            parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
            try:  # not backward(): that would write to .grad and set off hooks
                gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
            except RuntimeError as error:
                if compression is not None or isinstance(error, torch.OutOfMemoryError):
                    raise
                self._note(f"The error of the gradient is not measured: torch.autograd.grad says: {error}")
                return ledger, None
            if all(part is None for part in gradient):
                self._note("The error of the gradient is not measured: a loss depends on no parameter that has one.")
                return ledger, None
            return ledger, gradient

    def _note(self, text: str) -> None:
        if text not in self.profile.notes:
            self.profile.notes.append(text)


@contextmanager
def _borrowed(trainer: Trainer, callback: Callback) -> Iterator[None]:
    """The Trainer with loops of its own, one callback and no logger; afterwards it is what it was."""
    kept = [(holder, dict(vars(holder))) for holder in (trainer, trainer.strategy, trainer._logger_connector)]
    trainer.state = copy.copy(trainer.state)
    trainer.fit_loop = _FitLoop(trainer, max_epochs=1)
    trainer.fit_loop.epoch_loop = _TrainingEpochLoop(trainer)
    trainer.callbacks = [callback]
    trainer.loggers = [DummyLogger()] if trainer.loggers else []  # a model may ask for its logger
    trainer.limit_val_batches = trainer.num_sanity_val_steps = 0
    try:
        yield
    finally:
        for holder, attributes in kept:
            refill(vars(holder), attributes)


def _batches(trainer: Trainer, module: LightningModule, first: Any) -> Iterator[Any]:
    """The epoch's batches on the device, the first of which is there already."""
    yield first
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None  # it is there as long as the fit
    while (fetched := next(fetcher, None)) is not None:
        batch = trainer.precision_plugin.convert_input(fetched[0])
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _copied(batch: Any) -> Any:
    """A copy, since a step may write to its batch; what can't be copied has to bear it."""
    try:
        return copy.deepcopy(batch)
    except Exception:
        return batch


def _settings(trainer: Trainer) -> dict[str, Any]:
    """Those settings of the Trainer's or its strategy's TinyKGCallback that are not varied here."""
    own = (*trainer.callbacks, getattr(trainer.strategy, "tinykg", None))
    compression = next((callback._compression for callback in own if isinstance(callback, TinyKGCallback)), None)
    names = ("group_size", "min_bytes", "modules", "recompute")
    return {name: getattr(compression, name) for name in names} if compression else {}


def _send_to_wandb(trainer: Trainer, profile: Profile) -> None:
    from lightning.pytorch.loggers import WandbLogger

    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            for name, rows in (("tinykg/profile", profile.rows()), ("tinykg/profile_curve", profile.curve())):
                if rows:
                    logger.log_table(name, columns=list(rows[0]), data=[list(row.values()) for row in rows])
            logger.log_image("tinykg/profile_plot", [profile.plot()])


def _error(gradient: Sequence[Tensor | None], exact: Sequence[Tensor | None]) -> float | None:
    """``|gradient - exact| / |exact|`` over all parameters; None where it is no number."""
    pairs = [(g, e) for g, e in zip(gradient, exact, strict=True) if g is not None and e is not None]
    difference = math.hypot(*(_norm(g - e) for g, e in pairs))
    norm = math.hypot(*(_norm(e) for _, e in pairs))
    error = difference / norm if norm else 0.0 if difference == 0 else math.inf
    return error if math.isfinite(error) else None


def _norm(tensor: Tensor) -> float:
    if tensor.is_sparse:
        tensor = tensor.coalesce().values()
    return float(torch.linalg.vector_norm(tensor.to(torch.promote_types(tensor.dtype, torch.float32))))


def _raw(ledgers: dict[tuple[str, int], Ledger]) -> int:
    return max((ledger.raw_bytes for ledger in ledgers.values()), default=-1)
