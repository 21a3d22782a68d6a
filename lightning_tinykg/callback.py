"""``TinyKGCallback``: one line in a Trainer, and training keeps its activations in a few bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeGuard

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_tinykg import tracking
from lightning_tinykg.activations import Ledger, compress_activations
from lightning_tinykg.activations.ledger import MIB
from lightning_tinykg.activations.modules import check_modules, check_plan
from lightning_tinykg.bits import BitPlan, Schedule


class TinyKGCallback(Callback):
    """Keep what autograd saves during training in 8, 4, 2 or 1 bits.

    It wraps the strategy's ``training_step`` in :class:`~lightning_tinykg.compress_activations`, so it covers the
    forward, the loss and, under manual optimization, everything in between, on every rank, and works with any
    module, loss, precision and number of optimizers. Validation, testing and prediction are not touched. The module
    is not modified: it can be copied, pickled and saved at any time. The wrapper is taken off at the end of the fit
    and when it fails.

    **Logged metrics**, to any logger each ``log_every_n_steps``, and to ``trainer.callback_metrics``, which also has
    those of an epoch's last step:

    - ``tinykg/bits``: the width in force; of a plan, that of what no entry names; under a budget, the mean.
    - ``tinykg/raw_mib``: what the uncompressed graph would keep alive between forward and backward, MiB.
    - ``tinykg/stored_mib``: what is kept instead, all metadata included, MiB.
    - ``tinykg/ratio``: the first over the second.
    - ``tinykg/predicted_error``: under a budget, the error of the gradient that is expected, relative to its norm.
    - ``tinykg/peak_mib``: on CUDA, the allocator's peak since the fit began, MiB.

    At the end of the fit it prints where the bytes were, by module and op, and sends that table and a plot of it to
    Weights & Biases if there is a ``WandbLogger``.

    Args:
        bits: width of what is rounded: 1, 2, 4 or 8; 32 uses lossless forms only, and gradients are those of an
            uncompressed run to the last bit. The default, 8, is safe for any model; the paper's headline is 2. Or a
            schedule, which goes by optimizer steps (batches after which an optimizer stepped, however many there are)
            or epochs; or a plan of widths and schedules by module and by what was saved.
        budget: bytes that a training step may store between forward and backward: a number, a text such as
            ``"512MiB"`` or ``"10%"``, or a fraction of the raw bytes. The bits are then chosen, tensor by tensor, so
            that the gradient's variance is the least, and ``bits`` is not used. Chosen in the first step of each kind
            (type of batch), which is kept at 8 bits, and again after 100, 1,000 and each further 10,000: such a step
            runs its backward three times for each tensor that is rounded. Needs automatic optimization.
        group_size: consecutive elements that share a scale and a zero point. None: 64, or 32 at 1 and 2 bits.
        seed: seed of the rounding's private noise. Steps and ranks draw different noise from it.
        min_bytes: tensors smaller than this are kept as they are.
        recipe: ``"rules"``, or ``"paper"`` for TinyKG to the letter.
        recompute: what is made again in the backward instead of being kept: ``"cheap"``, what is worth its time;
            ``"aggressive"``, all that can be, for the least memory; ``"off"``, nothing.
        modules: where to compress, by module path (wildcards allowed), class name or class; ``!`` excludes. None:
            everywhere.
        summary: whether to print the table at the end of the fit.

    Raises:
        ValueError: if an argument has a value it can't have.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_tinykg import TinyKGCallback
        >>> trainer = L.Trainer(callbacks=[TinyKGCallback(bits=2, summary=False)], max_steps=1, logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel())
        >>> int(trainer.callback_metrics["tinykg/bits"])
        2
    """

    def __init__(
        self,
        bits: int | Schedule | BitPlan = 8,
        *,
        budget: int | float | str | None = None,
        group_size: int | None = None,
        seed: int = 0,
        min_bytes: int = 1024,
        recipe: str = "rules",
        recompute: str = "cheap",
        modules: Sequence[str | type[torch.nn.Module]] | None = None,
        summary: bool = True,
    ) -> None:
        self.summary = summary
        self.ledger: Ledger | None = None
        """What the last training step kept."""
        self.largest: Ledger | None = None
        """What the step kept that would have kept most: the one that decides whether a model fits."""
        self._compression = compress_activations(
            bits,
            budget=budget,
            group_size=group_size,
            seed=seed,
            min_bytes=min_bytes,
            recipe=recipe,
            recompute=recompute,
            modules=modules,
        )
        self._compression.optimizer_steps = 0
        self._begun: int | None = None  # the noise's step at which the batch began that is being trained on
        self._global_step = 0  # the Trainer's at that time
        self._bits = 0.0  # in force in the last step

    @property
    def bits(self) -> int:
        """The width in force; in a plan, that of what no entry names."""
        return self._compression.bits

    @property
    def plan(self) -> BitPlan:
        """Which bits where; under a budget, in a step of the kind of the last."""
        return self._compression.plan if self._compression.planner is None else self._compression.plan_in_force

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap the strategy's training step.

        Raises:
            TypeError: if the Trainer is that of the ``pytorch_lightning`` package.
            RuntimeError: if another ``TinyKGCallback`` has wrapped it already.
        """
        if not isinstance(trainer, Trainer):
            raise TypeError(
                f"TinyKGCallback is a callback of lightning.pytorch.Trainer, got a {type(trainer).__module__}.Trainer: "
                "write `from lightning.pytorch import Trainer, LightningModule` instead of importing from "
                f"{type(trainer).__module__.partition('.')[0]}"
            )
        if stage != "fit":
            return
        strategy = trainer.strategy
        if _is_ours(strategy.__dict__.get("training_step")):
            raise RuntimeError("a Trainer takes one TinyKGCallback, got two: put their settings into one")
        self.ledger = self.largest = self._begun = None
        self._compression.root = pl_module
        self._compression.rank = trainer.global_rank
        if (planner := self._compression.planner) is not None:
            planner.agree = strategy.broadcast
            planner.most = partial(_largest, strategy) if trainer.world_size > 1 else None
        step = partial(_compressed_step, self, strategy.training_step)
        strategy.training_step = step  # type: ignore[method-assign]  # hides the class's until it is deleted

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse ``modules`` and layers of a plan that the module, now complete, has none of; declare the curves.

        Raises:
            ValueError: if one of them matches no module.
            RuntimeError: if there is a budget, and no loss to choose the bits by.
        """
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                tracking.begin(logger)
        check_modules(self._compression.modules or (), pl_module)
        check_plan(self._compression.plan, pl_module)
        if self._compression.planner is not None and not pl_module.automatic_optimization:
            raise RuntimeError(
                "TinyKGCallback(budget=...) chooses the bits by the loss that training_step returns: it needs "
                "automatic optimization, got a module with automatic_optimization=False: give bits instead"
            )

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the wrapper off."""
        if stage == "fit":
            self._unwrap(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the wrapper off: after an exception there is no teardown.

        A batch that was begun will be begun again by who resumes from here, and then with the same noise.
        """
        self._unwrap(trainer)
        if self._begun is not None:
            self._compression.step, self._begun = self._begun, None

    def _unwrap(self, trainer: Trainer) -> None:
        strategy = trainer.strategy
        wrapped = strategy.__dict__.get("training_step")
        if _is_ours(wrapped) and wrapped.args[0] is self:
            del strategy.__dict__["training_step"]
            if getattr(wrapped.args[1], "__self__", None) is not strategy:  # another tool's wrapper
                strategy.training_step = wrapped.args[1]  # type: ignore[method-assign]  # hides the class's again: it was there before us
        self._compression.root = None

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the step of the noise, in case that the batch is not finished, and what schedules go by."""
        self._begun = self._compression.step
        self._global_step = trainer.global_step
        self._compression.epoch = trainer.current_epoch

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what the step kept, and count it if an optimizer stepped."""
        self._begun = None
        if trainer.global_step > self._global_step:  # by two, with two optimizers
            assert self._compression.optimizer_steps is not None
            self._compression.optimizer_steps += 1
        if self.ledger is None:
            return
        if self.largest is None or self.ledger.raw_bytes > self.largest.raw_bytes:
            self.largest = self.ledger
        # to log is a third of a millisecond for each metric, so no step does that nobody reads; Lightning's own
        # callbacks ask in the same way whether loggers are to hear of a step
        last = trainer.is_last_batch or trainer.global_step == trainer.max_steps
        if not (last or trainer._logger_connector.should_update_logs):
            return
        metrics = {
            "tinykg/bits": self._bits,
            "tinykg/raw_mib": self.ledger.raw_bytes / MIB,
            "tinykg/stored_mib": self.ledger.stored_bytes / MIB,
            "tinykg/ratio": self.ledger.ratio,
        }
        if self._compression.planner is not None:
            metrics["tinykg/predicted_error"] = self._compression.planner.now.predicted
        if pl_module.device.type == "cuda":
            metrics["tinykg/peak_mib"] = torch.cuda.max_memory_allocated(pl_module.device) / MIB
        pl_module.log_dict(metrics, on_step=True, on_epoch=False, rank_zero_only=True, batch_size=1)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the ledger of the largest step; send it, and a plan, to Weights & Biases."""
        if self.largest is None or not trainer.is_global_zero:
            return
        if self.summary:
            rank_zero_info(f"\n{self.largest}")
        chosen = bool(self._compression.plan.entries) or self._compression.planner is not None
        for logger in trainer.loggers:
            tracking.finish(logger, self.largest, self.plan if chosen else None)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The counters that noise and schedules are made from: a resumed run goes on where it stopped."""
        return self._compression.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self._compression.load_state_dict(state_dict)


def _is_ours(step: Any) -> TypeGuard[partial[Any]]:
    return isinstance(step, partial) and step.func is _compressed_step


def _compressed_step(callback: TinyKGCallback, training_step: Any, *args: Any, **kwargs: Any) -> Any:
    """The strategy's training step, in the context. A plain ``with``: whatever happens in it, it is left."""
    compression = callback._compression
    if compression.planner is not None:
        compression.planner.kind = type(args[0]).__name__ if args else ""
    callback._bits = compression.mean_bits
    with compression as callback.ledger:
        compression.hold(args, kwargs)
        output = training_step(*args, **kwargs)
    if compression.planner is not None:
        assert compression.root is not None
        loss = output.get("loss") if isinstance(output, Mapping) else output
        compression.plan_for(loss, compression.root.parameters())
    return output


def _largest(strategy: Strategy, value: int) -> int:
    """The largest of the ranks' values."""
    return int(strategy.reduce(torch.tensor(value, device=strategy.root_device), reduce_op="max"))
