"""The fake quantizer: its values by hand and against the packed codes, its gradient against the formula."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_tinykg.codecs.rows import PackedRows
from lightning_tinykg.sgquant.granularity import (
    DegreeBuckets,
    combined,
    componentwise,
    layerwise,
    topologywise,
    uniform,
)
from lightning_tinykg.sgquant.protecting import check_protect, protected_nodes, protection
from lightning_tinykg.sgquant.quantize import Level, fake_quantize
from lightning_tinykg.sgquant.shares import divisors

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 16)


def packed(x: Tensor, level: Level) -> Tensor:
    """What packed codes decode to."""
    return PackedRows.encode(x, level.bits, *level.scale_and_zero(x)).decode()


RANGES: dict[str, Any] = {"rows": (), "table": (-1.3, 1.7), "channels": ((-1.3,) * 6 + (0.0,), (1.7,) * 6 + (2.0,))}


@pytest.mark.parametrize("ends", RANGES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_it_is_what_packed_codes_decode_to(bits: int, ends: str) -> None:
    x, level = torch.randn(50, 7), Level(bits, *RANGES[ends])
    assert torch.equal(fake_quantize(x, [level]), packed(x, level))


@pytest.mark.parametrize("bits", WIDTHS)
def test_each_channel_is_stored_in_its_own_range(bits: int) -> None:
    x = (torch.randn(50, 3) * torch.tensor([0.01, 1, 100])).requires_grad_()
    ends = (-0.01, -2.0, 0.0), (0.02, 1.0, 90.0)
    y = fake_quantize(x, [Level(bits, *ends)])
    y.backward(upstream := torch.randn(50, 3))
    for channel, (low, high) in enumerate(zip(*ends, strict=True)):
        alone = x.detach()[:, channel : channel + 1].requires_grad_()
        stored = fake_quantize(alone, [Level(bits, low, high)])
        stored.backward(upstream[:, channel : channel + 1])
        assert torch.equal(y[:, channel : channel + 1], stored)
        assert torch.equal(x.grad[:, channel : channel + 1], alone.grad)


def test_channels_and_widths_meet() -> None:
    x, bucket = torch.randn(60, 2), torch.arange(60) % 3
    levels = [Level(4, (-2.0, -1.0), (2.0, 1.0)), Level(32), Level(1, (-1.0, -0.5), (1.0, 0.5))]
    y = fake_quantize(x, levels, bucket)
    for number, level in enumerate(levels):
        rows = x[bucket == number]
        assert torch.equal(y[bucket == number], rows if level.bits == 32 else packed(rows, level))
    seen = x.requires_grad_()
    fake_quantize(seen, levels, bucket).sum().backward()
    assert torch.equal(
        seen.grad == 1,
        (x.abs() <= torch.tensor([[2.0, 1.0]] * 60).where(bucket[:, None] == 0, torch.tensor([1.0, 0.5])))
        | (bucket == 1)[:, None],
    )


def test_shares_are_multiples_of_an_even_one() -> None:
    receivers = torch.tensor([0] * 100 + [1] * 4 + [2])
    degree = divisors("even", receivers, None, rows=3)
    assert degree.tolist() == [100.0] * 100 + [4.0] * 4 + [1.0]
    x = torch.cat([torch.randn(n).softmax(0) for n in (100, 4, 1)]).requires_grad_()
    level = Level(2, 0.0, 3.0, share="even")
    y = fake_quantize(x, [level], divisor=degree)
    assert torch.equal(y, fake_quantize(x * degree, [Level(2, 0.0, 3.0)]) / degree)
    y.backward(upstream := torch.randn(105))
    assert torch.equal(x.grad, upstream.where(x * degree <= 3, 0))
    with pytest.raises(ValueError, match="divisor must be given for levels with a share, got None"):
        fake_quantize(x, [level])


def test_of_shares_what_is_whole_or_protected_is_not_touched() -> None:
    x, degree, bucket = torch.rand(300), torch.randint(1, 50, (300,)).float(), torch.arange(300) % 2
    levels = [Level(32), Level(1, 0.0, 2.0, share="even")]
    assert torch.equal(fake_quantize(x, levels, bucket, divisor=degree)[bucket == 0], x[bucket == 0])
    protected = torch.arange(300) < 100
    y = fake_quantize(x, levels[1:], protected=protected, divisor=degree)
    assert torch.equal(y[protected], x[protected])
    assert not (y[~protected] == x[~protected]).any()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([*WIDTHS, 32]), min_size=2, max_size=4), st.booleans(), st.integers(0, 1000))
def test_rows_of_different_widths_are_those_of_their_own_codes(bits: list[int], per_row: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(30, 5, generator=generator)
    bucket = torch.randint(len(bits), (30,), generator=generator)
    ranges = [torch.randn(2, generator=generator).sort().values.tolist() for _ in bits]
    levels = [
        Level(b) if per_row or b == 32 else Level(b, low, high) for b, (low, high) in zip(bits, ranges, strict=True)
    ]
    y = fake_quantize(x, levels, bucket)
    for number, level in enumerate(levels):
        rows = x[bucket == number]
        assert torch.equal(y[bucket == number], rows if level.bits == 32 else packed(rows, level))


def test_two_bits_by_hand() -> None:
    x = torch.tensor([[-1.0, 0.0, 0.4], [0.6, 2.6, 9.0]])
    y = fake_quantize(x, [Level(2, 0.0, 3.0)])
    assert y.tolist() == [[0, 0, 0], [1, 3, 3]]


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_gradient_passes_within_the_range_and_not_beyond(bits: int) -> None:
    low, high = -0.7, 0.9
    x = torch.randn(200, 4).requires_grad_()
    upstream = torch.randn(200, 4)
    fake_quantize(x, [Level(bits, low, high)]).backward(upstream)
    scale, zero = Level(bits, low, high).scale_and_zero(x)
    inside = (x >= zero) & (x <= zero + scale * (2**bits - 1))
    assert 0 < inside.sum() < inside.numel()
    assert torch.equal(x.grad, torch.where(inside, upstream, 0))


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_gradient_passes_at_the_ends_of_the_range(bits: int) -> None:
    """The greatest level is rounded, and may be a bit less than the range's end."""
    ends = torch.randn(300, 2).sort(dim=1).values
    for low, high in ends.tolist():
        x = torch.tensor([[low, high]], requires_grad=True)
        fake_quantize(x, [Level(bits, low, high)]).sum().backward()
        fake_quantize(x, [Level(bits, low, high), Level(8, 0.0, 1.0)], torch.tensor([0])).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [[2.0, 2.0]]


@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_result_may_be_changed_in_place(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype).requires_grad_()
    fake_quantize(x, [Level(4, -2.0, 2.0)]).relu_().sum().backward()
    in_place, x.grad = x.grad, None
    fake_quantize(x, [Level(4, -2.0, 2.0)]).relu().sum().backward()
    assert in_place is not None
    assert in_place.any()
    assert torch.equal(in_place, x.grad)


def test_gradients_of_different_widths() -> None:
    x = torch.tensor([[-1.0, 0.5, 2.0]] * 3).requires_grad_()
    levels = [Level(1, 0.0, 1.0), Level(32), Level(4, 0.0, 3.0)]
    fake_quantize(x, levels, torch.tensor([0, 1, 2])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 1, 0], [1, 1, 1], [0, 1, 1]]


def test_a_rows_own_range_clips_nothing() -> None:
    x = torch.randn(20, 6).requires_grad_()
    fake_quantize(x, [Level(3)]).sum().backward()
    assert torch.equal(x.grad, torch.ones(20, 6))


def test_protected_rows_stay_and_have_the_whole_gradient() -> None:
    x = torch.randn(10, 3).mul(5).requires_grad_()
    protected = torch.arange(10) % 2 == 0
    y = fake_quantize(x, [Level(1, -0.1, 0.1)], protected=protected)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(y[protected], x[protected])
    assert torch.equal(x.grad[protected], torch.ones(5, 3))
    assert y[~protected].abs().max() < 0.2


@pytest.mark.parametrize("level", [Level(1), Level(4), Level(1, 2.5, 2.5), Level(8, 2.5, 2.5), Level(16, 2.5, 2.5)])
def test_a_constant_is_exact(level: Level) -> None:
    assert torch.equal(fake_quantize(torch.full((4, 3), 2.5), [level]), torch.full((4, 3), 2.5))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
@pytest.mark.parametrize("levels", [[Level(2)], [Level(2, 0.0, 1.0)], [Level(2, 0.0, 1.0), Level(4, 0.0, 1.0)]])
def test_nothing_is_left_as_it_is(shape: tuple[int, ...], levels: list[Level]) -> None:
    x = torch.zeros(shape, requires_grad=True)
    y = fake_quantize(x, levels, torch.zeros(shape[0], dtype=torch.long))
    y.sum().backward()
    assert y.shape == shape


def test_any_shape_and_float_dtype() -> None:
    x = torch.randn(6, 2, 3)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        y = fake_quantize(x.to(dtype), [Level(16)])
        assert y.dtype == dtype
        assert y.shape == x.shape
    assert torch.equal(fake_quantize(x, [Level(3)]), fake_quantize(x.reshape(6, 6), [Level(3)]).reshape(6, 2, 3))
    assert torch.equal(fake_quantize(x[:, 0, 0], [Level(1, 0.0, 1.0)]), (x[:, 0, 0] > 0.5).float())


def test_32_bits_is_the_tensor_itself() -> None:
    x = torch.randn(3, 3)
    assert fake_quantize(x, [Level(32), Level(32)]) is x
    with pytest.raises(ValueError, match="bucket must be given for 2 levels, got None"):
        fake_quantize(x, [Level(32), Level(1, 0.0, 1.0)])


# -- protection ------------------------------------------------------------------------------------------------------


def test_protection_goes_by_rank_and_equal_degrees_are_equal() -> None:
    degrees = torch.tensor([5, 0, 5, 9, 0])
    assert protection(degrees, (0.1, 0.5)).tolist() == pytest.approx([0.35, 0.15, 0.35, 0.5, 0.15])
    assert protection(torch.tensor([3]), (0.0, 1.0)).tolist() == [0.0]
    assert protection(torch.zeros(0, dtype=torch.long), (0.0, 1.0)).tolist() == []


def test_nodes_are_protected_with_their_probability() -> None:
    degrees, steps = torch.arange(50), 4000
    count = torch.zeros(50)
    for step in range(steps):
        count += protected_nodes(degrees, (0.05, 0.4), seed=3, step=step)
    p = protection(degrees, (0.05, 0.4))
    z = (count - steps * p) / (steps * p * (1 - p)).sqrt()
    # of 50 normal variables the largest is beyond 4.5 in one run of 3,000; the sum of squares is chi-square, 50
    assert z.abs().max() < 4.5
    assert abs(z.square().sum() - 50) < 4.5 * 10


def test_the_mask_draws_nothing_from_torch_and_repeats() -> None:
    before = torch.get_rng_state()
    one = protected_nodes(torch.arange(99), (0.5, 0.5), seed=0, step=7)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, protected_nodes(torch.arange(99), (0.5, 0.5), seed=0, step=7))
    assert not torch.equal(one, protected_nodes(torch.arange(99), (0.5, 0.5), seed=0, step=8))
    assert not torch.equal(one, protected_nodes(torch.arange(99), (0.5, 0.5), seed=1, step=7))


@pytest.mark.parametrize("protect", [(0.2, 0.1), (-0.1, 0.1), (0.0, 1.1), (0.1,)])
def test_probabilities_must_be_some(protect: Any) -> None:
    with pytest.raises(ValueError, match="protect must be two probabilities, the lesser first"):
        check_protect(protect)


# -- granularity -----------------------------------------------------------------------------------------------------


def test_quantile_buckets_share_the_nodes() -> None:
    degrees = torch.randperm(100)
    buckets = DegreeBuckets(4)
    points = buckets.points(degrees)
    assert torch.bincount(buckets.of(degrees, points)).tolist() == [25, 25, 25, 25]
    assert degrees[buckets.of(degrees, points) == 0].max() < degrees[buckets.of(degrees, points) == 1].min()


def test_many_nodes_of_one_degree_are_in_one_bucket() -> None:
    degrees = torch.tensor([1] * 90 + [2] * 5 + [50] * 5)
    buckets = DegreeBuckets(4)
    bucket = buckets.of(degrees, buckets.points(degrees))
    assert all(len(set(bucket[degrees == degree].tolist())) == 1 for degree in (1, 2, 50))
    assert bucket[0] == 0
    assert bucket[-1] > bucket[0]


@pytest.mark.parametrize("degrees", [[], [0], [3, 3, 3]])
def test_buckets_of_hardly_any_nodes(degrees: list[int]) -> None:
    buckets = DegreeBuckets(4)
    values = torch.tensor(degrees, dtype=torch.long)
    assert buckets.of(values, buckets.points(values)).tolist() == [0] * len(degrees)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count of degree buckets must be a whole number of at least 1, got 0"),
        ({"split_points": (4, 4)}, r"split_points must be ascending whole numbers, got \[4, 4\]"),
        ({"split_points": (0.5,)}, r"split_points must be ascending whole numbers, got \[0.5\]"),
    ],
)
def test_buckets_that_cannot_be_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DegreeBuckets(**options)


def test_plans_of_every_granularity() -> None:
    place = ("conv1", "embedding", "degree-1")
    assert uniform(4).bits_for(*place) == 4
    assert uniform(4, keep=["conv1"]).bits_for(*place) == 32
    assert layerwise({"conv1": 2}, default=8).bits_for(*place) == 2
    assert layerwise({"conv1": 2}, default=8).bits_for("conv2", "update") == 8
    plan = componentwise(embedding=4, message=8, attention=1)
    assert [plan.bits_for("conv1", part) for part in ("embedding", "message", "attention", "update")] == [4, 8, 1, 32]
    assert topologywise([8, 4, 2, 1]).bits_for(*place) == 4
    mixed = combined({("conv1", "embedding"): [8, 3], ("*", "attention"): 1}, default=16)
    assert [mixed.bits_for(*place), mixed.bits_for("conv2", "attention"), mixed.bits_for("conv2", "update")] == [
        3,
        1,
        16,
    ]
    with pytest.raises(ValueError, match="bits of"):
        uniform(3.5)  # type: ignore[arg-type]  # refused
