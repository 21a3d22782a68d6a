"""Interleaved timing: each candidate once, then each once more, so that all see the same noise of the machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from statistics import median
from typing import Any, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")


class Clock:
    """Times functions on a device.

    Args:
        device: a GPU is timed by its own events, and waited for.
        inner: calls that are timed as one. On a GPU a single short kernel would mostly show how long its launch takes.
    """

    def __init__(self, device: torch.device, inner: int = 1) -> None:
        self.device, self.inner = device, inner

    def timed(self, function: Callable[[], Result]) -> tuple[Result, float]:
        """The function's result, and the seconds of one call."""
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(self.device)
            start.record()
            for _ in range(self.inner):
                result = function()
            end.record()
            torch.cuda.synchronize(self.device)
            return result, start.elapsed_time(end) / 1e3 / self.inner
        began = time.perf_counter()
        for _ in range(self.inner):
            result = function()
        return result, (time.perf_counter() - began) / self.inner


def interleaved(
    candidates: Mapping[Key, Callable[[], Mapping[str, float]]], repeats: int, done: Callable[[Key], Any]
) -> dict[Key, dict[str, list[float]]]:
    """Run all candidates once, uncounted, and then so many times, one after another.

    Args:
        candidates: each runs once and gives the seconds of its phases, by name.
        repeats: rounds that count. Every second one goes backward, so that none always follows the same other.
        done: called after each run.

    Returns:
        The seconds of each phase, by candidate.
    """
    seconds: dict[Key, dict[str, list[float]]] = {key: {} for key in candidates}
    for round in range(repeats + 1):
        for key in list(candidates)[:: -1 if round % 2 else 1]:
            for phase, second in candidates[key]().items():
                if round:
                    seconds[key].setdefault(phase, []).append(second)
            done(key)
    return seconds


def against(seconds: list[float], base: list[float]) -> dict[str, float]:
    """The median, its ratio to the base's median, and the median of the ratios within each round."""
    return {
        "median": median(seconds),
        "ratio": median(seconds) / median(base),
        "paired": median(own / other for own, other in zip(seconds, base, strict=True)),
    }
