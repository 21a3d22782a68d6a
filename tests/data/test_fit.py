"""The data module under a Trainer: epochs, resuming, overfitting, several ranks."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from torch import Tensor

from lightning_tinykg.data import KGRecDataModule, RankingBatch


class Recorder(L.LightningModule):
    """Learns nothing, remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.given: list[tuple[str, list[list[int]]]] = []
        self.ranked: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.given.append((type(batch).__name__, [x.tolist() if isinstance(x, torch.Tensor) else x for x in batch]))
        return self.weight * 1.0

    def validation_step(self, batch: RankingBatch, batch_idx: int) -> None:
        self.ranked += batch.user.tolist()

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_data(**options: Any) -> KGRecDataModule:
    return KGRecDataModule("synthetic:1000", batch_size=100, triple_batch_size=200, eval_batch_size=10, **options)


def fit(ckpt_path: Path | None = None, data: KGRecDataModule | None = None, **options: Any) -> Recorder:
    model = Recorder()
    options = {
        "max_epochs": 3,
        "enable_checkpointing": bool(options.get("callbacks")),
        "limit_val_batches": 0,
    } | options
    trainer = L.Trainer(
        logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", **options
    )
    trainer.fit(model, data or make_data(), ckpt_path=ckpt_path)
    return model


@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_fit_gets_the_same_batches(tmp_path: Path, workers: int) -> None:
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(callbacks=[save]).given
    epoch = len(whole) // 3
    assert whole[:epoch] != whole[epoch : 2 * epoch]
    # In the first phase, in the second, at the end of an epoch, in the second epoch.
    for step in (1, epoch - 1, epoch, epoch + 2):
        rest = fit(tmp_path / f"step={step}.ckpt", make_data(num_workers=workers)).given
        assert rest == whole[step:], step


@pytest.mark.parametrize("triple_batch_size", [None, 64])
def test_overfit_batches_repeats_the_first_batches(triple_batch_size: int | None) -> None:
    data = KGRecDataModule("synthetic:1000", batch_size=100, triple_batch_size=triple_batch_size)
    given = fit(data=data, overfit_batches=2).given
    assert len(given) == 6
    assert given[:2] == given[2:4] == given[4:]


@pytest.mark.parametrize("triple_batch_size", [None, 64])
def test_a_batch_grows_up_to_all_rows(triple_batch_size: int | None) -> None:
    data = KGRecDataModule("synthetic:3000", batch_size=8, triple_batch_size=triple_batch_size)
    trainer = L.Trainer(
        max_epochs=20, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    Tuner(trainer).scale_batch_size(Recorder(), datamodule=data, init_val=64, steps_per_trial=1, max_trials=20)
    assert data.batch_size >= data.train_pairs.shape[1]


def test_a_batch_that_there_is_none_of_is_an_error() -> None:
    data = KGRecDataModule("synthetic:1000", batch_size=100)
    data.setup()
    batches = data.train_dataloader().dataset
    assert sum(len(batches[i].user) for i in range(batches.num_batches)) == len(batches)
    with pytest.raises(IndexError, match=r"batch must be in 0\.\."):
        batches[batches.num_batches]


def test_evaluation_ranks_every_user_with_a_target_once() -> None:
    data, model = make_data(), Recorder()
    trainer = L.Trainer(logger=False, enable_progress_bar=False, accelerator="cpu")
    trainer.test(model, data, verbose=False)
    assert sorted(model.ranked) == sorted(set(data.test_pairs[0].tolist()))


class Ranks(Recorder):
    """Gathers what the ranks were given, and looks at it on each."""

    def on_train_end(self) -> None:
        mine = [pair for kind, b in self.given if kind == "BPRBatch" for pair in zip(b[0], b[1], strict=True)]
        shares: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(shares, (mine, len(self.given), self.ranked))
        data: Any = self.trainer.datamodule
        train = sorted(zip(*data.train_pairs.tolist(), strict=True))
        pairs = [pair for share in shares for pair in share[0]]
        assert set(pairs) == set(train)
        assert len(pairs) - len(train) < len(shares)
        assert len({share[1] for share in shares}) == 1
        ranked = [user for share in shares for user in share[2]]
        assert sorted(ranked) == sorted(set(data.val_pairs[0].tolist()))

    def predict_step(self, batch: Tensor, batch_idx: int) -> None:
        self.ranked += batch.tolist()

    def on_predict_epoch_end(self) -> None:
        shares: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(shares, self.ranked)
        data: Any = self.trainer.datamodule
        assert all(shares)
        assert sorted(user for share in shares for user in share) == list(range(data.num_users))


@pytest.mark.ddp
def test_ranks_share_the_users_of_a_prediction() -> None:
    trainer = L.Trainer(devices=2, strategy="ddp_fork", accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.predict(Ranks(), make_data())


@pytest.mark.ddp
def test_ranks_share_the_data() -> None:
    trainer = L.Trainer(
        max_epochs=1,
        devices=2,
        strategy="ddp_fork",
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Ranks(), make_data())
