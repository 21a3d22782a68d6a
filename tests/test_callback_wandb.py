"""``TinyKGCallback`` with a ``WandbLogger``: curves, the ledger as a table and its plot, in an offline run."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from offline_runs import finished, records
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_tinykg import BitPlan, TinyKGCallback

wandb = pytest.importorskip("wandb")

CURVES = {"tinykg/bits", "tinykg/raw_mib", "tinykg/stored_mib", "tinykg/ratio"}


class Small(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.randn(192, 64), batch_size=64)


class Idle(Small):
    """Autograd saves nothing of a sum."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        bias: Any = self.net[0].bias
        return bias.sum()


def fit(module: L.LightningModule, callback: L.Callback, logger: Any, **options: Any) -> None:
    L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        log_every_n_steps=1,
        callbacks=[callback],
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    ).fit(module)


def test_curves_table_and_plot(wandb_logger: WandbLogger, tmp_path: Path) -> None:
    callback = TinyKGCallback(bits=2, summary=False)
    fit(Small(), callback, [CSVLogger(tmp_path), wandb_logger])
    files, rows = finished(wandb_logger)

    steps = [row for row in rows if set(row) >= CURVES]
    assert [row["trainer/global_step"] for row in steps] == [0, 1, 2]
    assert callback.largest is not None
    assert steps[-1]["tinykg/bits"] == 2
    assert steps[-1]["tinykg/raw_mib"] == pytest.approx(callback.largest.raw_bytes / 2**20)
    assert steps[-1]["tinykg/stored_mib"] == pytest.approx(callback.largest.stored_bytes / 2**20)
    assert steps[-1]["tinykg/ratio"] == pytest.approx(callback.largest.ratio)

    (table,) = [row for row in rows if "tinykg/ledger.path" in row]
    content = json.loads((files / table["tinykg/ledger.path"]).read_text())
    expected = callback.largest.summary()
    assert content["columns"] == list(expected[0])
    assert content["data"] == [list(row.values()) for row in expected]

    (plot,) = [row for row in rows if "tinykg/ledger_plot.filenames" in row]
    (name,) = plot["tinykg/ledger_plot.filenames"]
    assert (files / name).read_bytes().startswith(b"\x89PNG")


def test_nothing_saved_nothing_to_send(wandb_logger: WandbLogger) -> None:
    """A fit must not fail in its last hook for want of rows."""
    fit(Idle(), TinyKGCallback(bits=2, summary=False), wandb_logger)


def test_no_step_nothing_to_send(wandb_logger: WandbLogger) -> None:
    fit(Small(), TinyKGCallback(bits=2, summary=False), wandb_logger, max_steps=0)
    assert not (Path(wandb_logger.experiment.dir) / "media").exists()


def test_a_disabled_run(tmp_path: Path) -> None:
    try:
        fit(Small(), TinyKGCallback(bits=2, summary=False), WandbLogger(save_dir=tmp_path, mode="disabled"))
    finally:
        wandb.finish()


def test_the_summary_has_the_largest_step(wandb_logger: WandbLogger) -> None:
    fit(Small(), TinyKGCallback(bits=2, summary=False), wandb_logger)
    _, found = records(wandb_logger)
    metrics = {record["metric"].get("name"): record["metric"] for record in found if record["type"] == "metric"}
    for name in ("tinykg/raw_mib", "tinykg/stored_mib", "tinykg/peak_mib"):
        assert metrics[name]["summary"]["max"]
        assert metrics[name]["summary"]["last"]
        assert metrics[name]["step_metric"] == "trainer/global_step"


@pytest.mark.parametrize("options", [{"bits": BitPlan({"net.0": 8}, default=2)}, {"budget": "50%"}])
def test_the_plan_is_an_artifact(wandb_logger: WandbLogger, options: dict[str, Any]) -> None:
    callback = TinyKGCallback(summary=False, **options)
    fit(Small(), callback, wandb_logger)
    _, found = records(wandb_logger)
    artifacts = [record["artifact"] for record in found if record["type"] == "artifact"]
    # not by any text in it: a table's digests are drawn at random
    (artifact,) = [one for one in artifacts if one["type"] == "bit-plan"]
    assert artifact["name"] == "tinykg-plan"
    assert BitPlan.from_dict(json.loads(artifact["metadata"])) == callback.plan
    assert [entry["path"] for entry in artifact["manifest"]["contents"]] == ["plan.yaml"]


def test_one_width_is_no_plan(wandb_logger: WandbLogger) -> None:
    fit(Small(), TinyKGCallback(bits=2, summary=False), wandb_logger)
    _, found = records(wandb_logger)
    assert not [record for record in found if record["type"] == "artifact" and "bit-plan" in str(record)]
