"""The example's YAML files are what a user copies: each must parse and take a step."""

import json
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
CONFIGS = sorted((EXAMPLES / "configs").glob("*.yaml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_trains_on_the_synthetic_graph(config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse")
    overrides = ["--data.root", "synthetic:2000", "--trainer.accelerator", "cpu", "--trainer.fast_dev_run", "1"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "fit", "--config", str(config), *overrides])
    cli = runpy.run_path(str(EXAMPLES / "train.py"))["main"]()
    assert cli.trainer.global_step == 1
    assert cli.trainer.callback_metrics["train/loss"].isfinite()
    assert type(cli.model).__name__.lower() == config.stem.split("-")[0]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_no_machine_path_in_a_config(config: Path) -> None:
    assert not [line for line in config.read_text().splitlines() if " /" in line or "~" in line]


def test_reproduction_resumes_and_refuses_to_mix_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # or the table is folded
    monkeypatch.syspath_prepend(EXAMPLES / "reproduce")  # as Python does with a script's folder
    script = runpy.run_path(str(EXAMPLES / "reproduce" / "music.py"))["main"]

    def call(epochs: int) -> str:
        options = ["--data", "synthetic:1000", "--models", "popularity", "kgat", "--seeds", "0", "--bits", "none", "2"]
        monkeypatch.setattr(sys, "argv", ["music.py", *options, "--epochs", str(epochs), "--out", str(tmp_path)])
        script()
        return capsys.readouterr().out

    table = call(1)
    assert "uncompressed" in table
    assert "2 bits" in table
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert {path.stem for path in kept} == {"popularity-none-seed0", "kgat-none-seed0", "kgat-2-seed0"}
    result = json.loads((tmp_path / "kgat-2-seed0.json").read_text())
    assert 0 <= result["test/recall@20"] <= 1
    assert result["epochs"] == 1

    call(1)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")} == kept
    with pytest.raises(SystemExit, match=r"kgat-none-seed0\.json was made with other settings"):
        call(2)
