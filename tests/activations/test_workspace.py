"""Saved tensors are restored into memory that is used again, and made again once for all saves of them."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_tinykg import compress_activations
from lightning_tinykg.activations.remaking import Making
from lightning_tinykg.activations.workspace import Workspace
from lightning_tinykg.codecs import AffineCode

CPU = torch.device("cpu")
MIB = 1 << 20


def empty(workspace: Workspace, *shape: int) -> Tensor:
    return workspace.empty(shape, dtype=torch.float32, device=CPU)


def test_memory_is_used_again_once_nobody_has_it() -> None:
    workspace = Workspace()
    first = empty(workspace, MIB)
    view, place = first[5:9], first.data_ptr()
    del first
    second = empty(workspace, MIB)
    assert second.data_ptr() != place  # a view of the first is alive
    del view
    third = empty(workspace, 1024, 512)
    assert third.data_ptr() == place
    assert third.is_contiguous()
    assert third.shape == (1024, 512)


def test_memory_is_not_given_for_what_is_far_smaller() -> None:
    workspace = Workspace()
    place = empty(workspace, 8 * MIB).data_ptr()
    assert empty(workspace, MIB).untyped_storage().nbytes() == 4 * MIB != place


def test_memory_that_is_outgrown_is_let_go_of() -> None:
    workspace = Workspace()
    for quarters in range(4, 40):
        empty(workspace, quarters * MIB // 4)
    assert sum(buffer.nbytes() for buffer in workspace._buffers) <= 4 * 39 * MIB // 4
    empty(workspace, MIB)
    empty(workspace, 39 * MIB // 4)
    assert [buffer.nbytes() for buffer in workspace._buffers] == [39 * MIB, 4 * MIB]


def gradients(step: Callable[[], Tensor], inputs: list[Tensor], backwards: int = 1) -> list[Tensor]:
    loss = step()
    for _ in range(backwards):
        for tensor in inputs:
            tensor.grad = None
        loss.backward(retain_graph=True)
    return [tensor.grad for tensor in inputs if tensor.grad is not None]


def test_what_several_ops_saved_is_made_again_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x, r = torch.randn(300, 64, requires_grad=True), torch.randn(9, 64, requires_grad=True)
    index, kind = torch.randint(300, (8000,)), torch.randint(9, (8000,))
    runs: list[str] = []
    run = Making._run

    def counted(self: Making, workspace: Workspace) -> Tensor:
        runs.append(self.op.__name__)
        return run(self, workspace)

    monkeypatch.setattr(Making, "_run", counted)
    with compress_activations(bits=32):
        gate = torch.tanh(x[index] + r[kind])  # saved by tanh, and by the product
        loss = (x[index] * gate).sum()
    del gate
    loss.backward()
    assert runs.count("tanh") == 1
    assert runs.count("add") == 1


class Gates(nn.Module):
    """Every pointwise op that is made again, in one chain, from tables that are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(500, 64))
        self.other = nn.Parameter(torch.randn(500, 64))

    def forward(self, index: Tensor, other: Tensor) -> Tensor:
        a, b = self.table[index], nn.functional.embedding(other, self.other)
        c = torch.index_select(self.table, 0, other)
        chains = [
            (a + b).tanh() * c,
            (2.0 - a).sigmoid() * b,
            (b - c).relu() * a,
            (0.5 + (-a)) * (c * 3.0),
            nn.functional.leaky_relu(a - b, 0.2) * c,
            (0.1 * (a * b)).exp() * c,
            self.table[:, :32][index] * b[:, :32],
        ]
        return sum((chain.square().mean() for chain in chains), torch.zeros(()))


@pytest.mark.parametrize("backwards", [1, 2])
def test_every_op_that_is_made_again_is_exact(backwards: int) -> None:
    torch.manual_seed(0)
    model, index = Gates(), torch.randint(-500, 500, (5000,))
    other = torch.randint(500, (5000,))
    inputs = list(model.parameters())
    plain = gradients(lambda: model(index, other), inputs)

    def compressed() -> Tensor:
        with compress_activations(bits=32) as ledger:
            loss: Tensor = model(index, other)
        assert {"recipe", "gather"} <= {entry.codec for entry in ledger.entries}
        return loss

    ours = gradients(compressed, inputs, backwards)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_double_backward_keeps_what_it_was_given() -> None:
    """What the first backward saves in its turn is not overwritten by what is restored after it."""
    torch.manual_seed(0)
    x = torch.randn(600, 512, requires_grad=True)
    index = torch.randint(600, (1200,))

    def penalty() -> Tensor:
        gate = torch.tanh(x[index] * 0.5)
        loss = (gate * x[index].roll(1, 0)).square().sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        return gradient.square().sum()

    (want,) = torch.autograd.grad(penalty(), x)
    with compress_activations(bits=32):
        value = penalty()
    (got,) = torch.autograd.grad(value, x)
    assert torch.equal(got, want)


def test_a_few_rows_of_a_rounded_table(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    x, index, weight = torch.randn(4000, 64), torch.randint(-4000, 4000, (300,)), nn.Parameter(torch.randn(300, 64))
    inputs, given = [*model.parameters(), weight], []
    rows = AffineCode.rows

    def watched(self: AffineCode, index: Tensor, width: int) -> Tensor | None:
        given.append(rows(self, index, width))
        return given[-1]

    def step() -> Tensor:
        with compress_activations(bits=4, seed=1):
            table = model(x).flip(0)
            squares = (table * table).sum()  # from here on the table is kept
            return squares + (table[index] * weight).sum()

    monkeypatch.setattr(AffineCode, "rows", watched)
    few = gradients(step, inputs)
    assert [None if found is None else tuple(found.shape) for found in given] == [(300, 64)]
    monkeypatch.setattr(AffineCode, "rows", lambda self, index, width: None)
    assert all(torch.equal(a, b) for a, b in zip(few, gradients(step, inputs), strict=True))


def test_a_workspace_dies_with_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Workspace]] = []
    init = Workspace.__init__

    def noted(self: Workspace) -> None:
        init(self)
        made.append(weakref.ref(self))

    monkeypatch.setattr(Workspace, "__init__", noted)
    x, index = torch.randn(2000, 512, requires_grad=True), torch.randint(2000, (4000,))
    context = compress_activations(bits=2)
    with context:
        loss = (torch.tanh(x[index]) * x[index]).sum()
    (workspace,) = made
    assert workspace() is not None
    loss.backward()
    del loss
    gc.collect()
    assert workspace() is None
