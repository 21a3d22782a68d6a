"""What has been counted already, while it is counted what it takes to make a tensor again."""

from __future__ import annotations

from lightning_tinykg.activations.recipes import Recipe


class Counted:
    """What has been counted, each at the most so far.

    Attributes:
        amounts: of a recipe or a storage the width, of a want 1; of a recipe of which parts are counted, their share
            (under it and ``"shared"``) and the work for all of them (``"work"``).
        before: what was counted, one after the other, and the amount until then.
    """

    __slots__ = ("amounts", "before")

    def __init__(self) -> None:
        self.amounts: dict[object, float] = {}
        self.before: list[tuple[object, float]] = []

    def add(self, what: object, amount: float) -> None:
        """Count so much of it."""
        until_now = self.amounts.get(what, 0)
        self.before.append((what, until_now))
        self.amounts[what] = max(amount, until_now)

    def work_of_part(self, recipe: Recipe, share: float, work: float) -> float:
        """The work that a part of what a recipe makes takes: its share, and all parts together no more than all of it.

        Args:
            recipe: the recipe.
            share: the part of its result.
            work: the work for all of it; 0 if that has been counted, for another part.
        """
        if share == 1:
            return work
        shared, whole = self.amounts.get((recipe, "shared"), 0), max(work, self.amounts.get((recipe, "work"), 0))
        self.add((recipe, "shared"), min(shared + share, 1))
        self.add((recipe, "work"), whole)
        return min(share, 1 - shared) * whole

    def undo(self, mark: int) -> None:
        """Count only the first ``mark`` of them."""
        while len(self.before) > mark:
            what, amount = self.before.pop()
            self.amounts[what] = amount
