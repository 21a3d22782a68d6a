"""The Triton kernels give the reference's bits.

Without CUDA they run in Triton's interpreter, which has to be chosen before Triton is imported: in a process of its
own, that :func:`test_in_the_interpreter` starts. There, what needs the compiler instead is left out.
"""

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_tinykg.codecs import kernels
from lightning_tinykg.codecs.affine import dequantize, quantize
from lightning_tinykg.codecs.cuts import DTYPES as DTYPES_OF_MASKS
from lightning_tinykg.codecs.cuts import SIGNS, Cut
from lightning_tinykg.codecs.exact_groups import places
from lightning_tinykg.codecs.kernels.reference import Reference
from lightning_tinykg.codecs.lossless import encode_bool, encode_signs, encode_two_levels
from lightning_tinykg.codecs.noise import make_key, uniform
from lightning_tinykg.codecs.packing import code_dtype, packed_size
from lightning_tinykg.codecs.planes import pack_planes

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import numpy as np
import triton
import triton.language as tl

from lightning_tinykg.codecs.kernels import fused, fused_groups, fused_masks, fused_rows

INF, NAN = float("inf"), float("nan")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from triton.runtime import interpreter

    def convert(self: object, source: object, dtype: object) -> object:
        """The interpreter cuts bfloat16 off, and takes its denormals for something else."""
        data, old, new = source.data, source.dtype.scalar, dtype.scalar
        if old == tl.float32 and new == tl.bfloat16:
            data = torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.uint16).numpy()
        elif old == tl.bfloat16 and new == tl.float32:
            data = (data.astype(np.uint32) << 16).view(np.float32)
        else:
            data = data.astype(interpreter._get_np_dtype(dtype))
        return interpreter.TensorHandle(data, new)

    def fma(self: object, x: object, y: object, z: object) -> object:
        """The interpreter rounds the product."""
        product, addend = x.data.astype(np.float64) * y.data, z.data.astype(np.float64)  # exact
        total = product + addend
        added = total - product
        error = (product - (total - added)) + (addend - added)
        near = total.astype(np.float32)
        # rounded to the middle of two floats, the sum has forgotten on which side of it it was
        other = np.nextafter(near, np.where(error > 0, np.float32(INF), np.float32(-INF)))
        beyond = (error != 0) & (total - near == other.astype(np.float64) - total)
        return interpreter.TensorHandle(np.where(beyond, other, near), x.dtype.scalar)

    interpreter.InterpreterBuilder.cast_impl = convert
    interpreter.InterpreterBuilder.create_fma = fma

BITS = (1, 2, 4, 8)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
METADATA = (torch.bfloat16, torch.float32)
GROUPS = (1, 7, 44, 64, 200, 1000)
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
KEY = make_key(5, 7)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of infinities

on_device = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter")),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs CUDA"),
            ],
        ),
    ],
)
compiled = pytest.mark.skipif(INTERPRETED, reason="compiled by the process that started this one")


OF_OTHER_DTYPES = "dtype1 or dtype2 or dtype3 or metadata1"
IN_THE_GATE = f"not ({OF_OTHER_DTYPES} or more)"


@compiled
@pytest.mark.parametrize("chosen", [IN_THE_GATE, pytest.param(f"not ({IN_THE_GATE})", marks=pytest.mark.slow)])
def test_in_the_interpreter(chosen: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-m", "not gpu", "-k", chosen, __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    # a worker of pytest-xdist tells its children that they are workers
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def more(*values: object) -> list[Any]:
    """Parameters for which there is no time in the gate."""
    return [pytest.param(value, id=f"more{i}") for i, value in enumerate(values)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.cpu().view(WORDS[a.itemsize]), b.cpu().view(WORDS[b.itemsize]))


def odd_groups(count: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """Groups of very different sizes, and one at least of each kind that is special."""
    generator = torch.Generator().manual_seed(group_size)
    x = torch.randn(count, group_size, generator=generator, dtype=torch.float64)
    x *= torch.exp(torch.randn(count, 1, generator=generator, dtype=torch.float64) * 8)
    x += torch.where(torch.rand(count, 1, generator=generator) < 0.3, 100.0, 0.0)
    top, tiny = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    last, middle = group_size - 1, group_size // 2
    x[1] = 0.1
    x[2] = -0.0
    x[3, 0] = NAN
    x[4, middle] = NAN
    x[5, last] = NAN
    x[6, 0] = INF
    x[7, middle] = -INF
    x[8, last] = INF
    x[9] = INF
    x[10], x[10, last] = -INF, INF
    x[11] = torch.where(torch.arange(group_size) % 2 == 0, -0.0, 0.0)
    x[12] = x[13] = x[14].abs()
    x[12, middle], x[13, last] = -0.0, 0.0
    x[15] = top
    x[16, 0], x[16, last] = top, -top
    x[17, 0], x[17, last] = top, 0.0
    x[18, middle] = -top
    x[19] = x[19].clamp(-4, 4) * tiny
    x[20] = x[20].clamp(-4, 4) * tiny * 2.0**-8
    x[21] = torch.arange(group_size) % 4
    x[22], x[22, last] = 1.0, 1.0 + torch.finfo(dtype).eps
    x[23] = 1e-40
    x[24] = torch.where(torch.arange(group_size) % 3 == 0, 1e30, 1e-30)
    return x.to(dtype)


def compare(x: Tensor, start: int, bits: int, metadata: torch.dtype, device: str) -> None:
    """What the kernels make of groups, as they are, is what the reference makes of their float32 copy on the CPU."""
    count, group_size = x.shape
    made = []
    for maker, rows in ((Reference(), x.to(torch.float32, copy=True)), (fused.Fused(), x.to(device))):
        apart = not maker.packs(bits)
        packed = (8 if bits < 8 else 16) if apart else bits
        word = code_dtype(bits) if apart else torch.uint8
        columns = group_size if apart else packed_size(group_size, bits)
        codes = torch.full((count, columns), 77, dtype=word, device=rows.device)
        zero, scale = (torch.full((count,), 7, dtype=metadata, device=rows.device) for _ in range(2))
        before = rows.clone()
        maker.quantize(rows, KEY, start, bits, codes, zero, scale)
        assert maker.name == "reference" or same_bits(rows, before)
        out = torch.empty_like(rows)
        maker.dequantize(codes, zero, scale, packed, out)
        if out.dtype != x.dtype:
            out = out.clamp(torch.finfo(x.dtype).min, torch.finfo(x.dtype).max).to(x.dtype)
        if apart:
            whole = torch.empty(count, packed_size(group_size, bits), dtype=torch.uint8, device=rows.device)
            pack_planes(codes, bits, whole)
            codes = whole
        made.append((codes, zero, scale, torch.where(out.isnan(), 3.0, out)))
    for name, want, got in zip(("codes", "zero", "scale", "out"), *made, strict=True):
        wrong = (want != got.cpu()).nonzero()[:3].tolist()
        assert same_bits(want, got), (name, bits, group_size, wrong)


# -- in the interpreter, or on CUDA -----------------------------------------------------------------------------


@on_device
@pytest.mark.parametrize("metadata", METADATA)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits(dtype: torch.dtype, metadata: torch.dtype, device: str) -> None:
    for group_size in GROUPS:
        for bits in BITS:
            rows, _, _ = fused._shape(group_size, bits, dtype.itemsize)
            x = odd_groups(max(30, min(2 * rows, 8000 // group_size) + 3), group_size, dtype)
            compare(x, 0, bits, metadata, device)


@on_device
@pytest.mark.parametrize("bits", [3, 7, 9, 12, *more(5, 6, 10, 11)])
def test_codes_that_do_not_divide_a_byte_are_left_in_one_or_two_or_have_an_upper_byte(bits: int, device: str) -> None:
    for group_size, dtype in ((64, torch.float32), (44, torch.bfloat16), (1, torch.float32), (1000, torch.float16)):
        for metadata in METADATA:
            compare(odd_groups(40, group_size, dtype), (1 << 31) - 500, bits, metadata, device)
            compare(odd_groups(40, group_size, dtype), 0, bits, metadata, device)


@on_device
@pytest.mark.parametrize("bits", BITS)
def test_any_position(bits: int, device: str) -> None:
    """Within, up to, across and after the ends of blocks of positions."""
    for group_size, dtype in ((64, torch.float32), (44, torch.bfloat16)):
        x = odd_groups(40, group_size, dtype)
        for start in (1 << 30, (1 << 31) - 40 * group_size, (1 << 31) - 500, (1 << 31) - 512, (7 << 31) - 3, 1 << 40):
            compare(x, start, bits, torch.bfloat16, device)


@on_device
@pytest.mark.parametrize("bits", BITS)
def test_groups_that_no_program_holds_at_once(bits: int, device: str) -> None:
    x = odd_groups(25, 16384 * 2 + 44, torch.float32)[[0, 1, 5, 8, 13]]
    compare(x, (1 << 31) - 40_000, bits, torch.bfloat16, device)
    compare(x[:2, :16384].contiguous(), 0, bits, torch.float32, device)


@on_device
def test_launches_of_few_groups(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """As those that begin beyond 2**31 elements."""
    x = odd_groups(100, 64, torch.float16)
    codes = torch.empty(100, 16, dtype=torch.uint8, device=device)
    zero, scale = (torch.empty(100, dtype=torch.bfloat16, device=device) for _ in range(2))
    whole, parts = (torch.empty(100, 64, dtype=torch.float16, device=device) for _ in range(2))
    fused.Fused().quantize(x.to(device), KEY, 0, 2, codes, zero, scale)
    fused.Fused().dequantize(codes, zero, scale, 2, whole)
    monkeypatch.setattr(fused, "_BLOCK", 1000)
    fused.Fused().dequantize(codes, zero, scale, 2, parts)
    assert torch.equal(whole.nan_to_num(3.0), parts.nan_to_num(3.0))


@on_device
def test_groups_beyond_32_bits_are_the_references(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(fused, "_BLOCK", 100)
    compare(odd_groups(30, 64, torch.float16), 0, 2, torch.bfloat16, device)
    compare(odd_groups(30, 64, torch.float32), 0, 2, torch.float32, device)


@on_device
def test_nothing(device: str) -> None:
    for group_size in (1, 64):
        compare(torch.empty(0, group_size), 0, 2, torch.bfloat16, device)


@on_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_constants(dtype: torch.dtype, device: str) -> None:
    every = torch.arange(-(2**15), 2**15, 1 if device == "cuda" else 37, dtype=torch.int32)
    x = every.to(torch.int16).view(dtype)[:, None].expand(-1, 8).contiguous()
    compare(x, 0, 2, torch.bfloat16, device)


@on_device
@pytest.mark.parametrize("bits", [4, 8, 12])
def test_nothing_lies_beyond_the_last_level(bits: int, device: str) -> None:
    """Divided by a rounded scale, a largest element may: there, and where the noise is least, a code would wrap."""
    x = torch.randn(100_000, 2, generator=torch.Generator().manual_seed(1))
    x[:, 1] = x[:, 0].abs() + 1
    span = x[:, 1] - x[:, 0]
    beyond = span / (span / (2**bits - 1)) > 2**bits - 1
    assert beyond.sum() >= 5
    least = uniform(KEY, 0, 1 << 22, torch.device("cpu"))[1::2].argsort()[:5]
    for pair in x[beyond][:5]:
        for group in least.tolist():
            compare(pair[None].contiguous(), 2 * group, bits, torch.float32, device)


@on_device
def test_packing(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for bits in BITS:
        for rows, size in ((3, 4096), (1, 1), (2, 5000), (1, 0), (0, 4)):
            codes = torch.randint(2**bits, (rows, size * (8 // bits)), dtype=torch.uint8, generator=generator)
            want = torch.empty(rows, size, dtype=torch.uint8)
            Reference().pack(codes, bits, want)
            got = torch.empty_like(want, device=device)
            fused.Fused().pack(codes.to(device), bits, got)
            assert torch.equal(want, got.cpu()), (bits, rows, size)


@on_device
@pytest.mark.parametrize("bits", [1, 2])
def test_levels(bits: int, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool):
        levels = torch.tensor([0.0, 1.0, 7.0, 3.0][: 2**bits], dtype=torch.float64).to(dtype)
        if dtype.is_floating_point:
            levels[0], levels[1] = -0.0, NAN
        for rows, size, spare in ((3, 4096, 0), (1, 1, 0), (1, 1, 3), (2, 700, 1), (1, 513, 2), (1, 0, 0), (0, 4, 0)):
            codes = torch.randint(256, (rows, size), dtype=torch.uint8, generator=generator)
            want = torch.empty(rows, size * (8 // bits) - spare, dtype=dtype)
            Reference().unpack_levels(codes, levels, bits, want)
            got = torch.empty_like(want, device=device)
            fused.Fused().unpack_levels(codes.to(device), levels.to(device), bits, got)
            assert same_bits(want, got), (dtype, rows, size, spare)


CUTS = (
    Cut(0.0, 0.0, above=1, nan=1),
    Cut(-3.0, 3.0, within=1, open=True),
    Cut(-INF, INF, within=1, open=True),
    Cut(0.1, 0.1, above=1, nan=1, wide_on_cpu=True),
    Cut(-0.3, 1e30, below=1, above=1),
    Cut(1e-320, 1e-41, within=1, above=2),
    SIGNS,
)


def odd_elements(numel: int, dtype: torch.dtype) -> Tensor:
    """Numbers, the ends of all cuts and what lies next to them, and all that is special."""
    ends = torch.tensor([end for cut in CUTS for end in (cut.low, cut.high)], dtype=torch.float64).to(dtype)
    beside = [torch.nextafter(ends, torch.full_like(ends, way)) for way in (INF, -INF)]
    tiny = torch.finfo(dtype).smallest_normal
    others = torch.tensor([0.0, -0.0, INF, -INF, NAN, -NAN, tiny, -tiny, tiny / 2, -tiny / 2, 7.0], dtype=dtype)
    special = torch.cat([ends, *beside, others])
    x = torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(dtype)
    which = torch.randint(2 * len(special), (numel,), generator=torch.Generator().manual_seed(1))
    return torch.where(which < len(special), special[which % len(special)], x)


@on_device
@pytest.mark.parametrize("dtype", DTYPES_OF_MASKS)
def test_classes(dtype: torch.dtype, device: str) -> None:
    for rows, count in ((2, 32768), (1, 1), (1, 9), (2, 1000), (1, 5001), (0, 8)):
        x = odd_elements(rows * count, dtype).view(rows, count)
        for cut in CUTS:
            want = torch.empty(rows, packed_size(count, cut.bits), dtype=torch.uint8)
            # a CPU's ends are not a GPU's: here the reference is asked where the kernel runs
            Reference().pack_classes(x, cut, want) if device == "cpu" else want.copy_(on_gpu(x, cut))
            got = torch.full_like(want, 77, device=device)
            fused.Fused().pack_classes(x.to(device), cut, got)
            assert torch.equal(want, got.cpu()), (rows, count, cut)


def on_gpu(x: Tensor, cut: Cut) -> Tensor:
    out = torch.empty(x.shape[0], packed_size(x.shape[1], cut.bits), dtype=torch.uint8, device="cuda")
    Reference().pack_classes(x.cuda(), cut, out)
    return out


@on_device
def test_masks_that_codecs_make(device: str) -> None:
    x = odd_elements(70_003, torch.float32)
    x = torch.where(x.isnan(), 3.0, x)
    mask = torch.where(x > 0, 1.25, 0.0)
    for tensor, encode in (
        (x, encode_signs),
        (x[: 3 * 20_000].view(3, 20_000).t(), encode_signs),
        (x > 0, encode_bool),
        (mask, encode_two_levels),
        (mask[::2].bfloat16(), encode_two_levels),
        (torch.zeros(100), encode_two_levels),
        (x[:0], encode_signs),
    ):
        with kernels.use("reference"):
            want = encode(tensor)
            restored = want.decode()
        with kernels.use("triton"):
            code = encode(tensor.to(device))
            assert torch.equal(code.codes.cpu(), want.codes)
            assert torch.equal(code.levels.cpu().nan_to_num(7.0), want.levels.nan_to_num(7.0))
            assert same_bits(code.decode(), restored)


@on_device
def test_what_codecs_make(device: str) -> None:
    """Short last groups, copies of what kernels do not read as it is, groups that are kept."""
    flat = odd_groups(70, 64, torch.float32).view(-1)
    finite = flat[64 * 25 :]
    for x, group_size in (
        (flat[:-5], 64),
        (finite[:-5].bfloat16(), 64),
        (finite[:50].half(), 64),
        (finite[:2000].double(), 63),
        (finite[:2000].view(40, 50).t(), 44),
        (finite[:0], 64),
        (finite[3:1003], 32),
    ):
        with kernels.use("reference"):
            want = quantize(x, 2, key=KEY, group_size=group_size)
            restored = dequantize(want)
        with kernels.use("triton"):
            assert kernels.kernels_for(torch.device(device)).name == "triton"
            code = quantize(x.to(device), 2, key=KEY, group_size=group_size)
            for name in ("codes", "zero", "scale"):
                assert same_bits(getattr(want, name), getattr(code, name)), (name, x.dtype, group_size)
            got, wanted = (
                torch.nn.functional.pad(t.cpu(), (0, -t.numel() % group_size)).view(-1, group_size)
                for t in (dequantize(code), restored)
            )
            other = (got.nan_to_num(3.0) != wanted.nan_to_num(3.0)).any(1)
            # of the groups that can't be quantized, a GPU has room for some; all others are the same
            lost = want.zero.isnan().sum() - places(len(want.zero))
            assert other.sum() == lost.clamp(min=0), (x.dtype, group_size)
            assert got[other].isnan().all()


@on_device
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", [[], [0, 1], [2047, 5, 1024], list(range(7)), *more([0], [1023], [2099])])
def test_groups_that_are_kept(which: list[int], dtype: torch.dtype, device: str) -> None:
    """None, the first, neighbours, the ends of what a program looks at, more than there is room for."""
    x = torch.randn(2100, 44, generator=torch.Generator().manual_seed(0)).to(dtype)
    with kernels.use("reference"):
        plain = dequantize(quantize(x, 8, key=KEY, group_size=44)).view(x.shape)
    x[which, 7] = INF
    with kernels.use("triton"):
        code = quantize(x.to(device), 8, key=KEY, group_size=44)
        got = dequantize(code).view(x.shape).cpu()
        index = torch.tensor([3, *which, 3, *which, 2098], device=device)
        rows = code.rows(index, 44)
    assert rows is not None
    assert torch.equal(rows.cpu().nan_to_num(3.0), got[index.cpu()].nan_to_num(3.0))
    lost = got.isnan().any(1)
    assert lost.sum() == max(0, len(which) - places(2100))
    kept = sorted(group for group in which if not lost[group])
    assert sorted(code.exact_index[code.exact_index >= 0].tolist()) == kept
    plain[kept] = x[kept]
    assert torch.equal(got[~lost], plain[~lost])
    assert got[lost].isnan().all()


@on_device
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(100, 64), (7, 4), (3, 1500), (5,), (6, 3, 5), (4, 0)])
def test_gathered_rows(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    table = (torch.randn(shape, generator=generator) * 9).to(dtype)
    for index in (
        torch.randint(-shape[0], shape[0], (131,), generator=generator),
        torch.randint(shape[0], (3, 5), generator=generator, dtype=torch.int32),
        torch.empty(0, dtype=torch.int64),
    ):
        want = table[index.long()]
        got = torch.empty_like(want, device=device)
        fused.Fused().gather(table.to(device), index.to(device), got)
        assert torch.equal(got.cpu(), want)


@triton.jit
def divide(x_ptr, divisor_ptr, inverse_ptr, out_ptr, size, SIZE: tl.constexpr):
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x, divisor = tl.load(x_ptr + place, mask=place < size), tl.load(divisor_ptr + place, mask=place < size)
    quotient = fused_groups._divide(x, divisor, tl.load(inverse_ptr + place, mask=place < size))
    tl.store(out_ptr + place, quotient, mask=place < size)


def hard_quotients(divisors: Tensor) -> tuple[Tensor, Tensor]:
    """Divisors and dividends, 24-bit integers, whose quotients are nearest to the middle of two floats.

    A middle is an odd 25-bit integer m over 2**24 (2**25 for a quotient below 1); a dividend a of a divisor d is next
    to it where ``m d - a 2**24`` is a small odd c: where m is c over d, modulo 2**24.
    """
    odd = divisors[divisors % 2 == 1]
    inverse = odd.clone()
    for _ in range(6):
        inverse = inverse * (2 - odd * inverse)  # Newton's, modulo 2**64
    found = []
    for shift in (24, 25):
        for c in range(-15, 16, 2):
            middle = (inverse * c) & ((1 << shift) - 1)
            middle = torch.where(middle < 1 << 24, middle + (1 << 24), middle)
            x = (middle * odd - c) >> shift
            fits = (middle * odd - c == x << shift) & (x >= 1 << 23) & (x < 1 << 24)
            found.append(torch.stack([x[fits], odd[fits]]))
    x, divisor = torch.cat(found, 1)
    return x.float(), divisor.float()


@on_device
def test_shared_reciprocals_divide_exactly(device: str) -> None:
    step = 1 if device == "cuda" else 256
    x, divisor = hard_quotients(torch.arange(1 << 23, 1 << 24, 1)[step - 1 :: step])
    assert x.numel() > (1 << 24) // step
    want, inverse = x / divisor, 1 / divisor
    assert (x * inverse != want).float().mean() > 0.3  # hard indeed
    for size in (1.0, 2.0**-52, 2.0**70):
        out = torch.empty_like(x, device=device)
        at = [t.to(device) for t in (x * size, divisor * size, inverse / size, out)]
        divide[(triton.cdiv(x.numel(), 1 << 16),)](*at, x.numel(), SIZE=1 << 16, enable_fp_fusion=False)
        assert torch.equal(at[3].cpu(), want)


# -- compiled for a GPU that need not be there ------------------------------------------------------------------


def build(kernel: object, dtype: torch.dtype, group_size: int, bits: int, metadata: torch.dtype) -> tuple[str, int]:
    """Compile for an H200.

    Returns:
        The PTX, and the elements of a thread.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    upper = fused._has_upper_byte(bits)
    bits -= 8 * upper
    rows, columns, warps = fused._shape(group_size, bits, dtype.itemsize)
    word = "*i16" if metadata == torch.bfloat16 else "*i32"
    element = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}[dtype]
    constants = {
        "GROUP": group_size,
        "BYTES": group_size if bits == 16 else packed_size(group_size, bits),
        "BITS": bits,
        "UPPER": upper,
        "STRADDLES": False,
        "LARGEST": INF if dtype == torch.float32 else torch.finfo(dtype).max,
        "ROWS": rows,
        "COLUMNS": columns,
    }
    pointers = {
        "x_ptr": element,
        "out_ptr": element,
        "codes_ptr": "*i16" if bits == 16 else "*u8",
        "zero_ptr": word,
        "scale_ptr": word,
    }
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in names},
        {(i,): constants[name] for i, name in enumerate(names) if name in constants},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in pointers},
    )
    options = {"num_warps": warps, "enable_fp_fusion": False}
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert len(built.asm["cubin"]) > 1000
    return built.asm["ptx"], rows * columns * max(8 // bits, 1) // (32 * warps)


@pytest.fixture
def fresh_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def instructions(ptx: str) -> Counter[str]:
    """How often each occurs."""
    return Counter(re.findall(r"^\s*(?:@!?%\w+ )?([a-z][\w.:]*)\s", ptx, re.M))


def check_arithmetic(found: Counter[str], contracted: int) -> None:
    """Of what rounds, everything is IEEE's, and multiplications are only contracted where the kernel says so."""
    fused_operations = {name: n for name, n in found.items() if name.startswith(("fma", "mad.rn", "mad.f"))}
    assert fused_operations == ({"fma.rn.f32": contracted} if contracted else {})
    for name in found:
        assert "approx" not in name, name
        assert not name.startswith("div.full"), name
        # denormals are flushed by two only: divisions where they do not matter, and floor, of which they are zero
        assert ".ftz" not in name or name in ("div.rn.ftz.f32", "cvt.rmi.ftz.f32.f32"), name


@compiled
@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize(
    ("dtype", "group_size", "bits"),
    [
        (torch.float32, 64, 2),
        (torch.bfloat16, 64, 2),
        (torch.float16, 32, 4),
        (torch.float32, 32, 1),
        (torch.float32, 64, 8),
        (torch.float32, 64, 12),
        (torch.bfloat16, 64, 9),
        (torch.float32, 64, 16),
        (torch.float32, 44, 2),
    ],
)
def test_compiled_for_an_h200(dtype: torch.dtype, group_size: int, bits: int) -> None:
    vectors = group_size != 44  # its planes are of 11 elements
    ptx, elements = build(fused_groups.quantize, dtype, group_size, bits, torch.bfloat16)
    found = instructions(ptx)
    check_arithmetic(found, 3 * elements)
    if vectors:  # each element is read once, 16 bytes at a time, and the groups' first ones once more
        loads = {name: n for name, n in found.items() if name.startswith("ld.global")}
        firsts, reads = 2 if bits == 16 else 1, elements * dtype.itemsize // 16
        if fused._has_upper_byte(bits):  # all planes but the first again, which a byte is written before
            lanes = 8 // (bits - 8)
            reads += reads * (lanes - 1) // lanes
        assert sum(loads.values()) == reads + firsts, loads
        assert loads["ld.global.v4.b32"] == reads, loads

    ptx, elements = build(fused_groups.dequantize, dtype, group_size, bits, torch.bfloat16)
    found = instructions(ptx)
    check_arithmetic(found, 0)
    if vectors:
        assert found["st.global.v4.b32"] == elements * dtype.itemsize // 16
    if dtype != torch.float32:
        rounded = [name for name in found if name.startswith("cvt") and re.search(r"\.(bf16|f16)(x2)?\.f32", name)]
        assert rounded
        assert all(".rn." in name for name in rounded), rounded


@compiled
@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("bits", [1, 2])
def test_masks_compiled_for_an_h200(bits: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    launched = {
        fused_masks.pack: {"codes_ptr": "*u8", "out_ptr": "*u8"},
        fused_masks.pack_classes: {"x_ptr": "*fp32", "out_ptr": "*u8"},
        fused_masks.unpack_levels: {"codes_ptr": "*u8", "levels_ptr": "*i32", "out_ptr": "*i32"},
    }
    for kernel, pointers in launched.items():
        names = kernel.arg_names
        constants = {"BITS": bits, "COLUMNS": 512, "OPEN": False, "CODES": SIGNS.packed_codes}
        sizes = ("count", "size")
        source = ASTSource(
            kernel,
            {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in names},
            {(names.index(name),): value for name, value in constants.items() if name in names},
            {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in pointers or name in sizes},
        )
        found = instructions(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
        stores = [name for name in found if name.startswith("st.global")]
        # the bytes of a thread that lie together: 4 codes of a plane, or the levels of 4
        assert stores == ["st.global.v4.b32" if kernel is fused_masks.unpack_levels else "st.global.b32"], stores
        if kernel is fused_masks.pack_classes:  # each element is read once, 16 bytes at a time
            loads = {name: n for name, n in found.items() if name.startswith("ld.global")}
            assert loads == {"ld.global.v4.b32": 8 // bits}
            assert not any("ftz" in name for name in found)  # denormals are not 0


LAUNCHED = {
    "a gather of wide rows": (fused_rows.gather, {"table_ptr": "*i32", "index_ptr": "*i64", "out_ptr": "*i32"}, 64),
    "a gather of narrow rows": (fused_rows.gather, {"table_ptr": "*i32", "index_ptr": "*i64", "out_ptr": "*i32"}, 4),
    "groups put aside": (
        fused_groups.put_aside,
        {"x_ptr": "*fp32", "zero_ptr": "*i16", "index_ptr": "*i32", "value_ptr": "*fp32"},
        64,
    ),
    "groups put back": (fused_groups.put_back, {"index_ptr": "*i32", "value_ptr": "*i32", "out_ptr": "*i32"}, 64),
    "two levels": (fused_masks.pack_two_levels, {"x_ptr": "*fp32", "value_ptr": "*fp32", "out_ptr": "*u8"}, 512),
}
"""Kernels that copy, with their pointers and the elements of a row."""


@compiled
@pytest.mark.usefixtures("fresh_cache")
@pytest.mark.parametrize("name", LAUNCHED)
def test_copies_compiled_for_an_h200(name: str) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, pointers, columns = LAUNCHED[name]
    names = kernel.arg_names
    constants = {"WIDTH": columns, "GROUP": columns, "COLUMNS": columns, "LOOKED_AT": 1024, "ROWS": 4096 // columns}
    source = ASTSource(
        kernel,
        {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in names},
        {(names.index(name),): value for name, value in constants.items() if name in names},
        {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in pointers or n in ("count", "size")},
    )
    found = instructions(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
    if kernel is fused_rows.gather:  # 16 bytes of a row at a time, however narrow it is
        assert found["ld.global.v4.b32"] == found["st.global.v4.b32"] == 4096 // (4 * 128)
    if kernel is fused_masks.pack_two_levels:  # each element is read once
        assert found["ld.global.v4.b32"] == 8
        assert not any("ftz" in name for name in found)  # denormals are not 0
    if kernel is fused_groups.put_aside:  # where there is nothing to put aside, nothing but zero points is read
        assert found["atom.global.gpu.acq_rel.add.u32"] == 1
