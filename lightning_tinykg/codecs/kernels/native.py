"""The kernels for the CPU: ``native.c``, compiled once on each kind of machine by its C compiler."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from lightning_tinykg.codecs.cuts import Cut, number_of
from lightning_tinykg.codecs.kernels.reference import Reference

_SOURCE = Path(__file__).with_name("native.c")

# without contraction, a product and a sum are rounded apart, as in PyTorch's ops
_FLAGS = ("-O3", "-std=c11", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")

_CHOICES = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())
"""What not every compiler has: the first set that works is used."""

_NUMBER, _PLACE, _INT, _WORD = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64
_SIGNATURES = {
    "tinykg_quantize": (
        _PLACE, _NUMBER, _NUMBER, _INT, _WORD, _WORD, _INT, _PLACE, _PLACE, _PLACE, _INT,
    ),
    "tinykg_dequantize": (_PLACE, _PLACE, _PLACE, _NUMBER, _NUMBER, _INT, _INT, _PLACE, _INT),
    "tinykg_pack": (_PLACE, _NUMBER, _NUMBER, _INT, _PLACE, _INT),
    "tinykg_pack_classes": (
        _PLACE, _NUMBER, _NUMBER, _INT, _NUMBER, _NUMBER, _INT, _INT, _INT, _PLACE, _INT,
    ),
    "tinykg_pack_two_levels": (_PLACE, _NUMBER, _NUMBER, _INT, _PLACE, _PLACE, _INT),
    "tinykg_unpack_levels": (_PLACE, _NUMBER, _NUMBER, _INT, _PLACE, _INT, _PLACE, _NUMBER, _INT),
}  # fmt: skip  # as the C function has them

_ANSWERING = ("tinykg_quantize", "tinykg_dequantize", "tinykg_pack_two_levels")
"""Those that return a number; the others return nothing."""

_WORTH_THREADS = 1 << 16
"""Elements below which one thread is faster."""


class Native(Reference):
    """Native code, by groups, on as many threads as PyTorch uses. What it has no code for is the reference's.

    Raises:
        OSError: if it can't be built: there is no compiler, or it fails.
    """

    name = "native"
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)

    def __init__(self) -> None:
        library = ctypes.CDLL(str(build(_SOURCE)))
        for name, arguments in _SIGNATURES.items():
            getattr(library, name).argtypes = arguments
            getattr(library, name).restype = _NUMBER if name in _ANSWERING else None
        self._library = library

    def packs(self, bits: int) -> bool:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`."""
        return True

    def quantize(
        self, x: Tensor, key: int, start: int, bits: int, codes: Tensor, zero: Tensor, scale: Tensor
    ) -> int | None:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`."""
        exact: int = self._library.tinykg_quantize(
            x.data_ptr(), *x.shape, bits, key, start, zero.dtype == torch.float32,
            codes.data_ptr(), zero.data_ptr(), scale.data_ptr(), _threads(x),
        )  # fmt: skip  # as the C function has them
        if exact < 0:
            raise MemoryError("quantize: no memory for one group's codes")
        return exact

    def dequantize(self, codes: Tensor, zero: Tensor, scale: Tensor, bits: int, out: Tensor) -> None:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`."""
        failed = self._library.tinykg_dequantize(
            codes.data_ptr(), zero.data_ptr(), scale.data_ptr(), *out.shape, bits, zero.dtype == torch.float32,
            out.data_ptr(), _threads(out),
        )  # fmt: skip  # as the C function has them
        if failed < 0:
            raise MemoryError("dequantize: no memory for one group's codes")

    def pack(self, codes: Tensor, bits: int, out: Tensor) -> None:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`."""
        self._library.tinykg_pack(codes.data_ptr(), *codes.shape, bits, out.data_ptr(), _threads(codes))

    def pack_classes(self, x: Tensor, cut: Cut, out: Tensor) -> None:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`."""
        low, high = cut.words(x.dtype, x.device)
        self._library.tinykg_pack_classes(
            x.data_ptr(), *x.shape, number_of(x.dtype), low, high, cut.open, cut.packed_codes, cut.bits,
            out.data_ptr(), _threads(x),
        )  # fmt: skip  # as the C function has them

    def pack_two_levels(self, x: Tensor, value: Tensor, out: Tensor) -> bool:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`."""
        third = self._library.tinykg_pack_two_levels(
            x.data_ptr(), *x.shape, number_of(x.dtype), value.data_ptr(), out.data_ptr(), _threads(x)
        )
        return not third

    def unpack_levels(self, codes: Tensor, levels: Tensor, bits: int, out: Tensor) -> None:
        """See :class:`~lightning_tinykg.codecs.kernels.Kernels`."""
        self._library.tinykg_unpack_levels(
            codes.data_ptr(), *codes.shape, bits, levels.data_ptr(), levels.itemsize, out.data_ptr(), out.shape[1],
            _threads(out),
        )  # fmt: skip  # as the C function has them


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() >= _WORTH_THREADS else 1


def build(source: Path) -> Path:
    """Compile a C file to a shared library, unless this compiler has done so for this processor and PyTorch.

    The library is put into ``$XDG_CACHE_HOME/lightning_tinykg`` (``~/.cache`` by default), or where that can't be
    written, into a directory of its own for this process. It is built without a threads' library: what it asks for
    is PyTorch's, so that there is one pool of threads in the process. Where that lacks something the compiler asks for,
    the library can't be loaded, and flags that need less are tried.

    Args:
        source: the C file.

    Returns:
        The library.

    Raises:
        OSError: if there is no compiler, or it fails with all flags; with what it said to each.
    """
    compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or ""]
    if not shutil.which(compiler[0]):
        raise OSError("no C compiler was found: install one, or set CC")
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout
    # what can be loaded depends on the threads' library that comes with PyTorch
    built_with = (version, shlex.join(compiler), repr((_FLAGS, _CHOICES)), torch.__version__)
    parts = (source.read_text(), *built_with, _processor())
    name = f"{source.stem}-{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:16]}.so"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_tinykg"
    library = cache / name
    if library.exists() and not _unloadable(library):
        return library
    if not _writable(cache):
        library = Path(tempfile.mkdtemp(prefix="lightning_tinykg-")) / name
    failures = []
    with tempfile.TemporaryDirectory(dir=library.parent) as directory:  # another process may be building it as well
        built = Path(directory) / name
        for choice in _CHOICES:
            compiling = [*compiler, *_FLAGS, *choice, "-c", "-o", f"{built}.o", str(source)]
            linking = [*compiler, "-shared", "-o", str(built), f"{built}.o"]
            failure = _failure(compiling) or _failure(linking) or _unloadable(built)
            if not failure:
                os.replace(built, library)
                return library
            failures.append(f"with {shlex.join(choice) or 'no more flags'}: {failure}")
    raise OSError(f"{shlex.join(compiler)} builds nothing that works: {'; '.join(failures)}")


def _writable(folder: Path) -> bool:
    """Whether files can be put there; it is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _failure(command: list[str]) -> str:
    """Run it. Returns what it said, with its exit status, if it failed."""
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"exit status {ran.returncode} {ran.stderr.strip()[:200]}".strip() if ran.returncode else ""


def _unloadable(library: Path) -> str:
    """Why it can't be loaded, if so."""
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return f"it can't be loaded: {str(error)[:200]}"
    return ""


def _processor() -> str:
    """What the code is compiled for: another machine with the same home may not have the same instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "") + platform.machine()
