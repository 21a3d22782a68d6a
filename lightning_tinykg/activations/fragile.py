"""Results whose rounding another op would blow up: they are kept exactly once such an op uses them.

Rounding is off by a step of the group's range, while a sigmoid, a softmax or an exponential spans many orders of
magnitude: of ``1e-6`` rounding leaves nothing. Mostly that is as little as it looks, since the gradient of
``sigmoid(x) * h`` at such a place is next to nothing too. But ``log(sigmoid(x) + 1e-10)`` divides by it again, and a
step of a hundredth becomes a thousand. What an op like the logarithm sees, it keeps exactly itself (``rules.py``); of
what stands between, an addition or a clamp, nothing is saved at all. So the use of a fragile result decides.
"""

from __future__ import annotations

from typing import Any

FRAGILE = frozenset({"Sigmoid.result", "Softmax.result", "Exp.result", "Exp2.result", "Expm1.result"})
"""Saves that are fragile."""

_NAMES = (
    "add", "sub", "subtract", "rsub", "clamp", "clip", "clamp_min", "clamp_max", "maximum", "minimum", "nan_to_num",
    "log", "log2", "log10", "log1p", "logit", "reciprocal", "sqrt", "rsqrt", "pow", "gather", "take_along_dim", "where",
    "getitem", "index_select", "masked_fill", "masked_select", "select", "threshold",
    "max", "min", "amax", "amin", "cat", "stack", "binary_cross_entropy",
)  # fmt: skip

_AMPLIFYING = frozenset(
    {*_NAMES, *(f"{name}_" for name in _NAMES), *(f"__{r}{name}__" for name in _NAMES for r in ("", "r", "i"))}
)
"""Uses that may lead to a logarithm or a quotient: what shifts, bounds or picks."""

_QUOTIENTS = frozenset({"div", "divide", "true_divide", "div_", "__truediv__"})


def amplified(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of an op whose error may be blown up by what it leads to.

    Example:
        >>> import torch
        >>> amplified(torch.add, (1, 2), {}), amplified(torch.mul, (1, 2), {}), amplified(torch.div, (1, 2), {})
        ((1, 2), (), (2,))
    """
    name = getattr(func, "__name__", "").partition(".")[0]
    if name == "__getitem__" and _is_view(args[1]):
        return ()
    if name in _AMPLIFYING:
        return (*args, *kwargs.values())
    if name in _QUOTIENTS:
        return (*args[1:], kwargs.get("other"))[:1]
    return args[:1] if name in ("__rtruediv__", "__rdiv__") else ()


def _is_view(index: Any) -> bool:
    """Whether an index only rearranges: ``x[..., None]`` picks nothing."""
    items = index if isinstance(index, tuple) else (index,)
    return all(item is None or item is Ellipsis or (isinstance(item, slice) and item == slice(None)) for item in items)
