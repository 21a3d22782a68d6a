"""Ranking with quantized embeddings: an encoder and its quantizers, evaluated, recommending and described."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData
from typing_extensions import override

from lightning_tinykg.bits.schedule import Schedule
from lightning_tinykg.data.batches import RankingBatch
from lightning_tinykg.hqgnn import encoders, tracking
from lightning_tinykg.hqgnn.curve import Point, Rival
from lightning_tinykg.hqgnn.delta import DeltaRule
from lightning_tinykg.hqgnn.distillation import Teacher
from lightning_tinykg.hqgnn.quantizer import Quantizer
from lightning_tinykg.hqgnn.rotation import Rotation
from lightning_tinykg.hqgnn.table import QuantizedTable
from lightning_tinykg.models.base import RankingModule

__all__ = ["Estimator", "QuantizedRanking"]

Estimator = Literal["gste", "ste", "ptq"]

MIB = 2**20


class QuantizedRanking(RankingModule):
    """What `HQGNN` is when it is not being trained: its embeddings, metrics, tables of codes and checkpoints."""

    encoder: nn.Module
    estimator: Estimator
    item_quantizer: Quantizer
    user_quantizer: Quantizer
    rotation: Rotation
    delta_rule: DeltaRule
    quantize_users: bool
    center: bool
    compare: tuple[int, ...]
    teacher: Teacher | None = None
    quantizer_settings: dict[str, Any]

    last_metrics: dict[str, float]
    """Of the last test, such as `"recall@20"`."""
    points: tuple[Point, ...] = ()
    """Recall against bytes: what the last test ranked, this module first."""
    _rivals: tuple[Rival, ...] = ()
    _raw: tuple[Tensor, Tensor] | None = None
    _full: tuple[Tensor, Tensor] | None = None

    # -- the encoder -------------------------------------------------------------------------------------------------

    @override
    def save_hyperparameters(self, *args: Any, ignore: Any = None, frame: Any = None, logger: bool = True) -> None:
        """All but the encoder, which is described instead (see `encoders.describe`), and what it was loaded from."""
        current = inspect.currentframe()
        frame = frame or (current and current.f_back)
        dropped = ["encoder", "warm_start", *([ignore] if isinstance(ignore, str) else ignore or [])]
        super().save_hyperparameters(*args, ignore=dropped, frame=frame, logger=logger)

    def _describe(self) -> None:
        """Write into the hyper-parameters, in plain values, what this module can be made again from."""
        description = encoders.describe(self.encoder)
        if description is not None:
            self.hparams["encoder"] = description
        if isinstance(self.hparams.get("bits"), Schedule):
            self.hparams["bits"] = self.hparams["bits"].to_dict()

    @override
    def build(self) -> None:
        """Nothing to create: the parameters are the encoder's, and the clips."""

    @override
    def prepare(self, data: HeteroData) -> None:
        """Nothing to keep: the encoder has its graph."""

    @override
    def set_graph(self, data: HeteroData) -> None:
        """Use this graph, and give it to the encoder if it takes one (`set_graph`)."""
        if isinstance(self.encoder, RankingModule) or hasattr(self.encoder, "set_graph"):
            self.encoder.set_graph(data)  # type: ignore[operator]  # nn.Module: any attribute
        super().set_graph(data)
        self._describe()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the teacher, and what the encoder keeps."""
        if self.teacher is not None:
            checkpoint["hqgnn_teacher"] = self.teacher.state_dict()
        if hasattr(self.encoder, "on_save_checkpoint"):
            self.encoder.on_save_checkpoint(checkpoint)  # type: ignore[operator]  # nn.Module: any attribute

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore them."""
        if "hqgnn_teacher" in checkpoint:
            self.teacher = Teacher.from_state_dict(checkpoint["hqgnn_teacher"])
        if hasattr(self.encoder, "on_load_checkpoint"):
            self.encoder.on_load_checkpoint(checkpoint)  # type: ignore[operator]  # nn.Module: any attribute

    # -- embeddings --------------------------------------------------------------------------------------------------

    def full_precision(self) -> tuple[Tensor, Tensor]:
        """Users `[num_users, d]` and items `[num_items, d]` as the quantizers get them: centred and rotated.

        Their dot products are the encoder's scores, but for a constant per user.
        """
        self._require_graph()
        return self._prepared(*encoders.embed(self.encoder, self.num_items))

    def _prepared(self, users: Tensor, items: Tensor, among: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.item_quantizer.bits == 32 or (self.estimator == "ptq" and self.training):
            return users, items
        return self.rotation(users), self.rotation(self._centred(items, among))

    def _centred(self, items: Tensor, among: Tensor | None = None) -> Tensor:
        """Deviations from the mean; `among`: which rows are items, where not all are."""
        return items - (items if among is None else items[among]).mean(dim=0) if self.center else items

    def _fit_rotation(self, users: Tensor, items: Tensor) -> None:
        self.rotation.fit(self._centred(items), self.item_quantizer)

    @override
    def embed(self) -> tuple[Tensor, Tensor]:
        """Users and items as they are scored: `[num_users, d]` and `[num_items, d]`."""
        self._require_graph()
        return self._quantized(*self._ready(*encoders.embed(self.encoder, self.num_items)))

    def _ready(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Prepared for the quantizers, which are made ready for them where training does not do it."""
        if (self.estimator == "ptq" and not self.training) or not self.item_quantizer.calibrated:
            self._fit_rotation(users, items)
            self._calibrate(*self._prepared(users, items))
        return self._prepared(users, items)

    def _quantized(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        if self.estimator == "ptq" and self.training:
            return users, items
        delta = self.delta_rule.delta if self.estimator == "gste" else None
        return self.user_quantizer(users, delta) if self.quantize_users else users, self.item_quantizer(items, delta)

    def _calibrate(self, users: Tensor, items: Tensor) -> None:
        self.item_quantizer.calibrate(items)
        self.user_quantizer.calibrate(users)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Without gradient and in evaluation mode."""
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(was_training)

    # -- serving -----------------------------------------------------------------------------------------------------

    def tables(self) -> tuple[QuantizedTable, QuantizedTable]:
        """Users and items as codes; of the items, the table that is scored, to the last bit.

        That of the users is scored with `quantize_users=True`. Else it is there for who wants to serve from codes only,
        with a range found for the users as they are now.

        Raises:
            ValueError: At 32 bits, where there are no codes.
            RuntimeError: If there is no graph yet.
        """
        self._require_graph()
        with self._evaluating():
            users, items = self._ready(*encoders.embed(self.encoder, self.num_items))
            if not self.quantize_users:
                self.user_quantizer.calibrate(users)
            return self.user_quantizer.encode(users), self.item_quantizer.encode(items)

    def user_embeddings(self) -> Tensor:
        """Users at full precision, float32 `[num_users, d]`: what is scored unless `quantize_users`."""
        self._require_graph()
        with self._evaluating():
            return self._ready(*encoders.embed(self.encoder, self.num_items))[0]

    def export(self, directory: str | Path, **options: Any) -> Any:
        """Write what a service needs to a folder: packed codes, ids, seen items, a card.

        If the Trainer has a `WandbLogger`, the folder becomes an artifact of its run too, `hqgnn-index`.

        Args:
            directory: The folder.
            options: Those of `lightning_tinykg.hqgnn.index.export`.

        Returns:
            The index, loaded from there: a `LowBitIndex`.
        """
        from lightning_tinykg.hqgnn.index import export

        index = export(self, directory, **options)
        if self._trainer is not None:
            tracking.send_index(self.trainer, Path(directory), index.card)
        return index

    # -- evaluation --------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Embed the graph once for the whole evaluation."""
        self.metrics.reset()
        self._raw = encoders.embed(self.encoder, self.num_items)
        self._full = self._ready(*self._raw)
        self._embedded = self._quantized(*self._full)

    def on_test_epoch_start(self) -> None:
        """As `on_validation_epoch_start`; and quantize to the other widths that the test is to rank."""
        self.on_validation_epoch_start()
        assert self._raw is not None
        self._rivals = tuple(self._rival(bits, *self._raw) for bits in self.compare)

    def _rival(self, bits: int, users: Tensor, items: Tensor) -> Rival:
        name = "fp32" if bits == 32 else f"ptq {bits} bits"
        nbytes = self._bytes(bits, bits, users, items)
        if bits < 32:
            quantizers = [Quantizer(bits, **self.quantizer_settings).to(items.device).eval() for _ in range(2)]
            rotation = Rotation(self.rotation.kind, self.rotation.seed)
            items = self._centred(items)
            rotation.fit(items, quantizers[1])
            for quantizer in quantizers:
                quantizer.calibrated = False
            users, items = rotation(users), quantizers[1](rotation(items))
            users = quantizers[0](users) if self.quantize_users else users
        return Rival(name, sum(nbytes), users, items, deepcopy(self.metrics))

    def _bytes(self, user_bits: int, item_bits: int, users: Tensor, items: Tensor) -> tuple[int, int]:
        """Of users and items, as they are scored at these widths."""
        widths = (user_bits if self.quantize_users else 32, item_bits)
        user, item = (Quantizer(bits, **self.quantizer_settings) for bits in widths)
        return user.table_bytes(*users.shape), item.table_bytes(*items.shape)

    def test_step(self, batch: RankingBatch, batch_idx: int) -> None:
        """Rank, by each of them."""
        super().test_step(batch, batch_idx)
        for rival in self._rivals:
            rival.update(batch, self.max_k)

    def _log_metrics(self, stage: str) -> None:
        found = {name: float(value) for name, value in self.metrics.compute().items()}
        super()._log_metrics(stage)
        assert self._full is not None
        users, items = self._full
        self._full = self._raw = None
        user_bytes, item_bytes = self._bytes(self.user_quantizer.bits, self.item_quantizer.bits, users, items)
        self.log("hqgnn/quantization_error", self.item_quantizer.error(items))
        self.log("hqgnn/item_mib", item_bytes / MIB)
        self.log("hqgnn/embedding_mib", (user_bytes + item_bytes) / MIB)
        if stage == "test":
            self.last_metrics = found
            bits = self.item_quantizer.bits
            own = Point("fp32" if bits == 32 else f"{self.estimator} {bits} bits", user_bytes + item_bytes, found)
            rivals = [rival.point() for rival in self._rivals]
            self.points = (own, *(point for point in rivals if point.name != own.name))
            self._rivals = ()
            tracking.send_curve(self.trainer, self.points, next(iter(found)))
