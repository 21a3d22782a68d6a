"""``SGQuantCallback`` from YAML: what a user writes is what runs, and what is printed reads back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_tinykg.bits import BitPlan
from lightning_tinykg.sgquant import DegreeBuckets, SGQuantCallback

pytest.importorskip("jsonargparse")

from lightning_tinykg.cli import TinyKGCLI, main

QUIET = dict.fromkeys(["enable_checkpointing", "enable_progress_bar", "enable_model_summary", "logger"], False)
PLAN = BitPlan({("*", "embedding"): 4, ("*", "*", "degree-0"): 2}, default=8)
LOADED = {"class_path": "lightning_tinykg.BitPlan.load", "init_args": {"path": "plan.yaml"}}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a YAML file with an SGQuantCallback of such arguments, and a plan beside it."""
    monkeypatch.chdir(tmp_path)
    PLAN.save("plan.yaml")

    def write(**arguments: Any) -> str:
        callback = {"class_path": "lightning_tinykg.SGQuantCallback", "init_args": {"finetune_epochs": 1, **arguments}}
        content = {
            "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 2, **QUIET, "callbacks": [callback]},
            "model": {"class_path": "lightning_tinykg.LightGCN", "init_args": {"dim": 8, "num_layers": 2}},
            "data": {
                "class_path": "lightning_tinykg.KGRecDataModule",
                "init_args": {"root": "synthetic:1000", "triple_batch_size": None},
            },
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
        return str(tmp_path / "run.yaml")

    return write


def fitted(path: str) -> tuple[SGQuantCallback, dict[str, float]]:
    cli = TinyKGCLI(args=["fit", "--config", path])
    (callback,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, SGQuantCallback)]
    return callback, {name: float(value) for name, value in cli.trainer.callback_metrics.items()}


def test_a_width(config: Callable[..., str]) -> None:
    callback, metrics = fitted(config(plan=4))
    assert callback.is_active
    assert metrics["sgquant/average_bits"] == 4
    assert callback.quantizer is not None
    assert metrics["sgquant/ratio"] == pytest.approx(callback.quantizer.memory(4).ratio)


@pytest.mark.parametrize("plan", ["plan.yaml", LOADED], ids=["path", "load"])
def test_a_plan_from_a_file(config: Callable[..., str], plan: Any) -> None:
    callback, metrics = fitted(config(plan=plan))
    assert callback.plan == PLAN
    assert callback.quantizer is not None
    assert metrics["sgquant/average_bits"] == pytest.approx(callback.quantizer.memory(PLAN).average_bits)
    assert callback.quantizer.memory(PLAN).average_bits not in (2, 4, 8)


def test_every_argument_arrives(config: Callable[..., str]) -> None:
    others = {"granularity": "node", "protect": [0.0, 0.5], "range": "percentile", "percentile": 0.99}
    callback, _ = fitted(config(plan=4, buckets=[2, 5], seed=3, **others))
    quantizer = callback.quantizer
    assert quantizer is not None
    assert quantizer.buckets == DegreeBuckets(split_points=(2, 5))
    assert (quantizer.granularity, quantizer.range, quantizer.percentile) == ("node", "percentile", 0.99)
    assert (quantizer.protect, quantizer.seed) == ((0.0, 0.5), 3)


@pytest.mark.parametrize(
    "arguments",
    [
        {"plan": "plan.yaml", "buckets": 4},
        {"plan": LOADED, "buckets": 3, "range": "mse"},
        {
            "buckets": {"class_path": "lightning_tinykg.sgquant.DegreeBuckets", "init_args": {"split_points": [1, 4]}},
            "protect": [0.1, 0.2],
        },
        {"plan": 2, "buckets": None},
    ],
    ids=["path", "load", "buckets", "width"],
)
def test_print_config_round_trips(
    config: Callable[..., str], arguments: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(path: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["fit", "--config", path, "--print_config"])
        assert stopped.value.code == 0
        return capsys.readouterr().out

    first = printed(config(**arguments))
    (tmp_path / "printed.yaml").write_text(first)
    assert printed(str(tmp_path / "printed.yaml")) == first
    callback, _ = fitted(str(tmp_path / "printed.yaml"))
    wanted = arguments.get("plan", 8)
    assert callback.plan == (BitPlan(default=wanted) if isinstance(wanted, int) else PLAN)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"plan": 9}, r"bits must be one of .*, got 9"),
        ({"finetune_epochs": -1}, "finetune_epochs must be a whole number of at least 0, got -1"),
    ],
)
def test_what_cannot_be_is_refused(config: Callable[..., str], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(["fit", "--config", config(**arguments)])


def test_a_range_there_is_not_is_named(config: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--config", config(range="widest")])
    assert "widest" in capsys.readouterr().err
