"""How fast items are found among many, in how many bytes, and how right: packed codes against faiss's usual indexes.

    python examples/benchmarks/retrieval.py
    python examples/benchmarks/retrieval.py --items 1000000 --threads 1 --json retrieval.json --plot retrieval.png
    python examples/benchmarks/retrieval.py --items 10000000 --rivals "Flat fp32" SQ8 --bits 4 1

One query at a time, `BURST` in a row to each engine in turn, forwards and backwards, after a round that does not count.
*p50* and *p99* are of the queries of a burst but its first, as of a service that answers one after another; *cold* is
the median of the first, when the other engines have had the processor's cache. *x flat* is the median over rounds of
the ratio of such medians to that of faiss's Flat fp32, *x cold* the same of the first ones. *right* is the share of the
best ``k`` that are among the best by exact scores: of the same codes (what the search loses), and of the full-precision
vectors (what the codes lose as well: these vectors are random, and no model was trained for its codes).

Each number of items and threads has a process of its own. What is not installed, or does not fit into memory, is
skipped and named.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from retrieval_engines import RIVALS, Data, Engine, Floats, Ints, engines
from rich.console import Console
from rich.table import Table

BASE = "Flat fp32"
BURST = 10


def best(items: Floats, queries: Floats, k: int) -> Ints:
    """The best by full-precision scores, ``[q, k]``."""
    found = []
    for start in range(0, len(queries), 16):
        scores = queries[start : start + 16] @ items.T
        top = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        found.append(top)
    return np.concatenate(found)


def shared(found: Ints, wanted: Ints) -> float:
    """The share of what is wanted that was found, mean over queries."""
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, wanted, strict=True)]))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All engines at one number of items, in this process."""
    items, threads = args.items[0], args.threads[0]
    data = Data.random(items, args.queries, args.dim, args.seed)
    notes: list[str] = []
    names = [name for name in args.rivals if name != "HNSW" or items <= args.hnsw_items]
    if len(names) < len(args.rivals):
        notes.append(f"{items:,} items, HNSW: skipped, it takes long to build; see --hnsw-items")
    keep: list[Any] = []
    found: list[Engine] = list(engines(data, args.bits, args.scales, names, notes, keep))
    with suppress(ImportError):
        import faiss

        faiss.omp_set_num_threads(threads)
    rounds = len(data.queries) // BURST
    seconds = {engine.name: np.zeros((rounds, BURST)) for engine in found}
    answers: dict[str, list[Ints]] = {engine.name: [] for engine in found}
    for number in range(-1, rounds):  # the first does not count
        for engine in found[:: -1 if number % 2 else 1]:
            for place in range(BURST):
                query = data.queries[max(number, 0) * BURST + place][None]
                began = time.perf_counter()
                answer = engine.search(query, args.k)
                took = time.perf_counter() - began
                if number >= 0:
                    seconds[engine.name][number, place] = took
                    answers[engine.name].append(answer[0])
    exact = best(data.items, data.queries, args.k)
    own = {id(e.codes): e.codes.search(data.queries, args.k)[0] for e in found if e.codes is not None}
    rows = []
    for engine in found:
        answer, times = np.stack(answers[engine.name]), seconds[engine.name] * 1e3
        base = seconds[BASE] * 1e3 if BASE in seconds else np.full_like(times, np.nan)
        rows.append(
            {
                "items": items,
                "threads": threads,
                "engine": engine.name,
                "bytes": engine.row_bytes,
                "p50_ms": float(np.median(times[:, 1:])),
                "p99_ms": float(np.quantile(times[:, 1:], 0.99)),
                "cold_ms": float(np.median(times[:, 0])),
                "x_flat": _finite(np.median(np.median(base[:, 1:], axis=1) / np.median(times[:, 1:], axis=1))),
                "x_cold": _finite(np.median(base[:, 0] / times[:, 0])),
                "right_of_codes": shared(answer, own[id(engine.codes)]) if engine.codes is not None else None,
                "right_of_fp32": shared(answer, exact),
                "ms": times.round(4).tolist(),
            }
        )
    return {"rows": rows, "notes": notes}


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def needed(items: int, args: argparse.Namespace) -> float:
    """About the bytes that all engines take together."""
    per_dim = 4 + sum(
        {"Flat fp32": 4, "SQ8": 1, "SQ4": 0.5, "PQ trained": 1, "HNSW": 8}.get(r, 0.2) for r in args.rivals
    )
    per_dim += len(args.scales) * sum(2 * bits / 8 for bits in args.bits) + 6  # and codes while they are packed
    return float(items * args.dim * per_dim)


def free_memory() -> float:
    """Bytes that can be had; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return float(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))) * 1024
    except (OSError, StopIteration):
        return float("inf")


def in_a_process(items: int, threads: int, args: argparse.Namespace) -> dict[str, Any]:
    """As :func:`measure`, in a process with so many threads."""
    if needed(items, args) > 0.9 * free_memory():
        short = f"it would take {needed(items, args) / 2**30:.0f} of {free_memory() / 2**30:.0f} GiB"
        return {"rows": [], "notes": [f"{items:,} items: skipped, {short}; leave out --rivals or --scales"]}
    command = [sys.executable, __file__, "--worker", "--items", str(items), "--threads", str(threads)]
    for name in ("dim", "k", "queries", "seed", "hnsw_items"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    for name in ("bits", "scales", "rivals"):
        command += [f"--{name}", *map(str, getattr(args, name))]
    threading = {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    done = subprocess.run(command, env=os.environ | threading, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"rows": [], "notes": [f"{items:,} items, {threads} threads: failed with status {done.returncode}"]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def table_of(rows: list[dict[str, Any]], args: argparse.Namespace) -> Table:
    """One number of items and threads."""
    first = rows[0]
    sizes = f"{first['items']:,} items of dimension {args.dim}, top {args.k}"
    title = f"{sizes}, one query at a time, {first['threads']} thread(s)"
    table = Table(title=title, title_justify="left")
    for column in (
        "engine",
        "bytes/item",
        "p50 ms",
        "p99 ms",
        "cold ms",
        "x flat",
        "x cold",
        "right: of its codes",
        "of fp32",
    ):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for row in rows:
        table.add_row(
            row["engine"],
            f"{row['bytes']:.0f}",
            f"{row['p50_ms']:.3f}",
            f"{row['p99_ms']:.3f}",
            f"{row['cold_ms']:.3f}",
            *("" if row[key] is None else f"{row[key]:.1f}" for key in ("x_flat", "x_cold")),
            "" if row["right_of_codes"] is None else f"{row['right_of_codes']:.4f}",
            f"{row['right_of_fp32']:.3f}",
        )
    return table


def plot(rows: list[dict[str, Any]]) -> Figure:
    """Latency against bytes, a panel for each number of items, on one thread (or the fewest)."""
    rows = [row for row in rows if row["threads"] == min(other["threads"] for other in rows)]
    sizes = sorted({row["items"] for row in rows})
    figure = Figure(figsize=(5.5 * len(sizes), 4.8), layout="constrained")
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        for row in (row for row in rows if row["items"] == size):
            is_own = row["right_of_codes"] is not None
            axes.plot(row["bytes"], row["p50_ms"], "o" if is_own else "s", color="C0" if is_own else "C7")
            axes.annotate(f" {row['engine']}", (row["bytes"], row["p50_ms"]), fontsize=6)
        axes.set(xscale="log", yscale="log", xlabel="bytes per item", ylabel="ms per query, median (p50)")
        axes.set_title(f"{size:,} items")
    return figure


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", nargs="+", type=int, default=[50_000, 1_000_000, 10_000_000])
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--k", type=int, default=50)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--bits", nargs="+", type=int, choices=(1, 2, 4, 8), default=[8, 4, 2, 1])
    parser.add_argument("--scales", nargs="+", choices=("table", "node"), default=["table", "node"])
    parser.add_argument(
        "--rivals", nargs="*", choices=RIVALS, default=list(RIVALS), metavar="RIVAL", help=", ".join(RIVALS)
    )
    parser.add_argument("--hnsw-items", type=int, default=1_000_000, help="the most items to build a HNSW index of")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write all results, each query's time included")
    parser.add_argument("--plot", type=Path, help="where to draw them: a PNG")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name in ("dim", "k", "queries"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.queries < BURST:
        parser.error(f"--queries must be at least {BURST}, got {args.queries}")
    args.queries -= args.queries % BURST
    if args.dim % 8:
        parser.error(f"--dim must be a multiple of 8, for the binary index, got {args.dim}")
    if min(*args.items, 10**9) < 10 * args.k or min(args.threads) < 1:
        parser.error("--items must be at least ten times --k, and --threads at least 1")
    return args


def main() -> None:
    """Run the benchmark."""
    args = arguments()
    if args.worker:
        print(json.dumps(measure(args)))
        return
    console = Console()
    console.width = max(console.width, 120)
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for items in args.items:
        for threads in args.threads:
            result = in_a_process(items, threads, args)
            rows += result["rows"]
            notes += result["notes"]
            if result["rows"]:
                console.print(table_of(result["rows"], args))
    environment: dict[str, Any] = {"machine": platform.machine(), "cpus": os.cpu_count(), "numpy": np.__version__}
    with suppress(PackageNotFoundError):
        environment["faiss"] = version("faiss-cpu")
    console.print(", ".join(f"{key}: {value}" for key, value in environment.items()), highlight=False)
    for note in notes:
        console.print(note, highlight=False)
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key not in ("json", "plot", "worker")}
        args.json.write_text(
            json.dumps({"arguments": settings, "environment": environment, "results": rows, "notes": notes}, indent=1)
        )
    if args.plot and rows:
        plot(rows).savefig(args.plot, dpi=130)


if __name__ == "__main__":
    main()
