"""KGAT on the built-in synthetic knowledge graph: uncompressed, in 8 bits and in 2, side by side.

    python examples/demo.py
    python examples/demo.py --epochs 30 --bits 4 1

The graph has a planted taste (users like items for their attributes, which the knowledge graph holds), so recall means
something: the last row is what recommending the most popular items gets. Each run is the same, but for one line in the
Trainer; each is tested once, with the epoch that was best on the validation set.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lightning_tinykg import KGAT, KGRecDataModule, TinyKGCallback
from lightning_tinykg.models import MostPopular


class Report(Callback):
    """One line of progress per run, and the time of its epochs."""

    def __init__(self, progress: Progress, name: str, epochs: int) -> None:
        self.progress, self.name = progress, name
        self.task = progress.add_task(name, total=epochs, score="")
        self.seconds = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.seconds += time.perf_counter() - self.started

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            score = f"validation Recall@20 {float(trainer.callback_metrics['val/recall@20']):.4f}"
            self.progress.update(self.task, advance=1, score=score)


def run(bits: int | None, args: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Train and test once."""
    name = "uncompressed" if bits is None else f"{bits} bits"
    L.seed_everything(args.seed, verbose=False)
    data = KGRecDataModule("synthetic", batch_size=2048)
    model = KGAT(lr=0.01, attention="in-graph")
    report = Report(progress, name, args.epochs)
    tinykg = TinyKGCallback(bits=bits, summary=False) if bits is not None else None
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, monitor="val/recall@20", mode="max")
        trainer = L.Trainer(
            max_epochs=args.epochs,
            callbacks=[report, best, *([tinykg] if tinykg else [])],
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, data)
        metrics = trainer.test(model, data, ckpt_path="best", verbose=False)[0]
    row = {"run": name, "seconds": report.seconds / args.epochs, **metrics}
    if tinykg is not None and tinykg.largest is not None:
        row |= {"raw": tinykg.largest.raw_bytes / 2**20, "stored": tinykg.largest.stored_bytes / 2**20}
    return row


def popularity() -> dict[str, Any]:
    """What the most popular items get."""
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    return {"run": "most popular", **trainer.test(MostPopular(), KGRecDataModule("synthetic"), verbose=False)[0]}


def table(rows: list[dict[str, Any]]) -> Table:
    """The runs side by side."""
    raw = next((row["raw"] for row in rows if "raw" in row), None)
    table = Table(title="KGAT, in-graph attention, synthetic knowledge graph", title_justify="left")
    for column in ("run", "Recall@20", "NDCG@20", "raw MiB", "stored MiB", "ratio", "s / epoch"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for row in rows:
        trained = "seconds" in row
        stored = row.get("stored", raw)
        table.add_row(
            row["run"],
            f"{row['test/recall@20']:.4f}",
            f"{row['test/ndcg@20']:.4f}",
            f"{raw:.1f}" if trained and raw else "",
            f"{stored:.2f}" if trained and stored else "",
            f"{raw / stored:.1f}x" if trained and raw and stored else "",
            f"{row['seconds']:.2f}" if trained else "",
        )
    return table


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 2], choices=(32, 8, 4, 2, 1))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    columns = (TextColumn("{task.description:14}"), BarColumn(), TextColumn("{task.completed}/{task.total} epochs"))
    with Progress(*columns, TimeElapsedColumn(), TextColumn("{task.fields[score]}")) as progress:
        rows = [run(bits, args, progress) for bits in (None, *args.bits)]
    console = Console()
    console.width = max(console.width, 90)
    console.print(table([*rows, popularity()]))
    console.print("One line makes the difference: [bold]Trainer(callbacks=[TinyKGCallback(bits=2)])[/bold]")


if __name__ == "__main__":
    main()
