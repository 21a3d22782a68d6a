"""Memory of a training step that torch.compile has compiled: as a whole or layer by layer, uncompressed and compressed.

    python examples/benchmarks/compiled.py
    python examples/benchmarks/compiled.py --layers 16 --rows 65536 --width 256 --bits 8 2 --json compiled.json

For each way: what one step's forward leaves allocated (retained), and the most that was allocated in the forward and in
the backward, beyond what was there before. It is counted by PyTorch's profiler from each allocation, inductor's
included, and is the same in each run. A compiled graph unpacks all that it saved at once, at the start of its backward.
"""

from __future__ import annotations

import argparse
import gc
import json
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lightning_tinykg import compress_activations

MIB = 2**20

_Result = TypeVar("_Result")


class Layer(nn.Module):
    """A residual layer: linear, norm, tanh."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.norm(self.linear(x)))


class Net(nn.Module):
    """A stack of such layers."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def eager(model: Net, backend: str) -> Callable[[Tensor], Tensor]:
    return model


def whole(model: Net, backend: str) -> Callable[[Tensor], Tensor]:
    compiled: Callable[[Tensor], Tensor] = torch.compile(model, backend=backend)
    return compiled


def by_layer(model: Net, backend: str) -> Callable[[Tensor], Tensor]:
    for layer in model.layers:
        layer.compile(backend=backend)
    return model


WAYS: dict[str, Callable[[Net, str], Callable[[Tensor], Tensor]]] = {
    "eager": eager,
    "compiled as a whole": whole,
    "compiled layer by layer": by_layer,
}


def memory(function: Callable[[], _Result]) -> tuple[_Result, int, int]:
    """A function's result, the bytes by which it leaves more allocated, and the most it had allocated."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        result = function()
    now = peak = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return result, now, peak


def measure(way: str, bits: int | None, args: argparse.Namespace) -> dict[str, Any]:
    """One row: the memory of a step's forward and backward, and the gradient's error."""
    torch._dynamo.reset()
    torch.manual_seed(args.seed)
    model, x = Net(args.layers, args.width), torch.randn(args.rows, args.width)

    def gradient(loss: Tensor) -> Tensor:
        model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    exact = gradient(model(x).square().mean())
    run = WAYS[way](model, args.backend)
    context = nullcontext() if bits is None else compress_activations(bits)

    def forward() -> Tensor:
        with context:
            return run(x).square().mean()

    got = gradient(forward())  # this step compiles
    loss, retained, forward_peak = memory(forward)
    _, _, backward_peak = memory(loss.backward)
    return {
        "way": way,
        "bits": bits,
        "retained_mib": retained / MIB,
        "forward_peak_mib": forward_peak / MIB,
        "backward_peak_mib": (retained + backward_peak) / MIB,
        "error": float((got - exact).norm() / exact.norm()),
    }


def table(results: list[dict[str, Any]], title: str) -> Table:
    """The rows, by way."""
    table = Table(title=title, title_justify="left")
    table.add_column("step")
    for column in ("bits", "retained MiB", "forward peak MiB", "backward peak MiB", "error"):
        table.add_column(column, justify="right")
    for number, row in enumerate(results):
        table.add_row(
            row["way"],
            str(row["bits"] or "-"),
            f"{row['retained_mib']:.1f}",
            f"{row['forward_peak_mib']:.1f}",
            f"{row['backward_peak_mib']:.1f}",
            f"{row['error']:.2%}" if row["bits"] else "",
            end_section=number + 1 == len(results) or results[number + 1]["way"] != row["way"],
        )
    return table


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--bits", nargs="+", type=int, choices=(32, 8, 4, 2, 1), default=[8, 2])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the rows")
    args = parser.parse_args()

    # it tells what is to be seen in the table
    warnings.filterwarnings("ignore", message=".*unpacks all that it saved at once")
    warnings.filterwarnings("ignore", message=".*when there are global hooks on modules")
    torch.set_num_threads(1)
    runs = [(way, bits) for way in args.ways for bits in (None, *args.bits)]
    results: list[dict[str, Any]] = []
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=len(runs))
        for way, bits in runs:
            progress.update(task, description=f"{way}, {f'{bits} bits' if bits else 'uncompressed'}")
            results.append(measure(way, bits, args))
            progress.advance(task)
    size = f"{args.layers} layers, {args.rows:,} rows, width {args.width}, {args.backend}"
    console = Console()
    console.width = max(console.width, 100)  # a narrow terminal or a file would cut the figures
    console.print(table(results, f"One training step: {size}"))
    if args.json:
        args.json.write_text(json.dumps({"arguments": vars(args) | {"json": None}, "results": results}, indent=1))


if __name__ == "__main__":
    main()
