"""Measuring plans, in this process or in several, and keeping each measurement at once in a file."""

from __future__ import annotations

import inspect
import json
import math
import multiprocessing
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lightning_tinykg.arguments import check_whole
from lightning_tinykg.bits.front import Trial
from lightning_tinykg.bits.plan import BitPlan

__all__ = ["Measure", "Measurer", "Outcome", "TrialFile"]

_HEADER = '{"search": '

Measure = Callable[..., float]
"""From a plan to its accuracy; with repeats it takes their number too, as ``repeat=``."""


class Outcome(NamedTuple):
    """What measuring a plan gave.

    Attributes:
        accuracies: one for each repeat; none if it failed.
        seconds: that it took.
        error: why it failed; None if it did not.
    """

    accuracies: tuple[float, ...] = ()
    seconds: float = 0.0
    error: str | None = None


class TrialFile:
    """Trials as JSON lines, after one line that says of which search they are.

    Each is written at once, so an interruption loses no more than what was being measured. A last line that was cut
    off is dropped. To measure a plan again, for instance one that failed, delete its line.

    Args:
        path: the file; it is made if there is none.
        search: what the trials belong to, in plain primitives.

    Raises:
        ValueError: if the file is of another search, or a line in it is no trial.
    """

    def __init__(self, path: str | Path, search: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self._trials: dict[BitPlan, Trial] = {}
        text = self.path.read_text() if self.path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a line that was cut off has no end
        if not whole and text.startswith(_HEADER[: len(text)]):  # nothing yet, or not even the first line
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"search": search}) + "\n")
            return
        first, *lines = (whole or text).splitlines()
        self._check(first, json.loads(json.dumps(search)))
        if len(whole) < len(text):  # not before it is known that the file is ours
            self.path.write_text(whole)
        for number, line in enumerate(lines, start=2):
            try:
                trial = Trial.from_dict(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"line {number} of {self.path} is no trial: {error!r}") from error
            self._trials[trial.plan] = trial

    def _check(self, line: str, search: Mapping[str, Any]) -> None:
        try:
            found = json.loads(line)["search"]
            differing = [key for key in search if found.get(key) != search[key]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path} is no file of a search for bits: {error!r}") from error
        if differing:
            was = ", ".join(f"{key} {_short(found.get(key))} and not {_short(search[key])}" for key in differing)
            raise ValueError(f"path must be a new file or one of this search, got {self.path}, a search with {was}")

    def get(self, plan: BitPlan) -> Trial | None:
        """The trial of a plan, if there is one."""
        return self._trials.get(plan)

    def add(self, trial: Trial) -> None:
        """Write a trial."""
        self._trials[trial.plan] = trial
        with self.path.open("a") as file:
            file.write(json.dumps(trial.to_dict()) + "\n")


class Measurer:
    """Measures plans, in the order given, or side by side in other processes.

    A plan that can't be measured does not stop the others: an exception, an accuracy that is not finite and, with more
    than one worker, the death of the process are outcomes. Processes are spawned, so that CUDA works in them.

    Args:
        measure: from a plan to its accuracy.
        repeats: how often each plan is measured. With more than 1, ``measure`` is also given ``repeat=0``, 1, ...
        workers: how many processes; 1: this one.

    Raises:
        ValueError: if a number is not positive, or ``measure`` does not take what it is given.
        TypeError: if there are workers and ``measure`` can't be pickled.

    Example:
        >>> with Measurer(lambda plan: 1 / plan.default) as measurer:
        ...     [(number, outcome.accuracies) for number, outcome in measurer([BitPlan(default=2), BitPlan(default=4)])]
        [(0, (0.5,)), (1, (0.25,))]
    """

    def __init__(self, measure: Measure, repeats: int = 1, workers: int = 1) -> None:
        for name, value in (("repeats", repeats), ("workers", workers)):
            check_whole(name, value, 1)
        _check_signature(measure, repeats)
        self._measure = measure
        self._repeats = repeats
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None
        if workers > 1:
            try:
                self._pickled = pickle.dumps(measure)
            except Exception as error:  # pickle raises whatever it meets
                raise TypeError(
                    f"measure must be picklable for workers={workers} (a function of a module, or an object of a class "
                    f"of one, not a lambda or a function within another), got {measure!r}: {error}"
                ) from error

    def __enter__(self) -> Measurer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def __call__(self, plans: Sequence[BitPlan]) -> Iterator[tuple[int, Outcome]]:
        """Measure.

        Args:
            plans: what to measure.

        Yields:
            The number of a plan, and its outcome, as soon as it is there.
        """
        if self._workers == 1:
            for number, plan in enumerate(plans):
                yield number, _measured(self._measure, plan, self._repeats)
            return
        if self._pool is None:
            self._pool = self._new_pool(self._workers)
        submitted: dict[Future[Outcome], int] = {}
        suspects: list[int] = []
        for number, plan in enumerate(plans):
            try:
                submitted[self._pool.submit(_measured_here, plan, self._repeats)] = number
            except BrokenProcessPool:
                suspects.append(number)
        for future in as_completed(submitted):
            try:
                yield submitted[future], future.result()
            except BrokenProcessPool:
                suspects.append(submitted[future])
        if suspects:  # which of them it was that died can't be seen, unless each has a process of its own
            self._pool.shutdown()
            self._pool = None
        for number in sorted(suspects):
            yield number, self._alone(plans[number])

    def _alone(self, plan: BitPlan) -> Outcome:
        start = time.perf_counter()
        with self._new_pool(1) as pool:
            try:
                return pool.submit(_measured_here, plan, self._repeats).result()
            except BrokenProcessPool as error:
                return Outcome((), time.perf_counter() - start, f"the process died: {error}")

    def _new_pool(self, workers: int) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(workers, context, initializer=_receive, initargs=(self._pickled,))


def _measured(measure: Measure, plan: BitPlan, repeats: int) -> Outcome:
    start = time.perf_counter()
    try:
        calls = (
            [partial(measure, plan, repeat=number) for number in range(repeats)]
            if repeats > 1
            else [partial(measure, plan)]
        )
        accuracies = tuple(float(call()) for call in calls)
        if not all(math.isfinite(accuracy) for accuracy in accuracies):
            raise ValueError(f"accuracy must be finite, got {', '.join(map(str, accuracies))}")
    except Exception as error:  # whatever a plan does to a model, the search goes on
        return Outcome((), time.perf_counter() - start, f"{type(error).__name__}: {error}")
    return Outcome(accuracies, time.perf_counter() - start)


_received: bytes = b""
_unpickled: list[Measure] = []


def _receive(pickled: bytes) -> None:
    """Keep ``measure``, once for a worker: it may hold a data set."""
    global _received
    _received = pickled
    _unpickled.clear()


def _measured_here(plan: BitPlan, repeats: int) -> Outcome:
    if not _unpickled:
        # not in the initializer, where a failure would break the pool and nobody would learn why
        try:
            _unpickled.append(pickle.loads(_received))
        except Exception as error:  # what the user's module raises when it is imported
            return Outcome((), 0.0, f"measure can't be unpickled in a worker: {type(error).__name__}: {error}")
    return _measured(_unpickled[0], plan, repeats)


def _check_signature(measure: Measure, repeats: int) -> None:
    given: dict[str, int] = {"repeat": 0} if repeats > 1 else {}
    try:
        signature = inspect.signature(measure)
    except ValueError:  # a built-in one
        return
    try:
        signature.bind(BitPlan(), **given)
    except TypeError as error:
        wanted = "a plan and `repeat`" if repeats > 1 else "a plan"
        raise ValueError(f"measure must take {wanted} with repeats={repeats}, got {measure!r}: {error}") from error


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
