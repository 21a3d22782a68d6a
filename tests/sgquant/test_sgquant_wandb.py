"""SGQuant and the search for bits with a ``WandbLogger``: an offline run, read back."""

import json
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from networks import calibrated, graph, networks
from offline_runs import finished
from torch import nn

from lightning_tinykg import AutoBitSelector, BitPlan, KGRecDataModule, LightGCN, SearchSpace
from lightning_tinykg.sgquant import SGQuantCallback, topologywise

CURVES = {"sgquant/average_bits", "sgquant/packed_MiB", "sgquant/ratio"}


def test_curves_from_the_fine_tuning_on(wandb_logger: WandbLogger, quiet: dict[str, Any]) -> None:
    data = KGRecDataModule("synthetic:1000", batch_size=256, triple_batch_size=None)
    callback = SGQuantCallback(topologywise([8, 4, 4, 2]), finetune_epochs=2)
    model = LightGCN(dim=8, num_layers=2)
    trainer = L.Trainer(max_epochs=3, callbacks=[callback], log_every_n_steps=1, **{**quiet, "logger": wandb_logger})
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    _, rows = finished(wandb_logger)

    curves = [row for row in rows if set(row) & CURVES]
    assert all(set(row) >= CURVES for row in curves)
    assert [row["epoch"] for row in curves] == [1, 2, 3]  # the fine-tuning's, and the test's
    assert callback.quantizer is not None
    memory = callback.quantizer.memory()
    for row in curves:
        assert row["sgquant/average_bits"] == pytest.approx(memory.average_bits)
        assert row["sgquant/packed_MiB"] == pytest.approx(memory.packed_bytes / 2**20)
        assert row["sgquant/ratio"] == pytest.approx(memory.ratio)
    assert [row["epoch"] for row in rows if "val/recall@20" in row] == [0, 1, 2]
    assert "test/recall@20" in curves[-1]


@torch.no_grad()
def error(model: nn.Module, quantizer: Any, plan: BitPlan) -> float:
    """How near the quantized model's output is to its own: a measure that repeats itself."""
    exact = model(*graph())
    quantizer.set_plan(plan)
    with quantizer:
        return -float((model(*graph()) - exact).square().mean())


def test_a_search_logs_each_plan_the_front_and_its_plot(wandb_logger: WandbLogger) -> None:
    pytest.importorskip("sklearn")
    model = networks()["GAT"]().eval()
    quantizer = calibrated(model, buckets=None)
    front = AutoBitSelector(
        SearchSpace({tuple(place): (1, 2, 4, 8) for place in quantizer.places()}),
        lambda plan: error(model, quantizer, plan),
        lambda plan: quantizer.memory(plan).packed_bytes,
        measurements=8,
        rounds=1,
        per_round=4,
        samples=50,
        logger=wandb_logger,
        progress=False,
    ).run()
    files, rows = finished(wandb_logger)

    trials = [row for row in rows if "abs/bytes" in row]
    assert len(trials) == len(front.trials) == 12
    for row, trial in zip(trials, front.trials, strict=True):
        assert row["abs/bytes"] == trial.nbytes
        assert row["abs/accuracy"] == pytest.approx(trial.accuracy)
        assert row["abs/average_bits"] == pytest.approx(trial.average_bits)
        assert row["abs/failed"] == 0
    assert [row["trainer/global_step"] for row in trials] == list(range(12))
    kept = {trial.nbytes for row, trial in zip(trials, front.trials, strict=True) if row["abs/on_front"]}
    assert kept >= {point.nbytes for point in front.points}

    (table,) = [row for row in rows if "abs/front.path" in row]
    content = json.loads((files / table["abs/front.path"]).read_text())
    expected = front.rows()
    assert content["columns"] == list(expected[0])
    column = content["columns"].index("bytes")
    assert [row[column] for row in content["data"]] == [point.nbytes for point in front.points]

    (plot,) = [row for row in rows if "abs/front_plot.filenames" in row]
    (name,) = plot["abs/front_plot.filenames"]
    assert (files / name).read_bytes().startswith(b"\x89PNG")
