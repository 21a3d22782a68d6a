"""What was parsed is parsed once, and never trusted blindly."""

import os
from pathlib import Path

import numpy as np
import pytest

from lightning_tinykg.data import KGRecDataModule, cache

FILES = {
    "train.txt": "0 0 1 2\n1 1 2\n",
    "test.txt": "0 3\n",
    "kg_final.txt": "0 0 4\n",
    "item_list.txt": "o r\n" + "".join(f"name{i} {i}\n" for i in range(4)),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "toy"
    root.mkdir()
    for name, text in FILES.items():
        (root / name).write_text(text)
    return root


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def refuse(*args: object, **kwargs: object) -> None:
    raise AssertionError("parsed again")


def test_second_read_comes_from_the_cache(root: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cache.read_cached(root, store)
    monkeypatch.setattr(cache, "read_folder", refuse)
    again = cache.read_cached(root, store)
    for name, array in first.arrays().items():
        assert np.array_equal(array, again.arrays()[name]), name
    assert again.item_ids is not None
    assert again.item_ids[2] == "name2"


@pytest.mark.parametrize("change", ["content", "option", "version"])
def test_any_change_is_parsed_again(root: Path, store: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    cache.read_cached(root, store)
    options = {}
    if change == "content":
        (root / "train.txt").write_text("0 0 1 3\n1 1 2\n")
        os.utime(root / "train.txt", ns=(1, 1))
    elif change == "option":
        options = {"given_test": True}
    else:
        monkeypatch.setattr(cache, "READER_VERSION", 999)
    monkeypatch.setattr(cache, "read_folder", refuse)
    with pytest.raises(AssertionError, match="parsed again"):
        cache.read_cached(root, store, **options)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text", "range"])
def test_damaged_cache_is_made_again(root: Path, store: Path, damage: str) -> None:
    good = cache.read_cached(root, store)
    (path,) = store.iterdir()
    raw = path.read_bytes()
    if damage == "range":
        with np.load(path) as stored:
            arrays = {name: stored[name] for name in stored.files}
        np.savez(path, **(arrays | {"train": arrays["train"] + 100}))
    else:
        at = raw.index(good.train.tobytes())
        flipped = raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
        path.write_bytes({"cut": raw[: len(raw) // 2], "flip": flipped, "empty": b"", "text": b"not a cache"}[damage])
    again = cache.read_cached(root, store)
    assert np.array_equal(again.train, good.train)
    assert path.stat().st_size == len(raw)  # and it is whole again


def test_no_cache(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    data = KGRecDataModule(root, cache_dir=False)
    data.prepare_data()
    data.setup()
    assert not (tmp_path / "home").exists()
    data = KGRecDataModule(root)
    data.prepare_data()
    assert [p.suffix for p in (tmp_path / "home" / "lightning_tinykg").iterdir()] == [".npz"]


def test_unwritable_cache_is_a_warning(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="could not keep the parsed files"):
        assert cache.read_cached(root, tmp_path / "file").num_users == 2


def test_source_folder_is_left_alone(root: Path, store: Path) -> None:
    before = sorted(p.name for p in root.iterdir())
    root.chmod(0o555)
    try:
        cache.read_cached(root, store)
    finally:
        root.chmod(0o755)
    assert sorted(p.name for p in root.iterdir()) == before
