"""What do few-bit features and attention cost? GCN, AGNN and GAT on Cora, CiteSeer and Amazon-Computers, by SGQuant.

    python examples/reproduce/sgquant.py --data PATH/TO/DATA
    python examples/reproduce/sgquant.py --data PATH/TO/DATA --sets cora --models gcn --seeds 0 1 --out runs/cora

For each seed a full-precision model is trained and kept in its best validation epoch. Each plan is then measured on it
as it is (PTQ), and after fine-tuning to the full-precision model's own predictions at all nodes, which keeps the best
epoch. Epochs and plans are judged by the accuracy to be expected at all nodes by the full-precision model's own
probabilities: no labels take part but the validation nodes', which say what those are worth. `search` is a plan that
automatic bit selection found with seed 0's model, fine-tuning each plan it measured for a few epochs: the smallest it
measured that is to be expected within `--tolerance` of full precision. `search within 1/16` (`--within 16`) is the best
in a sixteenth of full precision's bytes, `--released-within 25` in a 25th by the count of the paper's released code.
Test nodes are looked at once for a line of the table. `at the bytes of N bits` asks what uniform N bits could be: the
best plan within as many bytes, searched for each seed without fine-tuning, by prediction and at random.

A finished run is a line in `OUT/results.jsonl` and is not repeated: an interrupted call can simply be made again.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from classifiers import MODELS, SETS, Teacher, create, evaluate, fit, load, settings
from reporting import spread
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn
from torch_geometric.data import Data

from lightning_tinykg.bits import BitPlan
from lightning_tinykg.bits.front import NothingWithin
from lightning_tinykg.bits.search import AutoBitSelector
from lightning_tinykg.bits.space import SearchSpace
from lightning_tinykg.sgquant import SGQuantizer, componentwise, topologywise, uniform

BUCKETS = 4
WIDTHS = (1, 2, 3, 4, 6, 8)


def one_width(bits: int) -> Callable[[SGQuantizer], BitPlan]:
    """The same everywhere."""
    return lambda _: uniform(bits)


def layered(first: int, rest: int) -> Callable[[SGQuantizer], BitPlan]:
    """One width for the first layer, another for the rest: the paper's LWQ."""

    def plan(quantizer: SGQuantizer) -> BitPlan:
        return BitPlan({quantizer.places()[0].layer: first}, default=rest)

    return plan


def combined(quantizer: SGQuantizer) -> BitPlan:
    """More bits for later layers, for attention fewer, for low degrees more."""
    first = quantizer.places()[0].layer
    entries: dict[str | tuple[str, ...], int] = {
        ("*", "*", "degree-0"): 8,
        ("*", "*", "degree-3"): 3,
        (first, "embedding"): 1,
        ("*", "attention"): 2,
    }
    names = quantizer.places()
    return BitPlan({k: b for k, b in entries.items() if any_matches(k, names)}, default=4)


def any_matches(pattern: str | tuple[str, ...], names: list[Any]) -> bool:
    """Whether a plan may have this entry for this model."""
    try:
        BitPlan({pattern: 8}).check(names)
    except ValueError:
        return False
    return True


PLANS: dict[str, Callable[[SGQuantizer], BitPlan]] = {
    **{f"uniform {bits}": one_width(bits) for bits in (8, 4, 2, 1)},
    "LWQ 1, 8": layered(1, 8),
    "LWQ 2, 4": layered(2, 4),
    "CWQ 4, attention 1": lambda _: componentwise(embedding=4, message=4, attention=1, update=4),
    "TAQ 8, 4, 2, 1": lambda _: topologywise([8, 4, 2, 1]),
    "combined": combined,
}

WAYS = ("as it is", "fine-tuned")

SEARCHES = {"packed": "search", "released": "search, released count"}
"""What the smallest plan is the smallest by -> the name of its lines."""


class Runs:
    """The lines that are finished, and what is done next.

    Args:
        args: of the command line.
        progress: where it says what it does.
    """

    def __init__(self, args: argparse.Namespace, progress: Progress) -> None:
        self.args, self.progress = args, progress
        self.file = args.out / "results.jsonl"
        args.out.mkdir(parents=True, exist_ok=True)
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self.task = progress.add_task("", total=None)

    def once(self, key: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The line of a run, which is made if it isn't there."""
        for row in self.rows:
            if all(row[name] == value for name, value in key.items()):
                return row
        self.progress.update(self.task, description=", ".join(map(str, key.values())))
        start = time.perf_counter()
        row = key | run() | {"seconds": round(time.perf_counter() - start, 2)}
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        return row


class Setting:
    """One data set, one model, one seed: its full-precision model, and what becomes of it.

    Args:
        runs: where results are kept.
        name: of the data set.
        kind: of the model.
        seed: of the weights, and of Computers' split.
    """

    def __init__(self, runs: Runs, name: str, kind: str, seed: int) -> None:
        self.runs, self.args, self.name, self.kind, self.seed = runs, runs.args, name, kind, seed
        self.key = {"set": name, "model": kind, "seed": seed}
        self.data: Data = load(self.args.data, name, seed).to(self.args.device)
        self.options = settings(kind, name)
        self.path = self.args.out / f"{name}-{kind}-{seed}.pt"
        self.full = runs.once(self.key | {"plan": "float32", "way": "trained"}, self._train)
        self.teacher = Teacher(self.model(), self.data)

    def _train(self) -> dict[str, Any]:
        model = self._fresh()
        fitted = fit(model, self.data, **self.options)
        torch.save(model.state_dict(), self.path)
        test, _ = evaluate(model, self.data, self.data.test_mask)
        return {"val": fitted.val, "test": test, "epochs": fitted.epochs} | self._memory(self.quantizer(model), 32)

    def _fresh(self) -> nn.Module:
        return create(self.kind, self.data, self.seed, self.name).to(self.args.device)

    def model(self) -> nn.Module:
        """The trained model."""
        model = self._fresh()
        model.load_state_dict(torch.load(self.path, map_location=self.args.device, weights_only=True))
        return model

    def quantizer(self, model: nn.Module) -> SGQuantizer:
        """One that has seen the graph."""
        quantizer = SGQuantizer(model, 8, buckets=BUCKETS, range="mse", granularity="auto")
        quantizer.calibrate(lambda: model(self.data.x, self.data.edge_index))
        return quantizer

    @staticmethod
    def _memory(quantizer: SGQuantizer, plan: BitPlan | int) -> dict[str, Any]:
        memory = quantizer.memory(plan)
        return {
            "bits": memory.average_bits,
            "full_bytes": memory.full_bytes,
            "bytes": memory.packed_bytes,
            "released_bits": memory.released_bits,
        }

    def tune(self, model: nn.Module, epochs: int) -> float:
        """Fine-tune a quantized model whose weights are full precision's; the accuracy to be expected."""
        torch.manual_seed(self.seed)
        slower = {"lr": 0.3 * self.options["lr"], "weight_decay": 0.0, "epochs": epochs, "patience": epochs}
        return fit(model, self.data, teacher=self.teacher, **(self.options | slower)).val

    def measure(self, name: str, plan: BitPlan, way: str, **more: Any) -> None:
        """A line: the plan as it is, or fine-tuned."""

        def run() -> dict[str, Any]:
            model = self.model()
            quantizer = self.quantizer(model)
            quantizer.set_plan(plan)
            with quantizer:
                if way == "fine-tuned":
                    self.tune(model, self.args.epochs)
                expected, _ = self.teacher.judge(model, self.data)
                test, _ = evaluate(model, self.data, self.data.test_mask)
            row = {"expected": expected, "test": test, "entries": plan.to_dict()}
            return row | self._memory(quantizer, plan) | more

        self.runs.once(self.key | {"plan": name, "way": way}, run)

    def space(self, quantizer: SGQuantizer) -> SearchSpace:
        """All layers, components and buckets, each with its own width."""
        return SearchSpace({tuple(place): WIDTHS for place in quantizer.places()})

    def search(self, count: str, within: int = 0) -> BitPlan:
        """ABS, each plan fine-tuned for a few epochs: the smallest that is as accurate as full precision.

        Args:
            count: `packed`: smallest in bytes that are stored; `released`: by the count of the paper's released code.
            within: if given, the most accurate in that fraction of full precision's bytes instead: 16 for a sixteenth.
        """
        model = self.model()
        quantizer, weights = self.quantizer(model), self.model().state_dict()

        def accuracy(plan: BitPlan) -> float:
            model.load_state_dict(weights)
            quantizer.set_plan(plan)
            with quantizer:
                return self.tune(model, self.args.search_epochs)

        def bytes_of(plan: BitPlan) -> int:
            memory = quantizer.memory(plan)
            return memory.packed_bytes if count == "packed" else round(memory.released_bits / 8)

        sought = f"{count}-{within}" if within else count
        path = self.args.out / f"abs-{sought}-{self.name}-{self.kind}-{self.seed}"
        budget = bytes_of(uniform(32)) // within if within else None
        front = AutoBitSelector(
            self.space(quantizer),
            accuracy,
            bytes_of,
            measurements=self.args.measurements,
            rounds=self.args.rounds,
            per_round=self.args.per_round,
            tolerance=self.args.tolerance,
            budget=budget,
            reference=self.teacher.expected.full,
            seed=self.seed,
            path=path.with_suffix(".jsonl"),
            name=f"{self.kind} on {self.name}, seed {self.seed}, {sought}",
            progress=False,
        ).run()
        front.plot(path.with_suffix(".png"))
        if budget is not None:
            return front.best_within(budget).plan
        try:
            return front.smallest_within(self.args.tolerance).plan
        except NothingWithin as nothing:
            return nothing.nearest.plan

    def at_bytes_of(self, bits: int) -> None:
        """Is there anything better than uniform at its own bytes, and does prediction find it better than chance?"""
        model = self.model()
        quantizer = self.quantizer(model)
        budget = quantizer.memory(bits).packed_bytes

        def accuracy(plan: BitPlan) -> float:
            quantizer.set_plan(plan)
            with quantizer:
                return self.teacher.judge(model, self.data)[0]

        # random search measures as many plans, and predicts none
        for way, measurements, rounds in (("search", 40, 8), ("random", 80, 0)):

            def run(measurements: int = measurements, rounds: int = rounds) -> dict[str, Any]:
                front = AutoBitSelector(
                    self.space(quantizer),
                    accuracy,
                    lambda plan: quantizer.memory(plan).packed_bytes,
                    budget=budget,
                    seed=self.seed,
                    reference=self.teacher.expected.full,
                    progress=False,
                    measurements=measurements,
                    rounds=rounds,
                    per_round=5,
                ).run()
                found = front.best_within(budget)
                quantizer.set_plan(found.plan)
                with quantizer:
                    test, _ = evaluate(model, self.data, self.data.test_mask)
                row = {"expected": found.accuracy, "test": test, "entries": found.plan.to_dict()}
                return row | self._memory(quantizer, found.plan)

            self.runs.once(self.key | {"plan": f"at the bytes of {bits} bits", "way": way}, run)


def run_all(args: argparse.Namespace, runs: Runs) -> None:
    """Everything that was asked for."""
    for name in args.sets:
        for kind in args.models:
            found: dict[str, BitPlan] = {}
            searches = [(SEARCHES[count], count, 0) for count in args.counts]
            searches += [(f"search within 1/{within}", "packed", within) for within in args.within]
            searches += [
                (f"search, released count within 1/{within}", "released", within) for within in args.released_within
            ]
            for seed in args.seeds:
                setting = Setting(runs, name, kind, seed)
                quantizer = setting.quantizer(setting.model())
                if "fine-tuned" in args.ways:
                    setting.measure("float32", uniform(32), "fine-tuned")  # what fine-tuning alone is worth
                for plan_name in args.plans:
                    for way in args.ways:
                        setting.measure(plan_name, PLANS[plan_name](quantizer), way)
                for bits in args.equal_bytes:
                    setting.at_bytes_of(bits)
                for line, count, within in searches:
                    if line not in found:  # with the first seed's model; the plan then has to serve the others
                        found[line] = setting.search(count, within)
                    for way in args.ways:
                        setting.measure(line, found[line], way)


def show(args: argparse.Namespace, runs: Runs) -> list[Table]:
    """A table for each data set and model."""
    tables = []
    for name in args.sets:
        for kind in args.models:
            rows = [row for row in runs.rows if row["set"] == name and row["model"] == kind]
            if not rows:
                continue
            full = {row["seed"]: row for row in rows if row["way"] == "trained"}
            table = Table(
                "plan", "", "bits", "x fewer bytes", "released Mb", "x", "test accuracy, %", "to float32, points",
                title=f"{kind} on {name}: {next(iter(full.values()))['full_bytes'] / 2**20:.2f} MiB in float32",
            )  # fmt: skip
            for plan, way in dict.fromkeys((row["plan"], row["way"]) for row in rows):
                own = [row for row in rows if (row["plan"], row["way"]) == (plan, way)]
                table.add_row(
                    plan,
                    way,
                    f"{mean(row['bits'] for row in own):.2f}",
                    f"{mean(row['full_bytes'] / row['bytes'] for row in own):.1f}",
                    f"{mean(row['released_bits'] for row in own) / 1e6:.2f}",
                    f"{mean(full[row['seed']]['released_bits'] / row['released_bits'] for row in own):.1f}",
                    spread([100 * row["test"] for row in own]),
                    spread([100 * (row["test"] - full[row["seed"]]["test"]) for row in own]),
                )
            tables.append(table)
    return tables


def main() -> None:
    """Run, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds planetoid and amazon")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=60, help="of fine-tuning")
    parser.add_argument("--search-epochs", type=int, default=15, help="of fine-tuning, for each plan that is measured")
    parser.add_argument("--plans", nargs="*", default=list(PLANS), choices=list(PLANS), help="beside the search")
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS, help="in which plans are measured")
    parser.add_argument(
        "--counts", nargs="*", default=["packed"], choices=list(SEARCHES), help="what a search is to save"
    )
    parser.add_argument("--within", nargs="*", type=int, default=[], help="search within 1/N of full precision's bytes")
    parser.add_argument("--released-within", nargs="*", type=int, default=[], help="the same, by the released count")
    parser.add_argument("--measurements", type=int, default=40, help="of the search, before it predicts")
    parser.add_argument("--rounds", type=int, default=8, help="of predicted plans")
    parser.add_argument("--per-round", type=int, default=5, help="plans that are measured in a round")
    parser.add_argument("--tolerance", type=float, default=0.002, help="expected accuracy that may be lost")
    parser.add_argument("--equal-bytes", nargs="*", type=int, default=[2, 1], help="widths to beat at their own bytes")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="such as cuda")
    parser.add_argument("--out", type=Path, default=Path("runs/sgquant"))
    args = parser.parse_args()
    console = Console()
    with Progress(console=console, transient=True) as progress:
        runs = Runs(args, progress)
        run_all(args, runs)
    for table in show(args, runs):
        console.print(table)


if __name__ == "__main__":
    main()
