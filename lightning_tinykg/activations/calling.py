"""How to call an op again: by what it was called with, with all tensors in positional arguments.

And what these tell of the call: how many elements are normalized together, how many products are added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Call = tuple[tuple[Any, ...], dict[str, Any]]
Describe = Callable[[tuple[Any, ...], dict[str, Any]], Call | None]
"""What to call it with; None if it can't be called again."""


def as_called(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """As it was, where no tensor is given by name."""
    return None if any(isinstance(value, Tensor) for value in kwargs.values()) else (args, kwargs)


def anew(place: int) -> Describe:
    """Of an activation that may write over its argument, as ``inplace`` at this place says: without that."""

    def describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        return as_called(args[:place], {name: value for name, value in kwargs.items() if name != "inplace"})

    return describe


def in_place(describe: Describe) -> Describe:
    """Of an op that writes over its first argument: as its like that does not, if that casts nothing."""

    def described(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        floats = {a.dtype for a in args if isinstance(a, Tensor) and (a.is_floating_point() or a.is_complex())}
        return describe(args, kwargs) if len(floats) == 1 else None

    return described


def folded(describe: Describe) -> Describe:
    """Of a matrix product: a batch that does not lie in order is one product only where it needs a gradient."""

    def described(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        factors = [argument for argument in args[:2] if isinstance(argument, Tensor)]
        otherwise = any(x.dim() > 2 and not x.is_contiguous() for x in factors) and min(x.dim() for x in factors) <= 2
        return None if otherwise else describe(args, kwargs)

    return described


def rows_that_need_a_gradient(*names: str) -> Describe:
    """Of a linear layer, as :func:`by_name`: of rows that don't lie in order it is one product where they need one."""
    describe = by_name(*names)

    def described(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        call = describe(args, kwargs)
        x = None if call is None else call[0][0]
        folds = isinstance(x, Tensor) and (x.dim() < 3 or x.is_contiguous() or x.requires_grad)
        return call if folds else None

    return described


def by_name(*names: str) -> Describe:
    """Positional arguments throughout, missing ones at the end left out, those between None."""

    def describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        if not kwargs:
            return args, kwargs
        if not kwargs.keys() <= set(names):
            return None
        last = max(names.index(name) for name in kwargs)
        return (*args, *(kwargs.get(name) for name in names[len(args) : last + 1])), {}

    return describe


def index_select(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """By position, of a dimension that is a number."""
    names = dict(zip(("input", "dim", "index"), args, strict=False)) | kwargs
    return ((names["input"], names["dim"], names["index"]), {}) if isinstance(names["dim"], int) else None


def getitem(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """Where rows are picked by indices or masks, beside slices and single places."""
    table, item = args
    items = item if isinstance(item, tuple) else (item,)
    if not any(isinstance(i, Tensor) for i in items):
        return None
    for i in items:
        picks = isinstance(i, Tensor) and i.dtype in (torch.int64, torch.int32, torch.bool)
        if not (picks or i is Ellipsis or i is None or isinstance(i, slice) or type(i) is int):
            return None
    return (table, items), {}


def embedding(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """Without what only concerns its backward."""
    names = dict(zip(("input", "weight", "padding_idx", "max_norm"), args, strict=False)) | kwargs
    if names.get("max_norm") is not None:  # it changes the table
        return None
    return (names["input"], names["weight"]), {}


def batch_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """With the statistics that it had, which in training are the batch's own: the running ones stay as they are."""
    order = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    names = dict.fromkeys(order[1:5]) | {"training": False, "momentum": 0.1, "eps": 1e-5}
    names |= dict(zip(order, args, strict=False)) | kwargs
    if names["training"]:
        names["running_mean"] = names["running_var"] = None
    return tuple(names[name] for name in order), {}


def joined(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """What it joins as a tuple."""
    return None if "out" in kwargs else ((tuple(args[0]), *args[1:]), kwargs)


def convolution(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """With all that it can be told, by position."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    told = dict(zip(names, (None, None, None, 1, 0, 1, 1), strict=True))
    return tuple((told | dict(zip(names, args, strict=False)) | kwargs).values()), {}


def padded(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """With the sizes as they are now: a list may be changed."""
    names = dict(zip(("input", "pad", "mode", "value"), args, strict=False)) | kwargs
    return (names.pop("input"), tuple(names.pop("pad"))), names


def cast(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """Of a cast to another float: by a dtype, or as another tensor has it."""
    to = args[1] if len(args) > 1 else kwargs.get("dtype", kwargs.get("other"))
    dtype = to.dtype if isinstance(to, Tensor) else to
    stays = not isinstance(to, Tensor) or to.device == args[0].device
    return ((args[0], dtype), {}) if stays and isinstance(dtype, torch.dtype) and dtype.is_floating_point else None


def new_zeros(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """Of ``x.new_zeros``; dtype and device are those of the result."""
    sizes = args[1] if len(args) == 2 and isinstance(args[1], (tuple, list)) else args[1:]
    return None if "size" in kwargs else ((tuple(sizes),), {})


def zeros_like(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """Of ``zeros_like``; dtype and device are those of the result."""
    return ((tuple(args[0].shape),), {}) if len(args) == 1 else None


def sum_of_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """Of a scatter onto zeros."""
    names = dict(zip(("input", "dim", "index", "source"), args, strict=False)) | kwargs
    if "src" in names:
        names["source"] = names.pop("src")
    if names.keys() != {"input", "dim", "index", "source"} or not isinstance(names["dim"], int):
        return None
    return (tuple(names["input"].shape), names["dim"], names["index"], names["source"]), {}


def set_to(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """Of a scatter of one number onto zeros: several of them in one place are the same."""
    names = dict(zip(("input", "dim", "index", "value"), args, strict=False)) | kwargs
    if names.keys() != {"input", "dim", "index", "value"} or not isinstance(names["value"], (int, float)):
        return None
    zeros = names["input"]
    return (tuple(zeros.shape), names["dim"], names["index"], names["value"], zeros.dtype), {}


def one_hot(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """Where the number of classes is told: else they have to be looked through for the largest."""
    names = {"num_classes": -1} | dict(zip(("tensor", "num_classes"), args, strict=False)) | kwargs
    return ((names["tensor"], names["num_classes"]), {}) if names["num_classes"] > 0 else None


def einsum(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """With its operands one by one, and no list of them."""
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    return ((equation, *operands), {}) if isinstance(equation, str) else None


def last_of_the_first(first: Any, *others: Any) -> int:
    """What a product adds up for each of its elements: the last dimension of the first factor."""
    return int(first.layout.shape[-1])


def in_a_kernel(x: Any, weight: Any, *others: Any) -> float:
    """The same for a convolution: what a kernel covers of its channels."""
    return float(weight.layout.numel / weight.layout.shape[0])


def not_in_the_result(equation: str, *operands: Any) -> int:
    """The same for an ``einsum``: the dimensions that are not in its result. Two by two, many operands take less."""
    given, arrow, result = equation.replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for letters, operand in zip(given.split(","), operands, strict=True):
        before, _, after = letters.partition("...")
        shape = operand.layout.shape
        sizes |= dict(zip(before, shape, strict=False)) | dict(zip(after[::-1], shape[::-1], strict=False))
    if not arrow:
        result = "".join(letter for letter in sizes if given.count(letter) == 1)
    return math.prod(size for letter, size in sizes.items() if letter not in result)


def squared(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """Of a power of 2."""
    return (args, kwargs) if len(args) == 2 and isinstance(args[1], (int, float)) and args[1] == 2 else None


def norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """Of a 2-norm."""
    names = {"p": 2, "dim": None, "keepdim": False} | dict(zip(("input", "p", "dim", "keepdim"), args, strict=False))
    names |= {name: value for name, value in kwargs.items() if not (name in ("dtype", "out") and value is None)}
    names["p"] = names.pop("ord", names["p"])
    names["input"] = names.pop("x", names.get("input"))
    known = names.keys() == {"input", "p", "dim", "keepdim"} and names["p"] in (2, None, "fro")
    return ((names["input"], names["dim"], names["keepdim"]), {}) if known else None


def normalize(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """Where it is fast."""
    names = {"p": 2.0, "dim": 1, "eps": 1e-12} | dict(zip(("input", "p", "dim", "eps"), args, strict=False)) | kwargs
    x, p, dim = names["input"], names["p"], names["dim"]
    slow = x.is_cpu and not (p == 2 and dim in (-1, x.dim() - 1))  # 40 to 170 times as long as to copy it
    return None if slow or names.get("out") is not None else ((x, p, dim, names["eps"]), {})


def row_of_normalize(x: Any, p: float, dim: Any, eps: float) -> int:
    """How many elements are normalized together; 0 if they are no row."""
    shape: tuple[int, ...] = x.layout.shape
    return shape[-1] if p == 2 and dim in (-1, len(shape) - 1) else 0


def row_of_norm(x: Any, shape: Any, *others: Any) -> int:
    """The same of a layer norm."""
    return math.prod(shape) if isinstance(shape, (tuple, list)) else int(shape)


def quotient(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """Of a division that rounds nothing."""
    return None if kwargs.get("rounding_mode") is not None else as_called(args, kwargs)
