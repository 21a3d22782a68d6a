"""How much smaller, and at what error: stored bytes and the gradient of one step, rules against the paper's recipe.

    python examples/benchmarks/memory.py
    python examples/benchmarks/memory.py --steps kgat gat --nodes 50000 --edges 500000 --json memory.json
    python examples/benchmarks/memory.py --steps kgat gat rgcn --autocast

For each step and width: the ratio of raw to stored bytes (both by the ledger), and over ``--draws`` draws of the
rounding noise the gradient's relative error, mean of ``|g_k - g| / |g|``, and its bias, ``|mean of g_k - g| / |g|``.
What noise alone leaves of the bias at so many draws stands beside it: only what is clearly above is bias.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from steps import STEPS, Graph, Step
from torch import Tensor

from lightning_tinykg import compress_activations


@contextmanager
def forward(device: str, autocast: bool, context: compress_activations | None = None) -> Iterator[Any]:
    """What the forward runs in: bf16 autocast or not, and compression or not."""
    with torch.autocast(device, torch.bfloat16, enabled=autocast), context or nullcontext() as given:
        yield given


def measure(
    step: Step, exact: Tensor, bits: int, recipe: str, draws: int, device: str, autocast: bool
) -> dict[str, Any]:
    """One row: the ratio, and the error over so many draws of noise."""
    compression = compress_activations(bits, recipe=recipe)
    if bits == 32:
        draws = 1
    mean, errors = torch.zeros_like(exact), []
    for _ in range(draws):
        gradient, ledger = step.gradient(forward(device, autocast, compression))
        mean += gradient / draws
        errors.append(float((gradient - exact).norm() / exact.norm()))
    error = sum(errors) / draws
    return {
        "bits": bits,
        "recipe": recipe if bits < 32 else "exact",
        "raw_mib": ledger.raw_bytes / 2**20,
        "stored_mib": ledger.stored_bytes / 2**20,
        "ratio": ledger.ratio,
        "error": error,
        "bias": float((mean - exact).norm() / exact.norm()),
        "bias_from_noise": error / draws**0.5,
        "equal": bool(torch.equal(gradient, exact)),
    }


def table(results: list[dict[str, Any]], title: str) -> Table:
    """The rows, the paper's recipe beside the rules."""
    table = Table(title=title, title_justify="left")
    for column in ("step", "bits", "kept by", "raw MiB", "stored MiB", "ratio", "error", "bias", "(noise)"):
        table.add_column(column, justify="left" if column in ("step", "kept by") else "right")
    for row in results:
        exact = "bit-equal" if row["equal"] else f"{row['error']:.2%}"
        table.add_row(
            row["step"],
            str(row["bits"]),
            row["recipe"],
            f"{row['raw_mib']:.1f}",
            f"{row['stored_mib']:.2f}",
            f"{row['ratio']:.1f}x",
            exact,
            "" if row["equal"] else f"{row['bias']:.2%}",
            "" if row["equal"] else f"{row['bias_from_noise']:.2%}",
            end_section=row is results[-1] or results[results.index(row) + 1]["step"] != row["step"],
        )
    return table


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--bits", nargs="+", type=int, choices=(32, 8, 4, 2, 1), default=[32, 8, 4, 2, 1])
    parser.add_argument("--nodes", type=int, default=10_000)
    parser.add_argument("--edges", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--draws", type=int, default=8, help="draws of the rounding noise")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--autocast", action="store_true", help="in mixed precision, bf16")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    args = parser.parse_args()

    # with more threads the plain step itself does not repeat to the last bit: index_add adds in any order
    torch.set_num_threads(1)
    device = torch.device(args.device)
    graph = Graph.random(args.nodes, args.edges, seed=args.seed).to(device)
    runs = [(bits, recipe) for bits in args.bits for recipe in (("rules", "paper") if bits < 32 else ("rules",))]
    results: list[dict[str, Any]] = []
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=len(args.steps) * len(runs))
        for name in args.steps:
            torch.manual_seed(args.seed)
            step = STEPS[name](graph, args.dim, args.layers)
            step.model.to(device)
            exact, _ = step.gradient(forward(device.type, args.autocast))
            for bits, recipe in runs:
                progress.update(task, description=f"{name}, {bits} bits, {recipe}")
                results.append(
                    {"step": name, **measure(step, exact, bits, recipe, args.draws, device.type, args.autocast)}
                )
                progress.advance(task)
    size = f"{args.nodes:,} nodes, {args.edges:,} edges, dim {args.dim}, {args.layers} layers, {args.draws} draws"
    size += ", bf16 autocast" if args.autocast else ""
    console = Console()
    console.width = max(console.width, 100)  # a narrow terminal or a file would cut the figures
    console.print(table(results, f"One training step: {size}"))
    if args.json:
        args.json.write_text(json.dumps({"arguments": vars(args) | {"json": None}, "results": results}, indent=1))


if __name__ == "__main__":
    main()
