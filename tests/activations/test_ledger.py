"""The ledger tells the truth: what it counts is what is alive between forward and backward."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from comparing import made
from memory import LiveBytes
from steps import KGAT, KGCN, Graph, KGATOnce, bpr
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import GATConv

from lightning_tinykg import Ledger, compress_activations

GRAPH = Graph.random(2000, 20000)
DIM = 64


class Gat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nodes = nn.Parameter(torch.randn(2000, DIM))
        self.convs = nn.ModuleList(GATConv(DIM, DIM // 4, heads=4, dropout=0.1) for _ in range(2))

    def forward(self) -> Tensor:
        x: Tensor = self.nodes
        for conv in self.convs:
            x = F.elu(conv(x, GRAPH.edge_index))
        return x


def kgcn_loss(model: nn.Module) -> Tensor:
    user, positive, negative = GRAPH.triples
    return -F.logsigmoid(model(user, positive) - model(user, negative)).mean()


def mlp() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 128), nn.GELU(), nn.LayerNorm(128),
        nn.Linear(128, 32), nn.Tanh(), nn.Linear(32, 8),
    )  # fmt: skip
    batch, labels = torch.randn(1500, 64), torch.randint(8, (1500,))
    return model, lambda m: F.cross_entropy(m(batch), labels)


MODELS: dict[str, Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]] = {
    "mlp": mlp,
    "gat": lambda: (Gat(), lambda m: bpr(m(), GRAPH.triples)),
    "kgat": lambda: (KGAT(GRAPH, DIM, 2), lambda m: bpr(m(), GRAPH.triples)),
    "kgat-once": lambda: (KGATOnce(GRAPH, DIM, 2), lambda m: bpr(m(), GRAPH.triples)),
    "kgcn": lambda: (KGCN(GRAPH, DIM), kgcn_loss),
}


def alive_after(forward: Callable[[], Tensor]) -> int:
    """The bytes that a forward leaves alive, besides what was there before and its result."""
    gc.collect()
    with LiveBytes() as live:
        loss = forward()
        gc.collect()
        kept = live.now - loss.untyped_storage().nbytes()
    loss.backward()
    return kept


@pytest.mark.parametrize("name", MODELS)
def test_what_it_counts_is_what_is_alive(name: str) -> None:
    torch.manual_seed(0)
    model, loss = MODELS[name]()
    plain = alive_after(lambda: loss(model))
    for bits in (32, 8, 2):
        context = compress_activations(bits=bits)
        ledgers: list[Ledger] = []

        def forward(context: compress_activations = context, ledgers: list[Ledger] = ledgers) -> Tensor:
            with context as ledger:
                value = loss(model)
            ledgers.append(ledger)
            return value

        stored = alive_after(forward)
        (ledger,) = ledgers
        assert ledger.raw_bytes == pytest.approx(plain, rel=0.02), bits
        assert ledger.stored_bytes == pytest.approx(stored, rel=0.02), bits
        assert ledger.ratio == ledger.raw_bytes / ledger.stored_bytes


@pytest.mark.parametrize("bits", [32, 8, 2])
@pytest.mark.parametrize("recipe", ["rules", "paper"])
def test_mixed_pieces(bits: int, recipe: str) -> None:
    """Duplicates, views, slices, expanded tensors, masks and integers, each counted once."""
    if recipe == "paper" and bits == 32:
        return
    a, b = torch.randn(600, 64, requires_grad=True), torch.randn(600, 64, requires_grad=True)
    weights = torch.randn(600, 64)

    def forward() -> Tensor:
        x, y = made(a), made(b)
        total = (x * y).sum() + (x * y.flip(0)).mul(weights).sum() + (x.t() @ y).sum()
        total = total + (x[:100] * y[500:]).exp().sum() + (x[:, ::2] * y[:, 1::2]).sum()
        total = total + (y[:1].expand(600, -1) * x).sum()
        order = x.argsort(0)
        total = total + (torch.where(x > y, x, y * x)).sum() + x.gather(0, order).tanh().sum()
        return total + x.max(-1).values.sum()

    plain = alive_after(forward)
    ledgers: list[Ledger] = []

    def packed() -> Tensor:
        with compress_activations(bits=bits, recipe=recipe) as ledger:
            value = forward()
        ledgers.append(ledger)
        return value

    stored = alive_after(packed)
    assert ledgers[0].raw_bytes == pytest.approx(plain, rel=0.02)
    assert ledgers[0].stored_bytes == pytest.approx(stored, rel=0.02)


def test_excluded_modules_count_in_full() -> None:
    model, loss = mlp()
    plain = alive_after(lambda: loss(model))
    with compress_activations(bits=2, modules=["!0", "!1", "!2", "!3", "!4", "!5", "!6", "!7", "!8"]) as ledger:
        loss(model)
    assert ledger.raw_bytes == pytest.approx(plain, rel=0.02)
    assert ledger.stored_bytes == pytest.approx(plain, rel=0.02)


@pytest.mark.parametrize("bits", [32, 8, 2])
def test_what_the_user_holds_is_not_raw(bits: int) -> None:
    """The plain graph keeps an output alive at no cost, if the user holds it anyway."""
    model = nn.Linear(64, 64)
    x = torch.randn(500, 64)
    with compress_activations(bits=bits) as ledger:
        held = model(x).tanh()
    assert ledger.raw_bytes == 0
    del held


DROPPED: dict[str, Callable[[Tensor], Tensor]] = {
    "argsort": lambda x: x.argsort(0),
    "topk": lambda x: x.topk(20).indices,
    "max": lambda x: x.max(-1).indices,
    "rows": lambda x: (x[:256] * x[256:]).detach(),
}


@pytest.mark.parametrize("how", DROPPED)
def test_a_save_of_a_node_that_died_is_not_counted(how: str) -> None:
    """An index is all that is asked of a sort or a topk: their node is gone at once, and what it saved with it."""
    a = torch.randn(512, 64, requires_grad=True)

    def forward() -> Tensor:
        x = made(a)
        for _ in range(3):
            DROPPED[how](x)
        return x.sum()

    plain = alive_after(forward)
    assert plain < 1000
    with compress_activations(bits=2) as ledger:
        forward()
    assert ledger.raw_bytes == pytest.approx(plain, abs=1000)
    assert ledger.stored_bytes == pytest.approx(plain, abs=1000)


class Keeps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: Tensor) -> Tensor:
        ctx.save_for_backward(batch)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * 2 + 0 * ctx.saved_tensors[0].sum(), None


def test_the_batch_is_free_in_a_custom_function_too() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, batch: Tensor) -> Tensor:
            return Keeps.apply(self.linear(batch), batch)

    model, batch = Model(), torch.randn(500, 64)
    with compress_activations(bits=2) as ledger:
        loss = model(batch).sum()
    loss.backward()
    assert ledger.raw_bytes == ledger.stored_bytes == 0
    assert {entry.codec for entry in ledger} == {"held"}


@pytest.mark.parametrize("bits", [32, 2])
def test_complex_tensors_are_counted(bits: int) -> None:
    x = torch.randn(200, 64, requires_grad=True)

    def forward() -> Tensor:
        spectrum = torch.fft.rfft(made(x))
        return (spectrum * spectrum.conj().resolve_conj()).abs().sum()

    plain = alive_after(forward)
    with compress_activations(bits=bits) as ledger:
        forward()
    assert ledger.raw_bytes == pytest.approx(plain, rel=0.02)


def test_parameters_and_the_batch_are_free() -> None:
    model = nn.Linear(64, 64)
    x = torch.randn(500, 64)
    with compress_activations(bits=2) as ledger:
        model(x).sum()
    assert ledger.raw_bytes == ledger.stored_bytes == 0
    assert ledger.ratio == 1.0
    assert {entry.codec for entry in ledger} == {"held"}


def test_index_made_in_the_forward_is_counted_and_the_users_is_not() -> None:
    x = torch.randn(1000, 64, requires_grad=True)
    index = torch.randint(1000, (5000,))
    with compress_activations(bits=2) as ledger:
        (made(x)[index]).sum()
    assert ledger.raw_bytes == 0
    with compress_activations(bits=2) as ledger:
        made(x)[index.flip(0)].sum()
    assert ledger.raw_bytes == 5000 * 8
    assert ledger.stored_bytes == 5000 * 2
    with compress_activations(bits=2) as ledger:
        made(x)[torch.cat([index, index])].sum()  # it is made again
    assert ledger.raw_bytes == 10000 * 8
    assert ledger.stored_bytes == 0


def test_users_index_of_an_assignment_is_not_counted() -> None:
    x = torch.randn(1000, 64, requires_grad=True)
    index = torch.randperm(1000)[:500]
    with compress_activations(bits=2) as ledger:
        h = made(x)
        h[index] = 0.0
        h.sum()
    assert ledger.stored_bytes == 0


def test_one_code_for_all_views() -> None:
    a = torch.randn(512, 64, requires_grad=True)
    weights = torch.randn(512, 64)

    def forward() -> Tensor:
        x = made(a)
        total = (x * x).mul(weights).sum() + (x.t() @ x).sum() + (x.view(8, -1) ** 2).sum()
        return total + (x[None].expand(3, -1, -1) ** 2).sum()

    with compress_activations(bits=2) as ledger:
        forward()
    assert ledger.raw_bytes == 512 * 64 * 4
    assert ledger.stored_bytes == 512 * 64 // 4 + 512 * 64 // 32 * 4


def test_raw_bytes_do_not_depend_on_the_width() -> None:
    torch.manual_seed(0)
    model, loss = MODELS["gat"]()
    counts = set()
    for bits in (1, 2, 4, 8, 32):
        with compress_activations(bits=bits) as ledger:
            loss(model)
        counts.add(ledger.raw_bytes)
    assert len(counts) == 1


# -- op identity -------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.linear = nn.Linear(32, 32)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)
        self.lstm = nn.LSTM(32, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, dropout=0.1)
        self.gat = GATConv(16, 8, heads=2)
        self.norm = nn.BatchNorm1d(16)

    def forward(self, index: Tensor, edges: Tensor) -> Tensor:
        x = self.linear(self.table(index)).relu().view(-1, 4, 32)
        x = self.conv(x)
        x = self.lstm(x)[0]
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = F.dropout(F.gelu(self.norm(x.reshape(-1, 16))), 0.1)
        x = self.gat(x, edges)
        y = x * 1.0
        y[edges[0][:3]] = 0.0
        for _ in range(12):  # nothing of the assignment is asked for, for a while
            x = x + 1.0
        return F.normalize(torch.cat([x, y.clamp(min=0.0)], 1)).softmax(-1).log().max(1).values.sum()


@pytest.mark.parametrize("bits", [2, 32])
def test_every_save_is_named(bits: int) -> None:
    model = Mixed()
    index, edges = torch.randint(50, (80,)), torch.randint(80, (2, 300))
    with compress_activations(bits=bits, min_bytes=0) as ledger:
        loss = model(index, edges)
    loss.backward()
    assert len(ledger) > 40
    assert not [entry for entry in ledger if entry.op == "unknown"]
    ops = {entry.op for entry in ledger}
    assert {"Convolution.input", "Embedding.indices", "Softmax.result", "LeakyRelu.self", "Log.self"} <= ops
    modules = {entry.module for entry in ledger}
    assert {"linear", "conv", "lstm", "gat", "norm", "Mixed"} <= modules


def test_saves_go_by_the_node_that_asks_for_them() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    with compress_activations(bits=2, recompute="off") as ledger:
        h = made(x)
        loss = (h.exp() @ h.tanh()).relu().sum()
    loss.backward()
    assert sorted(entry.op for entry in ledger) == ["Exp.result", "Mm.mat2", "Mm.self", "Relu.result", "Tanh.result"]
    assert {entry.op: entry.codec for entry in ledger}["Relu.result"] == "mask"


# -- what a user reads -------------------------------------------------------------------------------------------


@pytest.fixture
def ledger() -> Ledger:
    torch.manual_seed(0)
    model, loss = mlp()
    with compress_activations(bits=2) as ledger:
        loss(model)
    return ledger


def test_print_is_a_table(ledger: Ledger) -> None:
    text = str(ledger)
    lines = text.splitlines()
    assert f"{ledger.ratio:.1f}x" in lines[0]
    header = next(line for line in lines if "module" in line)
    for word in ("op", "kept as", "saves", "raw", "stored"):
        assert word in header
    for entry in ledger:
        if entry.raw_bytes:
            assert entry.op in text
    assert "Gelu.self" in text
    assert max(map(len, lines)) <= 110
    assert repr(ledger).startswith(f"{len(ledger)} saves")


def test_a_short_table_adds_up_the_rest(ledger: Ledger) -> None:
    assert "..." in ledger.to_text(limit=2)
    assert len(ledger.to_text(limit=2)) < len(ledger.to_text())


def test_rows_make_a_frame(ledger: Ledger) -> None:
    frame = pd.DataFrame(ledger.rows())
    assert list(frame.columns) == [
        "module",
        "op",
        "codec",
        "shape",
        "dtype",
        "raw_bytes",
        "stored_bytes",
        "need",
        "recipe",
        "work",
    ]
    assert len(frame) == len(ledger)
    assert frame.raw_bytes.sum() == ledger.raw_bytes
    assert frame.stored_bytes.sum() == ledger.stored_bytes


def test_summary_adds_up(ledger: Ledger) -> None:
    summary = ledger.summary()
    assert sum(group["raw_bytes"] for group in summary) == ledger.raw_bytes
    assert sum(group["stored_bytes"] for group in summary) == ledger.stored_bytes
    assert sum(group["saves"] for group in summary) == len(ledger)
    sizes = [max(group["raw_bytes"], group["stored_bytes"]) for group in summary]
    assert sizes == sorted(sizes, reverse=True)


def test_plot_can_be_saved(ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "ledger.png"
    ledger.plot().savefig(path)
    assert path.stat().st_size > 5000
    assert path.read_bytes().startswith(b"\x89PNG")


def test_an_empty_ledger() -> None:
    with compress_activations() as ledger:
        pass
    assert len(ledger) == ledger.raw_bytes == ledger.stored_bytes == 0
    assert ledger.ratio == 1.0
    assert "0 saves" in str(ledger)
    ledger.plot()
    assert pd.DataFrame(ledger.rows()).empty


def test_ratio_of_what_costs_nothing() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    with compress_activations(bits=2) as ledger:
        torch.zeros(64, 64).index_add(0, torch.arange(64), made(x))
    assert {entry.codec for entry in ledger if entry.op == "IndexAdd.source"} <= {"shape"}
    assert ledger.stored_bytes <= 64
    assert ledger.ratio == (float("inf") if not ledger.stored_bytes else ledger.raw_bytes / ledger.stored_bytes)


@pytest.mark.parametrize("how", ["backward", "autograd.backward", "autograd.grad", "outside"])
def test_a_backward_within_the_context_takes_nothing_off_the_books(how: str) -> None:
    """Its nodes die because they have done their work, not because nobody wanted them."""
    linear, x = torch.nn.Linear(64, 64), torch.randn(100, 64)
    backwards = {
        "backward": lambda: linear(x).tanh().square().mean().backward(),
        "autograd.backward": lambda: torch.autograd.backward(linear(x).tanh().square().mean()),
        "autograd.grad": lambda: torch.autograd.grad(linear(x).tanh().square().mean(), list(linear.parameters())),
        "outside": lambda: linear(x).tanh().square().mean(),
    }
    with compress_activations(bits=8, min_bytes=0) as ledger:
        kept = backwards[how]()
        torch.ones(1) + 1
    assert ledger.raw_bytes == 100 * 64 * 4
    del kept
