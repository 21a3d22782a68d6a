"""Follows recipes: decides what is made again, and keeps what that starts from."""

from __future__ import annotations

import weakref
from contextlib import suppress
from typing import Any

from torch import Tensor

from lightning_tinykg.activations.books import Books
from lightning_tinykg.activations.costs import DEEPEST, Costs
from lightning_tinykg.activations.decisions import Decider
from lightning_tinykg.activations.forms import Forms
from lightning_tinykg.activations.hindsight import Hindsight
from lightning_tinykg.activations.keeping import Coded, Kept, Reference, Saved
from lightning_tinykg.activations.ledger import Entry
from lightning_tinykg.activations.recipe_book import RecipeBook
from lightning_tinykg.activations.recipes import Ingredient, Recipe
from lightning_tinykg.activations.remaking import Making, Remade
from lightning_tinykg.activations.repeatable import ROWS
from lightning_tinykg.activations.rules import ANGLE, EXACT, SIGN, SMOOTH, Need, Rule
from lightning_tinykg.activations.storages import Layout
from lightning_tinykg.activations.values import Values
from lightning_tinykg.activations.widths import Widths
from lightning_tinykg.activations.within import Made, dropped, made_within
from lightning_tinykg.codecs.affine import FINE_BITS


class Follower:
    """Follows the recipes of one forward.

    Args:
        recipes: how tensors were made.
        costs: what it takes to make them again.
        decider: decides by that.
        forms: makes the codes of what they start from.
        books: who pays for these.
        widths: in how many bits.
        values: the storages.
    """

    def __init__(
        self,
        recipes: RecipeBook,
        costs: Costs,
        decider: Decider,
        forms: Forms,
        books: Books,
        widths: Widths,
        values: Values,
    ) -> None:
        self.recipes = recipes
        self._values = values
        self._costs = costs
        self._forms = forms
        self._books = books
        self._widths = widths
        self._decider = decider
        self._hindsight = Hindsight(costs, decider, widths, books)

    def finish(self) -> None:
        """The forward is over: nothing will use its results any more, and all that is kept is known."""
        self._hindsight.look_back(self._follow_if_it_can_be)

    def _follow_if_it_can_be(self, recipe: Recipe, least: int, layout: Layout, entry: Entry) -> Remade | None:
        with suppress(_Gone):
            return self._follow(recipe, least, layout, entry)
        return None

    def make_exactly(self, saved: Saved, result: Tensor, entry: Entry) -> None:
        """An op is to blow up the error of a result, whose save is made again of what is rounded: not any more.

        It is made of what is exact or, if that takes more, or what it was made of is gone, kept itself.

        Args:
            saved: the save.
            result: the result, or the tensor that it is a view of.
            entry: the save's.
        """
        remade = saved.kept
        if not isinstance(remade, Remade) or remade.making.exact or result._version != saved.version:
            return
        layout = remade.layout
        result = result.as_strided(layout.shape, layout.stride, layout.offset)
        exactly = self.remade(result, EXACT, 32, entry, computes=True, steady=True)
        if exactly is None:
            entry.recipe, entry.work = "", 0
            exactly = self._forms.value(result, 32, entry)
        remade.making.saves -= 1
        saved.fill(exactly)

    def observe_dropout(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        """A dropout has run, and its mask is kept."""
        x = args[0] if args else kwargs.get("input")
        if isinstance(x, Tensor):
            self.write(dropped(x, out.grad_fn, out))

    def write(self, made: Made | None) -> None:
        """Write down how an op has made a tensor within, if that is known and can be done as it was."""
        if made is not None and not (made[0].rounds and self._widths.bits == 32):
            self.recipes.write(*made, within=True)

    def observe_within(self, op: str, node: Any, attribute: str, tensor: Tensor, given: Any) -> None:
        """An op has saved a tensor that it may have made for itself: write down how."""
        if self.recipes.find(tensor) is None:
            self.write(made_within(op, node, attribute, tensor, *given))

    def remade(
        self,
        tensor: Tensor,
        rule: Rule,
        least: int,
        entry: Entry,
        computes: bool,
        steady: bool = False,
        own: int | None = None,
    ) -> Kept | None:
        """How to make the tensor again, where that is the cheapest form.

        Args:
            tensor: the tensor.
            rule: what its backward needs of it.
            least: the width that what is made is to be worth.
            entry: where to write down how.
            computes: whether it may be computed again, and not only gathered.
            steady: whether it has to be what it was to the last bit.
            own: the width that its own code would have; None: ``least``.
        """
        recipe = self.recipes.find(tensor)
        if recipe is None or (recipe.computes and not computes):
            return None
        if steady and (recipe := recipe.as_it_was()) is None:
            return None
        own = own or least
        bends = rule is SMOOTH and recipe.repeatable.carries is not ROWS  # which is as exact as its argument is
        if rule is ANGLE:  # it is rounded by the turn, which what it is made of is not
            least = 32
        elif bends and least > 4 and recipe.computes and not self._widths.literal:
            least = max(least, FINE_BITS)  # what enters a function that bends: as exact as 8 bits of itself
        if (cost := self._decider.of_remaking(recipe, tensor, rule, least, own)) is None:
            if isinstance(rule, Need) and rule is not SIGN:
                self._hindsight.note(recipe, tensor, least)
            return None
        entry.codec = "recipe" if recipe.computes else "gather"
        entry.recipe, entry.work = recipe.text(), int(cost.work)
        self._values.begin_use()  # it has been counted on
        try:
            kept = self._follow(recipe, least, Layout.of(tensor), entry)
        except _Gone:
            entry.recipe, entry.work = "", 0
            return None
        finally:
            self._values.end_use()
        return kept

    def bytes_exactly(self, tensor: Tensor, own: int) -> float:
        """The bytes to keep a tensor to the last bit: ``own``, or fewer, of what it can be made of again."""
        recipe = self.recipes.find(tensor)
        recipe = None if recipe is None else recipe.as_it_was()
        return own if recipe is None else min(self._costs.of_recipe(recipe, 32, own).nbytes, own)

    def _follow(
        self, recipe: Recipe, least: int, layout: Layout, entry: Entry, *, computed: bool = False, depth: int = 0
    ) -> Remade:
        """Keep all that a recipe starts from; every save of what it makes follows it together.

        Args:
            recipe: the recipe.
            least: the width that what it makes is to be worth.
            layout: how the save lies on that.
            entry: whose it is.
            computed: whether something is computed of it.
            depth: how many ops one after another that is.

        Raises:
            _Gone: if there is no way to something that it starts from.
        """
        if depth >= DEEPEST:
            raise _Gone
        widths = self._costs.precision.of_ingredients(recipe, least)
        # where it is asked for what is rounded, each save follows for itself, so that its place is noted
        making = self._noted(recipe, widths, DEEPEST - depth) if self._forms.rounded is None else None
        if making is None:
            needs = dict(zip(recipe.ingredients, widths, strict=True))
            args = self._argument(recipe.args, needs, entry, computed or recipe.computes_itself, depth)
            op = recipe.repeatable.op
            making = Making(op, args, recipe.kwargs, recipe.shape, recipe.stride, recipe.dtype, recipe.autocast)
            recipe.makings[() if making.exact else widths] = weakref.ref(making)
        return Remade(making, layout)

    @staticmethod
    def _noted(recipe: Recipe, widths: tuple[int, ...], deepest: int) -> Making | None:
        """How it is made again for another save: to the last bit, or of the same widths."""
        for key in ((), widths):
            noted = recipe.makings.get(key)
            making = None if noted is None else noted()
            if making is not None and making.depth <= deepest:
                return making
        return None

    def _argument(self, argument: Any, needs: dict[Ingredient, int], entry: Entry, computed: bool, depth: int) -> Any:
        """What is kept in an argument's place: of tensors a form, of tuples what is in them, all else itself."""
        if isinstance(argument, tuple):
            return tuple([self._argument(item, needs, entry, computed, depth) for item in argument])
        if not isinstance(argument, Ingredient):
            return argument
        return self._ingredient(argument, needs[argument], entry, computed, depth)

    def _ingredient(self, ingredient: Ingredient, least: int, entry: Entry, computed: bool, depth: int) -> Kept:
        """Keep one ingredient: by reference if it is free, else in an entry of its own, or by its own recipe.

        Raises:
            _Gone: if it is needed and there is no way to it.
        """
        tensor, layout = ingredient.tensor(), ingredient.layout
        least = least if ingredient.floating else 32
        record = self._costs.kept(ingredient, least)
        if tensor is not None and ingredient.free:
            record = self._books.record(tensor, layout)
            if record.bits < 32:
                record.reference, record.bits = Reference.to(layout.run(tensor), entry.op), 32
        elif record is None:
            if tensor is None or self._decider.is_made_again(ingredient, least, computed=computed, depth=depth):
                if ingredient.recipe is None:
                    raise _Gone
                return self._follow(ingredient.recipe, least, layout, entry, computed=computed, depth=depth + 1)
            name = f"{entry.op} {'from' if ingredient.floating else 'index'}"
            record = self._forms.value(tensor, least, self._books.enter(entry.module, name, "", tensor)).record
        if record.reference is not None:
            self._books.lend(record)
        self._forms.note_rounded(record, layout, ingredient.dtype, entry)
        return Coded(record, layout)


class _Gone(Exception):
    """What something was to be made of was let go of while the rest of it was kept: it is kept itself instead."""
