"""What was decided in a step is decided in the next that goes as it did, and in no other."""

from typing import Any

import pytest
import torch
from comparing import made
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import GATConv, RGCNConv

from lightning_tinykg import BitPlan, Ledger, compress_activations
from lightning_tinykg.activations import decisions, following
from lightning_tinykg.activations.costs import Costs
from lightning_tinykg.activations.following import Follower
from lightning_tinykg.bits import PlanEntry

NODES, EDGES, WIDTH = 200, 6000, 32


class Model(nn.Module):
    """Sums of neighbours, of which a few are less work than many; attention; norms."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.convs = nn.ModuleList(GATConv(WIDTH, WIDTH // 4, heads=4) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        h = made(x)
        h = torch.tanh(made(h + torch.zeros_like(h).index_add(0, edges[1], h[edges[0]])))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = h + F.dropout(F.elu(norm(conv(h, edges[:, :100]))), 0.1)
        return torch.tanh(torch.zeros_like(h).index_add(0, edges[1], self.linear(h)[edges[0]])).mean()


class Relations(nn.Module):
    """Each relation's sums alone are not worth keeping what they are made of: all together are, the first as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.others = (RGCNConv(WIDTH, WIDTH, n, root_weight=False) for n in (1, 9))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        first, others = edges[:, :40], edges[:, -edges.shape[1] // 15 :]  # these are others in each step
        h = made(x)
        out = self.first(h, first, torch.zeros(40, dtype=torch.int64))
        return (out + self.others(h, others, torch.arange(others.shape[1]) % 9)).square().mean()


def edges(count: int) -> Tensor:
    return torch.randint(NODES, (count, 2), generator=torch.Generator().manual_seed(0)).T.contiguous()


X = torch.randn(NODES, WIDTH, generator=torch.Generator().manual_seed(1))
PLAN = BitPlan([PlanEntry(2, component="Mul*"), PlanEntry(4, component="*.result")], default=8)


def step(model: nn.Module, given: Tensor, context: compress_activations) -> tuple[list[Any], Tensor]:
    """The ledger of a step, and the gradient."""
    torch.manual_seed(0)
    model.zero_grad()
    with context as ledger:
        loss = model(X.clone().requires_grad_(), given)
    loss.backward()
    return said(ledger), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def said(ledger: Ledger) -> list[Any]:
    return [(entry.op, entry.codec, entry.stored_bytes, entry.recipe) for entry in ledger]


@pytest.mark.parametrize("bits", [32, 8, 2, PLAN])
@pytest.mark.parametrize("recompute", ["cheap", "aggressive"])
@pytest.mark.parametrize("of", [Model, Relations])
def test_a_step_is_what_it_would_be_without_those_before_it(
    of: type[nn.Module], bits: int | BitPlan, recompute: str
) -> None:
    """To the last bit: or a fit that is resumed would be another one. Some are alike until the last relations."""
    model, context = of(), compress_activations(bits, recompute=recompute, min_bytes=0)
    for count in (EDGES, 600, EDGES, 900, 600):
        fresh = compress_activations(bits, recompute=recompute, min_bytes=0)
        fresh.step, fresh.largest_step = context.step, context.largest_step
        (ledger, gradient), (alone, expected) = (step(model, edges(count), each) for each in (context, fresh))
        assert ledger == alone
        assert torch.equal(gradient, expected)


def weighings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often it is weighed whether a tensor is made again, in an only element."""
    weigh, counted = Costs.of_remaking, [0]

    def weighed(self: Costs, *args: Any) -> Any:
        counted[0] += 1
        return weigh(self, *args)

    monkeypatch.setattr(Costs, "of_remaking", weighed)
    return counted


def test_what_was_weighed_is_not_weighed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even if other steps came between; the first is smaller than none, and is weighed as such."""
    model, context, counted = Model(), compress_activations(2, min_bytes=0), weighings(monkeypatch)
    of_each = []
    for count in (EDGES, EDGES, 300, EDGES, 300):
        counted[0] = 0
        step(model, edges(count), context)
        of_each.append(counted[0])
    assert min(of_each[:3]) > 5
    assert of_each[3:] == [0, 0]


def test_of_steps_that_are_never_alike_not_all_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "_MOST", 100)
    model, context, counted = Model(), compress_activations(2, min_bytes=0), weighings(monkeypatch)
    for count in range(300, 330):
        step(model, edges(count), context)
    counted[0] = 0
    step(model, edges(300), context)
    assert counted[0] > 5


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("steps", [(False, False, True, False), (True, True, False, True)])
def test_what_was_there_in_steps_before_may_be_gone(steps: tuple[bool, ...], first: bool, bits: int) -> None:
    """A result that is not used, and let go of before the forward is over: nothing can be made of what it saved."""
    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(2)).requires_grad_()
    context = compress_activations(bits, min_bytes=0)
    for unused in steps:
        leaves = [X.clone().requires_grad_() for _ in range(2)]
        fresh = compress_activations(bits, min_bytes=0)
        fresh.step, fresh.largest_step = context.step, context.largest_step
        said_of = []
        for each in (context, fresh):
            with each as ledger:
                a, b = map(made, leaves)
                total = a + b
                outputs = [a * b] if first else []
                if unused:
                    outputs.clear()
                outputs.append(F.linear(total, weight))
                if not first:
                    outputs.append(a * b)
                    if unused:
                        outputs.pop()
                loss = torch.stack([output.sum() for output in outputs]).sum()
            (gradient,) = torch.autograd.grad(loss, weight)
            said_of.append((said(ledger), gradient))
        assert said_of[0][0] == said_of[1][0]
        assert torch.equal(said_of[0][1], said_of[1][1])


def test_the_users_memory_may_be_gone_by_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """As FSDP takes a weight's away: what was to be made of it keeps its own code."""
    monkeypatch.setattr(Follower, "_follow", _gone)
    with compress_activations(8, min_bytes=0) as ledger:
        a, b = made(X.clone().requires_grad_()), made(X.clone().requires_grad_())
        loss = F.linear(a + b, torch.ones(WIDTH, WIDTH, requires_grad=True)).sum() + (a * b).sum()
    loss.backward()
    assert "recipe" not in {entry.codec for entry in ledger}


def _gone(*args: Any, **options: Any) -> Any:
    raise following._Gone
