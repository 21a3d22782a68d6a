"""How rows with a scale each are cut into shards of nearly equal scale.

A code index orders rows by products of levels; a score is such a product times the row's scale. Within a shard both
orders are nearly one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_tinykg.hqgnn.scoring import CodeTable, Ints

__all__ = ["file_names", "shards_of"]

SHARD_ROWS, RATIO = 64, 1.15
"""The fewest rows of a shard, and how much greater its greatest scale is than its least."""


def shards_of(table: CodeTable) -> tuple[npt.NDArray[Any] | None, Ints]:
    """How rows are cut into shards.

    From the greatest scale down, a shard ends where the scale has fallen by `RATIO`, but not before it has a few rows
    and a share of those above it: what has small scales is seldom an answer, so it is not cut finely.

    Returns:
        The rows in the order of the shards, ``[n]`` (None: as they are), and where each shard starts, with the
        end, int64 ``[shards + 1]``.

    Example:
        >>> scale = np.repeat(np.array([1, 4], dtype=np.float32), 100)
        >>> order, starts = shards_of(CodeTable(np.zeros((200, 2), dtype=np.uint8), scale, scale, bits=8, dim=2))
        >>> order[:3].tolist(), starts.tolist()
        ([100, 101, 102], [0, 100, 200])
    """
    if table.scale.size == 1 or np.ptp(table.scale) == 0:
        return None, np.array([0, len(table)])
    order = np.argsort(-table.scale, kind="stable")
    falling = -table.scale[order]
    starts = [0]
    while starts[-1] < len(order):
        start = starts[-1]
        end = max(int(np.searchsorted(falling, falling[start] / RATIO)), start + max(SHARD_ROWS, start // 4))
        starts.append(end if len(order) - end >= SHARD_ROWS else len(order))
    return order.astype(np.int32) if len(order) < 2**31 else order, np.array(starts)


def file_names(count: int) -> list[str]:
    """The files of so many shards.

    Example:
        >>> file_names(1), file_names(2)
        (['items.faiss'], ['items-0.faiss', 'items-1.faiss'])
    """
    return ["items.faiss"] if count == 1 else [f"items-{number}.faiss" for number in range(count)]
