"""What a calibration finds out: which tensors a model stores, which of them are one, and the range of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch_geometric.nn import MessagePassing

from lightning_tinykg.sgquant.granularity import WIDTHS
from lightning_tinykg.sgquant.graphs import Graph
from lightning_tinykg.sgquant.quantize import Level, fake_quantize
from lightning_tinykg.sgquant.ranges import Observed
from lightning_tinykg.sgquant.shares import Share, divisors, share_of
from lightning_tinykg.sgquant.wiring import Meeting, Spot

__all__ = ["Observer", "Site"]


@dataclass
class Site:
    """One tensor that is stored, or met again.

    Attributes:
        spot: Where it is met.
        owner: Where the same tensor was met first; itself, if that is here. Bits and range are the owner's.
        is_stored: Whether it arrives here as the owner has stored it, so that nothing is left to be done.
        of_edges: Whether its rows are edges.
        dim: Elements of a row.
        rows: Rows in each bucket of degrees, in the largest batch of the calibration.
        gathered: Of messages: how many of its rows the edges take, in each bucket: a sender's and a receiver's each.
        parameter: Name of the parameter that it is, if it is one.
        degrees: int32, the in-degree of each of the parameter's rows in the graph of the calibration.
        observed: Its range; of an owner only.
        share: Of what its elements are multiples, if it is of edges.
        shares: The range of these multiples; `None`: it has no share.
        share_widths: The widths at which less is lost of such multiples.
    """

    spot: Spot
    owner: Spot
    is_stored: bool
    of_edges: bool
    dim: int
    rows: list[int] = field(default_factory=list)
    gathered: list[int] = field(default_factory=list)
    parameter: str | None = None
    degrees: Tensor | None = None
    observed: Observed | None = None
    share: Share = ""
    shares: Observed | None = None
    share_widths: tuple[int, ...] = ()

    @property
    def is_owner(self) -> bool:
        """Whether this is where the tensor was met first."""
        return self.owner == self.spot

    def copy(self) -> Site:
        """The same, to be added to."""
        observed, shares = deepcopy(self.observed), deepcopy(self.shares)
        return replace(self, rows=list(self.rows), gathered=list(self.gathered), observed=observed, shares=shares)

    def agree(self, ranks: Sequence[Site]) -> None:
        """Take the widest of all ranks' ranges; what is stored as shares is so on every rank that met it.

        Args:
            ranks: What each that met it knows of it, this one among them, if it did.
        """
        if self.observed is None:
            return
        self.observed.agree([rank.observed for rank in ranks if rank.observed is not None])
        self.share_widths = tuple(
            bits for bits in WIDTHS if all(bits in rank.share_widths and rank.share == ranks[0].share for rank in ranks)
        )
        if self.share_widths:
            assert self.shares is not None
            self.shares.agree([rank.shares for rank in ranks if rank.shares is not None])

    def state_dict(self) -> dict[str, Any]:
        """All of it, in tensors and primitives."""
        return {
            **{name: getattr(self, name) for name in _PLAIN},
            "share": self.share,
            "share_widths": list(self.share_widths),
            "spot": tuple(self.spot),
            "owner": tuple(self.owner),
            "degrees": None if self.degrees is None else self.degrees.cpu(),
            **{name: None if (seen := getattr(self, name)) is None else seen.state_dict() for name in _RANGES},
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], new_range: NewRange) -> Site:
        """The site of a `state_dict`; `new_range` makes its ranges."""
        plain = {name: state[name] for name in _PLAIN}
        site = cls(**plain, spot=Spot(*state["spot"]), owner=Spot(*state["owner"]), degrees=state["degrees"])
        site.share_widths = tuple(state.get("share_widths", ()))
        site.share = state.get("share", "even" if site.share_widths else "")
        for name in _RANGES:
            if (kept := state.get(name)) is not None:
                seen = new_range(site.of_edges, site.dim)
                seen.load_state_dict(kept)
                setattr(site, name, seen)
        return site


_PLAIN = ("is_stored", "of_edges", "dim", "rows", "gathered", "parameter")
_RANGES = ("observed", "shares")

NewRange = Callable[[bool, int], Observed]
"""Makes an empty range, of edges or not, of rows of so many elements."""

_SOME = 1 << 18
"""Edges of which it is decided whether shares are better: all that arrive at some of the nodes, evenly spaced."""


class Observer:
    """The visitor of a calibration.

    It puts a copy in the place of each tensor, so that what has been stored is told from what it was stored from.

    Args:
        model: Whose parameters are looked for.
        new_range: Makes an empty range, of edges or not, of rows of so many elements.
        bucket_of: Bucket of each row of a tensor of nodes, given the graph, the number of rows and their end.
        sites: What earlier calibrations found. They are copied: if this one fails, they are as they were.
    """

    def __init__(self, model: nn.Module, new_range: NewRange, bucket_of: Any, sites: dict[Spot, Site]) -> None:
        self._new_range, self._bucket_of = new_range, bucket_of
        self.sites = {spot: site.copy() for spot, site in sites.items()}
        self._earlier_sites = frozenset(sites)
        self._met: list[tuple[StorageWeakRef, tuple[int, ...], Spot, bool]] = []
        self._parameters = {_storage(p): (name, p) for name, p in model.named_parameters() if p.dim() > 1}
        self._waiting: list[tuple[Site, Tensor]] = []  # of linear layers that were called before any graph was seen
        # coefficients of some receivers, of the last batch, with their receivers and divisors
        self._shares: dict[Spot, tuple[Tensor, Tensor, Tensor]] = {}
        self.node_counts: set[int] = set()
        # of this call: how many nodes there are, and how many rows linear layers took
        self._nodes: set[int] = set()
        self._rows: dict[Spot, int] = {}
        self._not_of_nodes: set[Spot] = set()

    def __call__(self, spot: Spot, x: Tensor, meeting: Meeting) -> Tensor:
        """Look at a tensor; return a copy."""
        of_nodes = meeting.receivers is None
        is_passing = isinstance(meeting.layer, MessagePassing)
        if x.size(0) == 0 or (not is_passing and x.dim() != 2):
            return x
        if is_passing and of_nodes:
            self._nodes.add(x.size(0))
        elif not is_passing:
            self._rows[spot] = x.size(0)
        known = self.sites.get(spot)
        if known is None:
            owner, is_stored = self._earlier(x) or (spot, False)
            dim = x.numel() // max(x.size(0), 1)
            known = self.sites[spot] = Site(spot, owner, is_stored, not of_nodes, dim)
            if known.is_owner:
                known.observed = self._new_range(known.of_edges, dim)
                known.shares = None if of_nodes else self._new_range(known.of_edges, dim)
                name, parameter = self._parameters.get(_storage(x), (None, None))
                if parameter is not None and parameter.shape == x.shape:
                    known.parameter = name
        self._count_gathered(known, x.size(0), meeting)
        if known.is_stored:
            return x
        if known.is_owner:
            self._observe(known, x, meeting)
        copy = x.clone()
        self._remember(x, known.owner, is_stored=False)
        self._remember(copy, known.owner, is_stored=True)
        return copy

    def _count_gathered(self, site: Site, rows: int, meeting: Meeting) -> None:
        if not meeting.gathered:
            return
        taken = torch.cat(meeting.gathered)
        bucket = None if meeting.graph is None else self._bucket_of(meeting.graph, rows, meeting.end)
        buckets = torch.zeros_like(taken) if bucket is None else bucket[taken]
        observed = self.sites[site.owner].observed
        assert observed is not None
        counts = torch.bincount(buckets, minlength=observed.buckets).tolist()
        if sum(counts) >= sum(site.gathered):
            site.gathered = counts

    # -- one tensor or two -------------------------------------------------------------------------------------------

    def _remember(self, x: Tensor, owner: Spot, is_stored: bool) -> None:
        self._met = [entry for entry in self._met if not entry[0].expired()]
        self._met.append((StorageWeakRef(x.untyped_storage()), _layout(x), owner, is_stored))

    def _earlier(self, x: Tensor) -> tuple[Spot, bool] | None:
        """Where this tensor, or one of which it has some rows, was met before, and whether it is as stored there."""
        storage = _storage(x)
        for reference, layout, owner, is_stored in self._met:
            if reference.cdata == storage and not reference.expired() and _is_within(_layout(x), layout):
                return owner, is_stored
        return None

    # -- ranges ------------------------------------------------------------------------------------------------------

    def _observe(self, site: Site, x: Tensor, meeting: Meeting) -> None:
        if meeting.graph is None:
            self._waiting.append((site, x))
            return
        rows = x.size(0)
        if meeting.receivers is None:
            bucket = self._bucket_of(meeting.graph, rows, meeting.end)
            if bucket is None and not isinstance(meeting.layer, MessagePassing):
                return  # not the nodes of this graph: whether they are of any, `finish` decides
        else:
            bucket = self._bucket_of(meeting.graph, meeting.rows, 1)
            bucket = None if bucket is None else bucket[meeting.receivers]
            self._add_shares(site, x.reshape(x.size(0), -1), bucket, meeting)
        self._add(site, x, bucket)
        if site.parameter is not None:
            degrees = meeting.graph.degrees(rows, meeting.end)
            site.degrees = None if degrees is None else degrees.int()

    def _add_shares(self, site: Site, x: Tensor, bucket: Tensor | None, meeting: Meeting) -> None:
        """Look at coefficients as multiples of a share, as long as all batches have had the same."""
        if site.shares is None or not x.size(0):
            return
        assert meeting.receivers is not None
        receivers, rows = meeting.receivers, meeting.rows
        share = share_of(x, receivers, meeting.senders, rows)
        if not share or site.share not in ("", share):
            site.share, site.shares, site.share_widths = "", None, ()
            self._shares.pop(site.spot, None)
            return
        site.share, divisor = share, divisors(share, receivers, meeting.senders, rows)
        # so that what is least is the squared error of the coefficients, not that of their multiples
        site.shares.add(x.float() * divisor[:, None], bucket, weight=1 / divisor.square())
        some = (receivers % -(-x.size(0) // _SOME) == 0).nonzero().squeeze(1)
        if not some.numel():  # all edges arrive at a few nodes
            some = torch.arange(x.size(0), device=x.device)
        self._shares[site.spot] = x[some].float(), receivers[some], divisor[some]

    def _add(self, site: Site, x: Tensor, bucket: Tensor | None) -> None:
        assert site.observed is not None
        buckets = site.observed.buckets
        try:
            site.observed.add(x.reshape(x.size(0), -1), bucket)
        except ValueError as error:
            raise ValueError(f"{site.spot}: {error}") from None
        rows = [x.size(0)] if bucket is None else torch.bincount(bucket, minlength=buckets).tolist()
        rows += [0] * (buckets - len(rows))
        if sum(rows) >= sum(site.rows):
            site.rows = rows

    def settle(self, graph: Graph | None) -> None:
        """At the end of a call: look at what was met before its graph, and whether linear layers took its nodes."""
        if self._nodes:
            self.node_counts |= self._nodes
            self._not_of_nodes |= {spot for spot, rows in self._rows.items() if rows not in self._nodes}
        self._nodes.clear()
        self._rows.clear()
        waiting, self._waiting = self._waiting, []
        for site, x in waiting:
            bucket = None if graph is None else self._bucket_of(graph, x.size(0), 1)
            self._add(site, x, bucket)

    def finish(self) -> None:
        """When all has been seen: decide at which widths shares are better, and leave out what is not of nodes.

        That are linear layers that took other rows than a call's nodes, such as those of its graphs; an earlier
        calibration has found out which of its do.
        """
        for spot, seen in self._shares.items():
            self.sites[spot].share_widths = _share_widths(self.sites[spot], *seen)
        for spot, site in list(self.sites.items()):
            if spot in self._earlier_sites or not site.is_owner or site.of_edges:
                continue
            if spot in self._not_of_nodes or sum(site.rows) not in self.node_counts:
                self.sites = {s: other for s, other in self.sites.items() if other.owner != spot}


def _share_widths(site: Site, x: Tensor, receivers: Tensor, divisor: Tensor) -> tuple[int, ...]:
    """The widths at which less is lost of coefficients that are stored as multiples of a share.

    What a receiver of neighbours `v` gets wrong is `sum(error * v)`: of neighbours that are alike, the sum of the
    errors, and of such as have nothing in common, the root of the sum of their squares. Both count.
    """
    assert site.observed is not None
    assert site.shares is not None
    nodes = int(receivers.max()) + 1

    def lost(level: Level) -> float:
        error = fake_quantize(x, [level], divisor=divisor) - x
        of_nodes = x.new_zeros(nodes, x.size(1)).index_add_(0, receivers, error)
        return float(of_nodes.square().sum() + error.square().sum())

    as_it_is, as_shares = site.observed, site.shares

    def is_better(bits: int) -> bool:
        shares = Level(bits, *as_shares.ends(None, bits), site.share)
        return lost(shares) < lost(Level(bits, *as_it_is.ends(None, bits)))

    return tuple(bits for bits in WIDTHS if bits < 32 and is_better(bits))


def _storage(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def _layout(x: Tensor) -> tuple[int, ...]:
    """First element, number of rows, distance of rows, elements of a row."""
    rows = x.size(0)
    return int(x.storage_offset()), rows, x.stride(0), x.numel() // max(rows, 1)


def _is_within(part: Sequence[int], whole: Sequence[int]) -> bool:
    """Whether the rows of one layout are among those of another in the same storage."""
    (offset, rows, stride, dim), (start, all_rows, distance, width) = part, whole
    if dim != width or (stride != distance and rows > 1):
        return False
    first, rest = divmod(offset - start, distance) if distance else (0, offset - start)
    return rest == 0 and first >= 0 and first + rows <= all_rows
