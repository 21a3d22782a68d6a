"""Results whose rounding another op would blow up: they are kept exactly once such an op uses them.

Rounding is off by a step of the group's range, while a sigmoid, a softmax or an exponential spans many orders of
magnitude: of ``1e-6`` rounding leaves nothing. Mostly that is as little as it looks, since the gradient of
``sigmoid(x) * h`` at such a place is next to nothing too. But ``log(sigmoid(x) + 1e-10)`` divides by it again, and a
step of a hundredth becomes a thousand. What an op like the logarithm sees, it keeps exactly itself (``rules.py``); of
what stands between, an addition or a clamp, nothing is saved at all. So the use of a fragile result decides.
"""

from __future__ import annotations

from enum import Enum
from typing import Any

FRAGILE = frozenset({"Sigmoid.result", "Softmax.result", "Exp.result", "Exp2.result", "Expm1.result"})
"""Saves that are fragile."""

_NAMES = (
    "add", "sub", "subtract", "rsub", "clamp", "clip", "clamp_min", "clamp_max", "maximum", "minimum", "nan_to_num",
    "log", "log2", "log10", "log1p", "logit", "reciprocal", "sqrt", "rsqrt", "pow", "gather", "take_along_dim", "where",
    "getitem", "index_select", "masked_fill", "masked_select", "select", "threshold",
    "max", "min", "amax", "amin", "cat", "stack", "binary_cross_entropy",
)  # fmt: skip  # a table, read as one

_AMPLIFYING = frozenset(
    {*_NAMES, *(f"{name}_" for name in _NAMES), *(f"__{r}{name}__" for name in _NAMES for r in ("", "r", "i"))}
)
"""Uses that may lead to a logarithm or a quotient: what shifts, bounds or picks."""

_QUOTIENTS = frozenset({"div", "divide", "true_divide", "div_", "__truediv__"})


class Amplified(Enum):
    """Which arguments of a function have their error blown up, or may have by what it leads to."""

    NONE = "none"
    ALL = "all"
    PICKED = "all, if anything is picked"
    FIRST = "the first"
    SECOND = "the second"

    def of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """These arguments.

        Example:
            >>> [amplified_by(name).of((1, 2), {}) for name in ("add", "mul", "div")]
            [(1, 2), (), (2,)]
        """
        if self is Amplified.NONE or (self is Amplified.PICKED and _is_view(args[1])):
            return ()
        if self is Amplified.FIRST:
            return args[:1]
        if self is Amplified.SECOND:
            return (*args[1:], kwargs.get("other"))[:1]
        return (*args, *kwargs.values())


def amplified_by(name: str) -> Amplified:
    """Which of a function's arguments are amplified, by its name."""
    if name == "__getitem__":
        return Amplified.PICKED
    if name in _AMPLIFYING:
        return Amplified.ALL
    if name in _QUOTIENTS:
        return Amplified.SECOND
    return Amplified.FIRST if name in ("__rtruediv__", "__rdiv__") else Amplified.NONE


def _is_view(index: Any) -> bool:
    """Whether an index only rearranges: ``x[..., None]`` picks nothing."""
    items = index if isinstance(index, tuple) else (index,)
    return all(item is None or item is Ellipsis or (isinstance(item, slice) and item == slice(None)) for item in items)
