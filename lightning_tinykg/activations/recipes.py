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
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_tinykg.activations.repeatable import FLOPS_PER_BYTE, REPEATABLE, SAME, Repeatable
from lightning_tinykg.activations.storages import Layout, is_freed, is_plain, ordinary, storage_id, viewed
from lightning_tinykg.activations.values import Value, Values

if TYPE_CHECKING:
    from lightning_tinykg.activations.keeping import Record
    from lightning_tinykg.activations.remaking import Making

_SWEEP = 16
"""Recipes after which those whose result is gone are let go of, at the least; where there are many, a quarter of them,
or the time would grow with their square."""


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
            kept = {i: i if i.recipe is None else replace(i, recipe=i.recipe.as_it_was()) for i in self.ingredients}
            args, ingredients = replaced(self.args, kept), list(kept.values())
            self.to_the_bit = replace(self, args=args, ingredients=ingredients, steady=True, makings={})
        return self.to_the_bit

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


def replaced(argument: Any, by: dict[Ingredient, Ingredient]) -> Any:
    """An argument with other ingredients."""
    if isinstance(argument, tuple):
        return tuple([replaced(item, by) for item in argument])
    return by[argument] if isinstance(argument, Ingredient) else argument


class RecipeBook:
    """Writes the recipes down, with the storages of what they made.

    Args:
        values: the storages.
        min_bytes: what is smaller is not worth a recipe.
    """

    def __init__(self, values: Values, min_bytes: int) -> None:
        self._values = values
        self._min_bytes = min_bytes
        self._noted: list[Value] = []
        self._until_sweep = _SWEEP

    def find(self, tensor: Tensor) -> Recipe | None:
        """How a tensor, or the tensor that it is a view of, was made; None if it is not known or was changed since.

        Nor is it known of a tensor that sees the elements as others, such as ``view_as_complex``.
        """
        value = self._values.known(tensor)
        recipe = None if value is None else value.recipe
        return recipe if recipe is not None and recipe.makes(tensor.dtype, tensor._version) else None

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, exactly: bool) -> None:
        """An op has run: write down how to repeat it, if that can be done; ``exactly``: to the last bit."""
        repeatable = REPEATABLE.get(func)
        if repeatable is None or not is_plain(out) or out.nbytes < self._min_bytes:
            return
        if exactly and repeatable.rounds:
            return
        if repeatable.carries is SAME and args and args[0] is out:  # there was nothing to copy or to cast
            return
        if repeatable.onto_zeros and not (args and self._is_zeros(args[0], out)):
            return
        described = repeatable.describe(args, kwargs)
        if described is not None:
            self.write(repeatable, *described, out)

    def _is_zeros(self, tensor: Any, out: Tensor) -> bool:
        """Whether a tensor is zeros, or was before an op in place made a result of it."""
        value = self._values.known(tensor) if is_plain(tensor) else None
        recipe = None if value is None else value.recipe
        if recipe is None or recipe.repeatable.op is not torch.zeros:
            return False
        return bool(recipe.version == tensor._version - (tensor is out))

    def write(self, repeatable: Repeatable, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        """Write down how a tensor was made.

        Args:
            repeatable: the op.
            args: its arguments: tensors, tuples of them, what is kept of a tensor already, anything else.
            kwargs: its keyword arguments; no tensor among them.
            out: what it made, a plain tensor.
        """
        if out.nbytes != out.untyped_storage().nbytes() or not Layout.of(out).dense:
            return
        value = self._values.of(out)
        if value.blurred:
            return
        most = 0 if repeatable.table is None else max(out.nbytes, self._min_bytes)
        ingredients: list[Ingredient] = []
        try:
            made = tuple([self._argument(argument, most, ingredients, out) for argument in args])
        except _NoIngredient:
            return
        repeats = steady = repeatable.repeats(out)
        for ingredient in ingredients:
            if ingredient.recipe is not None and not ingredient.recipe.steady:
                if repeatable.jumps:  # it wants what the forward had
                    ingredient.recipe = None
                steady = steady and repeatable.jumps
            if ingredient.value is value and ingredient.version == out._version:  # a view
                return
        if not ingredients:  # what a context has as default may be other in the backward
            kwargs = kwargs | {"dtype": out.dtype, "device": out.device, "requires_grad": False}
        device, autocast = out.device.type, None
        if torch.is_autocast_enabled(device) and repeatable.carries is not SAME:  # what picks or copies casts nothing
            autocast = torch.get_autocast_dtype(device)
        if value.users is None and out.grad_fn is not None:
            value.users = False  # an op has made it just now; without a history it is a leaf that the user has
        value.recipe = Recipe(
            repeatable,
            made,
            kwargs,
            ingredients,
            value,
            out._version,
            out.shape,
            None if out.is_contiguous() else out.stride(),
            out.dtype,
            out.nbytes,
            autocast,
            repeats,
            steady,
        )
        self._values.work += value.recipe.work
        self._noted.append(value)
        self._until_sweep -= 1
        if self._until_sweep == 0:
            self._sweep()

    def _sweep(self) -> None:
        alive = []
        for value in self._noted:
            if value.storage.expired():
                value.recipe = None
            else:
                alive.append(value)
        self._values.alive = len(alive)
        self._noted, self._until_sweep = alive, max(_SWEEP, len(alive) // 4)

    def _argument(self, argument: Any, most: int, ingredients: list[Ingredient], out: Tensor) -> Any:
        """What stands for an argument; a tensor of up to ``most`` bytes is held until the result is gone.

        What the op has written over is not what it was, but how that was made is known, or what was kept of it.

        Raises:
            _NoIngredient: if it can't be restored.
        """
        if not isinstance(argument, Tensor):
            if isinstance(argument, tuple):
                return tuple([self._argument(item, most, ingredients, out) for item in argument])
            return argument
        dtype = argument.dtype
        if dtype.is_complex or not (is_plain(argument) or is_plain(argument := ordinary(argument))):
            raise _NoIngredient
        version = argument._version - (argument is out)
        value = self._values.of(argument)
        floating = dtype.is_floating_point
        recipe = value.recipe
        if recipe is not None and not recipe.makes(dtype, version):
            recipe = None
        free = self._values.is_users(argument, None if floating else (argument,), value)
        if value.blurred and not free:
            raise _NoIngredient
        base = viewed(argument)
        if base.dtype != dtype:  # seen as other elements: view_as_real
            base = argument
        find: Callable[[], Tensor | None]
        if free or (most and argument.nbytes <= most):
            find, base = _Strong(argument), argument
        else:
            find = weakref.ref(base)
        layout, whole = Layout.of(argument), base is argument
        ingredient = Ingredient(find, whole, value, version, layout, dtype, floating, recipe, free)
        ingredients.append(ingredient)
        return ingredient


class _NoIngredient(Exception):
    """An argument is no plain tensor, or one of no known version: what is made of it can't be made again."""


@dataclass(slots=True, frozen=True, eq=False)
class _Strong:
    tensor: Tensor

    def __call__(self) -> Tensor:
        return self.tensor
