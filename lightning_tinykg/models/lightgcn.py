"""LightGCN: the baseline that sees the interactions only."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch_geometric.data import HeteroData
from torch_geometric.nn.conv.gcn_conv import gcn_norm
from torch_geometric.nn.conv.lg_conv import LGConv
from torch_geometric.nn.models import LightGCN as Encoder
from torch_geometric.utils import to_undirected

from lightning_tinykg.arguments import check_whole
from lightning_tinykg.data.graph import collaborative_graph
from lightning_tinykg.models.base import RankingModule
from lightning_tinykg.models.propagation import SparseMatrix, is_watched, propagate, row_starts

__all__ = ["LightGCN"]


class LightGCN(RankingModule):
    """LightGCN (He et al., SIGIR 2020, arXiv 2002.02126): PyG's encoder on the user-item graph.

    Nodes are the items, then the users. The L2 penalty is on the rows of the embedding table, as published. The
    knowledge graph is not used, which makes it the baseline that tells what the graph is worth; `TripleBatch`es are
    refused, so give the data module `triple_batch_size=None`.

    Args:
        dim: Width of the embeddings.
        num_layers: Propagation layers; the final embedding is the mean of all layers and the table.
        lr: Adam's learning rate.
        l2: Weight of `(|u|^2 + |p|^2 + |n|^2) / 2` of the table's rows, averaged over the batch.
        k: Cut-off of Recall and NDCG, or several.
        num_users: Users; `None`: from the data module. So are the other three.
        num_items: Items, which are the first entities.
        num_entities: Entities of the knowledge graph, items included.
        num_relations: Relations of the knowledge graph, inverses and "interacts" not counted.

    Example:
        >>> model = LightGCN(dim=8, num_users=3, num_items=2, num_entities=4, num_relations=1)
        >>> model.encoder
        LightGCN(5, 8, num_layers=3)
    """

    def __init__(
        self,
        dim: int = 64,
        num_layers: int = 3,
        lr: float = 1e-3,
        l2: float = 1e-4,
        k: int | Sequence[int] = 20,
        num_users: int | None = None,
        num_items: int | None = None,
        num_entities: int | None = None,
        num_relations: int | None = None,
    ) -> None:
        check_whole("dim", dim, 1)
        check_whole("num_layers", num_layers)
        super().__init__(
            lr=lr,
            l2=l2,
            k=k,
            num_users=num_users,
            num_items=num_items,
            num_entities=num_entities,
            num_relations=num_relations,
        )
        self.dim, self.num_layers = dim, num_layers
        self.edge_index: Tensor
        self.edge_weight: Tensor
        self.edge_start: Tensor
        self.register_buffer("edge_index", None, persistent=False)
        self.register_buffer("edge_weight", None, persistent=False)
        self.register_buffer("edge_start", None, persistent=False)
        self._build_if_sized()

    def build(self) -> None:
        """Create PyG's encoder; the normalised weights are computed once instead of in every layer."""
        self.encoder = Encoder(self.num_items + self.num_users, self.dim, self.num_layers, normalize=False)

    @staticmethod
    def _normalise(edge_index: Tensor, num_nodes: int) -> tuple[Tensor, Tensor]:
        edge_index = to_undirected(edge_index, num_nodes=num_nodes)
        index, weight = gcn_norm(edge_index, num_nodes=num_nodes, add_self_loops=False)
        return index, weight

    def prepare(self, data: HeteroData) -> None:
        """Keep the user-item graph and its symmetrically normalised weights."""
        user, item = data["user", "interacts", "entity"].edge_index.to(self.device)
        edges = torch.stack([user + self.num_items, item])
        num_nodes = self.num_items + self.num_users
        self.edge_index, self.edge_weight = self._normalise(edges, num_nodes)
        self.edge_start = row_starts(self.edge_index[0], num_nodes)

    def embed(self) -> tuple[Tensor, Tensor]:
        """Embed the full graph: users `[num_users, dim]`, items `[num_items, dim]`.

        By a sparse matrix, unless somebody has hooks in PyG's layers, or layers of his own: then these are called.
        """
        if any(is_watched(conv, LGConv) for conv in self.encoder.convs):
            out = self.encoder.get_embedding(self.edge_index, self.edge_weight)
        else:
            matrix = SparseMatrix.symmetric(self.edge_start, self.edge_index[1], self.edge_weight)
            x = self.encoder.embedding.weight
            out = x * self.encoder.alpha[0]
            for alpha in self.encoder.alpha[1:]:
                x = propagate(x, matrix)
                out = out + alpha * x
        return out[self.num_items :], out[: self.num_items]

    def embed_sampled(self, batch: HeteroData) -> tuple[Tensor, Tensor]:
        """Embed the nodes of a sampled graph, with the degrees of the sampled graph."""
        entity, user = batch["entity"].n_id, batch["user"].n_id
        # An entity that is no item has no row here and no edge in the user-item graph, so any row will do.
        x = self.encoder.embedding(torch.cat([entity.clamp(max=self.num_items - 1), user + self.num_items]))
        graph = collaborative_graph(batch)
        interacts = graph.edge_type % (graph.num_relations // 2) == 0  # from users and, inverted, from items
        edge_index, weight = self._normalise(graph.edge_index[:, interacts], x.size(0))
        out = x * self.encoder.alpha[0]
        for conv, alpha in zip(self.encoder.convs, self.encoder.alpha[1:], strict=True):
            x = conv(x, edge_index, weight)
            out = out + alpha * x
        return out[entity.numel() :], out[: entity.numel()]

    def penalised(
        self, user: Tensor, positive: Tensor, negative: Tensor, rows: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """The rows of the embedding table, before propagation."""
        return tuple(self.encoder.embedding(ids) for ids in (user + self.num_items, positive, negative))
