"""The quantizer: codes that decode to the forward, clips that are where they should be, states that resume."""

from typing import Any

import pytest
import torch

from lightning_tinykg.hqgnn.calibration import best_clip
from lightning_tinykg.hqgnn.quantizer import Quantizer
from lightning_tinykg.hqgnn.rotation import Rotation

BITS = (1, 2, 4, 8)
SCALES = ("table", "node", "group")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def embeddings(rows: int = 40, dim: int = 32) -> torch.Tensor:
    """Rows of very different length, as popular and rare items have."""
    return torch.randn(rows, dim) * torch.logspace(-2, 1, rows)[:, None]


@pytest.mark.parametrize("rows", [8192, 65536, 131072])
@pytest.mark.parametrize("scale", ["table", "node"])
def test_the_clip_of_many_rows_is_found_from_all_columns(scale: Any, rows: int) -> None:
    x = torch.randn(rows, 64)
    x[:, ::8] *= 0.05
    quantizer = Quantizer(4, scale=scale)
    quantizer.calibrate(x)
    assert quantizer.error(x) < 0.15


@pytest.mark.parametrize("calibration", ["mse", "minmax", "percentile"])
@pytest.mark.parametrize("clip", ["learned", "ema"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("bits", BITS)
def test_encode_decodes_to_the_forward_to_the_last_bit(bits: int, scale: Any, clip: Any, calibration: Any) -> None:
    quantizer = Quantizer(bits, scale=scale, group_size=8, clip=clip, calibration=calibration)
    x = embeddings()
    quantizer(x)  # in training: an average moves
    quantizer.eval()
    table = quantizer.encode(x)
    assert torch.equal(table.decode(), quantizer(x).detach())
    assert table.granularity == scale
    assert table.bits == bits
    assert table.nbytes == quantizer.table_bytes(*x.shape)
    again = quantizer.encode(x)
    assert torch.equal(table.codes, again.codes)
    assert torch.equal(table.scale, again.scale)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("bits", BITS)
def test_the_mse_clip_is_the_best_there_is(bits: int, scale: Any) -> None:
    quantizer, x = Quantizer(bits, scale=scale, group_size=8, calibration="mse"), embeddings()
    quantizer.calibrate(x)
    best = quantizer.error(x).item()
    found = quantizer.log_clip.detach().clone()
    for shift in torch.linspace(-0.7, 0.7, 29):
        quantizer.log_clip.data.copy_(found + shift)
        assert quantizer.error(x).item() > best * 0.99


def test_one_bit_is_sign_times_mean_magnitude() -> None:
    x = embeddings()
    by = {scale: Quantizer(1, scale=scale, group_size=8)(x).detach() for scale in SCALES}
    torch.testing.assert_close(by["table"], x.sign() * x.abs().mean())
    torch.testing.assert_close(by["node"], x.sign() * x.abs().mean(dim=1, keepdim=True))
    groups = x.unflatten(1, (-1, 8))
    torch.testing.assert_close(by["group"], (groups.sign() * groups.abs().mean(dim=2, keepdim=True)).flatten(1))


@pytest.mark.parametrize("bits", BITS)
def test_finer_scales_and_more_bits_lose_less(bits: int) -> None:
    x = embeddings()
    error = {}
    for scale in SCALES:
        for width in {bits, min(2 * bits, 8)}:
            quantizer = Quantizer(width, scale=scale, group_size=8)
            quantizer.calibrate(x)
            error[scale, width] = quantizer.error(x).item()
    assert error["group", bits] < error["node", bits] < error["table", bits]
    if bits < 8:
        assert error["node", 2 * bits] < error["node", bits]


def test_minmax_clips_nothing_and_a_percentile_little() -> None:
    x = torch.linspace(-1, 1, 2001)
    assert best_clip(x.abs(), 4, "minmax").item() == 1
    assert best_clip(x.abs(), 4, "percentile", percentile=0.9).item() == pytest.approx(0.9, abs=0.01)
    assert best_clip(x.abs(), 4, "minmax", limit=10).item() == 1  # nothing is clipped, however few are looked at


def test_one_scale_for_all_cuts_long_rows_only_where_levels_are_few() -> None:
    x = torch.randn(2000, 32)
    x[:20] *= 4  # such as popular items
    long = {}
    for bits in (2, 4, 8):
        quantizer = Quantizer(bits, scale="table")
        quantizer.calibrate(x)
        long[bits] = ((quantizer(x[:20]) - x[:20]).norm() / x[:20].norm()).item()
    assert long[8] < 0.05 < long[4] < long[2]
    quantizer.bits = 4  # as a schedule does
    quantizer.calibrate(x)
    assert quantizer.calibration == "percentile"


@pytest.mark.parametrize("scale", SCALES)
def test_rows_of_zeros_stay_finite(scale: Any) -> None:
    x = torch.zeros(4, 16)
    x[3] = 1.0
    for bits in BITS:
        quantizer = Quantizer(bits, scale=scale)
        y = quantizer(x.requires_grad_())
        y.sum().backward()
        assert y.isfinite().all()
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in quantizer.parameters())
        if scale != "table":
            assert y[:3].abs().max() < 1e-20


@pytest.mark.parametrize("clip", ["learned", "ema"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_embeddings_that_are_all_the_same_stay_finite(bits: int, scale: Any, clip: Any) -> None:
    """A collapsed encoder's, as deviations from their mean: a step of 0 would make them NaN, its weights too."""
    quantizer, x = Quantizer(bits, scale=scale, group_size=4, clip=clip), torch.zeros(20, 8, requires_grad=True)
    out = quantizer(x)
    out.sum().backward()
    grads = [x.grad, *(parameter.grad for parameter in quantizer.parameters())]
    assert all(torch.isfinite(tensor).all() for tensor in (out, *grads) if tensor is not None)
    assert out.abs().max() < 1e-30
    assert torch.equal(quantizer.eval().encode(x).decode(), quantizer(x))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("bits", BITS)
def test_a_learned_clip_finds_the_least_error(bits: int, scale: Any) -> None:
    x, quantizer = torch.randn(50, 16), Quantizer(bits, scale=scale, group_size=8)
    quantizer.calibrate(x)
    best = quantizer.error(x).item()
    quantizer.log_clip.data += 0.5
    start = quantizer.error(x).item()
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        (quantizer(x) - x).square().sum().backward()
        optimizer.step()
    assert quantizer.error(x).item() < best + 0.25 * (start - best)


def test_an_average_follows_the_embeddings_in_training_only() -> None:
    quantizer, x = Quantizer(4, scale="table", clip="ema", momentum=0.5), torch.randn(100, 16)
    assert not list(quantizer.parameters())
    quantizer(x)
    first = quantizer.clip_value().item()
    quantizer.eval()(9 * x)
    assert quantizer.clip_value().item() == first
    quantizer.train()
    for _ in range(20):
        quantizer(9 * x)
    assert quantizer.clip_value().item() == pytest.approx(9 * first, rel=0.05)


@pytest.mark.parametrize("bits", BITS)
def test_a_rotation_keeps_dot_products_and_itq_loses_less(bits: int) -> None:
    x = torch.randn(300, 16) * torch.logspace(-1, 1, 16) @ torch.randn(16, 16)  # correlated, of unequal spread
    users, error = torch.randn(5, 16), {}
    for kind in ("none", "random", "itq"):
        rotation, quantizer = Rotation(kind), Quantizer(bits)  # type: ignore[arg-type]  # one of its literals
        rotation.fit(x, quantizer)
        assert (rotation.matrix is None) == (kind == "none")
        torch.testing.assert_close(rotation(users) @ rotation(x).t(), users @ x.t(), rtol=1e-3, atol=1e-3)
        quantizer.calibrate(rotation(x))
        error[kind] = quantizer.error(rotation(x)).item()
    assert error["itq"] < 0.98 * min(error["random"], error["none"])


def test_a_rotation_is_kept_in_a_state_and_draws_nothing_from_torch() -> None:
    before = torch.get_rng_state()
    x = torch.linspace(-1, 1, 80).reshape(10, 8).sin()
    one, same, other = Rotation("itq", seed=3), Rotation("itq", seed=3), Rotation("none")
    for rotation in (one, same):
        rotation.fit(x, Quantizer(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one(x), same(x))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))


def test_32_bits_is_off() -> None:
    quantizer, x = Quantizer(32), embeddings()
    assert quantizer(x) is x
    assert quantizer.error(x) == 0
    with pytest.raises(ValueError, match="full precision has no codes"):
        quantizer.encode(x)


def test_a_state_holds_the_width_in_force_and_the_clip() -> None:
    x, one = embeddings(), Quantizer(8, clip="ema")
    one(x)
    one.bits = 2
    one.calibrate(x)
    other = Quantizer(8, clip="ema")
    other.load_state_dict(one.state_dict())
    assert other.bits == 2
    assert other.calibrated
    assert torch.equal(other.eval()(x), one.eval()(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits must be one of 1, 2, 4, 8, 32, got 3"),
        ({"scale": "row"}, "scale must be one of table, node, group, got 'row'"),
        ({"clip": "fixed"}, "clip must be one of learned, ema, got 'fixed'"),
        ({"calibration": "kl"}, "calibration must be one of mse, minmax, percentile, got 'kl'"),
        ({"group_size": 0}, "group_size must be a whole number of at least 1, got 0"),
        ({"percentile": 2}, "percentile must be a number of at least 0 and of at most 1, got 2"),
        ({"window": -1.0}, "window must be a number of at least 0, got -1.0"),
    ],
)
def test_what_is_wrong_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quantizer(**options)


def test_embeddings_that_cannot_be_quantized_are_named() -> None:
    with pytest.raises(ValueError, match="group_size must divide the embeddings' width, 10, got 16"):
        Quantizer(scale="group")(torch.randn(2, 10))
    with pytest.raises(ValueError, match="no rows"):
        Quantizer().calibrate(torch.empty(0, 4))
    bad = torch.tensor([[1.0, float("nan")]])
    with pytest.raises(ValueError, match="not finite"):
        Quantizer().calibrate(bad)
    quantizer = Quantizer()
    quantizer.calibrate(torch.ones(1, 2))
    with pytest.raises(ValueError, match="must be finite"):
        quantizer.encode(bad)


def test_half_precision_embeddings_are_quantized_in_float32() -> None:
    x = torch.randn(4, 16).bfloat16()
    quantizer = Quantizer(4).eval()
    assert quantizer(x).dtype == torch.float32
    assert torch.equal(quantizer(x).detach(), quantizer.encode(x).decode())
