"""How exact the ingredients of a recipe have to be, so that what is made of them is worth so many bits."""

from __future__ import annotations

from lightning_tinykg.activations.recipes import Ingredient, Recipe
from lightning_tinykg.activations.repeatable import (
    BOUNDED,
    DIFFERENCE,
    EXACT,
    LINEAR,
    PRODUCT,
    QUOTIENT,
    ROWS,
    SAME,
    SATURATES,
    SUM,
)
from lightning_tinykg.activations.widths import NARROW, Widths
from lightning_tinykg.codecs.affine import FINE_BITS


class Precision:
    """By what rounding carries through each op (:class:`~lightning_tinykg.activations.repeatable.Carries`).

    Args:
        widths: the width of what is rounded.
    """

    def __init__(self, widths: Widths) -> None:
        self._widths = widths

    def of_ingredients(self, recipe: Recipe, least: int) -> tuple[int, ...]:
        """The least width of each ingredient, so that what is made of them is worth ``least`` bits."""
        asked = least, self._widths.bits, self._widths.literal
        found = recipe.needs.get(asked)
        if found is None:
            found = recipe.needs[asked] = tuple([self._needed(recipe, i, least) for i in recipe.ingredients])
        return found

    def _needed(self, recipe: Recipe, ingredient: Ingredient, least: int) -> int:
        carries = recipe.repeatable.carries
        if least == 32 or carries is SAME:
            return least
        first = ingredient is recipe.args[0]
        if carries in (SUM, DIFFERENCE):
            carries = EXACT if _may_cancel(recipe) else LINEAR
        elif carries is QUOTIENT:
            carries = LINEAR if first else EXACT
        elif carries is PRODUCT:
            others = [i for i in recipe.ingredients if i is not ingredient]
            most = ingredient.layout.numel // NARROW
            if all(i.free or i.layout.numel <= most for i in others):
                carries = LINEAR
            else:  # of two rounded elements the error is as large as they are, and their product may be smaller;
                # in a plan of saves each has a width of its own
                carries = EXACT if recipe.repeatable.adds_up or self._widths.literal else SATURATES
        elif carries is ROWS:
            carries = LINEAR if first and self._is_by_rows(recipe, ingredient, max(least, 8)) else EXACT
        if self._widths.literal and carries is not EXACT:  # what that costs the gradient has been measured
            return least
        if carries is LINEAR:
            return self._widths.raised(least)
        # the result's range may be far smaller than the arguments': 8 bits of these may be 4 of it, and 12 may be 8
        if carries is BOUNDED or (carries is SATURATES and least <= 4):
            return max(least, 8)
        return max(least, FINE_BITS) if carries is SATURATES else 32

    def _is_by_rows(self, recipe: Recipe, ingredient: Ingredient, bits: int) -> bool:
        """Whether each row of what a recipe normalizes has scales of its own."""
        layout, row = ingredient.layout, recipe.repeatable.row
        together = 0 if row is None else row(*recipe.args)
        return layout.is_rows and together > 0 and together % self._widths.group(layout, bits) == 0


def _may_cancel(recipe: Recipe) -> bool:
    """Whether a sum or a difference is of two tensors, one of which is taken from the other."""
    if len(recipe.ingredients) < 2:
        return False
    if recipe.repeatable.carries is DIFFERENCE or recipe.kwargs.get("alpha", 1) < 0:
        return True
    return any(i.recipe is not None and i.recipe.is_negative for i in recipe.ingredients)
