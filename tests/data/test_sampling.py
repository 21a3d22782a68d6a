"""Negatives, splits and look-ups."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_tinykg.data.sampling import NegativeSampler
from lightning_tinykg.data.splits import ItemsByUser, hold_out


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_negatives_are_never_positives(data: st.DataObject) -> None:
    users, items = data.draw(st.integers(1, 6)), data.draw(st.integers(2, 9))
    seen = [data.draw(st.sets(st.integers(0, items - 1), max_size=items - 1)) for _ in range(users)]
    pairs = np.array([(u, i) for u, row in enumerate(seen) for i in row], dtype=np.int64).reshape(-1, 2).T
    sampler = NegativeSampler(pairs[0], pairs[1], num_rows=users, num_columns=items)
    rows = np.repeat(np.arange(users), 20)
    negatives = sampler.sample(rows, np.random.default_rng(0))
    assert all(0 <= n < items and n not in seen[u] for u, n in zip(rows, negatives, strict=True))
    assert not sampler.linked(rows, negatives).any()
    assert sampler.linked(pairs[0], pairs[1]).all()


def test_negatives_are_uniform() -> None:
    sampler = NegativeSampler(np.zeros(5, dtype=np.int64), np.array([0, 3, 4, 8, 9]), num_rows=1, num_columns=10)
    counts = np.bincount(sampler.sample(np.zeros(50_000, dtype=np.int64), np.random.default_rng(0)), minlength=10)
    assert np.flatnonzero(counts).tolist() == [1, 2, 5, 6, 7]
    # 10,000 expected each, standard deviation 89.
    assert np.abs(counts[counts > 0] - 10_000).max() < 450


def test_user_who_has_seen_everything() -> None:
    with pytest.raises(ValueError, match=r"user 1 is linked to all 2 items, so no negative can be drawn"):
        NegativeSampler(np.array([0, 1, 1]), np.array([0, 0, 1]), num_rows=2, num_columns=2)


def test_hold_out_is_disjoint_reproducible_and_of_the_right_size() -> None:
    users = np.sort(np.random.default_rng(0).integers(2000, size=20_000))
    first, again, other = (hold_out(users, num_users=2000, fraction=0.1, seed=s) for s in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    # A hundredth: five standard deviations of the sum of 2,000 roundings.
    assert abs(first.mean() - 0.1) < 0.005
    assert (np.bincount(users[~first], minlength=2000) >= (np.bincount(users, minlength=2000) > 0)).all()


def test_hold_out_leaves_single_interactions_in_train() -> None:
    assert not hold_out(np.arange(100), num_users=100, fraction=0.9, seed=0).any()
    assert hold_out(np.zeros(10, dtype=np.int64), num_users=1, fraction=0.99, seed=0).sum() == 9
    assert not hold_out(np.zeros(10, dtype=np.int64), num_users=1, fraction=0.0, seed=0).any()


def test_gather_returns_each_users_items() -> None:
    rng = np.random.default_rng(0)
    pairs = rng.integers([[7], [50]], size=(2, 40))
    table = ItemsByUser.build(pairs, num_users=8)
    users = np.array([7, 3, 0, 3])  # one without items, one twice
    rows, items = table.gather(users)
    for row, user in enumerate(users):
        assert sorted(items[rows == row]) == sorted(pairs[1][pairs[0] == user])
