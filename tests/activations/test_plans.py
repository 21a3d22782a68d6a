"""``bits=`` as a schedule or as a plan, without Lightning."""

import pytest
import torch
from comparing import made
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_tinykg import BitPlan, CosineAnneal, Ledger, StepAnneal, compress_activations
from lightning_tinykg.bits import PlanEntry

ROWS, WIDTH = 200, 64


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x.flip(0)).tanh()
        return (hidden.exp() * self.scale).exp()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x.flip(0)).clamp(-3, 3).exp()


def kept(context: compress_activations) -> dict[tuple[str, str], list[str]]:
    """By module and op: the codecs, in the order of the saves."""
    model, x = Model(), torch.randn(ROWS, WIDTH)
    with context as ledger:
        loss = F.normalize(model(x)).sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    return by_place(ledger)


def by_place(ledger: Ledger) -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    for entry in ledger:
        if entry.codec.startswith("int") or entry.codec in ("exact", "recipe"):
            found.setdefault((entry.module, entry.op), []).append(entry.codec)
    return found


def test_layers_of_a_plan() -> None:
    """What names a layer says how many bits features get: smooth saves get more."""
    found = kept(compress_activations(BitPlan({"layers.0": 2, "layers.1": 8}, default=4), min_bytes=0, recompute="off"))
    assert found["layers.0", "Exp.result"] == ["int2", "int2"]
    assert found["layers.0", "Tanh.result"] == ["int4"]
    assert found["layers.1", "Exp.result"] == ["int8", "int8"]
    assert found["layers.1", "Tanh.result"] == ["int8"]
    assert found["Model", "Exp.result"] == ["int4"]


def test_a_layer_stands_for_all_within_it() -> None:
    found = kept(compress_activations(BitPlan({"layers": 32}, default=2), min_bytes=0, recompute="off"))
    assert found["layers.0.linear", "Addmm.mat1"] == found["layers.1", "Tanh.result"] == ["exact"]
    assert found["head", "Addmm.mat1"] == ["int2"]


def test_who_names_an_op_is_taken_at_his_word() -> None:
    plan = BitPlan({("layers", "Tanh.result"): 1, ("layers.1", "Exp.*"): 32}, default=8)
    found = kept(compress_activations(plan, min_bytes=0, recompute="off"))
    assert found["layers.0", "Tanh.result"] == found["layers.1", "Tanh.result"] == ["int1"]
    assert found["layers.0", "Exp.result"] == ["int8", "int8"]
    assert found["layers.1", "Exp.result"] == ["exact", "exact"]


def test_the_howmanieth_save() -> None:
    plan = BitPlan({("layers", "Exp.result", "1"): 1}, default=8)
    found = kept(compress_activations(plan, min_bytes=0))
    assert found["layers.0", "Exp.result"] == found["layers.1", "Exp.result"] == ["int8", "int1"]


def test_what_must_be_exact_stays_exact() -> None:
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    with compress_activations(BitPlan([PlanEntry(1, component="Log.self")], default=1), min_bytes=0) as ledger:
        loss = (made(x).abs() + 1.0).log().sum()
    loss.backward()
    assert by_place(ledger)["", "Log.self"] in (["exact"], ["recipe"])


def test_a_schedule_goes_by_the_entries() -> None:
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    context = compress_activations(StepAnneal({0: 8, 2: 4, 3: 1}), min_bytes=0)
    found = []
    for _ in range(5):
        found.append(context.bits)
        with context as ledger:
            loss = made(x).exp().sum()
        loss.backward()
        assert by_place(ledger)["", "Exp.result"] == [f"int{found[-1]}"]
    assert found == [8, 8, 4, 1, 1]


def test_or_by_what_it_is_told() -> None:
    context = compress_activations(CosineAnneal(8, 2, steps=100))
    context.optimizer_steps = 50
    assert context.bits == 4
    context.optimizer_steps = 100
    assert context.bits == 2
    by_epoch = compress_activations(StepAnneal({0: 8, 3: 2}, by="epoch"))
    by_epoch.epoch = 3
    assert by_epoch.bits == 2


def test_schedules_within_a_plan() -> None:
    plan = BitPlan({"layers.0": StepAnneal({0: 8, 1: 2})}, default=4)
    context = compress_activations(plan, min_bytes=0)
    assert kept(context)["layers.0", "Exp.result"] == ["int8", "int8"]
    later = kept(context)
    assert later["layers.0", "Exp.result"] == ["int2", "int2"]
    assert later["layers.1", "Exp.result"] == ["int4", "int4"]


def test_a_constant_plan_is_the_width() -> None:
    grads = []
    for bits in (2, BitPlan(default=2)):
        model = Model()
        with compress_activations(bits, min_bytes=0):
            loss = F.normalize(model(torch.ones(ROWS, WIDTH))).sum()
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_widths_that_there_are_not() -> None:
    widths = ", ".join(map(str, (*range(1, 13), 32)))
    with pytest.raises(ValueError, match=f"bits of compress_activations must be one of {widths}, got 16 in the plan"):
        compress_activations(BitPlan({"head": 16}))
    with pytest.raises(ValueError, match="bits of compress_activations must be one of 1, 2, 4, 8, 32, got 3 in the"):
        compress_activations(BitPlan({"head": 3}), recipe="paper")


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_widths_that_do_not_divide_a_byte(bits: int) -> None:
    """Of an exponential alone: the more bits the less error, and exactly as many bytes as bits."""
    x = torch.randn(1000, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    want = torch.autograd.grad(x.exp().sum(), x)[0]
    errors = []
    for width in (bits - 1, bits, bits + 1):
        plan = BitPlan({("*", "Exp.result"): width})
        with compress_activations(plan, recompute="off") as ledger:
            loss = x.exp().sum()
        errors.append(float((torch.autograd.grad(loss, x)[0] - want).norm()))
        group = 32 if width <= 2 else 64
        assert ledger.stored_bytes == 1000 * 64 * (width / 8 + 4 / group)
    assert errors[0] > 1.5 * errors[1] > 2.25 * errors[2]


def test_a_plain_loop_resumes_its_schedule() -> None:
    context = compress_activations(StepAnneal({0: 8, 2: 1}, by="epoch"))
    context.epoch = 2
    again = compress_activations(StepAnneal({0: 8, 2: 1}, by="epoch"))
    again.load_state_dict(context.state_dict())
    assert again.bits == 1
