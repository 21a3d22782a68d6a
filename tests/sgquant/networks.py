"""Models of every kind of layer that SGQuant is for, and a graph with degrees that differ."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric import nn as pyg
from torch_geometric.nn.models import LightGCN
from torch_geometric.utils import softmax

from lightning_tinykg.models.kgat import KGATConv
from lightning_tinykg.sgquant import SGQuantizer

NODES, FEATURES, CLASSES = 40, 6, 3


def graph(nodes: int = NODES, edges: int = 150, isolated: int = 4) -> tuple[Tensor, Tensor]:
    """Features and edges; a few nodes receive most of them, and the last have none."""
    generator = torch.Generator().manual_seed(1)
    linked = nodes - isolated
    sender = torch.randint(linked, (edges,), generator=generator)
    receiver = (torch.rand(edges, generator=generator).pow(3) * linked).long()
    return torch.randn(nodes, FEATURES, generator=generator), torch.stack([sender, receiver])


class Net(nn.Module):
    """Two layers of a kind, a ReLU and dropout between them."""

    def __init__(self, conv: Callable[[int, int], nn.Module], *extra: Tensor, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(FEATURES, 8), conv(8, CLASSES)
        self.extra, self.dropout = extra, dropout

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        extra = [of_edges[: edge_index.size(1)] for of_edges in self.extra]
        x = F.dropout(x, self.dropout, self.training)
        x = self.conv1(x, edge_index, *extra).relu()
        x = F.dropout(x, self.dropout, self.training)
        return self.conv2(x, edge_index, *extra)


class AGNN(nn.Module):
    """The paper's second model: the raw features go into a linear layer."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)
        self.prop1, self.prop2 = pyg.AGNNConv(requires_grad=False), pyg.AGNNConv()
        self.dropout = dropout

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = self.lin1(F.dropout(x, self.dropout, self.training)).relu()
        x = self.prop2(self.prop1(x, edge_index), edge_index)
        return self.lin2(F.dropout(x, self.dropout, self.training))


class Sampled(nn.Module):
    """As on a sampled batch: each layer has fewer nodes that receive, the first ones of those that send."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = pyg.GATConv((FEATURES, FEATURES), 8, add_self_loops=False)
        self.conv2 = pyg.SAGEConv((8, 8), CLASSES)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        for conv in (self.conv1, self.conv2):
            receiving = x[: (x.size(0) + 1) // 2]
            edge_index = edge_index[:, (edge_index[0] < x.size(0)) & (edge_index[1] < receiving.size(0))]
            x = conv((x, receiving), edge_index).relu()
        return x


class Embedded(nn.Module):
    """LightGCN, whose first layer takes the embedding table itself."""

    def __init__(self, nodes: int = NODES) -> None:
        super().__init__()
        self.encoder = LightGCN(nodes, 8, num_layers=2)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        out: Tensor = self.encoder.get_embedding(edge_index)
        return out


def gat(dropout: float = 0.0) -> Net:
    return Net(lambda a, b: pyg.GATConv(a, b, heads=2, concat=False, dropout=dropout), dropout=dropout)


def _mlp(a: int, b: int) -> nn.Module:
    return nn.Sequential(nn.Linear(a, 8), nn.ReLU(), nn.Linear(8, b))


def networks() -> dict[str, Callable[[], nn.Module]]:
    """Name -> a model's maker. Call as `model(x, edge_index)` with `graph()`."""
    edge_index = graph()[1]
    edges = edge_index.size(1)
    kind = torch.arange(edges) % 3
    weight = torch.linspace(0.1, 1, edges)
    makers: dict[str, Any] = {
        "GCN": lambda: Net(pyg.GCNConv),
        "GAT": gat,
        "GATv2": lambda: Net(lambda a, b: pyg.GATv2Conv(a, b, heads=2, concat=False)),
        "AGNN": AGNN,
        "Within relations": lambda: WithinRelations(kind),
        "SAGE": lambda: Net(pyg.SAGEConv),
        "SAGE-max": lambda: Net(lambda a, b: pyg.SAGEConv(a, b, aggr="max", project=True)),
        "GIN": lambda: Net(lambda a, b: pyg.GINConv(_mlp(a, b))),
        "RGCN": lambda: Net(lambda a, b: pyg.RGCNConv(a, b, num_relations=3), kind),
        "Transformer": lambda: Net(lambda a, b: pyg.TransformerConv(a, b, heads=2, concat=False)),
        "LGConv": LG,
        "KGATConv": lambda: Net(KGATConv, weight),
        "Sampled": Sampled,
        "LightGCN": Embedded,
        "GAT, again": lambda: Again(pyg.GATConv(FEATURES, FEATURES // 2, heads=2)),
        "GATv2, again": lambda: Again(pyg.GATv2Conv(FEATURES, FEATURES)),
    }
    return makers


class WithinRelations(pyg.MessagePassing):
    """Attention that sums to 1 over the edges of one relation at a receiver, as RGAT can have it."""

    def __init__(self, kind: Tensor) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        out: Tensor = self.propagate(edge_index, x=x, kind=self.kind[: edge_index.size(1)])
        return out

    def message(self, x_j: Tensor, kind: Tensor, index: Tensor) -> Tensor:
        attention = x_j.new_zeros(x_j.size(0), 1)
        for relation in range(3):
            own = kind == relation
            attention[own] = softmax(x_j[own, :1], index[own])
        return attention * x_j


class Again(nn.Module):
    """One layer, three times, each time with other features: what is stored of it has other ranges."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        for scale in (1.0, 3.0, 9.0):
            x = self.conv(x * scale, edge_index).relu()
        return x


class LG(nn.Module):
    """LGConv on plain features, without a table."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = pyg.LGConv(), pyg.LGConv()

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        out: Tensor = self.conv2(self.conv1(x, edge_index), edge_index)
        return out


def calibrated(model: nn.Module, plan: Any = 8, **options: Any) -> SGQuantizer:
    """A quantizer that has seen `graph()`."""
    quantizer = SGQuantizer(model, plan, **options)
    quantizer.calibrate(lambda: model(*graph()))
    return quantizer
