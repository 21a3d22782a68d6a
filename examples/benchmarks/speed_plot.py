"""The results of all parts in one figure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from speed_kernels import OPERATIONS
from speed_steps import WAYS

COLOURS = {way: f"C{number % 10}" for way, number in zip(WAYS, (7, 2, 0, 9, 3, 4, 6, 1, 11, 13, 10, 5, 8), strict=True)}
"""By way, the same in each panel."""


def _kernels(axes: Axes, rows: list[dict[str, Any]]) -> None:
    rows = rows[::-1]
    for number, (operation, label) in enumerate(OPERATIONS.items()):
        found = [(place, row[operation]["paired"]) for place, row in enumerate(rows) if operation in row]
        places = [place + 0.27 * (1 - number) for place, _ in found]
        color = ("#1f5aa6", "#e08a2c", "#f2c894")[number]
        axes.barh(places, [cost for _, cost in found], 0.27, label=label, color=color)
    axes.set_yticks(range(len(rows)), [f"{row['by']}: {row['codec']}" for row in rows], fontsize=7)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_title("codecs: time, x copy into existing memory")
    axes.legend(fontsize=7, frameon=False)


def _by_step(axes: Axes, rows: list[dict[str, Any]], value: Callable[[dict[str, Any]], float | None]) -> None:
    steps = list(dict.fromkeys(row["step"] for row in rows))
    ways = list(dict.fromkeys(row["way"] for row in rows if row["way"] != "plain"))
    width = 0.85 / max(1, len(ways))
    for number, way in enumerate(ways):
        found = [(steps.index(row["step"]), value(row)) for row in rows if row["way"] == way]
        bars = [(place, height) for place, height in found if height is not None]
        places = [place + (number - (len(ways) - 1) / 2) * width for place, _ in bars]
        axes.bar(places, [height for _, height in bars], width, label=way, color=COLOURS[way])
    axes.set_xticks(range(len(steps)), steps)
    axes.axhline(1, color="black", linewidth=0.8)


def _step_times(axes: Axes, rows: list[dict[str, Any]]) -> None:
    _by_step(axes, rows, lambda row: row["total"]["paired"] if "total" in row else None)
    axes.set_title("steps: time, x plain")
    axes.legend(fontsize=7, frameon=False, ncols=2)


def _step_peaks(axes: Axes, rows: list[dict[str, Any]]) -> None:
    plain = {row["step"]: row.get("peak_bytes") for row in rows if row["way"] == "plain"}
    _by_step(
        axes,
        rows,
        lambda row: row["peak_bytes"] / plain[row["step"]] if "peak_bytes" in row and plain[row["step"]] else None,
    )
    axes.set_title("steps: peak memory, x plain")


def _growth(axes: Axes, rows: list[dict[str, Any]], axis: str) -> None:
    for way in dict.fromkeys(row["way"] for row in rows):
        points = [(row["size"], row["per_edge"] * 1e6) for row in rows if (row["way"], row["axis"]) == (way, axis)]
        axes.plot(*zip(*points, strict=True), "o-", label=way, color=COLOURS[way])
    if axis != "layers":
        axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel(axis)
    unit = "triple" if axis == "triples" or rows[0]["step"] == "kgcn" else "edge"
    axes.set_ylabel(f"µs per {unit}")
    axes.set_title(f"{rows[0]['step']}: cost of one {unit} by {axis}")
    axes.legend(fontsize=7, frameon=False)


def _largest(axes: Axes, rows: list[dict[str, Any]]) -> None:
    names = [row["way"] for row in rows]
    bars = axes.bar(names, [row["largest"] for row in rows], color=[COLOURS[name] for name in names])
    axes.bar_label(bars, [f"{row['largest']:,}" for row in rows], fontsize=8)
    axes.set_title(f"{rows[0]['step']}: most {rows[0]['of']} in {rows[0]['memory'] / 2**30:.2f} GiB")


def plot(report: dict[str, Any]) -> Figure:
    """A panel for each part that was run; steps and growth have two."""
    panels: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
    if rows := report.get("kernels"):
        panels.append((_kernels, (rows,)))
    if rows := report.get("steps"):
        panels.append((_step_times, (rows,)))
        if any("peak_bytes" in row for row in rows):
            panels.append((_step_peaks, (rows,)))
    if rows := report.get("growth"):
        panels += [(_growth, (rows, axis)) for axis in dict.fromkeys(row["axis"] for row in rows)]
    if rows := report.get("largest"):
        panels.append((_largest, (rows,)))
    columns = min(3, max(1, len(panels)))
    lines = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(6.2 * columns, 5 * lines), layout="constrained")
    for number, (draw, given) in enumerate(panels, start=1):
        axes = figure.add_subplot(lines, columns, number)
        draw(axes, *given)
        axes.spines[["top", "right"]].set_visible(False)
    environment = report["environment"]
    figure.suptitle(", ".join(f"{key}: {value}" for key, value in environment.items()), fontsize=9)
    return figure
