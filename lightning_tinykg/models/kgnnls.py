"""KGNN-LS: KGCN whose edge weights must also explain the labels of the items around."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch_geometric.data import HeteroData

from lightning_tinykg.arguments import check_number
from lightning_tinykg.data.ctr import NEGATIVE, sample_negatives
from lightning_tinykg.data.graph import INTERACTS
from lightning_tinykg.models.kgcn import KGCN, Aggregator, ReceptiveField
from lightning_tinykg.models.pairs import Loss

__all__ = ["KGNNLS"]

UNKNOWN = 0.5
"""Label of what is no training pair of the user."""


class KGNNLS(KGCN):
    """KGNN-LS (Wang et al., KDD 2019, arXiv 1905.04413): KGCN with label smoothness regularisation.

    To a user, the weights of KGCN make the knowledge graph a weighted graph, and neighbours in it should be liked
    alike. So the label of an item is predicted from those around it: training positives of the user have label 1,
    training negatives 0, all else 0.5; an unlabelled entity takes the weighted mean of its neighbours, `hops` times,
    and the item itself is treated as unlabelled wherever it turns up. The cross-entropy between the predicted and the
    true label, times `ls_weight`, is added to the loss; its gradient reaches the users and relations that the weights
    are made of. Scores are KGCN's. With one hop, only items that have items for neighbours learn anything from it.

    The training negatives are those of the `CTRDataModule`. The full-ranking protocol has no fixed ones: as many as
    there are positives are then sampled from each user's other items, once, with `neighbor_seed`.

    With `scaling="code"` labels are propagated as embeddings are (divided by `neighbors` at each hop), and the
    predicted label is taken for a logit, as in the authors' code (hwwang55/KGNN-LS, `model.py`); with `"paper"` it is
    the probability, kept 1e-6 away from 0 and 1.

    Logged besides what `PairModule` logs: `train/ls_loss`.

    Args:
        dim: Width of all embeddings.
        hops: Depth H of the receptive field.
        neighbors: Neighbours K of an entity.
        aggregator: `"sum"`, `"concat"` or `"neighbor"`, see `KGCNAggregator`.
        scaling: `"paper"` or `"code"`, see above and `KGCN`.
        ls_weight: Weight of the label smoothness.
        loss: `"bce"` or `"bpr"`, for the full-ranking protocol, see `PairModule`.
        lr: Adam's learning rate.
        l2: Weight of `|W|^2 / 2` of all embedding tables and aggregators' matrices.
        neighbor_seed: Seed of the sampled neighbours.
        k: Cut-off of Recall and NDCG, or several.
        num_users: Users; `None`: from the data module. So are the other three.
        num_items: Items, which are the first entities.
        num_entities: Entities of the knowledge graph, items included.
        num_relations: Relations of the knowledge graph, inverses and "interacts" not counted.

    Raises:
        ValueError: As `KGCN`, and for a negative `ls_weight`.

    Example:
        >>> KGNNLS(hops=2, num_users=3, num_items=2, num_entities=4, num_relations=1).ls_weight
        0.1
    """

    def __init__(
        self,
        dim: int = 16,
        hops: int = 1,
        neighbors: int = 8,
        aggregator: Aggregator = "sum",
        scaling: Literal["paper", "code"] = "paper",
        ls_weight: float = 0.1,
        loss: Loss = "bce",
        lr: float = 5e-4,
        l2: float = 1e-4,
        neighbor_seed: int = 0,
        k: int | Sequence[int] = 20,
        num_users: int | None = None,
        num_items: int | None = None,
        num_entities: int | None = None,
        num_relations: int | None = None,
    ) -> None:
        check_number("ls_weight", ls_weight, least=0)
        super().__init__(
            dim=dim,
            hops=hops,
            neighbors=neighbors,
            aggregator=aggregator,
            scaling=scaling,
            loss=loss,
            lr=lr,
            l2=l2,
            neighbor_seed=neighbor_seed,
            k=k,
            num_users=num_users,
            num_items=num_items,
            num_entities=num_entities,
            num_relations=num_relations,
        )
        self.ls_weight = ls_weight
        self.known: Tensor
        self.known_label: Tensor
        self.register_buffer("known", None, persistent=False)
        self.register_buffer("known_label", None, persistent=False)

    def prepare(self, data: HeteroData) -> None:
        """Sample the neighbours, and keep the labels of the training pairs, sorted by user and item."""
        super().prepare(data)
        positive = data[INTERACTS].edge_index.cpu()
        if NEGATIVE in data.edge_types:
            negative = data[NEGATIVE].edge_index.cpu()
        else:
            sizes = {"num_users": self.num_users, "num_items": self.num_items}
            negative = torch.from_numpy(sample_negatives(positive.numpy(), **sizes, seed=self.neighbor_seed))
        user, item = torch.cat([positive, negative], dim=1)
        label = torch.cat([torch.ones(positive.size(1)), torch.zeros(negative.size(1))])
        known, order = (user * self.num_entities + item).sort()
        self.known, self.known_label = known.to(self.device), label[order].to(self.device)

    def labels(self, user: Tensor, entity: Tensor) -> tuple[Tensor, Tensor]:
        """What is known of some entities.

        Args:
            user: int64 `[B]`.
            entity: int64 `[B, *]`.

        Returns:
            Labels, float `[B, *]`, 0.5 where nothing is known; and whether something is, bool `[B, *]`.
        """
        wanted = user.view(-1, *[1] * (entity.dim() - 1)) * self.num_entities + entity
        at = torch.searchsorted(self.known, wanted).clamp(max=self.known.numel() - 1)
        is_known = self.known[at] == wanted
        return self.known_label[at].where(is_known, UNKNOWN), is_known

    def predicted_labels(self, user: Tensor, field: ReceptiveField) -> Tensor:
        """The label of each pair's item, from those around it.

        Args:
            user: int64 `[B]`.
            field: The receptive field of the items.

        Returns:
            Float `[B]`, in [0, 1]; differentiable in the field's weights.
        """
        item = field.entities[0]
        label, fixed = [], []
        for entities in field.entities:
            value, is_known = self.labels(user, entities)
            is_known = is_known & (entities != item)  # the item's own label is held out
            label.append(value.where(is_known, UNKNOWN))
            fixed.append(is_known)
        for step in range(self.hops):
            label = [
                label[hop].where(fixed[hop], self._mean(field.weights[hop], label[hop + 1]))
                for hop in range(self.hops - step)
            ]
        return label[0].squeeze(1)

    def _mean(self, weight: Tensor, label: Tensor) -> Tensor:
        """Mean of the neighbours' labels: `[B, n, K]` and `[B, n * K]` to `[B, n]`."""
        around: Tensor = weight * label.unflatten(1, (-1, self.neighbors))
        return around.sum(dim=-1) * self.mix_scale

    def regularise(
        self, user: Tensor, item: Tensor, label: Tensor, made: ReceptiveField
    ) -> dict[str, tuple[float, Tensor]]:
        """The label smoothness."""
        predicted = self.predicted_labels(user, made)
        logit = predicted if self.scaling == "code" else predicted.logit(eps=1e-6)
        return {"ls_loss": (self.ls_weight, F.binary_cross_entropy_with_logits(logit, label))}
