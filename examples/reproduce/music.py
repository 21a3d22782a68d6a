"""What do two bits cost? KGAT on KGCN's Last.FM ("music"), with and without activation compression.

    python examples/reproduce/music.py --data PATH/TO/music --seeds 0 1 2 --bits none 2
    python examples/reproduce/music.py --data PATH/TO/music --models kgat --bits 8 2 8-2:20

Every run trains until the validation Recall@20 has not risen for a while, and is tested once, with the checkpoint that
was best on the validation set. The split is the same for all runs; the seed decides initialisation and dropout. The
hyper-parameters are those of `examples/configs/*-music.yaml`, chosen on the validation set with seed 0. A finished run
leaves a JSON file under `--out` and is not repeated, so an interrupted call can simply be made again.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from reporting import WATCHED, Report, quiet_trainer, silence, spread
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from lightning_tinykg import CosineAnneal, TinyKGCallback, compress_activations
from lightning_tinykg.data import KGRecDataModule
from lightning_tinykg.models import KGAT, LightGCN, MostPopular

CONFIGS = Path(__file__).parents[1] / "configs"
MODELS = {"lightgcn": LightGCN, "kgat": KGAT, "kgat-in-graph": KGAT}


class StoredBytes(Callback):
    """The mean of what the training steps stored."""

    def __init__(self, tinykg: TinyKGCallback) -> None:
        self.tinykg = tinykg
        self.mib, self.steps = 0.0, 0

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        """Count a step."""
        if self.tinykg.ledger is not None:
            self.mib += self.tinykg.ledger.stored_bytes / 2**20
            self.steps += 1


def settings(model_name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a result depends on, besides the seed and the bits."""
    if model_name == "popularity":
        return {}
    config = yaml.safe_load((CONFIGS / f"{model_name}-music.yaml").read_text())
    data = {name: value for name, value in config["data"]["init_args"].items() if name != "root"}
    return {"model": config["model"]["init_args"], "data": data, "epochs": args.epochs, "patience": args.patience}


def run(model_name: str, bits: str, seed: int, args: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """One run: train, then test with the best checkpoint."""
    result: dict[str, Any] = {"model": model_name, "bits": bits, "seed": seed, "settings": settings(model_name, args)}
    if model_name == "popularity":
        trainer = quiet_trainer(args.accelerator, enable_checkpointing=False)
        return result | dict(trainer.test(MostPopular(), KGRecDataModule(args.data), verbose=False)[0])

    L.seed_everything(seed, verbose=False)
    model = MODELS[model_name](**result["settings"]["model"])
    data = KGRecDataModule(**(result["settings"]["data"] | {"root": args.data}))
    report = Report(progress, f"{model_name}, {describe(bits)}, seed {seed}")
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, **WATCHED)
        callbacks: list[Callback] = [report, best, EarlyStopping(patience=args.patience, **WATCHED)]
        if bits != "none":
            tinykg = TinyKGCallback(bits=width(bits), seed=seed, summary=False)
            stored = StoredBytes(tinykg)
            callbacks += [tinykg, stored]
        trainer = quiet_trainer(args.accelerator, max_epochs=args.epochs, callbacks=callbacks)
        start = time.perf_counter()
        trainer.fit(model, data)
        seconds = time.perf_counter() - start
        tested = trainer.test(model, data, ckpt_path=best.best_model_path, verbose=False)[0]
    progress.remove_task(report.task)
    if bits != "none":
        result["mean_stored_mib"] = stored.mib / max(stored.steps, 1)
    assert best.best_model_score is not None
    return result | {
        "val/recall@20": float(best.best_model_score),
        **tested,
        "curve": report.curve,  # validation Recall@20 of every epoch
        "epochs": trainer.current_epoch,
        "seconds_per_epoch": seconds / max(trainer.current_epoch, 1),
    }


def width(bits: str) -> int | CosineAnneal:
    """What ``--bits`` means: a width; ``8-2:20`` anneals from 8 to 2 bits over 20 epochs.

    Example:
        >>> width("8-2:20").bits_at(19)
        2
    """
    if "-" not in bits:
        return int(bits)
    ends, _, epochs = bits.partition(":")
    start, _, end = ends.partition("-")
    return CosineAnneal(start=int(start), end=int(end), steps=int(epochs or 20), by="epoch")


def describe(bits: str) -> str:
    """How a column's bits are called."""
    return "uncompressed" if bits == "none" else f"{bits} bits"


def checked(bits: str) -> str:
    """A value of ``--bits`` that can be used."""
    try:
        if bits != "none":
            compress_activations(bits=width(bits))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be none, a width, or e.g. 8-2:20, got {bits!r} ({error})") from None
    return bits


def tabulate(results: list[dict[str, Any]]) -> Table:
    """Mean and spread over the seeds, a row for each model and width."""
    table = Table(title="music: full ranking, known items masked; mean ± standard deviation over seeds")
    for column in (
        "model",
        "activations",
        "seeds",
        "test Recall@20",
        "test NDCG@20",
        "MiB / step",
        "epochs",
        "s / epoch",
    ):
        table.add_column(column, justify="left" if column in ("model", "activations") else "right")
    for model, bits in dict.fromkeys((r["model"], r["bits"]) for r in results):
        rows = [r for r in results if (r["model"], r["bits"]) == (model, bits)]
        cells = [spread([r[f"test/{metric}@20"] for r in rows]) for metric in ("recall", "ndcg")]
        stored = [r["mean_stored_mib"] for r in rows if "mean_stored_mib" in r]
        cells += [f"{statistics.mean(stored):.1f}" if stored else "-"]
        trained = [r for r in rows if "epochs" in r]
        cells += [f"{statistics.mean(r['epochs'] for r in trained):.0f}" if trained else "-"]
        cells += [f"{statistics.mean(r['seconds_per_epoch'] for r in trained):.1f}" if trained else "-"]
        table.add_row(model, describe(bits), str(len(rows)), *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the music data set")
    names = ["popularity", *MODELS]
    parser.add_argument("--models", nargs="+", choices=names, default=names[:3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--bits", nargs="+", type=checked, default=["none", "2"], help="of KGAT's activations; 8-2:20 anneals by epochs"
    )
    parser.add_argument("--epochs", type=int, default=200, help="at most")
    parser.add_argument("--patience", type=int, default=10, help="epochs without a better validation Recall@20")
    parser.add_argument("--out", type=Path, default=Path("runs/music"), help="where the results are kept")
    parser.add_argument("--accelerator", default="cpu")
    args = parser.parse_args()

    silence()
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = [("popularity", "none", 0)] if "popularity" in args.models else []
    wanted += [("lightgcn", "none", seed) for seed in args.seeds if "lightgcn" in args.models]
    kgats = [name for name in args.models if name.startswith("kgat")]
    wanted += [(name, bits, seed) for name in kgats for bits in args.bits for seed in args.seeds]

    console, results = Console(), []
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress:
        for model, bits, seed in wanted:
            path = args.out / f"{model}-{bits.replace(':', 'over')}-seed{seed}.json"
            if not path.exists():
                result = run(model, bits, seed, args, progress)
                path.with_suffix(".tmp").write_text(json.dumps(result, indent=2))
                path.with_suffix(".tmp").rename(path)  # a file that exists is whole
            results.append(json.loads(path.read_text()))
            if results[-1]["settings"] != settings(model, args):
                raise SystemExit(f"{path} was made with other settings: remove it, or choose another --out")
            progress.console.print(f"{path}: Recall@20 {results[-1]['test/recall@20']:.4f}")
    console.print(tabulate(results))


if __name__ == "__main__":
    main()
