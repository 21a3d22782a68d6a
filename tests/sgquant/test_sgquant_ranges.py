"""Ranges: what a calibration takes for the least and the greatest level, and the range that loses the least."""

import copy

import pytest
import torch
from torch import Tensor

from lightning_tinykg.sgquant.quantize import Level, fake_quantize
from lightning_tinykg.sgquant.ranges import Observed, least_error


def test_min_and_max_by_bucket_and_over_batches() -> None:
    observed = Observed(buckets=3)
    observed.add(torch.tensor([[1.0, 2.0], [5.0, 6.0]]), torch.tensor([0, 1]))
    observed.add(torch.tensor([[-1.0, 0.0]]), torch.tensor([1]))
    assert observed.ends(0, 8) == (1, 2)
    assert observed.ends(1, 8) == (-1, 6)
    assert observed.ends(2, 8) == observed.ends(None, 8) == (-1, 6)  # nothing was seen there: all that was


def test_a_percentile_leaves_outliers_out() -> None:
    x = torch.linspace(0, 1, 1001)[:, None]
    x[0], x[-1] = -1000.0, 1000.0
    observed = Observed(1, "percentile", 0.99)
    observed.add(x, None)
    assert observed.ends(None, 8) == pytest.approx((0.01, 0.99))
    assert Observed(1, "percentile", 1.0).ends(None, 8) == (0, 0)


def test_a_moving_average_moves_by_a_tenth() -> None:
    observed = Observed(1, "ema")
    observed.add(torch.tensor([[0.0, 1.0]]), None)
    observed.add(torch.tensor([[-1.0, 2.0]]), None)
    assert observed.ends(None, 8) == pytest.approx((-0.1, 1.1))


def test_ranks_agree_on_the_widest_range() -> None:
    one, other = Observed(1), Observed(1)
    one.add(torch.tensor([[0.0, 1.0]]), None)
    other.add(torch.tensor([[-1.0, 0.5]]), None)
    one.agree([one, other])
    assert one.ends(None, 8) == (-1, 1)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_range_of_least_error_loses_less_than_the_widest(bits: int) -> None:
    x = torch.randn(4000, 1) ** 3  # a few values are far out
    lost = {}
    for kind in ("minmax", "mse"):
        observed = Observed(1, kind)
        observed.add(x, None)
        lost[kind] = (x - fake_quantize(x, [Level(bits, *observed.ends(None, bits))])).square().mean()
    assert lost["mse"] < lost["minmax"]


def test_the_range_of_least_error_keeps_what_fits_the_levels() -> None:
    for bits in (1, 2, 4):
        levels = torch.linspace(-1, 2, 2**bits)
        observed = Observed(1, "mse")
        observed.add(levels[torch.randint(2**bits, (500, 3))], None)
        assert observed.ends(None, bits) == pytest.approx((-1, 2))


def test_the_range_of_least_error_is_the_same_on_all_ranks_and_after_loading() -> None:
    ranks = [Observed(1, "mse"), Observed(1, "mse")]
    for observed in ranks:
        observed.add(torch.randn(100, 4), None)
    sent = copy.deepcopy(ranks)
    for observed in ranks:
        observed.agree(sent)
    assert ranks[0].ends(None, 2) == ranks[1].ends(None, 2)
    loaded = Observed(1, "mse")
    loaded.load_state_dict(ranks[0].state_dict())
    assert loaded.ends(None, 2) == ranks[0].ends(None, 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_has_no_range(bad: float) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        Observed(1).add(torch.tensor([[1.0, bad]]), None)


def lost(x: Tensor, bits: int, ends: tuple[float, float]) -> float:
    return float((x - fake_quantize(x[:, None], [Level(bits, *ends)])[:, 0]).square().sum())


SHAPES = {
    "normal": lambda: torch.randn(5000),
    "one-sided": lambda: torch.randn(5000).relu(),
    "heavy tails": lambda: torch.randn(5000) ** 3,
    "one outlier": lambda: torch.cat([torch.randn(5000), torch.tensor([30.0])]),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_no_range_of_another_grid_loses_much_less_of_the_values_themselves(shape: str, bits: int) -> None:
    """It is chosen by some quantiles, each with its share of the values; an outlier counts as one value."""
    torch.manual_seed(0)
    x = SHAPES[shape]()
    observed = Observed(1, "mse")
    observed.add(x[:, None], None)
    shares = torch.logspace(-2, 0, 20).tolist()
    middle, low, high = float(x.median()), float(x.min()), float(x.max())
    tried = [(middle + a * (low - middle), middle + b * (high - middle)) for a in shares for b in shares]
    assert lost(x, bits, observed.ends(None, bits)) < 1.05 * min(lost(x, bits, ends) for ends in tried)


@pytest.mark.parametrize("bits", [1, 2, 8])
@pytest.mark.parametrize("values", [[3.0], [2.0, 2.0, 2.0], [0.0, 1.0], [0.0] * 999 + [1.0], [-3.0, -3.0, 5.0]])
def test_one_value_or_two_are_exact_at_any_width_and_the_range_spans_them(values: list[float], bits: int) -> None:
    x = torch.tensor(values)
    observed = Observed(1, "mse")
    observed.add(x[:, None], None)
    assert observed.ends(None, bits) == (min(values), max(values))
    assert lost(x, bits, observed.ends(None, bits)) == 0


@pytest.mark.parametrize("unit", [1e-30, 1.0, 1e30])
def test_the_range_of_least_error_knows_no_unit(unit: float) -> None:
    values = (torch.randn(301, generator=torch.Generator().manual_seed(0)) ** 3).sort().values
    low, high = least_error(values, bits=2)
    assert least_error(values * unit, bits=2) == pytest.approx((low * unit, high * unit), rel=1e-5)
    assert low < high


def test_a_rank_that_has_seen_nothing_in_a_bucket_has_no_say() -> None:
    one, other = Observed(2, "mse"), Observed(2, "mse")
    values = torch.linspace(3, 4, 50)[:, None]
    one.add(values, torch.zeros(50, dtype=torch.long))
    other.add(values, torch.ones(50, dtype=torch.long))
    alone = [one.ends(0, 2), other.ends(1, 2)]
    one.agree([one, other])
    assert [one.ends(0, 2), one.ends(1, 2)] == alone
    one.add(values, torch.ones(50, dtype=torch.long))  # goes on with what the ranks agreed upon
    assert one.ends(1, 2) == pytest.approx(alone[1])


def test_more_batches_move_the_range_of_least_error() -> None:
    observed = Observed(1, "mse")
    observed.add(torch.linspace(0, 1, 100)[:, None], None)
    first = observed.ends(None, 4)
    observed.add(torch.linspace(2, 3, 100)[:, None], None)
    half = 1 / 32  # of what is uniform, the outermost levels lie half a step within
    assert first == pytest.approx((half, 1 - half), abs=0.01)
    assert observed.ends(None, 4) == pytest.approx((1 + half, 2 - half), abs=0.01)  # the batches' mean quantiles
