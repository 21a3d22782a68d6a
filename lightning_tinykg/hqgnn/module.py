"""HQGNN: a graph recommender whose embeddings are trained to be few bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor, nn
from torch_geometric.data import HeteroData
from typing_extensions import override

from lightning_tinykg.arguments import check_choice, check_number, check_whole, check_wholes
from lightning_tinykg.bits.schedule import ConstantBits, Schedule, check_bits, from_dict
from lightning_tinykg.data.batches import BPRBatch
from lightning_tinykg.hqgnn import encoders
from lightning_tinykg.hqgnn.calibration import Calibration
from lightning_tinykg.hqgnn.delta import DeltaRule, Hessian, step_sizes
from lightning_tinykg.hqgnn.distillation import Teacher
from lightning_tinykg.hqgnn.quantized import Estimator, QuantizedRanking
from lightning_tinykg.hqgnn.quantizer import Clip, Quantizer
from lightning_tinykg.hqgnn.rotation import Rotate, Rotation
from lightning_tinykg.hqgnn.table import Granularity
from lightning_tinykg.hqgnn.tracking import define_best
from lightning_tinykg.models.base import SIZES, RankingModule
from lightning_tinykg.models.functional import bpr_loss, half_squared_norm

__all__ = ["HQGNN"]

DISTILLED_USERS = 1024
"""Users of a batch that the distillation looks at: each takes `teacher_top` rows of the item table."""


class HQGNN(QuantizedRanking):
    r"""Any graph encoder, a b-bit quantizer and the BPR loss (HQ-GNN, Chen et al., RecSys 2023, arXiv 2309.01032).

    The encoder embeds users and items; the item embeddings (and those of the users, with `quantize_users=True`) are
    rounded to `2**bits` levels, and the score is the dot product. By default users stay at full precision: in serving
    they are queries, which cost nothing to keep exact, and the catalogue is what has to be small.

    The gradient of the rounding is, by `estimator`:

    - `"gste"`: HQ-GNN's, `g_e = g_q (1 + delta sign(g_q) (e - q))`, see `hqgnn.gste`; `delta` comes from the Hessian
      of the loss at the batch's rows (`hessian`), anew in every `refresh_every`-th step;
    - `"ste"`: straight through;
    - `"ptq"`: none: training is at full precision, and only evaluation, `recommend` and `export` quantize.

    So a trained encoder goes through `Trainer.test(HQGNN(encoder, bits=4, estimator="ptq"), data)` as it is; and
    `Trainer.fit(HQGNN(encoder, bits=2), data)` fine-tunes it. `bits=32` is full precision.

    Two things that no ranking can see make the rounding better. Items are quantized as deviations from their mean
    (`center`): this shifts all of a user's scores by the same amount, and spends no level on what all items have in
    common. And users and items are rotated (`rotate`), which changes no dot product. Both are in what is exported.

    An encoder is a `RankingModule` of this package (`LightGCN`, `KGAT`), or any module whose `embed()`, or else
    `forward()`, takes no argument and returns `(users [num_users, d], items [num_items, d])`. The graph comes from the
    Trainer's data module. TransR batches, and whatever else is no ranking batch, go to the encoder's `training_step`.

    Under DDP the ranks' curvatures are averaged, and `delta` is the same on all; the clip is found on rank 0. With a
    schedule that begins at 32 bits, the clip has no gradient at first: give DDP `find_unused_parameters=True`.

    Logged: `train/loss`, `train/bpr_loss`, `train/distillation_loss`; `hqgnn/bits`, `hqgnn/clip`, and with GSTE
    `hqgnn/delta` and `hqgnn/trace` (mean of the Hessian's diagonal, in squared steps); `val/recall@K`, `val/ndcg@K` and
    the same of `test`; with them `hqgnn/quantization_error` (of the items, relative L2), `hqgnn/item_mib` and
    `hqgnn/embedding_mib` (users and items as they are scored, packed, scales included). Weights & Biases also gets the
    best Recall as its summary, and after a test the recall against bytes as a table and a picture.

    Args:
        encoder: The encoder, trained or not; or what a checkpoint says of it.
        bits: 1, 2, 4, 8, 32, or a schedule by optimizer steps or epochs. Evaluation takes the width in force.
        estimator: `"gste"`, `"ste"` or `"ptq"`.
        scale: What shares a scale: `"node"`, `"table"` or `"group"`.
        group_size: Dimensions in a group.
        clip: `"learned"` or `"ema"`, see `Quantizer`.
        calibration: How the clip is found at the start and where the width changes: `"mse"`, `"minmax"`,
            `"percentile"`, or `None`: what suits the scale, see `Quantizer`.
        quantize_users: Score quantized users.
        center: Quantize the items' deviations from their mean.
        rotate: `"itq"`, `"random"` or `"none"`, see `Rotation`; `None`: `"itq"`, and for a scale per table `"random"`.
        hessian: `"closed"`: the closed form for BPR; `"hutchinson"`: probes, for a subclass with another `loss`; a
            number: a fixed delta.
        refresh_every: Steps between two values of delta.
        distillation: Weight of the loss that keeps the ranking of the encoder as it was when the fit began.
        temperature: Of the distillation.
        teacher_top: Each user's best items by the teacher, which the distillation looks at.
        warm_start: Checkpoint to take the encoder's weights from.
        lr: Adam's learning rate; `None`: the encoder's, or 1e-3.
        quantizer_lr: That of the clip, relative to the clip's size.
        l2: Weight of the L2 penalty, of what the encoder says (`penalised`), at full precision; `None`: the encoder's,
            or 0.
        k: Cut-off of Recall and NDCG, or several.
        compare: Widths that a test also ranks, without training for them; 32 is full precision.
        seed: Of Hutchinson's probes.

    Raises:
        ValueError: If an argument has a value it can't have.

    Example:
        >>> from lightning_tinykg.models import LightGCN
        >>> encoder = LightGCN(dim=8, num_users=3, num_items=2, num_entities=4, num_relations=1)
        >>> HQGNN(encoder, bits=2).item_quantizer
        Quantizer(bits=2, scale='node', clip='learned', calibration='mse')
    """

    def __init__(
        self,
        encoder: nn.Module | Mapping[str, Any],
        bits: int | Schedule | Mapping[str, Any] = 4,
        estimator: Estimator = "gste",
        *,
        scale: Granularity = "node",
        group_size: int = 16,
        clip: Clip = "learned",
        calibration: Calibration | None = None,
        quantize_users: bool = False,
        center: bool = True,
        rotate: Rotate | None = None,
        hessian: Hessian = "closed",
        refresh_every: int = 1,
        distillation: float = 0.0,
        temperature: float = 1.0,
        teacher_top: int = 50,
        warm_start: str | Path | None = None,
        lr: float | None = None,
        quantizer_lr: float = 1e-3,
        l2: float | None = None,
        k: int | Sequence[int] = (20, 50),
        compare: Sequence[int] = (32,),
        seed: int = 0,
    ) -> None:
        check_choice("estimator", estimator, get_args(Estimator))
        check_number("distillation", distillation, least=0)
        check_number("temperature", temperature, above=0)
        check_whole("teacher_top", teacher_top, 1)
        if rotate is not None:
            check_choice("rotate", rotate, get_args(Rotate), " or None")
        for name, rate in (("lr", lr), ("quantizer_lr", quantizer_lr), ("l2", l2)):
            if rate is not None:
                check_number(name, rate, least=0)
        for width in check_wholes("compare", compare, 1):
            check_bits(width, "compare")
        made = encoders.make(encoder) if isinstance(encoder, Mapping) else encoder
        if not isinstance(made, nn.Module):
            raise ValueError(f"encoder must be a module, or the class path and arguments of one, got {encoder!r}")
        if warm_start is not None:
            made = encoders.warm_start(made, warm_start)
        ours = made if isinstance(made, RankingModule) else None
        sizes = {name: getattr(ours, name) for name in SIZES} if ours is not None and ours.is_built else {}
        inherited = (1e-3, 0.0) if ours is None else (ours.lr, ours.l2)
        super().__init__(lr=inherited[0] if lr is None else lr, l2=inherited[1] if l2 is None else l2, k=k, **sizes)
        self.encoder = made
        self.schedule = _schedule(bits)
        self.estimator, self.compare = estimator, tuple(compare)
        self.quantize_users, self.center, self.quantizer_lr = quantize_users, center, quantizer_lr
        self.distillation, self.temperature, self.teacher_top = distillation, temperature, teacher_top
        self.delta_rule = DeltaRule(hessian, refresh_every, seed)
        self.rotation = Rotation(rotate or ("random" if scale == "table" else "itq"), seed)
        self.quantizer_settings = {"scale": scale, "group_size": group_size, "calibration": calibration}
        start = self.schedule.bits_at(0)
        self.item_quantizer = Quantizer(start, clip=clip, **self.quantizer_settings)
        self.user_quantizer = Quantizer(start, clip=clip, **self.quantizer_settings)
        for quantizer, is_used in ((self.item_quantizer, True), (self.user_quantizer, quantize_users)):
            quantizer.requires_grad_(is_used and estimator != "ptq")  # DDP would wait for its gradient
        self.last_metrics = {}
        self._describe()
        self._build_if_sized()

    # -- training ----------------------------------------------------------------------------------------------------

    @override
    def on_fit_start(self) -> None:
        """Remember the encoder as it is, as the teacher, unless a checkpoint has brought it."""
        if self.distillation and self.teacher is None:
            with self._evaluating():
                self.teacher = Teacher(*encoders.embed(self.encoder, self.num_items), top=self.teacher_top)
        define_best(self.trainer, [f"val/{name}" for name in self.metrics])

    def on_train_epoch_start(self) -> None:
        """What the encoder does at that time: KGAT refreshes its attention."""
        hook = getattr(self.encoder, "on_train_epoch_start", None)
        if hook is not None:
            with encoders.lending_the_log(self.encoder, self):
                hook()

    def loss(self, users: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
        """The loss of scored rows, `[B, d]` each, to a scalar: BPR. With another, use `hessian="hutchinson"`."""
        return bpr_loss(users, positives, negatives)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        """The loss of one batch on quantized embeddings; a batch that is none of ranking goes to the encoder."""
        if not isinstance(batch, BPRBatch | HeteroData):
            step: Callable[[Any, int], STEP_OUTPUT] = self.encoder.training_step  # type: ignore[assignment]  # if it has one
            with encoders.lending_the_log(self.encoder, self):
                return step(batch, batch_idx)
        self._follow_schedule()
        if isinstance(batch, BPRBatch):
            self._require_graph()
            raw = encoders.embed(self.encoder, self.num_items)
            among = None
            place = ids = (batch.user, batch.positive, batch.negative)
        else:
            sampled = self.encoder.embed_sampled(batch)  # type: ignore[operator]  # not every encoder samples
            raw = sampled[0].float(), sampled[1].float()
            among = batch["entity"].n_id < self.num_items
            place = (batch["user"].src_index, batch["entity"].dst_pos_index, batch["entity"].dst_neg_index)
            names = (batch["user"].n_id, batch["entity"].n_id, batch["entity"].n_id)
            ids = tuple(n_id[local] for n_id, local in zip(names, place, strict=True))
        full = self._prepared(*raw, among)
        scored = self._quantized(*full)
        rows = (scored[0][place[0]], scored[1][place[1]], scored[1][place[2]])
        main = self.loss(*rows)
        exact = (raw[0][place[0]], raw[1][place[1]], raw[1][place[2]])
        penalised = self.encoder.penalised(*ids, exact) if isinstance(self.encoder, RankingModule) else exact
        loss = main + self.l2 * half_squared_norm(*penalised)
        if self.teacher is not None and isinstance(batch, BPRBatch):
            asked = slice(DISTILLED_USERS)  # the batch is shuffled: its first users are as good as any
            others = torch.cat([batch.positive[asked], batch.negative[asked]])[: 4 * self.teacher_top]
            teacher = self.teacher.to(self.device)
            term = teacher.loss(rows[0][asked], scored[1], batch.user[asked], others, self.temperature)
            loss = loss + self.distillation * term
            self.log("train/distillation_loss", term.detach(), batch_size=ids[0].numel())
        if self.estimator == "gste" and self.item_quantizer.bits < 32:
            if self.delta_rule.is_due(self.global_step):
                steps = [step_sizes(self.item_quantizer, full[1], at) for at in place[1:]]
                user_steps = step_sizes(self.user_quantizer, full[0], place[0]) if self.quantize_users else None
                found = self.delta_rule.refresh(
                    self.loss, rows, place, (user_steps, steps[0], steps[1]), self.global_step, self._mean_over_ranks
                )
                self.log("hqgnn/trace", found.trace)
            self.log("hqgnn/delta", self.delta_rule.delta)
        self.log("train/bpr_loss", main.detach(), batch_size=ids[0].numel())
        self.log("train/loss", loss.detach(), batch_size=ids[0].numel(), prog_bar=True)
        self.log("hqgnn/bits", float(self.item_quantizer.bits))
        self.log("hqgnn/clip", self.item_quantizer.clip_value())
        return loss

    def _follow_schedule(self) -> None:
        """Take the width of this step; where it is new, find the clip for it, and once the rotation: rank 0's."""
        if self.estimator == "ptq":
            return
        bits = self.schedule.bits_at(self.current_epoch if self.schedule.by == "epoch" else self.global_step)
        if bits == self.item_quantizer.bits and self.item_quantizer.calibrated:
            return
        self.item_quantizer.bits = self.user_quantizer.bits = bits
        with self._evaluating():
            if self.rotation.matrix is None:
                self._fit_rotation(*encoders.embed(self.encoder, self.num_items))
            self._calibrate(*self.full_precision())
        if self._trainer is not None and self.trainer.world_size > 1:
            share = self.trainer.strategy.broadcast
            self.rotation.matrix = share(self.rotation.matrix)
            for quantizer in (self.item_quantizer, self.user_quantizer):
                quantizer.log_clip.data.copy_(share(quantizer.log_clip.data))

    def _mean_over_ranks(self, values: Tensor) -> Tensor:
        if self._trainer is None or self.trainer.world_size == 1:
            return values
        mean = self.trainer.strategy.reduce(values, reduce_op="mean")
        assert isinstance(mean, Tensor)
        return mean

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam; the clips have a learning rate of their own."""
        clips = [p for q in (self.item_quantizer, self.user_quantizer) for p in q.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": list(self.encoder.parameters()), "lr": self.lr}]
        return torch.optim.Adam([*groups, {"params": clips, "lr": self.quantizer_lr}] if clips else groups)


def _schedule(bits: int | Schedule | Mapping[str, Any]) -> Schedule:
    if isinstance(bits, Schedule):
        return bits
    return from_dict(bits) if isinstance(bits, Mapping) else ConstantBits(bits)
