"""What do few-bit embeddings cost? LightGCN at full precision, and its embeddings at 8, 4, 2 and 1 bits by HQ-GNN.

    python examples/reproduce/hqgnn_lightgcn.py --data PATH/TO/ml-1m --scale table node --seeds 0 1 2

For each seed a full-precision teacher is trained until its validation Recall@20 has not risen for a while. From it,
each variant is quantized: `ptq` as it is, `ste` and `gste` fine-tuned, chosen on the validation set (the state before
fine-tuning takes part in that choice), and tested once. "fp32 tuned" is the teacher fine-tuned just as long, without
quantization: what fine-tuning alone is worth. The split is the same for all runs; the seed decides initialisation. A
finished run is a line in `RESULTS/hqgnn-NAME.jsonl`, with NAME the data set's, and is not repeated, so an interrupted
call can simply be made again, and more seeds can be added later. Teachers are kept in `OUT/NAME`, with how they were
trained. Users are scored at full precision unless `--users quantized`.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from reporting import WATCHED, Report, quiet_trainer, silence, spread
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from tinykg_runs import check_unfinished
from tinykg_tables import keep, read

from lightning_tinykg.data import KGRecDataModule
from lightning_tinykg.hqgnn import HQGNN
from lightning_tinykg.models import LightGCN

RESULTS = Path(__file__).parent / "results"
METRICS = ("recall@20", "recall@50", "ndcg@20", "ndcg@50")


def dataset(args: argparse.Namespace) -> KGRecDataModule:
    """The data, split by seed 0 in every run."""
    return KGRecDataModule(args.data, batch_size=args.batch_size, eval_batch_size=2048)


def fit(
    model: L.LightningModule, args: argparse.Namespace, epochs: int, patience: int, path: Path, progress: Progress
) -> dict[str, Any]:
    """Train until validation no longer improves; leaves the best checkpoint at `path`."""
    report = Report(progress, path.stem)
    path.unlink(missing_ok=True)
    best = ModelCheckpoint(path.parent, path.stem, **WATCHED, save_weights_only=True)
    stop = EarlyStopping(patience=patience, **WATCHED)
    start = time.perf_counter()
    run = quiet_trainer(args.accelerator, max_epochs=epochs, callbacks=[report, best, stop])
    run.fit(model, dataset(args))
    seconds = time.perf_counter() - start
    progress.remove_task(report.task)
    return {"curve": report.curve, "epochs": run.current_epoch, "seconds": seconds, "val": max(report.curve)}


def teacher_of(seed: int, args: argparse.Namespace, progress: Progress) -> LightGCN:
    """The full-precision model of a seed, trained once; how it was trained lies beside it."""
    path = args.out / f"teacher-seed{seed}.ckpt"
    if not path.exists():
        L.seed_everything(seed, verbose=False)
        model = LightGCN(dim=args.dim, num_layers=args.layers, lr=args.teacher_lr, l2=args.l2, k=[20, 50])
        unfinished = path.with_name(f"training-seed{seed}.ckpt")
        trained = fit(model, args, args.teacher_epochs, args.patience, unfinished, progress)
        path.with_suffix(".json").write_text(json.dumps(trained))
        unfinished.rename(path)  # a file that exists is whole
    return LightGCN.load_from_checkpoint(path, map_location="cpu")


def score(model: L.LightningModule, args: argparse.Namespace) -> dict[str, float]:
    """Validation and test."""
    run, data = quiet_trainer(args.accelerator, enable_checkpointing=False), dataset(args)
    found = dict(run.validate(model, data, verbose=False)[0])
    return found | dict(run.test(model, data, verbose=False)[0])


def options_of(key: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """HQGNN's arguments for a run."""
    return {
        "bits": key["bits"],
        "estimator": "ste" if key["bits"] == 32 else key["estimator"],
        "scale": key["scale"] or "node",
        "quantize_users": args.users == "quantized",
        "distillation": args.distillation if key["estimator"] in ("ste", "gste") else 0.0,
        "lr": args.lr,
        "compare": [],
    }


def run_one(key: dict[str, Any], args: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """One line of the results."""
    model = HQGNN(teacher_of(key["seed"], args, progress), **options_of(key, args))
    before = score(model, args)
    result: dict[str, Any] = {"val": before["val/recall@20"], "epochs": 0, "seconds": 0.0}
    if key["estimator"] == "fp32":
        result = json.loads((args.out / f"teacher-seed{key['seed']}.json").read_text())
    tested = before
    if key["estimator"] in ("ste", "gste", "fp32 tuned"):
        L.seed_everything(key["seed"], verbose=False)
        path = args.out / ("-".join(str(part).replace(" ", "_") for part in key.values()) + ".ckpt")
        result = fit(model, args, args.epochs, args.tuning_patience, path, progress)
        model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        path.unlink()
        if result["val"] > before["val/recall@20"]:
            tested = score(model, args)
    found = {name: tested[f"test/{name}"] for name in METRICS} | {"mib": tested["hqgnn/embedding_mib"]}
    return key | result | found | {"threads": torch.get_num_threads(), "torch": torch.__version__}


def groups(results: list[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """The seeds of each variant together."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in results:
        found.setdefault((row["bits"], row["estimator"], row["scale"]), []).append(row)
    return found


def percent(rows: list[dict[str, Any]], full: list[dict[str, Any]], metric: str) -> float:
    """Mean over the seeds of the share of the same seed's full-precision score, in per cent."""
    exact = {row["seed"]: row[metric] for row in full}
    return 100.0 * float(statistics.mean(row[metric] / exact[row["seed"]] for row in rows))


def tabulate(results: list[dict[str, Any]], title: str) -> Table:
    """Mean and spread over the seeds, and the share of full precision."""
    table = Table(title=f"{title}: full ranking, known items masked; mean ± standard deviation over seeds")
    for column in ("bits", "estimator", "scale", "MiB", "Recall@20", "of fp32", "Recall@50", "of fp32", "NDCG@20"):
        table.add_column(column, justify="left" if column in ("estimator", "scale") else "right")
    by = groups(results)
    full = by[32, "fp32", None]
    for (bits, estimator, scale), rows in by.items():
        cells = [str(bits), estimator, scale or "", f"{rows[0]['mib']:.2f}"]
        for metric in ("recall@20", "recall@50"):
            cells += [spread([row[metric] for row in rows]), f"{percent(rows, full, metric):.1f} %"]
        table.add_row(*cells, spread([row["ndcg@20"] for row in rows]))
    return table


def picture(results: list[dict[str, Any]], path: Path, title: str) -> None:
    """Recall against bytes, a line for each estimator and scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for (bits, estimator, scale), rows in groups(results).items():
        values = [row["recall@20"] for row in rows]
        point = (rows[0]["mib"], statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0)
        if estimator == "fp32":
            axes.axhline(point[1], color="0.5", linestyle="--", label=f"fp32, {point[0]:.2f} MiB")
        elif bits < 32:
            lines.setdefault(f"{estimator}, a scale per {scale}", []).append(point)
    for name, points in lines.items():
        size, mean, error = zip(*sorted(points), strict=True)
        axes.errorbar(size, mean, error, marker="o", capsize=3, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("embeddings as scored, MiB (log scale)")
    axes.set_ylabel("test Recall@20")
    axes.set_title(title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the data set")
    parser.add_argument("--bits", nargs="+", type=int, choices=(8, 4, 2, 1), default=[8, 4, 2, 1])
    parser.add_argument("--estimators", nargs="+", choices=("ptq", "ste", "gste"), default=["ptq", "ste", "gste"])
    parser.add_argument("--scale", nargs="+", choices=("table", "node", "group"), default=["table", "node"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--users", choices=("full", "quantized"), default="full", help="precision of the users")
    parser.add_argument("--distillation", type=float, default=1.0, help="weight of the teacher's ranking; 0: none")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--l2", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=8192)
    parser.add_argument("--teacher-lr", type=float, default=5e-3)
    parser.add_argument("--teacher-epochs", type=int, default=300, help="at most")
    parser.add_argument("--patience", type=int, default=10, help="epochs without a better validation Recall@20")
    parser.add_argument("--lr", type=float, default=1e-3, help="of the fine-tuning")
    parser.add_argument("--epochs", type=int, default=30, help="of fine-tuning, at most")
    parser.add_argument("--tuning-patience", type=int, default=5, help="epochs without a better validation Recall@20")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the results are kept")
    parser.add_argument("--out", type=Path, default=Path("runs/hqgnn"), help="where teachers and picture are kept")
    parser.add_argument("--accelerator", default="cpu")
    args = parser.parse_args()

    silence()
    name = Path(args.data).resolve().name.replace(":", "")
    args.out, path = args.out / name, args.results / f"hqgnn-{name}.jsonl"
    other = ("data", "seeds", "bits", "estimators", "scale", "results", "out", "accelerator")
    settings = {"set": name} | {option: value for option, value in vars(args).items() if option not in other}
    done = read(path)
    if any(row["settings"] != settings for row in done):
        raise SystemExit(f"{path} was made with other settings: choose another --results")
    check_unfinished(args.out, settings)
    args.results.mkdir(parents=True, exist_ok=True)
    exact = ["fp32", "fp32 tuned"] if {"ste", "gste"} & set(args.estimators) else ["fp32"]
    wanted = [{"bits": 32, "estimator": how, "scale": None, "seed": seed} for seed in args.seeds for how in exact]
    wanted += [
        {"bits": bits, "estimator": estimator, "scale": scale, "seed": seed}
        for seed in args.seeds
        for bits in args.bits
        for scale in args.scale
        for estimator in args.estimators
    ]
    console, results = Console(), []
    console.width = max(console.width, 130)
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress:
        for key in wanted:
            found = next((row for row in done if all(row[name] == value for name, value in key.items())), None)
            if found is None:
                found = run_one(key, args, progress) | {"settings": settings}
                keep(path, found)
            results.append(found)
            run = f"{key['estimator']}, {key['bits']} bits, scale {key['scale']}, seed {key['seed']}"
            progress.console.print(f"{run}: Recall@20 {found['recall@20']:.4f} ({found['seconds']:.0f} s)")
    console.print(tabulate(results, name))
    picture(results, args.out / "recall_against_bytes.png", name)
    console.print(f"Picture: {args.out / 'recall_against_bytes.png'}")


if __name__ == "__main__":
    main()
