"""Arguments are refused in the same words everywhere, and before anything is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lightning_tinykg import (
    HQGNN,
    KGAT,
    KGCN,
    KGIN,
    KGNNLS,
    BitPlan,
    KGRecDataModule,
    LightGCN,
    SearchSpace,
    SGQuantCallback,
    StepAnneal,
    WarmupThen,
)
from lightning_tinykg.arguments import check_choice, check_number, check_whole, check_wholes


@pytest.mark.parametrize("value", [3, np.int64(3), torch.tensor(3)])
def test_a_whole_number_is_one_in_any_dress(value: Any) -> None:
    number = check_whole("steps", value, 3)
    assert number == 3
    assert type(number) is int
    assert check_wholes("steps", [value, 4]) == (3, 4)


@pytest.mark.parametrize("value", [2, -1, 2.0, 3.5, True, "3", None, [3], torch.tensor(3.0), np.ones(2)])
def test_what_is_no_whole_number_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^steps must be a whole number of at least 3, or None, got "):
        check_whole("steps", value, 3, ", or None")


@pytest.mark.parametrize("value", [3, "34", None, [0], [2, 0.5], [1, True]])
def test_what_is_no_list_of_whole_numbers_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^layer_dims must be a list of whole numbers of at least 1, got "):
        check_wholes("layer_dims", value, 1)


@pytest.mark.parametrize("value", [0.5, 1, np.float32(0.25), torch.tensor(0.75)])
def test_a_number_within_its_bounds(value: Any) -> None:
    assert check_number("share", value, above=0, most=1) == float(value)


@pytest.mark.parametrize("value", [0, -0.1, 1.5, float("nan"), float("inf"), True, "0.5", None, 1j, np.ones(2)])
def test_what_is_no_such_number_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^share must be a number above 0 and of at most 1, got "):
        check_number("share", value, above=0, most=1)


def test_a_number_without_bounds_is_finite() -> None:
    assert check_number("bias", -1e9) == -1e9
    with pytest.raises(ValueError, match=r"^bias must be a finite number, got nan"):
        check_number("bias", float("nan"))


@pytest.mark.parametrize("value", ["c", 1, None, ["a"]])
def test_what_is_no_choice_is_named(value: Any) -> None:
    check_choice("way", "a", ("a", "b"))
    with pytest.raises(ValueError, match=r"^way must be one of a, b or None, got "):
        check_choice("way", value, ("a", "b"), " or None")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KGAT(dim=0), "dim must be a whole number of at least 1, got 0"),
        (lambda: KGAT(layer_dims=64), "layer_dims must be a list of whole numbers of at least 1, got 64"),
        (lambda: KGAT(dropout=1.0), r"dropout must be a number of at least 0 and below 1, got 1\.0"),
        (lambda: KGAT(lr=-1), "lr must be a number of at least 0, got -1"),
        (lambda: KGAT(k=2.5), r"k must be a whole number of at least 1, got 2\.5"),
        (lambda: KGAT(k=[]), "k must be a whole number of at least 1, or several, got none"),
        (lambda: KGCN(hops=0), "hops must be a whole number of at least 1, got 0"),
        (lambda: KGNNLS(ls_weight=-1), "ls_weight must be a number of at least 0, got -1"),
        (lambda: KGIN(num_layers=1.5), r"num_layers must be a whole number of at least 0, got 1\.5"),
        (lambda: LightGCN(l2=float("nan")), "l2 must be a number of at least 0, got nan"),
        (lambda: LightGCN(num_users=0), "num_users must be a whole number of at least 1, got 0"),
        (lambda: LightGCN(num_items=5, num_entities=2), "num_entities must be a whole number of at least 5, got 2"),
        (lambda: HQGNN("lightgcn"), "encoder must be a module, or the class path and arguments of one, got 'lightgcn'"),
        (lambda: HQGNN(LightGCN(), bits=4.0), r"bits must be one of 1, 2, 4, 8, 32, got 4\.0"),
        (lambda: HQGNN(LightGCN(), compare=4), "compare must be a list of whole numbers of at least 1, got 4"),
        (lambda: HQGNN(LightGCN(), temperature=0), "temperature must be a number above 0, got 0"),
        (lambda: KGRecDataModule("synthetic", num_neighbors=5), "num_neighbors must be a list of .*, got 5"),
        (lambda: StepAnneal({"a": 2}), "bits must map counts from 0 on, 0 among them, to widths, got {'a': 2}"),
        (lambda: StepAnneal(3), "bits must map counts from 0 on, 0 among them, to widths, got 3"),
        (lambda: WarmupThen(3, 8, "x"), "then must be a width or a schedule, got 'x'"),
        (lambda: BitPlan("plan.yaml"), "entries must map patterns to bits, or be a list of PlanEntry, got 'plan.yaml'"),
        (lambda: BitPlan({3: 2}), "a pattern must be a layer, or a tuple of layer, component and topology, got 3"),
        (lambda: BitPlan({("a", "b", "c", "d"): 2}), r"a pattern must be a layer, .*, got \('a', 'b', 'c', 'd'\)"),
        (lambda: SearchSpace({3: (2, 4)}), "a pattern must be a layer, or a tuple of layer, component and .*, got 3"),
        (lambda: BitPlan(default=4.0), r"bits of \* must be one of .*, or a schedule, got 4\.0"),
        (lambda: SGQuantCallback(buckets=0), "buckets must be a whole number of at least 1, .*, got 0"),
        (lambda: SGQuantCallback(buckets=[3, 2]), r"split_points must be ascending whole numbers, got \[3, 2\]"),
        (lambda: SGQuantCallback(range="max"), "range must be one of minmax, percentile, ema, mse, got 'max'"),
        (lambda: SGQuantCallback(percentile=2), "percentile must be a number above 0.5 and of at most 1, got 2"),
        (lambda: SGQuantCallback(granularity="row"), "granularity must be one of .*, got 'row'"),
        (lambda: SGQuantCallback(protect=0.5), r"protect must be two probabilities, the lesser first, got 0\.5"),
    ],
)
def test_it_is_refused_where_it_is_written(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
