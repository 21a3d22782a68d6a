"""One arithmetic, fused by device: native code on the CPU, Triton on CUDA, PyTorch's own ops anywhere.

All give the same bits: a run that starts on one machine goes on on another. Which kernels are used is decided by the
device, and can be fixed by the environment variable ``LIGHTNING_TINYKG_KERNELS`` or by :func:`use`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from lightning_tinykg.codecs.cuts import Cut
from lightning_tinykg.codecs.kernels.reference import Reference

NAMES = ("native", "triton", "reference")
"""The kernels there are: for the CPU, for CUDA, for any device."""

_VARIABLE = "LIGHTNING_TINYKG_KERNELS"


class Kernels(Protocol):
    """Quantizes groups, each in one pass."""

    @property
    def name(self) -> str:
        """One of :data:`NAMES`."""

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Dtypes that are read, and written, as they are. Of others they get a float32 copy, a chunk at a time."""

    def packs(self, bits: int) -> bool:
        """Whether codes of this width are packed, and read, in their planes.

        If not, they are left in a byte each, or in two for more than 8 bits.
        """

    def quantize(
        self, x: Tensor, key: int, start: int, bits: int, codes: Tensor, zero: Tensor, scale: Tensor
    ) -> int | None:
        """Quantize groups.

        Args:
            x: contiguous, shape ``[groups, group_size]``; one of ``dtypes``, or float32 scratch that may be changed.
            key: key of the noise.
            start: position in the tensor of the first element, where its noise begins.
            bits: 1 to 12.
            codes: where to put the codes: contiguous, uint8 of shape ``[groups, bytes of a group]``; where they are
                left in two bytes each, int16 of shape ``[groups, group_size]``.
            zero: where to put the zero points: bfloat16 or float32, contiguous, shape ``[groups]``. NaN is put for a
                group that can't be quantized; the scale of such a group is 1, its codes are 0.
            scale: where to put the scales, likewise.

        Returns:
            How many groups can't be quantized; None where nobody has counted.
        """

    def dequantize(self, codes: Tensor, zero: Tensor, scale: Tensor, bits: int, out: Tensor) -> None:
        """Restore groups.

        Args:
            codes: as :meth:`quantize` made them.
            zero: likewise.
            scale: likewise.
            bits: their width; 8 and 16 where they were left in a byte each, or in two.
            out: where to put the elements: contiguous, shape ``[groups, group_size]``; one of ``dtypes``, or float32.
                In a narrower dtype, what lies beyond its finite values becomes the nearest of these.
        """

    def put_aside(self, x: Tensor, zero: Tensor) -> tuple[Tensor, Tensor] | None:
        """Keep the groups that can't be quantized as they are, without waiting for the device.

        Args:
            x: as for :meth:`quantize`, after it: these kernels must have left it as it was.
            zero: the zero points that it has put.

        Returns:
            As many as :func:`~lightning_tinykg.codecs.exact_groups.places` says: which groups, int32 ``[k]``, -1 for
            none, and their elements ``[k, group_size]``. None where these kernels leave that to others.
        """

    def put_back(self, index: Tensor, value: Tensor, out: Tensor) -> bool:
        """Put groups that were kept as they are back in their places.

        Args:
            index: which groups these are: int32, shape ``[k]``; -1 for none.
            value: their elements, shape ``[k, group_size]``.
            out: where they belong, contiguous, shape ``[numel]``; the last group may be short.

        Returns:
            Whether it has been done; False where these kernels leave that to others.
        """

    def gather(self, table: Tensor, index: Tensor, out: Tensor) -> None:
        """Copy rows of a table.

        Args:
            table: any dtype, contiguous, shape ``[rows, ...]``.
            index: which rows, in ``[-rows, rows)``: contiguous int64 or int32, any shape.
            out: where to put them: contiguous, in the table's dtype, ``[*index.shape, ...]``.
        """

    def pack(self, codes: Tensor, bits: int, out: Tensor) -> None:
        """Pack rows of codes, as :func:`~lightning_tinykg.codecs.packing.pack_codes` does.

        Args:
            codes: uint8, contiguous, shape ``[rows, n]``.
            bits: 1, 2, 4 or 8.
            out: where to put the bytes: contiguous, shape ``[rows, n * bits / 8]``.
        """

    def pack_classes(self, x: Tensor, cut: Cut, out: Tensor) -> None:
        """Pack the codes of the classes that a cut parts the elements into.

        Args:
            x: one of :data:`~lightning_tinykg.codecs.cuts.DTYPES`, contiguous, shape ``[rows, n]``.
            cut: the cut, which also says how many bits its codes take.
            out: where to put the bytes: uint8, contiguous, shape ``[rows, m]``, as many as hold ``n`` codes. Those are
                planes of ``m``, as in :mod:`~lightning_tinykg.codecs.packing`; codes beyond the ``n`` are 0.
        """

    def pack_two_levels(self, x: Tensor, value: Tensor, out: Tensor) -> bool:
        """Pack which elements are not 0, and look what they are.

        Args:
            x: as in :meth:`pack_classes`.
            value: what an element is that is not 0, in the dtype of ``x``, shape ``[1]``. Where that is 0, none is
                known yet; the first that is met is put there.
            out: as in :meth:`pack_classes`.

        Returns:
            Whether no element is anything else, if so ``out`` holds them; True where nobody has looked.
        """

    def unpack_levels(self, codes: Tensor, levels: Tensor, bits: int, out: Tensor) -> None:
        """Unpack rows of codes, and put a level for each.

        Args:
            codes: uint8, contiguous, shape ``[rows, m]``.
            levels: any dtype, contiguous, shape ``[2 ** bits]``.
            bits: 1 or 2.
            out: where to put the levels: contiguous, in their dtype, shape ``[rows, n]``, of which ``m`` bytes hold the
                codes.
        """


_REFERENCE = Reference()
_fixed = [os.environ.get(_VARIABLE, "")]


def kernels_for(device: torch.device) -> Kernels:
    """The kernels for tensors on a device.

    Example:
        >>> with use("reference"):
        ...     kernels_for(torch.device("cpu")).name
        'reference'
    """
    fixed = _fixed[-1]
    if fixed and fixed not in NAMES:
        raise ValueError(f"{_VARIABLE} must be one of {', '.join(NAMES)}, got {fixed!r}")
    if device.type == "cpu" and fixed in ("", "native"):
        return _native() or _REFERENCE
    if fixed == "triton" or (device.type == "cuda" and not fixed):
        return _triton() or _REFERENCE
    return _REFERENCE


@contextmanager
def use(name: str) -> Iterator[None]:
    """Use these kernels within the context, wherever they can be: for tests and benchmarks.

    Args:
        name: one of :data:`NAMES`.

    Raises:
        ValueError: if it is none of these.
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    _fixed.append(name)
    try:
        yield
    finally:
        _fixed.pop()


@cache
def _native() -> Kernels | None:
    from lightning_tinykg.codecs.kernels.native import Native

    try:
        return Native()
    except OSError as error:
        _slower(f"no native kernels could be built for the CPU ({error})")
        return None


@cache
def _triton() -> Kernels | None:
    try:
        from lightning_tinykg.codecs.kernels.fused import Fused
    except ImportError as error:
        _slower(f"Triton can't be imported ({error})")
        return None
    return Fused()


def _slower(why: str) -> None:
    warnings.warn(
        f"lightning_tinykg compresses with PyTorch's own ops, which gives the same bits, more slowly: {why}",
        stacklevel=4,
    )
