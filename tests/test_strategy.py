"""The strategies bring the callback with them: same logging, same results, to the bit."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_tinykg import TinyKGCallback, TinyKGDDPStrategy, TinyKGStrategy, registry

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Small(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 64), nn.Tanh())
        self.head = nn.Linear(64, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.mse_loss(self.head(self.body(x)), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        x, y = torch.randn(256, 64, generator=generator), torch.randn(256, 4, generator=generator)
        return DataLoader(TensorDataset(x, y), batch_size=64)


def fit(*, strategy: Any = "auto", callbacks: Any = (), **options: Any) -> tuple[L.Trainer, Small]:
    model = Small()
    L.seed_everything(7, verbose=False)
    trainer = L.Trainer(
        strategy=strategy, callbacks=list(callbacks), **{"max_epochs": 2, "devices": 1, **QUIET, **options}
    )
    trainer.fit(model)
    return trainer, model


def weights(model: Small) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


SETTINGS: dict[str, Any] = {
    "bits": 2, "seed": 5, "min_bytes": 0, "modules": ["!head"], "recompute": "off", "summary": False,
}  # fmt: skip


@pytest.mark.parametrize("name", ["an instance", "by name"])
def test_same_as_the_callback_to_the_bit(name: str) -> None:
    callback = TinyKGCallback(**SETTINGS)
    wanted, want = fit(callbacks=[callback])
    strategy: Any = TinyKGStrategy(**SETTINGS)
    if name == "by name":
        StrategyRegistry.register("tinykg_settings", TinyKGStrategy, override=True, **SETTINGS)
        strategy = "tinykg_settings"
    trainer, got = fit(strategy=strategy)
    assert equal(weights(want), weights(got))
    assert not equal(weights(fit()[1]), weights(got))
    metrics = {key: value for key, value in wanted.callback_metrics.items() if key.startswith("tinykg/")}
    assert len(metrics) == 4
    assert {key: trainer.callback_metrics[key] for key in metrics} == metrics
    ledger = trainer.strategy.tinykg.ledger
    assert callback.ledger is not None
    assert ledger.rows() == callback.ledger.rows()


def test_registered_names() -> None:
    names = set(StrategyRegistry.available_strategies())
    assert {"tinykg", "fsdp_tinykg", "model_parallel_tinykg"} <= names
    for launcher in ("", "_spawn", "_fork", "_notebook"):
        assert {f"ddp_tinykg{launcher}", f"ddp_tinykg{launcher}_find_unused_parameters_true"} <= names
    strategy = StrategyRegistry.get("ddp_tinykg_fork_find_unused_parameters_true")
    assert isinstance(strategy, DDPStrategy)
    assert strategy._ddp_kwargs["find_unused_parameters"] is True
    assert strategy.tinykg.bits == 8


def test_registering_again_changes_nothing() -> None:
    names = StrategyRegistry.available_strategies()
    registry.register()
    assert StrategyRegistry.available_strategies() == names
    assert type(StrategyRegistry.get("tinykg")) is TinyKGStrategy


LIGHTNING, OURS = "import lightning as L", "import lightning_tinykg"


@pytest.mark.parametrize(
    "imports",
    [
        [LIGHTNING, OURS],
        [OURS, "from lightning.pytorch import Trainer", LIGHTNING],
        ["from lightning_tinykg.strategy import TinyKGStrategy", LIGHTNING],
        pytest.param(["from lightning_tinykg import TinyKGCallback", LIGHTNING], marks=pytest.mark.slow),
        pytest.param(["import lightning_tinykg.callback", LIGHTNING], marks=pytest.mark.slow),
        pytest.param([OURS, LIGHTNING], marks=pytest.mark.slow),
    ],
    ids=" then ".join,
)
def test_names_are_known_in_whichever_order_is_imported(imports: list[str]) -> None:
    make = "print(type(L.Trainer(strategy='tinykg', accelerator='cpu', devices=1, logger=False).strategy).__name__)"
    ran = subprocess.run([sys.executable, "-c", "\n".join([*imports, make])], capture_output=True, text=True)
    assert ran.stdout.split() == ["TinyKGStrategy"], ran.stderr


def test_the_package_alone_imports_neither_torch_nor_lightning() -> None:
    code = f"import sys\n{OURS}\nprint(*({{'torch', 'lightning', 'torch_geometric'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == []


def test_a_callback_beside_it_is_refused() -> None:
    with pytest.raises(RuntimeError, match="TinyKGStrategy compresses already, and the Trainer has a TinyKGCallback"):
        fit(strategy=TinyKGStrategy(), callbacks=[TinyKGCallback()])


def test_several_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="strategy 'tinykg' trains on one device, got 2: use 'ddp_tinykg'"):
        L.Trainer(strategy="tinykg", devices=2, **QUIET)


@pytest.mark.parametrize("options", [{"bits": 3}, {"recipe": "best"}, {"min_bytes": -1}])
def test_impossible_arguments_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        TinyKGStrategy(**options)


def test_a_trainer_fits_twice() -> None:
    trainer, model = fit(strategy=TinyKGStrategy(**SETTINGS))
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model)
    assert sum(isinstance(callback, TinyKGCallback) for callback in trainer.callbacks) == 1
    assert "training_step" not in vars(trainer.strategy)


def test_evaluation_compresses_nothing() -> None:
    strategy = TinyKGStrategy(**SETTINGS)
    model = Small()
    model.test_step = model.training_step  # type: ignore[method-assign, assignment]  # a stand-in
    L.Trainer(strategy=strategy, devices=1, **QUIET).test(model, model.train_dataloader())
    assert strategy.tinykg.ledger is None


def test_a_resumed_run_ends_in_the_same_weights(tmp_path: Path) -> None:
    """And a checkpoint of the callback's is one of the strategy's."""
    _, whole = fit(strategy=TinyKGStrategy(**SETTINGS), max_epochs=3)
    for first in ({"strategy": TinyKGStrategy(**SETTINGS)}, {"callbacks": [TinyKGCallback(**SETTINGS)]}):
        trainer, _ = fit(**first, max_epochs=1)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        state = torch.random.get_rng_state()
        model = Small()
        torch.random.set_rng_state(state)
        again = L.Trainer(strategy=TinyKGStrategy(**SETTINGS), max_epochs=3, devices=1, **QUIET)
        again.fit(model, ckpt_path=tmp_path / "last.ckpt")
        assert equal(weights(model), weights(whole))


class Report(L.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        found = next(c for c in trainer.callbacks if isinstance(c, TinyKGCallback))
        assert found.ledger is not None
        report = {
            "weights": [parameter.tolist() for parameter in pl_module.parameters()],
            "stored": found.ledger.stored_bytes,
            "bits": found.bits,
        }
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(report))


@pytest.mark.ddp
def test_two_ranks_as_with_the_callback(tmp_path: Path) -> None:
    reports = []
    for number, options in enumerate(
        (
            {"strategy": TinyKGDDPStrategy(start_method="fork", **SETTINGS)},
            {"strategy": "ddp_fork", "callbacks": [TinyKGCallback(**SETTINGS)]},
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        callbacks = [*options.pop("callbacks", []), Report(folder)]  # type: ignore[misc]  # options of several types
        fit(**options, callbacks=callbacks, devices=2)
        reports.append([json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)])
    assert reports[0] == reports[1]
    assert reports[0][0]["weights"] == reports[0][1]["weights"]
    assert reports[0][0]["bits"] == 2
