"""How fast: codecs against a copy, whole training steps against the rivals, growth, and the largest graph that fits.

    python examples/benchmarks/speed.py
    python examples/benchmarks/speed.py --hugepages --json speed.json --plot speed.png
    python examples/benchmarks/speed.py --only kernels steps --device cuda --repeats 20
    python examples/benchmarks/speed.py --only largest --memory 8GiB

Four parts, in one run. **kernels**: pack and unpack as multiples of copying the tensor into existing memory, beside the
8-bit quantizers of other libraries, where they are installed. **steps**: forward and backward of whole training steps
against the plain step; what is stored, retained after the forward, and the peak. **growth**: the cost of an edge as the
graph grows and as layers are added. **largest**: the largest graph whose step fits a given memory.

Times are interleaved: one repetition of everything, then the next, after a round that does not count. *x plain* is the
median of the ratios within each round. Memory is measured in another pass, on a CPU each step in a process of its own.
A graph grows in nodes as in edges; with ``--step kgcn``, which samples, it is the batch that grows. No optimizer runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import speed_kernels
import speed_tables
import torch
from rich.console import Console
from rich.progress import Progress
from speed_clock import against
from speed_plot import plot
from speed_processes import MEASURABLE, Server, available, largest_within
from speed_steps import WAYS, ways_for
from steps import STEPS

from lightning_tinykg.bits.budget import Budget
from lightning_tinykg.codecs.kernels import kernels_for

PARTS = ("kernels", "steps", "growth", "largest")
GROWTH_WAYS = ("plain", "8-bit", "2-bit")
LARGEST_WAYS = ("plain", "checkpoint", "8-bit", "2-bit")
HUGEPAGES = "glibc.malloc.hugetlb=1"

Done = Callable[[Any], Any]


class Benchmark:
    """The parts, with what they share.

    Args:
        args: of the command line.
        progress: where each part shows how far it is.
    """

    def __init__(self, args: argparse.Namespace, progress: Progress) -> None:
        self.args, self.progress = args, progress
        self.notes: list[str] = []
        self._timing = Server()
        # large tensors are given back when they are freed, so that the peak is what was in use
        self._memory = Server(MALLOC_MMAP_THRESHOLD_="65536")

    def close(self) -> None:
        """End the processes that measure."""
        self._timing.close()
        self._memory.close()

    def sizes(self, edges: int | None = None, layers: int | None = None) -> dict[str, int]:
        """Of the graph and the model: as given, or scaled."""
        args = self.args
        given = {"triples": args.triples, "dim": args.dim, "layers": layers or args.layers}
        if edges is None:
            return given | {"nodes": args.nodes, "edges": args.edges}
        if args.step == "kgcn":
            return given | {"nodes": args.nodes, "edges": 1, "triples": edges}
        return given | {"nodes": max(2, args.nodes * edges // args.edges), "edges": edges}

    def request(self, task: str, step: str, sizes: dict[str, int], **more: Any) -> dict[str, Any]:
        """What to ask of a process that measures."""
        common = {"device": self.args.device, "threads": self.args.threads}
        return {"task": task, "step": step, "sizes": sizes} | common | more

    def times(self, step: str, ways: list[str], sizes: dict[str, int], repeats: int, done: Done) -> dict[str, Any]:
        """By way: the raw seconds, their medians and ratios to the plain step's."""
        results = self._timing.ask(self.request("times", step, sizes, ways=ways, repeats=repeats), done)
        if "failed" in results:
            return {way: {"failed": results["failed"]} for way in ways}
        base = results.get("plain", {}).get("seconds")
        for way, result in results.items():
            for phase, seconds in result.get("seconds", {}).items():
                result[phase] = against(seconds, base[phase] if base else seconds)
                if not base:  # plain did not fit: there is nothing to be a multiple of
                    result[phase] |= {"ratio": None, "paired": None}
            if "failed" in result:
                self.notes.append(f"{step}, {way}: skipped, {result['failed']}")
        return results

    def kernels(self) -> list[dict[str, Any]]:
        """Codecs against a copy."""
        task = self.progress.add_task("kernels", total=None)
        result = speed_kernels.measure(
            self.args,
            lambda _: self.progress.advance(task),
            lambda total: self.progress.update(task, total=total),
        )
        self.notes += result["notes"]
        if self.args.device != "cpu":
            torch.cuda.empty_cache()  # the next parts run in other processes
        rows: list[dict[str, Any]] = result["rows"]
        return rows

    def steps(self) -> list[dict[str, Any]]:
        """Whole training steps, each in all ways: first their times, then their memory."""
        args, rows = self.args, []
        ways = {step: ways_for(step, args.ways) for step in args.steps}
        total = sum(len(names) * (args.repeats + 1 + measured(args)) for names in ways.values())
        task = self.progress.add_task("steps", total=total)
        for step in args.steps:
            self.progress.update(task, description=f"steps: time of {step}")
            times = self.times(step, ways[step], self.sizes(), args.repeats, lambda _: self.progress.advance(task))
            for way, result in times.items():
                row = {"step": step, "way": way} | result
                if measured(args) and "failed" not in result:
                    self.progress.update(task, description=f"steps: memory of {step}, {way}")
                    row |= self._memory.ask(self.request("memory", step, self.sizes(), way=way))
                    self.progress.advance(task)
                rows.append(row)
        return rows

    def growth(self) -> list[dict[str, Any]]:
        """The seconds per edge, by edges and by layers."""
        args, rows = self.args, []
        ways = [way for way in GROWTH_WAYS if way in args.ways]
        axis = "triples" if args.step == "kgcn" else "edges"
        points = [(axis, size, self.sizes(size)) for size in sorted(args.sizes)]
        if args.step != "kgcn":  # which has its two
            points += [("layers", layers, self.sizes(layers=layers)) for layers in sorted(args.layer_counts)]
        task = self.progress.add_task("growth", total=len(points))
        memory = 0.9 * available(torch.device(args.device))
        before: dict[str, tuple[int, float]] = {}  # by way: the size before and its peak
        for axis, size, sizes in points:
            self.progress.update(task, description=f"growth: {size:,} {axis}")
            count = sizes["edges"] if axis == "layers" else size
            fitting = []
            for way in ways:
                expected = before[way][1] * count * sizes["layers"] / before[way][0] if way in before else 0
                if expected < memory:
                    fitting.append(way)
                else:
                    why = f"it would take {expected / 2**30:.0f} of {memory / 2**30:.0f} GiB"
                    self.notes.append(f"{args.step}, {size:,} {axis}, {way}: skipped, {why}")
            results = self.times(args.step, fitting, sizes, min(args.repeats, 3), lambda _: None) if fitting else {}
            for way, result in results.items():
                if "failed" in result:
                    self.notes.append(f"{args.step}, {size:,} {axis}, {way}: skipped, {result['failed']}")
                    continue
                before[way] = (count * sizes["layers"], result["process_peak_bytes"])
                per_edge = result["total"]["median"] / count
                rows.append({"step": args.step, "axis": axis, "size": size, "way": way, "per_edge": per_edge} | result)
            self.progress.advance(task)
        return rows

    def largest(self) -> list[dict[str, Any]]:
        """The largest size whose step stays within the memory, by bisection."""
        args, rows = self.args, []
        ways = ways_for(args.step, [way for way in LARGEST_WAYS if way in args.ways])
        what = "triples" if args.step == "kgcn" else "edges"
        task = self.progress.add_task("largest", total=len(ways))
        for way in ways:

            def step(size: int, way: str = way) -> dict[str, Any]:
                self.progress.update(task, description=f"largest: {way}, {size:,}")
                request = self.request("memory", args.step, self.sizes(size), way=way, limit=args.memory)
                return self._memory.ask(request)

            row = largest_within(args.memory, step, start=min(args.edges, 20_000))
            if not row["largest"]:
                self.notes.append(f"{args.step}, {way}: not even {row['probes'][-1]['size']:,} {what} fit")
            rows.append({"step": args.step, "way": way, "of": what} | row)
            self.progress.advance(task)
        return rows


def measured(args: argparse.Namespace) -> bool:
    """Whether memory can be measured on the device."""
    return MEASURABLE or args.device != "cpu"


def environment(args: argparse.Namespace) -> dict[str, Any]:
    """What the times depend on, besides the code."""
    device = torch.device(args.device)
    names = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_")
    settings = [f"{key}={value}" for key, value in os.environ.items() if key.startswith(names)]
    libc = " ".join(platform.libc_ver()) or platform.system()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "threads": args.threads,
        "kernels": kernels_for(device).name,
        "allocator": f"PyTorch's on CUDA ({torch.cuda.get_allocator_backend()})"
        if device.type == "cuda"
        else f"{libc}, {', '.join(settings) or 'its defaults'}",
    }


def with_hugepages(parser: argparse.ArgumentParser) -> None:
    """Start this process anew with transparent huge pages for malloc: glibc reads the setting when it starts."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if HUGEPAGES in tunables:
        return
    libc, number = platform.libc_ver()
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if libc != "glibc" or tuple(map(int, number.split("."))) < (2, 35):
        parser.error(f"--hugepages needs glibc 2.35 or later, this is {libc or 'another C library'} {number}")
    if not setting.exists() or "[never]" in setting.read_text():
        parser.error(f"--hugepages needs transparent huge pages, which are switched off here ({setting})")
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, HUGEPAGES)))
    os.execv(sys.executable, [sys.executable, *sys.argv])


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="on the CPU")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count; at most 3 where the graph grows")
    parser.add_argument("--hugepages", action="store_true", help="transparent huge pages for malloc (glibc)")
    parser.add_argument("--rows", type=int, default=500_000, help="kernels: of the tensor")
    parser.add_argument("--width", type=int, default=64, help="kernels: of the tensor")
    parser.add_argument("--group-size", type=int, default=64, help="kernels: elements that share a scale")
    parser.add_argument("--steps", nargs="+", choices=list(STEPS), default=["kgat", "kgcn", "gat", "rgcn"])
    ways = list(WAYS)
    parser.add_argument("--ways", nargs="+", choices=ways, default=ways, metavar="WAY", help=", ".join(ways))
    parser.add_argument("--nodes", type=int, default=50_000)
    parser.add_argument("--edges", type=int, default=500_000)
    parser.add_argument("--triples", type=int, default=2048, help="of the batch")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--step", choices=list(STEPS), default="kgat", help="growth, largest: the step that grows")
    sizes = [100_000, 300_000, 1_000_000, 3_000_000, 10_000_000]
    parser.add_argument("--sizes", nargs="+", type=int, default=sizes, help="growth: edges (triples of kgcn)")
    parser.add_argument("--layer-counts", nargs="+", type=int, default=[1, 2, 3, 4, 6], help="growth")
    parser.add_argument("--memory", default="4GiB", help="largest: what the step may take, graph and weights included")
    parser.add_argument("--json", type=Path, help="where to write all results, raw seconds included")
    parser.add_argument("--plot", type=Path, help="where to draw them: a PNG")
    args = parser.parse_args()

    numbers = ("threads", "repeats", "rows", "width", "group_size", "nodes", "edges", "triples", "dim", "layers")
    for name in numbers:
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if min(*args.sizes, *args.layer_counts) < 1:
        parser.error("--sizes and --layer-counts must be at least 1")
    if args.rows * args.width % args.group_size:
        parser.error("--rows times --width must be a multiple of --group-size: the others' quantizers fill up no group")
    if args.dim % 4:
        parser.error(f"--dim must be a multiple of 4, which is how many heads GAT has, got {args.dim}")
    if args.device.partition(":")[0] not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu or cuda, got {args.device}")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch finds no GPU")
    if device.type == "cuda":
        args.device = f"cuda:{torch.cuda.current_device() if device.index is None else device.index}"
        device = torch.device(args.device)
    for path in (args.json, args.plot):
        if path is not None and not path.parent.is_dir():
            parser.error(f"{path}: there is no folder {path.parent}")
    try:
        args.memory = Budget.parse(args.memory).bytes_of(available(device) if measured(args) else 0)
    except ValueError as error:
        parser.error(f"--memory: {error}")
    if "largest" in args.only and measured(args) and args.memory > 0.9 * available(device):
        parser.error(f"--memory: {args.memory / 2**30:.1f} GiB, of {available(device) / 2**30:.1f} that are free")
    args.ways = ["plain", *(way for way in args.ways if way != "plain")]
    if args.hugepages:
        with_hugepages(parser)
    return args


def main() -> None:
    """Run the benchmark."""
    args = arguments()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # other libraries bring an OpenMP of their own
    torch.set_num_threads(args.threads)
    console = Console()
    console.width = max(console.width, 132)  # a narrow terminal or a file would cut the figures
    report: dict[str, Any] = {
        "arguments": vars(args) | {"json": None, "plot": None},
        "environment": environment(args),
    }
    with Progress(console=console, transient=True) as progress:
        benchmark = Benchmark(args, progress)
        try:
            for part in PARTS:
                if part not in args.only:
                    continue
                if part in ("growth", "largest") and not measured(args):
                    benchmark.notes.append(f"{part}: skipped, the memory of a process can't be read on this system")
                    continue
                report[part] = getattr(benchmark, part)()
                console.print(getattr(speed_tables, part)(report[part], args))
        finally:
            benchmark.close()
    report["notes"] = benchmark.notes
    console.print(", ".join(f"{key}: {value}" for key, value in report["environment"].items()), highlight=False)
    for note in benchmark.notes:
        console.print(note, highlight=False)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    if args.plot:
        plot(report).savefig(args.plot, dpi=130)


if __name__ == "__main__":
    main()
