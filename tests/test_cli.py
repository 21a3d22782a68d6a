"""``lightning-tinykg``: what a user writes in YAML or on the command line is what runs."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_tinykg import BitPlan, CosineAnneal, StepAnneal, TinyKGCallback, TinyKGDDPStrategy, TinyKGStrategy

pytest.importorskip("jsonargparse")

from lightning_tinykg.cli import TinyKGCLI, main

MODEL = """
    import lightning as L
    import torch
    from torch import nn
    from torch.utils.data import DataLoader

    class Model(L.LightningModule):
        def __init__(self, width: int = 64, noise: float = 0.0):
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Sequential(nn.Linear(64, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 64))

        def training_step(self, batch, batch_idx):
            loss = self.net(batch).square().mean()
            self.log("loss", loss)
            return loss

        validation_step = test_step = lambda self, batch, batch_idx: self.log("val", self.net(batch).mean())

        def predict_step(self, batch, batch_idx):
            return self.net(batch)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class WithData(Model):
        def train_dataloader(self):
            return DataLoader(torch.randn(256, 64), batch_size=64)

    class Data(L.LightningDataModule):
        def __init__(self, rows: int = 128):
            super().__init__()
            self.rows = rows

        def train_dataloader(self):
            return DataLoader(torch.randn(self.rows, 64), batch_size=64)

        val_dataloader = test_dataloader = predict_dataloader = train_dataloader
"""
QUIET = ["enable_checkpointing", "enable_progress_bar", "enable_model_summary", "logger"]
TRAINER = [
    "--trainer.accelerator=cpu",
    *(f"--trainer.{name}=false" for name in QUIET),
]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that this project has never seen, in the folder where the user is."""
    name = f"their_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(dedent(MODEL))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "argv", ["lightning-tinykg"])
    return name


@pytest.fixture
def config(module: str, tmp_path: Path) -> Callable[..., str]:
    """Writes a YAML file with a TinyKGCallback of such bits."""

    def write(bits: Any, **trainer: Any) -> str:
        callback = {"class_path": "lightning_tinykg.TinyKGCallback", "init_args": {"bits": bits, "summary": False}}
        plain = {"accelerator": "cpu", "max_epochs": 1, **dict.fromkeys(QUIET, False), "callbacks": [callback]}
        content = {
            "trainer": plain | trainer,
            "model": {"class_path": f"{module}.Model", "init_args": {"width": 32}},
            "data": {"class_path": f"{module}.Data", "init_args": {"rows": 256}},
        }
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(content))
        return str(path)

    return write


def tinykg(cli: TinyKGCLI) -> TinyKGCallback:
    (callback,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, TinyKGCallback)]
    return callback


def test_fit_from_yaml_with_a_schedule(config: Callable[..., str]) -> None:
    schedule = {"class_path": "lightning_tinykg.StepAnneal", "init_args": {"bits": {0: 8, 2: 2}}}
    cli = TinyKGCLI(args=["fit", "--config", config(schedule)])
    assert cli.trainer.global_step == 4
    assert tinykg(cli).plan.default == StepAnneal({0: 8, 2: 2})
    assert int(cli.trainer.callback_metrics["tinykg/bits"]) == 2
    assert cli.model.hparams["width"] == 32


@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_checkpoint_brings_its_hyper_parameters(module: str, tmp_path: Path, command: str) -> None:
    """Else weights of width 32 would meet a model of the default width."""
    args = [f"--model={module}.WithData", "--trainer.max_epochs=1", *TRAINER]
    trained = TinyKGCLI(args=["fit", *args, "--model.width=32"])
    trained.trainer.save_checkpoint(tmp_path / "last.ckpt")
    options = ["--trainer.max_epochs=2"] if command == "fit" else [f"--data={module}.Data"]
    cli = TinyKGCLI(args=[command, *args, *options, f"--ckpt_path={tmp_path / 'last.ckpt'}"])
    assert cli.model.hparams["width"] == cli.model.net[0].out_features == 32
    if command == "fit":
        assert cli.trainer.global_step == 8


def test_a_checkpoint_that_no_command_line_wrote(module: str, tmp_path: Path) -> None:
    """Its hyper-parameters do not say of which class they are: the configuration has to."""
    model = importlib.import_module(module).WithData(width=32)
    options: dict[str, Any] = dict.fromkeys(QUIET, False) | {"accelerator": "cpu", "max_epochs": 1}
    trainer = L.Trainer(**options)
    trainer.fit(model)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    args = [f"--model={module}.WithData", "--model.width=32", f"--data={module}.Data", *TRAINER]
    cli = TinyKGCLI(args=["test", *args, f"--ckpt_path={tmp_path / 'last.ckpt'}"])
    torch.testing.assert_close(cli.model.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_an_anneal_by_its_short_name(config: Callable[..., str]) -> None:
    anneal = {"class_path": "CosineAnneal", "init_args": {"start": 8, "end": 2, "steps": 2000}}
    cli = TinyKGCLI(args=["fit", "--config", config(anneal, fast_dev_run=True)])
    assert tinykg(cli).plan.default == CosineAnneal(start=8, end=2, steps=2000)


def test_a_plan_from_a_file(config: Callable[..., str], tmp_path: Path) -> None:
    plan = BitPlan({"net.0": 2}, default=4)
    plan.save(tmp_path / "plan.yaml")
    load = {"class_path": "lightning_tinykg.BitPlan.load", "init_args": {"path": str(tmp_path / "plan.yaml")}}
    cli = TinyKGCLI(args=["fit", "--config", config(load, fast_dev_run=True)])
    assert tinykg(cli).plan == plan


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_a_model_and_data_by_class_path_alone(module: str, command: str) -> None:
    args = ["--model", f"{module}.Model", "--data", f"{module}.Data", "--data.rows=64", "--trainer.fast_dev_run=1"]
    cli = TinyKGCLI(args=[command, *args, *TRAINER])
    assert cli.trainer.global_step == (command == "fit")
    assert cli.datamodule.rows == 64


def test_a_model_with_dataloaders_of_its_own_needs_no_data(module: str) -> None:
    cli = TinyKGCLI(args=["fit", f"--model={module}.WithData", "--trainer.max_epochs=1", *TRAINER])
    assert cli.datamodule is None
    assert cli.trainer.global_step == 4


def test_a_strategy_by_name(module: str) -> None:
    args = [f"--model={module}.WithData", "--trainer.fast_dev_run=1", *TRAINER, "--trainer.devices=1"]
    cli = TinyKGCLI(args=["fit", *args, "--trainer.strategy=tinykg"])
    assert isinstance(cli.trainer.strategy, TinyKGStrategy)
    assert int(cli.trainer.callback_metrics["tinykg/bits"]) == 8
    # taken, and not started: that would be a group of processes
    cli = TinyKGCLI(args=[f"--model={module}.WithData", *TRAINER, "--trainer.strategy=ddp_tinykg"], run=False)
    assert isinstance(cli.trainer.strategy, TinyKGDDPStrategy)


@pytest.mark.parametrize(
    "bits",
    [
        2,
        {"class_path": "lightning_tinykg.CosineAnneal", "init_args": {"steps": 2000}},
        {"class_path": "lightning_tinykg.WarmupThen", "init_args": {"steps": 5, "bits": 8, "then": 2}},
        {"class_path": "lightning_tinykg.BitPlan.load", "init_args": {"path": "plan.yaml"}},
    ],
    ids=["width", "anneal", "warmup", "plan"],
)
def test_print_config_round_trip(
    bits: Any, config: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    BitPlan({"net.0": 2}, default=4).save(tmp_path / "plan.yaml")

    def printed(path: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["fit", "--config", path, "--print_config"])
        assert stopped.value.code == 0
        return capsys.readouterr().out

    first = printed(config(bits))
    (tmp_path / "printed.yaml").write_text(first)
    assert printed(str(tmp_path / "printed.yaml")) == first
    main(["fit", "--config", str(tmp_path / "printed.yaml"), "--trainer.fast_dev_run=1"])


def test_wrong_bits_are_refused(config: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"bits must be one of 1, 2, 4, 8, 32, got 3"):
        main(["fit", "--config", config(3)])
    with pytest.raises(SystemExit):
        main(["fit", "--config", config("two")])
    assert "two" in capsys.readouterr().err


def test_the_seed_makes_runs_equal(module: str) -> None:
    args = ["fit", f"--model={module}.WithData", "--trainer.max_epochs=1", *TRAINER]
    one, other = TinyKGCLI(args=args), TinyKGCLI(args=args)
    torch.testing.assert_close(one.model.state_dict(), other.model.state_dict(), rtol=0, atol=0)


def test_profile_of_a_model_never_seen(module: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [f"--model={module}.WithData", *TRAINER, "--trainer.max_epochs=1"]
    cli = TinyKGCLI(args=["profile", *args, "--steps=1", "--widths", "32", "2", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "net.2" in printed
    assert "Tanh.result" in printed
    assert "exact" in printed
    parts = json.loads((tmp_path / "out" / "profile.json").read_text())
    assert [(point["bits"], point["recipe"]) for point in parts["points"]] == [
        (32, "rules"),
        (2, "rules"),
        (32, "rules, off"),
        (2, "rules, off"),
        (32, "rules, aggressive"),
        (2, "rules, aggressive"),
        (2, "paper"),
    ]
    assert (tmp_path / "out" / "profile.png").exists()
    assert cli.trainer.global_step == 0
    batches_seen = cli.model.net[1].num_batches_tracked
    assert batches_seen == 0


def test_profile_takes_the_configuration_of_a_run(config: Callable[..., str], tmp_path: Path) -> None:
    path = config(2, strategy="ddp", devices=4)
    cli = TinyKGCLI(
        args=["profile", "--config", path, "--out", str(tmp_path), "--steps=1", "--paper=false", "--recompute=[]"]
    )
    assert isinstance(cli.trainer.strategy, SingleDeviceStrategy)
    assert cli.trainer.world_size == 1
    parts = json.loads((tmp_path / "profile.json").read_text())
    assert [point["bits"] for point in parts["points"]] == [32, 8, 4, 2, 1]


def test_the_command_line_of_the_process(module: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])  # as of a console script
    args = ["profile", f"--model={module}.WithData", *TRAINER, "--widths", "8", "--steps=1"]
    monkeypatch.setattr(sys, "argv", ["lightning-tinykg", *args])
    main()
    assert sys.argv[1:] == args  # DDP starts its processes by it
    assert (tmp_path / "tinykg_profile" / "curve.csv").exists()


@pytest.mark.parametrize("missing", ["jsonargparse", "docstring_parser"])
def test_without_jsonargparse_it_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit, match=rf"{missing}.* not installed: pip install 'lightning-tinykg\[cli\]'"):
        main(["fit"])
