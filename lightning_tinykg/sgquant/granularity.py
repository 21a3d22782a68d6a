"""What SGQuant's widths can hang on: the layer, the component, the degree of the node; and plans made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_tinykg.arguments import check_whole
from lightning_tinykg.bits.plan import BitPlan, PlanEntry

__all__ = [
    "COMPONENTS",
    "WIDTHS",
    "DegreeBuckets",
    "combined",
    "componentwise",
    "layerwise",
    "topologywise",
    "uniform",
]

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 16, 32)
"""The widths a place can have. 32 keeps it as it is."""

COMPONENTS = ("embedding", "message", "attention", "update")
"""What a layer stores.

- `embedding`: the node features that it takes in,
- `message`: what its neighbours get to see of a node, where that is not the embedding itself (GCN's `x @ W`),
- `attention`: coefficients of edges, given to it or computed by it,
- `update`: what it puts out.
"""


@dataclass(frozen=True)
class DegreeBuckets:
    """Nodes by in-degree, the lowest in bucket 0: bucket `k` holds those above `points[k - 1]`, up to `points[k]`.

    Args:
        count: Buckets of about the same number of nodes, by quantiles of the degrees of the graph that is calibrated
            on. A degree is in one bucket, so that many nodes of one degree leave other buckets with less, or empty.
        split_points: Or the degrees that are the last of their buckets, ascending; there is one bucket more.

    Raises:
        ValueError: If `count` is below 1, or `split_points` don't ascend.

    Example:
        >>> buckets = DegreeBuckets(split_points=(4, 16, 64))
        >>> buckets.names
        ('degree-0', 'degree-1', 'degree-2', 'degree-3')
        >>> buckets.of(torch.tensor([0, 4, 5, 1000]), buckets.points(torch.tensor([1])))
        tensor([0, 0, 1, 3])
    """

    count: int = 4
    split_points: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.split_points is not None:
            points = tuple(self.split_points)
            if any(not isinstance(point, int) for point in points) or list(points) != sorted(set(points)):
                raise ValueError(f"split_points must be ascending whole numbers, got {list(points)}")
            object.__setattr__(self, "split_points", points)
            object.__setattr__(self, "count", len(points) + 1)
        check_whole("count of degree buckets", self.count, 1)

    @classmethod
    def from_argument(cls, buckets: DegreeBuckets | int | Sequence[int] | None) -> DegreeBuckets | None:
        """What a user may write in their place: a count, or the split points; `None` is none.

        Raises:
            ValueError: If it is none of these.

        Example:
            >>> DegreeBuckets.from_argument([4, 16])
            DegreeBuckets(count=3, split_points=(4, 16))
        """
        if buckets is None or isinstance(buckets, DegreeBuckets):
            return buckets
        if isinstance(buckets, Sequence):
            return cls(split_points=tuple(buckets))
        return cls(check_whole("buckets", buckets, 1, ", ascending degrees, DegreeBuckets or None"))

    @property
    def names(self) -> tuple[str, ...]:
        """The buckets as a plan's topology names them."""
        return tuple(f"degree-{bucket}" for bucket in range(self.count))

    def points(self, degrees: Tensor) -> list[int]:
        """The last degree of each bucket but the last.

        Args:
            degrees: int64 `[N]`, of the graph that is calibrated on.
        """
        if self.split_points is not None:
            return list(self.split_points)
        if degrees.numel() == 0:
            return [0] * (self.count - 1)
        ordered = degrees.sort().values
        last = [-(-bucket * degrees.numel() // self.count) - 1 for bucket in range(1, self.count)]
        return [int(degree) for degree in ordered[torch.tensor(last, dtype=torch.long).clamp(min=0)].tolist()]

    @staticmethod
    def of(degrees: Tensor, points: Sequence[int]) -> Tensor:
        """The bucket of each degree, int64 `[N]`."""
        return torch.bucketize(degrees, torch.tensor(list(points), dtype=degrees.dtype, device=degrees.device))


# -- plans -----------------------------------------------------------------------------------------------------------


def uniform(bits: int, keep: Iterable[str | tuple[str, ...]] = ()) -> BitPlan:
    """One width everywhere.

    Args:
        bits: The width.
        keep: Patterns (a layer, or layer, component, topology) that stay at 32 bits.

    Example:
        >>> uniform(4, keep=[("conv2", "update")]).bits_for("conv2", "update", "degree-0")
        32
    """
    return _keeping(BitPlan(default=bits), keep)


def layerwise(bits: Mapping[str, int], default: int = 32, keep: Iterable[str | tuple[str, ...]] = ()) -> BitPlan:
    """A width for each layer (the paper's LWQ).

    Args:
        bits: Layer (a pattern) -> width.
        default: Width of the other layers.
        keep: As in `uniform`.

    Example:
        >>> layerwise({"conv1": 4}).bits_for("conv2", "embedding")
        32
    """
    return _keeping(BitPlan([PlanEntry(width, layer) for layer, width in bits.items()], default), keep)


def componentwise(
    *,
    embedding: int = 32,
    message: int = 32,
    attention: int = 32,
    update: int = 32,
    keep: Iterable[str | tuple[str, ...]] = (),
) -> BitPlan:
    """A width for each component (the paper's CWQ).

    Example:
        >>> componentwise(embedding=4, attention=1).bits_for("conv1", "attention")
        1
    """
    widths = zip(COMPONENTS, (embedding, message, attention, update), strict=True)
    return _keeping(BitPlan([PlanEntry(width, component=component) for component, width in widths], 32), keep)


def topologywise(bits: Sequence[int], keep: Iterable[str | tuple[str, ...]] = ()) -> BitPlan:
    """A width for each bucket of degrees, the lowest first (the paper's TAQ: they get the most bits).

    Example:
        >>> topologywise([8, 4, 2, 1]).bits_for("conv1", "embedding", "degree-3")
        1
    """
    if not bits:
        raise ValueError("bits must have a width for each bucket of degrees, got none")
    entries = [PlanEntry(width, topology=f"degree-{bucket}") for bucket, width in enumerate(bits)]
    return _keeping(BitPlan(entries, 32), keep)


def combined(
    bits: Mapping[tuple[str, str], Sequence[int] | int],
    default: int = 32,
    keep: Iterable[str | tuple[str, ...]] = (),
) -> BitPlan:
    """A width for each layer, component and bucket of degrees.

    Args:
        bits: (layer, component) -> a width, or a width for each bucket, the lowest degrees first.
        default: Width of the rest.
        keep: As in `uniform`.

    Example:
        >>> plan = combined({("conv1", "embedding"): [4, 2], ("conv2", "*"): 8})
        >>> plan.bits_for("conv1", "embedding", "degree-1"), plan.bits_for("conv2", "attention", "degree-1")
        (2, 8)
    """
    entries = []
    for (layer, component), widths in bits.items():
        if isinstance(widths, int):
            entries.append(PlanEntry(widths, layer, component))
        else:
            entries += [PlanEntry(w, layer, component, f"degree-{bucket}") for bucket, w in enumerate(widths)]
    return _keeping(BitPlan(entries, default), keep)


def _keeping(plan: BitPlan, keep: Iterable[str | tuple[str, ...]]) -> BitPlan:
    patterns = [(pattern,) if isinstance(pattern, str) else pattern for pattern in keep]
    return BitPlan([*plan.entries, *(PlanEntry(32, *pattern) for pattern in patterns)], plan.default)
