"""``SGQuantCallback`` on two processes: each sees other values, both quantize by the same ranges and degrees."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from networks import CLASSES, Net, gat, graph
from torch import Tensor
from torch.multiprocessing.spawn import ProcessException
from torch.nn import functional as F
from torch_geometric import nn as pyg
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader

from lightning_tinykg.sgquant import SGQuantCallback, topologywise
from lightning_tinykg.sgquant.wiring import Spot

pytestmark = [pytest.mark.ddp, pytest.mark.timeout(60)]


class OfRanks(L.LightningModule):
    """The features of rank 1 are twice those of rank 0, and it has half of the edges."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Net(pyg.GCNConv)

    def training_step(self, batch: Data, batch_idx: int) -> Tensor:
        rank = self.trainer.global_rank
        edge_index = batch.edge_index[:, : batch.num_edges // (1 + rank)]
        return F.cross_entropy(self.net(batch.x * (1 + rank), edge_index), batch.y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        x, edge_index = graph()
        return DataLoader([Data(x=x, edge_index=edge_index, y=x[:, :CLASSES].argmax(dim=1))])


class Report(L.Callback):
    """Writes what each rank has found to a file: a forked process gives back nothing else."""

    def __init__(self, folder: Path, callback: SGQuantCallback) -> None:
        self.folder, self.callback = folder, callback

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        quantizer = self.callback.quantizer
        assert quantizer is not None
        assert quantizer.is_attached
        found = {
            "points": quantizer.points,
            "levels": [[list(level) for level in quantizer.levels(spot)] for spot in quantizer.sites],
            "high": max(level.high or 0 for level in quantizer.levels(Spot("net.conv1", "embedding", "x"))),
            "weights": [parameter.tolist() for parameter in pl_module.parameters()],
        }
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(found))


class OfRareEdges(OfRanks):
    """On rank 0 the first batch has no edges, so that its attention is met on rank 1 only."""

    def __init__(self) -> None:
        super().__init__()
        self.net = gat()

    def training_step(self, batch: Data, batch_idx: int) -> Tensor:
        edge_index = batch.edge_index[:, : batch.num_edges * self.trainer.global_rank]
        return F.cross_entropy(self.net(batch.x, edge_index), batch.y)


class OfFailingRank(OfRanks):
    """On rank 1 something is not finite; rank 0 must not wait for it."""

    def training_step(self, batch: Data, batch_idx: int) -> Tensor:
        if self.trainer.global_rank and not self.training:
            batch.x = batch.x / 0
        return F.cross_entropy(self.net(batch.x, batch.edge_index), batch.y)


class OfOtherBatches(OfRanks):
    """Rank 0's first batch passes no messages."""

    def training_step(self, batch: Data, batch_idx: int) -> Tensor:
        if self.trainer.global_rank == 0 and not self.training:
            return self.net.conv1.lin(batch.x).sum()
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", [OfRareEdges, OfOtherBatches])
def test_ranks_agree_on_places_that_not_all_of_them_met(tmp_path: Path, quiet: dict[str, Any], kind: Any) -> None:
    callback = SGQuantCallback(topologywise([8, 4, 4, 2]), finetune_epochs=2)
    options = quiet | {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}
    L.Trainer(max_epochs=3, callbacks=[callback, Report(tmp_path, callback)], **options).fit(kind())
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one == other
    assert one["points"]


def test_what_fails_on_one_rank_is_raised_on_all(tmp_path: Path, quiet: dict[str, Any]) -> None:
    callback = SGQuantCallback(4, finetune_epochs=2)
    options = quiet | {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}
    with pytest.raises(ProcessException, match=r"the calibration on rank 1 failed: .* must be finite|must be finite"):
        L.Trainer(max_epochs=3, callbacks=[callback], **options).fit(OfFailingRank())


@pytest.mark.parametrize("range", ["minmax", "mse"])
def test_ranks_agree(tmp_path: Path, quiet: dict[str, Any], range: Any) -> None:
    callback = SGQuantCallback(topologywise([8, 4, 4, 2]), finetune_epochs=2, granularity="bucket", range=range)
    options = quiet | {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}
    L.Trainer(max_epochs=3, callbacks=[callback, Report(tmp_path, callback)], **options).fit(OfRanks())
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one == other
    if range == "minmax":
        assert one["high"] == 2 * graph()[0].max().item()  # what rank 1 saw
