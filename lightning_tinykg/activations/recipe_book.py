"""Writes down how tensors are made, op by op, while the forward runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_tinykg.activations.recipes import Ingredient, Recipe
from lightning_tinykg.activations.repeatable import REPEATABLE, SAME, Repeatable
from lightning_tinykg.activations.storages import Layout, is_plain, ordinary, viewed
from lightning_tinykg.activations.values import Value, Values

_SWEEP = 16
"""Recipes after which those whose result is gone are let go of, at the least; where there are many, a quarter of them,
or the time would grow with their square."""

_CONSTANT = 1024
"""Bytes of what is held for what is made of it, at the most: a number as a tensor, ``torch.tensor(-1e9)``."""


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
        if not repeatable.writes and repeatable.carries is SAME and args and args[0] is out:  # nothing to copy or cast
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

    def write(
        self,
        repeatable: Repeatable,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Tensor,
        *,
        within: bool = False,
    ) -> None:
        """Write down how a tensor was made.

        Args:
            repeatable: the op.
            args: its arguments: tensors, tuples of them, what is kept of a tensor already, anything else.
            kwargs: its keyword arguments; no tensor among them.
            out: what it made, a plain tensor.
            within: whether another op has run it: that one's arguments are what autocast casts.
        """
        if out.nbytes != out.untyped_storage().nbytes() or not Layout.of(out).dense:
            return
        value = self._values.of(out)
        if value.blurred:
            return
        most = _CONSTANT if repeatable.table is None else max(out.nbytes, self._min_bytes)
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
        casts = not within and repeatable.carries is not SAME  # what picks or copies casts nothing
        if casts and torch.is_autocast_enabled(device):
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
