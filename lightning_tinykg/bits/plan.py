"""Which bits where: a plan from (layer, component, topology) to widths."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console
from rich.table import Table

from lightning_tinykg.arguments import is_width
from lightning_tinykg.bits import schedule as schedules
from lightning_tinykg.bits.schedule import Schedule

PLAN_WIDTHS = (*range(1, 13), 16, 32)
"""What a plan can ask for. Each user of a plan says which of them it offers."""


class Place(NamedTuple):
    """What a plan is asked about.

    Attributes:
        layer: path of a module: ``layers.0.attention``.
        component: what of it: an autograd node and its attribute (``Mul.self``), or ``attention``, ``embedding``.
        topology: which of these: the how-manieth save, or a bucket of node degrees.
    """

    layer: str
    component: str = ""
    topology: str = ""

    def __str__(self) -> str:
        return " / ".join(part for part in self if part not in ("", "*")) or "*"


@dataclass(frozen=True)
class PlanEntry:
    """One line of a plan: patterns, and the bits of what they match.

    Attributes:
        bits: a width, or a schedule of widths.
        layer: pattern of the layer; a layer stands for all within it.
        component: pattern of the component.
        topology: pattern of the topology.
    """

    bits: int | Schedule
    layer: str = "*"
    component: str = "*"
    topology: str = "*"

    def __post_init__(self) -> None:
        if not isinstance(self.bits, Schedule) and not is_width(self.bits, PLAN_WIDTHS):
            widths = ", ".join(map(str, PLAN_WIDTHS))
            raise ValueError(f"bits of {self.pattern} must be one of {widths}, or a schedule, got {self.bits!r}")

    @property
    def pattern(self) -> Place:
        """The three patterns."""
        return Place(self.layer, self.component, self.topology)

    def matches(self, place: Place) -> bool:
        """Whether a place is meant: its layer or one that holds it, its component and its topology all match."""
        return _matches(self.layer, self.component, self.topology, place)


def pattern_of(key: str | tuple[str, ...]) -> tuple[str, ...]:
    """The patterns that a key of a plan stands for: of a layer; or of it, a component and a topology.

    Raises:
        ValueError: if it is anything else.

    Example:
        >>> pattern_of("head"), pattern_of(("layers", "Mul.self"))
        (('head',), ('layers', 'Mul.self'))
    """
    pattern = (key,) if isinstance(key, str) else key
    if not isinstance(pattern, tuple) or len(pattern) > 3 or not all(isinstance(part, str) for part in pattern):
        raise ValueError(f"a pattern must be a layer, or a tuple of layer, component and topology, got {key!r}")
    return pattern


@lru_cache(maxsize=1 << 16)  # a search makes thousands of plans, of the same patterns
def _matches(layer: str, component: str, topology: str, place: Place) -> bool:
    return (
        any(fnmatchcase(around, layer) for around in _and_all_around(place.layer))
        and fnmatchcase(place.component, component)
        and fnmatchcase(place.topology, topology)
    )


class BitPlan:
    """Bits by layer, component and topology.

    **The rule: the last entry that matches decides; where none does, the default.** So the general comes first, the
    particular after it. Patterns are the shell's (``*``, ``?``, ``[01]``); a layer stands for all within it.

    Args:
        entries: patterns -> bits. A pattern is a layer, or a tuple of up to three: layer, component, topology. Bits are
            a width or a schedule. Or a sequence of :class:`PlanEntry`.
        default: bits of what no entry matches.

    Raises:
        ValueError: if bits are none.

    Example:
        >>> plan = BitPlan({"layers": 2, ("layers", "Softmax.*"): 4, "head": 32}, default=8)
        >>> [plan.bits_for(*place) for place in (("layers.0", "Mm.self"), ("layers.0", "Softmax.result"), ("norm",))]
        [2, 4, 8]
    """

    def __init__(
        self,
        entries: Mapping[str | tuple[str, ...], int | Schedule] | Sequence[PlanEntry] = (),
        default: int | Schedule = 8,
    ) -> None:
        if isinstance(entries, Mapping):
            entries = [PlanEntry(bits, *pattern_of(key)) for key, bits in entries.items()]
        elif not isinstance(entries, Sequence) or not all(isinstance(entry, PlanEntry) for entry in entries):
            raise ValueError(f"entries must map patterns to bits, or be a list of PlanEntry, got {entries!r}")
        self.entries = tuple(entries)
        self.default = PlanEntry(default).bits
        self._found: dict[Place, PlanEntry] = {}
        self._at: dict[tuple[int, ...], BitPlan] = {}

    def entry_for(self, place: Place) -> PlanEntry:
        """The entry that decides about a place: the last that matches, or one of the default."""
        if place not in self._found:
            matching = (entry for entry in reversed(self.entries) if entry.matches(place))
            self._found[place] = next(matching, PlanEntry(self.default))
        return self._found[place]

    def bits_for(self, layer: str, component: str = "", topology: str = "") -> int | Schedule:
        """The bits of a place: a width, or a schedule where the plan has one there."""
        return self.entry_for(Place(layer, component, topology)).bits

    def at(self, step: int = 0, epoch: int = 0) -> BitPlan:
        """The plan as it is after some optimizer steps and epochs: widths in place of schedules.

        Example:
            >>> from lightning_tinykg.bits.schedule import StepAnneal
            >>> BitPlan({"head": StepAnneal({0: 8, 10: 2})}).at(step=10).bits_for("head")
            2
        """
        scheduled = [bits for bits in self._all_bits() if isinstance(bits, Schedule)]
        if not scheduled:
            return self
        # widths change rarely, and what has been looked up before need not be again
        widths = tuple(bits_now(bits, step, epoch) for bits in scheduled)
        if widths not in self._at:
            entries = [PlanEntry(bits_now(entry.bits, step, epoch), *entry.pattern) for entry in self.entries]
            self._at[widths] = BitPlan(entries, bits_now(self.default, step, epoch))
        return self._at[widths]

    def check(self, places: Iterable[Place | tuple[str, ...]]) -> None:
        """Refuse entries that match none of the places there are.

        Raises:
            ValueError: naming each such entry, and what there is that is nearest to it.

        Example:
            >>> BitPlan({"haed": 32}).check([("head", "Mm.self", "0"), ("layers.0", "Mm.self", "0")])
            Traceback (most recent call last):
            ValueError: these entries of the plan match nothing: haed (nearest: head)
        """
        known = [Place(*place) for place in places]
        idle = [entry for entry in self.entries if not any(entry.matches(place) for place in known)]
        if idle:
            named = "; ".join(f"{entry.pattern}{_nearest(entry.pattern, known)}" for entry in idle)
            raise ValueError(f"these entries of the plan match nothing: {named}")

    def check_widths(self, widths: Sequence[int], what: str) -> None:
        """Refuse widths that a user of the plan does not offer.

        Raises:
            ValueError: naming the width and what there is.
        """
        for bits in self._all_bits():
            if isinstance(bits, int) and bits not in widths:
                raise ValueError(f"bits of {what} must be one of {', '.join(map(str, widths))}, got {bits} in the plan")

    def _all_bits(self) -> Iterable[int | Schedule]:
        return (*(entry.bits for entry in self.entries), self.default)

    # -- in and out ---------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain primitives, from which :meth:`from_dict` makes an equal plan."""
        return {
            "default": _plain(self.default),
            "entries": [{**entry.pattern._asdict(), "bits": _plain(entry.bits)} for entry in self.entries],
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> BitPlan:
        """A plan from plain primitives.

        Raises:
            ValueError: if there is anything in it that is no part of a plan.

        Example:
            >>> plan = BitPlan({"head": 32}, default=2)
            >>> BitPlan.from_dict(plan.to_dict()) == plan
            True
        """
        if unknown := set(plain) - {"default", "entries"}:
            raise ValueError(f"a plan has 'default' and 'entries', got {sorted(unknown)}")
        entries = []
        for number, entry in enumerate(plain.get("entries", ())):
            if "bits" not in entry or set(entry) - {"bits", *Place._fields}:
                raise ValueError(f"entry {number} of a plan has layer, component, topology and bits, got {dict(entry)}")
            entries.append(PlanEntry(**{**entry, "bits": _unplain(entry["bits"])}))
        return cls(entries, _unplain(plain.get("default", 8)))

    def save(self, path: str | Path) -> None:
        """Write the plan, as YAML or as JSON, by the file's suffix."""
        path = Path(path)
        plain = self.to_dict()
        path.write_text(
            json.dumps(plain, indent=2) if _format(path) == ".json" else yaml.safe_dump(plain, sort_keys=False)
        )

    @classmethod
    def load(cls, path: str | Path) -> BitPlan:
        """Read a plan that was saved, or written by hand.

        Raises:
            ValueError: naming the file, if it holds no plan.
        """
        path = Path(path)
        try:
            plain = json.loads(path.read_text()) if _format(path) == ".json" else yaml.safe_load(path.read_text())
            if not isinstance(plain, Mapping):
                raise ValueError(f"a plan has 'default' and 'entries', got {plain!r}")
            return cls.from_dict(plain)
        except (ValueError, TypeError, yaml.YAMLError) as error:
            raise ValueError(f"{path} is no bit plan: {error}") from error

    def table(self) -> Table:
        """The plan as a rich table, in the order in which it is read."""
        table = Table("layer", "component", "topology", "bits", title="Bit plan: the last line that matches decides")
        for entry in (PlanEntry(self.default), *self.entries):
            table.add_row(*entry.pattern, str(entry.bits))
        return table

    def __str__(self) -> str:
        console = Console(width=110)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get().rstrip()

    def __repr__(self) -> str:
        entries = {tuple(entry.pattern): entry.bits for entry in self.entries}
        return f"BitPlan({entries}, default={self.default})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BitPlan) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(repr(self))


def bits_now(bits: int | Schedule, step: int = 0, epoch: int = 0) -> int:
    """A width, or what a schedule says after some optimizer steps and epochs.

    Example:
        >>> bits_now(4, step=100, epoch=1), bits_now(schedules.StepAnneal({0: 8, 1: 2}, by="epoch"), step=100, epoch=1)
        (4, 2)
    """
    if isinstance(bits, Schedule):
        return bits.bits_at(epoch if bits.by == "epoch" else step)
    return bits


def _and_all_around(layer: str) -> Iterable[str]:
    """A layer's path and the paths of the layers that it is within."""
    parts = layer.split(".")
    return (".".join(parts[:end]) for end in range(len(parts), 0, -1))


def _nearest(pattern: Place, known: Sequence[Place]) -> str:
    # compared, and named, by what the entry says of a place
    asked = [at for at, part in enumerate(pattern) if part not in ("", "*")]
    names = [" / ".join(place[at] for at in asked) for place in known]
    near = difflib.get_close_matches(str(pattern), names, n=1, cutoff=0.0)
    return f" (nearest: {near[0]})" if near else ""


def _plain(bits: int | Schedule) -> Any:
    return bits.to_dict() if isinstance(bits, Schedule) else bits


def _unplain(bits: Any) -> Any:
    return schedules.from_dict(bits) if isinstance(bits, Mapping) else bits


def _format(path: Path) -> str:
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"path of a plan must end in .yaml, .yml or .json, got {path.name!r}")
    return path.suffix
