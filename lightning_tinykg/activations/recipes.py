"""How a tensor was made: a short chain of cheap ops from what is kept anyway, or is far smaller.

What can be made again need not be kept. A gather ``x[index]`` restores rows as exact as its table is kept. What is
computed (``tanh(x[i] + r[j])``) is run again on arguments that are exact enough: see
:mod:`~lightning_tinykg.activations.repeatable`.

While the forward runs, a recipe holds as little as it can: the table of a gather, which is smaller than the rows and
lives at least as long; everything else by weak reference.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_tinykg.activations.repeatable import FLOPS_PER_BYTE, SAME, Repeatable
from lightning_tinykg.activations.storages import Layout, is_freed, storage_id
from lightning_tinykg.activations.values import Value

if TYPE_CHECKING:
    from lightning_tinykg.activations.keeping import Record
    from lightning_tinykg.activations.remaking import Making


@dataclass(slots=True, eq=False)
class Ingredient:
    """A tensor that a recipe starts from.

    Attributes:
        find: gives the tensor, or the one that it is a view of; None once that is gone.
        whole: whether it is no view.
        value: its storage.
        version: version at which it was used.
        layout: how it lies in its storage.
        dtype: its dtype.
        floating: whether it is a float; if not, it is an index or a mask.
        recipe: how it was made in its turn, if that is known.
        free: whether it is the user's, and can be referred to: a parameter or a view of one, an index.
    """

    find: Callable[[], Tensor | None]
    whole: bool
    value: Value
    version: int
    layout: Layout
    dtype: torch.dtype
    floating: bool
    recipe: Recipe | None
    free: bool

    @property
    def lingers(self) -> bool:
        """Whether it would be gone, were it not held for a finer code."""
        return self.find() is None and self.value.raw is not None

    def made_by(self, recipe: Recipe | None, find: Callable[[], Tensor | None], free: bool) -> Ingredient:
        """The same, made by another recipe and found in another way."""
        # by hand: dataclasses.replace takes seven times as long, for each tensor of each step
        return Ingredient(
            find, self.whole, self.value, self.version, self.layout, self.dtype, self.floating, recipe, free
        )

    def source(self) -> Tensor | None:
        """The tensor, or the one that it is a view of, if it is still there and still what it was."""
        base = self.find()
        base = self.value.raw if base is None else base
        if base is None or base._version != self.version or base.dtype is not self.dtype:
            return None
        if self.value.blurred and not self.free:
            return None
        # given other data it is what it was by name only
        return None if storage_id(base) != self.value.storage.cdata or is_freed(base) else base

    def tensor(self) -> Tensor | None:
        """The tensor, if it is still there and still what it was."""
        base, layout = self.source(), self.layout
        if base is None or (self.whole and base is not self.value.raw):
            return base
        return base.as_strided(layout.shape, layout.stride, layout.offset)

    def record(self, least: int) -> Record | None:
        """What is kept of it, if that is exact enough."""
        record = self.value.record(self.layout, self.dtype, self.version)
        if record is None or record.bits < least or record.remade is not None:
            return None
        alias = None if record.reference is None else record.reference.alias
        return None if alias is not None and (is_freed(alias) or alias._version != self.version) else record


@dataclass(slots=True, eq=False)
class Recipe:
    """How a tensor was made.

    Attributes:
        repeatable: the op.
        args: its arguments, an :class:`Ingredient` in place of each tensor.
        kwargs: its keyword arguments; no tensor among them.
        ingredients: all tensors it starts from.
        value: the storage of what it made.
        version: the version of what it made.
        shape: the shape of what it made.
        stride: its strides; None where it was contiguous.
        dtype: the dtype of what it made.
        nbytes: the bytes of what it made.
        autocast: the dtype of the autocast that it ran under; None if it ran under none.
        repeats: whether the op makes the same bits of the same arguments.
        steady: whether it does, and what its arguments are made by.
        makings: by the widths of its ingredients: how it is made again, where a save asks for that; by none: how to the
            last bit, which serves all.
        needs: the widths of its ingredients, by what is asked of it.
        work: the bytes that are moved to run the op again, or the time of a matrix product in these.
        computes: whether it, or what it starts from, is more than a gather.
        computes_itself: whether it is.
        is_negative: whether it makes a negative of what it starts from.
        to_the_bit: what :meth:`as_it_was` has given.
        bare: the same, where none of what it starts from is held.
    """

    repeatable: Repeatable
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    ingredients: list[Ingredient]
    value: Value
    version: int
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None
    dtype: torch.dtype
    nbytes: int
    autocast: torch.dtype | None
    repeats: bool
    steady: bool
    makings: dict[tuple[int, ...], weakref.ref[Making]] = field(default_factory=dict)
    needs: dict[tuple[int, int, bool], tuple[int, ...]] = field(init=False, default_factory=dict)
    work: float = field(init=False)
    computes: bool = field(init=False)
    computes_itself: bool = field(init=False)
    is_negative: bool = field(init=False)
    to_the_bit: Recipe | None = field(init=False, default=None)
    bare: Recipe | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        passes = self.repeatable.passes
        if self.repeatable.adds_up is not None:
            passes += self.repeatable.adds_up(*self.args) / FLOPS_PER_BYTE
        self.work = passes * self.nbytes
        if self.repeatable.reads:
            read = self.ingredients[-1]
            self.work += self.repeatable.reads * read.layout.numel * read.dtype.itemsize
        made = [i.recipe for i in self.ingredients if i.recipe is not None]
        self.computes_itself = self.repeatable.carries is not SAME
        self.computes = self.computes_itself or any(recipe.computes for recipe in made)
        negates = self.repeatable.negates and len(self.ingredients) == 1
        self.is_negative = negates or (not self.computes_itself and any(recipe.is_negative for recipe in made))

    def makes(self, dtype: torch.dtype, version: int) -> bool:
        """Whether it makes the elements of its storage as they are seen, and as they were at that version."""
        return self.version == version and self.dtype is dtype

    def as_it_was(self) -> Recipe | None:
        """What makes it to the last bit: the same, but from what is not made again in any order; None if it is that."""
        if self.steady:
            return self
        if not self.repeats:
            return None
        if self.to_the_bit is None:
            self.to_the_bit = self.starting_from(
                [
                    i if (made := i.recipe) is None else i.made_by(made.as_it_was(), i.find, i.free)
                    for i in self.ingredients
                ],
                steady=True,
                makings={},
            )
        return self.to_the_bit

    def starting_from(
        self, ingredients: list[Ingredient], steady: bool, makings: dict[tuple[int, ...], weakref.ref[Making]]
    ) -> Recipe:
        """The same op, of other ingredients in the place of its own."""
        args = _replaced(self.args, dict(zip(self.ingredients, ingredients, strict=True)))
        return Recipe(
            self.repeatable,
            args,
            self.kwargs,
            ingredients,
            self.value,
            self.version,
            self.shape,
            self.stride,
            self.dtype,
            self.nbytes,
            self.autocast,
            self.repeats,
            steady,
            makings,
        )

    def share(self, nbytes: int) -> float:
        """The share of its work that a part of ``nbytes`` of what it makes takes: all others have the rest."""
        return min(nbytes / max(self.nbytes, 1), 1)

    def text(self, depth: int = 3) -> str:
        """The ops, from tensors ``x`` that are kept (of an index: from indices ``i``); ``...`` for what is deeper."""
        if depth == 0:
            return "..."
        said = [i for i in self.ingredients if i.floating == self.dtype.is_floating_point]
        leaf = "x" if self.dtype.is_floating_point else "i"
        found = [leaf if i.recipe is None else i.recipe.text(depth - 1) for i in said]
        return f"{self.repeatable.name}({', '.join(dict.fromkeys(found))})"


def _replaced(argument: Any, by: dict[Ingredient, Ingredient]) -> Any:
    """An argument with other ingredients."""
    if isinstance(argument, tuple):
        return tuple([_replaced(item, by) for item in argument])
    return by[argument] if isinstance(argument, Ingredient) else argument
