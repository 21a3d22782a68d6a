"""What an exported index answers: the best by exact scores, in every way it can find them."""

import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exporting import GRANULARITIES, expected, nothing_seen, seen_by, table, vectors, write

from lightning_tinykg.hqgnn import fastscan, index, refining
from lightning_tinykg.hqgnn.fastscan import CodeIndex
from lightning_tinykg.hqgnn.index import LowBitIndex
from lightning_tinykg.hqgnn.ranking import Excluded, exhaustive, in_unit
from lightning_tinykg.hqgnn.scoring import CodeTable, pack_rows
from lightning_tinykg.hqgnn.table import QuantizedTable

BITS = (1, 2, 4, 8)
needs_faiss = pytest.mark.skipif(find_spec("faiss") is None, reason="faiss is not installed")
BACKENDS = ["numpy", pytest.param("faiss", marks=needs_faiss)]


def packed(items: QuantizedTable) -> CodeTable:
    codes = pack_rows(items.codes.numpy(), items.bits)
    zero = None if items.zero is None else items.zero.numpy()
    return CodeTable(codes, items.scale.numpy(), zero, items.bits, items.codes.size(1))


def load(folder: Path, items: QuantizedTable, backend: Any = "numpy", **options: Any) -> LowBitIndex:
    return LowBitIndex.load(write(folder / "out", items, **options), backend=backend)


def assert_best(found: Any, wanted: Any) -> None:
    np.testing.assert_array_equal(found[0], wanted[0])
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [7, 64])
@pytest.mark.parametrize("symmetric", [False, True])
def test_values_are_those_of_the_table_to_the_last_bit(symmetric: bool, dim: int, bits: int, granularity: str) -> None:
    items = table(50, dim, bits, granularity, symmetric=symmetric)
    rows = packed(items).decode(np.array([49, 0, 10, 10]))
    np.testing.assert_array_equal(rows, items.decode()[[49, 0, 10, 10]].numpy())
    np.testing.assert_array_equal(packed(items).decode(slice(5, 9)), items.decode()[5:9].numpy())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [1, 20, 64])
def test_numpy_finds_the_best_in_blocks_of_any_size(dim: int, bits: int, granularity: str) -> None:
    items, queries = table(333, dim, bits, granularity), vectors(9, dim)
    wanted = expected(queries, items, 30)
    for block in (8, 100, 1000):
        assert_best(exhaustive(packed(items), queries.numpy(), 30, block=block), wanted)


@needs_faiss
@pytest.mark.parametrize("granularity", ["table", "node"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [12, 63, 64])
def test_faiss_gives_the_same_answers_to_the_last_bit(
    monkeypatch: pytest.MonkeyPatch, dim: int, bits: int, granularity: str
) -> None:
    monkeypatch.setattr(refining, "SMALL", 200)  # as of many items
    items, queries = table(3000, dim, bits, granularity), vectors(40, dim).numpy()
    codes = packed(items)
    for k in (1, 10, 50):
        wanted = exhaustive(codes, queries, k)
        for factor in (1.0, 4.0):
            found = refining.refined(CodeIndex(codes), queries, k, None, factor)
            np.testing.assert_array_equal(found[0], wanted[0])
            np.testing.assert_array_equal(found[1], wanted[1])


@needs_faiss
@pytest.mark.parametrize("granularity", ["table", "node"])
@pytest.mark.parametrize("bits", BITS)
def test_one_user_gets_what_many_get(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bits: int, granularity: str
) -> None:
    monkeypatch.setattr(refining, "SMALL", 200)  # as of many items
    items, users = table(3000, 20, bits, granularity), vectors(24, 20)
    best = expected(users, items, 60)[0].tolist()
    seen = seen_by(*(own[: 5 * (user % 4)] for user, own in enumerate(best)))
    loaded = load(tmp_path, items, "faiss", users=users, seen=seen)
    for k, factor in ((1, 1.0), (3, 4.0), (40, 1.0), (40, 4.0), (40, None)):
        for exclude_seen in (True, False):
            options: Any = {"k": k, "exclude_seen": exclude_seen, "refine_factor": factor}
            together = loaded.recommend(range(24), **options)
            for user in range(24):
                alone = loaded.recommend([user], **options)
                if factor:
                    np.testing.assert_array_equal(alone[0][0], together[0][user])
                if factor or granularity == "table":  # unrefined, faiss picks among equals; of shards it sees less
                    np.testing.assert_array_equal(alone[1][0], together[1][user])
                assert not exclude_seen or not np.intersect1d(alone[0][0], best[user][: 5 * (user % 4)]).size


@needs_faiss
@pytest.mark.parametrize("granularity", ["table", "node"])
@pytest.mark.parametrize("bits", BITS)
def test_bounds_hold_what_faiss_missed(bits: int, granularity: str) -> None:
    items, queries = table(2000, 24, bits, granularity), vectors(30, 24).numpy()
    codes = packed(items)
    search, unit = CodeIndex(codes), in_unit(queries)[0]
    asked, error = search.queries(unit)
    found = [search.search(shard, asked, 20) for shard in range(len(search.indexes))]
    item, rough, off, missed = search.scores(found, unit, error)
    exact = unit.astype(np.float64) @ items.decode().double().numpy().T
    assert (np.abs(np.take_along_axis(exact, item, 1) - rough) <= off).all()
    np.put_along_axis(exact, item, -np.inf, 1)
    for shard, (start, stop) in enumerate(zip(search.starts[:-1], search.starts[1:], strict=True)):
        rows = np.arange(start, stop) if search.order is None else search.order[start:stop]
        assert (exact[:, rows].max(axis=1) <= missed[:, shard]).all()


@needs_faiss
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [1, 2, 5, 256])
def test_faiss_at_the_ends_of_its_range(monkeypatch: pytest.MonkeyPatch, bits: int, dim: int) -> None:
    """Few dimensions, where it leaves rows out; many, where its sums are nearly too great; all levels at an end."""
    monkeypatch.setattr(refining, "SMALL", 100)
    for granularity in ("table", "node"):
        items = table(900, dim, bits, granularity)
        items.codes[:300] = 0
        items.codes[300:310] = 2**bits - 1
        codes = packed(items)
        for queries in (vectors(9, dim).numpy(), np.ones((1, dim), np.float32), -np.ones((1, dim), np.float32)):
            wanted = exhaustive(codes, queries, 25)
            for factor in (1.0, 8.0):
                found = refining.refined(CodeIndex(codes), queries, 25, None, factor)
                np.testing.assert_array_equal(found[0], wanted[0])
                np.testing.assert_array_equal(found[1], wanted[1])


@needs_faiss
def test_faiss_answers_without_a_look_at_all_items(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise AssertionError("all items were looked at")

    monkeypatch.setattr(refining, "exhaustive", refused)
    for granularity in ("table", "node"):
        codes = packed(table(20_000, 64, 4, granularity, symmetric=True))
        search = CodeIndex(codes)
        queries = vectors(50, 64).numpy()
        found = refining.refined(search, queries, 20, None, 4.0)
        np.testing.assert_array_equal(found[0], exhaustive(codes, queries, 20)[0])


@needs_faiss
@pytest.mark.parametrize("granularity", ["table", "node"])
@pytest.mark.parametrize("bits", BITS)
def test_faiss_alone_is_nearly_right(tmp_path: Path, bits: int, granularity: str) -> None:
    items, queries = table(5000, 64, bits, granularity, symmetric=True), vectors(50, 64)
    loaded = load(tmp_path, items, "faiss")
    found, scores = loaded.search(queries.numpy(), 50, refine_factor=None)
    wanted, exact = loaded.search(queries.numpy(), 50)
    share = np.mean([len(np.intersect1d(a, b)) / 50 for a, b in zip(found, wanted, strict=True)])
    assert share > 0.93
    assert np.abs(scores - exact).max() < 0.1 * np.abs(exact).max()
    assert (np.diff(scores, axis=1) <= 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", ["table", "node"])
def test_equal_scores_are_ordered_by_id(tmp_path: Path, backend: str, granularity: str) -> None:
    rows = table(40, 16, 1, granularity)
    copies = torch.arange(4000) % 40
    scale = rows.scale if granularity == "table" else rows.scale[copies]
    assert rows.zero is not None
    zero = rows.zero if granularity == "table" else rows.zero[copies]
    items = QuantizedTable(rows.codes[copies], scale, zero, 1)
    queries = vectors(3, 16)
    found = load(tmp_path, items, backend).search(queries.numpy(), 150)
    assert_best(found, expected(queries, items, 150))
    assert (np.diff(found[0])[np.diff(found[1]) == 0] > 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("granularity", ["table", "node"])
def test_seen_items_are_left_out_of_light_and_heavy_users(tmp_path: Path, backend: str, granularity: str) -> None:
    items, users = table(2000, 16, 4, granularity), vectors(5, 16)
    best = expected(users, items, 2000)[0]
    seen: list[list[int]] = [[], best[1, :3].tolist(), best[2, :700].tolist(), best[3, 5:].tolist(), list(range(2000))]
    loaded = load(tmp_path, items, backend, users=users, seen=seen_by(*seen))
    order = [4, 2, 0, 3, 1, 2]
    found = loaded.recommend(order, k=10)
    wanted = expected(users[order], items, 10, {place: seen[user] for place, user in enumerate(order)})
    assert_best(found, wanted)
    assert (found[0][0] == -1).all()
    assert np.isneginf(found[1][0]).all()
    assert (found[0][3, 5:] == -1).all()
    for place, user in enumerate(order):
        one = loaded.recommend([user], k=10)
        np.testing.assert_array_equal(one[0][0], found[0][place])
        np.testing.assert_array_equal(one[1][0], found[1][place])
    assert_best(loaded.recommend(order, k=10, exclude_seen=False), expected(users[order], items, 10))


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_users_are_answered_in_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backend: str) -> None:
    items, users = table(500, 16, 4, "node"), vectors(11, 16)
    seen = [list(range(user, 500, 7)) for user in range(11)]
    loaded = load(tmp_path, items, backend, users=users, seen=seen_by(*seen))
    order = [*range(10, -1, -1), 3, 3]
    wanted = loaded.recommend(order, k=9)
    assert_best(wanted, expected(users[order], items, 9, {place: seen[user] for place, user in enumerate(order)}))
    monkeypatch.setattr(index, "USERS", 4)
    for found, whole in zip(loaded.recommend(order, k=9), wanted, strict=True):
        np.testing.assert_array_equal(found, whole)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unrefined_answers_leave_out_seen_items_too(tmp_path: Path, backend: str) -> None:
    items, users = table(2000, 16, 4, "node"), vectors(2, 16)
    best = expected(users, items, 100)[0]
    loaded = load(tmp_path, items, backend, users=users, seen=seen_by(best[0].tolist(), best[1].tolist()))
    found, _ = loaded.recommend([0, 1], k=20, refine_factor=None)
    assert not any(np.intersect1d(found[user], best[user]).size for user in (0, 1))
    assert (found >= 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", BITS)
def test_queries_of_any_size(tmp_path: Path, backend: str, bits: int) -> None:
    items, queries = table(1500, 24, bits, "node"), vectors(6, 24)
    queries[1] = 0
    queries[2] *= 1e-30
    queries[3] *= 1e30
    queries[4, 1:] = 0
    loaded = load(tmp_path, items, backend)
    found, scores = loaded.search(queries.numpy(), 10)
    wanted, exact = expected(queries, items, 10)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_allclose(scores, exact, rtol=1e-5)
    np.testing.assert_array_equal(loaded.search(queries[0].numpy(), 10)[0], found[:1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", BITS)
def test_items_whose_scale_is_zero(tmp_path: Path, backend: str, bits: int) -> None:
    items = table(1200, 16, bits, "node")
    items.scale[::3] = 0
    assert items.zero is not None
    items.zero[::6] = 0
    queries = vectors(4, 16)
    assert_best(load(tmp_path, items, backend).search(queries.numpy(), 40), expected(queries, items, 40))


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_there_are(tmp_path: Path, backend: str) -> None:
    items, users = table(12, 8, 2, "table"), vectors(2, 8)
    loaded = load(tmp_path, items, backend, users=users)
    found = loaded.recommend([0, 1], k=100)
    assert found[0].shape == (2, 12)
    assert_best(found, expected(users, items, 100))
    assert loaded.recommend([], k=3)[0].shape == (0, 3)


def test_users_may_be_codes(tmp_path: Path) -> None:
    items, users = table(300, 16, 4, "node"), table(9, 16, 8, "node", seed=5)
    loaded = load(tmp_path, items, users=users)
    assert_best(loaded.recommend(range(9), k=10), expected(users.decode(), items, 10))


def test_what_faiss_cannot_hold_is_answered_by_numpy(tmp_path: Path) -> None:
    for name, items, why in (
        ("group", table(300, 16, 4, "group"), "a scale for each group"),
        ("wide", table(300, 520, 4), "longer than 128"),  # its sums would overflow
        ("none", table(0, 8, 4), "no items"),
    ):
        folder = write(tmp_path / name, items)
        assert LowBitIndex.load(folder).backend == "numpy"
        with pytest.raises(ValueError, match=f"can't hold these codes: .*{why}"):
            LowBitIndex.load(folder, backend="faiss")


def test_without_faiss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "out", table(300, 16, 4))
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(index, "find_spec", lambda name: None)
    assert LowBitIndex.load(folder).backend == "numpy"
    with pytest.raises(fastscan.FaissMissing, match=r"pip install 'lightning-tinykg\[faiss\]'"):
        LowBitIndex.load(folder, backend="faiss")


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_share_an_index(tmp_path: Path, backend: str) -> None:
    items, users = table(3000, 32, 4, "node"), vectors(64, 32)
    loaded = load(tmp_path, items, backend, users=users, seen=seen_by(*([user] for user in range(64))))
    wanted = loaded.recommend(range(64), k=10)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda user: loaded.recommend([user % 64], k=10), range(256)))
    for user, (found, scores) in enumerate(answers):
        np.testing.assert_array_equal(found[0], wanted[0][user % 64])
        np.testing.assert_array_equal(scores[0], wanted[1][user % 64])


def test_numpy_searches_in_bounded_memory() -> None:
    items = packed(table(150_000, 32, 4))
    queries = vectors(64, 32).numpy()
    tracemalloc.start()
    exhaustive(items, queries, 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * 2**20  # all scores would be 37 MiB, all values 18 MiB, each with copies


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda i: i.recommend([0], k=0), ValueError, "k must be a whole number of at least 1, got 0"),
        (lambda i: i.recommend([5]), ValueError, r"user_ids must be in 0\.\.4, got 5\.\.5"),
        (lambda i: i.recommend([-1]), ValueError, r"got -1\.\.-1"),
        (lambda i: i.recommend([0.5]), TypeError, "user_ids must be integers, got float64"),
        (lambda i: i.search(np.ones((2, 9)), 3), ValueError, r"vectors must have shape \[U, 16\], got \[2, 9\]"),
        (lambda i: i.search(np.full(16, np.nan), 3), ValueError, "vectors must be finite"),
        (lambda i: i.search(np.ones(16), 3, refine_factor=0.5), ValueError, "refine_factor must be a number of at"),
        (lambda i: i.search(np.ones(16), 3, refine_factor=np.inf), ValueError, "at least 1, or None, got inf"),
        (lambda i: i.rows_of(["a"]), ValueError, "the export has no user ids"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, call: Any, error: Any, message: str) -> None:
    loaded = load(tmp_path, table(30, 16, 4))
    with pytest.raises(error, match=message):
        call(loaded)


def test_another_backend_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="backend must be 'auto', 'faiss' or 'numpy', got 'torch'"):
        load(tmp_path, table(30, 16, 4), "torch")


def test_excluded_pairs_of_some_rows() -> None:
    excluded = Excluded.of(np.array([2, 0]), np.array([0, 2, 2, 3]), np.array([7, 1, 4]))
    assert sorted(zip(excluded.row.tolist(), excluded.item.tolist(), strict=True)) == [(0, 4), (1, 1), (1, 7)]
    part = excluded.of_rows(np.array([1]), 2)
    assert part.item.tolist() == [1, 7]
    assert part.row.tolist() == [0, 0]
    hidden = excluded.contains(np.array([[4, 1, 9], [4, 1, 7]]))
    assert hidden.tolist() == [[True, False, False], [False, True, True]]


FRESH = """
import sys
from lightning_tinykg.hqgnn.index import LowBitIndex
index = LowBitIndex.load(sys.argv[1])
items, scores = index.recommend([0, 1, 2], k=5)
print(items.tolist(), [round(float(s), 4) for s in scores[:, 0]])
heavy = [name for name in ("torch", "lightning", "torch_geometric", "pandas", "matplotlib") if name in sys.modules]
assert not heavy, f"imported: {heavy}"
"""


@pytest.mark.parametrize("blocked", [False, True], ids=["with faiss", "without"])
def test_a_fresh_process_needs_no_torch(tmp_path: Path, blocked: bool) -> None:
    items, users = table(400, 16, 4, "node"), vectors(3, 16)
    folder = write(tmp_path / "out", items, users=users, seen=nothing_seen(3))
    wanted = LowBitIndex.load(folder).recommend([0, 1, 2], k=5)
    block = "import sys; sys.modules['torch'] = None\n"  # importing it fails
    block += "sys.modules['faiss'] = None\nimport importlib.util\nfind = importlib.util.find_spec\n" if blocked else ""
    block += "importlib.util.find_spec = lambda n, p=None: None if n == 'faiss' else find(n, p)\n" if blocked else ""
    code = block + FRESH.replace('("torch", ', "(")
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{wanted[0].tolist()} {[round(float(s), 4) for s in wanted[1][:, 0]]}"
