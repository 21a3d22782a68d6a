"""Recommenders whose item embeddings depend on the user: training on pairs, and ranking without a table of items."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import BinaryAUROC, BinaryF1Score

from lightning_tinykg.arguments import check_choice
from lightning_tinykg.data.batches import BPRBatch, RankingBatch, TripleBatch
from lightning_tinykg.data.ctr import CTRBatch
from lightning_tinykg.models.base import RankingModule

__all__ = ["Loss", "PairModule"]

Loss = Literal["bce", "bpr"]


class PairModule(RankingModule):
    """A recommender that scores a pair of a user and an item, in which the item looks different to every user.

    So there is no table of item embeddings (`embed`) to rank by. A subclass gives the logits of some pairs (`score`)
    and those of all items for some users (`score_items`). The rest, and both protocols, are here:

    - **CTR** (`CTRDataModule`): a `CTRBatch` is trained by binary cross-entropy against its labels; evaluation logs the
      AUC and, at the threshold 0.5, the F1 of all pairs at once. (KGCN's authors average both over batches.)
    - **Full ranking** (`KGRecDataModule`): a `BPRBatch` is trained by `loss`, `"bce"` (the positive has label 1, the
      negative 0) or `"bpr"`; evaluation is that of `RankingModule`.

    To the loss come `l2 * penalty()` and whatever `regularise` returns.

    Logged: `train/loss`, `train/bce_loss` or `train/bpr_loss`, and what `regularise` names; `val/auc` and `val/f1`, or
    for each K `val/recall@K` and `val/ndcg@K`; the same of `test`.

    Args:
        loss: `"bce"` or `"bpr"`, for a `BPRBatch`.
        lr: Adam's learning rate.
        l2: Weight of the L2 penalty.
        k: Cut-off of Recall and NDCG, or several.
        num_users: Users; `None`: from the data module. So are the other three.
        num_items: Items, which are the first entities.
        num_entities: Entities of the knowledge graph, items included.
        num_relations: Relations of the knowledge graph, inverses and "interacts" not counted.

    Raises:
        ValueError: For an unknown `loss`.
    """

    def __init__(
        self,
        *,
        loss: Loss,
        lr: float,
        l2: float,
        k: int | Sequence[int] = 20,
        num_users: int | None = None,
        num_items: int | None = None,
        num_entities: int | None = None,
        num_relations: int | None = None,
    ) -> None:
        check_choice("loss", loss, get_args(Loss))
        super().__init__(
            lr=lr,
            l2=l2,
            k=k,
            num_users=num_users,
            num_items=num_items,
            num_entities=num_entities,
            num_relations=num_relations,
        )
        self.loss = loss
        self.auc, self.f1 = BinaryAUROC(), BinaryF1Score()
        self._labelled = False  # whether what is being evaluated are labelled pairs

    # -- what a subclass provides ------------------------------------------------------------------------------------

    def score(self, user: Tensor, item: Tensor) -> tuple[Tensor, Any]:
        """Logits of some pairs, differentiable.

        Args:
            user: int64 `[B]`.
            item: int64 `[B]`.

        Returns:
            Float `[B]`, and whatever `regularise` wants to know of how they were made.
        """
        raise NotImplementedError  # a model says how

    def score_items(self, user: Tensor) -> Tensor:
        """Logits of all items, float `[U, num_items]`, for users int64 `[U]`: what `score` gives, without gradient."""
        raise NotImplementedError  # a model says how

    def scorer(self) -> Callable[[Tensor], Tensor]:
        """`score_items`."""
        return self.score_items

    def penalty(self) -> Tensor:
        """What `l2` is the weight of, a scalar."""
        raise NotImplementedError  # a model says how

    def regularise(self, user: Tensor, item: Tensor, label: Tensor, made: Any) -> dict[str, tuple[float, Tensor]]:
        """Further losses by name, each with its weight; here none.

        Args:
            user: int64 `[B]`.
            item: int64 `[B]`.
            label: Float `[B]`.
            made: What `score` returned besides the logits.
        """
        return {}

    def embed(self) -> tuple[Tensor, Tensor]:
        """Refused, so that nothing ranks by embeddings that are not what is scored."""
        raise TypeError(
            f"{type(self).__name__} has no item embeddings: they depend on the user. It can't be an encoder of HQGNN; "
            "KGAT and LightGCN can"
        )

    # -- training ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        """The loss of a batch of labelled pairs, or of positives and negatives."""
        if isinstance(batch, CTRBatch):
            user, item, label = batch
            loss = "bce"
        elif isinstance(batch, BPRBatch):
            user = torch.cat([batch.user, batch.user])
            item = torch.cat([batch.positive, batch.negative])
            label = torch.arange(2, 0, -1, device=user.device).sub(1).float().repeat_interleave(batch.user.numel())
            loss = self.loss
        else:
            hint = "; give the data module triple_batch_size=None" if isinstance(batch, TripleBatch) else ""
            raise TypeError(f"{type(self).__name__} has no loss for a {type(batch).__name__}{hint}")
        logits, made = self.score(user, item)
        if loss == "bce":
            first = F.binary_cross_entropy_with_logits(logits, label)
        else:
            positive, negative = logits.chunk(2)
            first = F.softplus(negative - positive).mean()
        total = first + self.l2 * self.penalty()
        self.log(f"train/{loss}_loss", first, batch_size=user.numel())
        for name, (weight, value) in self.regularise(user, item, label, made).items():
            total = total + weight * value
            self.log(f"train/{name}", value, batch_size=user.numel())
        self.log("train/loss", total, batch_size=user.numel(), prog_bar=True)
        return total

    # -- evaluation --------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Forget the last evaluation. Nothing is embedded beforehand."""
        self._labelled = False
        self._reset_metrics()
        self.auc.reset()
        self.f1.reset()

    def validation_step(self, batch: CTRBatch | RankingBatch, batch_idx: int) -> None:
        """Update AUC and F1 with labelled pairs, or Recall and NDCG with a chunk of ranked users."""
        if isinstance(batch, CTRBatch):
            self._labelled = True
            # as probabilities: of logits the metrics guess, batch by batch, whether they are any
            probability = self.score(batch.user, batch.item)[0].sigmoid()
            self.auc.update(probability, batch.label.long())
            self.f1.update(probability, batch.label.long())
        else:
            self._rank(self.score_items(batch.user), batch)

    def _log_metrics(self, stage: str) -> None:
        if not self._labelled:
            super()._log_metrics(stage)
            return
        self.log_dict({f"{stage}/auc": self.auc.compute(), f"{stage}/f1": self.f1.compute()}, prog_bar=True)

    # -- for the user ------------------------------------------------------------------------------------------------

    def forward(self, user_ids: Tensor, item_ids: Tensor) -> Tensor:
        """Scores of some pairs; their sigmoid is the probability of an interaction.

        Args:
            user_ids: int64 `[B]`.
            item_ids: int64 `[B]`.

        Returns:
            Logits, float `[B]`; differentiable.
        """
        self._require_graph()
        return self.score(user_ids, item_ids)[0]
