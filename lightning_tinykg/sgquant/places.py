"""The places that a model has, the range of each, and the plan that gives each its width."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from lightning_tinykg.arguments import check_choice, is_width
from lightning_tinykg.bits.plan import BitPlan, Place
from lightning_tinykg.bits.schedule import Schedule
from lightning_tinykg.sgquant.granularity import COMPONENTS, WIDTHS, DegreeBuckets
from lightning_tinykg.sgquant.memory import Memory, measure
from lightning_tinykg.sgquant.quantize import Level
from lightning_tinykg.sgquant.ranges import Observed, Range
from lightning_tinykg.sgquant.sites import Site
from lightning_tinykg.sgquant.wiring import Spot, layers_of

__all__ = ["Granularity", "Places", "as_plan"]

Granularity = Literal["tensor", "bucket", "channel", "node", "auto"]

WIDE = 128
"""Elements of a row from which on `granularity="auto"` gives it a range of its own, which costs 64 bits."""

TALL = 1024
"""Rows from which on `granularity="auto"` gives each channel of narrower ones a range, which costs 64 bits as well."""


class Places:
    """What a calibration found, and how a plan stores it: all of `SGQuantizer` that does not touch the model.

    Args:
        model: Any module with message passing layers.
        plan: As in `SGQuantizer`, and so are the others.
        buckets: Of degrees.
        range: How ranges are found.
        percentile: For `range="percentile"`.
        granularity: What has a range of its own.

    Raises:
        ValueError: If an argument has a value it can't have.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: BitPlan | int | str | Path,
        buckets: DegreeBuckets | int | Sequence[int] | None,
        range: Range,
        percentile: float,
        granularity: Granularity,
    ) -> None:
        check_ranges(range, percentile, granularity)
        self.buckets = DegreeBuckets.from_argument(buckets)
        self.granularity, self.range, self.percentile = granularity, range, percentile
        self.sites: dict[Spot, Site] = {}
        """What the calibration found: every tensor that is stored, in the order of the forward."""
        self.points: tuple[int, ...] = ()
        """The last degree of each bucket but the last."""
        self.plan = BitPlan()
        """Which width where; change it by `set_plan`."""
        self._layers = layers_of(model)
        self._levels: dict[Spot, tuple[Level, ...]] = {}
        self.set_plan(plan)

    # -- the plan ----------------------------------------------------------------------------------------------------

    @property
    def topologies(self) -> tuple[str, ...]:
        """Names of the degree buckets; one without a name, if there are none."""
        return ("",) if self.buckets is None else self.buckets.names

    def set_plan(self, plan: BitPlan | int | str | Path) -> None:
        """Use other widths. Ranges stay: no forward is needed.

        Raises:
            ValueError: If the plan has a schedule or a wrong width, or names a layer, component or bucket there is not.
        """
        plan = as_plan(plan)
        plan.check_widths(WIDTHS, "a place")
        if any(isinstance(bits, Schedule) for bits in (plan.default, *(entry.bits for entry in plan.entries))):
            raise ValueError(f"plan must have widths for a quantizer, got a schedule in {plan!r}")
        self._check(plan)
        self.plan, self._levels = plan, {}

    def places(self) -> list[Place]:
        """The places that the calibration found, in the order of the forward.

        Raises:
            RuntimeError: If there was no calibration.
        """
        self._need_calibration()
        owners = [site.spot for site in self.sites.values() if site.is_owner]
        return list(dict.fromkeys(Place(s.layer, s.component, t) for s in owners for t in self.topologies))

    def _check(self, plan: BitPlan) -> None:
        # against all that could be: a plan by component is one for any model, also for one without attention
        plan.check(Place(layer, part, t) for layer in self._layers for part in COMPONENTS for t in self.topologies)

    def bits_of(self, spot: Spot, plan: BitPlan | None = None) -> tuple[int, ...]:
        """The width of each bucket of a tensor, by the plan in force or another."""
        owner = self.sites[spot].owner
        widths = ((plan or self.plan).bits_for(owner.layer, owner.component, topology) for topology in self.topologies)
        return tuple(bits for bits in widths if isinstance(bits, int))

    def levels(self, spot: Spot) -> tuple[Level, ...]:
        """How a tensor is stored: one level, or one for each bucket if they differ.

        Raises:
            KeyError: If no tensor is met there.
        """
        owner = self.sites[self.sites[spot].owner]
        if owner.spot not in self._levels:
            self._levels[owner.spot] = self._levels_of(owner, self.bits_of(owner.spot))
        return self._levels[owner.spot]

    def _levels_of(self, owner: Site, bits: Sequence[int]) -> tuple[Level, ...]:
        levels = tuple(self._level(owner, width, bucket) for bucket, width in enumerate(bits))
        return levels[:1] if len(set(levels)) == 1 else levels

    def _level(self, owner: Site, bits: int, bucket: int) -> Level:
        granularity: Granularity = self.granularity
        if granularity == "auto":
            granularity = "node" if owner.dim >= WIDE else "channel" if sum(owner.rows) >= TALL else "tensor"
        assert owner.observed is not None
        if bits == 32 or (granularity == "node" and not owner.of_edges):
            return Level(bits)
        if granularity == "channel" and owner.observed.has_channels:
            return Level(bits, *owner.observed.ends_of_channels(bits))
        by_bucket = granularity == "bucket" or (granularity == "node" and self.granularity == "node")
        share = owner.share if bits in owner.share_widths else ""
        seen = owner.shares if owner.shares is not None and share else owner.observed
        return Level(bits, *seen.ends(bucket if by_bucket else None, bits), share)

    @property
    def is_calibrated(self) -> bool:
        """Whether the places and their ranges are known."""
        return bool(self.sites)

    def _new_range(self, of_edges: bool, dim: int) -> Observed:
        by_channel = self.granularity == "channel" or (self.granularity == "auto" and dim < WIDE)
        channels = dim if by_channel and not of_edges and dim > 1 else 0
        return Observed(len(self.topologies), self.range, self.percentile, channels)

    def _need_calibration(self) -> None:
        if not self.is_calibrated:
            raise RuntimeError(
                "the quantizer needs a calibration first: quantizer.calibrate(lambda: model(x, edge_index))"
            )

    # -- in and out --------------------------------------------------------------------------------------------------

    def memory(self, plan: BitPlan | int | str | Path | None = None) -> Memory:
        """What is stored, in bytes, under the plan in force or another; see `Memory`.

        Raises:
            RuntimeError: If there was no calibration.
            ValueError: If the plan names what matches no place.
        """
        self._need_calibration()
        plan = self.plan if plan is None else as_plan(plan)
        self._check(plan)
        bits = {spot: self.bits_of(spot, plan) for spot in self.sites}
        levels = {s: self._levels_of(site, bits[s]) for s, site in self.sites.items() if site.is_owner}
        return measure(self.sites, bits, levels, self.topologies)

    def state_dict(self) -> dict[str, Any]:
        """Plan, places, ranges and degree buckets, in tensors and primitives."""
        return {
            "plan": self.plan.to_dict(),
            "points": list(self.points),
            "options": self._options(),
            "sites": [site.state_dict() for site in self.sites.values()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: If it was taken of a quantizer with other options, or of another model.
        """
        if state["options"] != self._options():
            raise ValueError(f"the state is of a quantizer with {state['options']}, got one with {self._options()}")
        sites = [Site.from_state(plain, self._new_range) for plain in state["sites"]]
        if missing := {site.spot.layer for site in sites} - set(self._layers):
            raise ValueError(f"the state has layers that the model has not: {', '.join(sorted(missing))}")
        self.sites, self.points = {site.spot: site for site in sites}, tuple(state["points"])
        self.set_plan(BitPlan.from_dict(state["plan"]))

    def _options(self) -> dict[str, Any]:
        buckets = None if self.buckets is None else [self.buckets.count, list(self.buckets.split_points or ())]
        return {"buckets": buckets, "range": self.range, "granularity": self.granularity}


def check_ranges(range: Range, percentile: float, granularity: Granularity) -> None:
    """Refuse how ranges can't be found.

    Raises:
        ValueError: If an argument has a value it can't have.

    Example:
        >>> check_ranges("mse", 0.999, "row")
        Traceback (most recent call last):
        ValueError: granularity must be one of tensor, bucket, channel, node, auto, got 'row'
    """
    check_choice("granularity", granularity, get_args(Granularity))
    Observed(1, range, percentile)


def as_plan(plan: BitPlan | int | str | Path) -> BitPlan:
    """A plan from a width, a path or a plan.

    Raises:
        ValueError: If a width is none.

    Example:
        >>> as_plan(4).default
        4
    """
    if isinstance(plan, BitPlan):
        return plan
    if isinstance(plan, (str, Path)):
        return BitPlan.load(plan)
    if not is_width(plan, WIDTHS):
        raise ValueError(f"bits must be one of {', '.join(map(str, WIDTHS))}, a BitPlan or a path, got {plan!r}")
    return BitPlan(default=plan)
