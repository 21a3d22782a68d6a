"""What has been counted already, while it is counted what it takes to make a tensor again."""

from __future__ import annotations

from lightning_tinykg.activations.recipes import Recipe


class Counted:
    """Recipes and storages that are counted already, each at the largest width so far; wants that are, at 1.

    Attributes:
        widths: the widths.
        before: what was counted, one after the other, and the width that it was counted at until then.
    """

    __slots__ = ("before", "widths")

    def __init__(self) -> None:
        self.widths: dict[object, float] = {}
        self.before: list[tuple[object, float]] = []

    def add(self, what: object, least: float) -> None:
        """Count it at this width."""
        until_now = self.widths.get(what, 0)
        self.before.append((what, until_now))
        self.widths[what] = max(least, until_now)

    def work_of_part(self, recipe: Recipe, share: float, work: float) -> float:
        """The work that a part of what a recipe makes takes: its share, and all parts together no more than all of it.

        Args:
            recipe: the recipe.
            share: the part of its result.
            work: the work for all of it; 0 if that has been counted, for another part.
        """
        if share == 1:
            return work
        shared, whole = self.widths.get((recipe, "shared"), 0), max(work, self.widths.get((recipe, "work"), 0))
        self.add((recipe, "shared"), min(shared + share, 1))
        self.add((recipe, "work"), whole)
        return min(share, 1 - shared) * whole

    def undo(self, mark: int) -> None:
        """Count only the first ``mark`` of them."""
        while len(self.before) > mark:
            what, bits = self.before.pop()
            self.widths[what] = bits
