"""Tables of codes, exports of them, and what exact scores say of the best."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_tinykg.hqgnn.export import write_export
from lightning_tinykg.hqgnn.table import QuantizedTable

GRANULARITIES = ("table", "node", "group")
NO_ITEMS = torch.zeros(0, dtype=torch.long)


def table(
    rows: int, dim: int, bits: int, granularity: str = "table", *, seed: int = 0, symmetric: bool = False
) -> QuantizedTable:
    """Random codes, every tenth row that of the row before; scales that differ by a factor of ten or so."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, dim), generator=draw, dtype=torch.uint8)
    shape = {"table": (1,), "node": (rows,), "group": (rows, dim // 4 if dim % 4 == 0 else 1)}[granularity]
    scale = torch.exp(0.5 * torch.randn(shape, generator=draw)) / 2**bits
    zero = scale * (0.2 * torch.randn(shape, generator=draw) - (2**bits - 1) / 2)
    for part in (codes, scale, zero):
        if len(part) == rows:
            part[10::10] = part[9:-1:10]
    return QuantizedTable(codes, scale, None if symmetric else zero, bits)


def vectors(rows: int, dim: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def seen_by(*items: list[int]) -> tuple[Tensor, Tensor]:
    """Where each user's items start, and the items."""
    counts = torch.tensor([0, *(len(own) for own in items)])
    return counts.cumsum(0), torch.tensor([item for own in items for item in own], dtype=torch.long)


def nothing_seen(users: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(users + 1, dtype=torch.long), NO_ITEMS


def write(folder: Path, items: QuantizedTable, users: Any = None, seen: Any = None, **options: Any) -> Path:
    if users is None:
        users = vectors(5, items.codes.size(1))
    rows = len(users.codes if isinstance(users, QuantizedTable) else users)
    return write_export(folder, users, items, seen or nothing_seen(rows), **options)


def expected(
    queries: Tensor, items: QuantizedTable, k: int, seen: dict[int, list[int]] | None = None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The best by scores in float64, rounded to float32; of equal ones, the lower id first."""
    scores = (queries.double() @ items.decode().double().t()).numpy()
    # a matrix product may differ in the last bit from row to row: equal rows get equal scores
    _, first = np.unique(items.decode().numpy(), axis=0, return_index=True)
    lookup = {items.decode()[row].numpy().tobytes(): row for row in first}
    same = [lookup[row.tobytes()] for row in items.decode().numpy()]
    scores = scores[:, same].astype(np.float32)
    for row, own in (seen or {}).items():
        scores[row, own] = -np.inf
    k = min(k, scores.shape[1])
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(scores, order, axis=1)
    order[np.isneginf(best)] = -1
    return order, best
