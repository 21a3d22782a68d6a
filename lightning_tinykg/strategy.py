"""Strategies that train compressed, by name: ``Trainer(strategy="ddp_tinykg")``.

``import lightning_tinykg`` registers them. Each is one of Lightning's strategies that brings a
:class:`~lightning_tinykg.TinyKGCallback` with it: same options, same logging, same results, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)

from lightning_tinykg.bits import BitPlan, Schedule
from lightning_tinykg.callback import TinyKGCallback


class _Compressed:
    """What makes a strategy compress: it brings the callback with it.

    Args:
        args: what the strategy itself takes.
        bits: as for :class:`~lightning_tinykg.TinyKGCallback`, like all that follow.
        budget: bytes that a step may store; the bits are then chosen.
        group_size: elements that share a scale.
        seed: seed of the noise.
        min_bytes: what is smaller is kept as it is.
        recipe: ``"rules"`` or ``"paper"``.
        recompute: ``"cheap"``, ``"aggressive"`` or ``"off"``: what is made again instead of being kept.
        modules: where to compress.
        summary: whether to print the ledger at the end.
        kwargs: what the strategy itself takes.
    """

    lightning_module: Any

    def __init__(
        self,
        *args: Any,
        bits: int | Schedule | BitPlan = 8,
        budget: int | float | str | None = None,
        group_size: int | None = None,
        seed: int = 0,
        min_bytes: int = 1024,
        recipe: str = "rules",
        recompute: str = "cheap",
        modules: Sequence[str | type[torch.nn.Module]] | None = None,
        summary: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.tinykg = TinyKGCallback(
            bits,
            budget=budget,
            group_size=group_size,
            seed=seed,
            min_bytes=min_bytes,
            recipe=recipe,
            recompute=recompute,
            modules=modules,
            summary=summary,
        )
        """The callback that this strategy brings: its ledger, its settings."""

    def setup_environment(self) -> None:
        """Add the callback to the Trainer, before the callbacks are set up and restored.

        Raises:
            RuntimeError: if the Trainer has a ``TinyKGCallback`` already.
        """
        super().setup_environment()  # type: ignore[misc]  # Strategy's
        callbacks = self.lightning_module.trainer.callbacks
        if self.tinykg in callbacks:  # from an earlier fit
            return
        if any(isinstance(callback, TinyKGCallback) for callback in callbacks):
            raise RuntimeError(
                f"{type(self).__name__} compresses already, and the Trainer has a TinyKGCallback as well: "
                "take the callback out, and give its arguments to the strategy"
            )
        callbacks.insert(0, self.tinykg)


class TinyKGStrategy(_Compressed, SingleDeviceStrategy):
    """One device, compressed: ``Trainer(strategy="tinykg")``.

    Takes the arguments of :class:`~lightning_tinykg.TinyKGCallback` and of Lightning's ``SingleDeviceStrategy``.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_tinykg import TinyKGStrategy
        >>> trainer = L.Trainer(strategy=TinyKGStrategy(bits=2, summary=False), accelerator="cpu", max_steps=1,
        ...     logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer.fit(BoringModel())
        >>> int(trainer.callback_metrics["tinykg/bits"])
        2
    """

    @property
    def parallel_devices(self) -> list[torch.device]:
        """None of its own: by name, it takes the first that the Trainer has found."""
        return []

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device]) -> None:
        if len(devices) > 1:
            raise ValueError(
                f"strategy 'tinykg' trains on one device, got {len(devices)}: use 'ddp_tinykg', or devices=1"
            )
        if devices and self._root_device == torch.device("cpu"):
            self._root_device = devices[0]


class TinyKGDDPStrategy(_Compressed, DDPStrategy):
    """Data-parallel, compressed: ``ddp_tinykg``, ``ddp_tinykg_spawn``, ``ddp_tinykg_fork``, ``ddp_tinykg_notebook``.

    Each of them also with ``_find_unused_parameters_true`` behind it, which models that alternate between losses (KGAT)
    need. Takes the arguments of :class:`~lightning_tinykg.TinyKGCallback` and of Lightning's ``DDPStrategy``.
    """


class TinyKGFSDPStrategy(_Compressed, FSDPStrategy):
    """Fully sharded (FSDP 1), compressed: ``Trainer(strategy="fsdp_tinykg")``.

    Takes the arguments of :class:`~lightning_tinykg.TinyKGCallback` and of Lightning's ``FSDPStrategy``.
    """


class TinyKGModelParallelStrategy(_Compressed, ModelParallelStrategy):
    """Sharded by ``configure_model`` (FSDP 2, tensor parallel), compressed: ``model_parallel_tinykg``.

    Takes the arguments of :class:`~lightning_tinykg.TinyKGCallback` and of Lightning's ``ModelParallelStrategy``.
    """
