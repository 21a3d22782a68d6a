"""What it would take to keep a tensor: its own code, or what it can be made again from; in bytes, and in work."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from lightning_tinykg.activations.counted import Counted
from lightning_tinykg.activations.keeping import Record
from lightning_tinykg.activations.precision import Precision
from lightning_tinykg.activations.recipes import Ingredient, Recipe
from lightning_tinykg.activations.repeatable import COPIED
from lightning_tinykg.activations.rules import SIGN, Rule, Side
from lightning_tinykg.activations.storages import Layout, in_32_bits
from lightning_tinykg.activations.values import Value
from lightning_tinykg.activations.widths import Widths


class Worth(NamedTuple):
    """What work is done to save memory.

    Attributes:
        per_byte: bytes of work that saving one byte is worth.
        passes: bytes of work for each byte of a tensor that is made again, at the most.
    """

    per_byte: float
    passes: float


RECOMPUTE = {"off": Worth(0, 0), "cheap": Worth(96, 20), "aggressive": Worth(1000, 1000)}
"""By setting: what work is done. Twenty passes are three narrow layers
with their activations, or one that adds up two."""


_MOST_COUNTED = 256
"""Recipes and tensors to look at, at the most."""

DEEPEST = 32
"""Ops that a tensor is made of one after another, at the most: each is some calls deep in the backward."""


class Cost(NamedTuple):
    """What a form takes.

    Attributes:
        nbytes: bytes that are kept for it and not kept yet; infinity where it is impossible.
        work: bytes that are moved to make the tensor again.
        finer: of the bytes, those for 8 bits of what is kept in fewer and held: they are no reason against the work.
    """

    nbytes: float
    work: float
    finer: float = 0


class Judging(NamedTuple):
    """What a decision is judged by, and what follows from it too.

    Attributes:
        picked: bytes that are paid for what is picked of it.
        computed: bytes that are paid for what is computed of it.
        deeply: whether what it starts from is computed again wherever that is worth the bytes.
    """

    picked: int = 0
    computed: int = 0
    deeply: bool = True

    def worth_of(self, computed: bool) -> int:
        """The bytes, of what is computed or of what is picked."""
        return self.computed if computed else self.picked


_FREE = Cost(0, 0)
_IMPOSSIBLE = Cost(math.inf, 0)


class Costs:
    """Counts, and keeps nothing.

    Args:
        widths: the width of what is rounded.
        recompute: a key of :data:`RECOMPUTE`.

    Attributes:
        judging: what the last decision was judged by.
        wanted: what it would have been made of, had it not been for its own code: by number, by whom, and the bytes.
        precision: how exact it has to be made.
    """

    def __init__(self, widths: Widths, recompute: str) -> None:
        self.judging = Judging()
        self.wanted: list[tuple[int, object, int]] = []
        self.precision = Precision(widths)
        self._widths = widths
        self._worth = RECOMPUTE[recompute]
        # what the cost that is being counted would be paid for; whether something is computed of it
        self._paid_for: list[tuple[Value, bool]] = []

    def of_remaking(self, recipe: Recipe, tensor: Tensor, rule: Rule, least: int, own_least: int) -> Cost | None:
        """What it takes to make a tensor again.

        Args:
            recipe: how.
            tensor: the tensor.
            rule: what its backward needs of it.
            least: the width that what is made is to be worth.
            own_least: the least width of its own code.

        Returns:
            The cost; None where its own code is better.
        """
        least, own_least = self._widths.judged(least), self._widths.judged(own_least)
        record = recipe.value.record(Layout.of(tensor), tensor.dtype, tensor._version)
        if record is not None and record.bits >= self._exact_enough(own_least):  # it is kept already
            return None
        copied = recipe.repeatable is COPIED  # an argument's code may serve others too, so it is as good as its own
        if copied and (argument := recipe.ingredients[0]).recipe is not None and not argument.free:
            original = argument.tensor()
            if original is not None:  # what that is made of is wanted as much as if it were saved itself
                self.of_remaking(argument.recipe, original, rule, least, own_least)
        # What is computed again is mostly as exact as 8 bits would be, and so worth what these would take. By what
        # fewer take, each tensor of a chain is cheaper in a code of its own, and all of them are dearer than at 8 bits.
        coarser = self.coded(record, Layout.of(tensor), tensor.itemsize)  # which it replaces
        own = self.own_cost(tensor, rule, own_least) - coarser
        worth = paid = self.own_cost(tensor, rule, max(own_least, 8)) - coarser if recipe.computes else own
        for deeply in (True, False):
            self.judging = Judging(own, paid, deeply)
            self._paid_for.clear()
            cost = self.of_recipe(recipe, least, worth + copied)
            if not recipe.computes_itself and cost.work == recipe.work:  # it is picked from what is kept
                worth = own
            work = recipe.share(tensor.nbytes) * cost.work
            if (copied and cost.nbytes <= own) or (
                cost.nbytes < worth
                and self.is_worth(work, worth - cost.nbytes + cost.finer, in_32_bits(tensor.nbytes, tensor.dtype))
            ):
                return Cost(cost.nbytes, work)
            if recipe.computes_itself or cost.nbytes >= worth:
                break
            # where it is too much work to compute what rows are picked from, that may have codes of its own
        if self.is_worth(work, worth, in_32_bits(tensor.nbytes, tensor.dtype)):  # if only what it is made of were kept
            want = object()
            for value, computed in dict.fromkeys(self._paid_for):
                value.wanted[want] = self.judging.worth_of(computed)
                self.wanted.append((value.number, want, value.wanted[want]))
        return None

    def of_what_there_is(self, ingredient: Ingredient, least: int, *, computed: bool, depth: int) -> Cost:
        """What it takes to have an ingredient that is still there: no work, if it is kept."""
        return self.of_ingredient(ingredient, least, math.inf, computed=computed, depth=depth)

    def of_nothing_more(self, recipe: Recipe, layout: Layout, least: int, own: int, nbytes: int) -> Cost | None:
        """What it takes to make a tensor again of what is kept already.

        Args:
            recipe: how.
            layout: the run of its elements that is made.
            least: the width that it is to be worth.
            own: the bytes that this saves.
            nbytes: of the tensor, in 32 bits.

        Returns:
            The cost; None if it is too much work, or if something more would have to be kept.
        """
        cost = self.of_recipe(recipe, self._widths.judged(least), 1)
        work = recipe.share(layout.numel * recipe.dtype.itemsize) * cost.work
        return Cost(0, work) if cost.nbytes == 0 and self.is_worth(work, own, nbytes) else None

    def of_recipe(
        self,
        recipe: Recipe,
        least: int,
        most: float,
        counted: Counted | None = None,
        *,
        computed: bool = False,
        depth: int = 0,
    ) -> Cost:
        """What a recipe takes.

        Args:
            recipe: the recipe.
            least: the width that what it makes is to be worth.
            most: bytes above which it is of no use.
            counted: what has been counted already, and costs nothing more; what this takes is added.
            computed: whether something is computed of what it makes.
            depth: how many ops one after another are to follow.
        """
        counted = counted or Counted()
        computed = computed or recipe.computes_itself
        if counted.amounts.get(recipe, 0) >= least:
            return _FREE
        if depth >= DEEPEST:
            return _IMPOSSIBLE
        mark = len(counted.before)
        counted.add(recipe, least)
        nbytes, work, finer = 0.0, recipe.work, 0.0
        for ingredient, needed in zip(recipe.ingredients, self.precision.of_ingredients(recipe, least), strict=True):
            cost = self.of_ingredient(ingredient, needed, most - nbytes, counted, computed=computed, depth=depth)
            nbytes += cost.nbytes
            work += cost.work
            finer += cost.finer
            if nbytes >= most or len(counted.before) > _MOST_COUNTED:
                counted.undo(mark)
                return _IMPOSSIBLE
        return Cost(nbytes, work, finer)

    def of_ingredient(
        self,
        ingredient: Ingredient,
        least: int,
        most: float,
        counted: Counted | None = None,
        *,
        computed: bool,
        depth: int,
    ) -> Cost:
        """What one of them takes: nothing, its own code, or its own recipe."""
        if ingredient.free and ingredient.source() is not None:  # most are, and that is asked first
            return _FREE
        counted = counted or Counted()
        least = least if ingredient.floating else 32
        if self.kept(ingredient, least) is not None:
            return _FREE
        gone = ingredient.source() is None
        # what has been counted may be another view of it, which is of no use to one that is gone
        if not gone and counted.amounts.get(_run(ingredient), 0) >= least:
            return _FREE
        own = worth = math.inf
        finer = 0.0
        recipe, wants = ingredient.recipe, list[object]()
        if not gone:  # a coarser code that there is would be replaced
            layout, itemsize, record = ingredient.layout, ingredient.dtype.itemsize, ingredient.record(1)
            coded = self.coded(record, layout, itemsize)
            own = worth = self._code(layout, itemsize, least) - coded
            if self.judging.deeply and recipe is not None and recipe.computes:  # as of what is asked for: worth 8 bits
                worth = self._code(layout, itemsize, max(least, 8)) - coded
            # Each relation's sums alone are not worth keeping the table they are made of, all together are. So what was
            # kept in its stead counts for it, where it is not far larger than any of them, and little is lost if it is
            # not asked for again; and not for another of what they are made of once more.
            if own <= 2 * self.judging.worth_of(computed):
                for want, saves in ingredient.value.wanted.items():
                    if own > 0 and not counted.amounts.get(want):
                        own = max(own - saves, 0)
                        wants.append(want)
            if computed and coded and ingredient.lingers:
                finer = min(own, self.coded(record, layout, itemsize, least) - coded)
            worth = worth if self.judging.deeply else own
        most = min(worth, most)
        # if it is gone, there is no choice, and the work is judged by what it is for
        if recipe is not None and most > 0:
            nbytes = in_32_bits(recipe.nbytes, recipe.dtype)
            share = recipe.share(ingredient.layout.numel * ingredient.dtype.itemsize)
            if gone or self.is_worth(share * recipe.work, worth, nbytes):
                mark = len(counted.before)
                cost = self.of_recipe(recipe, least, most, counted, computed=computed, depth=depth + 1)
                work = counted.work_of_part(recipe, share, cost.work)
                if cost.nbytes < most and (gone or self.is_worth(work, worth - cost.nbytes + cost.finer, nbytes)):
                    return cost._replace(work=work)
                counted.undo(mark)
        if not gone:
            self._paid_for.append((ingredient.value, computed))
            for want in wants:
                counted.add(want, 1)
            counted.add(_run(ingredient), least)
        return Cost(own, 0, finer)

    def is_worth(self, work: float, saved: float, nbytes: int) -> bool:
        """Whether work is worth the bytes that it saves, of a tensor of ``nbytes``."""
        return work <= min(self._worth.per_byte * saved, self._worth.passes * nbytes)

    def kept(self, ingredient: Ingredient, least: int) -> Record | None:
        """What is kept of an ingredient, if that will do: in a plan of saves, rounded to whatever that says."""
        return ingredient.record(self._exact_enough(least))

    def _exact_enough(self, least: int) -> int:
        return 1 if self._widths.literal and least < 32 else least

    def coded(self, record: Record | None, layout: Layout, itemsize: int, needed: int = 1) -> int:
        """The bytes of the code that there is in a record, or of one in 8 bits, if as many are needed."""
        if record is None or record.value is None:
            return 0
        return self._code(layout, itemsize, self._widths.judged(max(record.bits, min(needed, 8))))

    def own_cost(self, tensor: Tensor, rule: Rule, least: int) -> int:
        """The bytes of a tensor's own code."""
        if isinstance(rule, Side):
            return tensor.numel() // 8
        if rule is SIGN:
            return tensor.numel() // 4
        return self._code(Layout.of(tensor), tensor.itemsize, least)

    def _code(self, layout: Layout, itemsize: int, least: int) -> int:
        raw = layout.numel * itemsize
        if least == 32:
            return raw
        return min(self._widths.size(layout, least), raw)


def _run(ingredient: Ingredient) -> tuple[object, ...]:
    """The run of elements that it is: other parts of its storage have codes of their own."""
    return ingredient.value, ingredient.version, ingredient.layout.offset, ingredient.layout.numel
