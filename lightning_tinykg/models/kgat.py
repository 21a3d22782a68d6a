"""KGAT: knowledge graph attention network for recommendation."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Data, HeteroData
from torch_geometric.nn import MessagePassing

from lightning_tinykg.arguments import check_choice, check_number, check_whole, check_wholes
from lightning_tinykg.data.batches import TripleBatch
from lightning_tinykg.data.graph import collaborative_graph
from lightning_tinykg.models.attention import RelationalAttention, RelationGroups
from lightning_tinykg.models.base import RankingModule, half_squared_norm
from lightning_tinykg.models.propagation import SortedEdges, SparseMatrix, is_watched, propagate

__all__ = ["KGAT", "Aggregator", "Attention", "KGATConv"]

Aggregator = Literal["bi-interaction", "sum", "concat"]
Attention = Literal["refresh", "frozen", "in-graph"]


class KGATConv(MessagePassing):  # type: ignore[misc]  # PyG is untyped here
    """One propagation layer of KGAT: a weighted sum of the neighbours, mixed with the node itself.

    With `e_N = sum_j w_ij e_j` (Wang et al., KDD 2019, arXiv 1905.07854, equations 3 and 6 to 8):

    - `bi-interaction`: `LeakyReLU(W1 (e + e_N)) + LeakyReLU(W2 (e * e_N))`,
    - `sum`: `LeakyReLU(W (e + e_N))`,
    - `concat`: `LeakyReLU(W [e, e_N])`,

    then message dropout. LeakyReLU's slope is 0.2, as in the authors' TensorFlow code.

    Args:
        in_channels: Width of the input.
        out_channels: Width of the output.
        aggregator: One of the three above.
        dropout: Probability with which an entry of the output is dropped in training.

    Example:
        >>> conv = KGATConv(4, 2)
        >>> conv(torch.randn(3, 4), torch.tensor([[1, 2], [0, 0]]), torch.tensor([0.5, 0.5])).shape
        torch.Size([3, 2])
    """

    def __init__(
        self, in_channels: int, out_channels: int, aggregator: Aggregator = "bi-interaction", dropout: float = 0.0
    ) -> None:
        super().__init__(aggr="add")
        self.aggregator, self.dropout = aggregator, dropout
        self.lin = nn.Linear(2 * in_channels if aggregator == "concat" else in_channels, out_channels)
        self.lin_product = nn.Linear(in_channels, out_channels) if aggregator == "bi-interaction" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier weights, zero biases."""
        for lin in (self.lin, self.lin_product):
            if lin is not None:
                nn.init.xavier_uniform_(lin.weight)
                nn.init.zeros_(lin.bias)

    def forward(self, x: Tensor, edge_index: Tensor, edge_weight: Tensor, matrix: SparseMatrix | None = None) -> Tensor:
        """Propagate once.

        Args:
            x: `[N, in_channels]`.
            edge_index: int64 `[2, E]`, row 0 the source, row 1 the receiver.
            edge_weight: `[E]`.
            matrix: The same edges and weights as a matrix, which is taken instead, in a fraction of the time: the
                weights get no gradient, and no message is made that hooks could see.

        Returns:
            `[N, out_channels]`.
        """
        if matrix is None:
            neighbours = self.propagate(edge_index, x=x, edge_weight=edge_weight)
        else:
            neighbours = propagate(x, matrix)
        if self.aggregator == "concat":
            out = F.leaky_relu(self.lin(torch.cat([x, neighbours], dim=-1)), 0.2)
        else:
            out = F.leaky_relu(self.lin(x + neighbours), 0.2)
        if self.lin_product is not None:
            out = out + F.leaky_relu(self.lin_product(x * neighbours), 0.2)
        return F.dropout(out, self.dropout, self.training)

    def message(self, x_j: Tensor, edge_weight: Tensor) -> Tensor:
        """The neighbour's row times the weight of the edge."""
        return edge_weight.unsqueeze(-1) * x_j


class KGAT(RankingModule):
    """KGAT (Wang et al., KDD 2019, arXiv 1905.07854) on the collaborative knowledge graph.

    Users, items and the other entities are nodes of one graph with edges in both directions. `layer_dims` layers of
    `KGATConv` propagate over it; a node's embedding is its own row and every layer's L2-normalised output, side by side
    (64 + 64 + 32 + 16 = 176 wide by default).

    **Training** alternates two phases, batch by batch as they come: a `BPRBatch` (or a sampled `HeteroData`) takes the
    ranking loss, a `TripleBatch` the TransR loss `softplus(g(h,r,t) - g(h,r,t'))`, `g = |W_r e_h + e_r - W_r e_t|^2`.
    One Adam serves both (the authors' code has one each, so its moments are kept apart there). In either phase some
    parameters have no gradient: under DDP use `strategy="ddp_find_unused_parameters_true"`.

    **Attention**, the weights of the edges:

    - `"refresh"`, as published: `pi(h,r,t)` of the node embeddings, recomputed without gradient at the start of every
      training epoch, and for every evaluation; the relation tables learn from TransR only. No edge-sized activation has
      to be kept.
    - `"frozen"`: the constant `1 / |edges of h with relation r|`, computed once. It is what the authors' TensorFlow
      code trains with (its refreshed attention never reaches the graph that is optimised), so it made their logs.
    - `"in-graph"`: recomputed in every layer from that layer's input, with gradient. The relation tables learn from the
      ranking too, at the price of edge-sized activations in every layer (see `RelationalAttention`). The first layer
      shares its tables with TransR, the others have their own.

    In a sampled graph the weights are those of the sampled edges, computed batch by batch.

    Logged besides what `RankingModule` logs: `train/triple_loss`.

    Args:
        dim: Width of the node embeddings.
        layer_dims: Width of each layer's output.
        relation_dim: Width of the relations' space.
        aggregator: `"bi-interaction"`, `"sum"` or `"concat"`, see `KGATConv`.
        attention: `"refresh"`, `"frozen"` or `"in-graph"`, see above.
        dropout: Message dropout, after every layer.
        lr: Adam's learning rate.
        l2: Weight of `(|u|^2 + |p|^2 + |n|^2) / 2` of the final embeddings, averaged over the batch.
        triple_l2: The same for the TransR phase, on the projected rows and the relation, as in the authors' code.
        k: Cut-off of Recall and NDCG, or several.
        num_users: Users; `None`: from the data module. So are the other three.
        num_items: Items, which are the first entities.
        num_entities: Entities of the knowledge graph, items included.
        num_relations: Relations of the knowledge graph, inverses and "interacts" not counted.

    Raises:
        ValueError: For an unknown `aggregator` or `attention`, or a `dropout` outside [0, 1).

    Example:
        >>> model = KGAT(num_users=3, num_items=2, num_entities=4, num_relations=1)
        >>> model.embedding    # entities first, then users
        Embedding(7, 64)
    """

    def __init__(
        self,
        dim: int = 64,
        layer_dims: Sequence[int] = (64, 32, 16),
        relation_dim: int = 64,
        aggregator: Aggregator = "bi-interaction",
        attention: Attention = "refresh",
        dropout: float = 0.1,
        lr: float = 1e-4,
        l2: float = 1e-5,
        triple_l2: float = 1e-5,
        k: int | Sequence[int] = 20,
        num_users: int | None = None,
        num_items: int | None = None,
        num_entities: int | None = None,
        num_relations: int | None = None,
    ) -> None:
        for name, value, choices in (("aggregator", aggregator, Aggregator), ("attention", attention, Attention)):
            check_choice(name, value, get_args(choices))
        check_whole("dim", dim, 1)
        check_whole("relation_dim", relation_dim, 1)
        check_wholes("layer_dims", layer_dims, 1)
        check_number("dropout", dropout, least=0, below=1)
        check_number("triple_l2", triple_l2, least=0)
        super().__init__(
            lr=lr,
            l2=l2,
            k=k,
            num_users=num_users,
            num_items=num_items,
            num_entities=num_entities,
            num_relations=num_relations,
        )
        self.dim, self.layer_dims, self.relation_dim = dim, tuple(layer_dims), relation_dim
        self.aggregator, self.attention, self.dropout, self.triple_l2 = aggregator, attention, dropout, triple_l2
        self.groups: RelationGroups | None = None
        self.edges: SortedEdges | None = None
        self._matrix: tuple[Tensor, int, SparseMatrix] | None = None  # of these weights, at this version
        self._is_refreshed = False
        self.edge_index: Tensor | None
        self.edge_weight: Tensor | None
        self.register_buffer("edge_index", None, persistent=False)
        self.register_buffer("edge_weight", None, persistent=False)
        self._build_if_sized()

    def build(self) -> None:
        """Create the node table, the layers and the relation tables."""
        relations = 2 * (self.num_relations + 1)  # "interacts" too, and every inverse
        self.embedding = self.node_table(self.dim)
        widths = [self.dim, *self.layer_dims]
        self.convs = nn.ModuleList(KGATConv(a, b, self.aggregator, self.dropout) for a, b in pairwise(widths))
        inputs = widths[:-1] if self.attention == "in-graph" else widths[:1]
        self.attentions = nn.ModuleList(RelationalAttention(relations, width, self.relation_dim) for width in inputs)

    def prepare(self, data: HeteroData) -> None:
        """Keep the collaborative knowledge graph's edges."""
        graph = collaborative_graph(data).to(self.device)
        self.edge_index = graph.edge_index
        self.groups = self._group(graph)
        self.edges = None if self.attention == "in-graph" else SortedEdges(graph.edge_index, graph.num_nodes)
        # refreshed before it is used; until then it is there, since copies of a model average buffers one by one
        self.edge_weight = None if self.attention == "in-graph" else self.groups.relation_mean()
        self._is_refreshed = False

    @staticmethod
    def _group(graph: Data) -> RelationGroups:
        # In KGAT the head receives. Of an edge j -> i of type r, i is the head in the inverse triple (i, r^-1, j), and
        # that is the triple TransR learns for i.
        inverse = (graph.edge_type + graph.num_relations // 2) % graph.num_relations
        return RelationGroups(graph.edge_index, inverse, graph.num_nodes, graph.num_relations)

    @torch.no_grad()
    def attend(self, x: Tensor, groups: RelationGroups) -> Tensor:
        """Edge weights without gradient, `[E]`, from node embeddings `[N, dim]`."""
        if self.attention == "frozen":
            return groups.relation_mean()
        weight: Tensor = self.attentions[0](x, groups)
        return weight

    def propagate(
        self,
        x: Tensor,
        edge_index: Tensor,
        groups: RelationGroups,
        edge_weight: Tensor | None,
        matrix: SparseMatrix | None = None,
    ) -> Tensor:
        """All layers: `[N, dim]` to `[N, dim + sum(layer_dims)]`; without `edge_weight` each layer computes its own."""
        outputs = [x]
        for index, conv in enumerate(self.convs):
            weight = self.attentions[index](x, groups) if edge_weight is None else edge_weight
            edge_by_edge = matrix is None or is_watched(conv, KGATConv)
            x = conv(x, edge_index, weight) if edge_by_edge else conv(x, edge_index, weight, matrix)
            outputs.append(F.normalize(x, dim=-1))
        return torch.cat(outputs, dim=-1)

    def embed(self) -> tuple[Tensor, Tensor]:
        """Embed the full graph: users `[num_users, D]`, entities `[num_entities, D]`, items first."""
        assert self.groups is not None
        assert self.edge_index is not None
        x = self.embedding.weight
        weight = self.edge_weight
        if self.attention == "refresh" and not (self.training and self._is_refreshed):
            # Evaluation sees the attention of the parameters it evaluates, whenever it takes place.
            weight = self.attend(x, self.groups)
            if self.training:
                self.edge_weight, self._is_refreshed = weight, True
        matrix = None if weight is None else self._as_matrix(weight)
        out = self.propagate(x, self.edge_index, self.groups, weight, matrix)
        return out[self.num_entities :], out[: self.num_entities]

    def _as_matrix(self, weight: Tensor) -> SparseMatrix:
        """The graph's matrix of these weights, which stay the same for an epoch at least."""
        assert self.edges is not None
        # a compiled graph knows no versions, and an inference tensor has none
        unknown = torch.compiler.is_compiling() or weight.is_inference()
        version = 0 if unknown else weight._version
        if self._matrix is None or self._matrix[0] is not weight or self._matrix[1] != version:
            self._matrix = weight, version, self.edges.weighted(weight)
        return self._matrix[2]

    def embed_sampled(self, batch: HeteroData) -> tuple[Tensor, Tensor]:
        """Embed the nodes of a sampled graph: users and entities, in the batch's numbering."""
        graph = collaborative_graph(batch)
        x = self.embedding(torch.cat([batch["entity"].n_id, batch["user"].n_id + self.num_entities]))
        groups = self._group(graph)
        weight = None if self.attention == "in-graph" else self.attend(x, groups)
        matrix = None if weight is None else SortedEdges(graph.edge_index, x.size(0)).weighted(weight)
        out = self.propagate(x, graph.edge_index, groups, weight, matrix)
        num_entities = batch["entity"].n_id.numel()
        return out[num_entities:], out[:num_entities]

    def on_train_epoch_start(self) -> None:
        """Refresh the attention, as the published algorithm does between epochs."""
        if self.attention == "refresh":
            assert self.groups is not None
            self.edge_weight, self._is_refreshed = self.attend(self.embedding.weight, self.groups), True

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        """The TransR loss of a `TripleBatch`; the ranking loss of any other."""
        if not isinstance(batch, TripleBatch):
            return super().training_step(batch, batch_idx)
        attention = cast(RelationalAttention, self.attentions[0])
        rows = attention.translate(self.embedding, batch)
        head, relation, tail, corrupted = rows
        translated = head + relation
        gap = (translated - tail).square().sum(dim=-1) - (translated - corrupted).square().sum(dim=-1)
        triple = F.softplus(gap).mean()
        loss = triple + self.triple_l2 * half_squared_norm(*rows)
        self.log("train/triple_loss", triple, batch_size=batch.head.numel())
        self.log("train/loss", loss, batch_size=batch.head.numel(), prog_bar=True)
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the epoch's attention: a fit resumed in mid-epoch goes on with it."""
        if self.attention == "refresh":
            checkpoint["kgat_attention"] = self.edge_weight if self._is_refreshed else None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the epoch's attention, where the graph is there to use it."""
        weight = checkpoint.get("kgat_attention")
        if weight is not None and self.has_graph:
            self.edge_weight, self._is_refreshed = weight.to(self.device), True
