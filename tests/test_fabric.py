"""``compress_activations`` in a loop of the user's own: plain PyTorch, and Fabric on one and on two processes."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_tinykg import Ledger, compress_activations, keep_exact

Context = AbstractContextManager[Any]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More threads add in any order, and sums would not repeat to the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 64), nn.Tanh())
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        # a tensor: calls of modules and functions are untyped
        return self.head(self.body(x))  # type: ignore[no-any-return]


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(64, 64, generator=generator), torch.randn(64, 4, generator=generator)) for _ in range(4)]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def tiny(bits: int = 2, **options: Any) -> compress_activations:
    return compress_activations(bits, **({"min_bytes": 0} | options))


# -- plain PyTorch -----------------------------------------------------------------------------------------------


def _sgd(model: nn.Module) -> Any:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def plain_loop(context: Context) -> tuple[list[float], list[Tensor]]:
    model = Model()
    optimizer, losses = _sgd(model), []
    for x, y in batches():
        with context:
            loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, list(model.parameters())


def accumulating(context: Context) -> tuple[list[float], list[Tensor]]:
    """Two batches to a step, clipped."""
    model = Model()
    optimizer, losses = _sgd(model), []
    for number, (x, y) in enumerate(batches()):
        with context:
            loss = F.mse_loss(model(x), y) / 2
        loss.backward()
        losses.append(loss.item())
        if number % 2:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
    return losses, list(model.parameters())


def two_optimizers(context: Context) -> tuple[list[float], list[Tensor]]:
    """Each with a forward and a backward, all within the context."""
    model = Model()
    optimizers, losses = [_sgd(model.body), torch.optim.Adam(model.head.parameters())], []
    for x, y in batches():
        with context:
            for optimizer in optimizers:
                loss = F.mse_loss(model(x), y)
                model.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
    return losses, list(model.parameters())


def quasinewton(context: Context) -> tuple[list[float], list[Tensor]]:
    """LBFGS, which calls back for the loss several times."""
    model, losses = Model(), list[float]()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    for x, y in batches():

        def closure(x: Tensor = x, y: Tensor = y) -> float:
            optimizer.zero_grad()
            with context:
                loss = F.mse_loss(model(x), y)
            loss.backward()
            losses.append(loss.item())
            return loss.item()

        optimizer.step(closure)
    return losses, list(model.parameters())


def scaled(context: Context) -> tuple[list[float], list[Tensor]]:
    """Autocast and a gradient scaler."""
    model = Model()
    optimizer, losses = _sgd(model), []
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    for x, y in batches():
        with context, torch.autocast("cpu", torch.bfloat16):
            loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return losses, list(model.parameters())


def fabric_loop(
    context: Context, precision: Any = "32-true", report: Path | None = None, **options: Any
) -> tuple[list[float], list[Tensor]]:
    fabric = Fabric(accelerator="cpu", precision=precision, **({"devices": 1} | options))
    losses: list[float] = []
    weights: list[Tensor] = []

    def run(fabric: Fabric) -> None:
        model = Model()
        wrapped, optimizer = fabric.setup(model, _sgd(model))
        ledgers, grads = [], list[str]()
        # this rank's own gradient, before the ranks' mean is taken
        model.body[3].weight.register_hook(lambda grad: grads.append(digest([grad])))
        for x, y in batches():
            with context as ledger:
                loss = F.mse_loss(wrapped(x), y)
            ledgers.append(rows(ledger))
            optimizer.zero_grad()
            fabric.backward(loss)
            fabric.clip_gradients(wrapped, optimizer, max_norm=0.5)
            optimizer.step()
            losses.append(loss.item())
        weights.extend(model.parameters())
        if report is not None:
            found = {"losses": losses, "weights": digest(weights), "grads": grads, "ledgers": ledgers}
            (report / f"{fabric.global_rank}.json").write_text(json.dumps(found))

    fabric.launch(run)
    return losses, weights


def bfloat16(context: Context) -> tuple[list[float], list[Tensor]]:
    return fabric_loop(context, "bf16-mixed")


def digest(tensors: list[Any]) -> str:
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()


def rows(ledger: Ledger | None) -> list[list[Any]]:
    return (
        [[e.module, e.op, e.codec, e.raw_bytes, e.stored_bytes] for e in ledger] if isinstance(ledger, Ledger) else []
    )


LOOPS = [plain_loop, accumulating, two_optimizers, quasinewton, scaled, fabric_loop, bfloat16]


@pytest.mark.parametrize("loop", LOOPS)
def test_every_loop(loop: Any) -> None:
    """At 32 bits nothing changes; at 2 bits the first loss is the same, and a run repeats itself bit for bit."""
    losses, want = loop(nullcontext())
    assert loop(tiny(32))[0] == losses
    assert same(loop(tiny(32))[1], want)
    state = torch.get_rng_state()
    found, got = loop(tiny(2))
    assert torch.equal(torch.get_rng_state(), state)  # the same dropout was drawn
    assert found[0] == losses[0]
    assert len(found) == len(losses)
    assert not same(got, want)
    assert all(p.isfinite().all() for p in got)
    again, repeated = loop(tiny(2))
    assert again == found
    assert same(repeated, got)
    assert not same(loop(tiny(2, seed=1))[1], got)
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_paths_are_the_models_own() -> None:
    """Fabric's wrapper is no part of them."""
    fabric = Fabric(accelerator="cpu", devices=1)
    model = Model()
    wrapped = fabric.setup(model)
    for root in (None, model, wrapped):
        with tiny(modules=["body", "!body.4"], root=root) as ledger:
            loss = F.mse_loss(wrapped(torch.randn(64, 64)), torch.randn(64, 4))
        fabric.backward(loss)
        assert {"body.1", "body.3", "body.4", "head"} <= {entry.module for entry in ledger}
        assert ("body.4", "exact") in {(entry.module, entry.codec) for entry in ledger}
    with pytest.raises(ValueError, match=r"'boby' matches no module of Model; the nearest: 'body'"):
        tiny(modules=["boby"], root=wrapped)


def test_a_region_in_fabric() -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    wrapped = fabric.setup(Model())
    with tiny() as ledger, keep_exact():
        loss = wrapped(torch.randn(64, 64)).square().mean()
    fabric.backward(loss)
    assert not {entry.codec for entry in ledger} & {"int2", "int4", "int8"}


@pytest.mark.ddp
@pytest.mark.timeout(60)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_two_processes(tmp_path: Path, precision: str) -> None:
    """The ranks have the same batches and weights, and noise of their own, with nothing to be told."""

    def run(name: str, context: Context) -> list[Any]:
        folder = tmp_path / name
        folder.mkdir()
        fabric_loop(context, precision, folder, devices=2, strategy="ddp_fork")
        return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]

    plain, exact, compressed = run("plain", nullcontext()), run("exact", tiny(32)), run("compressed", tiny(2))
    for a, b in zip(plain, exact, strict=True):
        assert (a["losses"], a["weights"], a["grads"]) == (b["losses"], b["weights"], b["grads"])
    first, second = compressed
    assert first["weights"] == second["weights"] != plain[0]["weights"]
    assert first["losses"][0] == plain[0]["losses"][0]
    assert first["ledgers"] == second["ledgers"]
    assert {"body.1", "body.4", "head"} <= {row[0] for row in first["ledgers"][0]}
    assert not set(first["grads"]) & set(second["grads"])
    assert run("again", tiny(2)) == compressed
