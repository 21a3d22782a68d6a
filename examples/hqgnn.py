"""LightGCN's embeddings in 8, 4, 2 and 1 bits on the built-in synthetic graph: after training, and trained for it.

    python examples/hqgnn.py
    python examples/hqgnn.py --bits 2 1 --scale table --users quantized

A full-precision model is trained once. From it each width is made three ways: rounded as it is (PTQ), fine-tuned with
the straight-through estimator (STE), and with the Hessian-aware one (GSTE); fine-tuning keeps the epoch that was best
on the validation set, and what it started from if none was better. Prints a table and draws recall against bytes.
"""

import argparse
import copy
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lightning_tinykg import KGRecDataModule
from lightning_tinykg.hqgnn import HQGNN
from lightning_tinykg.models import LightGCN

WATCHED: dict[str, Any] = {"monitor": "val/recall@20", "mode": "max"}
NAMES = {"ptq": "PTQ", "ste": "STE", "gste": "GSTE"}
STYLES = {"ptq": "o-", "ste": "s--", "gste": "x:"}  # lines that coincide are both seen


def trainer(**options: Any) -> L.Trainer:
    """A quiet one, on the CPU."""
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", devices=1, num_sanity_val_steps=0, **quiet, **options)


def train(model: L.LightningModule, data: KGRecDataModule, epochs: int) -> float:
    """Train; leaves the model as it was in its best epoch, and returns that epoch's validation Recall@20."""
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, save_weights_only=True, **WATCHED)
        trainer(max_epochs=epochs, callbacks=[best]).fit(model, data)
        model.load_state_dict(torch.load(best.best_model_path, weights_only=True)["state_dict"])
    return float(best.best_model_score or 0.0)


def score(model: L.LightningModule, data: KGRecDataModule) -> dict[str, float]:
    """Validation and test."""
    run = trainer(enable_checkpointing=False)
    return {**run.validate(model, data, verbose=False)[0], **run.test(model, data, verbose=False)[0]}


def quantized(
    encoder: LightGCN, bits: int, estimator: Any, data: KGRecDataModule, args: argparse.Namespace
) -> dict[str, Any]:
    """One row of the table."""
    L.seed_everything(args.seed, verbose=False)
    options: dict[str, Any] = {"scale": args.scale, "quantize_users": args.users == "quantized", "lr": 0.002}
    options["distillation"] = 1.0 if estimator != "ptq" else 0.0  # towards the ranking that fine-tuning starts from
    model = HQGNN(copy.deepcopy(encoder), bits=bits, estimator=estimator, compare=(), **options)
    found = score(model, data)
    if estimator != "ptq" and bits < 32 and train(model, data, args.tuning_epochs) > found["val/recall@20"]:
        found = score(model, data)
    name = "full precision" if bits == 32 else f"{NAMES[estimator]}, {bits} bit{'s' if bits > 1 else ''}"
    return {"name": name, "bits": bits, "estimator": estimator, **found}


def table(rows: list[dict[str, Any]], args: argparse.Namespace) -> Table:
    """The widths side by side."""
    shown = Table(
        title=f"LightGCN, synthetic graph, a scale per {args.scale}, users {args.users}", title_justify="left"
    )
    for column in ("embeddings", "Recall@20", "of fp32", "Recall@50", "NDCG@20", "items, MiB", "smaller"):
        shown.add_column(column, justify="left" if column == "embeddings" else "right")
    full = rows[0]
    for row in rows:
        shown.add_row(
            row["name"],
            f"{row['test/recall@20']:.4f}",
            f"{row['test/recall@20'] / full['test/recall@20']:.1%}",
            f"{row['test/recall@50']:.4f}",
            f"{row['test/ndcg@20']:.4f}",
            f"{row['hqgnn/item_mib']:.3f}",
            f"{full['hqgnn/item_mib'] / row['hqgnn/item_mib']:.1f}x",
        )
    return shown


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Recall against the item table's bytes, a line for each estimator."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    full = rows[0]
    axes.axhline(full["test/recall@20"], color="0.5", linestyle="--", label=f"fp32, {full['hqgnn/item_mib']:.2f} MiB")
    for estimator in dict.fromkeys(row["estimator"] for row in rows[1:]):
        mine = sorted((r for r in rows[1:] if r["estimator"] == estimator), key=lambda r: int(r["bits"]))
        axes.plot(
            [r["hqgnn/item_mib"] for r in mine],
            [r["test/recall@20"] for r in mine],
            STYLES[estimator],
            label=NAMES[estimator],
        )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("item embeddings, MiB (log scale)")
    axes.set_ylabel("test Recall@20")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="synthetic", help='folder of a data set, or "synthetic:EDGES"')
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 2, 1], choices=(8, 4, 2, 1))
    parser.add_argument("--estimators", nargs="+", default=["ptq", "ste", "gste"], choices=("ptq", "ste", "gste"))
    parser.add_argument("--scale", default="node", choices=("node", "table", "group"), help="what shares a scale")
    parser.add_argument("--users", default="full", choices=("full", "quantized"), help="precision of the users")
    parser.add_argument("--epochs", type=int, default=20, help="of the full-precision model")
    parser.add_argument("--tuning-epochs", type=int, default=5, help="of each fine-tuning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("hqgnn.png"), help="where the picture goes")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    L.seed_everything(args.seed, verbose=False)
    data = KGRecDataModule(args.data, batch_size=2048)
    encoder = LightGCN(dim=64, lr=0.005)
    columns = (TextColumn("{task.description:24}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn()) as progress:
        variants = [(32, "ptq"), *((bits, estimator) for bits in args.bits for estimator in args.estimators)]
        task = progress.add_task("full precision", total=len(variants))
        train(encoder, data, args.epochs)
        rows = []
        for bits, estimator in variants:
            progress.update(task, description=f"{NAMES[estimator]}, {bits} bits")
            rows.append(quantized(encoder, bits, estimator, data, args))
            progress.advance(task)
    console = Console()
    console.width = max(console.width, 90)
    console.print(table(rows, args))
    picture(rows, args.out)
    console.print(f"Recall against bytes: {args.out}")


if __name__ == "__main__":
    main()
