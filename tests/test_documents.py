"""README and docs: links lead somewhere, examples are Python, and what they import is there."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch_geometric.data import Data
from torch_geometric.data.lightning import LightningNodeData
from torch_geometric.nn import GCN, GCNConv

import lightning_tinykg

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """What the headings of a page are linked to by, as GitHub makes it of them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in LINK.findall(path.read_text()):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name) if name else path
        assert target.exists(), f"{path.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{path.name} links to {link}: no such heading"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_examples_import_what_there_is(path: Path) -> None:
    for block in BLOCK.findall(path.read_text()):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module is not None and "tinykg" in node.module:
                module = importlib.import_module(node.module)
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{path.name} imports {missing} of {node.module}"


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {link.partition("#")[0] for link in LINK.findall(DOCUMENTS[0].read_text())}
    assert {f"docs/{path.name}" for path in DOCUMENTS[1:]} <= linked


# -- the README's examples, run one after another ----------------------------------------------------------------------


class Classifier(L.LightningModule):
    """Node classification, as a user has it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = GCNConv(6, 8), GCNConv(8, 3)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        out: Tensor = self.conv2(self.conv1(x, edge_index).relu(), edge_index)
        return out

    def training_step(self, batch: Data, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch.x, batch.edge_index), batch.y)

    def test_step(self, batch: Data, batch_idx: int) -> None:
        self.log("test/loss", self.training_step(batch, batch_idx), batch_size=1)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def nodes() -> Data:
    mask = torch.rand(40) < 0.5
    x, edge_index, y = torch.randn(40, 6), torch.randint(40, (2, 150)), torch.randint(3, (40,))
    return Data(x=x, edge_index=edge_index, y=y, train_mask=mask, val_mask=~mask, test_mask=~mask)


def given(number: int, trainer: L.Trainer) -> dict[str, Any]:
    """What an example of the README takes for granted."""
    if number == 1:
        return {name: getattr(lightning_tinykg, name) for name in lightning_tinykg.__all__}
    if number == 3:
        model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))
        loader = DataLoader(torch.randn(512, 64), 256)
        return {"pandas": pytest.importorskip("pandas"), "model": lambda x: model(x).mean(), "loader": loader}
    if number == 4:
        return {"trainer": trainer, "user_ids": [0, 1, 2]}
    if number == 5:
        return {"HQGNN": lightning_tinykg.HQGNN, "LightGCN": lightning_tinykg.LightGCN}
    if number == 7:
        return {"L": L, "model": Classifier(), "data": LightningNodeData(nodes(), loader="full")}
    if number == 8:
        data = nodes()
        model = GCN(6, 8, 2, 3).eval()
        rest = {"x": data.x, "edge_index": data.edge_index, "y": data.y, "val_mask": data.val_mask}
        return {"torch": torch, "model": model, **rest}
    return {}


@pytest.mark.filterwarnings("ignore")  # of Lightning: few batches, no logger
def test_the_readmes_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: dict[str, Any]) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    known: dict[str, Any] = {}
    for number, block in enumerate(BLOCK.findall(DOCUMENTS[0].read_text())):
        known |= given(number, L.Trainer(**quiet, max_epochs=1))
        block = block.replace('"path/to/last-fm"', '"synthetic:500", batch_size=64')
        exec(compile(block, f"README.md, example {number}", "exec"), known)
    assert {path.name for path in tmp_path.iterdir()} >= {"ledger.png", "index", "packed", "front.png"}
