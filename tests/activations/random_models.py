"""Models of a few layers, drawn at random: graph convolutions, linear layers, norms, residuals, scores of triples."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from comparing import made
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric import nn as pyg

from lightning_tinykg import compress_activations

NODES, EDGES, RELATIONS, TRIPLES, WIDTH = 200, 1500, 5, 300, 32

ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [
    F.relu,
    F.elu,
    F.gelu,
    torch.tanh,
    lambda x: F.normalize(x, dim=-1),
    lambda x: x,
]


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


def _linear(width: int = WIDTH) -> nn.Module:
    return nn.Linear(width, WIDTH)


def _pairs(layer: Any, h: Tensor, model: RandomModel) -> Tensor:
    source, target = model.edges
    products = layer(h[source] * h[target])
    return products.new_zeros(h.shape).index_add(0, target, products)


def _of_nodes(layer: Any, h: Tensor, _: RandomModel) -> Tensor:
    out: Tensor = layer(h)
    return out


def _of_edges(layer: Any, h: Tensor, model: RandomModel) -> Tensor:
    out: Tensor = layer(h, model.edges)
    return out


def _of_relations(layer: Any, h: Tensor, model: RandomModel) -> Tensor:
    out: Tensor = layer(h, model.edges, model.relations)
    return out


def _attention(layer: Any, h: Tensor, _: RandomModel) -> Tensor:
    query, key, value = layer(h).view(len(h), 4, 3, -1).unbind(2)
    weights = (torch.einsum("nhd,mhd->hnm", query, key) / query.size(-1) ** 0.5).softmax(-1)
    return h + torch.einsum("hnm,mhd->nhd", weights, value).flatten(1)


def _bilinear(layer: Any, h: Tensor, _: RandomModel) -> Tensor:
    left, right = h.unflatten(1, (2, 4, 4)).unbind(1)
    out: Tensor = layer(torch.bmm(left, right).flatten(1))
    return out


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor, Any], Tensor]]] = {
    "GAT": (lambda: pyg.GATConv(WIDTH, WIDTH // 4, heads=4), _of_edges),
    "GATv2": (lambda: pyg.GATv2Conv(WIDTH, WIDTH // 4, heads=4), _of_edges),
    "transformer": (lambda: pyg.TransformerConv(WIDTH, WIDTH // 4, heads=4), _of_edges),
    "GCN": (lambda: pyg.GCNConv(WIDTH, WIDTH), _of_edges),
    "SAGE": (lambda: pyg.SAGEConv(WIDTH, WIDTH), _of_edges),
    "SAGE, largest": (lambda: pyg.SAGEConv(WIDTH, WIDTH, aggr="max"), _of_edges),
    "GIN": (lambda: pyg.GINConv(_perceptron()), _of_edges),
    "AGNN": (lambda: pyg.AGNNConv(), _of_edges),
    "RGCN": (lambda: pyg.RGCNConv(WIDTH, WIDTH, RELATIONS), _of_relations),
    "FiLM": (lambda: pyg.FiLMConv(WIDTH, WIDTH, num_relations=RELATIONS), _of_relations),
    "perceptron": (_perceptron, _of_nodes),
    "linear, dropout": (lambda: nn.Sequential(_linear(), nn.GELU(), nn.Dropout(0.1)), _of_nodes),
    "layer norm": (lambda: nn.LayerNorm(WIDTH), _of_nodes),
    "batch norm": (lambda: nn.BatchNorm1d(WIDTH), _of_nodes),
    "residual": (_linear, lambda layer, h, _: h + layer(h)),
    "beside the input": (lambda: _linear(2 * WIDTH), lambda layer, h, model: layer(torch.cat([h, model.h[0]], dim=1))),
    "products of pairs": (_linear, _pairs),
    "attention": (lambda: nn.Linear(WIDTH, 3 * WIDTH), _attention),
    "products of parts": (lambda: _linear(16), _bilinear),
}


class RandomModel(nn.Module):
    """One of them: a table of nodes, one to five layers, and the BPR loss of triples, of the last layer or of all.

    Args:
        seed: which.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.names = [draw.choice(list(LAYERS)) for _ in range(draw.randint(1, 5))]
        self.activations = [draw.choice(ACTIVATIONS) for _ in self.names]
        self.layers = nn.ModuleList(LAYERS[name][0]() for name in self.names)
        self.of_all, self.computed = draw.random() < 0.5, draw.random() < 0.5
        self.edges = torch.randint(NODES, (2, EDGES))
        self.relations = torch.randint(RELATIONS, (EDGES,))
        self.triples = torch.randint(NODES, (3, TRIPLES))
        self.table = nn.Parameter(torch.randn(NODES, WIDTH))
        self.h: list[Tensor] = []
        self.seed = seed

    def forward(self) -> Tensor:
        """The loss, with the same dropout masks each time."""
        torch.manual_seed(self.seed)
        self.h = [made(self.table) if self.computed else self.table]
        for name, layer, activation in zip(self.names, self.layers, self.activations, strict=True):
            self.h.append(activation(LAYERS[name][1](layer, self.h[-1], self)))
        out = torch.cat(self.h, dim=1) if self.of_all else self.h[-1]
        self.h = []
        user, liked, other = (out[rows] for rows in self.triples)
        return -F.logsigmoid((user * liked).sum(-1) - (user * other).sum(-1)).mean()

    def step(self, bits: int | None, mixed: bool = False) -> tuple[Tensor, int]:
        """The gradient of all parameters, and the bytes that are stored; uncompressed without ``bits``."""
        self.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            if bits is None:
                loss, stored = self(), 0
            else:
                with compress_activations(bits, min_bytes=0) as ledger:
                    loss = self()
                stored = ledger.stored_bytes
        loss.backward()
        return torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None]), stored


def growth(stored: list[int]) -> float:
    """By how much the bytes at some width are more than at the next greater, at the most."""
    return max(fewer / more for more, fewer in pairwise(stored)) - 1
