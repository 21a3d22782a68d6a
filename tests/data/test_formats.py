"""Files in, arrays out; and what a wrong file is answered with."""

import gzip
import lzma
from pathlib import Path

import numpy as np
import pytest

from lightning_tinykg.data import read_folder
from lightning_tinykg.data.files import KGRecFiles, unique_pairs

PACK = {"": lambda b: b, ".gz": gzip.compress, ".xz": lzma.compress}

TEXT = {
    "train.txt": "0 1 0 1\n1 2\n\n2 0",
    "test.txt": "0 2\n1\n2 1\n",
    "kg_final.txt": "0 0 3\n1 1 3\n4 1 0\n",
}
KGCN = {
    "user_artists.dat": "userID\tartistID\tweight\n7\t20\t5\n7\t10\t1\n3\t20\t2\n9\t99\t1\n",
    "item_index2entity_id.txt": "10\t0\n20\t1\n30\t2\n",
    "kg.txt": "1\tfilm.director\t5\n0\tfilm.genre\t4\n5\tknown for\t4\n",
}
RECBOLE = {
    "toy.inter": "user_id:token\titem_id:token\trating:float\nann\tx y\t5\nbob\tz\t2\nann\tz\t4\n",
    "toy.link": "item_id:token\tentity_id:token\nz\tm.1\nunseen\tm.9\n",
    "toy.kg": "head_id:token\trelation_id:token\ttail_id:token\nm.1\tlikes\tm.2\nm.9\tlikes\tm.1\n",
}


def write(root: Path, files: dict[str, str | bytes], suffix: str = "", newline: str = "\n") -> Path:
    for name, text in files.items():
        raw = text if isinstance(text, bytes) else text.replace("\n", newline).encode()
        (root / (name + suffix)).write_bytes(PACK[suffix](raw))
    return root


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
class TestRead:
    def test_text(self, tmp_path: Path, suffix: str, newline: str) -> None:
        files = read_folder(write(tmp_path, TEXT, suffix, newline))
        assert files.train.tolist() == [[0, 0, 1, 2], [0, 1, 2, 0]]  # the repeated 0 1 counts once
        assert files.test is not None
        assert files.test.tolist() == [[0, 2], [2, 1]]
        assert files.triples.tolist() == [[0, 1, 4], [0, 1, 1], [3, 3, 0]]
        assert (files.num_users, files.num_items, files.num_entities, files.num_relations) == (3, 3, 5, 2)

    def test_kgcn(self, tmp_path: Path, suffix: str, newline: str) -> None:
        files = read_folder(write(tmp_path, KGCN, suffix, newline))
        assert files.test is None
        # User 9 has nothing but an item without an entity, and is dropped with it; item 30 has no user and stays.
        assert files.user_ids is not None
        assert files.user_ids.tolist() == ["7", "3"]
        assert files.train.tolist() == [[0, 0, 1], [0, 1, 1]]
        assert (files.num_items, files.num_entities, files.num_relations) == (3, 5, 3)
        assert files.triples.tolist() == [[1, 0, 3], [0, 1, 2], [3, 4, 4]]
        assert files.entity_ids is not None
        assert files.entity_ids.tolist() == ["0", "1", "2", "5", "4"]

    def test_recbole(self, tmp_path: Path, suffix: str, newline: str) -> None:
        files = read_folder(write(tmp_path, RECBOLE, suffix, newline))
        assert files.user_ids is not None
        assert files.item_ids is not None
        assert files.user_ids.tolist() == ["ann", "bob"]
        assert files.item_ids.tolist() == ["x y", "z"]
        assert files.train.tolist() == [[0, 0, 1], [0, 1, 1]]
        assert files.triples.tolist() == [[1, 3], [0, 0], [2, 1]]  # m.9's item has no user: a plain entity
        assert files.num_entities == 4


def test_lightgcn_folder_has_no_triples(tmp_path: Path) -> None:
    files = read_folder(write(tmp_path, {k: v for k, v in TEXT.items() if k != "kg_final.txt"}))
    assert files.triples.shape == (3, 0)
    assert files.num_entities == files.num_items == 3
    assert files.num_relations == 0


def test_lists_give_sizes_and_names(tmp_path: Path) -> None:
    lists = {"item_list.txt": "org_id remap_id freebase_id\nB 1 m.1\nA 0 m.0\nC 2 m.2\nD 3 m.3\n"}
    files = read_folder(write(tmp_path, TEXT | lists))
    assert files.num_items == 4
    assert files.item_ids is not None
    assert files.item_ids.tolist() == ["A", "B", "C", "D"]


def test_all_interactions(tmp_path: Path) -> None:
    write(tmp_path, {"interactions_all.txt": "0 0 1 2\n1 1\n", "test.txt": "0 2\n"})
    assert read_folder(tmp_path).test is None
    files = read_folder(tmp_path, given_test=True)
    assert files.train.tolist() == [[0, 0, 1], [0, 1, 1]]
    assert files.test is not None
    assert files.test.tolist() == [[0], [2]]


def test_text_interactions_with_kgcn_graph(tmp_path: Path) -> None:
    # As in ml-1m: item + 1 is the raw id, and item 1 (raw 2) has no link.
    links = {"item_index2entity_id.txt": "1\t0\n3\t1\n", "kg.txt": "0\tdirector\t9\n1\tdirector\t9\n"}
    write(tmp_path, {"train.txt": "0 0 1 2\n", "test.txt": "0 2\n"} | links)
    files = read_folder(tmp_path)
    assert files.triples.tolist() == [[0, 2], [0, 0], [3, 3]]
    with pytest.raises(ValueError, match=r"item_index2entity_id.txt:2: expected item ids from 0 to 2, got '3'"):
        read_folder(tmp_path, first_raw_item=0)


def test_weighted_lastfm(tmp_path: Path) -> None:
    write(tmp_path, {"data1.txt": "1\t2\t3.2466e+05\n2\t1\t1\n", "test1.txt": "1\t1\t7\n"}, newline="\r\n")
    files = read_folder(tmp_path)
    assert files.train.tolist() == [[0, 1], [1, 0]]
    assert files.test is not None
    assert files.test.tolist() == [[0], [0]]


def test_recbole_benchmark_split_and_threshold(tmp_path: Path) -> None:
    head = "item_id:token\tuser_id:token\trating:float\n"
    write(
        tmp_path,
        {"t.train.inter": head + "i\ta\t5\nj\ta\t1\n", "t.valid.inter": head, "t.test.inter": head + "k\ta\t4\n"},
    )
    files = read_folder(tmp_path, min_rating=3)
    assert files.train.tolist() == [[0], [0]]
    assert files.test is not None
    assert files.test.tolist() == [[0], [1]]


@pytest.mark.parametrize(
    ("files", "name", "content", "error"),
    [
        (TEXT, "train.txt", "0 1\n1 x\n", r"train.txt:2: expected 'user item item ...' .*, got '1 x'"),
        (TEXT, "train.txt", "0 1\n\n-1 2\n", r"train.txt:3: expected 'user item item ...' .*, got '-1 2'"),
        (TEXT, "train.txt", "0 1\n1 1.5\n", r"train.txt:2: expected"),
        (TEXT, "test.txt", "0 99999999999\n", r"test.txt:1: expected ids up to 2147483647, got '99999999999'"),
        (TEXT, "test.txt", "0 9" + "9" * 30 + "\n", r"test.txt:1: expected ids up to 2147483647"),
        (TEXT, "kg_final.txt", "0 0 1\n0 1\n", r"kg_final.txt:2: expected 'head relation tail' .*, got '0 1'"),
        (TEXT, "kg_final.txt", "0 0 1\n0 1 2 3\n", r"kg_final.txt:2: expected 'head relation tail' .*, got '0 1 2 3'"),
        (
            TEXT,
            "user_list.txt",
            "org_id remap_id\na 0\nb 1\n",
            r"train.txt:4: expected user ids from 0 to 1 .*, got '2'",
        ),
        (
            TEXT,
            "item_list.txt",
            "org_id remap_id\na 0\nb 1\n",
            r"train.txt:2: expected item ids from 0 to 1 .*, got '2'",
        ),
        (
            TEXT,
            "entity_list.txt",
            "o r\na 0\nb 1\nc 2\nd 3\n",
            r"kg_final.txt:3: expected entity ids from 0 to 3 .*'4'",
        ),
        (TEXT, "relation_list.txt", "o r\na 0\n", r"kg_final.txt:2: expected relation ids from 0 to 0 .*, got '1'"),
        (TEXT, "item_list.txt", "o r\na 0\nb 0\n", r"item_list.txt:3: expected 'org_id remap_id ...' .*, got 'b 0'"),
        (TEXT, "item_list.txt", "o r\na 0\nb 7\n", r"item_list.txt:3: expected remap_id below 2.*, got 'b 7'"),
        (KGCN, "user_artists.dat", "7\t20\t5\n", r"user_artists.dat:1: expected the header"),
        (
            KGCN,
            "user_artists.dat",
            "userID\tartistID\tweight\n7\t20\n",
            r"user_artists.dat:2: expected 'userID<TAB>art",
        ),
        (KGCN, "user_artists.dat", "userID\tartistID\tweight\n7\t20\tx\n", r"user_artists.dat:2: expected .*, got 'x'"),
        (KGCN, "kg.txt", "1\tr\t5\n1 r 5\n", r"kg.txt:2: expected 'head<TAB>relation<TAB>tail', got '1 r 5'"),
        (KGCN, "kg.txt", b"1\tr\t5\n1\t\xff\t5\n", r"kg.txt:2: expected .* in UTF-8"),
        (KGCN, "item_index2entity_id.txt", "1\t0\n1\t1\n", r"item_index2entity_id.txt:2: expected each item id once"),
        (
            RECBOLE,
            "toy.inter",
            "user:token\titem_id:token\n",
            r"toy.inter:1: expected a tab-separated header with user_id",
        ),
        (
            RECBOLE,
            "toy.inter",
            "user_id:token\titem_id:token\na\n",
            r"toy.inter:2: expected 'user_id:token<TAB>item_id",
        ),
        (RECBOLE, "toy.kg", "head_id:token\trelation_id:token\ttail_id:token\na\tb\n", r"toy.kg:2: expected"),
    ],
)
def test_errors_name_file_line_and_expectation(
    tmp_path: Path, files: dict[str, str], name: str, content: str | bytes, error: str
) -> None:
    write(tmp_path, files | {name: content})
    with pytest.raises(ValueError, match=error):
        read_folder(tmp_path)


def test_bad_rating_is_named(tmp_path: Path) -> None:
    write(tmp_path, RECBOLE | {"toy.inter": RECBOLE["toy.inter"] + "cy\tz\tgood\n"})
    with pytest.raises(ValueError, match=r"toy.inter:5: expected .*, got 'good'"):
        read_folder(tmp_path, min_rating=1)


@pytest.mark.parametrize(
    ("files", "missing"),
    [(TEXT, "test.txt"), (KGCN, "kg.txt"), (KGCN, "item_index2entity_id.txt"), (RECBOLE, "toy.link")],
)
def test_missing_file_is_named(tmp_path: Path, files: dict[str, str], missing: str) -> None:
    write(tmp_path, {name: text for name, text in files.items() if name != missing})
    with pytest.raises(FileNotFoundError, match=f"{missing}: expected this file, plain or as .xz or .gz"):
        read_folder(tmp_path)


def test_unknown_folder_lists_the_formats(tmp_path: Path) -> None:
    (tmp_path / "notes.md").touch()
    with pytest.raises(FileNotFoundError, match=r"(?s)train.txt.*user_artists.dat.*NAME.inter.*found notes.md"):
        read_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_folder(tmp_path / "absent")


@pytest.mark.parametrize("suffix", [".xz", ".gz"])
def test_damaged_archive_is_named(tmp_path: Path, suffix: str) -> None:
    write(tmp_path, TEXT, suffix)
    path = tmp_path / f"train.txt{suffix}"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=rf"train.txt{suffix}: expected {suffix[1:]}-compressed data"):
        read_folder(tmp_path)


def test_validated_refuses_what_is_out_of_range() -> None:
    pairs, none = np.array([[0], [5]]), np.zeros((3, 0), dtype=np.int64)
    with pytest.raises(ValueError, match=r"train holds an id outside 0..4"):
        KGRecFiles(pairs, none, 1, 5, 5, 0).validated()
    with pytest.raises(ValueError, match="num_entities must be at least num_items, got 3 and 6"):
        KGRecFiles(pairs, none, 1, 6, 3, 0).validated()


def test_unique_pairs_of_nothing() -> None:
    assert unique_pairs(np.zeros((2, 0), dtype=np.int64)).shape == (2, 0)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        # users, items, entities, relations, triples, train (or all), test
        ("music", (1872, 3846, 9366, 60, 15518, 21173, None)),
        ("last-fm", (23566, 48123, 106389, 9, 464567, 1542856, None)),
        ("gowalla", (29858, 40981, 40981, 0, 0, 810128, 217242)),
        ("ml-1m", (6040, 3952, 8613, 7, 20782, 797758, 202451)),
        ("lightgcn-lastfm", (1892, 4489, 4489, 0, 0, 42135, 10533)),
    ],
)
def test_real_counts(real_data: Path, name: str, sizes: tuple[int | None, ...]) -> None:
    if not (real_data / name).is_dir():
        pytest.skip(f"no {name} in {real_data}")
    files = read_folder(real_data / name)
    got = (files.num_users, files.num_items, files.num_entities, files.num_relations, files.triples.shape[1])
    assert (*got, files.train.shape[1], None if files.test is None else files.test.shape[1]) == sizes
