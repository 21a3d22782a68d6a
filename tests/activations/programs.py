"""Programs of random ops on the nodes and the edges of a small graph, such as no model has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # as everybody calls it

NODES, EDGES, WIDTH = 24, 60, 16


class Step(NamedTuple):
    """One op of a program.

    Attributes:
        op: its name in :data:`OPS`.
        of_edges: whether its arguments belong to edges, not to nodes.
        first: how many results before the last its first argument is.
        second: how many its second is.
    """

    op: str
    of_edges: bool
    first: int
    second: int


class Graph:
    """What a program computes with: parameters, constants, an edge index."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator)

        self.source = torch.randint(NODES, (EDGES,), generator=generator)
        self.target = torch.randint(NODES, (EDGES,), generator=generator)
        self.mask = torch.rand(EDGES, generator=generator) < 0.6
        self.constants = draw(NODES, WIDTH), draw(EDGES, WIDTH)
        self.x = draw(NODES, WIDTH).requires_grad_()
        self.e = draw(EDGES, WIDTH).requires_grad_()
        self.weight = (draw(WIDTH, WIDTH) / 4).requires_grad_()
        self.wide = (draw(WIDTH, 2 * WIDTH) / 6).requires_grad_()
        self.bias = draw(WIDTH).requires_grad_()
        self.parameters = [self.x, self.e, self.weight, self.wide, self.bias]

    def run(self, program: Sequence[Step]) -> Tensor:
        """The loss of a program: every result takes part in it, each kept within bounds."""
        of_nodes, of_edges = [self.constants[0], self.x], [self.constants[1], self.e]
        for step in program:
            results = of_edges if step.of_edges else of_nodes
            arguments = [results[-1 - place % len(results)] for place in (step.first, step.second)]
            made = OPS[step.op](self, *arguments)
            spread = float(made.detach().square().mean().sqrt())
            if spread > 2:
                made = made / spread
            (of_edges if made.shape[0] == EDGES else of_nodes).append(made)
        value = self.x.sum()
        for results, like in zip((of_nodes, of_edges), self.constants, strict=True):
            value = value + sum((result * like + result.square()).sum() for result in results[2:])
        return value

    def to_edges(self, a: Tensor) -> Tensor:
        """Rows of nodes for each edge; those of edges as they are."""
        return a if a.shape[0] == EDGES else a[self.source]

    def to_nodes(self, a: Tensor) -> Tensor:
        """The sums of edges' rows at each node; those of nodes as they are."""
        return a if a.shape[0] == NODES else torch.zeros(NODES, WIDTH).index_add(0, self.target, a)


def _complex(a: Tensor) -> Tensor:
    return torch.view_as_complex(a.contiguous().view(a.shape[0], -1, 2))


def _real(a: Tensor) -> Tensor:
    return torch.view_as_real(a).reshape(a.shape[0], -1)


def _softmax_of_edges(graph: Graph, a: Tensor) -> Tensor:
    a = graph.to_edges(a)
    index = graph.target[:, None].expand(-1, WIDTH)
    most = torch.full((NODES, WIDTH), -1e9).scatter_reduce(0, index, a.detach(), "amax")
    shares = (a - most[graph.target]).exp()
    return shares / (torch.zeros(NODES, WIDTH).index_add(0, graph.target, shares)[graph.target] + 1e-16)


def _heads(a: Tensor) -> Tensor:
    heads = a.view(a.shape[0], 4, -1) if a.is_contiguous() else a.reshape(a.shape[0], 4, -1)
    return (heads * (heads * heads.flip(1)).sum(-1).softmax(-1).unsqueeze(-1)).reshape(a.shape[0], -1)


def _gated(a: Tensor) -> Tensor:
    left, right = a.chunk(2, 1)
    return torch.cat([left * torch.sigmoid(right), right], 1)


def _assigned(a: Tensor, b: Tensor) -> Tensor:
    made = a * 1.5
    made[:5] = b[:5]
    made[:, 3] = 0.0
    return torch.sigmoid(made)


def _written_through_a_view(a: Tensor, b: Tensor) -> Tensor:
    made = a * 1.5
    made[:, ::2].mul_(b.detach()[:, ::2])
    return made


def _written_through_data(a: Tensor, b: Tensor) -> Tensor:
    made = a * 1.5
    made.data[:5] = b.data[:5]
    return made * torch.tanh(made)


def _given_other_data(a: Tensor, b: Tensor) -> Tensor:
    other, twin = b.detach() * 2, torch.zeros_like(b)
    twin.data = other
    twin.mul_(3.0)
    return other * torch.tanh(a)


def _kept_and_written(a: Tensor, b: Tensor) -> Tensor:
    made = a * 1.5
    shares = made.exp().clamp(max=3.0)
    made.add_(shares)
    return made * shares


def _by_bits(a: Tensor) -> Tensor:
    return torch.where((a.detach().contiguous().view(torch.int32) & 1) == 0, a, a * 0.5)


def _by_halves(a: Tensor) -> Tensor:
    return a * a.detach().contiguous().view(torch.bfloat16)[:, 1::2].float()


def _cross_entropy(a: Tensor, b: Tensor) -> Tensor:
    return F.binary_cross_entropy(torch.sigmoid(a), (b.detach() > 0).float(), reduction="none")


def _dropped(a: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return a * (torch.rand(a.shape, generator=generator) < 0.7) / 0.7


def _products_of_parts(a: Tensor) -> Tensor:
    first, second, third, fourth = a.unflatten(1, (4, 2, 2)).unbind(1)
    return torch.cat([torch.bmm(first, second).flatten(1), torch.bmm(third, fourth).flatten(1), a[:, 8:]], 1)


def _attention_of_parts(a: Tensor) -> Tensor:
    query, key = a.chunk(2, 1)
    weights = (torch.einsum("nd,md->nm", query, key) / 3).softmax(-1)
    return torch.cat([torch.einsum("nm,md->nd", weights, key), query], 1)


def _as_heads(a: Tensor) -> Tensor:
    return a.reshape(a.shape[0], 4, -1)


OPS: dict[str, Callable[[Graph, Tensor, Tensor], Tensor]] = {
    "relu": lambda g, a, b: F.relu(a),
    "leaky relu": lambda g, a, b: F.leaky_relu(a, 0.2),
    "tanh": lambda g, a, b: torch.tanh(a),
    "sigmoid": lambda g, a, b: torch.sigmoid(a),
    "exp": lambda g, a, b: a.clamp(max=2.0).exp(),
    "softmax": lambda g, a, b: a.softmax(-1),
    "log softmax": lambda g, a, b: a.log_softmax(-1),
    "normalize": lambda g, a, b: F.normalize(a, dim=1),
    "layer norm": lambda g, a, b: F.layer_norm(a, (WIDTH,), g.bias, g.bias),
    "batch norm": lambda g, a, b: F.batch_norm(a, None, None, training=True),
    "dropout": lambda g, a, b: F.dropout(a, 0.3),
    "mask": lambda g, a, b: _dropped(a),
    "square": lambda g, a, b: a.square(),
    "cube": lambda g, a, b: a**3,
    "root": lambda g, a, b: (a.abs() + 1).sqrt(),
    "double": lambda g, a, b: a.double().tanh().float(),
    "bfloat16": lambda g, a, b: (a.bfloat16() * 2).float(),
    "gelu": lambda g, a, b: F.gelu(a),
    "silu": lambda g, a, b: F.silu(a),
    "elu": lambda g, a, b: F.elu(a),
    "cosine": lambda g, a, b: torch.cos(3 * a),
    "linear": lambda g, a, b: F.linear(a, g.weight, g.bias),
    "product with the transposed": lambda g, a, b: a @ g.weight.t(),
    "two layers": lambda g, a, b: F.linear(F.leaky_relu(F.linear(a, g.weight, g.bias)), g.weight),
    "joined": lambda g, a, b: F.linear(torch.cat([a, b], 1), g.wide),
    "matrices": lambda g, a, b: torch.bmm(a.unsqueeze(1), g.weight.expand(a.shape[0], WIDTH, WIDTH)).squeeze(1),
    "einsum": lambda g, a, b: torch.einsum("nd,nd->n", a, b).tanh().add(1.5).unsqueeze(1) * a,
    "sum onto a product": lambda g, a, b: torch.addmm(b, a, g.weight),
    "add": lambda g, a, b: a + b,
    "subtract": lambda g, a, b: a - b,
    "multiply": lambda g, a, b: a * b,
    "divide": lambda g, a, b: a / (b.abs() + 1),
    "maximum": lambda g, a, b: torch.maximum(a, b),
    "stacked": lambda g, a, b: torch.stack([a, b]).mean(0),
    "gate": lambda g, a, b: torch.sigmoid(a) * b + (1 - torch.sigmoid(a)) * a,
    "bi-interaction": lambda g, a, b: F.leaky_relu(F.linear(a + b, g.weight)) + F.leaky_relu(F.linear(a * b, g.weight)),
    "attention": lambda g, a, b: torch.softmax(a @ b.t() / 4, -1) @ b,
    # 1.5 more, since a second one does not ask how long a row is: if that may be next to nothing, noise alone is left
    "cosine similarity": lambda g, a, b: (1.5 + F.cosine_similarity(a, b.flip(0), dim=1)).unsqueeze(1) * b,
    "distance": lambda g, a, b: (a - b + 1e-6).norm(dim=1, keepdim=True) * a,
    "centred": lambda g, a, b: a - a.mean(1, keepdim=True),
    "by its deviation": lambda g, a, b: a / (a.std(1, keepdim=True) + 1),
    "log-sum-exp": lambda g, a, b: a - a.logsumexp(1, keepdim=True),
    "sorted": lambda g, a, b: a.sort(1)[0],
    "largest": lambda g, a, b: torch.cat([a.topk(8, 1)[0], a[:, 8:]], 1),
    "cross entropy": lambda g, a, b: _cross_entropy(a, b),
    "smooth l1": lambda g, a, b: F.smooth_l1_loss(a, b, reduction="none"),
    "gather": lambda g, a, b: g.to_edges(a),
    "messages": lambda g, a, b: torch.tanh(g.to_edges(a) + g.to_edges(b)) * g.to_edges(a),
    "gather and scatter": lambda g, a, b: g.to_nodes(g.to_edges(a) * g.to_edges(b)),
    "scatter": lambda g, a, b: g.to_nodes(a),
    "softmax of edges": lambda g, a, b: _softmax_of_edges(g, a),
    "maximum of edges": lambda g, a, b: torch.zeros(NODES, WIDTH).scatter_reduce(
        0, g.target[:, None].expand(-1, WIDTH), g.to_edges(a), "amax", include_self=False
    ),
    "some edges": lambda g, a, b: torch.zeros(EDGES, WIDTH).index_put(
        (g.mask.nonzero()[:, 0],), g.to_edges(a)[g.mask] * 2
    ),
    "turned over": lambda g, a, b: a.flip(0) * a,
    "transposed": lambda g, a, b: (g.weight @ a.t()).t(),
    "softmax over rows": lambda g, a, b: a.t().softmax(1).t(),
    "gated": lambda g, a, b: _gated(a),
    "heads": lambda g, a, b: _heads(a),
    "slices": lambda g, a, b: torch.cat([a[:, 8:].tanh(), a[:, :8] * 2], 1),
    "every other": lambda g, a, b: torch.cat([a[:, ::2].exp().clamp(max=5.0), a[:, 1::2].sigmoid()], 1),
    "split": lambda g, a, b: torch.cat([part.sigmoid() for part in a.split(4, 1)], 1),
    "products of parts": lambda g, a, b: _products_of_parts(a),
    "attention of parts": lambda g, a, b: _attention_of_parts(a),
    "einsum of heads": lambda g, a, b: torch.einsum("nhd,nkd->nhk", _as_heads(a), _as_heads(b)).flatten(1),
    "einsum of three": lambda g, a, b: torch.einsum("nd,de,ne->ne", a, g.weight, b),
    "einsum by heads": lambda g, a, b: torch.einsum("nhd,hde->nhe", _as_heads(a), g.weight.view(4, 4, 16)).mean(1),
    "heads in another order": lambda g, a, b: _as_heads(a).transpose(1, 2).reshape(a.shape[0], -1).tanh(),
    "added in another order": lambda g, a, b: (a.t() + b.t()).tanh().t(),
    "heads by heads": lambda g, a, b: (
        (_as_heads(a).transpose(0, 1) * _as_heads(b).transpose(0, 1)).transpose(0, 1).flatten(1)
    ),
    "one hot": lambda g, a, b: a * (F.one_hot(b.detach().argmax(1), WIDTH).float() + 0.1),
    "several hot": lambda g, a, b: a * torch.zeros(a.shape).scatter_(1, b.detach().topk(3, 1)[1], 2.0),
    "picked at a place": lambda g, a, b: torch.cat(
        [_as_heads(a)[torch.arange(a.shape[0]), i] for i in (2, 0, 1, 3)], 1
    ),
    "expanded": lambda g, a, b: torch.tanh(a.unsqueeze(1).expand(-1, 2, -1) + b.unsqueeze(1)).mean(1),
    "complex product": lambda g, a, b: _real(_complex(a) * _complex(b)),
    "product with a conjugate": lambda g, a, b: _real(_complex(a) * _complex(b).conj()),
    "complex rows": lambda g, a, b: _real(_complex(g.to_edges(a)) * _complex(g.to_edges(b))),
    "absolute": lambda g, a, b: torch.cat([_complex(a).abs(), a[:, 8:]], 1),
    "rotation": lambda g, a, b: _real(_complex(a) * torch.polar(torch.ones(a.shape[0], 8), b[:, :8].contiguous())),
    "correlation": lambda g, a, b: torch.fft.irfft(torch.fft.rfft(a) * torch.fft.rfft(b).conj(), n=WIDTH),
    "multiplied in place": lambda g, a, b: (a * 1.5).mul_(b.detach()),
    "added in place": lambda g, a, b: a.clone().add_(b) * a,
    "relu in place": lambda g, a, b: F.relu(a * 1.5, inplace=True) * a,
    "filled in place": lambda g, a, b: (a * 1.5).masked_fill_(b.detach() > 0, 0.3) * b,
    "assigned": lambda g, a, b: _assigned(a, b),
    "written through a view": lambda g, a, b: _written_through_a_view(a, b),
    "written through data": lambda g, a, b: _written_through_data(a, b),
    "kept and written": lambda g, a, b: _kept_and_written(a, b),
    "data": lambda g, a, b: a * b.data,
    "given other data": lambda g, a, b: _given_other_data(a, b),
    "detached": lambda g, a, b: a.detach() * b,
    "straight through": lambda g, a, b: a + (a.round() - a).detach(),
    "by its bits": lambda g, a, b: _by_bits(a),
    "by its halves": lambda g, a, b: _by_halves(a),
}
"""Ops by name: each gives rows of nodes or of edges, as wide as they were."""
