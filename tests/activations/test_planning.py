"""``budget=``: bits that are chosen by what each tensor costs the gradient."""

import json
import pickle
from typing import Any

import pytest
import torch
from comparing import made
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import GATConv

from lightning_tinykg import KGAT, BitPlan, KGRecDataModule, Ledger, compress_activations
from lightning_tinykg.bits import PlanEntry
from lightning_tinykg.bits.budget import BudgetTooSmall

ROWS, WIDTH = 400, 64
INDEX = torch.randint(ROWS, (ROWS,), generator=torch.Generator().manual_seed(0))


class Model(nn.Module):
    """One path decides about the gradient, another hardly; a table that is gathered from; a small sensitive head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.strong = nn.Linear(WIDTH, WIDTH)
        self.weak = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.strong(made(x)).tanh()
        b = self.weak(made(x)).tanh()
        mixed = F.normalize(made(a)[INDEX] * made(a) + 1e-3 * made(b))
        return self.head(made(mixed)).exp()


def leaf() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1), requires_grad=True)


def step(model: nn.Module, x: Tensor, context: compress_activations | None) -> tuple[Tensor, Ledger]:
    model.zero_grad()
    ledger = Ledger()
    if context is None:
        loss = model(x).square().mean()
    else:
        with context as ledger:
            loss = model(x).square().mean()
        context.plan_for(loss, model.parameters())
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()]), ledger


def error(context: compress_activations, draws: int = 10) -> float:
    model, x = Model(), leaf()
    want, _ = step(model, x, None)
    return sum(float((step(model, x, context)[0] - want).norm() / want.norm()) for _ in range(draws)) / draws


def planned(budget: Any, **options: Any) -> compress_activations:
    context = compress_activations(budget=budget, min_bytes=0, **options)
    for _ in range(4):
        step(Model(), leaf(), context)
    return context


@pytest.mark.parametrize("budget", ["20%", "12%", "8%", 0.1, 60_000])
def test_within_the_budget(budget: Any) -> None:
    context = planned(budget)
    assert context.planner is not None
    _, ledger = step(Model(), leaf(), context)
    allowed = context.planner.budget.bytes_of(ledger.raw_bytes)
    assert 0.8 * allowed < ledger.stored_bytes <= allowed


@pytest.mark.parametrize("bits", [2, 4])
def test_better_than_one_width_for_all_in_as_many_bytes(bits: int) -> None:
    uniform = compress_activations(bits, min_bytes=0)
    _, ledger = step(Model(), leaf(), uniform)
    chosen = planned(ledger.stored_bytes)
    assert step(Model(), leaf(), chosen)[1].stored_bytes <= ledger.stored_bytes
    assert error(chosen) < error(uniform) / 1.3


class Attention(nn.Module):
    """Two layers of PyG's GATConv, as tensors that matter about alike; pairs of its rows are scored."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.edges = torch.randint(ROWS, (2, 8 * ROWS))
        self.triples = torch.randint(ROWS, (3, 2 * ROWS))
        self.nodes = nn.Parameter(torch.randn(ROWS, WIDTH))
        self.convs = nn.ModuleList(GATConv(WIDTH, WIDTH // 4, heads=4) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.nodes
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.elu(norm(conv(x, self.edges)))
        user, positive, negative = (x[index] for index in self.triples)
        return F.logsigmoid((user * positive).sum(-1) - (user * negative).sum(-1))


@pytest.mark.parametrize("bits", [8, 2])
def test_never_worse_than_one_width_for_all_in_as_many_bytes(bits: int) -> None:
    """Though there is hardly anything to gain, and the bytes are only just enough."""
    model, x = Attention(), leaf()
    want, _ = step(model, x, None)

    def errors(context: compress_activations) -> Tensor:
        return torch.stack([(step(model, x, context)[0] - want).norm() / want.norm() for _ in range(20)])

    uniform = compress_activations(bits, min_bytes=0)
    _, ledger = step(model, x, uniform)
    chosen = compress_activations(budget=ledger.stored_bytes, min_bytes=0)
    step(model, x, chosen)
    assert step(model, x, chosen)[1].stored_bytes <= ledger.stored_bytes
    mine, theirs = errors(chosen), errors(uniform)
    spread = (mine.var() / 20 + theirs.var() / 20).sqrt()  # of the difference of the means
    assert mine.mean() <= theirs.mean() + 3 * spread


@pytest.mark.parametrize(("model", "budget"), [(Model, "20%"), (Model, "9%"), (Attention, "20%"), (Attention, "6%")])
def test_a_choice_takes_no_more_than_the_bytes_that_were_reckoned(model: type[nn.Module], budget: str) -> None:
    """Also where several saves are made again from one table, as a user's row for each pair that it is scored in."""
    context = compress_activations(budget=budget, min_bytes=0)
    stored = [step(model(), leaf(), context)[1].stored_bytes for _ in range(3)]
    assert context.planner is not None
    # what a choice leaves exact may be made of one another, and then takes less
    assert stored[1] == stored[2] <= context.planner.now.stored


class Sum(nn.Module):
    """What is saved is made of two that are not: in few bits they would take less than it does in 8."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return (made(x) + made(x + 1)).tanh() * self.factor


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 12])
@pytest.mark.parametrize("model", [Model, Attention, Sum])
def test_as_much_is_made_again_whatever_the_widths(model: type[nn.Module], bits: int) -> None:
    """Or a choice would take other bytes than it was reckoned with, and the next one be for less than there are."""

    def kept(bits: int) -> list[tuple[str, str]]:
        plan = BitPlan([PlanEntry(bits, component="*.*")], default=8)
        ledger = step(model(), leaf(), compress_activations(plan, min_bytes=0))[1]
        return [(entry.op, entry.codec.replace(f"int{bits}", "rounded")) for entry in ledger]

    assert kept(bits) == kept(8)


def test_a_larger_batch_is_chosen_for_from_the_next_step_on() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
    context = compress_activations(budget=50_000, min_bytes=0, recompute="off")

    def stored(rows: int) -> int:
        with context as ledger:
            loss = model(made(leaf()[:rows])).square().sum()
        context.plan_for(loss, model.parameters())
        return ledger.stored_bytes

    stored(300)
    assert stored(300) <= 50_000
    assert stored(360) > 50_000
    assert stored(360) <= 50_000
    assert stored(300) <= 50_000


@pytest.mark.parametrize("budget", ["20%", "10%"])
def test_the_error_is_what_was_predicted(budget: str) -> None:
    context = planned(budget)
    assert context.planner is not None
    assert error(context, 20) == pytest.approx(context.planner.now.predicted, rel=0.25)


def test_who_matters_gets_more() -> None:
    context = planned("10%")
    plan = context.plan_in_force
    strong = plan.bits_for("strong", "Addmm.mat1", "0")
    weak = plan.bits_for("weak", "Addmm.mat1", "0")
    assert isinstance(strong, int)
    assert isinstance(weak, int)
    assert strong > weak


def test_where_a_choice_takes_more_than_was_reckoned_one_width_for_all_is_tried() -> None:
    """KGAT's sum and product share what they are made of, as long as that is kept in one width."""
    data = KGRecDataModule("synthetic:20000", batch_size=512)
    data.setup()
    torch.manual_seed(0)
    model = KGAT(dim=64, layer_dims=(64,), attention="frozen", dropout=0.0)
    model.set_graph(data.graph)
    batch = next(iter(data.train_dataloader()))

    def loss() -> Tensor:
        users, items = model.embed()
        taste = users[batch.user]
        return -F.logsigmoid((taste * items[batch.positive]).sum(1) - (taste * items[batch.negative]).sum(1)).mean()

    def run(context: compress_activations) -> Ledger:
        for _ in range(6):
            with context as ledger:
                found = loss()
            context.plan_for(found, model.parameters())
        return ledger

    in_two_bits = run(compress_activations(bits=2))
    context = compress_activations(budget=in_two_bits.stored_bytes)
    assert run(context).stored_bytes <= in_two_bits.stored_bytes
    assert context.bits == context.mean_bits == 2
    resumed = compress_activations(budget=in_two_bits.stored_bytes)
    resumed.load_state_dict(json.loads(json.dumps(context.state_dict())))
    assert resumed.planner is not None
    assert resumed.plan_in_force == context.plan_in_force
    assert resumed.planner.now.too_wide == 4
    with pytest.raises(BudgetTooSmall, match="budget must be at least"):
        run(compress_activations(budget=in_two_bits.stored_bytes // 2))


def test_a_budget_that_cannot_be_met_says_what_could() -> None:
    context = compress_activations(budget=1000, min_bytes=0)
    with pytest.raises(BudgetTooSmall, match=r"budget must be at least \d+ bytes for this step, got 1000") as raised:
        step(Model(), leaf(), context)
    least = raised.value.least
    again = planned(int(least * 1.05))
    assert step(Model(), leaf(), again)[1].stored_bytes <= least * 1.05


def test_all_ranks_do_as_the_first_can() -> None:
    """What one of the others could not meet is not refused, and what the first could not is, on all of them."""
    first = planned("10%").planner
    assert first is not None
    another = compress_activations(budget=1000, min_bytes=0)
    assert another.planner is not None
    at_its_first_step = {name: kind | {"steps": 0} for name, kind in first.state_dict().items()}
    another.planner.agree = lambda own: (at_its_first_step, None)
    step(Model(), leaf(), another)
    assert another.planner.now.plan == first.now.plan
    another = compress_activations(budget="10%", min_bytes=0)
    assert another.planner is not None
    told = pickle.loads(pickle.dumps(BudgetTooSmall(1, 2)))
    another.planner.agree = lambda own: (own[0], (told.budget, told.least))
    with pytest.raises(BudgetTooSmall, match="budget must be at least 2 bytes for this step, got 1"):
        step(Model(), leaf(), another)


def test_a_large_budget_keeps_all_exact() -> None:
    context = planned("1GiB")
    assert context.planner is not None
    assert context.planner.now.predicted == 0
    want, _ = step(Model(), leaf(), None)
    assert torch.equal(step(Model(), leaf(), context)[0], want)


def test_the_measuring_step_changes_nothing() -> None:
    """The gradient is that of 8 bits; weights and generators are as they were."""
    model, x = Model(), leaf()
    before = [p.detach().clone() for p in model.parameters()]
    state = torch.random.get_rng_state()
    got, ledger = step(model, x, compress_activations(budget="10%", min_bytes=0))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    want, _ = step(model, x, None)
    assert float((got - want).norm() / want.norm()) < 0.05
    assert {entry.codec for entry in ledger if entry.codec.startswith("int")} == {"int8"}


def test_kinds_of_steps_have_plans_of_their_own() -> None:
    context = compress_activations(budget="15%", min_bytes=0)
    assert context.planner is not None
    table = nn.Embedding(ROWS, WIDTH)
    for _ in range(3):
        context.planner.kind = "model"
        step(Model(), leaf(), context)
        context.planner.kind = "table"
        with context:
            loss = (made(table.weight).exp() * made(table.weight)[INDEX].tanh()).sum()
        context.plan_for(loss, table.parameters())
        loss.backward()
    first, second = (context.planner.kinds[name].plan for name in ("model", "table"))
    assert first is not None
    assert second is not None
    assert {entry.layer for entry in first.entries} != {entry.layer for entry in second.entries}


def test_measured_again_rarely() -> None:
    context = compress_activations(budget="15%", min_bytes=0)
    assert context.planner is not None
    due = []
    for number in range(102):
        if context.planner.is_due:
            due.append(number)
        step(Model(), leaf(), context)
    assert due == [0, 100]


def test_a_step_without_a_loss_is_skipped() -> None:
    context = compress_activations(budget="15%", min_bytes=0)
    assert context.planner is not None
    with context:
        Model()(leaf())
    context.plan_for(None, [])
    assert context.planner.is_due
    step(Model(), leaf(), context)
    assert not context.planner.is_due


def test_who_forgets_to_plan_is_told() -> None:
    context = compress_activations(budget="15%")
    with context:
        Model()(leaf())
    with (
        pytest.raises(RuntimeError, match=r"call its plan_for\(loss, model.parameters\(\)\) after each forward"),
        context,
    ):
        pass


def test_resumed_with_what_was_chosen() -> None:
    context = planned("10%")
    state = json.loads(json.dumps(context.state_dict()))
    again = compress_activations(budget="10%", min_bytes=0)
    again.load_state_dict(state)
    assert again.plan_in_force == context.plan_in_force
    assert torch.equal(step(Model(), leaf(), again)[0], step(Model(), leaf(), context)[0])


def test_between_8_bits_and_exact_there_are_12() -> None:
    """And what was chosen can be asked for again, as a plan."""
    context = planned("30%")
    _, ledger = step(Model(), leaf(), context)
    assert "int12" in {entry.codec for entry in ledger}
    assert error(context) < error(compress_activations(8, min_bytes=0)) / 3
    again = compress_activations(context.plan_in_force, min_bytes=0)
    assert step(Model(), leaf(), again)[1].stored_bytes == ledger.stored_bytes
    assert error(again) == pytest.approx(error(context), rel=0.2)


def test_12_bits_for_a_layer() -> None:
    twelve = compress_activations(BitPlan({"strong": 12, "": 8}, default=12), min_bytes=0)
    _, ledger = step(Model(), leaf(), twelve)
    assert {entry.codec for entry in ledger if entry.module == "strong" and entry.codec != "held"} == {"int12"}
    assert error(twelve) < error(compress_activations(8, min_bytes=0))
    with pytest.raises(ValueError, match="bits of compress_activations must be one of 1, 2, 4, 8, 32, got 12"):
        compress_activations(BitPlan({"strong": 12}), recipe="paper")


def test_what_does_not_go_together() -> None:
    with pytest.raises(ValueError, match="recipe='paper' has one width for all: it takes no budget"):
        compress_activations(budget="10%", recipe="paper")
    with pytest.raises(ValueError, match="budget must be bytes"):
        compress_activations(budget="lots")


class Custom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * ctx.saved_tensors[0].cos()


def test_of_what_is_unknown_nothing_is_risked() -> None:
    x = leaf()
    context = compress_activations(budget="30%", min_bytes=0)
    for _ in range(2):
        with context as ledger:
            loss = (Custom.apply(made(x)) * made(x)).sum()
        context.plan_for(loss, [x])
        loss.backward()
    codecs = {entry.codec for entry in ledger if entry.op == "Custom.tensors"}
    assert codecs <= {"exact", *(f"int{bits}" for bits in range(8, 13))}
