"""Rows of a few elements, such as the attention of an edge, many to a row of codes: alone each would waste a byte."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_tinykg.codecs.rows import rows_nbytes
from lightning_tinykg.sgquant.quantize import Level

if TYPE_CHECKING:
    from lightning_tinykg.sgquant.packed import PackedFeatures

__all__ = ["RunWriter", "run_of", "runs_nbytes"]

RUN_ELEMENTS = 128
"""Elements of the row of a part where rows are stored in runs."""


def run_of(dim: int) -> int:
    """How many rows of so many elements make a run: a multiple of 8, so that it fills whole bytes at any width.

    Example:
        >>> run_of(1), run_of(8), run_of(1000)
        (128, 16, 8)
    """
    return max(1, RUN_ELEMENTS // (8 * max(dim, 1))) * 8


def runs_nbytes(rows: int, dim: int, bits: int) -> int:
    """What rows take when they are packed in runs, with one scale and zero.

    Example:
        >>> runs_nbytes(rows=1024, dim=1, bits=2)
        264
    """
    run = run_of(dim)
    return rows_nbytes(-(-rows // run), run * dim, bits)


class RunWriter:
    """Fills packed features in runs, slot by slot from the first.

    Args:
        packed: What to fill.
        levels: What it was made for.
    """

    def __init__(self, packed: PackedFeatures, levels: Sequence[Level]) -> None:
        self._packed, self._levels, self._slot = packed, levels, 0
        self._rest: Tensor | None = None  # rows of the current part that do not fill a run yet

    @torch.no_grad()
    def write(self, x: Tensor) -> None:
        """Encode the next rows, float `[k, ...]`."""
        packed, run = self._packed, self._packed.run
        flat = x.reshape(x.size(0), packed.parts[0].dim // run)
        counts = packed.order.counts if packed.order is not None else (packed.size(0),)
        slots = slice(self._slot, self._slot + x.size(0))
        divisor = packed.divisors(slots)
        flat = flat if divisor is None else flat * divisor
        for number, which, own in packed.slots_by_part(slots):
            assert isinstance(own, slice)
            rows = flat if which is None else flat[which]
            rows = rows if self._rest is None else torch.cat([self._rest, rows])
            first, is_last = own.stop - rows.size(0), own.stop == counts[number]
            if is_last and rows.size(0) % run:
                rows = torch.cat([rows, rows[-1:].expand(-rows.size(0) % run, -1)])
            whole = rows.size(0) // run
            if whole:
                at = slice(first // run, first // run + whole)
                packed.parts[number].put(at, rows[: whole * run].reshape(whole, -1))
            self._rest = None if is_last or rows.size(0) == whole * run else rows[whole * run :].clone()
        self._slot += x.size(0)
