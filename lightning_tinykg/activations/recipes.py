"""How a tensor was made: rows gathered from a table, or a short chain of pointwise ops from what is kept anyway.

What can be made again need not be kept. A gather ``x[index]`` restores rows as exact as its table is kept. A pointwise
op (``tanh(x[i] + r[j])``) is run again on **exact** ingredients only, so what it restores is exact as well.

While the forward runs, a recipe holds as little as it can: the table of a gather, which is smaller than the rows and
lives at least as long; everything else by weak reference.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

from lightning_tinykg.activations.storages import Layout, is_freed, is_plain, is_users_weight, storage_id


@dataclass(slots=True, eq=False)
class Ingredient:
    """A tensor that a recipe starts from.

    Attributes:
        find: gives the tensor that it is a view of, or None once that is gone.
        storage: its storage; while this is held, no other storage gets its identity.
        version: version at which it was used.
        shape: its shape.
        stride: its strides.
        offset: its offset.
        dtype: its dtype.
        recipe: how it was made in its turn, if that is known.
        weight: whether it is a parameter or a view of one, which costs nothing to refer to.
    """

    find: Callable[[], Tensor | None]
    storage: StorageWeakRef
    version: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    recipe: Recipe | None
    weight: bool

    @property
    def layout(self) -> Layout:
        """How it lies in its storage."""
        return Layout.at(self.shape, self.stride, self.offset)

    @property
    def floating(self) -> bool:
        """Whether it is a float; if not, it is an index."""
        return self.dtype.is_floating_point

    def tensor(self) -> Tensor | None:
        """The tensor, if it is still there and still what it was."""
        base = self.find()
        if base is None or base._version != self.version or is_freed(base):
            return None
        same = base.shape == self.shape and base.stride() == self.stride and base.storage_offset() == self.offset
        return base if same else base.as_strided(self.shape, self.stride, self.offset)


@dataclass(slots=True, eq=False)
class Recipe:
    """How a tensor was made.

    Attributes:
        op: the op, to be called as in the forward.
        args: its arguments, an :class:`Ingredient` in place of each tensor.
        kwargs: its keyword arguments; no tensor among them.
        pointwise: whether it computes, and so has to start from exact values; if not, it gathers.
        result: the storage of what it made.
        version: the version of what it made.
        shape: the shape of what it made, which was contiguous.
        dtype: the dtype of what it made.
    """

    op: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    pointwise: bool
    result: StorageWeakRef
    version: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def ingredients(self) -> Iterator[Ingredient]:
        """All tensors it starts from."""
        for argument in self.args:
            if isinstance(argument, Ingredient):
                yield argument
            elif isinstance(argument, tuple):
                yield from (item for item in argument if isinstance(item, Ingredient))

    @property
    def computes(self) -> bool:
        """Whether it, or what it starts from, is more than a gather."""
        return self.pointwise or any(i.recipe is not None and i.recipe.computes for i in self.ingredients())


class RecipeBook:
    """The recipes of the tensors that are alive.

    Args:
        min_bytes: what is smaller is not worth a recipe.
    """

    def __init__(self, min_bytes: int) -> None:
        self._min_bytes = min_bytes
        self._recipes: dict[int, Recipe] = {}

    def find(self, tensor: Tensor) -> Recipe | None:
        """How a tensor, or the tensor that it is a view of, was made; None if it is not known or was changed since."""
        recipe = self._recipes.get(storage_id(tensor))
        return recipe if recipe is not None and recipe.version == tensor._version else None

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """An op has run: write down how to repeat it, if it is a gather or a pointwise op."""
        describe = _GATHERS.get(func)
        pointwise = describe is None
        if pointwise and func not in _POINTWISE:
            return
        if self._recipes:
            self._recipes = {key: recipe for key, recipe in self._recipes.items() if not recipe.result.expired()}
        if not self._worth(out):
            return
        described = (func, args, kwargs) if describe is None else describe(args, kwargs)
        if described is None or (pointwise and (kwargs or _autocasts(out))):
            return
        op, op_args, op_kwargs = described
        if any(not is_plain(t) or storage_id(t) == storage_id(out) for t in _tensors(op_args)):
            return
        largest = 0 if pointwise else max(out.nbytes, self._min_bytes)
        made = tuple(self._ingredient(argument, largest) for argument in op_args)
        result = StorageWeakRef(out.untyped_storage())
        recipe = Recipe(op, made, op_kwargs, pointwise, result, out._version, tuple(out.shape), out.dtype)
        if pointwise and not all(i.floating and i.layout.dense for i in recipe.ingredients()):
            return  # restored with other strides, it might take another path through the kernel
        self._recipes[storage_id(out)] = recipe

    def clear(self) -> None:
        """Forget all."""
        self._recipes.clear()

    def _worth(self, out: Any) -> bool:
        """Whether a result is a whole, contiguous tensor on the path of the gradient, and not tiny."""
        return (
            isinstance(out, Tensor)
            and out.requires_grad
            and is_plain(out)
            and out.is_contiguous()
            and out.nbytes >= self._min_bytes
            and out.nbytes == out.untyped_storage().nbytes()
        )

    def _ingredient(self, argument: Any, largest: int) -> Any:
        """What stands for an argument; up to ``largest`` bytes it is held until the result is gone."""
        if isinstance(argument, tuple):
            return tuple(self._ingredient(item, largest) for item in argument)
        if not isinstance(argument, Tensor):
            return argument
        recipe, weight = self.find(argument), is_users_weight(argument)
        base = argument if argument._base is None else argument._base
        find: Callable[[], Tensor | None]
        if weight or argument.nbytes <= largest:
            find = _Strong(argument)
        else:
            find = weakref.ref(base)
        return Ingredient(
            find,
            StorageWeakRef(argument.untyped_storage()),
            argument._version,
            tuple(argument.shape),
            tuple(argument.stride()),
            int(argument.storage_offset()),
            argument.dtype,
            recipe,
            weight,
        )


@dataclass(slots=True, frozen=True, eq=False)
class _Strong:
    tensor: Tensor

    def __call__(self) -> Tensor:
        return self.tensor


def _tensors(args: tuple[Any, ...]) -> Iterator[Tensor]:
    for argument in args:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from _tensors(argument)


def _autocasts(tensor: Tensor) -> bool:
    return torch.is_autocast_enabled(tensor.device.type)


# -- ops --------------------------------------------------------------------------------------------------------

_Described = tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]]


def _index_select(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Described | None:
    names = dict(zip(("input", "dim", "index"), args, strict=False)) | kwargs
    if not isinstance(names["dim"], int):
        return None
    return torch.index_select, (names["input"], names["dim"], names["index"]), {}


def _getitem(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Described | None:
    table, item = args
    items = item if isinstance(item, tuple) else (item,)
    if not any(isinstance(i, Tensor) for i in items):
        return None
    for i in items:
        integers = isinstance(i, Tensor) and i.dtype in (torch.int64, torch.int32)
        if not (integers or i is Ellipsis or isinstance(i, slice)):
            return None
    return torch.Tensor.__getitem__, (table, items), {}


def _embedding(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Described | None:
    names = dict(zip(("input", "weight", "padding_idx", "max_norm"), args, strict=False)) | kwargs
    if names.get("max_norm") is not None:  # it changes the table
        return None
    return functional.embedding, (names["input"], names["weight"]), {}


_GATHERS: dict[Any, Callable[[tuple[Any, ...], dict[str, Any]], _Described | None]] = {
    torch.index_select: _index_select,
    torch.Tensor.index_select: _index_select,
    torch.Tensor.__getitem__: _getitem,
    functional.embedding: _embedding,
}
"""Ops whose result is rows of a table: op -> how to call it again."""

_POINTWISE = {
    getattr(owner, name)
    for owner in (torch, torch.Tensor, functional)
    for name in (
        "add", "sub", "mul", "neg", "exp", "tanh", "sigmoid", "relu", "leaky_relu",
        "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__neg__",
    )
    if hasattr(owner, name)
}  # fmt: skip
"""Cheap, deterministic ops that are worth running again."""
