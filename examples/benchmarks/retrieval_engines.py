"""What the retrieval benchmark compares: this package's index, and the usual ways with faiss."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lightning_tinykg.hqgnn.export import write_export
from lightning_tinykg.hqgnn.index import LowBitIndex
from lightning_tinykg.hqgnn.table import QuantizedTable

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

CLIP = {1: 1.6, 2: 3.0, 4: 5.0, 8: 8.0}
"""Width of the range in standard deviations, by bits."""


@dataclass
class Engine:
    """A way to find the best items.

    Args:
        name: what it is.
        search: the ids of the best ``k`` for one vector.
        row_bytes: bytes of an item in memory while it searches.
        codes: whose exact scores it should reproduce: its own codes, or None for the full-precision vectors.
    """

    name: str
    search: Callable[[Floats, int], Ints]
    row_bytes: float
    codes: LowBitIndex | None = None


@dataclass(frozen=True)
class Data:
    """Random vectors of low rank, as trained embeddings are nearly, with lengths that differ.

    Args:
        items: float32 ``[n, dim]``.
        queries: float32 ``[q, dim]``.
    """

    items: Floats
    queries: Floats

    @classmethod
    def random(cls, items: int, queries: int, dim: int, seed: int) -> Data:
        """Draw them: variances fall as 1 / (1 + j / 8), lengths are log-normal (0.3)."""
        draw = np.random.default_rng(seed)
        turn = np.linalg.qr(draw.standard_normal((dim, dim)))[0] / np.sqrt(1 + np.arange(dim)[:, None] / 8)
        length = np.exp(0.3 * draw.standard_normal((items, 1))).astype(np.float32)
        found = np.empty((items, dim), dtype=np.float32)
        for start in range(0, items, 2**18):
            part = found[start : start + 2**18]
            part[:] = draw.standard_normal(part.shape, dtype=np.float32) @ turn.astype(np.float32)
            part *= length[start : start + 2**18]
        return cls(found, (draw.standard_normal((queries, dim)) @ turn).astype(np.float32))


def quantized(items: Floats, bits: int, scale: str) -> QuantizedTable:
    """Items as uniform codes; the range is a multiple of the standard deviation, of all or of each item."""
    steps = 2**bits - 1
    deviation = items.std(axis=1) if scale == "node" else items.std(keepdims=True).reshape(1)
    step = (deviation * (CLIP[bits] / steps)).astype(np.float32)
    zero = step * np.float32(-steps / 2)
    codes = np.empty(items.shape, dtype=np.uint8)
    for start in range(0, len(items), 2**18):
        part = slice(start, start + 2**18)
        own = (zero[part, None], step[part, None]) if scale == "node" else (zero, step)
        codes[part] = np.clip(np.rint((items[part] - own[0]) / own[1]), 0, steps)
    return QuantizedTable(torch.from_numpy(codes), torch.from_numpy(step), None, bits)  # the zero follows


def _asking(index: LowBitIndex, **options: Any) -> Callable[[Floats, int], Ints]:
    return lambda queries, k: index.search(queries, k, **options)[0]


def _of_faiss(index: Any) -> Callable[[Floats, int], Ints]:
    def search(queries: Floats, k: int) -> Ints:
        found: Ints = index.search(queries, k)[1]
        return found

    return search


def ours(data: Data, bits: list[int], scales: list[str], folder: str) -> Iterator[Engine]:
    """This package's index: written, loaded and asked as a service would."""
    seen = (torch.zeros(2, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    for width in bits:
        for scale in scales:
            path = Path(folder) / f"{width}-{scale}"
            write_export(path, torch.zeros(1, data.items.shape[1]), quantized(data.items, width, scale), seen)
            plain = LowBitIndex.load(path, backend="numpy", verify=False)
            name, row = f"{width} bits per {scale}", plain.bytes_per_item
            yield Engine(f"{name}, numpy", _asking(plain), row, plain)
            if find_spec("faiss") is None:
                continue
            index = LowBitIndex.load(path, backend="faiss", verify=False)
            row += 4 * (scale == "node")  # the order of the shards
            refined = f"{name}, refined"
            yield Engine(name, _asking(index, refine_factor=None), row, plain)
            yield Engine(refined, _asking(index), row, plain)


def rivals(data: Data, names: list[str], notes: list[str]) -> Iterator[Engine]:
    """The usual ways, all of faiss; what can't be had is noted."""
    if find_spec("faiss") is None:
        notes.append("all rivals: skipped, faiss is not installed")
        return
    import faiss

    faiss.omp_set_num_threads(os.cpu_count() or 1)  # for building
    rows, dim = data.items.shape
    scalar, product = faiss.ScalarQuantizer, faiss.METRIC_INNER_PRODUCT
    made: dict[str, Callable[[], Any]] = {
        "Flat fp32": lambda: faiss.IndexFlatIP(dim),
        "SQ8": lambda: faiss.IndexScalarQuantizer(dim, scalar.QT_8bit, product),
        "SQ4": lambda: faiss.IndexScalarQuantizer(dim, scalar.QT_4bit, product),
        "PQ trained": lambda: faiss.IndexPQFastScan(dim, dim, 4, product),
        "HNSW": lambda: faiss.IndexHNSWFlat(dim, 16, product),
    }
    sample = data.items[np.random.default_rng(0).permutation(rows)[:50_000]]
    for name in names:
        if name == "Binary + fp32":
            yield _binary(data)
            continue
        index = made[name]()
        index.train(sample)
        index.add(data.items)
        if name == "HNSW":
            index.hnsw.efSearch = 200
        row = {"Flat fp32": 4 * dim, "SQ8": dim, "SQ4": dim / 2, "PQ trained": dim / 2, "HNSW": 4 * dim + 32 * 4 + 8}
        yield Engine(name, _of_faiss(index), row[name])


def _binary(data: Data) -> Engine:
    """Signs by Hamming distance, ten times as many as are asked for; these by their full-precision scores."""
    import faiss

    dim = data.items.shape[1]
    index = faiss.IndexBinaryFlat(8 * (-(-dim // 8)))
    for start in range(0, len(data.items), 2**18):
        index.add(np.packbits(data.items[start : start + 2**18] > 0, axis=1))

    def search(query: Floats, k: int) -> Ints:
        found = index.search(np.packbits(query > 0, axis=1), 10 * k)[1]
        score = data.items[found[0]] @ query[0]
        best: Ints = found[:, np.argsort(-score)[:k]]
        return best

    return Engine("Binary + fp32", search, 4 * dim + dim / 8)


RIVALS = ("Flat fp32", "SQ8", "SQ4", "PQ trained", "Binary + fp32", "HNSW")


def engines(
    data: Data, bits: list[int], scales: list[str], names: list[str], notes: list[str], keep: list[Any]
) -> Iterator[Engine]:
    """All of them; what they need is appended to ``keep``."""
    folder = TemporaryDirectory()
    keep.append(folder)
    yield from rivals(data, names, notes)
    yield from ours(data, bits, scales, folder.name)
