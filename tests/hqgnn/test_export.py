"""An export is whole and answers as the module does, or it is refused."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from exporting import nothing_seen, seen_by, table, vectors, write
from safetensors.numpy import load_file, save_file

from lightning_tinykg.codecs.uniform import symmetric_zero
from lightning_tinykg.data import KGRecDataModule
from lightning_tinykg.hqgnn import HQGNN, QuantizedTable
from lightning_tinykg.hqgnn import export as export_file
from lightning_tinykg.hqgnn.export import write_export
from lightning_tinykg.hqgnn.folder import checksum, sha256
from lightning_tinykg.hqgnn.index import ExportError, LowBitIndex
from lightning_tinykg.models import KGAT, LightGCN

needs_faiss = pytest.mark.skipif(find_spec("faiss") is None, reason="faiss is not installed")
TENSORS = ["items.safetensors", "users.safetensors", "seen.safetensors"]
FILES = [*TENSORS, pytest.param("items.faiss", marks=needs_faiss)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "out", table(300, 16, 4), seen=seen_by([1, 2], [], [3], [], [299]))


def card_of(folder: Path) -> dict[str, Any]:
    card: dict[str, Any] = json.loads((folder / "card.json").read_text())
    return card


def put_card(folder: Path, **changes: Any) -> None:
    """A card that fits itself and the files, as somebody would write it who knows how."""
    card = card_of(folder) | changes
    card["files"] = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in card["files"]
    }
    card["checksum"] = checksum(card)
    (folder / "card.json").write_text(json.dumps(card))


# -- what is written --------------------------------------------------------------------------------------------------


def test_the_card_says_what_it_is(tmp_path: Path) -> None:
    items, users = table(40, 16, 2, "node"), vectors(3, 16)
    folder = write(
        tmp_path / "out",
        items,
        users,
        seen_by([5], [], [7, 6]),
        dataset="music",
        metrics={"recall@20": 0.25, "ndcg@20": float("nan")},
        settings={"bits": 2, "encoder": torch.nn.Identity(), "k": [20, 50]},
    )
    card = card_of(folder)
    known = {"dataset": "music", "bits": 2, "granularity": "node", "dim": 16, "users": "float32", "version": 2}
    assert known.items() <= card.items()
    assert (card["num_users"], card["num_items"], card["num_seen"]) == (3, 40, 3)
    assert card["bytes_per_item"] == items.nbytes / 40 == 12
    assert card["metrics"] == {"recall@20": 0.25, "ndcg@20": None}
    assert card["settings"] == {"bits": 2, "k": [20, 50]}
    assert {"torch", "numpy", "lightning-tinykg"} <= set(card["versions"])
    assert set(card["files"]) == {path.name for path in folder.iterdir()} - {"card.json"}
    assert LowBitIndex.load(folder).card == card


def test_files_are_plain_safetensors_of_packed_codes(tmp_path: Path) -> None:
    items = table(40, 16, 2)
    folder = write(tmp_path / "out", items, vectors(3, 16), seen_by([9, 5], [], [7]))
    stored = load_file(folder / "items.safetensors")
    assert stored["codes"].shape == (40, 4)
    np.testing.assert_array_equal(stored["scale"], items.scale.numpy())
    seen = load_file(folder / "seen.safetensors")
    assert seen["ptr"].tolist() == [0, 2, 2, 3]
    assert seen["item"].tolist() == [5, 9, 7]


def test_an_index_maps_its_files(folder: Path) -> None:
    index = LowBitIndex.load(folder)
    for array in (index._items.packed, index._users, index._seen_item):
        mapped = array.base  # type: ignore[union-attr]  # as it was made here
        assert isinstance(mapped, np.memmap) or isinstance(getattr(mapped, "base", None), np.memmap)
        assert not array.flags.writeable  # type: ignore[union-attr]  # as it was made here


@pytest.mark.parametrize("ids", [["b", "a", "ü"], np.array([30, 10, 20])], ids=["names", "numbers"])
def test_ids_of_the_data_set(tmp_path: Path, ids: Any) -> None:
    folder = write(tmp_path / "out", table(3, 8, 4), vectors(2, 8), user_ids=["x", "y"], item_ids=ids)
    index = LowBitIndex.load(folder)
    assert index.item_ids is not None
    assert index.item_ids.tolist() == list(ids)
    assert index.rows_of([ids[2], ids[0]], "item").tolist() == [2, 0]
    assert index.rows_of(["y"]).tolist() == [1]
    with pytest.raises(KeyError, match="no user 'z' in the export"):
        index.rows_of(["z"])
    with pytest.raises(ValueError, match="what must be 'user' or 'item', got 'artist'"):
        index.rows_of(["y"], "artist")  # type: ignore[arg-type]  # refused


def test_an_id_that_is_only_nearly_one_is_refused(tmp_path: Path) -> None:
    index = LowBitIndex.load(write(tmp_path / "out", table(3, 8, 4), vectors(2, 8), item_ids=[30, 10, 20]))
    assert index.rows_of(["10", "30"], "item").tolist() == [1, 0]
    assert index.rows_of([], "item").tolist() == []
    for ids, named in (([10.7], "10.7"), (["ten"], "'ten'"), ([2**70], str(2**70))):
        with pytest.raises(KeyError, match=f"no item {named} in the export"):
            index.rows_of(ids, "item")


@pytest.mark.skipif(find_spec("faiss") is None, reason="faiss is not installed")
@pytest.mark.parametrize(("bits", "granularity"), [(1, "table"), (4, "table"), (8, "table"), (2, "node"), (8, "node")])
def test_the_faiss_index_is_one_of_the_codes(tmp_path: Path, bits: int, granularity: str) -> None:
    import faiss

    folder = write(tmp_path / "out", table(500, 16, bits, granularity))
    names = card_of(folder)["faiss"]
    assert (names == ["items.faiss"]) == (granularity == "table")
    indexes = [faiss.read_index(str(folder / name)) for name in names]
    assert sum(index.ntotal for index in indexes) == 500
    assert {type(index).__name__ for index in indexes} == {"IndexScalarQuantizer" if bits == 8 else "IndexPQFastScan"}
    bare = LowBitIndex.load(write(tmp_path / "bare", table(500, 16, bits, granularity), faiss=False), backend="faiss")
    queries = vectors(4, 16).numpy()
    np.testing.assert_array_equal(bare.search(queries)[0], LowBitIndex.load(folder).search(queries)[0])


# -- whole or not at all ----------------------------------------------------------------------------------------------


def test_an_export_replaces_an_export_and_nothing_else(tmp_path: Path, folder: Path) -> None:
    old = LowBitIndex.load(folder)
    before = old.recommend([0, 1])
    write(folder, table(50, 8, 2))
    assert LowBitIndex.load(folder).num_items == 50
    np.testing.assert_array_equal(old.recommend([0, 1])[0], before[0])  # it keeps what it has mapped
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("\\begin{document}")
    with pytest.raises(FileExistsError, match="mine is neither empty nor an export"):
        write(tmp_path / "mine", table(50, 8, 2))
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", table(50, 8, 2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "mine", "out"]


def test_a_failed_export_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    calls = []

    def fails_later(*args: Any, **options: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise OSError("no space left on device")
        save_file(*args, **options)

    monkeypatch.setattr(export_file, "save_file", fails_later)
    with pytest.raises(OSError, match="no space left"):
        write(folder, table(50, 8, 2))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    calls.clear()
    with pytest.raises(OSError, match="no space left"):
        write(folder.parent / "new", table(50, 8, 2))
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"users": torch.ones(5, 9)}, r"users must have shape \[num_users, 16\], as the items have, got \[5, 9\]"),
        ({"users": torch.full((5, 16), torch.inf)}, "users must be finite"),
        ({"seen": nothing_seen(4)}, "seen must have a start for each of 5 users and the end, got 5 starts"),
        ({"seen": seen_by([300], [], [], [], [])}, r"seen items must be in 0\.\.299, got 300\.\.300"),
        ({"seen": (torch.tensor([0, 2, 1, 3, 3, 3]), torch.tensor([1, 2, 3]))}, "seen must start at 0, ascend"),
        ({"item_ids": [1, 2]}, r"item_ids must have shape \(300,\), got \(2,\)"),
    ],
)
def test_what_does_not_fit_is_not_exported(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "out", table(300, 16, 4), **change)
    assert not list(tmp_path.iterdir())


@needs_faiss
def test_codes_that_faiss_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="faiss=True: items have a scale for each group"):
        write(tmp_path / "out", table(300, 16, 4, "group"), faiss=True)


@pytest.mark.parametrize("granularity", ["table", "node", "group"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_of_symmetric_levels_only_the_scales_are_stored(tmp_path: Path, bits: int, granularity: str) -> None:
    items, users = (table(n, 16, bits, granularity, symmetric=True) for n in (300, 4))
    folder = write(tmp_path / "out", items, users)
    for name in ("items", "users"):
        assert set(load_file(folder / f"{name}.safetensors")) == {"codes", "scale"}
    index = LowBitIndex.load(folder)
    assert index.bytes_per_item == items.nbytes / 300
    zero = symmetric_zero(items.scale, bits)
    stored = LowBitIndex.load(write(tmp_path / "stored", QuantizedTable(items.codes, items.scale, zero, bits), users))
    for found, wanted in zip(index.recommend(range(4)), stored.recommend(range(4)), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_an_export_of_the_first_version_is_read(folder: Path) -> None:
    """It has a zero for every scale, and one without is broken."""
    wanted = LowBitIndex.load(folder).recommend(range(5))
    put_card(folder, version=1)
    for found, expected in zip(LowBitIndex.load(folder).recommend(range(5)), wanted, strict=True):
        np.testing.assert_array_equal(found, expected)
    stored = load_file(folder / "items.safetensors")
    del stored["zero"]
    save_file(stored, folder / "items.safetensors", metadata={"content": card_of(folder)["content"]})
    put_card(folder)
    with pytest.raises(ExportError, match=r"items.safetensors: has no tensor 'zero'"):
        LowBitIndex.load(folder)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0.0, 0.02, 0.5, 1.0])
def test_a_flipped_byte_is_refused(folder: Path, name: str, where: float) -> None:
    content = bytearray((folder / name).read_bytes())
    content[min(int(where * len(content)), len(content) - 1)] ^= 0x10
    (folder / name).write_bytes(content)
    with pytest.raises(ExportError, match=rf"{name}: corrupt: its SHA-256 is not the one in card.json"):
        LowBitIndex.load(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("verify", [True, False])
def test_a_truncated_or_longer_file_is_refused(folder: Path, name: str, verify: bool) -> None:
    content = (folder / name).read_bytes()
    for changed in (content[:-1], content[: len(content) // 2], b"", content + b"x"):
        (folder / name).write_bytes(changed)
        with pytest.raises(ExportError, match=rf"{name}: {len(changed)} bytes, where card.json says {len(content)}"):
            LowBitIndex.load(folder, verify=verify)


@pytest.mark.parametrize("name", TENSORS)
def test_a_file_that_does_not_hold_what_its_header_says_is_refused(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    header = int.from_bytes(content[:8], "little")
    for changed, message in (
        (content[:-4], "truncated: .* where tensor '.*' ends at"),
        (content + b"more", "corrupt: .* bytes, where its tensors end at"),
        (b"\xff" * 8 + content[8:], "corrupt: its header would take"),
        (content[:8] + b"[" * header + content[8 + header :], "corrupt: its header can't be read"),
        (content[:8] + content[8 : 8 + header].replace(b"U8", b"X8").replace(b"F32", b"F99").replace(b"I32", b"I99")
         + content[8 + header :], "corrupt: tensor '.*' of type"),
        (b"", "corrupt: its header"),
    ):  # fmt: skip
        (folder / name).write_bytes(changed)
        put_card(folder)
        with pytest.raises(ExportError, match=f"{name}: {message}"):
            LowBitIndex.load(folder)


@pytest.mark.parametrize("name", TENSORS)
def test_a_file_of_another_export_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    other = write(
        tmp_path / "other", table(300, 16, 4, seed=8), vectors(5, 16, seed=8), seen_by([1, 4], [], [3], [], [9])
    )
    (folder / name).write_bytes((other / name).read_bytes())
    with pytest.raises(ExportError, match=rf"{name}: corrupt: its SHA-256"):
        LowBitIndex.load(folder)
    with pytest.raises(ExportError, match=rf"{name}: of another export than card.json"):
        LowBitIndex.load(folder, verify=False)
    put_card(folder)
    with pytest.raises(ExportError, match=rf"{name}: of another export than card.json"):
        LowBitIndex.load(folder)


@needs_faiss
@pytest.mark.parametrize(
    ("other", "what"),
    [
        (table(300, 16, 4, seed=8), "its codes are not those of the items"),
        (table(300, 16, 8), "its kind, rows, dimension and metric are IndexScalarQuantizer"),
        (table(301, 16, 4), "its kind, rows, dimension and metric are IndexPQFastScan, 301"),
        (table(300, 32, 2), "codebook|dimension"),
    ],
)
def test_a_faiss_index_of_other_codes_is_refused(
    folder: Path, tmp_path: Path, other: QuantizedTable, what: str
) -> None:
    write(tmp_path / "other", other)
    (folder / "items.faiss").write_bytes((tmp_path / "other" / "items.faiss").read_bytes())
    put_card(folder)
    with pytest.raises(ExportError, match=rf"faiss index does not match items.safetensors: .*{what}"):
        LowBitIndex.load(folder, verify=False)
    LowBitIndex.load(folder, backend="numpy")  # which has no use for it


@needs_faiss
@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("row", [0, 40, 299])
def test_a_faiss_index_with_one_other_row_is_refused(tmp_path: Path, bits: int, row: int) -> None:
    items = table(300, 16, bits)
    folder = write(tmp_path / "out", items)
    items.codes[row, 3] ^= 1
    write(tmp_path / "other", items)
    (folder / "items.faiss").write_bytes((tmp_path / "other" / "items.faiss").read_bytes())
    put_card(folder)
    with pytest.raises(ExportError, match=r"faiss index does not match .*its codes are not those of the items"):
        LowBitIndex.load(folder)


@needs_faiss
def test_a_faiss_index_in_smaller_blocks_answers_the_same(folder: Path) -> None:
    """As the first releases wrote it."""
    import faiss

    loaded = LowBitIndex.load(folder, backend="faiss")
    product = faiss.IndexPQ(16, 16, 4, faiss.METRIC_INNER_PRODUCT)
    held = faiss.read_index(str(folder / "items.faiss"))
    faiss.copy_array_to_vector(faiss.vector_to_array(held.pq.centroids), product.pq.centroids)
    product.is_trained = True
    product.add_sa_codes(load_file(folder / "items.safetensors")["codes"])
    faiss.write_index(faiss.IndexPQFastScan(product, 32), str(folder / "items.faiss"))
    put_card(folder)
    older = LowBitIndex.load(folder, backend="faiss")
    for found, wanted in zip(older.recommend(range(5), k=20), loaded.recommend(range(5), k=20), strict=True):
        np.testing.assert_array_equal(found, wanted)


@needs_faiss
def test_a_faiss_file_that_faiss_cannot_read_is_refused(folder: Path) -> None:
    content = (folder / "items.faiss").read_bytes()
    (folder / "items.faiss").write_bytes(b"IxXX" + content[4:])
    put_card(folder)
    with pytest.raises(ExportError, match=r"items.faiss: faiss can't read it"):
        LowBitIndex.load(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 2},
        {"dim": 8},
        {"num_items": 299},
        {"metrics": {"recall@20": 1.0}},
        {"dataset": "other"},
        {"users": "codes"},
    ],
)
def test_a_card_that_was_changed_is_refused(folder: Path, change: dict[str, Any]) -> None:
    card = card_of(folder)
    (folder / "card.json").write_text(json.dumps(card | change))
    with pytest.raises(ExportError, match=r"card.json: changed after it was written"):
        LowBitIndex.load(folder)
    if change.keys() & {"bits", "dim", "num_items", "users"}:
        put_card(folder, **change)  # also where its checksum fits
        with pytest.raises(ExportError, match=r"safetensors: (has no tensor|'\w+' has shape)"):
            LowBitIndex.load(folder)


def test_what_is_no_export_is_refused(folder: Path, tmp_path: Path) -> None:
    card = card_of(folder)
    for content, message in (
        ("{", "card.json: corrupt: no JSON"),
        ("[1]", "card.json: of something else"),
        (json.dumps(card | {"format": "pickle"}), "its format is not 'lightning_tinykg.lowbit'"),
        (json.dumps(card | {"version": 3}), "of format version 3, this release reads versions 1 and 2"),
    ):
        (folder / "card.json").write_text(content)
        with pytest.raises(ExportError, match=message):
            LowBitIndex.load(folder)
    with pytest.raises(ExportError, match=r"nowhere: no export, it has no card.json"):
        LowBitIndex.load(tmp_path / "nowhere")
    (folder / "card.json").write_text(json.dumps(card))
    (folder / "users.safetensors").unlink()
    with pytest.raises(ExportError, match=r"users.safetensors: missing, though card.json lists it"):
        LowBitIndex.load(folder)


@pytest.mark.parametrize(
    ("name", "tensor", "value", "message"),
    [
        ("seen.safetensors", "ptr", np.array([0, 2, 1, 3, 3, 4]), "'ptr' does not ascend from 0 to 4"),
        ("seen.safetensors", "item", np.array([1, 2, 3, 300], dtype=np.int32), r"an item that is not in 0\.\.299"),
        ("items.safetensors", "scale", np.array([np.nan], dtype=np.float32), "scale must be finite float32"),
        ("items.safetensors", "scale", np.ones(7, dtype=np.float32), "scale and zero must both be"),
        ("items.safetensors", "codes", np.zeros((300, 9), dtype=np.uint8), "'codes' has shape"),
    ],
)
def test_contents_that_make_no_sense_are_refused(
    folder: Path, name: str, tensor: str, value: Any, message: str
) -> None:
    stored = load_file(folder / name) | {tensor: value}
    save_file(stored, folder / name, metadata={"content": card_of(folder)["content"]})
    put_card(folder)
    with pytest.raises(ExportError, match=f"{name}: {message}"):
        LowBitIndex.load(folder)


# -- of a module ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data() -> KGRecDataModule:
    data = KGRecDataModule("synthetic:3000", batch_size=512)
    data.prepare_data()
    data.setup("fit")
    return data


def trained(data: KGRecDataModule, root: Path, encoder: Any, **options: Any) -> HQGNN:
    torch.manual_seed(0)
    module = HQGNN(encoder, **options)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    # options of several types
    trainer = L.Trainer(accelerator="cpu", devices=1, max_epochs=1, default_root_dir=root, **quiet)  # type: ignore[arg-type]
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    return module


def assert_same(module: HQGNN, index: LowBitIndex, users: int) -> None:
    items, scores = module.recommend(range(users), k=20)
    found = index.recommend(range(users), k=20)
    np.testing.assert_allclose(found[1], scores.numpy(), rtol=1e-5, atol=1e-6)
    # where float32 scores are a rounding error apart, the order is that of the exact ones
    other = found[0] != items.numpy()
    assert other.mean() < 0.01
    assert np.abs(np.where(other, found[1] - scores.numpy(), 0)).max() < 1e-5


@pytest.mark.parametrize("scale", ["table", "node", "group"])
@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_an_index_recommends_what_its_module_does(data: KGRecDataModule, tmp_path: Path, bits: int, scale: Any) -> None:
    module = trained(data, tmp_path, LightGCN(dim=32, num_layers=2), bits=bits, scale=scale)
    index = module.export(tmp_path / "out")
    assert index.bits == bits
    assert_same(module, index, data.num_users)
    assert_same(module, LowBitIndex.load(tmp_path / "out", backend="numpy"), data.num_users)
    card = index.card
    assert card["dataset"] == "synthetic"
    assert card["granularity"] == scale
    assert card["metrics"]["recall@20"] == pytest.approx(module.last_metrics["recall@20"])
    assert card["settings"]["bits"] == bits


def test_of_another_encoder_with_quantized_users(data: KGRecDataModule, tmp_path: Path) -> None:
    encoder = KGAT(dim=16, layer_dims=(16,))
    module = trained(data, tmp_path, encoder, bits=4, quantize_users=True)
    index = module.export(tmp_path / "out")
    assert index.card["users"] == "codes"
    assert_same(module, index, data.num_users)
    other = module.export(tmp_path / "full", users="float32", dataset="mine", faiss=False)
    assert (other.card["users"], other.card["dataset"], other.card["faiss"]) == ("float32", "mine", [])
    with pytest.raises(ValueError, match="users must be 'float32' or 'codes', got 'int8'"):
        module.export(tmp_path / "none", users="int8")


def test_full_precision_has_no_codes_to_export(data: KGRecDataModule, tmp_path: Path) -> None:
    module = HQGNN(LightGCN(dim=8), bits=32)
    module.set_graph(data.graph)
    with pytest.raises(ValueError, match="32"):
        module.export(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_folder_is_given_back(tmp_path: Path) -> None:
    assert write_export(tmp_path / "a" / "b", vectors(1, 8), table(9, 8, 1), nothing_seen(1)) == tmp_path / "a" / "b"
