"""Training steps of KGAT on a data set, uncompressed and compressed: losses, ratio, peak memory of the process.

    python examples/benchmarks/peak.py --data PATH/TO/last-fm --bits none 2
    python examples/benchmarks/peak.py --data synthetic:200000 --bits none 32 8 2 --steps 5

Each width runs in a process of its own, so that the peak of its resident memory is its own. Two peaks are shown: of the
whole process (data, parameters, optimizer and libraries included), and what the steps added to what was resident before
the first. The loss of the first step is exact at any width; later ones differ by the rounding of the gradients.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import time
import warnings
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lightning_tinykg import KGAT, KGRecDataModule, TinyKGCallback


def resident(peak: bool = False) -> float:
    """Resident memory of this process in MiB, now or at its peak."""
    if peak:
        scale = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Watch(Callback):
    """Notes each step's loss and time, and the memory before the first step."""

    def __init__(self) -> None:
        self.losses: list[str] = []
        self.seconds: list[float] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self.losses:
            self.before = resident()
        self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds.append(time.perf_counter() - self.started)
        self.losses.append(float(outputs["loss"]).hex())  # all bits


def child(args: argparse.Namespace) -> None:
    """Run the steps at one width, and print what was seen as JSON."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    L.seed_everything(args.seed, verbose=False)
    data = KGRecDataModule(args.data, batch_size=args.batch_size)
    watch = Watch()
    tinykg = [] if args.child == "none" else [TinyKGCallback(bits=int(args.child), summary=False)]
    trainer = L.Trainer(
        max_steps=args.steps,
        limit_val_batches=0,
        callbacks=[watch, *tinykg],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(KGAT(attention=args.attention, lr=1e-3), data)
    ledger = tinykg[0].largest if tinykg else None
    print(
        json.dumps(
            {
                "bits": args.child,
                "losses": watch.losses,
                "seconds": sorted(watch.seconds)[len(watch.seconds) // 2],
                "peak": resident(peak=True),
                "steps_peak": resident(peak=True) - watch.before,
                "raw": ledger.raw_bytes / 2**20 if ledger else None,
                "stored": ledger.stored_bytes / 2**20 if ledger else None,
            }
        )
    )


def main() -> None:
    """Run each width in a process of its own and show them side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="synthetic", help="a folder that KGRecDataModule reads, or synthetic:EDGES")
    parser.add_argument("--bits", nargs="+", default=["none", "2"], choices=("none", "32", "8", "4", "2", "1"))
    parser.add_argument("--attention", default="in-graph", choices=("in-graph", "refresh", "frozen"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="where to write the results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return

    results = []
    for bits in track(args.bits, description="widths", transient=True):
        command = [sys.executable, *sys.argv, "--child", bits]
        # large tensors are given back when they are freed, so that the peak is what was in use
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        results.append(json.loads(process.stdout.splitlines()[-1]))
    raw = next((r["raw"] for r in results if r["raw"]), None)
    table = Table(title=f"KGAT ({args.attention}) on {args.data}, {args.steps} steps", title_justify="left")
    for column in (
        "bits",
        "raw MiB",
        "stored MiB",
        "ratio",
        "peak MiB",
        "of the steps",
        "s / step",
        "first",
        "last loss",
    ):
        table.add_column(column, justify="right")
    for r in results:
        stored = r["stored"] or raw
        table.add_row(
            r["bits"],
            f"{raw:.0f}" if raw else "",
            f"{stored:.1f}" if stored else "",
            f"{raw / stored:.1f}x" if raw and stored else "",
            f"{r['peak']:.0f}",
            f"{r['steps_peak']:.0f}",
            f"{r['seconds']:.2f}",
            f"{float.fromhex(r['losses'][0]):.8f}",
            f"{float.fromhex(r['losses'][-1]):.6f}",
        )
    console = Console()
    console.width = max(console.width, 110)
    console.print(table)
    same = len({r["losses"][0] for r in results}) == 1
    console.print(f"losses of the first step: {'identical to the last bit' if same else 'they differ'}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
