"""The Hessian's trace: closed form against autograd's Hessian and against Hutchinson, and the delta made of it."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_tinykg.codecs.uniform import spread
from lightning_tinykg.hqgnn.delta import DeltaRule, probe
from lightning_tinykg.hqgnn.hessian import (
    MAX_DELTA,
    Curvature,
    bpr_curvature,
    bpr_trace,
    curvature,
    hutchinson,
    merge,
)
from lightning_tinykg.hqgnn.quantizer import Quantizer
from lightning_tinykg.models.functional import bpr_loss


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)


def batch(users: int = 5, items: int = 7, size: int = 12, dim: int = 4) -> tuple[Any, Any, Any]:
    """Tables, ids (rows occur more than once), and steps of the items' and users' rows."""
    tables = torch.randn(users, dim), torch.randn(items, dim)
    user, positive = torch.randint(users, (size,)), torch.randint(items, (size,))
    negative = (positive + torch.randint(1, items, (size,))) % items
    return tables, (user, positive, negative), (torch.rand(users, 1) + 0.5, torch.rand(items, 1) + 0.5)


def scored(tables: Any, ids: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tables[0][ids[0]], tables[1][ids[1]], tables[1][ids[2]]


def test_the_trace_is_that_of_autograds_hessian() -> None:
    tables, ids, _ = batch()
    expected = 0.0
    for index in (0, 1):

        def loss(table: Tensor, index: int = index) -> Tensor:
            return bpr_loss(*scored((table, tables[1]) if index == 0 else (tables[0], table), ids))

        hessian = torch.autograd.functional.hessian(loss, tables[index])
        size = tables[index].numel()
        expected += float(hessian.reshape(size, size).trace())  # type: ignore[union-attr]  # a tensor, of one function
    assert bpr_trace(*scored(tables, ids)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("users_too", [True, False])
def test_curvature_is_in_code_units_over_the_rows_of_the_batch(users_too: bool) -> None:
    """Mean diagonal and mean gradient of a dense computation, where rows that are in no triple count for nothing."""
    tables, ids, (user_step, item_step) = batch(users=50, items=60)
    codes = [torch.zeros_like(table).requires_grad_() for table in tables]
    steps = (user_step if users_too else 0 * user_step, item_step)

    def loss(user_codes: Tensor, item_codes: Tensor) -> Tensor:
        moved = tables[0] + steps[0] * user_codes, tables[1] + steps[1] * item_codes
        return bpr_loss(*scored(moved, ids)) * len(ids[0])

    gradients = torch.autograd.grad(loss(*codes), codes)
    which = [ids[0].unique(), torch.cat(ids[1:]).unique()]
    kept = [0, 1] if users_too else [1]
    elements = sum(which[side].numel() * 4 for side in kept)
    hessian = torch.autograd.functional.hessian(loss, tuple(codes))
    trace = sum(float(hessian[s][s].reshape(codes[s].numel(), -1).trace()) for s in kept)
    found = bpr_curvature(
        scored(tables, ids),
        ids,
        (user_step[ids[0]] if users_too else None, item_step[ids[1]], item_step[ids[2]]),
    )
    assert found.trace.item() == pytest.approx(trace / elements, rel=1e-4)
    assert found.gradient.item() == pytest.approx(
        sum(float(gradients[s].abs().sum()) for s in kept) / elements, rel=1e-4
    )


@pytest.mark.parametrize("scale", ["table", "node", "group"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_closed_form_within_three_standard_errors_of_hutchinson(bits: int, scale: Any) -> None:
    tables, ids, _ = batch(users=30, items=40, size=64, dim=8)
    quantizers = [Quantizer(bits, scale=scale, group_size=4).eval() for _ in tables]
    rounded = [quantizer(table).detach() for quantizer, table in zip(quantizers, tables, strict=True)]
    steps = [spread(q.range_of(t)[0].detach(), t).expand(len(t), -1) for q, t in zip(quantizers, tables, strict=True)]
    of_rows = steps[0][ids[0]], steps[1][ids[1]], steps[1][ids[2]]
    closed = bpr_trace(*scored(rounded, ids), *of_rows)

    def loss(user_codes: Tensor, item_codes: Tensor) -> Tensor:
        moved = rounded[0] + steps[0] * user_codes, rounded[1] + steps[1] * item_codes
        return bpr_loss(*scored(moved, ids))

    zeros = [torch.zeros_like(table) for table in tables]
    found = hutchinson(loss, zeros, tolerance=0.0, max_probes=300, seed=bits)
    assert found.probes == 300
    assert abs(found.trace - closed.item()) < 3 * found.standard_error
    # and both ways to delta agree, since they see the same curvature
    both = [rule(scored(rounded, ids)) for rule in (lambda r: bpr_curvature(r, ids, of_rows),)]
    probed = probe(bpr_loss, scored(rounded, ids), ids, of_rows, seed=bits)
    assert probed.gradient.item() == pytest.approx(both[0].gradient.item(), rel=1e-4)
    assert probed.delta.item() == pytest.approx(both[0].delta.item(), rel=0.25)


@pytest.mark.parametrize("tolerance", [0.0, 0.05, 0.5])
def test_hutchinson_stops_when_it_may_and_not_before(tolerance: float) -> None:
    """Also where the trace is negative, which ended EWGS's test at once."""
    matrix = torch.randn(20, 20)
    matrix = matrix + matrix.t() - 5 * torch.eye(20)
    found = hutchinson(lambda x: 0.5 * x @ matrix @ x, [torch.zeros(20)], tolerance=tolerance, max_probes=4000)
    assert matrix.trace() < 0
    assert abs(found.trace - matrix.trace().item()) < 4 * found.standard_error
    if tolerance:
        assert 8 <= found.probes < 4000
        assert found.standard_error <= tolerance * abs(found.trace) + 1e-9
    else:
        assert found.probes == 4000


def test_the_standard_error_is_that_of_repeated_estimates() -> None:
    matrix = torch.randn(20, 20)
    matrix = matrix + matrix.t()

    def estimate(seed: int) -> Any:
        return hutchinson(
            lambda x: 0.5 * x @ matrix @ x, [torch.zeros(20)], seed=seed, tolerance=0.0, min_probes=50, max_probes=50
        )

    several = [estimate(seed) for seed in range(60)]
    z = [(found.trace - matrix.trace().item()) / found.standard_error for found in several]
    assert 0.6 < torch.tensor(z).std().item() < 1.5
    assert abs(sum(z) / len(z)) < 3 / 60**0.5


def test_hutchinson_repeats_itself_and_leaves_torchs_generator_alone() -> None:
    point = [torch.randn(6)]
    before = torch.get_rng_state()
    estimates = [hutchinson(lambda x: x.pow(4).sum() + x.prod(), point, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert estimates[0] == estimates[1] != estimates[2]


def test_hutchinson_of_a_linear_or_constant_loss_is_0() -> None:
    assert hutchinson(lambda x: 3 * x.sum(), [torch.ones(4)]).trace == 0
    assert hutchinson(lambda x, y: (y * y).sum(), [torch.ones(4), torch.ones(2)]).trace == 4  # x takes no part


def test_hutchinson_works_under_no_grad_and_says_what_is_wrong() -> None:
    with torch.no_grad():
        assert hutchinson(lambda x: (x**2).sum(), [torch.ones(4)]).trace == 8
    with pytest.raises(ValueError, match="min_probes must be at least 2"):
        hutchinson(torch.sum, [torch.ones(2)], min_probes=1)
    with pytest.raises(ValueError, match="tolerance must be a number of at least 0, got -1"):
        hutchinson(torch.sum, [torch.ones(2)], tolerance=-1)


def test_no_graph_is_left_behind() -> None:
    """`backward(create_graph=True)` ties a parameter to its gradient's graph; here reference counting frees it all."""
    parameter = torch.nn.Parameter(torch.randn(8))
    seen: list[weakref.ref[Tensor]] = []

    def loss(x: Tensor) -> Tensor:
        value = (x * parameter).exp().sum()
        seen.append(weakref.ref(value))
        return value

    gc.collect()
    gc.disable()
    try:
        hutchinson(loss, [torch.randn(8)])
        curvature(lambda x: loss(x.reshape(-1)), [torch.randn(2, 4)], [2])
        assert seen
        assert all(ref() is None for ref in seen)
    finally:
        gc.enable()
    assert parameter.grad is None


def test_hooks_on_saved_tensors_see_nothing_of_it() -> None:
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        hutchinson(lambda x: x.exp().sum(), [torch.ones(3)])
    assert not packed


def test_merge_counts_and_numbers_distinct_ids() -> None:
    ids = torch.randint(20, (50,))
    count, place = merge(ids)
    values, inverse = ids.unique(return_inverse=True)
    assert count.item() == values.numel()
    assert torch.equal(place, inverse)
    assert merge(torch.empty(0, dtype=torch.long))[0] == 0


CASES = {
    "one row": (torch.randn(1, 4), torch.tensor([[0], [0], [1]])),
    "the same triple again and again": (torch.randn(1, 4), torch.tensor([[0] * 9, [0] * 9, [1] * 9])),
    "zero users": (torch.zeros(2, 4), torch.tensor([[0, 1], [0, 1], [1, 0]])),
    "far apart: no gradient left": (1e4 * torch.ones(2, 4), torch.tensor([[0, 1], [0, 0], [1, 1]])),
    "a positive that is its own negative": (torch.randn(2, 4), torch.tensor([[0, 1], [1, 0], [1, 0]])),
    "huge": (1e30 * torch.ones(2, 4), torch.tensor([[0, 1], [0, 0], [1, 1]])),
    "not a number": (torch.full((2, 4), torch.nan), torch.tensor([[0, 1], [0, 0], [1, 1]])),
}


@pytest.mark.parametrize("users_too", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_delta_is_finite_and_not_negative_on_any_batch(case: str, users_too: bool) -> None:
    users, ids = CASES[case]
    items = torch.stack([torch.ones(4), -torch.ones(4)])
    rows = users[ids[0]], items[ids[1]], items[ids[2]]
    one = torch.ones(ids.size(1), 1)
    for found in (
        # None: not of the users
        bpr_curvature(rows, tuple(ids), (one if users_too else None, one, one)),  # type: ignore[arg-type]
        # None: not of the users
        probe(bpr_loss, rows, tuple(ids), (one if users_too else None, one, one), seed=0),  # type: ignore[arg-type]
    ):
        assert found.delta.isfinite()
        assert 0 <= found.delta <= MAX_DELTA
    if case.startswith("a positive that") and not users_too:
        # None: not of the users
        assert bpr_curvature(rows, tuple(ids), (None, one, one)).trace == 0  # type: ignore[arg-type]


def test_delta_does_not_depend_on_the_catalogue_nor_on_the_batch_repeated() -> None:
    tables, ids, (_, item_step) = batch()
    twice = tuple(torch.cat([i, i]) for i in ids)
    deltas = [
        # None: not of the users
        bpr_curvature(scored(tables, i), i, (None, item_step[i[1]], item_step[i[2]])).delta.item()  # type: ignore[arg-type]
        for i in (ids, twice)
    ]
    assert deltas[0] == pytest.approx(deltas[1])
    assert Curvature(torch.tensor(-1.0), torch.tensor(1.0)).delta == 0


def test_rule_refuses_what_it_cannot_be() -> None:
    with pytest.raises(ValueError, match="hessian must be 'closed', 'hutchinson' or a fixed delta"):
        DeltaRule("open")  # type: ignore[arg-type]  # refused
    with pytest.raises(ValueError, match="fixed delta of at least 0, got -1"):
        DeltaRule(-1)
    with pytest.raises(ValueError, match="refresh_every must be a whole number of at least 1, got 0"):
        DeltaRule(refresh_every=0)
    assert not DeltaRule(0.5).is_due(0)
    assert [DeltaRule(refresh_every=3).is_due(step) for step in range(4)] == [True, False, False, True]
