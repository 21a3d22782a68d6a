import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_tinykg.codecs.noise import make_key, uniform

CPU = torch.device("cpu")
N = 1 << 20
LIMIT = 4.5  # two-sided probability 7e-6; the keys are fixed, so a test that passes once passes always


def z_of_mean(u: Tensor) -> float:
    return float((u.double().mean() - 0.5) / (math.sqrt(1 / 12) / math.sqrt(u.numel())))


@pytest.mark.parametrize("key", [0, 1, make_key(0, 0, 0), make_key(3, 1, 4), (1 << 64) - 1, 0xFFFFFFFF, 1 << 63])
def test_uniform(key: int) -> None:
    u = uniform(key, 0, N, CPU).double()
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(z_of_mean(u)) < LIMIT
    # the variance of (u - 1/2)**2 is 1/80 - 1/144 = 1/180
    z_variance = ((u - 0.5).square().mean() - 1 / 12) / (math.sqrt(1 / 180) / math.sqrt(N))
    assert abs(float(z_variance)) < LIMIT
    # chi-square over 256 cells, by its normal approximation
    counts = torch.histc(u, 256, 0, 1)
    chi = ((counts - N / 256).square() / (N / 256)).sum()
    assert abs(float(chi) - 255) / math.sqrt(2 * 255) < 5


def test_neighbours_are_uncorrelated() -> None:
    u = uniform(make_key(0, 7), 0, N, CPU).double() - 0.5
    for lag in (1, 2, 3, 4, 32, 64, 1024):
        z = (u[:-lag] * u[lag:]).mean() * 12 * math.sqrt(N - lag)
        assert abs(float(z)) < LIMIT, lag


@settings(max_examples=60)
@given(
    key=st.integers(0, 2**64 - 1),
    start=st.integers(0, 2**33),
    cuts=st.lists(st.integers(0, 500), max_size=5),
)
def test_same_numbers_for_any_chunking(key: int, start: int, cuts: list[int]) -> None:
    whole = uniform(key, start, 500, CPU)
    ends = [0, *sorted(cuts), 500]
    pieces = [uniform(key, start + a, b - a, CPU) for a, b in pairwise(ends)]
    assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize("boundary", [1 << 31, 1 << 32, 5 << 31])
def test_across_two_to_the_31(boundary: int) -> None:
    whole = uniform(9, boundary - 300, 700, CPU)
    assert torch.equal(whole[:300], uniform(9, boundary - 300, 300, CPU))
    assert torch.equal(whole[300:], uniform(9, boundary, 400, CPU))
    assert ((whole >= 0) & (whole < 1)).all()


def test_positions_beyond_two_to_the_31_have_numbers_of_their_own() -> None:
    starts = (0, 1 << 31, 1 << 32, 3 << 31)
    blocks = torch.stack([uniform(make_key(5), start, 100_000, CPU) for start in starts])
    for block in blocks:
        assert abs(z_of_mean(block)) < LIMIT
    for i in range(len(starts)):
        for j in range(i):
            assert (blocks[i] == blocks[j]).double().mean() < 1e-4


def test_consecutive_keys_are_independent() -> None:
    """One position's numbers over the steps of a run are uniform, and those of two steps are uncorrelated."""
    u = torch.stack([uniform(make_key(0, step), 0, 512, CPU) for step in range(2000)]).double()
    z = (u.mean(0) - 0.5) * math.sqrt(12 * 2000)
    assert float(z.abs().max()) < 5
    assert abs(z_of_mean(u.flatten())) < LIMIT
    lagged = ((u[1:] - 0.5) * (u[:-1] - 0.5)).mean() * 12 * math.sqrt(u[1:].numel())
    assert abs(float(lagged)) < LIMIT


def test_raw_consecutive_keys_share_no_shifted_noise() -> None:
    """An added key would give key 1 the numbers of key 0, one place on."""
    a, b = uniform(make_key(0), 0, 4096, CPU), uniform(make_key(1), 0, 4096, CPU)
    for shift in range(-8, 9):
        assert (a.roll(shift) == b).double().mean() < 0.01


def test_both_words_of_the_key_count() -> None:
    base = uniform(0x12345678_9ABCDEF0, 0, 4096, CPU)
    for bit in range(64):
        other = uniform(0x12345678_9ABCDEF0 ^ (1 << bit), 0, 4096, CPU)
        assert (base == other).double().mean() < 0.01, bit


def test_no_number_takes_part_in_pytorchs_generator() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    uniform(1, 0, 1000, CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_keys_depend_on_every_part_and_its_place() -> None:
    keys = {make_key(a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert len(keys) == 1000
    assert make_key(-1) == make_key((1 << 64) - 1)
    assert make_key(0) != make_key(0, 0)


def test_nothing() -> None:
    assert uniform(0, 5, 0, CPU).shape == (0,)
