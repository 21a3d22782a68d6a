"""Every precision of a Trainer: 64, bf16-mixed, bf16-true and, on CUDA, 16-mixed with its GradScaler."""

import math
from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_tinykg import Ledger, TinyKGCallback, compress_activations

WIDTH = 64


class Module(L.LightningModule):
    """Layers of each kind of rule, and a table whose rows are gathered; remembers its gradients and losses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, WIDTH)
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, 4)
        self.losses: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.scales: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        index, x, y = batch
        hidden = F.leaky_relu(self.body(x) * self.table(index))
        loss = F.mse_loss(self.head(F.normalize(hidden, dim=-1)), y.to(hidden.dtype))
        self.losses.append(loss.detach().clone())
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.grads.append(torch.cat([p.grad.flatten() for p in self.parameters() if p.grad is not None]))
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            self.scales.append(scaler.get_scale())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        index = torch.randint(50, (512,), generator=generator)
        x, y = torch.randn(512, WIDTH, generator=generator), torch.randn(512, 4, generator=generator)
        return DataLoader(TensorDataset(index, x, y), batch_size=128)


def fit(bits: int | None, precision: Any, recompute: str = "cheap", **options: Any) -> tuple[Module, Ledger | None]:
    callback = None if bits is None else TinyKGCallback(bits, recompute=recompute, summary=False)
    module = Module()
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_epochs": 2,
    }
    L.Trainer(callbacks=[callback] if callback else [], precision=precision, **(quiet | options)).fit(module)
    return module, callback.ledger if callback else None


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def error(got: list[Tensor], want: list[Tensor]) -> float:
    return float((got[0].double() - want[0].double()).norm() / want[0].double().norm())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


PRECISIONS = {
    "32-true": (torch.float32, torch.float32, 0.02),
    "64-true": (torch.float64, torch.float64, 0.02),
    "bf16-true": (torch.bfloat16, torch.bfloat16, 0.03),
    "bf16-mixed": (torch.float32, torch.bfloat16, 0.03),
}
"""By precision: dtype of the gradients, dtype of what a linear layer saves, and the error of the gradient at 8 bits."""


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions(precision: str) -> None:
    """The same losses and gradients at 32 bits, to the last bit; close ones, of the same dtype, at 8."""
    of_gradients, of_activations, bound = PRECISIONS[precision]
    plain, _ = fit(None, precision)
    exact, exact_ledger = fit(32, precision)
    assert same(exact.losses, plain.losses)
    assert same(exact.grads, plain.grads)
    assert same(list(exact.parameters()), list(plain.parameters()))
    remade, _ = fit(8, precision)  # here, of the batch and the table
    assert error(remade.grads, plain.grads) < bound
    rounded, ledger = fit(8, precision, recompute="off")
    assert torch.equal(rounded.losses[0], plain.losses[0])  # the forward is untouched
    assert {grad.dtype for grad in rounded.grads} == {of_gradients}
    assert 0 < error(rounded.grads, plain.grads) < bound
    assert ledger is not None
    assert exact_ledger is not None
    assert ledger.raw_bytes == exact_ledger.raw_bytes
    name = str(of_activations).removeprefix("torch.")
    kept = {(e.op, e.codec): e for e in ledger if e.dtype == name}
    assert "int8" in {codec for _, codec in kept}
    assert ledger.ratio > 1.5 * of_activations.itemsize / 2


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_ratio_grows_with_the_precision_that_is_saved(precision: str) -> None:
    """At 2 bits a float64 takes as many bits as a bfloat16, in each of which it is restored."""
    rounded, ledger = fit(2, precision)
    assert all(grad.isfinite().all() for grad in rounded.grads)
    assert ledger is not None
    assert ledger.ratio > {"64-true": 12, "32-true": 6, "bf16-true": 3, "bf16-mixed": 3}[precision]


@pytest.mark.parametrize(("recompute", "least", "most"), [("off", 1, WIDTH * WIDTH * 2), ("cheap", 0, 0)])
def test_weights_cast_by_autocast_are_kept_once(recompute: str, least: int, most: int) -> None:
    """A cast copy of a weight is the graph's, and counted once though each use saves it; or it is cast again."""
    linear, x = nn.Linear(WIDTH, WIDTH, bias=False), torch.randn(100, WIDTH)
    with compress_activations(8, recompute=recompute) as ledger, torch.autocast("cpu", torch.bfloat16):
        loss = linear(linear(linear(x).tanh()).tanh()).float().sum()
    loss.backward()
    copies = [entry for entry in ledger if entry.shape == (WIDTH, WIDTH)]
    assert len(copies) == 2  # the first layer's input needs no gradient
    assert sum(entry.raw_bytes for entry in copies) == WIDTH * WIDTH * 2
    assert least <= sum(entry.stored_bytes for entry in copies) <= most


def scaled_step(bits: int | None, scaler: Any, device: str, scale_up: float = 1.0) -> tuple[list[Tensor], float]:
    """One step in float16 under a GradScaler: the unscaled gradients, and the scale after it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4)).to(device)
    x = torch.randn(256, WIDTH, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def forward() -> Tensor:
        with torch.autocast(device, torch.float16):
            return model(x).float().square().mean() * scale_up

    if bits is None:
        loss = forward()
    else:
        with compress_activations(bits):
            loss = forward()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    scaler.step(optimizer)
    scaler.update()
    return grads, scaler.get_scale()


def assert_scaler_is_undisturbed(device: str) -> None:
    """A scale that fits is kept; one that overflows is halved, with compression as without it."""
    for start, scale_up, grows in ((2.0**12, 1.0, True), (2.0**12, 1e9, False)):
        found = {
            bits: scaled_step(bits, torch.amp.GradScaler(device, init_scale=start), device, scale_up)
            for bits in (None, 32, 8, 2)
        }
        want, scale = found[None]
        assert (scale == start) is grows
        assert {after for _, after in found.values()} == {scale}
        for bits in (32, 8, 2):
            finite = [bool(grad.isfinite().all()) for grad in found[bits][0]]
            assert all(finite) is grows
        if grows:
            assert same(found[32][0], want)
            assert error(found[8][0], want) < 0.05


def test_grad_scaler_on_cpu() -> None:
    assert_scaler_is_undisturbed("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_grad_scaler_on_cuda() -> None:
    assert_scaler_is_undisturbed("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "16-true", "64-true"])
def test_precisions_on_cuda(precision: Any) -> None:
    plain, _ = fit(None, precision, accelerator="gpu")
    exact, _ = fit(32, precision, accelerator="gpu")
    rounded, ledger = fit(8, precision, accelerator="gpu")
    assert torch.equal(rounded.losses[0], plain.losses[0])
    # embedding's backward adds with atomics, whose order is not fixed
    assert error(exact.grads, plain.grads) < 1e-3
    assert 0 < error(rounded.grads, plain.grads) < 0.05
    assert rounded.scales == plain.scales
    assert all(math.isfinite(float(loss)) for loss in rounded.losses)
    assert ledger is not None
    assert ledger.ratio > 1.5
