"""What do few-bit embeddings, messages and attention cost a recommender? LightGCN and KGAT by SGQuant, by Recall@20.

    python examples/reproduce/sgquant_recommenders.py --data PATH/TO/music --seeds 0 1 2
    python examples/reproduce/sgquant_recommenders.py --data PATH/TO/ml-1m --models lightgcn --ways post-training

For each seed a full-precision model is trained until its validation Recall@20 has not risen for a while. Each plan is
measured on it as it is (`post-training`) and `fine-tuned`, where the epoch that is best on the validation set is kept,
the state before fine-tuning taking part in that choice. "float32, fine-tuned" is the same model trained just as long
without quantization: what fine-tuning alone is worth. `ABS` is a plan that automatic bit selection found with that
seed's model, of a width for each component and degree, the same in all layers: the smallest it measured, post-training,
whose validation Recall@20 is within `--tolerance` of full precision's, or the nearest to it if none is. Each line of
the table is tested once.

The hyper-parameters are those of `examples/configs` (`MODEL-SET.yaml`, else `MODEL-music.yaml`); the split is the same
for all runs, the seed decides initialisation. Both models propagate by a sparse matrix, but edge by edge while their
layers are quantized; fine-tuning on a graph as dense as ml-1m's takes correspondingly longer, hence `--ways` above. A
finished run is a line in `OUT/results.jsonl` and is not repeated, so an interrupted call can simply be made again.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from reporting import WATCHED, Report, quiet_trainer, silence, spread
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from tinykg_runs import Case

from lightning_tinykg import KGAT, AutoBitSelector, BitPlan, KGRecDataModule, LightGCN, SearchSpace
from lightning_tinykg.bits.front import NothingWithin
from lightning_tinykg.sgquant import SGQuantCallback, SGQuantizer, topologywise, uniform

MODELS = {"lightgcn": LightGCN, "kgat": KGAT}
WAYS = ("post-training", "fine-tuned")
WIDTHS = (1, 2, 3, 4, 6, 8)
BUCKETS = 4
BY_DEGREE = ([8, 4, 2, 1], [1, 2, 4, 8])
"""Of low degrees first: as in the paper, and the other way round."""


def plans(args: argparse.Namespace) -> dict[str, BitPlan]:
    """The plans that are not searched for, by the names of their lines."""
    even = {f"uniform {bits}": uniform(bits) for bits in args.bits}
    return even | {f"by degree {', '.join(map(str, bits))}": topologywise(bits) for bits in BY_DEGREE}


def settings(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a result depends on, besides model, plan, way and seed."""
    config = yaml.safe_load(Case(kind, Path(args.data).name).config.read_text())
    data = {name: value for name, value in config["data"]["init_args"].items() if name != "root"}
    if args.batch_size is not None:
        data["batch_size"] = args.batch_size
    shown = ("models", "seeds", "bits", "ways", "batch_size", "out", "accelerator")
    said = {name: value for name, value in vars(args).items() if name not in shown}
    return {"model": config["model"]["init_args"], "loader": data} | said | {"data": Path(args.data).name}


class Setting:
    """One model and one seed: its full-precision weights, and what becomes of them.

    Args:
        kind: of the model.
        seed: of its weights.
        args: of the command line.
        progress: where it says what it does.
    """

    def __init__(self, kind: str, seed: int, args: argparse.Namespace, progress: Progress) -> None:
        self.kind, self.seed, self.args, self.progress = kind, seed, args, progress
        self.settings = settings(kind, args)
        self.data = KGRecDataModule(args.data, **self.settings["loader"], eval_batch_size=2048)
        self.options: dict[str, Any] = {"range": args.range, "granularity": args.granularity, "buckets": BUCKETS}
        path = args.out / f"{kind}-seed{seed}.ckpt"
        if not path.exists():
            L.seed_everything(seed, verbose=False)
            draft = path.with_name(f"training-{path.name}")
            self._fit(MODELS[kind](**self.settings["model"]), args.epochs, args.patience, draft)
            draft.rename(path)  # a file that exists is whole
        self.full = MODELS[kind].load_from_checkpoint(path, map_location="cpu")
        self.full.lr = args.tuning_lr
        self.data.prepare_data()
        self.data.setup("fit")
        self.full.set_graph(self.data.graph)

    def _fit(
        self, model: L.LightningModule, epochs: int, patience: int, path: Path, *callbacks: Callback
    ) -> dict[str, Any]:
        """Train until validation no longer improves; the best epoch's weights are left in a file."""
        report = Report(self.progress, path.stem)
        path.unlink(missing_ok=True)
        best = ModelCheckpoint(path.parent, path.stem, **WATCHED, save_weights_only=True)
        stop = EarlyStopping(patience=patience, **WATCHED)
        run = quiet_trainer(self.args.accelerator, max_epochs=epochs, callbacks=[*callbacks, report, best, stop])
        run.fit(model, self.data)
        self.progress.remove_task(report.task)
        return {"curve": report.curve, "epochs": run.current_epoch, "val": max(report.curve)}

    def _validated(self, model: L.LightningModule, *callbacks: Callback) -> float:
        run = quiet_trainer(self.args.accelerator, enable_checkpointing=False, callbacks=list(callbacks))
        return float(run.validate(model, self.data, verbose=False)[0]["val/recall@20"])

    def measure(self, plan: BitPlan | None, way: str) -> dict[str, Any]:
        """A line: a plan, or full precision, as it is or fine-tuned.

        Args:
            plan: None: full precision.
            way: one of `WAYS`.
        """
        model = copy.deepcopy(self.full)
        callback = SGQuantCallback(
            32 if plan is None else plan,
            finetune_epochs=self.args.tuning_epochs * (way == "fine-tuned"),
            **self.options,
        )
        callbacks = [] if plan is None else [callback]
        found: dict[str, Any] = {"val": self._validated(model, *callbacks), "epochs": 0}
        if way == "fine-tuned":
            L.seed_everything(self.seed, verbose=False)
            path = self.args.out / f"tuning-{self.kind}-seed{self.seed}.ckpt"
            tuned = self._fit(model, self.args.tuning_epochs, self.args.tuning_patience, path, *callbacks)
            better = tuned["val"] > found["val"]
            weights = torch.load(path, weights_only=True)["state_dict"] if better else self.full.state_dict()
            model.load_state_dict(weights)
            path.unlink()
            found = tuned if better else found | {"curve": tuned["curve"]}
        run = quiet_trainer(self.args.accelerator, enable_checkpointing=False, callbacks=callbacks)
        tested = run.test(model, self.data, verbose=False)[0]
        found |= {"recall@20": tested["test/recall@20"], "ndcg@20": tested["test/ndcg@20"]}
        return found | self._memory(self.quantizer(), 32 if plan is None else plan)

    def quantizer(self) -> SGQuantizer:
        """One that has seen the full-precision model's graph."""
        quantizer = SGQuantizer(self.full, **self.options)
        quantizer.calibrate(self.full.embed)
        return quantizer

    @staticmethod
    def _memory(quantizer: SGQuantizer, plan: BitPlan | int) -> dict[str, Any]:
        quantizer.set_plan(plan)  # ranges by the plan, and so metadata
        memory = quantizer.memory()
        return {"bits": memory.average_bits, "full_bytes": memory.full_bytes, "bytes": memory.packed_bytes}

    def search(self, reference: float) -> BitPlan:
        """ABS: each plan is one validation, nothing is trained. Layers share their widths, which leaves fewer plans.

        If no plan is within the tolerance, it is the one whose validation Recall@20 is nearest to it.

        Args:
            reference: validation Recall@20 of full precision.
        """
        quantizer = self.quantizer()

        def recall(plan: BitPlan) -> float:
            quantizer.set_plan(plan)
            with quantizer:
                return self._validated(self.full)

        name = f"abs-{self.kind}-seed{self.seed}"
        front = AutoBitSelector(
            SearchSpace({("*", place.component, place.topology): WIDTHS for place in quantizer.places()}),
            recall,
            lambda plan: quantizer.memory(plan).packed_bytes,
            measurements=self.args.measurements,
            rounds=self.args.rounds,
            per_round=self.args.per_round,
            tolerance=self.args.tolerance,
            reference=reference,
            path=self.args.out / f"{name}.jsonl",
            name=f"{self.kind} on {Path(self.args.data).name}, seed {self.seed}",
            progress=False,
        ).run()
        front.plot(self.args.out / f"{name}.png")
        try:
            return front.smallest_within().plan
        except NothingWithin as nothing:
            return nothing.nearest.plan


class Lines:
    """The lines that are finished, and what is done next.

    Args:
        args: of the command line.
        progress: where it says what it does.
    """

    def __init__(self, args: argparse.Namespace, progress: Progress) -> None:
        self.path, self.progress = args.out / "results.jsonl", progress
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
        if any(row["settings"] != settings(row["model"], args) for row in self.rows):
            raise SystemExit(f"{self.path} was made with other settings: remove it, or choose another --out")
        self.shown: list[dict[str, Any]] = []

    def once(self, key: dict[str, Any], said: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The line of a run, which is made if it isn't there."""
        found = next((row for row in self.rows if all(row[name] == value for name, value in key.items())), None)
        if found is None:
            start = time.perf_counter()
            found = key | run() | {"seconds": round(time.perf_counter() - start, 1), "settings": said}
            with self.path.open("a") as file:
                file.write(json.dumps(found) + "\n")
            self.rows.append(found)
        self.shown.append(found)
        name = f"{key['model']}, seed {key['seed']}, {key['plan']}, {key['way']}"
        self.progress.console.print(f"{name}: Recall@20 {found['recall@20']:.4f} ({found['seconds']:.0f} s)")
        return found


def run_all(args: argparse.Namespace, lines: Lines, progress: Progress) -> None:
    """Everything that was asked for."""
    for kind in args.models:
        for seed in args.seeds:
            setting = Setting(kind, seed, args, progress)

            def once(
                plan_name: str,
                way: str,
                plan: BitPlan | None,
                key: tuple[str, int] = (kind, seed),
                setting: Setting = setting,
            ) -> dict[str, Any]:
                named = {"model": key[0], "seed": key[1], "plan": plan_name, "way": way}
                entries = {"entries": None if plan is None else plan.to_dict()}
                return lines.once(named, setting.settings, lambda: setting.measure(plan, way) | entries)

            full = once("float32", "post-training", None)
            if "fine-tuned" in args.ways:
                once("float32", "fine-tuned", None)
            for name, plan in plans(args).items():
                for way in args.ways:
                    once(name, way, plan)
            if args.measurements:
                found = setting.search(full["val"])
                for way in args.ways:
                    once("ABS", way, found)


def tabulate(kind: str, rows: list[dict[str, Any]], title: str) -> Table:
    """Mean and spread over the seeds, and the share of full precision."""
    full = {row["seed"]: row for row in rows if row["plan"] == "float32" and row["way"] == "post-training"}
    table = Table(title=f"{kind} on {title}: full ranking, known items masked; mean ± standard deviation over seeds")
    for column in ("plan", "", "bits", "MiB", "smaller", "Recall@20", "of float32", "NDCG@20"):
        table.add_column(column, justify="left" if column in ("plan", "") else "right")
    for plan, way in dict.fromkeys((row["plan"], row["way"]) for row in rows):
        own = [row for row in rows if (row["plan"], row["way"]) == (plan, way)]
        table.add_row(
            plan,
            "as trained" if (plan, way) == ("float32", "post-training") else way,
            f"{mean(row['bits'] for row in own):.2f}",
            f"{mean(row['bytes'] for row in own) / 2**20:.3f}",
            f"{mean(row['full_bytes'] / row['bytes'] for row in own):.1f}x",
            spread([row["recall@20"] for row in own]),
            f"{mean(row['recall@20'] / full[row['seed']]['recall@20'] for row in own):.1%}",
            spread([row["ndcg@20"] for row in own]),
        )
    return table


def main() -> None:
    """Run, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the data set")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4, 2, 1], help="of the uniform plans")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--range", default="mse", choices=("minmax", "percentile", "ema", "mse"))
    parser.add_argument("--granularity", default="tensor", choices=("tensor", "bucket", "channel", "node", "auto"))
    parser.add_argument("--batch-size", type=int, help="of interactions, instead of the configuration's")
    parser.add_argument("--epochs", type=int, default=200, help="of full precision, at most")
    parser.add_argument("--patience", type=int, default=10, help="epochs without a better validation Recall@20")
    parser.add_argument("--tuning-epochs", type=int, default=20, help="at most")
    parser.add_argument("--tuning-patience", type=int, default=5, help="as --patience")
    parser.add_argument("--tuning-lr", type=float, default=1e-3)
    parser.add_argument("--measurements", type=int, default=40, help="of the search, before it predicts; 0: no search")
    parser.add_argument("--rounds", type=int, default=8, help="of predicted plans")
    parser.add_argument("--per-round", type=int, default=20, help="plans that are measured in a round")
    parser.add_argument("--tolerance", default="0.5%", help="validation Recall@20 that may be lost")
    parser.add_argument("--out", type=Path, default=Path("runs/sgquant_recommenders"))
    parser.add_argument("--accelerator", default="cpu")
    args = parser.parse_args()

    silence()
    args.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    console.width = max(console.width, 130)
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress:
        lines = Lines(args, progress)
        run_all(args, lines, progress)
    for kind in args.models:
        rows = [row for row in lines.shown if row["model"] == kind]
        console.print(tabulate(kind, rows, Path(args.data).name))


if __name__ == "__main__":
    main()
