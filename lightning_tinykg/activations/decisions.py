"""What was decided in earlier steps: a step that goes as one before it asks the same, and gets the same answers.

To weigh whether a tensor is to be kept or made again takes most of what the engine takes for itself. What is decided
depends on what came before in the step, and steps of one model are alike: so the questions of all steps are kept as a
tree, with the answers. A step that goes another way leaves the tree there, and adds what it asks.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, NamedTuple, TypeAlias, TypeVar

_Answer = TypeVar("_Answer")

_MOST = 10_000
"""Questions to keep, at the most. Steps that are never alike, as those of sampled neighbourhoods, only add to them."""


class Decision(NamedTuple, Generic[_Answer]):
    """One answer.

    Attributes:
        answer: the answer.
        then: what was asked next.
    """

    answer: _Answer
    then: Node[_Answer]


Node: TypeAlias = "dict[Hashable, Decision[_Answer]]"


class Decisions(Generic[_Answer]):
    """What was asked in earlier steps, and what was answered.

    Example:
        >>> decisions = Decisions[str]()
        >>> first = decisions.begin("2 bits")
        >>> decision = decisions.add(first, "a linear layer's input?", "keep it")
        >>> decisions.begin("2 bits")["a linear layer's input?"].answer
        'keep it'
        >>> decisions.begin("4 bits")
        {}
    """

    def __init__(self) -> None:
        self._first: dict[Hashable, Node[_Answer]] = {}
        self._count = 0

    def begin(self, *given: Hashable) -> Node[_Answer]:
        """What was asked first in steps of which the same was given."""
        if self._count > _MOST:
            self._first, self._count = {}, 0
        return self._first.setdefault(given, {})

    def add(self, node: Node[_Answer], question: Hashable, answer: _Answer) -> Decision[_Answer]:
        """Keep an answer. What was asked next is nothing yet."""
        node[question] = decision = Decision(answer, {})
        self._count += 1
        return decision
