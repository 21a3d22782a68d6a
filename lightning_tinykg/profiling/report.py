"""What a profile shows: a table, files, a plot."""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.table import Table

from lightning_tinykg.activations import Ledger
from lightning_tinykg.activations.ledger import MIB, format_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Point:
    """One training step, at one width.

    Attributes:
        step: which of the measured steps.
        batch: type of its batch.
        bits: the width.
        recipe: ``"rules"``, ``"rules, off"`` or ``"rules, aggressive"`` (settings of ``recompute``), or ``"paper"``.
        raw_bytes: what the uncompressed graph keeps.
        stored_bytes: what is kept instead.
        error: of the gradient of all parameters, ``|g - exact| / |exact|``; None where it can't be measured.
        work: bytes that are moved in the backward to make again what was not kept.
    """

    step: int
    batch: str
    bits: int
    recipe: str
    raw_bytes: int
    stored_bytes: int
    error: float | None
    work: int = 0


@dataclass
class Profile:
    """What a model's training step keeps, and what it would keep: made by :func:`profile`.

    Attributes:
        points: each measured step at each width.
        ledgers: of the step that keeps most, by (recipe, bits).
        notes: what was not as it should be, in words.

    Example:
        >>> point = Point(step=0, batch="Tensor", bits=8, recipe="rules", raw_bytes=4000, stored_bytes=1000, error=0.01)
        >>> [(row["bits"], row["ratio"], row["error"]) for row in Profile([point]).curve()]
        [(8, 4.0, 0.01)]
    """

    points: list[Point] = field(default_factory=list)
    ledgers: dict[tuple[str, int], Ledger] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        """The largest step by module and op: raw bytes, and stored bytes at each width by the rules."""
        rows: dict[tuple[str, str], Counter[str]] = {}
        names = {f"stored_bytes_{bits}": ledger for (recipe, bits), ledger in self.ledgers.items() if recipe == "rules"}
        for number, (name, ledger) in enumerate(names.items()):
            for entry in ledger:
                row = rows.setdefault((entry.module, entry.op), Counter(raw_bytes=0, **dict.fromkeys(names, 0)))
                row[name] += entry.stored_bytes
                row["raw_bytes"] += 0 if number else entry.raw_bytes
        ordered = sorted(rows.items(), key=lambda item: -max(item[1].values()))
        return [{"module": module, "op": op, **row} for (module, op), row in ordered if any(row.values())]

    def curve(self) -> list[dict[str, Any]]:
        """The budget curve: of each type of batch and width, the largest step's bytes and the steps' mean error."""
        groups: dict[tuple[str, str, int], list[Point]] = {}
        for point in self.points:
            groups.setdefault((point.batch, point.recipe, point.bits), []).append(point)
        curve = []
        for (batch, recipe, bits), points in groups.items():
            largest = max(points, key=lambda point: point.raw_bytes)
            raw, stored = largest.raw_bytes, largest.stored_bytes
            errors = [point.error for point in points if point.error is not None]
            row = {"batch": batch, "recipe": recipe, "bits": bits, "steps": len(points)}
            row |= {"raw_bytes": raw, "stored_bytes": stored, "ratio": raw / stored if stored else None}
            row["work"] = largest.work
            curve.append(row | {"error": sum(errors) / len(errors) if errors else None})
        return curve

    def __rich__(self, limit: int = 25) -> Group:
        rows = self.rows()
        widths = [name for name in (rows[0] if rows else ()) if name.startswith("stored_bytes_")]
        kept = Table(title="What autograd keeps in the largest step, and what each width would keep")
        for name in ("module", "op"):
            kept.add_column(name, overflow="fold")
        for name in ("raw", *(f"{name.rpartition('_')[2]} bits" for name in widths)):
            kept.add_column(name, justify="right", no_wrap=True)

        def sums(some: list[dict[str, Any]]) -> list[str]:
            return [format_bytes(sum(row[name] for row in some)) for name in ("raw_bytes", *widths)]

        for row in rows[:limit]:
            kept.add_row(row["module"] or "-", row["op"], *sums([row]))
        if rest := rows[limit:]:
            kept.add_row("...", f"{len(rest)} more", *sums(rest))
        kept.add_section()
        kept.add_row("all", "", *sums(rows))

        curve = Table(title="Budget curve: what is kept, at what error of the gradient")
        for name in ("batch", "kept by", "bits", "raw", "stored", "ratio", "moved", "error"):
            curve.add_column(name, justify="left" if name in ("batch", "kept by") else "right", no_wrap=True)
        for row in self.curve():
            sizes = format_bytes(row["raw_bytes"]), format_bytes(row["stored_bytes"])
            ratio = f"{row['ratio']:.1f}x" if row["ratio"] is not None else "-"
            error = "not measured" if row["error"] is None else f"{row['error']:.2%}" if row["error"] else "exact"
            moved = format_bytes(row["work"]) if row["work"] else "-"
            curve.add_row(row["batch"], row["recipe"], str(row["bits"]), *sizes, ratio, moved, error)
        return Group(kept, curve, *self.notes)

    def __str__(self) -> str:
        console = Console(width=120)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    def plot(self, limit: int = 15) -> Figure:
        """Raw and stored bytes by op, beside the budget curve.

        Returns:
            A matplotlib figure, which no window shows until it is asked to.
        """
        from matplotlib.figure import Figure

        rows, curve = self.rows()[:limit][::-1], self.curve()
        figure = Figure(figsize=(14, 2.5 + 0.28 * max(len(rows), 4)), layout="constrained")
        bars, errors = figure.subplots(1, 2, width_ratios=(3, 2))
        names = [f"{row['module'] or '-'}  {row['op']}" for row in rows]
        bars.barh(names, [row["raw_bytes"] / MIB for row in rows], color="#d5dce6", label="raw")
        for name, shade in zip([name for name in (rows[0] if rows else ()) if "stored" in name], _SHADES, strict=False):
            label = f"{name.rpartition('_')[2]} bits"
            bars.plot(
                [row[name] / MIB for row in rows], range(len(rows)), "|", color=shade, ms=11, mew=2.5, label=label
            )
        bars.set(xlabel="MiB between forward and backward", title="the largest step")
        colors = {batch: f"C{number}" for number, batch in enumerate(dict.fromkeys(row["batch"] for row in curve))}
        for batch, recipe in dict.fromkeys((row["batch"], row["recipe"]) for row in curve):
            rows = [row for row in curve if (row["batch"], row["recipe"]) == (batch, recipe)]
            for row in rows:
                if row["error"] == 0:  # which has no place on a logarithmic axis
                    errors.axvline(row["stored_bytes"] / MIB, color=colors[batch], ls=":", label=f"{batch}, exact")
            rows = [row for row in rows if row["error"]]
            stored = [row["stored_bytes"] / MIB for row in rows]
            style = _STYLES.get(recipe, {"marker": "o", "ls": "-"})
            label = f"{batch}, {recipe}"
            errors.plot(stored, [row["error"] for row in rows], color=colors[batch], label=label, **style)
            for row, x in zip(rows, stored, strict=True):
                errors.annotate(str(row["bits"]), (x, row["error"]), xytext=(4, 4), textcoords="offset points")
        if any(row["error"] for row in curve):
            errors.set(xscale="log", yscale="log")
        errors.set(
            xlabel="MiB stored", ylabel="relative error of the gradient", title="budget curve, bits at the points"
        )
        for axes in (bars, errors):
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False, fontsize=8)
            axes.spines[["top", "right"]].set_visible(False)
        return figure

    def save(self, folder: str | Path) -> Path:
        """Write ``profile.json``, ``ops.csv``, ``curve.csv`` and ``profile.png`` into a folder, made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        rows, curve = self.rows(), self.curve()
        parts = {"points": [asdict(point) for point in self.points], "ops": rows, "curve": curve, "notes": self.notes}
        (folder / "profile.json").write_text(json.dumps(parts, indent=1))
        for name, table in (("ops", rows), ("curve", curve)):
            with (folder / f"{name}.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(table[0]) if table else [])
                writer.writeheader()
                writer.writerows(table)
        self.plot().savefig(folder / "profile.png", dpi=120)
        return folder


_STYLES = {
    "paper": {"marker": "s", "ls": "--"},
    "rules, off": {"marker": "v", "ls": ":"},
    "rules, aggressive": {"marker": "^", "ls": "-."},
}

_SHADES = ("#f2c14e", "#8fb8de", "#5b8ec9", "#1f5aa6", "#0b2447")
