"""Node classifiers of the SGQuant paper, GCN, AGNN and GAT, their data, and full-batch training."""

import copy
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Data
from torch_geometric.datasets import Amazon, Planetoid
from torch_geometric.nn import AGNNConv, GATConv, GCNConv
from torch_geometric.transforms import RandomNodeSplit

from lightning_tinykg import ExpectedAccuracy

SETS = {"cora": "planetoid/Cora", "citeseer": "planetoid/CiteSeer", "computers": "amazon/Computers"}


class GCN(nn.Module):
    """Two graph convolutions (Kipf and Welling, ICLR 2017, arXiv 1609.02907)."""

    def __init__(self, features: int, classes: int, hidden: int = 16, dropout: float = 0.5) -> None:
        super().__init__()
        self.conv1, self.conv2 = GCNConv(features, hidden), GCNConv(hidden, classes)
        self.dropout = dropout

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Logits `[N, classes]`."""
        x = self.conv1(F.dropout(x, self.dropout, self.training), edge_index).relu()
        out: Tensor = self.conv2(F.dropout(x, self.dropout, self.training), edge_index)
        return out


class GAT(nn.Module):
    """Two attention layers, the first of 8 heads (Velickovic et al., ICLR 2018, arXiv 1710.10903)."""

    def __init__(self, features: int, classes: int, hidden: int = 8, heads: int = 8, dropout: float = 0.6) -> None:
        super().__init__()
        self.conv1 = GATConv(features, hidden, heads, dropout=dropout)
        self.conv2 = GATConv(hidden * heads, classes, heads=1, dropout=dropout)
        self.dropout = dropout

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Logits `[N, classes]`."""
        x = F.elu(self.conv1(F.dropout(x, self.dropout, self.training), edge_index))
        out: Tensor = self.conv2(F.dropout(x, self.dropout, self.training), edge_index)
        return out


class AGNN(nn.Module):
    """Two attention layers without weights between two linear ones (Thekumparampil et al., 2018, arXiv 1803.03735)."""

    def __init__(self, features: int, classes: int, hidden: int = 16, dropout: float = 0.5) -> None:
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(features, hidden), nn.Linear(hidden, classes)
        self.conv1, self.conv2 = AGNNConv(requires_grad=False), AGNNConv(requires_grad=True)
        self.dropout = dropout

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Logits `[N, classes]`."""
        x = self.lin1(F.dropout(x, self.dropout, self.training)).relu()
        x = self.conv2(self.conv1(x, edge_index), edge_index)
        out: Tensor = self.lin2(F.dropout(x, self.dropout, self.training))
        return out


MODELS: dict[str, Callable[..., nn.Module]] = {"gcn": GCN, "agnn": AGNN, "gat": GAT}


def settings(kind: str, name: str) -> dict[str, Any]:
    """How a model is trained on a data set: the authors' settings; on Computers, which none of them used, quicker.

    Args:
        kind: `gcn`, `agnn` or `gat`.
        name: Of the data set.
    """
    if name == "computers":
        return {"lr": 0.01, "weight_decay": 5e-4, "epochs": 100, "patience": 30, "every": 2}
    return {"lr": 0.005 if kind == "gat" else 0.01, "weight_decay": 5e-4, "epochs": 300, "patience": 50, "every": 1}


def load(root: Path, name: str, seed: int = 0) -> Data:
    """A data set, with masks.

    Cora and CiteSeer have the public split. Computers has none: 20 training and 30 validation nodes a class are drawn,
    the rest is for testing (Shchur et al., 2018, arXiv 1811.05868). Features, which are 0 or 1, are scaled to rows of
    length 1.

    Args:
        root: The folder that holds `planetoid` and `amazon`; only read.
        name: `cora`, `citeseer` or `computers`.
        seed: Of the split that is drawn.
    """
    with tempfile.TemporaryDirectory() as folder:  # PyG writes what it has processed beside what it reads
        copied = Path(folder) / Path(SETS[name]).name
        shutil.copytree(root / SETS[name] / "raw", copied / "raw")
        data: Data = Amazon(folder, "Computers")[0] if name == "computers" else Planetoid(folder, copied.name)[0]
    if name == "computers":
        torch.manual_seed(seed)
        classes = int(data.y.max()) + 1
        data = RandomNodeSplit("test_rest", num_train_per_class=20, num_val=30 * classes)(data)
    data.x = F.normalize(data.x)
    return data


def create(kind: str, data: Data, seed: int, name: str) -> nn.Module:
    """A model with fresh weights; GCN and AGNN are four times as wide on Computers."""
    torch.manual_seed(seed)
    width = {"hidden": 64} if name == "computers" and kind != "gat" else {}
    return MODELS[kind](data.num_features, int(data.y.max()) + 1, **width)


class Teacher:
    """What a full-precision model says of all nodes: what fine-tuning learns, and what plans are judged by.

    Args:
        model: the full-precision model.
        data: with masks; the labels of its validation nodes are used.

    Attributes:
        expected: the accuracy to be expected of logits at all nodes, by what the model believes.
    """

    def __init__(self, model: nn.Module, data: Data) -> None:
        self.expected = ExpectedAccuracy(_logits(model, data), data.y, data.val_mask)

    def judge(self, model: nn.Module, data: Data) -> tuple[float, float]:
        """The accuracy to be expected of a model, 0 to 1, and its loss."""
        logits = _logits(model, data)
        return self.expected(logits), float(self.expected.loss(logits))


@torch.no_grad()
def _logits(model: nn.Module, data: Data) -> Tensor:
    model.eval()
    logits: Tensor = model(data.x, data.edge_index)
    return logits


@dataclass
class Fitted:
    """What training came to.

    Attributes:
        val: Accuracy of the best epoch, 0 to 1: on the validation nodes, or as a teacher expects it.
        loss: The loss of that epoch that goes with it.
        epochs: How many were run.
    """

    val: float
    loss: float
    epochs: int


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, mask: Tensor, x: Tensor | None = None) -> tuple[float, float]:
    """Accuracy, 0 to 1, and loss on some nodes."""
    model.eval()
    logits = model(data.x if x is None else x, data.edge_index)[mask]
    right = (logits.argmax(dim=-1) == data.y[mask]).float().mean()
    return float(right), float(F.cross_entropy(logits, data.y[mask]))


def fit(
    model: nn.Module,
    data: Data,
    *,
    lr: float,
    weight_decay: float,
    epochs: int,
    patience: int,
    every: int = 1,
    teacher: Teacher | None = None,
) -> Fitted:
    """Train on the whole graph, and leave the model as it was in its best epoch.

    One epoch of `every` is evaluated, on the validation nodes or by the teacher. The best is the most accurate, and of
    those as accurate the one with the least loss; what the model starts from takes part, so that fine-tuning never ends
    worse by that measure.

    Args:
        model: What is trained.
        data: With masks.
        lr: Adam's learning rate; with a teacher, it declines to none.
        weight_decay: Of all weights.
        epochs: At most.
        patience: Epochs without a better one.
        every: See above.
        teacher: What to learn instead of the labels, at all nodes. A GNN has few labels, and few-bit weights that fit
            them need not be right elsewhere.
    """

    def judge() -> tuple[float, float]:
        return evaluate(model, data, data.val_mask) if teacher is None else teacher.judge(model, data)

    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs)
    best, weights, since, epoch = judge(), copy.deepcopy(model.state_dict()), 0, 0
    for epoch in range(1, epochs + 1):
        model.train(teacher is None)  # dropout is for few labels; what is told of all nodes it only blurs
        optimizer.zero_grad()
        logits = model(data.x, data.edge_index)
        if teacher is None:
            loss = F.cross_entropy(logits[data.train_mask], data.y[data.train_mask])
        else:
            loss = teacher.expected.loss(logits)
        loss.backward()
        optimizer.step()
        if teacher is not None:  # few epochs have to end somewhere
            decay.step()
        since += 1
        if epoch % every:
            continue
        now = judge()
        if (now[0], -now[1]) > (best[0], -best[1]):
            best, weights, since = now, copy.deepcopy(model.state_dict()), 0
        if since > patience:
            break
    model.load_state_dict(weights)
    return Fitted(*best, epoch)
