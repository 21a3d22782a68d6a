"""The baseline without parameters: every user gets the most popular items."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import HeteroData

from lightning_tinykg.models.base import RankingModule

__all__ = ["MostPopular"]


class MostPopular(RankingModule):
    """Scores an item by its number of training interactions. There is nothing to train: test it as it is.

    Args:
        k: Cut-off of Recall and NDCG, or several.
        num_users: Users; `None`: from the data module. So are the other three.
        num_items: Items, which are the first entities.
        num_entities: Entities of the knowledge graph, items included.
        num_relations: Relations of the knowledge graph, inverses and "interacts" not counted.
    """

    def __init__(
        self,
        k: int | Sequence[int] = 20,
        num_users: int | None = None,
        num_items: int | None = None,
        num_entities: int | None = None,
        num_relations: int | None = None,
    ) -> None:
        super().__init__(
            lr=0.0,
            l2=0.0,
            k=k,
            num_users=num_users,
            num_items=num_items,
            num_entities=num_entities,
            num_relations=num_relations,
        )
        self.popularity: Tensor
        self.register_buffer("popularity", None, persistent=False)
        self._build_if_sized()

    def build(self) -> None:
        """Nothing to create."""

    def prepare(self, data: HeteroData) -> None:
        """Count the training interactions of every item."""
        item = data["user", "interacts", "entity"].edge_index[1].to(self.device)
        self.popularity = item.bincount(minlength=self.num_items).float().unsqueeze(-1)

    def embed(self) -> tuple[Tensor, Tensor]:
        """Users `[num_users, 1]`, all ones, and items `[num_items, 1]`, their counts."""
        return torch.ones(self.num_users, 1, device=self.device), self.popularity

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing to learn."""

    def configure_optimizers(self) -> None:
        """No parameters, no optimizer."""
