"""The ways to run one training step: uncompressed, compressed, and what else saves memory.

``torch.utils.checkpoint`` around each layer can't be had without editing the model: here are the layers of ``steps.py``
once more, each within a checkpoint. They draw the same dropout and have the gradient of the plain step, which is
checked before they are timed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from speed_clock import Clock, interleaved
from steps import GAT, KGAT, KGCN, RGCN, STEPS, Graph, RippleNet, Step, bpr
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector
from torch.utils.checkpoint import checkpoint

from lightning_tinykg import Ledger, compress_activations

checkpointed = partial(checkpoint, use_reentrant=False)


def uncheckpointed(function: Callable[..., Any], *arguments: Any) -> Any:
    """In the place of a checkpoint."""
    return function(*arguments)


def kgat_layer(model: KGAT, x: Tensor, linears: tuple[nn.Module, nn.Module]) -> tuple[Tensor, Tensor]:
    source, target = model.graph.edge_index
    message = model.attention(x)[:, None] * x[source]
    # under autocast the attention is in float32, the rest is not, and index_add does not take both
    around = torch.zeros_like(x).index_add(0, target, message.to(x.dtype))
    x = F.leaky_relu(linears[0](x + around)) + F.leaky_relu(linears[1](x * around))
    x = F.dropout(x, 0.1, model.training)
    return x, F.normalize(x)


def kgat(model: KGAT, graph: Graph, run: Callable[..., Any] = checkpointed) -> Tensor:
    """Attention, aggregation and the rest of a layer in one checkpoint."""
    x: Tensor = model.nodes
    outputs = [x]
    for linears in zip(model.sums, model.products, strict=True):
        x, output = run(kgat_layer, model, x, linears)
        outputs.append(output)
    return bpr(torch.cat(outputs, dim=1), graph.triples)


def gat(model: GAT, graph: Graph) -> Tensor:
    """Convolution, norm, activation and dropout in one checkpoint."""

    def layer(x: Tensor, conv: nn.Module, norm: nn.Module) -> Tensor:
        return F.dropout(F.elu(norm(conv(x, graph.edge_index))), 0.1, model.training)

    x: Tensor = model.nodes
    for conv, norm in zip(model.convs, model.norms, strict=True):
        x = checkpointed(layer, x, conv, norm)
    return bpr(x, graph.triples)


def rgcn(model: RGCN, graph: Graph) -> Tensor:
    """A checkpoint around each convolution."""

    def layer(x: Tensor, conv: nn.Module) -> Tensor:
        activated: Tensor = conv(x, graph.edge_index, graph.edge_type).relu()
        return activated

    x: Tensor = model.nodes
    for conv in model.convs:
        x = checkpointed(layer, x, conv)
    return bpr(x, graph.triples)


def kgcn(model: KGCN, graph: Graph) -> Tensor:
    """A checkpoint around each layer. The look-ups are within: what they give is nearly all that is kept otherwise."""

    def layer(number: int, taste: Tensor, vectors: list[Tensor], relations: list[Tensor]) -> list[Tensor]:
        batch, last = taste.shape[0], number == model.hops - 1
        if number == 0:
            vectors = [model.entities(entities) for entities in vectors]
        narrowed = []
        for hop in range(model.hops - number):
            around = vectors[hop + 1].view(batch, -1, model.neighbours, model.dim)
            kinds = model.relations(relations[hop]).view(batch, -1, model.neighbours, model.dim)
            score = F.softmax((taste[:, None, None] * kinds).mean(-1), dim=-1)
            out = model.linears[number](vectors[hop] + (score[..., None] * around).mean(2))
            narrowed.append(torch.tanh(out) if last else torch.relu(out))
        return narrowed

    def score(user: Tensor, item: Tensor) -> Tensor:
        vectors, relations = [item[:, None]], []
        for _ in range(model.hops):
            relations.append(model.relation_of[vectors[-1]].view(len(user), -1))
            vectors.append(model.neighbour[vectors[-1]].view(len(user), -1))
        taste = model.users(user)
        for number in range(model.hops):
            vectors = checkpointed(layer, number, taste, vectors, relations)
        product: Tensor = taste * vectors[0].view(len(user), model.dim)
        return product.sum(-1)

    user, positive, negative = graph.triples
    return -F.logsigmoid(score(user, positive) - score(user, negative)).mean()


def ripplenet(model: RippleNet, graph: Graph) -> Tensor:
    """A checkpoint around each hop, its look-ups within."""
    user, item, _ = graph.triples
    vector, answers = model.entities(item), []
    for hop in range(model.hops):
        vector, answer = checkpointed(model.hop, vector, *model.ripples[:, user, hop])
        answers.append(answer)
    score = (torch.stack(answers).sum(0) * vector).sum(-1)
    label = (torch.arange(len(user), device=user.device) % 2).float()
    return F.binary_cross_entropy_with_logits(score, label)


CHECKPOINTED: dict[str, Callable[[Any, Graph], Tensor]] = {
    "kgat": kgat, "gat": gat, "rgcn": rgcn, "kgcn": kgcn, "ripplenet": ripplenet,
}  # fmt: skip
"""By the step's name: its loss, from its model, with each layer in a checkpoint."""

WAYS: dict[str, Callable[[torch.device], AbstractContextManager[Any]]] = {
    "plain": lambda device: nullcontext(),
    "exact": lambda device: compress_activations(32),
    "8-bit": lambda device: compress_activations(8),
    "4-bit": lambda device: compress_activations(4),
    "2-bit": lambda device: compress_activations(2),
    "paper-8-bit": lambda device: compress_activations(8, recipe="paper"),
    "paper-2-bit": lambda device: compress_activations(2, recipe="paper"),
    "checkpoint": lambda device: nullcontext(),
    "checkpoint, 2-bit": lambda device: compress_activations(2),
    "2-bit, recompute off": lambda device: compress_activations(2, recompute="off"),
    "2-bit, aggressive": lambda device: compress_activations(2, recompute="aggressive"),
    "bf16-autocast": lambda device: torch.autocast(device.type, dtype=torch.bfloat16),
    "save_on_cpu": lambda device: torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda"),
}
"""By name: the context that the forward runs in."""


@dataclass
class Run:
    """A step in one of the ways.

    Attributes:
        model: whose gradient it makes.
        loss: the forward pass.
        context: in which that runs.
        ledger: of the last forward, if it was compressed.
    """

    model: nn.Module
    loss: Callable[[], Tensor]
    context: AbstractContextManager[Any]
    ledger: Ledger | None = None

    @classmethod
    def of(cls, way: str, name: str, step: Step, graph: Graph) -> Run:
        """The step of this name in this way; all ways of a step share the model."""
        loss = step.loss
        if way.startswith("checkpoint"):
            loss = partial(CHECKPOINTED[name], step.model, graph)
        elif way == "bf16-autocast" and isinstance(step.model, KGAT) and name == "kgat":
            loss = partial(kgat, step.model, graph, uncheckpointed)
        return cls(step.model, loss, WAYS[way](graph.edge_index.device))

    def forward(self) -> Tensor:
        with self.context as given:
            loss = self.loss()
        self.ledger = given if isinstance(given, Ledger) else None
        return loss

    def prepare(self) -> None:
        """What is no part of the step's cost: no gradients, the same dropout each time, no garbage of another's."""
        self.model.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        gc.collect()

    def seconds(self, clock: Clock) -> dict[str, float]:
        """One step by the clock."""
        self.prepare()
        loss, forward = clock.timed(self.forward)
        _, backward = clock.timed(loss.backward)
        return {"forward": forward, "backward": backward, "total": forward + backward}

    def gradient(self) -> Tensor:
        """That of all parameters, end to end."""
        self.prepare()
        self.forward().backward()
        return parameters_to_vector([p.grad for p in self.model.parameters() if p.grad is not None])


def ways_for(name: str, ways: list[str]) -> list[str]:
    """Those of the ways that a step can be run in: of some, there are no checkpointed layers here."""
    return [way for way in ways if not way.startswith("checkpoint") or name in CHECKPOINTED]


def make(name: str, sizes: dict[str, int], device: torch.device, seed: int = 0) -> tuple[Step, Graph]:
    """A step of this name on a random graph of these sizes."""
    graph = Graph.random(sizes["nodes"], sizes["edges"], triples=sizes["triples"], seed=seed).to(device)
    torch.manual_seed(seed)
    step = STEPS[name](graph, sizes["dim"], sizes["layers"])
    step.model.to(device)
    return step, graph


def times(request: dict[str, Any], peak: Callable[[], int], done: Callable[[Any], Any]) -> dict[str, Any]:
    """Time a step in some ways, interleaved.

    Args:
        request: ``step``, ``sizes``, ``ways``, ``repeats``, ``device``.
        peak: the most memory there was since it was last called.
        done: called after each run.

    Returns:
        By way: seconds by phase, stored and raw bytes, the gradient's error, the peak beyond the libraries (roughly:
        what other ways have left to the allocator is in it), or why it does not run.
    """
    device = torch.device(request["device"])
    peak()  # what was before does not count
    empty = peak()
    step, graph = make(request["step"], request["sizes"], device)
    runs: dict[str, Run] = {}
    results: dict[str, Any] = {}
    exact = Run.of("plain", request["step"], step, graph).gradient() if "plain" in request["ways"] else None
    for way in request["ways"]:
        run = Run.of(way, request["step"], step, graph)
        peak()
        try:
            gradient = run.gradient()
        except (RuntimeError, TypeError) as error:
            if way not in ("bf16-autocast", "save_on_cpu") or isinstance(error, torch.OutOfMemoryError):
                raise
            results[way] = {"failed": str(error).splitlines()[0]}
            continue
        results[way] = {"process_peak_bytes": peak() - empty}
        if exact is not None:
            off = float((gradient - exact).norm() / exact.norm())
            if way == "checkpoint" and off > 1e-3:
                raise AssertionError(f"{request['step']}: the checkpointed layers have another gradient ({off:.1%})")
            results[way]["error"] = off
        if run.ledger is not None:
            results[way] |= {"stored_bytes": run.ledger.stored_bytes, "raw_bytes": run.ledger.raw_bytes}
        runs[way] = run
        del gradient
    clock = Clock(device)
    candidates = {way: partial(run.seconds, clock) for way, run in runs.items()}
    for way, seconds in interleaved(candidates, request["repeats"], done).items():
        results[way]["seconds"] = seconds
    return results
