"""What was decided in earlier steps: a step that goes as one before it asks the same, and gets the same answers.

To weigh whether a tensor is to be kept or made again is a quarter of what the engine takes for itself, and a third in a
deep model. What is decided depends on what came before in the step, and steps of one model are alike: so the questions
of all steps are kept as a tree, with the answers. A step that goes another way leaves the tree there, and adds what it
asks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeAlias

from torch import Tensor

from lightning_tinykg.activations.costs import Cost, Costs, Judging
from lightning_tinykg.activations.recipes import Ingredient, Recipe
from lightning_tinykg.activations.rules import Rule
from lightning_tinykg.activations.storages import Layout
from lightning_tinykg.activations.values import Values
from lightning_tinykg.activations.widths import Widths

_MOST = 10_000
"""Questions to keep, at the most. Steps that are never alike, as those of sampled neighbourhoods, only add to them."""


class Decision(NamedTuple):
    """One answer.

    Attributes:
        cost: of what is made again; None where that is not done.
        wanted: what it would have been made of, had it not been for its own code: by number, by whom, and the bytes.
        judging: what it was judged by.
        then: what was asked next.
    """

    cost: Cost | None
    wanted: tuple[tuple[int, object, int], ...]
    judging: Judging
    then: Node


Node: TypeAlias = "dict[Hashable, Decision]"


class Decisions:
    """What was asked in earlier steps, and what was answered.

    Example:
        >>> decisions = Decisions()
        >>> first = decisions.begin("2 bits")
        >>> decision = decisions.add(first, "a linear layer's input?", Decision(None, (), Judging(), {}))
        >>> decisions.begin("2 bits")["a linear layer's input?"] is decision
        True
        >>> decisions.begin("4 bits")
        {}
    """

    def __init__(self) -> None:
        self._first: dict[Hashable, Node] = {}
        self._count = 0

    def begin(self, *given: Hashable) -> Node:
        """What was asked first in steps of which the same was given."""
        if self._count > _MOST:
            self._first, self._count = {}, 0
        return self._first.setdefault(given, {})

    def add(self, node: Node, question: Hashable, decision: Decision) -> Decision:
        """Keep an answer."""
        node[question] = decision
        self._count += 1
        return decision


class Decider:
    """Asks what it costs in one forward, unless a step that went as this one has asked.

    Args:
        costs: what it takes to make something again.
        widths: in how many bits.
        values: the storages.
        decisions: of earlier steps.
        given: what these have to have had alike.
    """

    def __init__(self, costs: Costs, widths: Widths, values: Values, decisions: Decisions, *given: Hashable) -> None:
        self._costs = costs
        self._widths = widths
        self._values = values
        self._decisions = decisions
        self._node = decisions.begin(*given)

    def of_remaking(self, recipe: Recipe, tensor: Tensor, rule: Rule, least: int, own_least: int) -> Cost | None:
        """As :meth:`Costs.of_remaking`."""
        place = tensor.shape, tensor.storage_offset(), tensor.dtype
        question = recipe.value.number, recipe.repeatable.name, *place, rule, least, own_least
        return self._decide(question, lambda: self._costs.of_remaking(recipe, tensor, rule, least, own_least))

    def is_made_again(self, ingredient: Ingredient, least: int, *, computed: bool, depth: int) -> bool:
        """Whether what there still is of an ingredient is made again, and not kept."""
        layout = ingredient.layout
        question = ingredient.value.number, layout.offset, layout.shape, least, computed, depth
        cost = self._decide(
            question, lambda: self._costs.of_what_there_is(ingredient, least, computed=computed, depth=depth)
        )
        return cost is not None and cost.work > 0

    def of_nothing_more(self, recipe: Recipe, layout: Layout, least: int, own: int, nbytes: int) -> Cost | None:
        """As :meth:`Costs.of_nothing_more`."""
        question = recipe.value.number, layout.offset, layout.numel, least, own
        return self._decide(question, lambda: self._costs.of_nothing_more(recipe, layout, least, own, nbytes))

    def _decide(self, question: tuple[Hashable, ...], count: Callable[[], Cost | None]) -> Cost | None:
        costs, widths, values = self._costs, self._widths, self._values
        # of what was saved, of what was not, and of what is there no more
        so_far = widths.step.raw_bytes, len(values.met), values.work, values.alive, values.died[0]
        question = *question, widths.bits, widths.literal, *so_far
        found = self._node.get(question)
        if found is None:
            costs.wanted.clear()
            cost = count()
            found = Decision(cost, tuple(costs.wanted), costs.judging, {})
            self._decisions.add(self._node, question, found)
        else:
            for number, want, nbytes in found.wanted:
                values.met[number].wanted[want] = nbytes
            costs.judging = found.judging
        self._node = found.then
        return found.cost
