"""Rows of a table on a GPU, in Triton's language."""

# Triton's language has no types that mypy could read
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["count", "rows"])
def gather(table_ptr, index_ptr, out_ptr, count, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Copy ``ROWS`` of the ``count`` rows that are asked for, ``COLUMNS`` elements of each; -1 is the last row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    which = tl.load(index_ptr + row, mask=row < count, other=0).to(tl.int64)
    which = tl.where(which < 0, which + rows, which)
    inside = (row < count)[:, None] & (column < WIDTH)[None, :]
    x = tl.load(table_ptr + (which[:, None] * WIDTH + column[None, :]), mask=inside)
    tl.store(out_ptr + (row[:, None] * WIDTH + column[None, :]), x, mask=inside)
