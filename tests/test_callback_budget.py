"""``TinyKGCallback(budget=...)``: bits chosen in training, the same on all ranks, resumed as they were."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_tinykg import BitPlan, TinyKGCallback, TinyKGStrategy

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_epochs": 2,
}
BUDGET = 75_000


class First(NamedTuple):
    number: Tensor


class Second(NamedTuple):
    number: Tensor


class Small(L.LightningModule):
    """Two losses in turn, by the type of the batch, as KGAT's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.GELU())
        self.head = nn.Linear(64, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        generator = torch.Generator().manual_seed(10 * batch_idx + self.global_rank)
        x = torch.randn(400, 64, generator=generator)
        hidden = self.body(x)
        if isinstance(batch, First):
            return {"loss": F.mse_loss(self.head(hidden), torch.ones(400, 4))}
        return F.normalize(hidden).exp().square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(range(6), batch_size=1, collate_fn=collate)  # type: ignore[arg-type]  # a range is a sequence


def collate(numbers: list[int]) -> Any:
    return (First if numbers[0] % 2 else Second)(torch.tensor(numbers))


class Manual(Small):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Watch(L.Callback):
    def __init__(self, callback: TinyKGCallback) -> None:
        self.callback = callback
        self.stored: list[int] = []
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        assert self.callback.ledger is not None
        self.stored.append(self.callback.ledger.stored_bytes)
        self.metrics.append({key: float(value) for key, value in trainer.callback_metrics.items()})


def fit(budget: Any = BUDGET, **options: Any) -> tuple[Small, TinyKGCallback, Watch]:
    model = Small()
    callback = TinyKGCallback(budget=budget, min_bytes=0, summary=False)
    watch = Watch(callback)
    ckpt_path = options.pop("ckpt_path", None)
    trainer = L.Trainer(callbacks=[callback, watch, *options.pop("more", [])], **{**QUIET, **options})
    trainer.fit(model, ckpt_path=ckpt_path)
    return model, callback, watch


def test_each_kind_of_step_is_within_the_budget() -> None:
    _, callback, watch = fit()
    planner = callback._compression.planner
    assert planner is not None
    assert set(planner.kinds) == {"First", "Second"}
    assert all(stored <= BUDGET for stored in watch.stored[2:])
    assert min(watch.stored[2:]) > 0.5 * BUDGET
    assert isinstance(callback.plan, BitPlan)
    assert callback.plan.entries


def test_metrics() -> None:
    _, _, watch = fit(log_every_n_steps=1)
    assert watch.metrics[0]["tinykg/bits"] == watch.metrics[1]["tinykg/bits"] == 8
    for metrics in watch.metrics[2:]:
        assert 1 <= metrics["tinykg/bits"] < 32
        assert 0 < metrics["tinykg/predicted_error"] < 1
        assert metrics["tinykg/stored_mib"] <= BUDGET / 2**20


def test_resumed_as_it_was(tmp_path: Path) -> None:
    checkpoints = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    whole, _, expected = fit(more=[checkpoints], enable_checkpointing=True)
    for stop in (2, 4, 6, 8):  # even, since the DataLoader begins anew: the kinds still alternate
        model, _, rest = fit(ckpt_path=tmp_path / f"step={stop}.ckpt")
        assert rest.stored == expected.stored[stop:]
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


def test_too_small_a_budget_ends_the_fit_at_once() -> None:
    with pytest.raises(ValueError, match=r"budget must be at least \d+ bytes for this step, got 1000"):
        fit(1000)


def test_manual_optimization_is_refused() -> None:
    with pytest.raises(RuntimeError, match="needs automatic optimization"):
        L.Trainer(callbacks=[TinyKGCallback(budget="10%")], **QUIET).fit(Manual())


def test_accumulation_and_clipping() -> None:
    _, _, watch = fit(accumulate_grad_batches=3, gradient_clip_val=0.1)
    assert all(stored <= BUDGET for stored in watch.stored[2:])


def test_as_a_strategy() -> None:
    want, _, _ = fit()
    model = Small()
    strategy = TinyKGStrategy(budget=BUDGET, min_bytes=0, summary=False)
    L.Trainer(strategy=strategy, **QUIET).fit(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), want.parameters(), strict=True))


class Report(L.Callback):
    def __init__(self, folder: Path, callback: TinyKGCallback) -> None:
        self.folder, self.callback = folder, callback

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        planner = self.callback._compression.planner
        assert planner is not None
        weights = [parameter.tolist() for parameter in pl_module.parameters()]
        plans = {name: kind.plan.to_dict() for name, kind in planner.kinds.items() if kind.plan is not None}
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps([weights, plans]))


@pytest.mark.ddp
def test_ranks_agree(tmp_path: Path) -> None:
    callback = TinyKGCallback(budget=BUDGET, min_bytes=0, summary=False)
    options = QUIET | {
        "devices": 2,
        "strategy": "ddp_fork_find_unused_parameters_true",
        "use_distributed_sampler": False,
    }
    L.Trainer(callbacks=[callback, Report(tmp_path, callback)], **options).fit(Small())
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert set(first[1]) == {"First", "Second"}
