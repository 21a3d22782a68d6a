"""Recall and NDCG of several processes are those of one, and each user is ranked once."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from lightning_tinykg import KGRecDataModule, LightGCN
from lightning_tinykg.data.batches import RankingBatch


class Noting(LightGCN):
    """Writes down which users each rank ranks."""

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(**options)
        self.folder = folder

    def test_step(self, batch: RankingBatch, batch_idx: int) -> None:
        torch.save(batch.user, self.folder / f"{self.global_rank}-{batch_idx}.pt")
        super().test_step(batch, batch_idx)


def evaluated(folder: Path, processes: int, nodes: int) -> tuple[dict[str, float], list[int]]:
    folder.mkdir()
    L.seed_everything(0, verbose=False)
    data = KGRecDataModule(f"synthetic:{nodes}", eval_batch_size=32, triple_batch_size=None)
    trainer = L.Trainer(
        devices=processes,
        strategy="ddp_fork" if processes > 1 else "auto",
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.test(Noting(folder, dim=16, k=[5, 20]), data, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return metrics, [int(user) for file in folder.iterdir() for user in torch.load(file)]


@pytest.mark.ddp
@pytest.mark.parametrize("nodes", [700, 1000])
def test_two_processes_measure_what_one_measures(tmp_path: Path, nodes: int) -> None:
    alone, once = evaluated(tmp_path / "one", 1, nodes)
    together, twice = evaluated(tmp_path / "two", 2, nodes)
    assert len(set(once)) == len(once) > 0
    assert sorted(twice) == sorted(once)
    assert set(alone) == {"test/recall@5", "test/ndcg@5", "test/recall@20", "test/ndcg@20"}
    assert together == alone
