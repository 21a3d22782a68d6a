"""``lightning-tinykg export`` and ``lightning-tinykg recommend``."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from exporting import seen_by, table, vectors, write

from lightning_tinykg.data import KGRecDataModule
from lightning_tinykg.hqgnn import HQGNN
from lightning_tinykg.hqgnn.commands import export_checkpoint, recommend
from lightning_tinykg.hqgnn.index import LowBitIndex
from lightning_tinykg.models import LightGCN

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ids = {"user_ids": ["ann", "bob", "cy"], "item_ids": [f"song {item}" for item in range(30)]}
    return write(tmp_path / "out", table(30, 8, 4), vectors(3, 8), seen_by([1], [], list(range(30))), **ids)


def test_recommend_prints_lines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recommend(["--index", str(folder), "--users", "0", "2", "--k", "3"])
    first, last = capsys.readouterr().out.splitlines()
    items, scores = LowBitIndex.load(folder).recommend([0], k=3)
    wanted = "  ".join(f"{item} ({score:.4g})" for item, score in zip(items[0], scores[0], strict=True))
    assert first == f"user 0: {wanted}"
    assert last == "user 2: nothing is left"


@pytest.mark.parametrize("backend", ["auto", "numpy"])
def test_recommend_prints_json_with_ids(folder: Path, capsys: pytest.CaptureFixture[str], backend: str) -> None:
    recommend(["--index", str(folder), "--users", "bob", "cy", "--k", "4", "--ids", "--json", "--backend", backend])
    bob, cy = map(json.loads, capsys.readouterr().out.splitlines())
    items, scores = LowBitIndex.load(folder).recommend([1], k=4)
    assert bob["user"] == "bob"
    assert bob["items"] == [f"song {item}" for item in items[0]]
    np.testing.assert_allclose(bob["scores"], scores[0], atol=1e-6)
    assert cy == {"user": "cy", "items": [], "scores": []}
    recommend(["--index", str(folder), "--users", "2", "--k", "4", "--json", "--include-seen"])
    assert len(json.loads(capsys.readouterr().out)["items"]) == 4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--users", "9"], r"user_ids must be in 0..2, got 9..9"),
        (["--users", "dan", "--ids"], "no user 'dan' in the export"),
        (["--users", "dan"], "--users must be row numbers, got 'dan'; with --ids, ids in the data set"),
        (["--users", "1", "--k", "0"], "k must be a whole number of at least 1, got 0"),
    ],
)
def test_recommend_says_what_is_wrong(
    folder: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        recommend(["--index", str(folder), *args])
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err


def test_recommend_refuses_a_broken_export(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = (folder / "items.safetensors").read_bytes()
    (folder / "items.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(SystemExit) as stopped:
        recommend(["--index", str(folder), "--users", "0"])
    assert stopped.value.code == 1
    shown = capsys.readouterr()
    assert "items.safetensors: corrupt" in shown.err
    assert not shown.out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[HQGNN, KGRecDataModule, Path]:
    """A module that was trained for an epoch, its data and its checkpoint."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("run")
    data = KGRecDataModule("synthetic:2000", batch_size=512)
    module = HQGNN(LightGCN(dim=16, num_layers=2), bits=4)
    options: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "default_root_dir": root, **QUIET}
    trainer = L.Trainer(**options, enable_checkpointing=False)
    trainer.fit(module, data)
    trainer.save_checkpoint(root / "last.ckpt")
    return module, data, root / "last.ckpt"


def assert_same(index: LowBitIndex, module: HQGNN, users: int) -> None:
    items, scores = module.recommend(range(users), k=10)
    found = index.recommend(range(users), k=10)
    np.testing.assert_allclose(found[1], scores.numpy(), rtol=1e-5, atol=1e-6)
    assert (found[0] == items.numpy()).mean() > 0.99


def test_a_checkpoint_is_exported(run: tuple[HQGNN, KGRecDataModule, Path], tmp_path: Path) -> None:
    module, data, checkpoint = run
    again = KGRecDataModule("synthetic:2000")
    fresh = HQGNN(LightGCN(dim=16, num_layers=2), bits=4)
    index = export_checkpoint(fresh, again, str(checkpoint), str(tmp_path / "out"), dataset="music")
    assert_same(index, module, data.num_users)
    assert index.card["dataset"] == "music"


def test_what_cannot_be_exported(run: tuple[HQGNN, KGRecDataModule, Path], tmp_path: Path) -> None:
    _, data, checkpoint = run
    with pytest.raises(TypeError, match=r"export takes an HQGNN, got a LightGCN"):
        export_checkpoint(LightGCN(dim=16), data, str(checkpoint), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="export needs a KGRecDataModule"):
        export_checkpoint(HQGNN(LightGCN(dim=16)), None, str(checkpoint), str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"ckpt_path: .*last.ckpt does not fit the model"):
        export_checkpoint(HQGNN(LightGCN(dim=8)), data, str(checkpoint), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def config(tmp_path: Path) -> str:
    """The run's model and data in YAML, for a Trainer of another kind."""
    encoder = {"class_path": "lightning_tinykg.LightGCN", "init_args": {"dim": 16, "num_layers": 2}}
    content = {
        "trainer": {"accelerator": "cpu", "max_epochs": 3, "devices": 1, "enable_checkpointing": False, **QUIET},
        "model": {"class_path": "lightning_tinykg.HQGNN", "init_args": {"encoder": encoder, "bits": 4}},
        "data": {"class_path": "lightning_tinykg.KGRecDataModule", "init_args": {"root": "synthetic:2000"}},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "run.yaml")


def test_export_and_recommend_on_the_command_line(
    run: tuple[HQGNN, KGRecDataModule, Path], config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("jsonargparse")
    from lightning_tinykg.__main__ import main

    module, data, checkpoint = run
    out = str(tmp_path / "out")
    main(["export", f"--config={config}", "--trainer.devices=4", f"--ckpt_path={checkpoint}", f"--out={out}"])
    shown = capsys.readouterr().out
    assert "4 bits per node" in shown
    assert f"Written to {out}/" in shown
    assert_same(LowBitIndex.load(out), module, data.num_users)
    main(["recommend", "--index", out, "--users", "3", "--json"])
    assert len(json.loads(capsys.readouterr().out)["items"]) == 20


def test_a_checkpoint_is_tested_on_the_command_line(run: tuple[HQGNN, KGRecDataModule, Path], config: str) -> None:
    pytest.importorskip("jsonargparse")
    from lightning_tinykg.cli import TinyKGCLI

    module, _, checkpoint = run
    cli = TinyKGCLI(args=["test", f"--config={config}", f"--ckpt_path={checkpoint}"])
    torch.testing.assert_close(cli.model.state_dict(), module.state_dict(), rtol=0, atol=0)
    trainer = L.Trainer(accelerator="cpu", devices=1, enable_checkpointing=False, **QUIET)
    (wanted,) = trainer.test(module, KGRecDataModule("synthetic:2000"), verbose=False)
    assert {name: float(value) for name, value in cli.trainer.callback_metrics.items()} == pytest.approx(wanted)


def test_a_checkpoint_of_the_command_line_says_what_it_is_made_of(config: str, tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse")
    from lightning_tinykg.cli import TinyKGCLI

    cli = TinyKGCLI(args=["fit", f"--config={config}", "--trainer.max_epochs=1"])
    cli.trainer.save_checkpoint(tmp_path / "cli.ckpt")
    loaded = HQGNN.load_from_checkpoint(tmp_path / "cli.ckpt")
    assert isinstance(loaded.encoder, LightGCN)
    torch.testing.assert_close(loaded.state_dict(), cli.model.state_dict(), rtol=0, atol=0)
    TinyKGCLI(args=["test", f"--config={config}", f"--ckpt_path={tmp_path / 'cli.ckpt'}"])


def test_recommend_imports_no_torch(folder: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from lightning_tinykg.__main__ import main; main()"
    command = [sys.executable, "-c", code, "recommend", "--index", str(folder), "--users", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["user"] == 1
