"""Whatever layers follow one another: exact is exact, 8 bits are nearly so, and fewer bits are hardly more bytes."""

import pytest
import torch
from random_models import RandomModel, growth

BITS = (8, 4, 2, 1)
GROWTH = 0.6
"""Fewer bits may store that much more, since what is made again is made of other tensors: of 300 models 0.54 at most,
of those without attention 0.3. Attention's weights are made again of queries and keys or of what both are made of."""


def _check(seed: int) -> float:
    model = RandomModel(seed)
    want, _ = model.step(None)
    exact, _ = model.step(32)
    assert torch.equal(exact, want), model.names
    stored = []
    for bits in BITS:
        got, nbytes = model.step(bits)
        stored.append(nbytes)
        if bits == 8:
            assert (got - want).norm() < 0.05 * want.norm(), model.names
    assert growth(stored) < GROWTH, (model.names, stored)
    return growth(stored)


def _check_mixed(seed: int) -> None:
    """In mixed precision exact is exact, and 8 bits add less than mixed precision did, or a twentieth."""
    model = RandomModel(seed)
    full, _ = model.step(None)
    want, _ = model.step(None, mixed=True)
    exact, _ = model.step(32, mixed=True)
    assert torch.equal(exact, want), model.names
    got, _ = model.step(8, mixed=True)
    assert (got - want).norm() < max(0.05 * want.norm(), (want - full).norm()), model.names


@pytest.mark.parametrize("seed", range(10))
def test_random_models(seed: int) -> None:
    _check(seed)


@pytest.mark.parametrize("seed", range(10))
def test_random_models_in_mixed_precision(seed: int) -> None:
    _check_mixed(seed)


@pytest.mark.slow
def test_many_random_models_in_mixed_precision() -> None:
    for seed in range(10, 310):
        _check_mixed(seed)


@pytest.mark.slow
def test_many_random_models() -> None:
    """How often fewer bits are more bytes is shown with ``-s``."""
    grows = [grown for grown in map(_check, range(10, 310)) if grown > 0]
    print(f"of 300 models {len(grows)} store more at some width than at the next greater, at the most {max(grows):.0%}")
    assert len(grows) < 40
