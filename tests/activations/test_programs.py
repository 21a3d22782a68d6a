"""Whatever ops come after one another: exact mode gives the plain gradients, and rounding is a small change of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from comparing import Loss, compressed, gradients, identical
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from programs import OPS, Graph, Step

STEPS = st.builds(Step, st.sampled_from(sorted(OPS)), st.booleans(), st.integers(0, 3), st.integers(0, 8))
PROGRAMS = st.lists(STEPS, min_size=1, max_size=14)

GATHERED = Step("gather", False, 0, 0)
SEEN_TO_FAIL = {
    "an exponential of much, bounded from above": [
        Step(name, False, 0, 0)
        for name in (
            *("absolute", "absolute", "absolute", "by its halves", "product with a conjugate"),
            *("absolute", "absolute", "absolute", "bi-interaction", "absolute", "rotation", "kept and written"),
        )
    ],
    "a gathered row, seen as complex": [GATHERED, Step("absolute", True, 0, 0)],
    "gathered rows in a complex product": [Step("complex rows", False, 0, 0), Step("complex rows", False, 0, 1)],
    "what is seen in halves": [GATHERED, Step("multiply", True, 0, 0), Step("by its halves", True, 0, 0)],
    "written through a view, and then asked for its data": [
        Step("written through a view", False, 0, 1),
        Step("data", False, 0, 0),
    ],
    "written through a view, and then a factor": [
        Step("written through a view", False, 1, 0),
        Step("product with the transposed", False, 0, 0),
    ],
    "written through its data": [Step("two layers", False, 0, 0), Step("written through data", False, 0, 1)],
}


def _assert_exact(loss: Loss, graph: Graph, want: Sequence[torch.Tensor]) -> None:
    for recompute in ("cheap", "aggressive", "off"):
        got, _ = compressed(loss, graph.parameters, 32, recompute=recompute)
        assert all(map(identical, got, want)), recompute


def _check(program: Sequence[Step]) -> None:
    graph = Graph()

    def loss() -> torch.Tensor:
        return graph.run(program)

    try:
        want = gradients(loss, graph.parameters)
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        reject()  # a plain backward refuses some that write in place
    _assert_exact(loss, graph, want)
    if not all(torch.isfinite(gradient).all() for gradient in want):
        return
    norm = torch.cat([gradient.flatten() for gradient in want]).norm()
    for bits, most in ((8, 0.2), (2, 0.2 * 255 / 3)):  # a step of 2 bits is as many times as wide
        got, _ = compressed(loss, graph.parameters, bits)
        assert torch.cat([(a - b).flatten() for a, b in zip(got, want, strict=True)]).norm() <= most * norm, bits


def _check_mixed(program: Sequence[Step]) -> None:
    """Exact mode is exact in mixed precision too."""
    graph = Graph()

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return graph.run(program)

    try:
        want = gradients(loss, graph.parameters)
    except RuntimeError:
        reject()  # not every program runs in mixed precision: one op casts what another takes as it is
    _assert_exact(loss, graph, want)


@pytest.mark.parametrize("name", SEEN_TO_FAIL)
def test_programs_that_failed(name: str) -> None:
    _check(SEEN_TO_FAIL[name])


@pytest.mark.parametrize("name", OPS)
def test_each_op_after_another(name: str) -> None:
    _check([Step("linear", False, 0, 0), Step(name, False, 0, 1), Step("linear", True, 0, 0), Step(name, True, 0, 1)])


@pytest.mark.parametrize("check", [_check, _check_mixed])
@settings(max_examples=60, deadline=None, derandomize=True)  # the same in each run: a gate is no place to search
@given(program=PROGRAMS)
def test_programs(check: Callable[[Sequence[Step]], None], program: list[Step]) -> None:
    check(program)


@pytest.mark.slow
@pytest.mark.parametrize("check", [_check, _check_mixed])
@settings(max_examples=2000, deadline=None)
@given(program=PROGRAMS)
def test_many_programs(check: Callable[[Sequence[Step]], None], program: list[Step]) -> None:
    check(program)
