"""The plans that a search chooses from, and how it draws them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product

import numpy as np

from lightning_tinykg.bits.plan import BitPlan, Place, PlanEntry, pattern_of

__all__ = ["Choice", "SearchSpace"]

Choice = tuple[int, ...]
"""The bits of each entry of a space, in the order of its entries."""


class SearchSpace:
    """Some entries of a plan, and the widths that each may have.

    Entries are read as those of a :class:`~lightning_tinykg.bits.BitPlan`: the last that matches a place decides, so
    the general comes first. A pattern that matches many places gives them one width together.

    Args:
        choices: pattern -> the widths it may have. A pattern is a layer, or a tuple of up to three: layer, component,
            topology; a :class:`~lightning_tinykg.bits.Place` is one.
        default: bits of what no entry matches.

    Attributes:
        patterns: the entries, as places.
        widths: of each entry, from the narrowest to the widest.

    Raises:
        ValueError: if there is no entry, an entry has no width, or a width is none.

    Example:
        >>> space = SearchSpace({("convs.0", "embedding"): (1, 2, 4), ("convs.0", "attention"): (4, 8)})
        >>> space.size, space.plan((2, 8)).bits_for("convs.0", "attention"), space.widest
        (6, 8, (4, 8))
    """

    def __init__(self, choices: Mapping[str | tuple[str, ...], Sequence[int]], default: int = 32) -> None:
        if not choices:
            raise ValueError("choices must have at least one entry, got none")
        self.default = default
        patterns, offered = [], []
        for key, widths in choices.items():
            pattern = PlanEntry(default, *pattern_of(key)).pattern
            if isinstance(widths, int) or not widths:
                raise ValueError(f"choices[{str(pattern)!r}] must be some widths, such as (2, 4, 8), got {widths!r}")
            patterns.append(pattern)
            # made into an entry, since that refuses what is no width
            offered.append(tuple(sorted({int(PlanEntry(bits, *pattern).bits) for bits in widths})))  # type: ignore[arg-type]  # no schedule: sorted() would have failed
        self.patterns: tuple[Place, ...] = tuple(patterns)
        self.widths: tuple[tuple[int, ...], ...] = tuple(offered)
        self._all_widths = sorted({bits for widths in self.widths for bits in widths})
        self._axes = [axis for axis in range(3) if len({pattern[axis] for pattern in patterns}) > 1]

    @property
    def size(self) -> int:
        """How many plans there are."""
        return math.prod(len(widths) for widths in self.widths)

    @property
    def widest(self) -> Choice:
        """All entries at their most bits."""
        return tuple(widths[-1] for widths in self.widths)

    def plan(self, choice: Choice) -> BitPlan:
        """The plan of a choice."""
        entries = [PlanEntry(bits, *pattern) for bits, pattern in zip(choice, self.patterns, strict=True)]
        return BitPlan(entries, self.default)

    def uniform(self) -> list[Choice]:
        """One width everywhere, for each width from the widest down; entries without it take the next wider one."""
        levels = [self._snapped([bits] * len(self.patterns)) for bits in reversed(self._all_widths)]
        return list(dict.fromkeys([self.widest, *levels]))

    def screening(self, most: int) -> list[Choice]:
        """All entries at their widest, but one group of them at its narrowest, for each group: what it can do without.

        Entries are grouped by what their patterns share: as finely as gives at most so many groups.

        Args:
            most: how many plans.

        Example:
            >>> SearchSpace({("a", "x"): (1, 8), ("a", "y"): (1, 8), ("b", "x"): (2, 8)}).screening(most=2)
            [(1, 1, 8), (8, 8, 2)]
        """
        # as finely as may be, and by layer and component rather than by topology
        finest_first = (axes for count in range(len(self._axes), 0, -1) for axes in combinations(self._axes, count))
        groups = next((g for axes in finest_first if max(g := self._groups(axes)) < most), None)
        if groups is None:
            return []
        return [
            tuple(widths[0 if group == narrow else -1] for widths, group in zip(self.widths, groups, strict=True))
            for narrow in range(max(groups) + 1)
        ]

    def all(self) -> Iterator[Choice]:
        """Every choice there is."""
        return product(*self.widths)

    def to_dict(self) -> dict[str, object]:
        """Plain primitives, which are equal where two spaces are."""
        entries = [[*pattern, list(widths)] for pattern, widths in zip(self.patterns, self.widths, strict=True)]
        return {"default": self.default, "entries": entries}

    # -- drawing -------------------------------------------------------------------------------------------------

    def draw(self, rng: np.random.Generator) -> Choice:
        """A random choice: of a random range of widths, and in two of three draws with some structure.

        Widths drawn for each entry by itself nearly all add up to the same size, the mean's, and the small plans that a
        search is for are never seen. So a range of widths is drawn first, and mostly entries that share a layer, a
        component, a topology or two of these get one width together.

        Args:
            rng: where the randomness is from.
        """
        low, high = np.sort(rng.integers(len(self._all_widths), size=2))
        offered = self._all_widths[low : high + 1]
        groups = self._random_groups(rng) if rng.random() < 2 / 3 else range(len(self.patterns))
        drawn = rng.integers(len(offered), size=max(groups) + 1)
        return self._snapped([offered[drawn[group]] for group in groups])

    def neighbour(self, choice: Choice, rng: np.random.Generator) -> Choice:
        """A choice near another: one to three entries, or a group of entries, a step or two wider or narrower.

        Args:
            choice: the other.
            rng: where the randomness is from.
        """
        if rng.random() < 0.3:
            groups = self._random_groups(rng)
            chosen = int(rng.integers(max(groups) + 1))
            moved = {entry: int(rng.choice((-1, 1))) for entry, group in enumerate(groups) if group == chosen}
            moved = dict.fromkeys(moved, next(iter(moved.values())))  # all the same way
        else:
            count = min(int(rng.integers(1, 4)), len(choice))
            entries = rng.choice(len(choice), size=count, replace=False)
            moved = {int(entry): int(rng.choice((-2, -1, -1, 1, 1))) for entry in entries}
        near = list(choice)
        for entry, steps in moved.items():
            widths = self.widths[entry]
            near[entry] = widths[min(max(widths.index(choice[entry]) + steps, 0), len(widths) - 1)]
        return tuple(near)

    def cross(self, one: Choice, other: Choice, rng: np.random.Generator) -> Choice:
        """A choice between two: each group of entries as in the one or as in the other.

        Args:
            one: a choice.
            other: another.
            rng: where the randomness is from.
        """
        groups = self._random_groups(rng) if rng.random() < 0.5 else range(len(self.patterns))
        first = rng.random(max(groups) + 1) < 0.5
        return tuple(a if first[group] else b for a, b, group in zip(one, other, groups, strict=True))

    def _random_groups(self, rng: np.random.Generator) -> list[int]:
        return self._groups([axis for axis in self._axes if rng.random() < 0.5])

    def _groups(self, axes: Sequence[int]) -> list[int]:
        """The number of each entry's group: entries of a group share what these axes of their patterns say."""
        numbers: dict[tuple[str, ...], int] = {}
        return [numbers.setdefault(tuple(pattern[axis] for axis in axes), len(numbers)) for pattern in self.patterns]

    def _snapped(self, wanted: Sequence[int]) -> Choice:
        """The widths that are offered: the wanted ones, or the next wider, or the widest."""
        return tuple(
            next((width for width in widths if width >= bits), widths[-1])
            for bits, widths in zip(wanted, self.widths, strict=True)
        )
