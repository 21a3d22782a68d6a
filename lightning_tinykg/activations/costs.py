"""What it would take to keep a tensor: its own code, or what it can be made again from."""

from __future__ import annotations

import math

from torch import Tensor

from lightning_tinykg.activations.books import Books
from lightning_tinykg.activations.keeping import Record
from lightning_tinykg.activations.recipes import Ingredient, Recipe
from lightning_tinykg.activations.rules import SIGN, Rule, Side
from lightning_tinykg.activations.storages import Layout, Provenance, is_freed
from lightning_tinykg.activations.widths import Widths

_MAX_DEPTH = 4
"""Ops in a row that are run again at the most."""


class Costs:
    """Counts bytes, and keeps nothing.

    Args:
        books: what is kept already, and so costs nothing more.
        widths: the width of what is rounded.
        provenance: what is the user's, and so costs nothing.
    """

    def __init__(self, books: Books, widths: Widths, provenance: Provenance) -> None:
        self._books = books
        self._widths = widths
        self._provenance = provenance

    def recipe_cost(self, recipe: Recipe, least: int, depth: int = 0) -> float:
        """The bytes it would take to keep what a recipe starts from as well; infinity where that is gone."""
        if depth > _MAX_DEPTH:
            return math.inf
        least = 32 if recipe.pointwise else least
        return sum(self.ingredient_cost(ingredient, least, depth) for ingredient in recipe.ingredients())

    def ingredient_cost(self, ingredient: Ingredient, least: int, depth: int) -> float:
        """The bytes it would take to keep one of them: by its own code, or by its own recipe."""
        tensor = ingredient.tensor()
        if tensor is not None and self.is_free(ingredient, tensor):
            return 0
        least = least if ingredient.floating else 32
        own = self.cost(ingredient, tensor, least)
        if not own or ingredient.recipe is None:
            return own
        return min(own, self.recipe_cost(ingredient.recipe, least, depth + 1))

    def is_free(self, ingredient: Ingredient, tensor: Tensor) -> bool:
        """Whether an ingredient is the user's, and can be referred to: a weight, or an index."""
        return ingredient.weight or (not ingredient.floating and self._provenance.is_users(tensor, (tensor,)))

    def kept_record(self, ingredient: Ingredient, least: int) -> Record | None:
        """The record of an ingredient, if it is kept well enough already."""
        record = self._books.find(ingredient.storage.cdata, ingredient.layout, ingredient.dtype, ingredient.version)
        if record is None or record.bits < least:
            return None
        return None if record.reference is not None and is_freed(record.reference.alias) else record

    def own_cost(self, tensor: Tensor, rule: Rule, least: int) -> int:
        """The bytes of a tensor's own code."""
        if isinstance(rule, Side):
            return tensor.numel() // 8
        if rule is SIGN:
            return tensor.numel() // 4
        return min(self._widths.size(Layout.of(tensor), least), tensor.nbytes) if least < 32 else tensor.nbytes

    def cost(self, ingredient: Ingredient, tensor: Tensor | None, least: int) -> float:
        """The bytes it would take to keep an ingredient as well; infinity where it is gone."""
        if self.kept_record(ingredient, least) is not None:
            return 0
        if tensor is None:
            return math.inf
        layout = Layout.of(tensor)
        if ingredient.floating and least < 32:
            return self._widths.size(layout, least)
        return layout.numel * tensor.itemsize
