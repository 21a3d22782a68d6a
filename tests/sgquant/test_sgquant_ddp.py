"""``SGQuantCallback`` on two processes: each sees other values, both quantize by the same ranges and degrees."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from networks import CLASSES, Net, graph
from torch import Tensor
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


@pytest.mark.parametrize("range", ["minmax", "mse"])
def test_ranks_agree(tmp_path: Path, quiet: dict[str, Any], range: Any) -> None:
    callback = SGQuantCallback(topologywise([8, 4, 4, 2]), finetune_epochs=2, granularity="bucket", range=range)
    options = quiet | {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}
    L.Trainer(max_epochs=3, callbacks=[callback, Report(tmp_path, callback)], **options).fit(OfRanks())
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one == other
    if range == "minmax":
        assert one["high"] == 2 * graph()[0].max().item()  # what rank 1 saw
