import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_tinykg.codecs import chunks
from lightning_tinykg.codecs.cuts import SIGNS, Cut
from lightning_tinykg.codecs.lossless import (
    Code,
    RawCode,
    ShapeCode,
    encode_bool,
    encode_integers,
    encode_levels,
    encode_signs,
    encode_two_levels,
    narrow_dtype,
)

BLOCK = 1 << 15
SIZES = [0, 1, 7, 8, 9, 63, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5, 200_001]
NAN = float("nan")


def bools(size: int, seed: int = 0) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 0.3


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """A 1-d tensor, in other shapes and strides."""
    n = tensor.numel() // 12 * 12
    cube = tensor[:n].view(3, 4, -1)
    return {
        "plain": tensor,
        "transposed": cube.transpose(0, 2),
        "sliced": cube[:, 1:3],
        "strided": tensor[::3],
        "columns": cube[..., ::2],
        "expanded": cube[:, :1].expand(3, 4, -1),
        "0-d": tensor[0],
    }


@pytest.mark.parametrize("size", SIZES)
def test_bools(size: int) -> None:
    x = bools(size)
    code = encode_bool(x)
    assert torch.equal(code.decode(), x)
    assert code.codes.nbytes == -(-size // 8)
    assert code.nbytes == code.codes.nbytes + 2


@pytest.mark.parametrize("size", SIZES)
def test_four_levels(size: int) -> None:
    which = torch.randint(4, (size,))
    x = torch.tensor([-9.0, 1.5, 2.25, NAN])[which]
    levels = torch.tensor([5.0, -1.0, 0.25, 100.0], dtype=torch.float64)
    code = encode_levels(x, Cut(0.0, 2.0, below=3, within=0, above=2, nan=1), levels)
    assert torch.equal(code.decode(), levels[torch.tensor([3, 0, 2, 1])][which])
    assert code.codes.nbytes == -(-size // 4)


@pytest.mark.parametrize("size", [1, 9, BLOCK - 1, 2 * BLOCK - 3, 200_001])
def test_restored_into_memory_that_is_there(size: int) -> None:
    x, room = torch.randn(size), torch.full((size + 1,), 7.0)
    for code in (encode_signs(x), encode_levels(x, Cut(0.0, 0.0, above=1), (-1.0, 1.0))):
        asked = []

        def allocate(numel: int, dtype: torch.dtype, device: torch.device, asked: list[int] = asked) -> Tensor:
            asked.append(numel)
            return room[:numel]

        restored = code.decode(allocate)
        assert asked == [size]
        assert restored.data_ptr() == room.data_ptr()
        assert torch.equal(restored, x.sign())
        assert room[size] == 7.0


@pytest.mark.parametrize("kind", ["plain", "transposed", "sliced", "strided", "columns", "expanded", "0-d"])
@pytest.mark.parametrize("size", [36, 24_001, 150_000])
def test_any_layout(kind: str, size: int) -> None:
    mask = layouts(bools(size))[kind]
    assert torch.equal(encode_bool(mask).decode(), mask.reshape(-1))
    signs = layouts(torch.randn(size))[kind]
    assert torch.equal(encode_signs(signs).decode(), signs.reshape(-1).sign())
    integers = layouts(torch.randint(-300, 300, (size,)))[kind]
    narrow = encode_integers(integers)
    assert narrow is not None
    assert torch.equal(narrow.decode(), integers.reshape(-1))
    dropout = layouts(bools(size).float() * 1.25)[kind]
    two = encode_two_levels(dropout)
    assert two is not None
    assert torch.equal(two.decode(), dropout.reshape(-1))


@pytest.mark.parametrize("chunk", [1, 1000, BLOCK - 1, BLOCK, 100_000])
def test_same_codes_for_any_chunking(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    x = layouts(torch.randn(150_000))
    want = {kind: encode_signs(tensor).codes for kind, tensor in x.items()}
    monkeypatch.setitem(chunks._CHUNK_ELEMENTS, "cpu", chunk)
    for kind, tensor in x.items():
        assert torch.equal(encode_signs(tensor).codes, want[kind]), kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_signs(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    x = torch.tensor([-float("inf"), -1.0, -tiny, -0.0, 0.0, tiny, 2.0, float("inf"), NAN], dtype=dtype)
    restored = encode_signs(x).decode()
    assert restored.dtype == dtype
    assert torch.equal(restored[:-1], torch.tensor([-1, -1, -1, 0, 0, 1, 1, 1], dtype=dtype))
    assert restored[-1].isnan()
    assert encode_signs(x).name == "sign"


def test_signs_take_two_bits() -> None:
    assert encode_signs(torch.randn(64_000)).codes.nbytes == 16_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [1.25, 1 / 0.9, -2.0, float("inf")])
def test_two_levels(dtype: torch.dtype, value: float) -> None:
    x = torch.where(bools(10_001), torch.tensor(value, dtype=dtype), torch.zeros((), dtype=dtype))
    code = encode_two_levels(x)
    assert code is not None
    assert code.decode().dtype == dtype
    assert torch.equal(code.decode(), x)
    assert code.codes.nbytes == 1251


@pytest.mark.parametrize("x", [torch.zeros(100), torch.full((100,), 2.5)])
def test_one_level(x: Tensor) -> None:
    code = encode_two_levels(x)
    assert code is not None
    assert torch.equal(code.decode(), x)


@pytest.mark.parametrize("third", [NAN, 3.0, -1.25, 1e-30, float("inf")])
@pytest.mark.parametrize("place", [0, 99_999, 149_999])
def test_a_third_level_is_noticed(third: float, place: int) -> None:
    x = bools(150_000).float() * 1.25
    x[place] = third
    assert encode_two_levels(x) is None


def test_two_levels_with_negative_zeros() -> None:
    code = encode_two_levels(torch.tensor([-0.0, 0.0, 2.0, -0.0]))
    assert code is not None
    assert torch.equal(code.decode(), torch.tensor([0.0, 0.0, 2.0, 0.0]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_gpu_is_not_waited_for() -> None:
    x, mask = torch.randn(100_001, device="cuda"), torch.full((100_001,), 1.25, device="cuda")

    def run() -> list[Tensor]:
        side = encode_levels(x, Cut(0.0, 0.0, above=1, nan=1), (0.0, 1.0))
        two = encode_two_levels(mask)
        assert two is not None
        return [code.decode() for code in (side, two, encode_signs(x), encode_bool(mask > 0))]

    run()  # builds the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        restored = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for got, want in zip(restored, [(x > 0).float(), mask, x.sign(), mask > 0], strict=True):
        assert torch.equal(got, want)


def test_no_two_levels_in_nothing() -> None:
    assert encode_two_levels(torch.empty(0)) is None


EDGES = [0, 1, 127, 128, 255, 256, 2**15 - 1, 2**15, 2**31 - 1, 2**31, 2**63 - 1]
LOWS = [0, -1, -128, -129, -(2**15), -(2**15) - 1, -(2**31), -(2**31) - 1, -(2**63)]
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@pytest.mark.parametrize("low", LOWS)
@pytest.mark.parametrize("high", EDGES)
def test_integers_at_every_boundary(low: int, high: int) -> None:
    x = torch.tensor([low, high, low, max(low, 0)], dtype=torch.int64)
    fitting = [d for d in INTEGERS if torch.iinfo(d).min <= low and high <= torch.iinfo(d).max]
    least = min(d.itemsize for d in fitting)
    assert narrow_dtype(torch.int64, low, high).itemsize == least
    code = encode_integers(x)
    if least == 8:
        assert code is None
        return
    assert code is not None
    assert torch.equal(code.decode(), x)
    assert code.decode().dtype == torch.int64
    assert code.nbytes == 4 * least


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_are_never_widened(dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    assert encode_integers(torch.tensor([info.min, info.max], dtype=dtype)) is None
    narrow = encode_integers(torch.tensor([0, 5, 127], dtype=dtype))
    assert (narrow is None) == (dtype.itemsize == 1)
    if narrow is not None:
        assert narrow.nbytes == 3
        assert torch.equal(narrow.decode(), torch.tensor([0, 5, 127], dtype=dtype))
        assert narrow.name.startswith(str(dtype).removeprefix("torch.") + " as ")


def test_what_is_no_integer_is_not_narrowed() -> None:
    assert encode_integers(torch.ones(3)) is None
    assert encode_integers(torch.ones(3, dtype=torch.bool)) is None
    assert encode_integers(torch.empty(0, dtype=torch.int64)) is None


@settings(max_examples=50)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=20))
def test_integers_round_trip(values: list[int]) -> None:
    x = torch.tensor(values, dtype=torch.int64)
    code = encode_integers(x)
    if code is not None:
        assert torch.equal(code.decode(), x)
        assert code.nbytes < x.nbytes


def test_shape_takes_no_memory() -> None:
    code = ShapeCode(10**9, torch.float16, torch.device("cpu"))
    assert code.nbytes == 0
    restored = code.decode()
    assert restored.shape == (10**9,)
    assert restored.dtype == torch.float16
    assert restored.untyped_storage().nbytes() == 2


@pytest.mark.parametrize(("cut", "wanted"), [(Cut(0.0, 0.0, above=1), 2), (SIGNS, 4)])
@pytest.mark.parametrize("levels", [1, 2, 3, 4, 8])
def test_other_numbers_of_levels(cut: Cut, wanted: int, levels: int) -> None:
    if levels != wanted:
        with pytest.raises(ValueError, match=f"levels must be {wanted}, .* got {levels}"):
            encode_levels(torch.zeros(8), cut, torch.zeros(levels))


def test_what_cannot_be_cut() -> None:
    with pytest.raises(ValueError, match=r"dtype must be one of torch\.float32, .*, got torch\.int64"):
        encode_signs(torch.arange(8))
    with pytest.raises(ValueError, match=r"dtype must be one of torch\.float32, .*, got torch\.int64"):
        encode_two_levels(torch.arange(8))


def test_what_is_no_memory() -> None:
    """Zero tensors and negated views have no elements where their pointer points to."""
    assert torch.equal(encode_signs(torch._efficientzerotensor((100,))).decode(), torch.zeros(100))
    assert torch.equal(encode_signs(torch._neg_view(torch.ones(100))).decode(), -torch.ones(100))


def test_all_are_codes() -> None:
    x = torch.tensor([0.0, 1.0])
    narrow, two = encode_integers(torch.tensor([1])), encode_two_levels(x)
    for code in (encode_bool(x > 0), encode_signs(x), RawCode(x), ShapeCode(2, x.dtype, x.device), narrow, two):
        assert isinstance(code, Code)


def test_decoding_twice_gives_the_same() -> None:
    code = encode_bool(bools(1000))
    first = code.decode()
    first.logical_not_()
    assert torch.equal(code.decode(), bools(1000))


@pytest.mark.parametrize("seed", range(3))
def test_global_generator_is_left_alone(seed: int) -> None:
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    encode_bool(bools(100))
    encode_signs(torch.ones(100))
    assert torch.equal(torch.get_rng_state(), before)
