"""What TinyKG's table says in two pictures: the metric against the bytes, and how training converges."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from tinykg_ways import label

LINES = {
    "by the rules": (("8", "4", "2", "1"), "#1f5aa6"),
    "the paper's recipe": (("paper-8", "paper-4", "paper-2", "paper-1"), "#e08a2c"),
}
"""Ways that differ in their width alone."""

OTHERS = {"none": "#222222", "anneal": "#3a9a5b", "budget": "#8a4fb0", "checkpoint": "#b0493f", "bf16": "#7a7a7a"}
CURVES = {"none": "#222222", "8": "#7fa8d9", "2": "#1f5aa6", "paper-2": "#e08a2c", "anneal": "#3a9a5b"}


def share(row: dict[str, Any]) -> float:
    """Stored bytes over raw bytes: over all steps where they were counted, else of the largest step."""
    if "mean_stored_mib" in row:
        return float(row["mean_stored_mib"] / row["mean_raw_mib"])
    return float(row["stored_mib"] / row["raw_mib"])


def _metric_by_bytes(axes: Axes, rows: dict[str, list[dict[str, Any]]], metric: str) -> None:
    def points(ways: tuple[str, ...]) -> tuple[list[float], list[float], list[float]]:
        own = [rows[way] for way in ways if way in rows]
        scores = [[row[metric] for row in some] for some in own]
        errors = [stdev(some) / len(some) ** 0.5 if len(some) > 1 else 0.0 for some in scores]
        return [mean(map(share, some)) for some in own], [mean(some) for some in scores], errors

    for name, (ways, color) in LINES.items():
        places, heights, errors = points(ways)
        if places:
            axes.errorbar(places, heights, errors, fmt="o-", color=color, label=name, capsize=3)
        for way, place, height in zip([way for way in ways if way in rows], places, heights, strict=True):
            bits = way.rpartition("-")[2]
            axes.annotate(bits, (place, height), xytext=(4, 5), textcoords="offset points", fontsize=8, color=color)
    for way, color in OTHERS.items():
        places, heights, errors = points((way,))
        if places:
            axes.errorbar(places, heights, errors, fmt="s", color=color, label=label(way).replace("`", ""), capsize=3)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("stored bytes, share of the uncompressed")
    axes.legend(fontsize=7, frameon=False)


def _convergence(axes: Axes, rows: dict[str, list[dict[str, Any]]]) -> None:
    for way, color in CURVES.items():
        if way in rows:
            curves = zip(*(row["curve"] for row in rows[way]), strict=False)  # as long as all seeds train
            heights = [mean(values) for values in curves]
            every = rows[way][0].get("settings", {}).get("validates_every", 1)
            epochs = [every * (i + 1) for i in range(len(heights))]
            axes.plot(epochs, heights, color=color, label=label(way))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.legend(fontsize=7, frameon=False)


def plot(rows: dict[str, list[dict[str, Any]]], metric: str, name: str, path: Path) -> None:
    """Draw both and save them.

    Args:
        rows: the runs of each way.
        metric: the test metric that decides, as in the rows.
        name: what it is called.
        path: of the image.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    trained = {way: own for way, own in rows.items() if "curve" in own[0]}
    _metric_by_bytes(left, trained, metric)
    left.set_title(f"test {name}, mean and its standard error, against bytes", fontsize=10)
    _convergence(right, trained)
    right.set_title(f"validation {name} by epoch, mean over the seeds", fontsize=10)
    _save(figure, path)


def plot_tuning(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw what each trial of a search reached by its learning rate and its L2; what was chosen by hand is a star.

    Args:
        rows: the trials of all models; of each data set there is a row of plots.
        path: of the image.
    """
    sets = list(dict.fromkeys(row["set"] for row in rows))
    figure = Figure(figsize=(11, 0.6 + 3.6 * len(sets)), layout="constrained")
    plots = figure.subplots(len(sets), 2, sharey="row", squeeze=False)
    models = list(dict.fromkeys(row["model"] for row in rows))
    for axes, (of, setting) in zip(plots.flat, product(sets, ("lr", "l2")), strict=True):
        for number, model in enumerate(models):
            own = [row for row in rows if (row["model"], row["set"]) == (model, of)]
            if not own:
                continue
            for marker, some in (("o", own), ("*", [row for row in own if row["trial"] == 0])):
                places, heights = [row["tuned"][setting] for row in some], [row["best"] for row in some]
                named = model if marker == "o" else None
                axes.scatter(places, heights, s=24 if named else 160, c=f"C{number}", marker=marker, label=named)
        axes.set_xscale("log")
        axes.set_xlabel(f"{setting}, {of}")
        axes.legend(fontsize=7, frameon=False)
    figure.suptitle("best validation Recall@20 of each trial; a star: chosen by hand", fontsize=10)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
