"""What an argument may be, said in the same words everywhere: its name, what would be right, and what it was."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from operator import index
from typing import Any

__all__ = ["check_choice", "check_number", "check_whole", "check_wholes", "is_width"]


def check_whole(name: str, value: Any, least: int = 0, otherwise: str = "") -> int:
    """A whole number, also one of NumPy's or of one element; no ``True``, no ``2.0``.

    Args:
        name: of the argument.
        value: what was given.
        least: the least that it may be.
        otherwise: what else would be right, such as ``", or None"``.

    Returns:
        It, as an ``int``.

    Raises:
        ValueError: if it is none, or less.

    Example:
        >>> check_whole("steps", 1.5, least=1)
        Traceback (most recent call last):
        ValueError: steps must be a whole number of at least 1, got 1.5
    """
    try:
        number = None if isinstance(value, bool) else index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ValueError(f"{name} must be a whole number of at least {least}{otherwise}, got {value!r}")
    return number


def check_wholes(name: str, values: Any, least: int = 0) -> tuple[int, ...]:
    """Several whole numbers; a single one is no sequence of one.

    Args:
        name: of the argument.
        values: what was given.
        least: the least that each may be.

    Returns:
        They, as ``int``.

    Raises:
        ValueError: if it is no sequence, or one of them is no whole number or less.

    Example:
        >>> check_wholes("layer_dims", 64, least=1)
        Traceback (most recent call last):
        ValueError: layer_dims must be a list of whole numbers of at least 1, got 64
    """
    try:
        return tuple([check_whole(name, value, least) for value in values])
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a list of whole numbers of at least {least}, got {values!r}") from None


def check_number(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    otherwise: str = "",
) -> float:
    """A finite number within bounds.

    Args:
        name: of the argument.
        value: what was given.
        least: the least that it may be.
        above: what it has to be above.
        most: the most that it may be.
        below: what it has to be below.
        otherwise: what else would be right, such as ``", or None"``.

    Returns:
        It, as a ``float``.

    Raises:
        ValueError: if it is no number, not finite, or out of bounds.

    Example:
        >>> check_number("dropout", 1.5, least=0, below=1)
        Traceback (most recent call last):
        ValueError: dropout must be a number of at least 0 and below 1, got 1.5
    """
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError, RuntimeError):  # NumPy and PyTorch raise one each for an array of several
        number = math.nan
    holds = (
        math.isfinite(number)
        and (least is None or number >= least)
        and (above is None or number > above)
        and (most is None or number <= most)
        and (below is None or number < below)
    )
    if not holds:
        bounds = (("of at least", least), ("above", above), ("of at most", most), ("below", below))
        said = " and ".join(f"{words} {bound}" for words, bound in bounds if bound is not None)
        wanted = f"a number {said}" if said else "a finite number"
        raise ValueError(f"{name} must be {wanted}{otherwise}, got {value!r}")
    return number


def check_choice(name: str, value: Any, choices: Iterable[Any], otherwise: str = "") -> None:
    """One of a few names.

    Args:
        name: of the argument.
        value: what was given.
        choices: what it may be.
        otherwise: what else would be right, such as ``" or None"``.

    Raises:
        ValueError: if it is none of them.

    Example:
        >>> check_choice("recompute", "some", ("off", "cheap", "aggressive"))
        Traceback (most recent call last):
        ValueError: recompute must be one of off, cheap, aggressive, got 'some'
    """
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}{otherwise}, got {value!r}")


def is_width(bits: object, widths: Collection[int]) -> bool:
    """Whether it is a whole number among these: not ``True``, nor ``2.0``.

    Example:
        >>> [is_width(bits, (1, 2, 4)) for bits in (2, 2.0, True, 3)]
        [True, False, False, False]
    """
    return not isinstance(bits, bool) and hasattr(bits, "__index__") and bits in widths
