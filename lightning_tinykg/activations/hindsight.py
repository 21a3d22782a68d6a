"""What turns out not to be needed, once all is kept: it is made again after all, of what was kept after it.

A layer of KGAT saves ``h + a`` before it saves ``h`` and ``a``, to multiply them. When the first is saved, two tensors
would have to be kept to make it again; when the forward is over they are, and its own code can go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from lightning_tinykg.activations.books import Books
from lightning_tinykg.activations.costs import Costs
from lightning_tinykg.activations.decisions import Decider
from lightning_tinykg.activations.keeping import AsComplex, Coded, Record
from lightning_tinykg.activations.ledger import Entry
from lightning_tinykg.activations.recipes import Recipe
from lightning_tinykg.activations.remaking import Making, Remade
from lightning_tinykg.activations.storages import Layout, in_32_bits
from lightning_tinykg.activations.values import Value
from lightning_tinykg.activations.widths import Widths

_DEEPEST = 16
"""Ops that a tensor is made of one after the other, at the most."""


class _Candidate(NamedTuple):
    """A tensor that has a code of its own.

    Attributes:
        recipe: how it was made, of nothing but what may be kept.
        layout: the run of its elements.
        least: the width that it is to be worth if it is made again.
        bits: the width that was asked for where it was saved.
        literal: whether a plan named it.
        nbytes: of the tensor, in 32 bits.
    """

    recipe: Recipe
    layout: Layout
    least: int
    bits: int
    literal: bool
    nbytes: int


class Hindsight:
    """Looks at what got codes of its own in one forward, when that is over.

    It decides as when they were saved, but nothing more is kept for it. What one tensor is made of then keeps its own
    code. A candidate holds none of the forward's tensors.

    Args:
        costs: what is worth its work.
        decider: decides.
        widths: in how many bits.
        books: who pays.
    """

    def __init__(self, costs: Costs, decider: Decider, widths: Widths, books: Books) -> None:
        self._costs = costs
        self._decider = decider
        self._widths = widths
        self._books = books
        self._candidates: list[_Candidate] = []

    def note(self, recipe: Recipe, tensor: Tensor, least: int) -> None:
        """A tensor gets a code of its own, since what it is made of is not kept, or not yet.

        Args:
            recipe: how it was made.
            tensor: the tensor.
            least: the width that it is to be worth if it is made again.
        """
        layout, nbytes = Layout.of(tensor), in_32_bits(tensor.nbytes, tensor.dtype)
        if layout.dense and self._costs.is_worth(recipe.work, nbytes, nbytes):
            bits, literal = self._widths.bits, self._widths.literal
            self._candidates.append(_Candidate(_bare(recipe), layout, least, bits, literal, nbytes))

    def look_back(self, follow: Callable[[Recipe, int, Layout, Entry], Remade | None]) -> None:
        """The forward is over: let go of codes whose tensors can be made of others.

        Args:
            follow: keeps what a recipe starts from: it, the width, the run that is made, and whose it is. None if
                something of that is gone.
        """
        widest: dict[Record, _Candidate] = {}
        for candidate in self._candidates:
            recipe = candidate.recipe
            record = recipe.value.record(candidate.layout, recipe.dtype, recipe.version)
            if record is not None and (record not in widest or widest[record].least < candidate.least):
                widest[record] = candidate
        self._candidates.clear()
        needed: set[Record] = set()
        for record, candidate in widest.items():
            recipe, layout, entry = candidate.recipe, candidate.layout, record.entry
            if record in needed or entry is None or not self._would_be_gone(record, recipe.value):
                continue
            least = max(candidate.least, record.asked)  # something that is made of it may have asked for more
            if least == 32 and not recipe.steady:
                continue
            self._widths.turn_back(candidate.bits, candidate.literal)
            own = self._costs.coded(record, layout, recipe.dtype.itemsize) or candidate.nbytes
            cost = self._decider.of_nothing_more(recipe, layout, least, own, candidate.nbytes)
            run = Layout.at((layout.numel,), (1,), layout.offset)
            if cost is not None and (remade := follow(recipe, least, run, entry)) is not None:
                needed.update(records_in(remade))
                self._books.let_go(record, recipe.value, remade, recipe.text(), cost.work)

    def _would_be_gone(self, record: Record, value: Value) -> bool:
        """Whether it takes memory that nobody else holds."""
        if record.stays:
            return False
        if record.reference is None:
            return record.value is not None
        others = [other for other in value.records if other is not record and other.reference is not None]
        return not others and value.users is False and not self._books.is_held(value)


def _bare(recipe: Recipe, depth: int = _DEEPEST) -> Recipe:
    """The same, but of what it starts from only the user's own is held."""
    if recipe.bare is None:
        ingredients = []
        for i in recipe.ingredients:
            free = i.free or i.value.users is True  # which may not have been known when it was first used
            made = None if i.recipe is None or not depth else _bare(i.recipe, depth - 1)
            ingredients.append(i.made_by(made, i.find if free else _nothing, free))
        recipe.bare = recipe.starting_from(ingredients, recipe.steady, recipe.makings)
    return recipe.bare


def _nothing() -> None:
    return None


def records_in(kept: Any) -> Iterator[Record]:
    """What something is made of. Of many things one makes parts, so each is looked into once."""
    parts, seen = [kept], set[Making]()
    while parts:
        part = parts.pop()
        if isinstance(part, Coded):
            yield part.record
        elif isinstance(part, AsComplex):
            parts.append(part.kept)
        elif isinstance(part, tuple):
            parts.extend(part)
        elif isinstance(part, Remade) and part.making not in seen:
            seen.add(part.making)
            parts.extend(part.making.args)
