"""KGCN: knowledge graph convolutional networks, which see every item through the user's eyes."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from lightning_tinykg.arguments import check_choice, check_whole
from lightning_tinykg.data.neighbor_table import neighbor_table
from lightning_tinykg.models.pairs import Loss, PairModule

__all__ = ["KGCN", "Aggregator", "KGCNAggregator", "ReceptiveField"]

Aggregator = Literal["sum", "concat", "neighbor"]

# Floats in a temporary of the full ranking: 2^22 are 16 MiB.
_FLOATS = 1 << 22


class KGCNAggregator(nn.Module):
    """Mixes an entity with its neighbourhood (Wang et al., WWW 2019, arXiv 1904.12575, equations 4 to 6).

    With `v_N` the neighbourhood, a weighted sum of the neighbours:

    - `sum`: `act(W (v + v_N) + b)`,
    - `concat`: `act(W [v, v_N] + b)`,
    - `neighbor`: `act(W v_N + b)`.

    Args:
        dim: Width.
        aggregator: One of the three above.
        activation: The authors' code has ReLU, and tanh in the last layer.

    Example:
        >>> aggregate = KGCNAggregator(4, "concat", nn.Tanh())
        >>> aggregate(torch.randn(3, 4), torch.randn(3, 4)).shape
        torch.Size([3, 4])
    """

    def __init__(self, dim: int, aggregator: Aggregator, activation: nn.Module) -> None:
        super().__init__()
        self.aggregator, self.activation = aggregator, activation
        self.lin = nn.Linear(2 * dim if aggregator == "concat" else dim, dim)
        nn.init.xavier_uniform_(self.lin.weight)
        nn.init.zeros_(self.lin.bias)

    def forward(self, x: Tensor, neighbourhood: Tensor) -> Tensor:
        """Both `[*, dim]`, as is the result."""
        if self.aggregator == "sum":
            x = x + neighbourhood
        elif self.aggregator == "concat":
            x = torch.cat([x, neighbourhood], dim=-1)
        else:
            x = neighbourhood
        out: Tensor = self.activation(self.lin(x))
        return out


class ReceptiveField(NamedTuple):
    """What an item's embedding is made of, hop by hop.

    Attributes:
        entities: The item, its neighbours, theirs, ...: int64, `[B, K^h]` for hop h = 0..H.
        weights: Of each entity's neighbours to the user, `[B, K^h, K]` for hop h = 0..H-1; they sum to 1.

    Example:
        >>> ReceptiveField([torch.zeros(2, 1), torch.zeros(2, 4)], [torch.full((2, 1, 4), 0.25)]).weights[0].shape
        torch.Size([2, 1, 4])
    """

    entities: list[Tensor]
    weights: list[Tensor]


class KGCN(PairModule):
    """KGCN (Wang et al., WWW 2019, arXiv 1904.12575) on a fixed number of sampled neighbours.

    Every entity has `neighbors` neighbours, sampled once (`neighbor_table`). To the user `u`, the neighbour that the
    relation `r` leads to has the weight `pi(u, r) = softmax_j(u . r_j)`, a softmax over the entity's neighbours. An
    entity's next embedding mixes its own with the weighted sum of its neighbours' (`KGCNAggregator`), `hops` times; the
    score of an item is `u . v_u`, its probability the sigmoid of it.

    Training follows the dense layout of the authors' code: `[B, K^h, dim]` of gathered rows, by hop. PyG's sparse
    message passing has nothing to offer here, as every pair has a neighbourhood of its own, with as many neighbours as
    any other. A weight depends on the user and the relation only, so all of a user's are one row of `[B, R]`, from
    which they are gathered: no relation's embedding is copied for an edge.

    The **full ranking** is exact, not sampled, and does not go through `K^h`: an entity's embedding after h hops
    depends on the user and the entity only, so for a few users at a time all entities are taken one hop further, and
    then the next, in pieces of some 16 MiB.

    The paper and its code (hwwang55/KGCN, `aggregators.py`) differ: the code has means where the formulas have sums, so
    `u . r` is divided by `dim`, and the neighbourhood by `neighbors`. `scaling="code"` does the same. With it and the
    authors' L2 the neighbours count for little, and what lives on them (`aggregator="neighbor"`, two hops) may not
    train at all; `"paper"` is the formulas.

    Args:
        dim: Width of all embeddings.
        hops: Depth H of the receptive field.
        neighbors: Neighbours K of an entity.
        aggregator: `"sum"`, `"concat"` or `"neighbor"`, see `KGCNAggregator`.
        scaling: `"paper"` or `"code"`, see above.
        loss: `"bce"` or `"bpr"`, for the full-ranking protocol, see `PairModule`.
        lr: Adam's learning rate.
        l2: Weight of `|W|^2 / 2` of all embedding tables and aggregators' matrices, as in the authors' code.
        neighbor_seed: Seed of the sampled neighbours.
        k: Cut-off of Recall and NDCG, or several.
        num_users: Users; `None`: from the data module. So are the other three.
        num_items: Items, which are the first entities.
        num_entities: Entities of the knowledge graph, items included.
        num_relations: Relations of the knowledge graph, inverses and "interacts" not counted.

    Raises:
        ValueError: For an unknown `aggregator`, `scaling` or `loss`, or a `hops` or `neighbors` that is not positive.

    Example:
        >>> model = KGCN(num_users=3, num_items=2, num_entities=4, num_relations=1)
        >>> model.relation    # one more: an entity without neighbours is its own
        Embedding(2, 16)
    """

    def __init__(
        self,
        dim: int = 16,
        hops: int = 1,
        neighbors: int = 8,
        aggregator: Aggregator = "sum",
        scaling: Literal["paper", "code"] = "paper",
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
        check_choice("aggregator", aggregator, get_args(Aggregator))
        check_choice("scaling", scaling, ("paper", "code"))
        for name, value in (("dim", dim), ("hops", hops), ("neighbors", neighbors)):
            check_whole(name, value, 1)
        check_whole("neighbor_seed", neighbor_seed)
        super().__init__(
            loss=loss,
            lr=lr,
            l2=l2,
            k=k,
            num_users=num_users,
            num_items=num_items,
            num_entities=num_entities,
            num_relations=num_relations,
        )
        self.dim, self.hops, self.neighbors, self.aggregator = dim, hops, neighbors, aggregator
        self.scaling, self.neighbor_seed = scaling, neighbor_seed
        self.score_scale = 1 / dim if scaling == "code" else 1.0
        self.mix_scale = 1 / neighbors if scaling == "code" else 1.0
        self.neighbor: Tensor
        self.neighbor_relation: Tensor
        self.register_buffer("neighbor", None, persistent=False)
        self.register_buffer("neighbor_relation", None, persistent=False)
        self._build_if_sized()

    def build(self) -> None:
        """Create the tables of users, entities and relations, and an aggregator for each hop."""
        self.user = nn.Embedding(self.num_users, self.dim)
        self.entity = nn.Embedding(self.num_entities, self.dim)
        self.relation = nn.Embedding(self.num_relations + 1, self.dim)
        for table in (self.user, self.entity, self.relation):
            nn.init.xavier_uniform_(table.weight)
        self.aggregators = nn.ModuleList(
            KGCNAggregator(self.dim, self.aggregator, nn.Tanh() if hop == self.hops - 1 else nn.ReLU())
            for hop in range(self.hops)
        )

    def prepare(self, data: HeteroData) -> None:
        """Sample the neighbours."""
        table = neighbor_table(data, size=self.neighbors, seed=self.neighbor_seed)
        self.neighbor, self.neighbor_relation = (part.to(self.device) for part in table)

    def penalty(self) -> Tensor:
        """Half the squared norm of all tables and matrices; biases are free."""
        weights = [self.user.weight, self.entity.weight, self.relation.weight]
        weights += [parameter for name, parameter in self.aggregators.named_parameters() if name.endswith("weight")]
        return torch.stack([weight.square().sum() for weight in weights]).sum() / 2

    def likes(self, user: Tensor) -> Tensor:
        """How much each user, of embeddings `[B, dim]`, heeds each relation: `u . r`, `[B, R + 1]`."""
        return user @ self.relation.weight.t() * self.score_scale

    def receptive_field(self, user: Tensor, item: Tensor) -> ReceptiveField:
        """The neighbours of the items, hop by hop, and their weights to the users.

        Args:
            user: Embeddings, `[B, dim]`.
            item: int64 `[B]`.
        """
        likes = self.likes(user)
        entities, weights = [item.unsqueeze(1)], []
        for _ in range(self.hops):
            relation = self.neighbor_relation[entities[-1]].flatten(1)
            score = likes.gather(1, relation).unflatten(1, (-1, self.neighbors))
            weights.append(score.softmax(dim=-1))
            entities.append(self.neighbor[entities[-1]].flatten(1))
        return ReceptiveField(entities, weights)

    def score(self, user: Tensor, item: Tensor) -> tuple[Tensor, ReceptiveField]:
        """Logits `[B]` of users and items, int64 `[B]` each, and the receptive field they come from."""
        u = self.user(user)
        field = self.receptive_field(u, item)
        x = [self.entity(ids) for ids in field.entities]
        for index, aggregator in enumerate(self.aggregators):
            x = [
                aggregator(x[hop], self._mix(field.weights[hop], x[hop + 1].unflatten(1, (-1, self.neighbors))))
                for hop in range(self.hops - index)
            ]
        return (u * x[0].squeeze(1)).sum(dim=-1), field

    def _mix(self, weight: Tensor, x: Tensor) -> Tensor:
        """Weighted sum over the neighbours: `[*, K]` and `[*, K, dim]` to `[*, dim]`."""
        return (weight * self.mix_scale).unsqueeze(-2).matmul(x).squeeze(-2)

    @torch.no_grad()
    def score_items(self, user: Tensor) -> Tensor:
        """Logits of all items, `[U, num_items]`, for users int64 `[U]`."""
        widest = self.num_entities if self.hops > 1 else self.num_items
        users_at_once = max(_FLOATS // (widest * self.dim), 1)
        return torch.cat([self._score_items(self.user(part)) for part in torch.split(user, users_at_once)])

    def _score_items(self, u: Tensor) -> Tensor:
        # Entities first and users last: a softmax over the middle is many times as fast as one over a short last row.
        likes = self.likes(u).t().contiguous()
        x: Tensor = self.entity.weight  # the same to every user before the first hop, [N, U, dim] from then on
        rows_at_once = max(_FLOATS // (u.size(0) * self.neighbors * self.dim), 1)
        for index, aggregator in enumerate(self.aggregators):
            wanted = self.num_items if index == self.hops - 1 else self.num_entities
            parts = []
            for start in range(0, wanted, rows_at_once):
                rows = slice(start, min(start + rows_at_once, wanted))
                weight = likes[self.neighbor_relation[rows]].softmax(dim=1) * self.mix_scale  # [n, K, U]
                around = x[self.neighbor[rows]]
                if index == 0:
                    mixed = weight.transpose(1, 2) @ around
                    parts.append(aggregator(x[rows].unsqueeze(1).expand_as(mixed), mixed))
                else:
                    parts.append(aggregator(x[rows], torch.einsum("nku,nkud->nud", weight, around)))
            x = torch.cat(parts)
        return (x * u).sum(dim=-1).t()
