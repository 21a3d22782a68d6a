import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from memory import LiveBytes
from scipy.stats import binom
from torch import Tensor

from lightning_tinykg.codecs import chunks, kernels
from lightning_tinykg.codecs.affine import CODE_BITS, AffineCode, dequantize, quantize, quantized_size
from lightning_tinykg.codecs.exact_groups import restore_exact
from lightning_tinykg.codecs.logarithm import LogarithmCode
from lightning_tinykg.codecs.lossless import Code
from lightning_tinykg.codecs.noise import make_key

BITS = tuple(CODE_BITS)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
METADATA = (torch.bfloat16, torch.float32)
GROUPS = (1, 7, 32, 63, 64, 100, 128, 256)
INF, NAN = float("inf"), float("nan")
TOP = torch.finfo(torch.float32).max
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture(autouse=True, scope="module", params=["native", "reference"])
def kernel(request: pytest.FixtureRequest) -> Iterator[None]:
    """All of it holds with either; where there is no compiler, both are the reference."""
    with kernels.use(request.param):
        yield


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(WORDS[a.itemsize]), b.view(WORDS[b.itemsize]))


def grouped(flat: Tensor, group_size: int) -> Tensor:
    """``[groups, group_size]``, the last group filled up with its own last element."""
    spare = -flat.numel() % group_size
    return torch.cat([flat, flat[-1:].expand(spare)]).view(-1, group_size)


def steps(code: AffineCode) -> Tensor:
    """One step of each element's group, in float64."""
    return code.scale.double().abs().repeat_interleave(code.group_size)[: code.numel]


def check(x: Tensor, code: AffineCode) -> Tensor:
    """What holds for any tensor and any code of it. Returns what was restored."""
    flat, restored = x.reshape(-1), dequantize(code)
    assert restored.shape == flat.shape
    assert restored.dtype == flat.dtype
    assert code.nbytes == sum(
        t.numel() * t.element_size() for t in (code.codes, code.zero, code.scale, code.exact_index, code.exact_value)
    )
    bare = quantized_size(flat.numel(), code.bits, code.group_size, code.zero.dtype)
    assert code.nbytes == bare + code.exact_index.nbytes + code.exact_value.nbytes
    if not flat.numel():
        return restored

    rows, back = grouped(flat, code.group_size), grouped(restored, code.group_size)
    kept = torch.zeros(rows.shape[0], dtype=torch.bool)
    kept[code.exact_index.long()] = True
    wide = rows.float()  # a group that float32 does not hold is kept as well
    assert kept[~wide.isfinite().all(1)].all()
    assert same_bits(back[kept].contiguous().nan_to_num(7.0), rows[kept].contiguous().nan_to_num(7.0))
    assert torch.equal(back[kept].isnan(), rows[kept].isnan())

    constant = (rows == rows[:, :1]).all(1)
    assert torch.equal(back[constant], rows[constant])

    rest = ~kept & ~constant
    a, b = rows[rest].double(), back[rest].double()
    assert b.isfinite().all()
    step = code.scale.double().abs()[rest, None]
    # a float32 (or narrower) result is itself rounded
    eps = max(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps)
    slack = step * (1 + 1e-4) + 2 * eps * a.abs().amax(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    assert ((a - b).abs() <= slack).all()
    low, high = a.amin(1, keepdim=True), a.amax(1, keepdim=True)
    assert ((b >= low - slack) & (b <= high + slack)).all()
    return restored


# -- any tensor -------------------------------------------------------------------------------------------------

ODD = (0.0, -0.0, 1.0, -1.0, 0.1, 1e-40, -1e-44, 1e-8, 3e38, -3e38, 3.4028235e38, 65504.0, -65504.0, INF, -INF, NAN)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any shape, strides, dtype and value."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(
        st.one_of(
            st.sampled_from([(), (0,), (0, 3), (3, 0, 2), (1,), (1, 1)]),
            st.lists(st.integers(1, 20), min_size=1, max_size=3).map(tuple),
            st.integers(1, 700).map(lambda n: (n,)),
        )
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    scale = draw(st.sampled_from([1.0, 1e-3, 1e4, 1e-30, 1e30]))
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * scale + draw(st.sampled_from([0, 1, -100]))
    kind = draw(st.sampled_from(["normal", "constant", "odd", "some odd", "wide"]))
    choice = torch.randint(len(ODD), shape, generator=generator)
    odd = torch.tensor(ODD, dtype=torch.float64)[choice]
    if kind == "constant":
        x = torch.full(shape, draw(st.sampled_from(ODD)), dtype=torch.float64)
    elif kind == "odd":
        x = odd
    elif kind == "some odd":
        x = torch.where(torch.rand(shape, generator=generator) < 0.02, odd, x)
    elif kind == "wide":
        x = x * 10.0 ** torch.randint(-40, 38, shape, generator=generator)
    x = x.to(dtype)
    layout = draw(st.sampled_from(["plain", "transposed", "sliced", "expanded", "strided", "flipped"]))
    if x.dim() >= 1 and x.numel():
        if layout == "transposed":
            x = x.transpose(0, -1)
        elif layout == "sliced":
            x = torch.cat([x, x], -1)[..., : x.shape[-1]]
        elif layout == "expanded":
            x = x.unsqueeze(0).expand(3, *x.shape)
        elif layout == "strided":
            x = x[::2]
        elif layout == "flipped":
            x = x.repeat_interleave(2, -1)[..., ::2]
    return x


@settings(max_examples=300, deadline=None)
@given(
    x=tensors(),
    bits=st.sampled_from(BITS),
    group_size=st.sampled_from(GROUPS),
    metadata=st.sampled_from(METADATA),
    key=st.integers(0, 2**64 - 1),
)
def test_any_tensor(x: Tensor, bits: int, group_size: int, metadata: torch.dtype, key: int) -> None:
    check(x, quantize(x, bits, key=key, group_size=group_size, metadata=metadata))


@settings(max_examples=100, deadline=None)
@given(x=tensors(), bits=st.sampled_from(BITS), group_size=st.sampled_from(GROUPS))
def test_strides_do_not_matter(x: Tensor, bits: int, group_size: int) -> None:
    code = quantize(x, bits, key=1, group_size=group_size)
    plain = quantize(x.contiguous(), bits, key=1, group_size=group_size)
    for name in ("codes", "zero", "scale", "exact_index", "exact_value"):
        a, b = getattr(code, name).contiguous(), getattr(plain, name).contiguous()
        assert a.shape == b.shape, name
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_input_is_not_changed(bits: int, dtype: torch.dtype) -> None:
    x = torch.randn(100, 7, dtype=torch.float64).to(dtype)
    x[3, 3] = NAN
    before = x.clone()
    quantize(x, bits, key=0)
    assert same_bits(x, before)


@pytest.mark.parametrize("bits", BITS)
def test_decoding_is_repeatable_and_independent(bits: int) -> None:
    x = torch.randn(1000)
    code = quantize(x, bits, key=0)
    first = code.decode()
    want = first.clone()
    first.fill_(9)
    assert torch.equal(code.decode(), want)
    assert isinstance(code, Code)


# -- groups that cannot be quantized ----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("metadata", METADATA)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_group_that_is_not_finite_is_kept_exactly_and_no_other(
    bits: int, metadata: torch.dtype, dtype: torch.dtype
) -> None:
    for place in (0, 63, 64, 700, 999):
        for bad in (NAN, INF, -INF):
            x = torch.randn(1000, dtype=torch.float64).to(dtype)
            x[place] = bad
            code = quantize(x, bits, key=0, metadata=metadata)
            check(x, code)
            assert code.exact_index.tolist() == [place // 64]
            group = slice(place // 64 * 64, place // 64 * 64 + 64)
            assert torch.equal(code.decode()[group].nan_to_num(5.0), x[group].nan_to_num(5.0))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("metadata", METADATA)
@pytest.mark.parametrize("ends", [(3e38, -3e38), (TOP, -TOP), (TOP, 0.0), (-TOP, 0.0)])
def test_huge_ranges(bits: int, metadata: torch.dtype, ends: tuple[float, float]) -> None:
    x = torch.rand(256) * 1e38
    x[5], x[60] = ends
    restored = check(x, quantize(x, bits, key=0, metadata=metadata))
    assert restored.isfinite().all()


@pytest.mark.parametrize("bits", BITS)
def test_float64_beyond_float32(bits: int) -> None:
    x = torch.randn(200, dtype=torch.float64)
    x[70] = 1e200
    code = quantize(x, bits, key=0)
    assert torch.equal(code.decode()[64:128], x[64:128])
    assert code.exact_index.tolist() == [1]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_widest_range_of_a_narrow_dtype_stays_finite(bits: int, dtype: torch.dtype) -> None:
    """Scales are rounded outward, so a code may stand for more than the dtype holds."""
    top = torch.finfo(dtype).max
    x = torch.linspace(-1, 1, 256, dtype=torch.float64).mul(top).to(dtype)
    for key in range(20):
        assert quantize(x, bits, key=key).decode().isfinite().all()


CONSTANTS = (0.1, -1 / 3, 0.0, -0.0, 1e-40, 1e-45, -1e-45, 1.17549435e-38, TOP, 65504.0, 1.0 + 2**-23, 1e-310)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("metadata", METADATA)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_constant_is_restored_exactly(bits: int, metadata: torch.dtype, dtype: torch.dtype) -> None:
    for value in CONSTANTS:
        x = torch.full((150,), value, dtype=torch.float64).to(dtype)
        x = torch.cat([torch.randn(64).to(dtype), x])
        code = quantize(x, bits, key=3, metadata=metadata)
        restored = code.decode()
        assert torch.equal(restored[64:], x[64:]), value
        if metadata == torch.bfloat16:  # to the last bit: with the sign of a zero
            assert same_bits(restored[64:], x[64:]), value


@settings(max_examples=200, deadline=None)
@given(word=st.integers(-(2**31), 2**31 - 1), bits=st.sampled_from(BITS), metadata=st.sampled_from(METADATA))
@example(word=-1, bits=1, metadata=torch.bfloat16)  # a NaN that an overflow would turn into a zero
def test_any_float32_constant(word: int, bits: int, metadata: torch.dtype) -> None:
    x = torch.tensor([word], dtype=torch.int32).view(torch.float32).expand(70)
    restored = quantize(x, bits, key=3, metadata=metadata).decode()
    assert torch.equal(restored.nan_to_num(1.5), x.nan_to_num(1.5))
    assert torch.equal(restored.isnan(), x.isnan())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_narrow_constant(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = every[:, None].expand(-1, 8)
    restored = quantize(x, 2, key=0, group_size=8).decode().view(-1, 8)
    assert torch.equal(restored.nan_to_num(1.5), x.nan_to_num(1.5))
    assert torch.equal(restored.isnan(), x.isnan())


def test_constants_cost_no_more() -> None:
    code = quantize(torch.full((64_000,), 0.1), 2, key=0)
    assert code.nbytes == quantized_size(64_000, 2, 64)
    assert code.exact_value.numel() == 0


# -- codes stay in their group ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("metadata", METADATA)
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_do_not_wrap(bits: int, metadata: torch.dtype, dtype: torch.dtype) -> None:
    """A code one too high would be zero at 8 bits, and spill over at fewer: the largest would turn smallest."""
    generator = torch.Generator().manual_seed(0)
    for offset in (0.0, 1.0, -1.0, 1000.0, -0.01):
        x = (torch.randn(300, 64, generator=generator, dtype=torch.float64) * 0.3 + offset).to(dtype)
        for key in range(5):
            code = quantize(x, bits, key=key, metadata=metadata)
            error = (code.decode().double() - x.reshape(-1).double()).abs()
            tolerance = torch.finfo(dtype).eps * x.double().abs().max() if dtype != torch.float64 else 1e-4
            assert (error <= steps(code) * (1 + 1e-4) + tolerance).all()


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_of_a_group_never_wraps(bits: int) -> None:
    """Divided by a rounded scale it may come out an ulp above the highest code, and the noise round it up from there.

    That is rare: hence a million largest elements, of groups of two.
    """
    x = torch.randn(100_000, 2, generator=torch.Generator().manual_seed(1)) * 1e-3
    x[:, 1] = x[:, 0].abs() + 1
    for key in range(10):
        code = quantize(x, bits, key=make_key(key), group_size=2, metadata=torch.float32)
        assert code.decode().view(-1, 2)[:, 1].min() > 0.2


@pytest.mark.parametrize("bits", BITS)
def test_zero_point_and_scale_cover_the_group(bits: int) -> None:
    """Rounded to the nearest, half of them would cut the group's ends off."""
    x = torch.randn(2000, 64) + 3
    code = quantize(x, bits, key=0)
    zero, scale = code.zero.double(), code.scale.double()
    assert (zero <= x.amin(1)).all()
    assert (zero + scale * (2**bits - 1) * (1 + 1e-6) >= x.amax(1)).all()
    # and not by more than the roundings ask for: 2**-7 of the zero point, and of the scale
    reach = scale * (2**bits - 1) - (x.amax(1) - x.amin(1)).double()
    assert (reach <= 2**-6 * (x.abs().amax(1).double() + scale * 2**bits)).all()


def test_what_lies_on_a_level_stays_there() -> None:
    x = torch.tensor([0.0, 1.0, 2.0, 3.0]).repeat(64)
    for key in range(50):
        assert torch.equal(quantize(x, 2, key=key).decode(), x)


def test_groups_are_restored_by_their_own_scale() -> None:
    x = torch.randn(50, 64) * 10.0 ** torch.arange(-25, 25)[:, None].float()
    restored = quantize(x, 8, key=0).decode().view(50, 64)
    error = (restored - x).abs().amax(1) / (x.amax(1) - x.amin(1))
    assert (error < 1 / 200).all()


def test_short_last_group_is_as_precise_as_any() -> None:
    """Filled up with zeros, its scale would reach down to zero."""
    x = torch.linspace(1000, 1001, 70)
    restored = quantize(x, 8, key=0, metadata=torch.float32).decode()
    assert (restored - x).abs().max() < 0.005


# -- unbiased ---------------------------------------------------------------------------------------------------

DRAWS = 300


def z_scores(
    x: Tensor, bits: int, metadata: torch.dtype, keys: list[int], group_size: int
) -> tuple[Tensor, float, Tensor]:
    """Of the mean of many draws against the value: by element, and overall, from their exact variance.

    Besides, how likely each element was to be rounded up as often as it was, or more seldom, or more often: twice the
    lesser of the two, exactly, since of 300 draws with a probability of 0.02 more than 5 sigma are no wonder.
    """
    flat = x.reshape(-1).double()
    total = torch.zeros_like(flat)
    for key in keys:
        code = quantize(x, bits, key=key, group_size=group_size, metadata=metadata)
        total += dequantize(code).double()
    zero = code.zero.double().repeat_interleave(group_size)[: flat.numel()]
    step = steps(code)
    place = (flat - zero) / step
    fraction = place - place.floor()
    deviation = step * (fraction * (1 - fraction)).sqrt() / math.sqrt(len(keys))
    difference = total / len(keys) - flat
    moving = (fraction > 0.02) & (fraction < 0.98)  # where 300 draws are near enough to normal
    normalised = difference[moving] / deviation[moving]
    up = ((total / len(keys) - zero) / step - place.floor()).mul(len(keys)).round()[moving].numpy()
    chance = binom(len(keys), fraction[moving].numpy())
    likely = torch.from_numpy(2 * np.minimum(chance.cdf(up), chance.sf(up - 1)))
    return normalised, float(normalised.sum() / math.sqrt(normalised.numel())), likely


@pytest.mark.parametrize("keys", ["consecutive seeds", "consecutive steps"])
@pytest.mark.parametrize("metadata", METADATA)
@pytest.mark.parametrize("bits", BITS)
def test_unbiased(bits: int, metadata: torch.dtype, keys: str) -> None:
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(64, 64, generator=generator) + torch.randn(64, 1, generator=generator)
    make = {
        "consecutive seeds": lambda k: make_key(k, 0, 0),
        "consecutive steps": lambda k: make_key(0, 0, k),
    }[keys]
    z, overall, likely = z_scores(x, bits, metadata, [make(k) for k in range(DRAWS)], 64)
    assert z.numel() > 3000
    assert float(likely.min()) > 1e-3 / z.numel()  # Bonferroni: all elements at an overall level of 1e-3
    assert abs(overall) < 4
    # the draws vary as much as they should: chi-square of independent, standard normal numbers
    assert abs(float((z.square().sum() - z.numel()) / math.sqrt(2 * z.numel()))) < 5


def test_each_bit_more_is_a_quarter_of_the_variance() -> None:
    """Up to 12 bits: beyond 8, too, it is one code, and not one of what another has left."""
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    error = {bits: float((quantize(x, bits, key=3).decode() - x).square().mean()) for bits in BITS}
    for bits in BITS[3:]:
        assert error[bits] < error[bits - 1] * ((2 ** (bits - 1) - 1) / (2**bits - 1)) ** 2 * 1.02
    assert quantized_size(64_000, 12, 64) == 64_000 * 12 // 8 + 4 * 1000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_dtypes_are_unbiased_up_to_their_own_rounding(dtype: torch.dtype) -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    flat = x.reshape(-1).double()
    draws = torch.stack([quantize(x, 2, key=make_key(k)).decode().double() for k in range(DRAWS)])
    step = steps(quantize(x, 2, key=0))
    half_ulp = torch.finfo(dtype).eps / 2 * x.abs().max()
    assert ((draws.mean(0) - flat).abs() <= 5.3 * step / 2 / math.sqrt(DRAWS) + half_ulp).all()


@pytest.mark.parametrize("bits", BITS)
def test_variance_is_at_most_a_quarter_of_a_squared_step(bits: int) -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    draws = torch.stack([quantize(x, bits, key=make_key(k)).decode().double() for k in range(DRAWS)])
    variance = (draws - x.reshape(-1).double()).square().mean(0)
    step = steps(quantize(x, bits, key=0))
    assert float((variance / step.square()).max()) < 0.25 * (1 + 6 * math.sqrt(2 / DRAWS))
    assert float((variance / step.square()).mean()) < 0.25


def test_elements_round_independently() -> None:
    """The sum of a group's errors has the variance of independent ones."""
    x = torch.rand(4096, generator=torch.Generator().manual_seed(0))
    errors = torch.stack([quantize(x, 2, key=make_key(k)).decode().double() - x for k in range(DRAWS)])
    expected = errors.square().mean(0).sum()
    assert abs(float(errors.sum(1).square().mean() / expected) - 1) < 5 * math.sqrt(2 / DRAWS)


@pytest.mark.parametrize("bits", BITS)
def test_same_key_same_code_other_key_other_code(bits: int) -> None:
    x = torch.randn(5000)
    assert torch.equal(quantize(x, bits, key=7).codes, quantize(x, bits, key=7).codes)
    assert not torch.equal(quantize(x, bits, key=7).codes, quantize(x, bits, key=8).codes)


def test_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    quantize(torch.ones(100).cumsum(0), 2, key=0)
    assert torch.equal(torch.get_rng_state(), before)


# -- chunks, many groups, memory --------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 500, 1 << 12, 1 << 16, 1 << 23])
@pytest.mark.parametrize("bits", BITS)
def test_same_codes_for_any_chunking(monkeypatch: pytest.MonkeyPatch, bits: int, chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(20_011, generator=generator)
    plain[7000] = NAN
    plain[9000:9400] = 0.1
    cases = [
        (plain, 64),
        (plain, 63),
        (plain[:20_000].view(100, 200).t(), 64),
        (plain[:20_000].view(100, 200)[:, :37], 63),
    ]
    want = [quantize(x, bits, key=1, group_size=size) for x, size in cases]
    monkeypatch.setitem(chunks._CHUNK_ELEMENTS, "cpu", chunk)
    for (x, size), before in zip(cases, want, strict=True):
        after = quantize(x, bits, key=1, group_size=size)
        for name in ("codes", "zero", "scale", "exact_index", "exact_value"):
            a, b = getattr(after, name), getattr(before, name)
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name
        assert torch.equal(dequantize(after).nan_to_num(7), dequantize(before).nan_to_num(7))


@pytest.mark.parametrize("bits", BITS)
def test_more_groups_than_65535(bits: int) -> None:
    x = torch.randn(70_003 * 8 - 3)
    x[-2] = INF
    code = quantize(x, bits, key=0, group_size=8)
    assert code.codes.shape[0] == 70_003
    assert code.exact_index.tolist() == [70_002]
    check(x, code)


MIB = 1 << 20


def awkward(kind: str, dtype: torch.dtype) -> Tensor:
    """16 MiB."""
    n = 16 * MIB // dtype.itemsize
    x = torch.randn(n).to(dtype)
    return {
        "flat": x,
        "square transposed": x.view(2048, -1).t(),
        "rows of a wider": torch.empty(n * 2, dtype=dtype).view(-1, 128)[:, :64].copy_(x.view(-1, 64)),
        "few long rows": x.view(-1, 4).t(),
    }[kind]


@pytest.mark.parametrize("kind", ["flat", "square transposed", "rows of a wider", "few long rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_takes_a_quarter_of_the_tensor_at_most(kind: str, dtype: torch.dtype) -> None:
    x = awkward(kind, dtype)
    with LiveBytes() as live:
        code = quantize(x, 4, key=0)
    assert live.now == code.nbytes
    assert live.peak - code.nbytes <= 4 * MIB


@pytest.mark.parametrize("kind", ["flat", "square transposed", "rows of a wider"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_function_is_applied_a_chunk_at_a_time(kind: str, dtype: torch.dtype) -> None:
    """The code is that of what it gives, which is never there as a whole."""
    x = awkward(kind, dtype)
    with LiveBytes() as live:
        code = quantize(x, 4, key=1, through=torch.exp)
    assert live.peak - code.nbytes <= 4 * MIB
    whole = quantize(x.exp(), 4, key=1)
    assert same_bits(dequantize(code), dequantize(whole))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_logarithms_are_unbiased_in_their_exponentials(bits: int, dtype: torch.dtype) -> None:
    """And what is impossible remains so, however far the others reach."""
    x = (torch.randn(40, 64, generator=torch.Generator().manual_seed(0)) * 5).log_softmax(-1).to(dtype)
    x[:, 3] = -INF
    draws = torch.stack([
        LogarithmCode(quantize(x, bits, key=make_key(7, k), through=torch.exp)).decode().double().exp()
        for k in range(200)
    ]).view(200, 40, 64)  # fmt: skip
    exact = x.exp().double()
    assert (draws[:, :, 3] == 0).all()
    step = (exact.max(1).values / (2**bits - 1))[:, None]
    assert ((draws.mean(0) - exact).abs() < 5 * step / (2 * math.sqrt(200)) + 0.01 * exact).all()
    if dtype.itemsize > 2:  # else the logarithms are rounded themselves
        bias = (draws.mean(0) - exact).sum() / (step**2 / 4 * torch.ones(40, 64) / 200).sum().sqrt()
        assert abs(float(bias)) < 4


def test_unpacking_takes_a_quarter_of_the_tensor_at_most() -> None:
    code = quantize(torch.randn(4 * MIB), 2, key=0)
    with LiveBytes() as live:
        restored = dequantize(code)
    assert live.peak - restored.nbytes <= 4 * MIB


@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("bits", BITS)
def test_size_is_what_it_says(bits: int, group_size: int) -> None:
    code = quantize(torch.randn(1000, 256), bits, key=0, group_size=group_size)
    assert code.nbytes == 256_000 * bits // 8 + 256_000 // group_size * 4
    assert code.nbytes == quantized_size(256_000, bits, group_size)
    assert code.name == f"int{bits}"


def test_a_code_holds_no_more_than_it_counts() -> None:
    """No tensor of it is a view of a larger storage."""
    x = torch.randn(5000)
    x[77] = NAN
    code = quantize(x, 2, key=0)
    for tensor in (code.codes, code.zero, code.scale, code.exact_index, code.exact_value):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


# -- arguments --------------------------------------------------------------------------------------------------


def test_arguments_are_checked() -> None:
    x = torch.ones(4)
    for bits in (0, 13, 16, True, 4.0):
        with pytest.raises(ValueError, match=f"bits must be one of 1 to 12, got {bits}"):
            quantize(x, bits, key=0)
    with pytest.raises(ValueError, match="tensor must be one of"):
        quantize(x.long(), 2, key=0)
    with pytest.raises(ValueError, match="group_size must be at least 1, got 0"):
        quantize(x, 2, key=0, group_size=0)
    with pytest.raises(ValueError, match="metadata must be"):
        quantize(x, 2, key=0, metadata=torch.float16)


@pytest.mark.parametrize("numel", [640, 600, 40])
@pytest.mark.parametrize("which", [[-1, -1], [3, -1, 7], [-1, 0], [9, -1], [0]])
def test_places_that_no_group_takes_change_nothing(numel: int, which: list[int]) -> None:
    """As a GPU has them."""
    groups = -(-numel // 64)
    which = [min(group, groups - 1) for group in which]
    which = [-1 if group in which[:i] else group for i, group in enumerate(which)]  # none is there twice
    out, value = torch.randn(numel), torch.randn(len(which), 64)
    want = torch.nn.functional.pad(out, (0, -numel % 64)).view(-1, 64)
    for group, elements in zip(which, value, strict=True):
        if group >= 0:
            want[group] = elements
    restore_exact(out, torch.tensor(which, dtype=torch.int32), value, groups)
    assert torch.equal(out, want.view(-1)[:numel])
