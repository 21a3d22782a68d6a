"""What is known of a Python-level function by its name: looked up once, for it is asked at each op."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_tinykg.activations.amplifying import Amplified, amplified_by

_BACKWARDS = (Tensor.backward, torch.autograd.backward, torch.autograd.grad)
_ASKS = frozenset(
    {
        "dim", "size", "numel", "nelement", "ndimension", "stride", "storage_offset", "element_size", "is_contiguous",
        "is_floating_point", "is_complex", "is_signed", "get_device", "untyped_storage", "data_ptr", "__len__",
        "__hash__",
    }
)  # fmt: skip  # a table, read as one
"""Names of methods that tell something of a tensor, and touch none of its elements."""

_ATTRIBUTES = frozenset(
    {"shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "is_cuda", "is_cpu", "is_sparse"}
)
"""Attributes that do so."""

_LENDING = frozenset({"numpy", "__array__", "__dlpack__"})
"""Methods that hand the memory to who changes it without a word."""

_OPENED = (functional.multi_head_attention_forward,)
"""Functions of PyTorch's that are written in Python, of many ops each of which saves something."""

_OPERATORS = ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")


@dataclass(frozen=True, slots=True)
class Function:
    """A function that ``__torch_function__`` is called for.

    Attributes:
        name: its name, as the ledger and the rules have it.
        asks: whether it only tells something of a tensor: its size, its dtype.
        opens: whether the ops that it is made of are seen one by one: see :func:`opened`.
        reads: whether it is an attribute's getter, which saves nothing.
        of_data: whether it gets or sets ``data``: two tensors have the same memory then, and versions of their own.
        lends: whether it hands out its argument's memory: ``x.numpy()``.
        backward: whether it runs a backward.
        may_write: whether it changes an argument, or can be told to by position.
        in_place: whether it changes its first argument.
        inplace_at: the place of an argument ``inplace``, or None.
        renormalizes: whether it changes the table that it looks up, if told to: an embedding.
        amplifies: whether it may blow up its arguments' errors, or what it is given its result.
        amplified: which of them.
    """

    name: str
    asks: bool
    opens: bool
    reads: bool
    of_data: bool
    lends: bool
    backward: bool
    may_write: bool
    in_place: bool
    inplace_at: int | None
    renormalizes: bool
    amplifies: bool
    amplified: Amplified

    def written(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """What a call changes: by ``add_``, ``__iadd__``, ``__setitem__``, ``out=``, ``inplace=``.

        Example:
            >>> x = torch.ones(2)
            >>> function_of(Tensor.add_).written((x, 1), {})[0] is x, function_of(torch.add).written((x, 1), {})
            (True, [])
        """
        if self.renormalizes:
            bounded = kwargs.get("max_norm") is not None or (len(args) > 3 and args[3] is not None)
            return [*args[1:2], kwargs.get("weight")] if bounded else []
        place = self.inplace_at
        inplace = self.in_place or kwargs.get("inplace") is True
        inplace = inplace or (place is not None and place < len(args) and args[place] is True)
        return [*(args[:1] if inplace else ()), *([kwargs["out"]] if "out" in kwargs else ())]


@lru_cache(maxsize=4096)
def function_of(func: Any) -> Function:
    """What is known of a function.

    Example:
        >>> function_of(torch.relu_).in_place, function_of(torch.nn.functional.dropout).inplace_at
        (True, 3)
    """
    name = getattr(func, "__name__", "").partition(".")[0]
    reads = name == "__get__"
    if name.startswith("__"):
        in_place = name == "__setitem__" or (name.startswith("__i") and name[3:-2] in _OPERATORS)
    else:
        in_place = name.endswith("_")
    inplace_at = None if name.startswith("__") else _place_of_inplace(func)
    renormalizes = name == "embedding"
    amplified = amplified_by(name)
    accesses = reads or name == "__set__"
    attribute = getattr(getattr(func, "__self__", None), "__name__", "") if accesses else ""
    return Function(
        name=getattr(func, "__name__", ""),
        asks=name in _ASKS or (reads and attribute in _ATTRIBUTES),
        opens=func in _OPENED and "has_torch_function" in func.__code__.co_names,
        reads=reads,
        of_data=attribute == "data",
        lends=name in _LENDING,
        backward=func in _BACKWARDS,
        may_write=in_place or renormalizes or inplace_at is not None,
        in_place=in_place,
        inplace_at=inplace_at,
        renormalizes=renormalizes,
        amplifies=amplified is not Amplified.NONE,
        amplified=amplified,
    )


def opened(func: Any) -> Callable[..., Any]:
    """A function of PyTorch's as if it stood in the user's code: what it calls is seen, and not it.

    It asks first whether anybody watches, and if so is handed over whole. Here the answer is no.

    Args:
        func: a function that ``opens``; what it calls is looked up when it is called, since that may be replaced.
    """
    unwatched = func.__globals__ | {"has_torch_function": lambda tensors: False}
    body = FunctionType(func.__code__, unwatched, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body


def _place_of_inplace(func: Any) -> int | None:
    try:
        names = list(inspect.signature(func).parameters)
    except (TypeError, ValueError):  # a builtin; those with such an argument have a function around them
        return None
    return names.index("inplace") if "inplace" in names else None
