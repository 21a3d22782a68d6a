"""Bits over time in a Trainer: counted by optimizer steps, resumed where they stopped, the same on all ranks."""

import csv
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_tinykg import BitPlan, CosineAnneal, LinearAnneal, Schedule, StepAnneal, TinyKGCallback, WarmupThen

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
BATCHES = 4


class Small(L.LightningModule):
    """Its batches go by their number: Lightning resumes in the middle of an epoch, a DataLoader does not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh())
        self.head = nn.Linear(64, 4)

    def loss(self, batch_idx: int) -> Tensor:
        generator = torch.Generator().manual_seed(10 * batch_idx + self.global_rank)
        x, y = torch.randn(64, 64, generator=generator), torch.randn(64, 4, generator=generator)
        return F.mse_loss(self.head(self.body(x)), y)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        return DataLoader(range(64 * BATCHES), batch_size=64)  # type: ignore[arg-type]  # a range is a sequence


class Manual(Small):
    """Two optimizers, each of which steps in each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        # one optimizer, or a list, as it was configured
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch_idx))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.body, self.head)]


class Watch(L.Callback):
    """Notes the width of each batch."""

    def __init__(self, callback: TinyKGCallback) -> None:
        self.callback = callback
        self.bits: list[int] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.bits.append(self.callback.bits)


def fit(model: L.LightningModule, bits: Any, **options: Any) -> tuple[L.Trainer, TinyKGCallback, list[int]]:
    callback = TinyKGCallback(bits, min_bytes=0, summary=False)
    watch = Watch(callback)
    ckpt_path = options.pop("ckpt_path", None)
    L.seed_everything(7, verbose=False)
    trainer = L.Trainer(callbacks=[callback, watch, *options.pop("more", [])], **{**QUIET, "max_epochs": 2, **options})
    trainer.fit(model, ckpt_path=ckpt_path)
    return trainer, callback, watch.bits


BY_STEP = StepAnneal({0: 8, 3: 4, 6: 2})


@pytest.mark.parametrize(
    ("kind", "schedule", "options", "expected"),
    [
        (Small, BY_STEP, {}, [8, 8, 8, 4, 4, 4, 2, 2]),
        (Small, BY_STEP, {"accumulate_grad_batches": 2, "max_epochs": 3}, [8] * 6 + [4] * 6),
        (Manual, BY_STEP, {}, [8, 8, 8, 4, 4, 4, 2, 2]),
        (Small, StepAnneal({0: 8, 1: 2}, by="epoch"), {}, [8] * 4 + [2] * 4),
        (Small, LinearAnneal(1, 8, steps=8), {}, [1, 2, 2, 4, 4, 4, 8, 8]),
        (Small, WarmupThen(5, 32, 2), {}, [32] * 5 + [2] * 3),
    ],
)
def test_counted_by_optimizer_steps_or_epochs(kind: Any, schedule: Schedule, options: Any, expected: list[int]) -> None:
    assert fit(kind(), schedule, **options)[2] == expected


def logged(trainer: L.Trainer) -> list[tuple[int, float]]:
    """Step and width of each row of its logger's."""
    assert isinstance(trainer.logger, CSVLogger)
    trainer.logger.save()
    with (Path(trainer.logger.log_dir) / "metrics.csv").open() as file:
        return [(int(row["step"]), float(row["tinykg/bits"])) for row in csv.DictReader(file)]


def test_the_width_is_logged(tmp_path: Path) -> None:
    trainer, _, bits = fit(Small(), BY_STEP, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    assert logged(trainer) == list(enumerate(bits))


def test_a_logger_hears_what_it_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each third step; besides it the last of each epoch is noted, for what monitors it, and of the others nothing."""
    model, noted = Small(), []

    def log_dict(metrics: dict[str, float], **options: Any) -> None:
        noted.append(metrics["tinykg/bits"])
        L.LightningModule.log_dict(model, metrics, **options)

    monkeypatch.setattr(model, "log_dict", log_dict)
    trainer, _, bits = fit(model, BY_STEP, logger=CSVLogger(tmp_path), log_every_n_steps=3)
    assert logged(trainer) == [(step, bits[step]) for step in (2, 5)]
    assert noted == [bits[step] for step in (2, 3, 5, 7)]


@pytest.mark.parametrize("length", [{"max_epochs": 2}, {"max_steps": 5, "max_epochs": -1}])
def test_the_last_width_can_be_monitored(length: dict[str, int]) -> None:
    trainer, _, bits = fit(Small(), StepAnneal({0: 32, 3: 8, 4: 4, 7: 1}), **length)
    assert bits[-1] == {8: 1, 5: 4}[len(bits)]
    assert trainer.callback_metrics["tinykg/bits"] == bits[-1]


PLAN = BitPlan({"body": CosineAnneal(8, 1, steps=7), "head": StepAnneal({0: 32, 1: 2}, by="epoch")}, default=4)


@pytest.mark.parametrize("bits", [BY_STEP, PLAN], ids=["schedule", "plan"])
def test_stopped_at_any_step_and_resumed(tmp_path: Path, bits: Any) -> None:
    """The same weights as an uninterrupted fit, in the middle of an anneal, or of an epoch."""
    whole = Small()
    checkpoints = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    expected = fit(whole, bits, enable_checkpointing=True, more=[checkpoints])[2]
    for stop in range(1, 2 * BATCHES):
        model = Small()
        rest = fit(model, bits, ckpt_path=tmp_path / f"step={stop}.ckpt")[2]
        assert rest == expected[stop:]
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


def test_a_plan_with_a_layer_that_there_is_not_is_refused_before_any_step() -> None:
    with pytest.raises(ValueError, match=r"match nothing: boddy \(nearest: body\)"):
        fit(Small(), BitPlan({"boddy": 2}))


class Report(L.Callback):
    def __init__(self, folder: Path, callback: TinyKGCallback) -> None:
        self.folder, self.callback = folder, callback
        self.bits: list[int] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.bits.append(self.callback.bits)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        weights = [parameter.tolist() for parameter in pl_module.parameters()]
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps([self.bits, weights]))


@pytest.mark.ddp
def test_two_ranks_agree_and_resume(tmp_path: Path) -> None:
    schedule = StepAnneal({0: 8, 1: 4, 2: 1})

    def run(name: str, ckpt_path: Path | None = None) -> list[Any]:
        folder = tmp_path / name
        folder.mkdir()
        callback = TinyKGCallback(schedule, min_bytes=0, summary=False)
        checkpoints = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        options = QUIET | {"devices": 2, "max_epochs": 2, "strategy": "ddp_fork", "enable_checkpointing": True}
        trainer = L.Trainer(callbacks=[callback, Report(folder, callback), checkpoints], **options)
        trainer.fit(Small(), ckpt_path=ckpt_path)
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]

    whole = run("whole")
    assert whole[0] == whole[1]
    assert whole[0][0] == [8, 4, 1, 1]
    for stop in (1, 2, 3):
        rest = run(f"from {stop}", tmp_path / "whole" / f"step={stop}.ckpt")
        assert rest[0] == rest[1]
        assert rest[0][0] == whole[0][0][stop:]
        assert rest[0][1] == whole[0][1]
