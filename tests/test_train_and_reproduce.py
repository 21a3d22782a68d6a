"""The example's YAML files are what a user copies: each must parse and take a step."""

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
    name = config.stem.split("-")[0]
    assert type(cli.model).__name__.lower() == {"bprmf": "lightgcn"}.get(name, name)  # of no layers


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_no_machine_path_in_a_config(config: Path) -> None:
    assert not [line for line in config.read_text().splitlines() if " /" in line or "~" in line]
