"""The gradient's error while a model trains: an untrained model tells little of what rounding costs later.

    python examples/benchmarks/training.py --data PATH/TO/music --epochs 0 8 16
    python examples/benchmarks/training.py --data synthetic --attention in-graph

KGAT trains uncompressed. After each of the given numbers of epochs the gradients of the epoch's first BPR batch and of
its first TransR batch are taken exactly and compressed, over a few draws of noise: by the rules, by the paper.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from functools import partial
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from steps import Step

from lightning_tinykg import KGAT, KGRecDataModule, compress_activations


def main() -> None:
    """Train, and measure on the way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="synthetic")
    parser.add_argument("--attention", default="frozen", choices=("in-graph", "refresh", "frozen"))
    parser.add_argument("--epochs", type=int, nargs="+", default=[0, 8, 16])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 2], choices=(32, 8, 4, 2, 1))
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--l2", type=float, default=0.03)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)  # the plain step repeats to the last bit
    L.seed_everything(args.seed, verbose=False)
    data = KGRecDataModule(args.data, triple_batch_size=4096)
    model = KGAT(attention=args.attention, lr=args.lr, l2=args.l2)

    table = Table(title=f"Error of the gradient in training: KGAT ({args.attention}) on {args.data}")
    for column in ("epochs", "batch", "bits", "rules: ratio", "error", "paper: ratio", "error"):
        table.add_column(column, justify="right")
    trained = 0
    for epochs in track(args.epochs, transient=True):
        trainer = L.Trainer(
            max_epochs=epochs - trained,
            limit_val_batches=0,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, data)  # no epochs at all sets the model up
        trained = epochs
        data.setup("fit")
        model.trainer = None  # there is nobody to log to
        model.train()
        first: dict[str, Any] = {}
        for batch in data.train_dataloader():
            first.setdefault(type(batch).__name__, batch)
        for kind, batch in first.items():
            step = Step(model, partial(model.training_step, batch, 0))  # type: ignore[arg-type]  # of ours it is a tensor
            exact, _ = step.gradient()
            for bits in args.bits:
                cells = []
                for recipe in ("rules", "paper") if bits < 32 else ("rules",):
                    compression, errors = compress_activations(bits, recipe=recipe), []
                    for _ in range(args.draws):
                        gradient, ledger = step.gradient(compression)
                        errors.append(float((gradient - exact).norm() / exact.norm()))
                    cells += [f"{ledger.ratio:.1f}x", f"{sum(errors) / len(errors):.1%}"]
                table.add_row(str(epochs), kind, str(bits), *cells, end_section=bits == args.bits[-1])
    Console().print(table)


if __name__ == "__main__":
    main()
