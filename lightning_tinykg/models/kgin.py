"""KGIN: knowledge graph-based intent network."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import HeteroData
from torch_geometric.nn import MessagePassing
from torch_geometric.typing import OptTensor

from lightning_tinykg.arguments import check_number, check_whole
from lightning_tinykg.data.graph import collaborative_graph
from lightning_tinykg.models.base import RankingModule
from lightning_tinykg.models.functional import distance_correlation

__all__ = ["KGIN", "KGINConv", "RelationalPaths"]


class RelationalPaths(MessagePassing):  # type: ignore[misc]  # PyG is untyped here
    """The mean over the neighbours, each times its relation's row: `mean_(r, v) e_r * e_v`.

    Example:
        >>> x, relation = torch.tensor([[1.0], [3.0], [0.0]]), torch.tensor([[2.0], [4.0]])
        >>> RelationalPaths()(x, torch.tensor([[0, 1], [2, 2]]), relation)[2]
        tensor([7.])
    """

    def __init__(self) -> None:
        super().__init__(aggr="mean")

    def forward(
        self, x: Tensor, edge_index: Tensor, relation: Tensor | None = None, size: tuple[int, int] | None = None
    ) -> Tensor:
        """Aggregate once.

        Args:
            x: `[N, D]`.
            edge_index: int64 `[2, E]`, row 0 the source, row 1 the receiver.
            relation: `[E, D]`, the row of each edge's relation; `None`: of ones.
            size: How many sources and receivers there are, if they are not the same nodes.

        Returns:
            `[N, D]`, or as many rows as there are receivers; 0 where no edge arrives.
        """
        out: Tensor = self.propagate(edge_index, x=x if size is None else (x, None), relation=relation, size=size)
        return out

    def message(self, x_j: Tensor, relation: OptTensor) -> Tensor:
        """The neighbour's row times that of the relation."""
        return x_j if relation is None else x_j * relation


class KGINConv(nn.Module):
    """One layer of KGIN: entities hear along relations, users hear from their items, by what they intend.

    With intents `e_p` and `beta(u, p) = softmax_p(e_p . e_u)` (section 3.2):

    - `e_v' = mean_(r, w) e_r * e_w` over the entity's edges,
    - `e_u' = (1 + sum_p beta(u, p) e_p) * mean_i e_i` over the user's items. The 1 is from the authors' code.

    Then dropout, and rows of length 1, as there.

    Args:
        dropout: Probability with which an entry of the output is dropped in training.
    """

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.to_entities, self.to_users = RelationalPaths(), RelationalPaths()

    def forward(
        self, entities: Tensor, users: Tensor, intents: Tensor, relation: Tensor, related: Tensor, clicked: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Propagate once.

        Args:
            entities: `[num_entities, D]`.
            users: `[num_users, D]`.
            intents: `[P, D]`.
            relation: `[E, D]`, of each edge between entities the row of its relation.
            related: int64 `[2, E]`, these edges.
            clicked: int64 `[2, I]`, edges from entities to users.

        Returns:
            Entities and users, in the same shapes.
        """
        heard = self.to_users(entities, clicked, size=(entities.size(0), users.size(0)))
        weight = (users @ intents.t()).softmax(dim=-1)
        outputs = self.to_entities(entities, related, relation), heard + heard * (weight @ intents)
        entities, users = (F.normalize(F.dropout(x, self.dropout, self.training), dim=-1) for x in outputs)
        return entities, users


class KGIN(RankingModule):
    """KGIN (Wang et al., WWW 2021, arXiv 2102.07314): intents made of relations, and relations along the paths.

    An intent is an attentive mean of the relations' rows, `e_p = sum_r softmax_r(a_rp) e_r` (section 3.1), the same for
    all users; each user weighs the intents (see `KGINConv`). A node's embedding is the sum of its own row and of every
    layer's output. Intents are told apart by a penalty: of the two that the paper proposes, the distance correlation of
    each pair.

    Relations count in both directions, each with a row of its own; "interacts" is none of them. `TripleBatch`es are
    refused, so give the data module `triple_batch_size=None`.

    Logged besides what `RankingModule` logs: `train/independence`, the penalty before its weight.

    Args:
        dim: Width of the embeddings.
        num_layers: How many.
        num_intents: How many.
        dropout: Message dropout, after every layer.
        edge_dropout: Share of the edges that are left out of a training step, drawn anew in each ("node dropout").
        independence: Weight of the intents' distance correlation.
        lr: Adam's learning rate.
        l2: Weight of `(|u|^2 + |p|^2 + |n|^2) / 2` of the final embeddings, averaged over the batch.
        k: Cut-off of Recall and NDCG, or several.
        num_users: Users; `None`: from the data module. So are the other three.
        num_items: Items, which are the first entities.
        num_entities: Entities of the knowledge graph, items included.
        num_relations: Relations of the knowledge graph, inverses and "interacts" not counted.

    Raises:
        ValueError: For a `dropout` or `edge_dropout` outside [0, 1), fewer than one intent, a negative `independence`,
            or a graph without relations.

    Example:
        >>> model = KGIN(dim=8, num_users=3, num_items=2, num_entities=4, num_relations=1)
        >>> model.intents().shape
        torch.Size([4, 8])
    """

    def __init__(
        self,
        dim: int = 64,
        num_layers: int = 3,
        num_intents: int = 4,
        dropout: float = 0.1,
        edge_dropout: float = 0.5,
        independence: float = 1e-4,
        lr: float = 1e-4,
        l2: float = 1e-5,
        k: int | Sequence[int] = 20,
        num_users: int | None = None,
        num_items: int | None = None,
        num_entities: int | None = None,
        num_relations: int | None = None,
    ) -> None:
        for name, share in (("dropout", dropout), ("edge_dropout", edge_dropout)):
            check_number(name, share, least=0, below=1)
        check_number("independence", independence, least=0)
        for name, value, least in (("dim", dim, 1), ("num_layers", num_layers, 0), ("num_intents", num_intents, 1)):
            check_whole(name, value, least)
        super().__init__(
            lr=lr,
            l2=l2,
            k=k,
            num_users=num_users,
            num_items=num_items,
            num_entities=num_entities,
            num_relations=num_relations,
        )
        self.dim, self.num_layers, self.num_intents = dim, num_layers, num_intents
        self.dropout, self.edge_dropout, self.independence = dropout, edge_dropout, independence
        self.related: Tensor
        self.relation_of: Tensor
        self.clicked: Tensor
        for name in ("related", "relation_of", "clicked"):
            self.register_buffer(name, None, persistent=False)
        self._build_if_sized()

    def build(self) -> None:
        """Create the tables of nodes and relations, what intents are made of, and the layers."""
        if self.num_relations < 1:
            raise ValueError("num_relations must be at least 1, since intents are made of relations, got 0")
        self.embedding = self.node_table(self.dim)
        self.relation = nn.Embedding(2 * self.num_relations, self.dim)
        self.attention = nn.Parameter(torch.empty(self.num_intents, 2 * self.num_relations))
        for table in (self.relation.weight, self.attention):
            nn.init.xavier_uniform_(table)
        self.convs = nn.ModuleList(KGINConv(self.dropout) for _ in range(self.num_layers))

    def prepare(self, data: HeteroData) -> None:
        """Keep the edges between entities, in both directions, and those from items to users."""
        self.related, self.relation_of, self.clicked = (edges.to(self.device) for edges in self._edges(data))

    @staticmethod
    def _edges(data: HeteroData) -> tuple[Tensor, Tensor, Tensor]:
        """Edges between entities and their relation, and edges from entities to users, in each one's numbering."""
        graph = collaborative_graph(data)
        base = graph.num_relations // 2
        relation = graph.edge_type % base - 1  # of "interacts" -1
        between = relation >= 0
        inverted = graph.edge_type >= base
        clicked = graph.edge_index[:, inverted & ~between]
        relation_of = (relation + inverted * (base - 1))[between]
        clicked = torch.stack([clicked[0], clicked[1] - graph.num_entities])
        return graph.edge_index[:, between], relation_of, clicked

    def intents(self) -> Tensor:
        """The intents' embeddings, `[num_intents, dim]`."""
        return self.attention.softmax(dim=-1) @ self.relation.weight

    def propagate(
        self, entities: Tensor, users: Tensor, related: Tensor, relation_of: Tensor, clicked: Tensor
    ) -> tuple[Tensor, Tensor]:
        """All layers: users and entities, the sum of each one's own row and every layer's output."""
        if self.training and self.edge_dropout:
            kept = self._kept(related)
            related, relation_of = related[:, kept], relation_of[kept]
            clicked = clicked[:, self._kept(clicked)]
        relation, intents = self.relation(relation_of), self.intents()
        all_users, all_entities = users, entities
        for conv in self.convs:
            entities, users = conv(entities, users, intents, relation, related, clicked)
            all_users, all_entities = all_users + users, all_entities + entities
        return all_users, all_entities

    def _kept(self, edges: Tensor) -> Tensor:
        """Which edges are not dropped: always as many, so that a GPU is not waited for."""
        count = edges.size(1)
        return torch.randperm(count, device=edges.device)[: count - int(self.edge_dropout * count)].sort().values

    def embed(self) -> tuple[Tensor, Tensor]:
        """Embed the full graph: users `[num_users, dim]`, entities `[num_entities, dim]`, items first."""
        entities, users = torch.split(self.embedding.weight, [self.num_entities, self.num_users])
        return self.propagate(entities, users, self.related, self.relation_of, self.clicked)

    def embed_sampled(self, batch: HeteroData) -> tuple[Tensor, Tensor]:
        """Embed the nodes of a sampled graph: users and entities, in the batch's numbering."""
        entities, users = self.embedding(batch["entity"].n_id), self.embedding(batch["user"].n_id + self.num_entities)
        return self.propagate(entities, users, *self._edges(batch))

    def regularizer(self) -> Tensor:
        """The intents' distance correlation, weighted."""
        correlation = distance_correlation(self.intents())
        self.log("train/independence", correlation, batch_size=1)
        return self.independence * correlation
