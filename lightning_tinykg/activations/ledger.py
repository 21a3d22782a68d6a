"""The bytes that autograd keeps, and what is kept instead: by module, op and codec."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIB = 2**20


@dataclass(slots=True)
class Entry:
    """One save of one tensor.

    Attributes:
        module: path of the module in whose forward it was saved; empty outside of any.
        op: autograd node and saved attribute: ``Mul.self``.
        codec: what is kept: ``int2``, ``mask``, ``shape``, ``gather``, ``reference`` ...
        need: what its backward needs of it, by the rules: ``linear``, ``smooth``, ``exact``, ``side`` ...; empty where
            that is not asked, since it costs nothing to keep.
        recipe: where it is made again: the ops, from the tensors ``x`` that are kept.
        work: bytes that are moved in the backward to make it again, or the time of a matrix product in these.
        shape: the tensor's shape.
        dtype: its dtype.
        raw_bytes: what the uncompressed graph keeps alive because of this save: the storage's bytes at its first
            save; 0 for a further save of the same storage, for a parameter and for what the user holds.
        stored_bytes: what is kept instead; 0 where an earlier save keeps it already.
    """

    module: str
    op: str
    codec: str
    shape: tuple[int, ...]
    dtype: str
    raw_bytes: int = 0
    stored_bytes: int = 0
    need: str = ""
    recipe: str = ""
    work: int = 0


def format_bytes(count: float) -> str:
    """Bytes in words.

    Example:
        >>> format_bytes(3 * 2**20), format_bytes(700)
        ('3.00 MiB', '700 B')
    """
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1024 or unit == "GiB":
            break
    return f"{count:.2f} {unit}"


class Ledger:
    """What a compressed forward kept, and what it would have kept.

    Both counts are of memory that is really alive between forward and backward: distinct storages, each once;
    parameters and tensors that the user still holds (the batch, the graph) left out; everything that is kept
    instead counted, codes, scales, zero points, indices and masks.

    Example:
        >>> from lightning_tinykg import compress_activations
        >>> import torch
        >>> linear, x = torch.nn.Linear(64, 64), torch.randn(1000, 64)
        >>> with compress_activations(bits=2) as ledger:
        ...     loss = linear(x).relu().exp().tanh().sum()
        >>> loss.backward()
        >>> [(entry.op, entry.codec) for entry in ledger if entry.codec != "held"]
        [('Relu.result', 'mask'), ('Exp.result', 'recipe'), ('Tanh.result', 'recipe')]
        >>> round(ledger.ratio, 1)
        95.9
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def raw_bytes(self) -> int:
        """Bytes the uncompressed graph would keep alive."""
        return sum(entry.raw_bytes for entry in self.entries)

    @property
    def stored_bytes(self) -> int:
        """Bytes kept instead."""
        return sum(entry.stored_bytes for entry in self.entries)

    @property
    def work(self) -> int:
        """Bytes that are moved in the backward to make again what was not kept."""
        return sum(entry.work for entry in self.entries)

    @property
    def ratio(self) -> float:
        """``raw_bytes / stored_bytes``; 1.0 where nothing was kept, infinity where only nothing is kept instead."""
        if not self.stored_bytes:
            return float("inf") if self.raw_bytes else 1.0
        return self.raw_bytes / self.stored_bytes

    def rows(self) -> list[dict[str, Any]]:
        """One plain dictionary per save: ``pandas.DataFrame(ledger.rows())`` makes a frame of it."""
        return [{field.name: getattr(entry, field.name) for field in fields(entry)} for entry in self.entries]

    def summary(self) -> list[dict[str, Any]]:
        """The saves added up by module, op and codec, the largest first.

        Returns:
            Dictionaries with ``module``, ``op``, ``codec``, ``recipe``, ``saves``, ``raw_bytes``, ``stored_bytes``,
            ``work``.
        """
        groups: dict[tuple[str, ...], dict[str, Any]] = {}
        names, counts = ("module", "op", "codec", "recipe"), ("raw_bytes", "stored_bytes", "work")
        for entry in self.entries:
            key = tuple(getattr(entry, name) for name in names)
            group = groups.setdefault(key, dict(zip(names, key, strict=True)) | dict.fromkeys(("saves", *counts), 0))
            group["saves"] += 1
            for name in counts:
                group[name] += getattr(entry, name)
        return sorted(groups.values(), key=lambda group: -max(group["raw_bytes"], group["stored_bytes"]))

    def table(self, limit: int = 30) -> Table:
        """The summary as a rich table.

        Args:
            limit: rows to show; the rest is added up in one.
        """
        table = Table(title=f"Saved tensors: {self!r}", title_justify="left")
        for column in ("module", "op", "kept as"):
            table.add_column(column, overflow="fold")
        for column in ("saves", "raw", "stored", "moved"):
            table.add_column(column, justify="right", no_wrap=True)
        groups = [group for group in self.summary() if group["raw_bytes"] or group["stored_bytes"]]
        for group in groups[:limit]:
            table.add_row(
                group["module"] or "-",
                group["op"],
                group["recipe"] or group["codec"],
                str(group["saves"]),
                format_bytes(group["raw_bytes"]),
                format_bytes(group["stored_bytes"]),
                format_bytes(group["work"]) if group["work"] else "",
            )
        if rest := groups[limit:]:
            saves = sum(group["saves"] for group in rest)
            sums = [format_bytes(sum(group[name] for group in rest)) for name in ("raw_bytes", "stored_bytes", "work")]
            table.add_row("...", "", "", str(saves), *sums)
        return table

    def plot(self, limit: int = 20) -> Figure:
        """Raw and stored bytes by op as a bar plot, the largest on top.

        Args:
            limit: how many ops to show.

        Returns:
            A matplotlib figure, which no window shows until it is asked to.
        """
        from matplotlib.figure import Figure

        totals: dict[str, list[float]] = {}
        for entry in self.entries:
            total = totals.setdefault(f"{entry.module or '-'}  {entry.op}", [0.0, 0.0])
            total[0] += entry.raw_bytes / MIB
            total[1] += entry.stored_bytes / MIB
        names = sorted(totals, key=lambda name: totals[name][0])[-limit:]
        figure = Figure(figsize=(9, 1.2 + 0.34 * len(names)), layout="constrained")
        axes = figure.add_subplot()
        places = range(len(names))
        axes.barh([p + 0.2 for p in places], [totals[n][0] for n in names], 0.4, label="raw", color="#b8c4d6")
        axes.barh([p - 0.2 for p in places], [totals[n][1] for n in names], 0.4, label="stored", color="#1f5aa6")
        axes.set_yticks(list(places), names, fontsize=8)
        axes.set_xlabel("MiB between forward and backward")
        axes.set_title(repr(self), fontsize=10)
        axes.legend(loc="lower right", frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        return figure

    def __repr__(self) -> str:
        return (
            f"{len(self)} saves, {format_bytes(self.raw_bytes)} raw, {format_bytes(self.stored_bytes)} stored, "
            f"{self.ratio:.1f}x"
        )

    def __str__(self) -> str:
        return self.to_text().rstrip()

    def to_text(self, limit: int = 30, width: int = 110) -> str:
        """The table as plain text."""
        buffer = io.StringIO()
        Console(file=buffer, width=width).print(self.table(limit))
        return buffer.getvalue()
