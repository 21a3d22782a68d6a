"""The results of each part as a table."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from rich.table import Table
from speed_kernels import OPERATIONS
from speed_steps import WAYS

MIB = 2**20


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in left:
        table.add_column(column, no_wrap=True)
    for column in right:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _mib(row: dict[str, Any], key: str) -> str:
    return f"{row[key] / MIB:.1f}" if key in row else "-"


def _error(row: dict[str, Any]) -> str:
    if not row.get("error"):
        return "equal" if "error" in row else "-"
    return f"{row['error']:.2%}" if row["error"] >= 5e-5 else "rounding"


def _times(cost: dict[str, Any], key: str = "paired") -> str:
    return f"{cost[key]:.2f}x" if cost.get(key) else "-"


def kernels(rows: list[dict[str, Any]], args: Namespace) -> Table:
    """Each codec's cost as a multiple of the copy."""
    share = ", % of the copy's bandwidth" if args.device != "cpu" else ""
    unit = f"each: x copy into existing memory, GB/s of the tensor{share}"
    title = f"Codecs of {args.rows:,} x {args.width}, groups of {args.group_size}; {unit}"
    table = _table(title, ("codec", "kernels"), ("smaller", *OPERATIONS.values(), "error"))
    for number, row in enumerate(rows):
        cells = []
        for operation in OPERATIONS:
            if (cost := row.get(operation)) is None:
                cells.append("-")
                continue
            cells.append(f"{_times(cost)} {cost['gb_per_s']:6.1f}")
            if share:
                cells[-1] += f" {cost['of_copy_bandwidth']:4.0%}"
        error = "" if row["error"] is None else f"{row['error']:.2%}"
        last = number + 1 == len(rows) or rows[number + 1]["by"] != row["by"]
        smaller = f"{row['raw_bytes'] / row['bytes']:.1f}x"
        table.add_row(row["codec"], row["by"], smaller, *cells, error, end_section=last)
    return table


def steps(rows: list[dict[str, Any]], args: Namespace) -> Table:
    """Each way of each step against the plain one."""
    size = f"{args.nodes:,} nodes, {args.edges:,} edges, dim {args.dim}, {args.layers} layers, batch {args.triples:,}"
    title = (
        f"One training step: {size}\n"
        "milliseconds, medians; x plain, paired by round; MiB: stored of raw by the ledger; retained after the forward "
        "and peak as measured; error of the gradient"
    )
    times = ("forward", "x plain", "backward", "x plain", "total", "x plain")
    columns = (*times, "stored", "retained", "peak", "error")
    table = _table(title, ("step", "way"), columns)
    for number, row in enumerate(rows):
        last = number + 1 == len(rows) or rows[number + 1]["step"] != row["step"]
        if "total" not in row:
            table.add_row(row["step"], row["way"], "failed", *[""] * 9, end_section=last)
            continue
        stored = f"{row['stored_bytes'] / MIB:.1f} of {row['raw_bytes'] / MIB:.1f}" if "stored_bytes" in row else ""
        table.add_row(
            row["step"],
            row["way"],
            f"{row['forward']['median'] * 1e3:.1f}",
            _times(row["forward"]),
            f"{row['backward']['median'] * 1e3:.1f}",
            _times(row["backward"]),
            f"{row['total']['median'] * 1e3:.1f}",
            _times(row["total"]),
            stored,
            _mib(row, "retained_bytes"),
            _mib(row, "peak_bytes"),
            "" if row["way"] == "plain" else _error(row),
            end_section=last,
        )
    return table


def growth(rows: list[dict[str, Any]], args: Namespace) -> Table:
    """The cost of an edge."""
    what = "triple" if args.step == "kgcn" else "edge"
    title = f"{args.step}: cost of one {what} in a step, microseconds, and x plain (paired by round)"
    ways = list(dict.fromkeys(row["way"] for row in rows))
    table = _table(title, (), ("growing", "size", *ways))
    points = list(dict.fromkeys((row["axis"], row["size"]) for row in rows))
    for number, (axis, size) in enumerate(points):
        cells = []
        for way in ways:
            found = [row for row in rows if (row["axis"], row["size"], row["way"]) == (axis, size, way)]
            cells += [f"{row['per_edge'] * 1e6:.3f} {_times(row['total'])}" for row in found] or ["-"]
        table.add_row(axis, f"{size:,}", *cells, end_section=number + 1 < len(points) and points[number + 1][0] != axis)
    return table


def largest(rows: list[dict[str, Any]], args: Namespace) -> Table:
    """How far the memory goes."""
    what = "triples" if args.step == "kgcn" else "edges"
    limit = f"{args.memory / 2**30:.2f} GiB, weights and graph included"
    title = f"{args.step}: the most {what} whose step stays within {limit}"
    table = _table(title, ("way",), (what, "x plain", "measured"))
    plain = next((row["largest"] for row in rows if row["way"] == "plain"), 0)
    for row in sorted(rows, key=lambda row: list(WAYS).index(row["way"])):
        ratio = f"{row['largest'] / plain:.2f}x" if plain else "-"
        table.add_row(row["way"], f"{row['largest']:,}", ratio, f"{len(row['probes'])} sizes")
    return table
