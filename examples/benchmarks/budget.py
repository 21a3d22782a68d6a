"""Bits chosen under a budget against one width for all, in as many bytes: the gradient's error, and what was predicted.

    python examples/benchmarks/budget.py
    python examples/benchmarks/budget.py --steps kgat gat --bits 4 2 --seeds 0 1 2 --json budget.json
    python examples/benchmarks/budget.py --steps kgat gat --bits 8 2 --bytes-of uniform

For each step, width and seed (of the graph and the weights): the error of the gradient at that width, by the rules;
and, with as many bytes as that took for a budget, the error at the bits that are chosen, and the error that the choice
predicted. *Every float*: one width for all that is rounded, taken literally, without the rules' extra bits; with
`--bytes-of uniform` the budget is what that takes, and the gain is over it. *Bound*: the least that is predicted of any
choice in as many bytes, even if each element of a tensor had a width of its own, of those that there are.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from steps import STEPS, Graph, Step

from lightning_tinykg import BitPlan, compress_activations
from lightning_tinykg.activations.ledger import MIB
from lightning_tinykg.activations.planning import KindOfStep
from lightning_tinykg.bits import PlanEntry


def error(step: Step, exact: torch.Tensor, context: compress_activations, draws: int) -> tuple[float, int]:
    """The gradient's relative error, mean over draws of the noise, and the stored bytes."""
    errors = []
    for _ in range(draws):
        gradient, ledger = step.gradient(context)
        errors.append(float((gradient - exact).norm() / exact.norm()))
    return sum(errors) / draws, ledger.stored_bytes


def chosen(step: Step, budget: int) -> tuple[compress_activations, float]:
    """A context whose bits have been chosen, and the seconds that took."""
    context = compress_activations(budget=budget)
    start = time.perf_counter()
    for _ in range(4):  # the first measures; if the choice took more than was reckoned, the next ones choose for less
        torch.manual_seed(1)
        with context:
            loss = step.loss()
        context.plan_for(loss, step.model.parameters())
    return context, time.perf_counter() - start


def bound(kind: KindOfStep) -> float:
    """The least error of any choice in as many bytes, were each element to have its own width: Lagrange's bound."""
    prices = np.geomspace(1e-12, 1e6, 4000) * kind.norm**2 / kind.raw  # of a byte; any gives a bound, the best the most
    least = -prices * (kind.target - kind.fixed)
    for tensor in kind.sensitive:
        nbytes, variance = np.array([(option.nbytes, option.variance) for option in tensor.options]).T
        least += (variance[:, None] + nbytes[:, None] * prices).min(axis=0)
    return math.sqrt(max(least.max(), 0.0)) / kind.norm


def measure(step: Step, bits: int, draws: int, bytes_of: str) -> dict[str, Any]:
    """One row; the budget is what ``bytes_of`` takes: the ``"rules"``, or one ``"uniform"`` width for every float."""
    exact, _ = step.gradient()
    uniform, stored = error(step, exact, compress_activations(bits), draws)
    literal, literal_stored = error(
        step, exact, compress_activations(BitPlan([PlanEntry(bits, component="*.*")], default=bits)), draws
    )
    context, seconds = chosen(step, stored if bytes_of == "rules" else literal_stored)
    assert context.planner is not None
    budget, budget_stored = error(step, exact, context, draws)
    return {
        "bits": bits,
        "stored_mib": stored / MIB,
        "uniform": uniform,
        "literal_mib": literal_stored / MIB,
        "literal": literal,
        "budget_mib": budget_stored / MIB,
        "budget": budget,
        "gain": (uniform if bytes_of == "rules" else literal) / max(budget, 1e-12),
        "predicted": context.planner.now.predicted,
        "bound": bound(context.planner.now),
        "seconds": seconds,
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--bits", nargs="+", type=int, choices=(8, 4, 2, 1), default=[8, 4, 2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--nodes", type=int, default=2_000)
    parser.add_argument("--edges", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--draws", type=int, default=5, help="draws of the rounding noise")
    parser.add_argument("--bytes-of", choices=("rules", "uniform"), default="rules", help="how much the budget is")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=len(args.steps) * len(args.seeds) * len(args.bits))
        for name in args.steps:
            for seed in args.seeds:
                torch.manual_seed(seed)
                step = STEPS[name](Graph.random(args.nodes, args.edges, seed=seed), args.dim, args.layers)
                for bits in args.bits:
                    progress.update(task, description=f"{name}, {bits} bits, seed {seed}")
                    rows.append({"step": name, "seed": seed, **measure(step, bits, args.draws, args.bytes_of)})
                    progress.advance(task)
    table = Table(
        title=f"{args.nodes:,} nodes, {args.edges:,} edges, mean over seeds {args.seeds}", title_justify="left"
    )
    columns = (
        "step",
        "bits",
        "MiB",
        "by the rules",
        "every float",
        "(MiB)",
        "budget",
        "(MiB)",
        "predicted",
        "bound",
        "gain",
        "off",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for name in args.steps:
        for bits in args.bits:
            group = [row for row in rows if (row["step"], row["bits"]) == (name, bits)]

            def mean(key: str, group: list[dict[str, Any]] = group) -> float:
                return sum(float(row[key]) for row in group) / len(group)

            table.add_row(
                name,
                str(bits),
                f"{mean('stored_mib'):.2f}",
                f"{mean('uniform'):.2%}",
                f"{mean('literal'):.2%}",
                f"{mean('literal_mib'):.2f}",
                f"{mean('budget'):.2%}",
                f"{mean('budget_mib'):.2f}",
                f"{mean('predicted'):.2%}",
                f"{mean('bound'):.2%}",
                f"{min(row['gain'] for row in group):.2f}x",
                f"{max(abs(row['predicted'] / max(row['budget'], 1e-12) - 1) for row in group):.0%}",
                end_section=bits == args.bits[-1],
            )
    console = Console()
    console.width = max(console.width, 110)
    console.print(table)
    console.print("gain: the least over the seeds; off: the prediction's largest distance from what was measured")
    if args.json:
        args.json.write_text(json.dumps({"arguments": vars(args) | {"json": None}, "results": rows}, indent=1))


if __name__ == "__main__":
    main()
