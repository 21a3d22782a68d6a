"""Compiled, scripted, traced and exported modules within the context: right gradients, and nothing compiled anew."""

import gc
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

from lightning_tinykg import Ledger, TinyKGCallback, compress_activations

WIDTH, ROWS = 64, 200
AT_ONCE = "unpacks all that it saved at once"
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]

pytestmark = [
    pytest.mark.compile,
    pytest.mark.filterwarnings(f"ignore:.*{AT_ONCE}"),
    # torch.compile(model), under anybody's global hooks
    pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

Model = Callable[..., Tensor]


class Layer(nn.Module):
    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.linear, self.norm, self.breaks = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), breaks

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.linear(x))
        if self.breaks:
            print("", end="")
            if hidden.detach().sum().item() > 1e9:
                hidden = hidden * 2
        return x + hidden.tanh()


class Net(nn.Module):
    def __init__(self, layers: int = 3, breaks: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(breaks) for _ in range(layers))
        self.head = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)  # type: ignore[no-any-return]  # a tensor: calls of modules and functions are untyped


def whole(model: Net, backend: Any = "aot_eager", **options: Any) -> Model:
    return torch.compile(model, backend=backend, **options)


def in_place(model: Net, backend: Any = "aot_eager") -> Model:
    model.compile(backend=backend)
    return model


def by_layer(model: Net, backend: Any = "aot_eager") -> Model:
    for layer in model.layers:
        layer.compile(backend=backend)
    return model


def as_function(model: Net, backend: Any = "aot_eager") -> Model:
    def forward(x: Tensor) -> Tensor:
        return model(x)  # type: ignore[no-any-return]  # a tensor: calls of modules and functions are untyped

    return torch.compile(forward, backend=backend)


WAYS = [whole, in_place, by_layer, as_function]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Graphs of other tests count towards the recompile limit."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def rows(number: int = ROWS) -> Tensor:
    return torch.randn(number, WIDTH, generator=torch.Generator().manual_seed(number))


def step(
    model: nn.Module,
    run: Model,
    x: Tensor,
    context: compress_activations | None = None,
    around: AbstractContextManager[Any] | None = None,
) -> tuple[Tensor, Ledger]:
    """The gradients of one step."""
    model.zero_grad()
    ledger = Ledger()
    with around or nullcontext():
        if context is None:
            loss = run(x).float().square().mean()
        else:
            with context as ledger:
                loss = run(x).float().square().mean()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), ledger


def assert_right(model: nn.Module, run: Model, x: Tensor, around: Any = nullcontext, error: float = 0.03) -> Ledger:
    """At 32 bits the gradients are the plain ones to the last bit, at 8 bits they are close; and nothing stays on."""
    want, _ = step(model, run, x, around=around())
    exact, _ = step(model, run, x, compress_activations(32), around=around())
    assert torch.equal(exact, want)
    got, ledger = step(model, run, x, compress_activations(8, recompute="off"), around=around())
    assert 0 < float((got - want).norm() / want.norm()) < error
    again, _ = step(model, run, x, around=around())
    assert torch.equal(again, want)
    return ledger


# -- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_module(fullgraph: bool, backend: str) -> None:
    model = Net()
    ledger = assert_right(model, whole(model, backend, fullgraph=fullgraph), rows())
    assert ("CompiledFunction.tensors", "int8") in {(entry.op, entry.codec) for entry in ledger}
    assert ledger.ratio > 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_compile(way: Any, backend: str) -> None:
    model = Net()
    ledger = assert_right(model, way(model, backend), rows())
    assert "unknown" not in {entry.op for entry in ledger}
    assert ledger.ratio > 2.9


@pytest.mark.parametrize("backend", BACKENDS)
def test_graph_breaks(backend: str) -> None:
    """What runs eagerly between the graphs is seen op by op, as if nothing were compiled."""
    model = Net(breaks=True)
    assert assert_right(model, whole(model, backend), rows()).ratio > 3


class Untraceable(Layer):
    """A frame that is not traced: it runs as it is written, only what it calls may be compiled."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.linear(x))
        torch._dynamo.graph_break()
        with EAGER:
            torch._dynamo.graph_break()
            return x + hidden.tanh().exp()


class _Opaque:
    def __enter__(self) -> None: ...

    def __exit__(self, *exc_info: Any) -> None: ...


EAGER = _Opaque()


def test_our_own_functions_are_not_compiled() -> None:
    """Where a frame runs as it is written, torch.compile takes each function called there for one to compile."""
    model = nn.Sequential(Untraceable(), nn.Linear(WIDTH, 8))
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, backend=counter)
    ledger = assert_right(model, run, rows())
    assert {"Tanh.result", "Exp.result"} <= {entry.op for entry in ledger}
    assert {entry.module for entry in ledger if entry.op == "Tanh.result"} == {"0"}


@pytest.mark.parametrize("size", ["automatic", True])
def test_sizes_that_change(size: Any) -> None:
    model = Net()
    counter = CompileCounterWithBackend("aot_eager")
    run = whole(model, counter, dynamic=None if size == "automatic" else size)
    ratios = [assert_right(model, run, rows(number), error=0.06).ratio for number in (200, 130, 70, 90)]
    assert min(ratios) > 2.9
    assert counter.frame_count <= 4  # one graph under the hooks and one without, static and dynamic


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", [whole, by_layer])
def test_autocast(way: Any, backend: str) -> None:
    model = Net()
    run = way(model, backend)
    ledger = assert_right(model, run, rows(), lambda: torch.autocast("cpu", torch.bfloat16), error=0.1)
    assert "bfloat16" in {entry.dtype for entry in ledger}
    assert ledger.ratio > 1.8


def test_context_within_the_compiled_function() -> None:
    """It breaks the graph, and what is called within it is compiled."""
    model = Net()
    want, _ = step(model, model, rows())
    counter, context, ledgers = CompileCounterWithBackend("aot_eager"), compress_activations(8), []

    def loss(x: Tensor) -> Tensor:
        with context as ledger:
            ledgers.append(ledger)
            # a tensor: calls of modules and functions are untyped
            return model(x).square().mean()  # type: ignore[no-any-return]

    compiled = torch.compile(loss, backend=counter)
    for _ in range(4):
        model.zero_grad()
        compiled(rows()).backward()
        # there is one, after a backward
        got = torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
        assert 0 < float((got - want).norm() / want.norm()) < 0.03
    assert counter.frame_count == 1
    assert "CompiledFunction.tensors" in {entry.op for entry in ledgers[-1]}


# -- recompiles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_compiled_anew_each_step(way: Any) -> None:
    """One graph without and one with the hooks, whatever the width; more, and it would soon run eagerly."""
    model, x = Net(), rows()
    counter = CompileCounterWithBackend("aot_eager")
    run = way(model, counter)
    step(model, run, x)
    plain = counter.frame_count
    context = compress_activations(8)
    for _ in range(10):
        _, ledger = step(model, run, x, context)
    for bits in (2, 4, 32):
        step(model, run, x, compress_activations(bits))
    step(model, run, x)
    assert counter.frame_count == 2 * plain
    for _ in range(3):
        with compress_activations(8):
            step(model, run, x, compress_activations(2))
    assert counter.frame_count <= 3 * plain  # two observers are another graph
    assert "CompiledFunction.tensors" in {entry.op for entry in ledger}


# -- memory ---------------------------------------------------------------------------------------------------------


def memory(function: Callable[[], Any]) -> tuple[Any, int, int]:
    """A function's result, the bytes by which it leaves more allocated, and the most it had; compiled code included."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = function()
    now = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return result, now, peak


def step_memory(way: Any, bits: int | None, backend: str) -> tuple[int, int]:
    """The bytes held after the forward, and at the peak of the backward."""
    torch._dynamo.reset()
    model = Net(layers=6)
    run, x = way(model, backend) if way else model, rows(512)
    context = compress_activations(bits) if bits else None

    def forward() -> Tensor:
        with context or nullcontext():
            return run(x).square().mean()

    forward().backward()
    loss, held, _ = memory(forward)
    _, _, peak = memory(loss.backward)
    return held, held + peak


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_memory(backend: str) -> None:
    """Between forward and backward, a compiled graph takes less; at the backward's peak only layer by layer."""
    held, peak = step_memory(whole, None, backend)
    held_whole, peak_whole = step_memory(whole, 8, backend)
    held_layers, peak_layers = step_memory(by_layer, 8, backend)
    assert held_whole < 0.3 * held
    assert held_layers < 0.3 * held
    assert peak_whole > 0.9 * peak  # which is what the warning says; if this ever fails, take the warning out
    assert peak_layers < 0.65 * peak


# -- the warning ----------------------------------------------------------------------------------------------------


def told(model: Net, run: Model, context: compress_activations, steps: int = 3) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            step(model, run, rows(), context)
    return [str(w.message) for w in caught if re.search(AT_ONCE, str(w.message))]


@pytest.mark.parametrize("way", [whole, in_place, as_function])
def test_a_graph_of_everything_is_warned_of_once(way: Any) -> None:
    model = Net()
    (message,) = told(model, way(model), compress_activations(8))
    assert "for layer in model.layers: layer.compile()" in message


def test_a_graph_that_is_the_last_op_is_warned_of() -> None:
    """No op comes after it that would name it: a compiled training step ends like that."""
    model = Net()

    @torch.compile(backend="aot_eager")
    def loss(x: Tensor) -> Tensor:
        # a tensor: calls of modules and functions are untyped
        return model(x).square().mean()  # type: ignore[no-any-return]

    with pytest.warns(UserWarning, match=AT_ONCE), compress_activations(8) as ledger:
        value = loss(rows())
    value.backward()
    assert {entry.op for entry in ledger} == {"CompiledFunction.tensors"}


@pytest.mark.parametrize("way", [by_layer, lambda model: model])
def test_layers_are_not_warned_of(way: Any) -> None:
    model = Net()
    assert told(model, way(model), compress_activations(8)) == []


# -- which modules --------------------------------------------------------------------------------------------------


def test_compiled_layers_go_by_their_paths() -> None:
    model, x = Net(), rows()
    run = by_layer(model)
    _, ledger = step(model, run, x, compress_activations(8, modules=["layers.*", "!layers.1"]))
    kept = {(entry.module, entry.codec) for entry in ledger if entry.raw_bytes > 10_000}
    assert kept == {("layers.0", "int8"), ("layers.1", "exact"), ("layers.2", "int8"), ("head", "exact")}


# -- custom functions between graphs --------------------------------------------------------------------------------


class Sine(torch.autograd.Function):
    """Ops run within its forward, while what was saved before it still waits to be named."""

    saved: ClassVar[list[StorageWeakRef]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        cosine = x.cos()
        ctx.save_for_backward(cosine)
        Sine.saved.append(StorageWeakRef(cosine.untyped_storage()))
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # a tensor: calls of modules and functions are untyped
        return grad * ctx.saved_tensors[0]  # type: ignore[no-any-return]


def test_custom_functions_in_a_row_are_named_at_once() -> None:
    """No more than the last one's tensors are still raw."""
    x = rows().requires_grad_()
    Sine.saved.clear()
    with compress_activations(8) as ledger:
        y = x
        for _ in range(12):
            y = Sine.apply(y)
            assert sum(not storage.expired() for storage in Sine.saved) == 1
    y.sum().backward()
    assert [entry.op for entry in ledger] == ["Sine.tensors"] * 12


# -- in a Trainer ---------------------------------------------------------------------------------------------------


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        x, y = torch.randn(600, WIDTH, generator=generator), torch.randn(600, 8, generator=generator)
        return DataLoader(TensorDataset(x, y), batch_size=50)


def fit(bits: int | None, backend: Any) -> tuple[list[Tensor], TinyKGCallback | None]:
    module = Module()
    compiled: Any = torch.compile(module, backend=backend) if backend else module
    callback = TinyKGCallback(bits, summary=False) if bits else None
    trainer = L.Trainer(
        callbacks=[callback] if callback else [],
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        max_epochs=1,
    )
    trainer.fit(compiled)
    return [p.detach().clone() for p in module.parameters()], callback


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_training_step(backend: str) -> None:
    """A step is a graph of its own, in which the callback sees no op: twelve of them, compiled once."""
    counter = CompileCounterWithBackend(backend)
    want, _ = fit(None, counter)
    plain = counter.frame_count
    exact, _ = fit(32, counter)
    assert all(torch.equal(a, b) for a, b in zip(exact, want, strict=True))
    torch._dynamo.reset()
    counter.frame_count = 0
    with pytest.warns(UserWarning, match=AT_ONCE):
        got, callback = fit(8, counter)
    assert counter.frame_count == plain
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(got, want, strict=True))
    assert callback is not None
    ledger = callback.ledger
    assert ledger is not None
    assert ledger.ratio > 3
    # the batch is the user's, though no op is seen to take it
    assert ("CompiledFunction.tensors", (50, WIDTH), "held") in {(e.op, e.shape, e.codec) for e in ledger}


# -- other compilers ------------------------------------------------------------------------------------------------


def scripted(model: nn.Module) -> Any:
    return torch.jit.script(model)


def traced(model: nn.Module) -> Any:
    return torch.jit.trace(model, rows())


def exported(model: nn.Module) -> Any:
    return torch.export.export(model, (rows(),)).module()


def symbolically_traced(model: nn.Module) -> Any:
    return torch.fx.symbolic_trace(model)


def plain_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Tanh(), nn.Linear(WIDTH, 8))


@pytest.mark.parametrize("made_within", [False, True])
@pytest.mark.parametrize("how", [scripted, traced, exported, symbolically_traced])
def test_scripted_traced_and_exported(how: Any, made_within: bool) -> None:
    """Whether the graph is made within the context or before, it is the same and its gradients are right."""
    model = plain_net()
    with compress_activations(8) if made_within else nullcontext():
        graph = how(model)
    assert torch.equal(graph(rows()), model(rows()))
    for _ in range(3):  # the script is optimised in its first runs
        step(graph, graph, rows())
    assert assert_right(graph, graph, rows()).ratio > 2.5
