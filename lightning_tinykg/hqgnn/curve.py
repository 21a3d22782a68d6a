"""Recall against bytes: the same encoder at other widths, ranked beside it, as a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch_geometric.metrics import LinkPredMetricCollection

from lightning_tinykg.data.batches import RankingBatch
from lightning_tinykg.models.functional import top_k

__all__ = ["Point", "Rival", "plot"]


@dataclass(frozen=True)
class Point:
    """One width's place in the picture.

    Attributes:
        name: How it was made, such as `"gste 2 bits"`.
        nbytes: Of the embeddings as they are scored, scales included.
        metrics: By name, such as `"recall@20"`.
    """

    name: str
    nbytes: int
    metrics: Mapping[str, float]


class Rival:
    """Embeddings that are ranked beside the module's own, in the same pass.

    Args:
        name: Of the point.
        nbytes: Of these embeddings.
        users: Float `[num_users, d]`.
        items: Float `[num_items, d]`.
        metrics: A collection of its own, on the embeddings' device.
    """

    def __init__(self, name: str, nbytes: int, users: Tensor, items: Tensor, metrics: LinkPredMetricCollection) -> None:
        self.name, self.nbytes, self.users, self.items, self.metrics = name, nbytes, users, items, metrics

    def update(self, batch: RankingBatch, k: int) -> None:
        """Rank all items for a chunk of users."""
        ranked, _ = top_k(self.users[batch.user], self.items, k, batch.exclude)
        self.metrics.update(ranked.masked_fill(ranked < 0, self.items.size(0)), batch.target)

    def point(self) -> Point:
        """Its place, after all users."""
        return Point(self.name, self.nbytes, {name: float(x) for name, x in self.metrics.compute().items()})


def plot(points: Sequence[Point], metric: str = "recall@20") -> Any:
    """Recall against bytes.

    Args:
        points: What to show.
        metric: Which of their metrics.

    Returns:
        A matplotlib figure.

    Example:
        >>> figure = plot([Point("fp32", 256_000, {"recall@20": 0.2}), Point("4 bits", 40_000, {"recall@20": 0.19})])
        >>> figure.axes[0].get_ylabel()
        'recall@20'
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    ordered = sorted(points, key=lambda point: point.nbytes)
    axes.plot([p.nbytes / 2**20 for p in ordered], [p.metrics[metric] for p in ordered], "o-", color="0.6", zorder=1)
    for point in ordered:
        axes.annotate(
            point.name, (point.nbytes / 2**20, point.metrics[metric]), xytext=(4, -12), textcoords="offset points"
        )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("embeddings, MiB (log scale)")
    axes.set_ylabel(metric)
    axes.margins(x=0.15, y=0.15)
    axes.grid(alpha=0.3)
    return figure
