"""Training steps on a random graph: what the benchmarks run.

All but ``kgat-package`` are written in the plain ops that people write them in, and none is adapted to compression.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector
from torch_geometric.data import HeteroData
from torch_geometric.nn import GATConv, RGCNConv
from torch_geometric.utils import scatter, softmax

from lightning_tinykg import KGAT as PackageKGAT
from lightning_tinykg.data import BPRBatch


@dataclass
class Step:
    """A model and a loss that is made of it.

    Attributes:
        model: the module; its parameters get the gradient.
        loss: one forward pass, from the module to the loss.
    """

    model: nn.Module
    loss: Callable[[], Tensor]

    def gradient(self, context: AbstractContextManager[Any] | None = None) -> tuple[Tensor, Any]:
        """One step, with the same dropout masks each time.

        Returns:
            The gradient of all parameters, end to end, and what the context gave.
        """
        self.model.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        with context or nullcontext() as given:
            loss = self.loss()
        loss.backward()
        return parameters_to_vector([p.grad for p in self.model.parameters() if p.grad is not None]), given


@dataclass(frozen=True)
class Graph:
    """A random graph: uniform ends, as many relations as you like, and BPR triples (user, positive, negative)."""

    num_nodes: int
    edge_index: Tensor
    edge_type: Tensor
    num_relations: int
    triples: Tensor

    @classmethod
    def random(cls, nodes: int, edges: int, relations: int = 20, triples: int = 2048, seed: int = 0) -> Graph:
        """Draw one."""
        generator = torch.Generator().manual_seed(seed)

        def draw(high: int, *size: int) -> Tensor:
            return torch.randint(high, size, generator=generator)

        return cls(nodes, draw(nodes, 2, edges), draw(relations, edges), relations, draw(nodes, 3, triples))

    def to(self, device: torch.device) -> Graph:
        """The same on a device."""
        moved = (self.edge_index.to(device), self.edge_type.to(device))
        return Graph(self.num_nodes, *moved, self.num_relations, self.triples.to(device))


def bpr(embedding: Tensor, triples: Tensor) -> Tensor:
    """The BPR loss of dot products."""
    user, positive, negative = (embedding[i] for i in triples)
    return -F.logsigmoid((user * positive).sum(-1) - (user * negative).sum(-1)).mean()


class KGAT(nn.Module):
    """KGAT with attention in the graph: edge by edge, from each layer's input, with gradient."""

    def __init__(self, graph: Graph, dim: int, layers: int) -> None:
        super().__init__()
        self.graph = graph
        self.nodes = nn.Parameter(torch.empty(graph.num_nodes, dim))
        self.relations = nn.Parameter(torch.empty(graph.num_relations, dim))
        self.sums = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))
        self.products = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))
        nn.init.xavier_uniform_(self.nodes)
        nn.init.xavier_uniform_(self.relations)

    def attention(self, x: Tensor) -> Tensor:
        source, target = self.graph.edge_index
        score = (x[source] * torch.tanh(x[target] + self.relations[self.graph.edge_type])).sum(-1)
        weight: Tensor = softmax(score, target, num_nodes=x.shape[0])
        return weight

    def forward(self) -> Tensor:
        source, target = self.graph.edge_index
        x: Tensor = self.nodes
        outputs = [x]
        for linear_sum, linear_product in zip(self.sums, self.products, strict=True):
            message = self.attention(x)[:, None] * x[source]
            around = torch.zeros_like(x, dtype=message.dtype).index_add(0, target, message)
            x = F.leaky_relu(linear_sum(x + around)) + F.leaky_relu(linear_product(x * around))
            x = F.dropout(x, 0.1, self.training)
            outputs.append(F.normalize(x))
        return torch.cat(outputs, dim=1)


class KGATOnce(KGAT):
    """The same with one attention, of the node embeddings, for all layers."""

    def forward(self) -> Tensor:
        weight = self.attention(self.nodes)
        self.attention = lambda x: weight  # type: ignore[method-assign]  # hides the class's until it is deleted
        try:
            return super().forward()
        finally:
            del self.attention


class GAT(nn.Module):
    """Layers of PyG's GATConv with four heads, LayerNorm, ELU and dropout."""

    def __init__(self, graph: Graph, dim: int, layers: int) -> None:
        super().__init__()
        self.graph = graph
        self.nodes = nn.Parameter(torch.randn(graph.num_nodes, dim))
        self.convs = nn.ModuleList(GATConv(dim, dim // 4, heads=4, dropout=0.1) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))

    def forward(self) -> Tensor:
        x: Tensor = self.nodes
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.dropout(F.elu(norm(conv(x, self.graph.edge_index))), 0.1, self.training)
        return x


class RGCN(nn.Module):
    """Layers of PyG's RGCNConv, four bases."""

    def __init__(self, graph: Graph, dim: int, layers: int) -> None:
        super().__init__()
        self.graph = graph
        self.nodes = nn.Parameter(torch.randn(graph.num_nodes, dim) * 0.1)
        self.convs = nn.ModuleList(RGCNConv(dim, dim, graph.num_relations, num_bases=4) for _ in range(layers))

    def forward(self) -> Tensor:
        x: Tensor = self.nodes
        for conv in self.convs:
            x = conv(x, self.graph.edge_index, self.graph.edge_type).relu()
        return x


class KGCN(nn.Module):
    """KGCN: a receptive field of sampled neighbours, two hops of eight, from embedding tables."""

    def __init__(self, graph: Graph, dim: int, hops: int = 2, neighbours: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        size = (graph.num_nodes, neighbours)
        self.neighbour: Tensor
        self.relation_of: Tensor
        self.register_buffer("neighbour", torch.randint(graph.num_nodes, size, generator=generator))
        self.register_buffer("relation_of", torch.randint(graph.num_relations, size, generator=generator))
        self.users = nn.Embedding(graph.num_nodes, dim)
        self.entities = nn.Embedding(graph.num_nodes, dim)
        self.relations = nn.Embedding(graph.num_relations, dim)
        self.linears = nn.ModuleList(nn.Linear(dim, dim) for _ in range(hops))
        for table in (self.users, self.entities, self.relations):
            nn.init.xavier_uniform_(table.weight)
        self.hops, self.neighbours, self.dim = hops, neighbours, dim

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        batch = user.shape[0]
        entities, relations = [item[:, None]], []
        for _ in range(self.hops):
            last = entities[-1]
            entities.append(self.neighbour[last].view(batch, -1))
            relations.append(self.relation_of[last].view(batch, -1))
        taste = self.users(user)
        vectors = [self.entities(e) for e in entities]
        relation_vectors = [self.relations(r) for r in relations]
        for i, linear in enumerate(self.linears):
            last_layer = i == self.hops - 1
            narrowed = []
            for hop in range(self.hops - i):
                around = vectors[hop + 1].view(batch, -1, self.neighbours, self.dim)
                kinds = relation_vectors[hop].view(batch, -1, self.neighbours, self.dim)
                score = F.softmax((taste[:, None, None] * kinds).mean(-1), dim=-1)
                summed = (score[..., None] * around).mean(2)
                out = linear(vectors[hop] + summed)
                narrowed.append(torch.tanh(out) if last_layer else torch.relu(out))
            vectors = narrowed
        score_of_pair: Tensor = (taste * vectors[0].view(batch, self.dim)).sum(-1)
        return score_of_pair


class RippleNet(nn.Module):
    """RippleNet: what spreads from a user, two hops of 32 triples, each with its relation's matrix from a table."""

    def __init__(self, graph: Graph, dim: int, hops: int = 2, memories: int = 32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.ripples: Tensor  # heads, relations, tails of each user and hop
        size = (3, graph.num_nodes, hops, memories)
        high = torch.tensor([graph.num_nodes, graph.num_relations, graph.num_nodes]).view(3, 1, 1, 1)
        self.register_buffer("ripples", torch.randint(2**40, size, generator=generator) % high)
        self.entities = nn.Embedding(graph.num_nodes, dim)
        self.relations = nn.Embedding(graph.num_relations, dim * dim)
        self.transform = nn.Linear(dim, dim, bias=False)
        for table in (self.entities, self.relations):
            nn.init.xavier_uniform_(table.weight)
        self.hops, self.dim = hops, dim

    def hop(self, item: Tensor, heads: Tensor, relations: Tensor, tails: Tensor) -> tuple[Tensor, Tensor]:
        matrices = self.relations(relations).view(*relations.shape, self.dim, self.dim)
        moved = (matrices @ self.entities(heads)[..., None]).squeeze(-1)
        weight = F.softmax((moved * item[:, None]).sum(-1), dim=-1)
        answer = (weight[..., None] * self.entities(tails)).sum(1)
        return self.transform(item + answer), answer

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        vector, answers = self.entities(item), []
        for hop in range(self.hops):
            vector, answer = self.hop(vector, *self.ripples[:, user, hop])
            answers.append(answer)
        score: Tensor = (torch.stack(answers).sum(0) * vector).sum(-1)
        return score


class KGIN(nn.Module):
    """Relational paths, and users by intents that are mixtures of relations (Wang et al., WWW 2021).

    The triples' users and items are nodes; the users' interactions are a sparse matrix, as in the authors' code.
    """

    def __init__(self, graph: Graph, dim: int, layers: int, intents: int = 4) -> None:
        super().__init__()
        self.graph, self.layers, self.dropout = graph, layers, 0.1
        self.entity = nn.Parameter(torch.randn(graph.num_nodes, dim) / dim**0.5)
        self.user = nn.Parameter(torch.randn(graph.num_nodes, dim) / dim**0.5)
        self.relation = nn.Parameter(torch.randn(graph.num_relations, dim) / dim**0.5)
        self.intent = nn.Parameter(torch.randn(intents, dim) / dim**0.5)
        self.mixture = nn.Parameter(torch.randn(intents, graph.num_relations))
        degree = graph.edge_index[1].bincount(minlength=graph.num_nodes).clamp(min=1)
        values = 1 / degree[graph.edge_index[1]].float()
        size = (graph.num_nodes, graph.num_nodes)
        self.register_buffer("seen", torch.sparse_coo_tensor(graph.edge_index.flip(0), values, size).coalesce(), False)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Embeddings of users and entities: both `[nodes, dim]`."""
        source, target = self.graph.edge_index
        entity: Tensor = self.entity
        user: Tensor = self.user
        all_entities, all_users = entity, user
        for _ in range(self.layers):
            message = entity[source] * self.relation[self.graph.edge_type]
            share = F.softmax(user @ self.intent.t(), dim=1).unsqueeze(-1)
            paths = F.softmax(self.mixture, dim=-1) @ self.relation
            with torch.autocast(user.device.type, enabled=False):  # it has no backward in lower precision
                liked = torch.sparse.mm(self.seen, entity)
            user = liked * (paths.expand(len(user), -1, -1) * share).sum(1) + liked
            entity = scatter(message, target, 0, self.graph.num_nodes, reduce="mean")
            entity = F.dropout(F.normalize(entity), self.dropout, self.training)
            user = F.dropout(F.normalize(user), self.dropout, self.training)
            all_entities, all_users = all_entities + entity, all_users + user
        return all_users, all_entities


class RotatE(nn.Module):
    """Relations as rotations in the complex plane, with negatives weighed by their scores (Sun et al., ICLR 2019)."""

    def __init__(self, graph: Graph, dim: int, margin: float = 6.0) -> None:
        super().__init__()
        self.margin = margin
        self.entity = nn.Parameter(torch.randn(graph.num_nodes, dim) / dim**0.5)
        self.phase = nn.Parameter(torch.rand(graph.num_relations, dim // 2) * 2 * torch.pi)

    def forward(self, head: Tensor, relation: Tensor, tails: Tensor) -> Tensor:
        """Scores `[batch, tails]` of heads and relations `[batch]` with tails `[batch, tails]`."""
        real, imaginary = self.entity[head].unsqueeze(1).chunk(2, dim=-1)
        phase = self.phase[relation].unsqueeze(1)
        other_real, other_imaginary = self.entity[tails].chunk(2, dim=-1)
        turned_real = real * phase.cos() - imaginary * phase.sin()
        turned_imaginary = real * phase.sin() + imaginary * phase.cos()
        distance = torch.stack([turned_real - other_real, turned_imaginary - other_imaginary]).norm(dim=0)
        score: Tensor = self.margin - distance.sum(-1)
        return score


class ComplEx(nn.Module):
    """A bilinear score of complex embeddings, with a nuclear 3-norm as penalty (Lacroix et al., ICML 2018)."""

    def __init__(self, graph: Graph, dim: int) -> None:
        super().__init__()
        self.entity = nn.Parameter(torch.randn(graph.num_nodes, dim // 2, 2) / dim**0.5)
        self.relation = nn.Parameter(torch.randn(graph.num_relations, dim // 2, 2) / dim**0.5)

    def forward(self, head: Tensor, relation: Tensor, tails: Tensor) -> tuple[Tensor, Tensor]:
        """Scores `[batch, tails]` of heads and relations `[batch]` with tails `[batch, tails]`, and the penalty."""
        h = torch.view_as_complex(self.entity[head]).unsqueeze(1)
        r = torch.view_as_complex(self.relation[relation]).unsqueeze(1)
        t = torch.view_as_complex(self.entity[tails])
        score: Tensor = (h * r * t.conj()).real.sum(-1)
        return score, torch.stack([(z.abs() ** 3).sum(-1).mean() for z in (h, r, t[:, :1])]).sum()


class Transformer(nn.Module):
    """A transformer of a user's last 64 items, as in SASRec, of PyTorch's own layers: pre-norm, GELU, dropout."""

    def __init__(self, graph: Graph, dim: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(graph.num_nodes, dim)
        layer = nn.TransformerEncoderLayer(dim, 4, 4 * dim, 0.1, F.gelu, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, items: Tensor) -> Tensor:
        encoded: Tensor = self.encoder(self.embedding(items))
        return encoded[:, -1]


def kgat(graph: Graph, dim: int, layers: int) -> Step:
    model = KGAT(graph, dim, layers)
    return Step(model, lambda: bpr(model(), graph.triples))


def kgat_once(graph: Graph, dim: int, layers: int) -> Step:
    model = KGATOnce(graph, dim, layers)
    return Step(model, lambda: bpr(model(), graph.triples))


def kgat_package(graph: Graph, dim: int, layers: int) -> Step:
    """This package's KGAT: users, items and other entities are 30, 25 and 45 % of the nodes, edges half and half."""
    users, items = int(0.3 * graph.num_nodes), int(0.25 * graph.num_nodes)
    entities, half = graph.num_nodes - users, graph.edge_index.shape[1] // 4  # each edge is there in both directions
    source, target = graph.edge_index[:, :half], graph.edge_index[:, half : 2 * half]
    data = HeteroData()
    data.num_items, data.num_relations = items, graph.num_relations
    data["user"].num_nodes, data["entity"].num_nodes = users, entities
    data["user", "interacts", "entity"].edge_index = torch.stack([source[0] % users, source[1] % items])
    data["entity", "relates", "entity"].edge_index = target % entities
    data["entity", "relates", "entity"].edge_type = graph.edge_type[:half]
    model = PackageKGAT(
        dim,
        [dim] * layers,
        attention="in-graph",
        num_users=users,
        num_items=items,
        num_entities=entities,
        num_relations=graph.num_relations,
    )
    model.set_graph(data)
    user, positive, negative = graph.triples
    batch = BPRBatch(user % users, positive % items, negative % items)
    return Step(model, lambda: model.training_step(batch, 0))  # type: ignore[arg-type, return-value]  # a tensor


def gat(graph: Graph, dim: int, layers: int) -> Step:
    model = GAT(graph, dim, layers)
    return Step(model, lambda: bpr(model(), graph.triples))


def rgcn(graph: Graph, dim: int, layers: int) -> Step:
    model = RGCN(graph, dim, layers)
    return Step(model, lambda: bpr(model(), graph.triples))


def kgcn(graph: Graph, dim: int, layers: int) -> Step:
    model = KGCN(graph, dim)

    def loss() -> Tensor:
        user, positive, negative = graph.triples
        return -F.logsigmoid(model(user, positive) - model(user, negative)).mean()

    return Step(model, loss)


def ripplenet(graph: Graph, dim: int, layers: int) -> Step:
    """In a quarter of the width, since a relation has a matrix."""
    model = RippleNet(graph, dim // 4)
    label = (torch.arange(graph.triples.shape[1]) % 2).float()

    def loss() -> Tensor:
        user, item, _ = graph.triples
        return F.binary_cross_entropy_with_logits(model(user, item), label.to(user.device))

    return Step(model, loss)


def kgin(graph: Graph, dim: int, layers: int) -> Step:
    model = KGIN(graph, dim, layers)

    def loss() -> Tensor:
        users, entities = model()
        user, positive, negative = graph.triples
        gap = (users[user] * (entities[negative] - entities[positive])).sum(-1)
        return F.softplus(gap).mean()

    return Step(model, loss)


def _with_negatives(graph: Graph, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Heads and relations of so many edges, and their tails, each with eight others."""
    (head, tail), relation = graph.edge_index[:, :count], graph.edge_type[:count]
    shifts = torch.arange(8, device=head.device).unsqueeze(0) * 97
    return head, relation, torch.cat([tail.unsqueeze(1), (tail.unsqueeze(1) + 1 + shifts) % graph.num_nodes], dim=1)


def rotate(graph: Graph, dim: int, layers: int) -> Step:
    """Of four times as many edges as there are triples, each with eight negative tails."""
    model = RotatE(graph, dim)
    count = min(4 * graph.triples.shape[1], graph.edge_index.shape[1])

    def loss() -> Tensor:
        scores = model(*_with_negatives(graph, count))
        weight = scores[:, 1:].softmax(1).detach()
        positive, negatives = F.logsigmoid(scores[:, 0]), F.logsigmoid(-scores[:, 1:])
        value: Tensor = -positive.mean() - (weight * negatives).sum(1).mean()
        return value

    return Step(model, loss)


def complex_(graph: Graph, dim: int, layers: int) -> Step:
    """Of as many edges as `rotate`."""
    model = ComplEx(graph, dim)
    count = min(4 * graph.triples.shape[1], graph.edge_index.shape[1])

    def loss() -> Tensor:
        scores, penalty = model(*_with_negatives(graph, count))
        value: Tensor = F.softplus(-scores[:, 0]).mean() + F.softplus(scores[:, 1:]).mean() + 0.01 * penalty
        return value

    return Step(model, loss)


def transformer(graph: Graph, dim: int, layers: int) -> Step:
    """Of an eighth as many users as there are triples."""
    model = Transformer(graph, dim, layers)
    count = max(graph.triples.shape[1] // 8, 1)
    edges = graph.edge_index[0]
    items = edges[torch.arange(64 * count, device=edges.device) % len(edges)].view(-1, 64)

    def loss() -> Tensor:
        _, positive, negative = graph.triples[:, : len(items)]
        user, weight = model(items), model.embedding.weight
        return -F.logsigmoid((user * (weight[positive] - weight[negative])).sum(-1)).mean()

    return Step(model, loss)


STEPS: dict[str, Callable[[Graph, int, int], Step]] = {
    "kgat": kgat,
    "kgat-once": kgat_once,
    "kgat-package": kgat_package,
    "gat": gat,
    "kgcn": kgcn,
    "rgcn": rgcn,
    "ripplenet": ripplenet,
    "kgin": kgin,
    "rotate": rotate,
    "complex": complex_,
    "transformer": transformer,
}
"""By name: a function of the graph, the width and the number of layers."""
