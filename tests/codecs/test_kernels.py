"""Every kernel gives the same bits; without a compiler all still works."""

import ctypes
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_tinykg.codecs import dequantize, quantize
from lightning_tinykg.codecs.cuts import Cut
from lightning_tinykg.codecs.kernels import kernels_for, native, use
from lightning_tinykg.codecs.lossless import encode_bool, encode_levels, encode_signs, encode_two_levels
from lightning_tinykg.codecs.noise import make_key
from lightning_tinykg.codecs.packing import BITS, code_dtype, packed_size
from lightning_tinykg.codecs.planes import pack_planes

CPU = torch.device("cpu")
INF, NAN = math.inf, math.nan
ALL_BITS = range(1, 13)
EXTREMES = (0.0, -0.0, INF, -INF, NAN, 3e38, -3e38, 1e-45, -1e-45, 1e-38, 1.0, -1.0, 0.1, 2.0**-100, 65504.0)


@pytest.fixture(autouse=True)
def needs_a_compiler() -> None:
    if kernels_for(CPU).name != "native":
        pytest.skip("no C compiler here")


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def same(x: Tensor, bits: int, group_size: int, metadata: torch.dtype, key: int = 5) -> None:
    """The native and the reference kernels make the same code, and restore the same elements from it."""
    found = []
    for name in ("native", "reference"):
        with use(name):
            code = quantize(x, bits, key=key, group_size=group_size, metadata=metadata)
            tensors = (code.codes, code.zero, code.scale, code.exact_index, code.exact_value, dequantize(code))
            found.append([as_bytes(tensor) for tensor in tensors])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def awkward(numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Groups of every kind: plain, constant, zeros of both signs, NaN and infinities anywhere, extreme ranges."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(numel, generator=generator)
    x[300:700] = 0.1
    x[800:1200] = 0.0
    x[900:1000] = -0.0
    x[1200:1600] = -0.0
    x[2000], x[2200], x[2463] = NAN, INF, -INF
    x[2100], x[2300] = (torch.tensor(word, dtype=torch.int32).view(torch.float32) for word in (0x7FFFE000, -0x2000))
    x[2600:2664] = NAN
    x[3000:3300] *= 3e38
    x[3400:3800] *= 1e-40
    x[4000:4300] = torch.tensor(EXTREMES)[torch.randint(len(EXTREMES), (300,), generator=generator)]
    return x.to(dtype)


@pytest.mark.parametrize("metadata", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group_size", [1, 7, 16, 32, 44, 63, 64, 200, 5000])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_same_bits(bits: int, group_size: int, metadata: torch.dtype) -> None:
    same(awkward(20_011), bits, group_size, metadata)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bits", BITS)
def test_same_bits_of_any_dtype(bits: int, dtype: torch.dtype) -> None:
    same(awkward(20_011, dtype), bits, 64, torch.bfloat16)


@settings(max_examples=100)
@given(
    st.lists(st.floats(width=32) | st.sampled_from(EXTREMES), min_size=1, max_size=150),
    st.sampled_from(ALL_BITS),
    st.integers(1, 80),
    st.sampled_from([torch.bfloat16, torch.float32]),
    st.integers(0, 2**64 - 1),
)
def test_same_bits_of_anything(
    values: list[float], bits: int, group_size: int, metadata: torch.dtype, key: int
) -> None:
    same(torch.tensor(values), bits, group_size, metadata, key)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_bits_on_any_number_of_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    same(awkward(300_017), 2, 32, torch.bfloat16)


@pytest.mark.parametrize("start", [(1 << 31) - 100, 1 << 31, (1 << 32) - 640, 5 * (1 << 31) - 4487, 1 << 40])
@pytest.mark.parametrize("group_size", [7, 44, 64])
@pytest.mark.parametrize("bits", ALL_BITS)
def test_same_noise_at_positions_beyond_two_to_the_31(bits: int, group_size: int, start: int) -> None:
    x, found = torch.randn(60, group_size), []
    for name in ("native", "reference"):
        codes = torch.empty(60, packed_size(group_size, bits), dtype=torch.uint8)
        zero, scale = torch.empty(60, dtype=torch.bfloat16), torch.empty(60, dtype=torch.bfloat16)
        with use(name):
            kernels = kernels_for(CPU)
            apart = None if kernels.packs(bits) else torch.empty(60, group_size, dtype=code_dtype(bits))
            kernels.quantize(x.clone(), make_key(3), start, bits, codes if apart is None else apart, zero, scale)
            if apart is not None:
                pack_planes(apart, bits, codes)
        found.append((codes, zero, scale))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("numel", [1, 9, 32_768, 100_001, 300_007])
def test_same_masks(numel: int) -> None:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(1))
    x[::17], x[5::31] = NAN, 0.0
    found = []
    for name in ("native", "reference"):
        with use(name):
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                levels = torch.tensor([-2.0, 3.0], dtype=dtype)
                cut = Cut(1.0, 1.0, above=1)
                codes = (encode_bool(x > 0), encode_signs(x.to(dtype)), encode_levels(x, cut, levels))
                found += [(as_bytes(code.codes), as_bytes(code.decode())) for code in codes]
    half = len(found) // 2
    for ours, theirs in zip(found[:half], found[half:], strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def value(x: float, dtype: torch.dtype) -> float:
    """A number as the dtype has it."""
    return float(torch.tensor(x, dtype=dtype))


NUMBERS = st.floats() | st.sampled_from(EXTREMES)
CODES = st.integers(0, 1) | st.integers(0, 3)


@settings(max_examples=300)
@given(
    st.lists(NUMBERS, max_size=70),
    st.tuples(NUMBERS, NUMBERS).filter(lambda ends: ends[0] <= ends[1]),
    st.tuples(CODES, CODES, CODES, CODES),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    st.integers(0, 3),
)
@example([math.nan, -math.nan], (-1.0, 1.0), (0, 1, 2, 3), False, torch.float16, 0)
@example([math.nan, -math.nan], (-1.0, 1.0), (0, 1, 2, 3), True, torch.float16, 0)
def test_same_classes_of_anything(
    values: list[float], ends: tuple[float, float], codes: tuple[int, ...], is_open: bool, dtype: torch.dtype, at: int
) -> None:
    """Both kernels answer as Python does."""
    x = torch.tensor([*values, *ends, ends[0]], dtype=torch.float64).to(dtype)[at:]  # the memory is not aligned
    cut = Cut(*ends, *codes, open=is_open)
    low, high = (value(end, dtype) for end in ends)

    def code_of(x: float) -> int:
        if math.isnan(x):
            return cut.nan
        if (x >= high) if is_open else (x > high):
            return cut.above
        return cut.within if ((x > low) if is_open else (x >= low)) else cut.below

    levels = list(range(2**cut.bits))
    want = [code_of(element) for element in x.tolist()]
    for name in ("native", "reference"):
        with use(name):
            code = encode_levels(x, cut, levels)
            assert code.decode().tolist() == want, name
            assert code.codes.tolist() == pack(want, cut.bits), name


def pack(codes: list[int], bits: int) -> list[int]:
    lanes = 8 // bits
    size = -(-len(codes) // lanes)
    padded = codes + [0] * (lanes * size - len(codes))
    return [sum(padded[lane * size + j] << (lane * bits) for lane in range(lanes)) for j in range(size)]


@settings(max_examples=300)
@given(
    st.lists(st.booleans(), min_size=1, max_size=70),
    NUMBERS,
    st.lists(st.tuples(st.integers(0, 69), NUMBERS), max_size=2),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
)
def test_same_two_levels_of_anything(
    mask: list[bool], level: float, others: list[tuple[int, float]], dtype: torch.dtype
) -> None:
    wide = torch.tensor([level if kept else 0.0 for kept in mask], dtype=torch.float64)
    for place, other in others:
        wide[place % len(wide)] = other
    x = wide.to(dtype)
    levels = {element for element in x.tolist() if element != 0}
    for name in ("native", "reference"):
        with use(name):
            code = encode_two_levels(x)
        if len(levels) > 1 or any(map(math.isnan, levels)):
            assert code is None, name
        else:
            assert code is not None, name
            assert code.decode().tolist() == x.tolist(), name
            assert as_bytes(code.levels).tolist() == as_bytes(torch.tensor([0, *levels, 0], dtype=dtype)[:2]).tolist()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("numel", [40_000, 200_001])
def test_same_masks_on_any_number_of_threads(threads: int, numel: int) -> None:
    x = awkward(numel)
    mask = torch.where(x > 0, 1.25, 0.0)
    with use("reference"):
        signs, kept = encode_signs(x), encode_two_levels(mask)
    torch.set_num_threads(threads)
    assert torch.equal(encode_signs(x).codes, signs.codes)
    assert torch.equal(as_bytes(encode_signs(x).decode()), as_bytes(signs.decode()))
    found = encode_two_levels(mask)
    assert found is not None
    assert kept is not None
    assert torch.equal(found.codes, kept.codes)
    assert torch.equal(found.decode(), mask)
    mask[-1] = 3.0
    assert encode_two_levels(mask) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_float_against_an_end_that_is_none(dtype: torch.dtype) -> None:
    """PyTorch's threshold on a CPU compares them with the float32 that is next to the threshold."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for end in (0.1, -0.1, 0.2, 1.0, 0.0, 1e-8, -1e-8, 1e-42, 7e4, 1e39, -1e39, INF, -INF):
        wide = value(end, torch.float32)
        for is_open in (False, True):
            cut = Cut(end, end, below=1, within=0, above=2, nan=3, wide_on_cpu=True, open=is_open)
            want = torch.where(x.float() < wide, 1.0, torch.where(x.float() > wide, 2.0, 0.0))
            want = torch.where(x.isnan(), 3.0, want)
            if is_open:
                want = torch.where(x.float() == wide, 2.0, want)
            for name in ("native", "reference"):
                with use(name):
                    got = encode_levels(x, cut, torch.arange(4.0)).decode()
                assert torch.equal(got, want), (end, is_open, name)


def test_what_is_no_memory_is_copied() -> None:
    """Zero tensors and negated views have no elements where their pointer points to."""
    zeros = torch._efficientzerotensor((4, 64))
    assert torch.equal(dequantize(quantize(zeros, 2, key=0)), torch.zeros(256))
    negated = torch._neg_view(torch.ones(256))
    assert torch.equal(dequantize(quantize(negated, 2, key=0)), -torch.ones(256))


def test_restored_into_memory_that_is_there() -> None:
    x = awkward(20_011)
    for dtype in (torch.float32, torch.bfloat16):
        code = quantize(x.to(dtype), 4, key=0, group_size=63)
        out = torch.empty(20_011, dtype=dtype)
        assert dequantize(code, out).data_ptr() == out.data_ptr()
        assert torch.equal(as_bytes(out), as_bytes(dequantize(code)))
        for wrong in (out[:-1], out.double(), torch.empty(40_022, dtype=dtype)[::2]):
            with pytest.raises(ValueError, match="out must be contiguous, of shape \\[20011\\]"):
                dequantize(code, wrong)


@pytest.mark.parametrize(("width", "group_size"), [(64, 64), (64, 32), (16, 64), (64, 16), (5, 20)])
def test_some_rows(width: int, group_size: int) -> None:
    code = quantize(torch.randn(1000, width), 4, key=0, group_size=group_size)
    index = torch.tensor([0, 999, 5, 5, 641])
    rows = code.rows(index, width)
    assert rows is not None
    assert torch.equal(rows, code.decode().view(1000, width)[index])


def test_some_rows_where_groups_do_not_fit() -> None:
    assert quantize(torch.randn(1000, 48), 4, key=0, group_size=64).rows(torch.tensor([1]), 48) is None


@pytest.mark.parametrize("size", [16, 64])
def test_some_rows_where_groups_are_kept_as_they_are(size: int) -> None:
    x = torch.randn(1000, 64)
    x[3, 4] = x[0, 0] = x[998, 63] = NAN
    code, index = quantize(x, 4, key=0, group_size=size), torch.tensor([1, 3, 999, 998, 3, 4])
    rows = code.rows(index, 64)
    assert rows is not None
    assert torch.equal(rows.nan_to_num(7.0), code.decode().view(1000, 64)[index].nan_to_num(7.0))
    assert rows.isnan().sum() == 3


def test_use_is_checked() -> None:
    with pytest.raises(ValueError, match="name must be one of native, triton, reference, got 'numba'"), use("numba"):
        pass


RUN = """
import torch, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from lightning_tinykg.codecs import quantize
    from lightning_tinykg.codecs.kernels import kernels_for
    for _ in range(2):
        code = quantize(torch.linspace(-1, 1, 1000), 2, key=7)
told = [str(warning.message) for warning in caught]
print(kernels_for(torch.device("cpu")).name, int(code.codes.sum()), sum("PyTorch's own ops" in text for text in told))
print(*told)
"""


def run(**environment: str) -> list[str]:
    variables = {name: value for name, value in os.environ.items() if name != "LIGHTNING_TINYKG_KERNELS"} | environment
    ran = subprocess.run([sys.executable, "-c", RUN], env=variables, capture_output=True, text=True, check=True)
    return ran.stdout.splitlines()


def test_without_a_compiler_it_works_and_says_so_once(tmp_path: Path) -> None:
    want = int(quantize(torch.linspace(-1, 1, 1000), 2, key=7).codes.sum())
    lines = run(CC="/no/such/compiler", XDG_CACHE_HOME=str(tmp_path))
    assert lines[0] == f"reference {want} 1"
    assert "no C compiler was found" in lines[1]


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    lines = run(CC="false", XDG_CACHE_HOME=str(tmp_path))
    assert lines[0].startswith("reference")
    assert "false" in lines[1]


def test_another_source_is_built_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "native.c"
    source.write_text("int tinykg_answer(void) { return 1; }")
    first = native.build(source)
    source.write_text("int tinykg_answer(void) { return 2; }")
    second = native.build(source)
    assert [ctypes.CDLL(str(library)).tinykg_answer() for library in (first, second)] == [1, 2]


@pytest.fixture
def compiler(tmp_path: Path) -> Callable[[str], str]:
    """Writes a compiler that does as a shell script says, which may go on with the real one, ``$CC``."""

    def write(script: str) -> str:
        real = os.environ.get("CC") or shlex.quote(shutil.which("cc") or shutil.which("gcc") or "")
        path = tmp_path / "cc"
        path.write_text(f"#!/bin/sh\nCC={shlex.quote(real)}\n{dedent(script)}")
        path.chmod(0o755)
        return str(path)

    return write


IN_HASTE = 'exec $CC "$@" -O0'  # the last of these counts, and takes a fifth of the time


def test_built_once_and_where_it_can_be_written(compiler: Callable[[str], str], tmp_path: Path) -> None:
    quick = compiler(IN_HASTE)
    assert run(CC=quick, XDG_CACHE_HOME=str(tmp_path))[0].startswith("native")
    (library,) = (tmp_path / "lightning_tinykg").iterdir()
    built = library.stat().st_mtime_ns
    assert run(CC=quick, XDG_CACHE_HOME=str(tmp_path))[0].startswith("native")
    assert library.stat().st_mtime_ns == built
    file = tmp_path / "file"
    file.write_text("")
    assert run(CC=quick, XDG_CACHE_HOME=str(file))[0].startswith("native")


NO_THREADS_LIBRARY = """
    case " $* " in
    *" -fopenmp "*)
        out=$(echo "$*" | sed 's/.* -o \\([^ ]*\\) .*/\\1/')
        echo 'void nowhere(void); void tinykg_pack(void) { nowhere(); }' | $CC -fPIC -x c -c -o "$out" - ;;
    *) exec $CC "$@" -O0 ;;
    esac
"""


def test_what_cannot_be_loaded_is_built_with_other_flags(compiler: Callable[[str], str], tmp_path: Path) -> None:
    want = int(quantize(torch.linspace(-1, 1, 1000), 2, key=7).codes.sum())
    found = run(CC=compiler(NO_THREADS_LIBRARY), XDG_CACHE_HOME=str(tmp_path))
    assert found[0] == f"native {want} 0"
    (library,) = (tmp_path / "lightning_tinykg").iterdir()
    library.write_bytes(b"cut off")
    assert run(CC=str(tmp_path / "cc"), XDG_CACHE_HOME=str(tmp_path))[0] == f"native {want} 0"


def test_a_linker_that_fails_is_quoted_for_all_flags(
    compiler: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = 'case "$*" in *-shared*) echo "no linker here" >&2; exit 3 ;; esac'  # all else is called compiled
    monkeypatch.setenv("CC", compiler(script))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(OSError, match="builds nothing that works") as raised:
        native.build(native._SOURCE)
    message = str(raised.value)
    assert "exit status 3 no linker here" in message
    assert all(f"with {' '.join(choice) or 'no more flags'}: " in message for choice in native._CHOICES)
    assert not list((tmp_path / "cache" / "lightning_tinykg").iterdir())


def test_a_cache_that_cannot_be_written_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, other = tmp_path / "lightning_tinykg", tmp_path / "other"
    cache.mkdir(mode=0o555)
    other.mkdir()
    access = os.access
    # root may write everywhere, but to a file system that is mounted read-only
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and not (path == cache and mode & os.W_OK))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(other))
    library = native.build(native._SOURCE)
    assert library.is_relative_to(other)
    assert not list(cache.iterdir())


def test_the_environment_decides(tmp_path: Path) -> None:
    assert run(LIGHTNING_TINYKG_KERNELS="reference")[0].startswith("reference")
    with pytest.raises(subprocess.CalledProcessError):
        run(LIGHTNING_TINYKG_KERNELS="numba")


def test_no_second_pool_of_threads() -> None:
    """What is compiled asks PyTorch's threads' library for threads, and brings none of its own."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("no /proc here")
    script = """
        import torch
        from lightning_tinykg.codecs.affine import quantize
        quantize(torch.randn(200_000), 2, key=0)
        with open("/proc/self/maps") as maps:
            print(len({line.split()[-1] for line in maps if "libgomp" in line}))
    """  # in a process of its own: other libraries in this one may have brought theirs
    ran = subprocess.run([sys.executable, "-c", dedent(script)], capture_output=True, text=True, check=True)
    assert int(ran.stdout) <= 1
