"""One table: which ops blow up the error of what they are given, or lead to one that does."""

from __future__ import annotations

from enum import Enum
from typing import Any


def _with_operators(*names: str) -> frozenset[str]:
    return frozenset({*names, *(f"{n}_" for n in names), *(f"__{r}{n}__" for n in names for r in ("", "r", "i"))})


_AMPLIFYING = _with_operators(
    "log", "log2", "log10", "log1p", "logit", "xlogy", "special_xlogy", "special_entr", "special_xlog1py",
    "reciprocal", "sqrt", "rsqrt", "binary_cross_entropy", "kl_div",
    "gaussian_nll_loss", "poisson_nll_loss", "clamp", "clip", "clamp_max", "minimum",
)  # fmt: skip  # a table, read as one
"""Uses that blow up an error: a logarithm, a root, a reciprocal, and losses that take one. So does a quotient, its
divisor's; and a bound, above which no gradient passes: an exponential is rounded by its largest, which are cut off."""

_LEADING = _with_operators(
    "add", "sub", "subtract", "rsub", "clamp_min", "maximum", "nan_to_num",
    "gather", "take_along_dim", "where", "getitem", "index_select", "masked_fill", "masked_select", "select",
    "threshold", "max", "min", "amax", "amin", "cat", "stack", "square",
)  # fmt: skip  # a table, read as one
"""Uses whose result may be given to such an op: what shifts, bounds from below, picks or squares."""

_POWERS = _with_operators("pow", "float_power")
"""Uses that do one or the other."""

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
    if name in _AMPLIFYING or name in _LEADING or name in _POWERS:
        return Amplified.ALL
    if name in _QUOTIENTS:
        return Amplified.SECOND
    return Amplified.FIRST if name in ("__rtruediv__", "__rdiv__") else Amplified.NONE


def only_leads(name: str, args: tuple[Any, ...]) -> bool:
    """Whether a function blows up no error itself, but what it is given its result may.

    Args:
        name: its name.
        args: its arguments: of a power the exponent decides, which may be that of a root or a quotient.

    Example:
        >>> only_leads("clamp_min", (0.5, 0)), only_leads("log", (0.5,)), only_leads("pow", (0.5, 2))
        (True, False, True)
    """
    name = name.partition(".")[0]
    if name in _POWERS:
        return len(args) > 1 and isinstance(args[1], int | float) and args[1] >= 1
    return name in _LEADING


def _is_view(index: Any) -> bool:
    """Whether an index only rearranges: ``x[..., None]`` picks nothing."""
    items = index if isinstance(index, tuple) else (index,)
    return all(item is None or item is Ellipsis or (isinstance(item, slice) and item == slice(None)) for item in items)
