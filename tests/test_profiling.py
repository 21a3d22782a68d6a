"""``profile``: the figures are those of the training step, and nothing is left of the measurement."""

import copy
import csv
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_tinykg import KGAT, KGRecDataModule, TinyKGCallback, TinyKGStrategy, compress_activations
from lightning_tinykg.profiling import Profile, profile


class Model(L.LightningModule):
    """Has what a measurement could disturb: BatchNorm, dropout, a metric, a counter, a list, a queue, logging."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 64), nn.Tanh()
        )
        self.average = nn.Linear(64, 64)
        self.average.requires_grad_(False)
        self.mean = MeanMetric()
        self.generator = torch.Generator().manual_seed(5)
        self.register_buffer("queue", torch.zeros(64))
        self.calls = 0
        self.losses: list[Tensor] = []

    def loss(self, batch: Tensor) -> Tensor:
        batch.mul_(1 + 0.1 * torch.rand((), generator=self.generator))  # augments in place
        loss: Tensor = self.net(batch).square().mean() + self.average(batch).mean()
        assert isinstance(self.queue, Tensor)
        self.queue += loss.detach()
        self.average.weight.data = self.average.weight.data * 0.9  # a momentum encoder, in the style of MoCo
        self.calls += 1
        self.losses.append(loss.detach())
        self.mean.update(loss.detach())
        self.log("loss", loss, on_epoch=True, prog_bar=True)
        self.log("mean", self.mean)
        return loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return {"loss": self.loss(batch), "extra": 1}

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.randn(256, 64, generator=torch.Generator().manual_seed(1)), 64)

    def on_train_epoch_end(self) -> None:
        torch.stack(self.losses)  # fails where the steps that were logged are gone


class Manual(Model):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def trainer(**options: Any) -> L.Trainer:
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(**{"accelerator": "cpu", "logger": False, "max_epochs": 1, **quiet} | options)


def state(model: Model) -> dict[str, Any]:
    """All that a fit could find changed."""
    tensors = copy.deepcopy(dict(model.named_parameters()) | dict(model.named_buffers()))
    rest = {
        "calls": model.calls,
        "losses": len(model.losses),
        "metric": (model.mean.mean_value.clone(), model.mean.update_count),
        "generator": model.generator.get_state(),
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
        "gradients": [copy.deepcopy(parameter.grad) for parameter in model.parameters()],
        "training": [module.training for module in model.modules()],
    }
    return {"tensors": tensors, **rest}


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("kind", "precision"),
    [(Model, "32-true"), (Manual, "32-true"), (Model, "64-true")],  # which moves the model, as a GPU would
    ids=["model", "manual", "moved"],
)
def test_nothing_is_left_of_it(kind: type[Model], precision: str) -> None:
    torch.manual_seed(0)
    model = kind()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # that of an accumulation, say
    before = state(model)
    result = profile(trainer(precision=precision), model, steps=2)
    after = state(model)
    for rng in ("python", "numpy"):
        assert before.pop(rng) == after.pop(rng)
    assert_same(after, before)
    assert len(result.points) == 2 * 19


def test_the_trainer_and_the_model_fit_afterwards_as_if_nothing_had_been() -> None:
    def fit(before: bool) -> tuple[L.Trainer, Model]:
        L.seed_everything(0, verbose=False)
        model, one = Model(), trainer(callbacks=[TinyKGCallback(bits=2, summary=False)])
        callbacks = list(one.callbacks)
        if before:
            profile(one, model, steps=2)
            assert one.callbacks == callbacks
            assert one.global_step == 0
            assert one.state == L.Trainer(accelerator="cpu", logger=False).state
        one.fit(model)
        return one, model

    (plain, expected), (profiled, model) = fit(False), fit(True)
    assert profiled.global_step == plain.global_step == 4
    assert profiled.current_epoch == plain.current_epoch
    assert_same(dict(model.state_dict()), dict(expected.state_dict()))
    assert_same(profiled.callback_metrics, plain.callback_metrics)


def test_a_trainer_that_has_fitted_goes_on() -> None:
    model, one = Model(), trainer()
    one.fit(model)
    metrics, optimizer = dict(one.callback_metrics), one.optimizers[0]
    profile(one, model, steps=1, widths=[8])
    assert one.global_step == 4
    assert one.optimizers[0] is optimizer
    assert_same(dict(one.callback_metrics), metrics)


def test_figures_are_those_of_the_step_by_hand() -> None:
    class Plain(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.net(batch).square().mean()

    torch.manual_seed(0)
    model = Plain()
    result = profile(trainer(), model, steps=1, widths=[2, 32, 2], paper=False, recompute=())
    assert [(point.bits, point.recipe) for point in result.points] == [(32, "rules"), (2, "rules")]

    batch = next(iter(model.train_dataloader()))
    parameters = list(model.net.parameters())

    def gradient(loss: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])

    torch.manual_seed(3)  # the profile's dropout is another: close, not equal
    exact = gradient(model.training_step(batch, 0))
    torch.manual_seed(3)
    with compress_activations(2, root=model) as ledger:
        loss = model.training_step(batch, 0)
    compressed = gradient(loss)
    (first, second) = result.points
    assert first.error == 0
    assert second.error == pytest.approx(float((compressed - exact).norm() / exact.norm()), rel=0.3)
    assert (second.raw_bytes, second.stored_bytes) == (ledger.raw_bytes, ledger.stored_bytes)


def test_rows_add_up_and_name_modules_and_ops() -> None:
    result = profile(trainer(), Model(), steps=2)
    largest = max(result.points, key=lambda point: point.raw_bytes)
    rows = result.rows()
    assert sum(row["raw_bytes"] for row in rows) == largest.raw_bytes
    for point in result.points:
        if point.step == largest.step and point.recipe == "rules":
            assert sum(row[f"stored_bytes_{point.bits}"] for row in rows) == point.stored_bytes
    assert ("net.5", "Tanh.result") in {(row["module"], row["op"]) for row in rows}


def test_the_budget_curve_is_one_point_per_width_and_recipe() -> None:
    curve = profile(trainer(), Model(), steps=3).curve()
    rules = [row for row in curve if row["recipe"] == "rules"]
    assert [row["bits"] for row in rules] == [32, 8, 4, 2, 1]
    assert [row["bits"] for row in curve if row["recipe"] == "paper"] == [8, 4, 2, 1]
    assert {row["steps"] for row in curve} == {3}
    assert rules[0]["error"] == 0
    off = [row for row in curve if row["recipe"] == "rules, off"]  # else all of this model is made of the batch again
    assert off[0]["stored_bytes"] > off[1]["stored_bytes"] > off[3]["stored_bytes"] > rules[3]["stored_bytes"]
    assert 0 < off[1]["error"] < 0.05
    assert off[1]["error"] < off[3]["error"]


def test_manual_optimization_measures_bytes_and_says_so_once() -> None:
    result = profile(trainer(), Manual(), steps=2)
    assert {point.error for point in result.points} == {None}
    assert all(point.stored_bytes for point in result.points)
    assert len(result.notes) == 1
    assert str(result).count("Manual optimization") == 1
    assert result.plot()


def test_each_type_of_batch_is_measured_and_the_largest_is_shown() -> None:
    data = KGRecDataModule("synthetic:2000", batch_size=256, triple_batch_size=128)
    model = KGAT(dim=16, layer_dims=[16], attention="in-graph")
    result = profile(trainer(), model, data, steps=2, widths=[32, 2], paper=False, recompute=())
    assert {(row["batch"], row["steps"]) for row in result.curve()} == {("BPRBatch", 2), ("TripleBatch", 2)}
    assert all(point.error == 0 for point in result.points if point.bits == 32)
    largest = max(result.points, key=lambda point: point.raw_bytes)
    assert largest.batch == "BPRBatch"
    assert sum(row["raw_bytes"] for row in result.rows()) == largest.raw_bytes
    assert not result.notes
    assert not model.is_built  # what the fit would have set up is not left behind either


def test_settings_of_the_callback_hold_here_too() -> None:
    def stored(**options: Any) -> int:
        return (
            profile(trainer(**options), Model(), steps=1, widths=[2], paper=False, recompute=()).points[0].stored_bytes
        )

    left_out = ["!*.5"]
    plain, callback = stored(), stored(callbacks=[TinyKGCallback(bits=8, modules=left_out)])
    assert callback > plain
    assert stored(strategy=TinyKGStrategy(bits=8, modules=left_out)) == callback
    assert stored(strategy="tinykg") == plain


def test_a_step_that_does_not_repeat_is_told() -> None:
    class Fresh(Model):
        stream = iter(range(1, 1000))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().loss(batch) * next(self.stream)

    (note,) = profile(trainer(), Fresh(), steps=1, widths=[8], paper=False, recompute=()).notes
    assert "does not repeat itself" in note


def test_a_gradient_that_cannot_be_taken_is_told() -> None:
    class Reentrant(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return checkpoint(self.net[4:], self.net[:4](batch), use_reentrant=True).sum()

    class Elsewhere(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return batch.requires_grad_().square().sum()

    class Skips(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return None

    result = profile(trainer(), Reentrant(), steps=1, widths=[8])
    assert "torch.autograd.grad says" in result.notes[0]
    assert result.points[0].error is None
    assert "depends on no parameter" in profile(trainer(), Elsewhere(), steps=1, widths=[8]).notes[0]
    assert "no loss" in profile(trainer(), Skips(), steps=1, widths=[8]).notes[0]


def test_sparse_gradients_lazy_modules_and_frozen_parameters() -> None:
    class Odd(Model):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, 64, sparse=True)
            self.lazy = nn.LazyLinear(64)
            self.net[0].requires_grad_(False)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            rows = self.table(torch.arange(64) % 50)
            return self.lazy(F.dropout(self.net(batch) * rows)).tanh().square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.parameters(), lr=0.1)

        def on_train_epoch_end(self) -> None:
            pass

    model = Odd()
    result = profile(trainer(), model, steps=1, widths=[32, 2], paper=False, recompute=())
    assert not result.notes
    assert result.points[0].error == 0
    assert result.points[1].error
    trainer().fit(model)


def test_at_the_weights_of_a_checkpoint_from_the_midst_of_an_epoch(tmp_path: Path) -> None:
    data = KGRecDataModule("synthetic:2000", batch_size=256, triple_batch_size=128)
    model = KGAT(dim=16, layer_dims=[16], attention="refresh", dropout=0.0, lr=0.1)
    one = trainer(max_epochs=-1, max_steps=12, limit_val_batches=0)
    one.fit(model, data)
    one.save_checkpoint(tmp_path / "some.ckpt")

    def measure(ckpt_path: Path | None, model: L.LightningModule) -> list[tuple[str, float | None]]:
        L.seed_everything(0, verbose=False)
        result = profile(trainer(), model, data, steps=1, widths=[2], paper=False, recompute=(), ckpt_path=ckpt_path)
        return [(point.batch, point.error) for point in result.points]

    fresh = KGAT(dim=16, layer_dims=[16], attention="refresh", dropout=0.0)
    loaded = measure(tmp_path / "some.ckpt", fresh)
    assert [batch for batch, _ in loaded] == ["BPRBatch", "TripleBatch"]
    assert loaded == measure(None, model)
    assert loaded != measure(None, fresh)


def test_precision_and_dataloaders_from_outside() -> None:
    loader = DataLoader(torch.randn(64, 64), 32)
    result = profile(
        trainer(precision="bf16-mixed"),
        Model(),
        train_dataloaders=loader,
        steps=9,
        widths=[32, 8],
        paper=False,
        recompute=(),
    )
    assert len(result.points) == 2 * 2  # the epoch has two batches
    assert result.points[0].error == 0


def test_an_error_in_the_step_leaves_the_trainer_whole() -> None:
    class Fails(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            raise RuntimeError("mine")

    one = trainer(callbacks=[TinyKGCallback()])
    callbacks = list(one.callbacks)
    with pytest.raises(RuntimeError, match="mine"):
        profile(one, Fails())
    assert one.callbacks == callbacks
    one.fit(Model())
    assert one.global_step == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": [3]}, r"widths must be one of 1, 2, 4, 8, 32, got 3"),
        ({"widths": []}, r"widths must be some of .*, got none"),
        ({"steps": 0}, r"steps must be a whole number of at least 1, got 0"),
        ({"train_dataloaders": []}, r"got none"),
    ],
)
def test_what_it_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        profile(trainer(), Model(), **options)


def test_several_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Trainer\(devices=1\), got DDPStrategy with 2 devices"):
        profile(trainer(devices=2, strategy="ddp_fork"), Model())


def test_files(tmp_path: Path) -> None:
    result = profile(trainer(logger=CSVLogger(tmp_path / "logs")), Model(), steps=1)
    folder = result.save(tmp_path / "a" / "b")
    assert {path.name for path in folder.iterdir()} == {"profile.json", "ops.csv", "curve.csv", "profile.png"}
    parts = json.loads((folder / "profile.json").read_text())
    assert len(parts["points"]) == 19
    assert parts["curve"] == result.curve()
    with (folder / "ops.csv").open() as file:
        assert [int(row["raw_bytes"]) for row in csv.DictReader(file)] == [row["raw_bytes"] for row in result.rows()]
    assert (folder / "profile.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "logs").exists()  # nothing was trained, nothing is logged


def test_nothing_kept_nothing_to_show(tmp_path: Path) -> None:
    class Idle(Model):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            bias: Any = self.net[0].bias
            return bias.sum()

    result = profile(trainer(), Idle(), steps=1)
    assert result.rows() == []
    assert str(result)
    result.save(tmp_path)
    assert str(Profile())


@pytest.fixture
def logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbLogger]:
    wandb = pytest.importorskip("wandb")
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    yield WandbLogger(project="tinykg", save_dir=tmp_path, mode="offline")
    wandb.finish()


def test_wandb_gets_tables_and_plot(logger: WandbLogger) -> None:
    result = profile(trainer(logger=logger), Model(), steps=1)
    media = Path(logger.experiment.dir) / "media"
    tables = {path.name.partition("_0_")[0]: json.loads(path.read_text()) for path in media.rglob("*.table.json")}
    names = {name.partition(".")[0].rpartition("/")[2] for name in tables}
    assert len(tables) == 2, names
    assert {len(table["data"]) for table in tables.values()} == {len(result.rows()), len(result.curve())}
    (image,) = media.rglob("*.png")
    assert image.read_bytes().startswith(b"\x89PNG")
