"""How much smaller at what error: the gradient's error against the ratio, bits chosen under budgets and fixed widths.

    python examples/benchmarks/curve.py
    python examples/benchmarks/curve.py --steps kgcn --ratios 40 50 --json curve.json --plot curve.png

For each step and ratio: a budget of the raw bytes over the ratio, the ratio that was reached, the error of the gradient
(mean over draws of the noise) and the error that the choice of the bits predicted. Beside them, the same at fixed
widths by the rules. A ratio that no widths reach is left out, saying what would.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import torch
from budget import chosen, error
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from steps import STEPS, Graph, Step

from lightning_tinykg import compress_activations
from lightning_tinykg.bits.budget import BudgetTooSmall


def at_width(step: Step, exact: torch.Tensor, raw: int, bits: int, draws: int) -> dict[str, Any]:
    """A row for a fixed width."""
    measured, stored = error(step, exact, compress_activations(bits), draws)
    return {"asked": f"{bits} bits", "ratio": raw / stored, "error": measured}


def at_ratio(step: Step, exact: torch.Tensor, raw: int, ratio: float, draws: int) -> dict[str, Any]:
    """A row for a budget; with what would do, where that is too small."""
    try:
        context, _ = chosen(step, int(raw / ratio))
    except BudgetTooSmall as refused:
        return {"asked": f"{ratio:g}x", "refused": str(refused)}
    assert context.planner is not None
    measured, stored = error(step, exact, context, draws)
    predicted = context.planner.now.predicted
    return {"asked": f"{ratio:g}x", "ratio": raw / stored, "error": measured, "predicted": predicted}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Error against ratio, a panel for each step."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["step"] for row in rows))
    figure, panels = pyplot.subplots(1, len(names), figsize=(3.6 * len(names), 3.4), squeeze=False, sharey=True)
    for panel, name in zip(panels[0], names, strict=True):
        found = [row for row in rows if row["step"] == name and "ratio" in row]
        budgets = sorted((row for row in found if "predicted" in row), key=lambda row: row["ratio"])
        panel.plot([r["ratio"] for r in budgets], [r["error"] for r in budgets], "o-", label="budget")
        panel.plot([r["ratio"] for r in budgets], [r["predicted"] for r in budgets], "k:", label="predicted")
        widths = [row for row in found if "predicted" not in row]
        panel.plot([r["ratio"] for r in widths], [r["error"] for r in widths], "s", label="one width")
        for row in widths:
            panel.annotate(row["asked"], (row["ratio"], row["error"]), xytext=(4, 4), textcoords="offset points")
        panel.set(title=name, xlabel="raw / stored bytes", yscale="log")
    panels[0][0].set_ylabel("relative error of the gradient")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--ratios", nargs="+", type=float, default=[10, 15, 20, 30, 40, 50])
    parser.add_argument("--bits", nargs="+", type=int, choices=(8, 4, 2, 1), default=[8, 4, 2])
    parser.add_argument("--nodes", type=int, default=10_000)
    parser.add_argument("--edges", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--draws", type=int, default=6, help="draws of the rounding noise")
    parser.add_argument("--seed", type=int, default=0, help="of the graph and the weights")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--plot", type=Path, help="where to draw them: a PNG")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=len(args.steps) * (len(args.ratios) + len(args.bits)))
        for name in args.steps:
            torch.manual_seed(args.seed)
            step = STEPS[name](Graph.random(args.nodes, args.edges, seed=args.seed), args.dim, args.layers)
            exact, ledger = step.gradient(compress_activations(bits=32))
            for bits in args.bits:
                progress.update(task, description=f"{name}, {bits} bits")
                rows.append({"step": name, **at_width(step, exact, ledger.raw_bytes, bits, args.draws)})
                progress.advance(task)
            for ratio in args.ratios:
                progress.update(task, description=f"{name}, {ratio:g}x")
                rows.append({"step": name, **at_ratio(step, exact, ledger.raw_bytes, ratio, args.draws)})
                progress.advance(task)
    table = Table(title=f"{args.nodes:,} nodes, {args.edges:,} edges, mean over {args.draws} draws")
    for column in ("step", "asked for", "ratio", "error", "predicted"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for row in rows:
        cells = (f"{row['ratio']:.1f}x", f"{row['error']:.2%}") if "ratio" in row else ("-", "-")
        table.add_row(row["step"], row["asked"], *cells, f"{row['predicted']:.2%}" if "predicted" in row else "")
    console = Console()
    console.print(table)
    for row in rows:
        if "refused" in row:
            console.print(f"{row['step']}, {row['asked']}: {row['refused']}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
