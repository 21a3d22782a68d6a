"""What several ranks saw in a calibration, made one: the same buckets, the same places, the widest ranges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_tinykg.sgquant.sites import Site
from lightning_tinykg.sgquant.wiring import Spot

__all__ = ["NoMessagesError", "Report", "agreed_points", "agreed_sites", "raise_failures"]


class NoMessagesError(RuntimeError):
    """A calibration in which no message passing layer was called."""


@dataclass
class Report:
    """What one rank saw.

    Attributes:
        points: The last degree of each bucket but the last; none, if it has seen no graph.
        sites: The tensors that it met.
        failure: What went wrong.
    """

    points: tuple[int, ...]
    sites: dict[Spot, Site]
    failure: Exception | None = None

    def to_send(self) -> Report:
        """The same without what is as long as a table, and with a failure that can be sent, whatever it was."""
        failure = self.failure
        if failure is not None:
            failure = (NoMessagesError if isinstance(failure, NoMessagesError) else RuntimeError)(str(failure))
        sites = {spot: replace(site, degrees=None) for spot, site in self.sites.items()}
        return Report(self.points, sites, failure)


def raise_failures(own: Report, reports: Sequence[Report]) -> None:
    """Raise what went wrong, on all ranks alike; a rank that passed no messages has no say, if others have.

    Raises:
        Exception: That of this rank.
        RuntimeError: If it is another's.
    """
    failures = [(rank, report.failure) for rank, report in enumerate(reports) if report.failure is not None]
    if len(failures) < len(reports):
        failures = [(rank, failure) for rank, failure in failures if not isinstance(failure, NoMessagesError)]
    if not failures:
        return
    if own.failure is not None and not (isinstance(own.failure, NoMessagesError) and len(failures) < len(reports)):
        raise own.failure
    rank, failure = failures[0]
    raise RuntimeError(f"the calibration on rank {rank} failed: {failure}")


def agreed_points(reports: Sequence[Report]) -> tuple[int, ...]:
    """The greatest that any rank has, of each point."""
    known = [report.points for report in reports if report.points]
    return tuple(max(points) for points in zip(*known, strict=True))


def agreed_sites(own: dict[Spot, Site], reports: Sequence[Report]) -> dict[Spot, Site]:
    """All tensors that any rank met, in the order in which the first one of them did, with ranges for all.

    Args:
        own: What this rank met.
        reports: All ranks', in their order, its own among them.
    """
    met: dict[Spot, list[Site]] = {}
    for report in reports:
        for spot, site in report.sites.items():
            met.setdefault(spot, []).append(site)
    sites = {spot: own.get(spot) or of_ranks[0].copy() for spot, of_ranks in met.items()}
    for spot, site in sites.items():
        site.agree(met[spot])
    return sites
