"""``TinyKGCallback`` on two processes: the same weights on both, noise of its own on each."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_tinykg import TinyKGCallback

pytestmark = [pytest.mark.ddp, pytest.mark.timeout(60)]


class Small(L.LightningModule):
    """Two layers without dropout, given the same batches on every rank, so that only the noise differs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh())
        self.head = nn.Linear(64, 4)
        self.losses: list[float] = []
        self.grads: list[str] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self.noted(F.mse_loss(self.head(self.body(x)), y))

    def noted(self, loss: Tensor) -> Tensor:
        # this rank's own gradient, before the ranks' mean is taken
        # as it was made here
        (grad,) = torch.autograd.grad(loss, self.body[2].weight, retain_graph=True)  # type: ignore[arg-type]
        self.grads.append(digest([grad]))
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        x, y = torch.randn(256, 64, generator=generator), torch.randn(256, 4, generator=generator)
        return DataLoader(TensorDataset(x, y), batch_size=64)


class Unused(Small):
    """Uses another head on each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(64, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return self.noted(F.mse_loss((self.spare if batch_idx % 2 else self.head)(self.body(x)), y))


class Report(L.Callback):
    """Writes what each rank has seen to a file: a forked process gives back nothing else."""

    def __init__(self, folder: Path, callback: TinyKGCallback | None) -> None:
        self.folder, self.callback = folder, callback

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(self.folder / f"{trainer.global_rank}.log")
        logging.getLogger("lightning.pytorch.utilities.rank_zero").addHandler(handler)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Small)
        ledger = self.callback.ledger if self.callback else None
        found = {
            "losses": pl_module.losses,
            "grads": pl_module.grads,
            "weights": digest(list(pl_module.parameters())),
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "step": self.callback.state_dict()["step"] if self.callback else 0,
            "ledger": ledger.rows() if ledger is not None else [],
        }
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(found))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # a leftover in a forked process is seen by nobody else
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
        assert not nn.modules.module._global_forward_hooks


def digest(tensors: list[Any]) -> str:
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in tensors)).hexdigest()


def fit(
    folder: Path,
    callback: TinyKGCallback | None,
    module: L.LightningModule | None = None,
    *more: L.Callback,
    **options: Any,
) -> list[Any]:
    """Train on two processes; what each of them reports."""
    ckpt_path = options.pop("ckpt_path", None)
    callbacks = [*([callback] if callback else []), Report(folder, callback), *more]
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 2,
        "strategy": "ddp_fork",
        "use_distributed_sampler": False,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "max_epochs": 1,
    }
    trainer = L.Trainer(callbacks=callbacks, **(settings | options))
    trainer.fit(module or Small(), ckpt_path=ckpt_path)
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def tiny(bits: int = 2, **options: Any) -> TinyKGCallback:
    return TinyKGCallback(bits, **({"summary": False} | options))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ddp(**options: Any) -> dict[str, Any]:
    """Options of a Trainer: DDP with these settings, on forked processes."""
    return {"strategy": DDPStrategy(start_method="fork", process_group_backend="gloo", **options)}


# made anew by each fit, since a strategy belongs to one Trainer
WAYS: dict[str, tuple[type[Small], Callable[[], dict[str, Any]]]] = {
    "plain": (Small, dict),
    "accumulation": (Small, lambda: {"accumulate_grad_batches": 2}),
    "bf16-mixed-clipped": (Small, lambda: {"precision": "bf16-mixed", "gradient_clip_val": 0.1}),
    "double": (Small, lambda: {"precision": "64-true"}),
    "find-unused": (Unused, lambda: ddp(find_unused_parameters=True)),
    "find-unused-accumulation": (Unused, lambda: ddp(find_unused_parameters=True) | {"accumulate_grad_batches": 2}),
    "static-graph": (Small, lambda: ddp(static_graph=True)),
    "bucket-view": (Small, lambda: ddp(gradient_as_bucket_view=True)),
    "bucket-view-bf16-accumulation": (
        Small,
        lambda: ddp(gradient_as_bucket_view=True) | {"precision": "bf16-mixed", "accumulate_grad_batches": 3},
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_ranks_agree_on_weights_and_differ_in_noise(tmp_path: Path, way: str) -> None:
    kind, options = WAYS[way]
    first, second = fit(tmp_path, tiny(bits=2), kind(), **options())
    assert first["weights"] == second["weights"]
    assert first["losses"] == second["losses"]  # the batches are the same, and the forward is exact
    assert len(first["grads"]) == 4
    assert not set(first["grads"]) & set(second["grads"])
    assert first["step"] == second["step"] == 4
    assert first["ledger"] == second["ledger"]
    assert first["metrics"]["tinykg/bits"] == 2
    assert first["metrics"]["tinykg/ratio"] > 3


@pytest.mark.parametrize("way", WAYS)
def test_exact_mode_is_exact_on_two_ranks(tmp_path: Path, way: str) -> None:
    kind, options = WAYS[way]
    plain = fit(tmp_path / "plain", None, kind(), **options())
    exact = fit(tmp_path / "exact", tiny(bits=32), kind(), **options())
    for a, b in zip(plain, exact, strict=True):
        assert a["weights"] == b["weights"]
        assert a["grads"] == b["grads"]
        assert a["losses"] == b["losses"]
    assert len({rank["weights"] for rank in exact}) == 1
    compressed = fit(tmp_path / "compressed", tiny(bits=2), kind(), **options())
    assert compressed[0]["weights"] != plain[0]["weights"]
    assert compressed[0]["losses"][0] == plain[0]["losses"][0]


def test_runs_repeat_and_resume(tmp_path: Path) -> None:
    steps: dict[str, Any] = {"limit_train_batches": 2, "max_epochs": 2}
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    whole = fit(tmp_path / "whole", tiny(), Small(), save, **steps)
    again = fit(tmp_path / "again", tiny(), Small(), **steps)
    assert again == whole
    resumed = fit(tmp_path / "resumed", tiny(), Small(), ckpt_path=tmp_path / "step=2.ckpt", **steps)
    for a, b in zip(resumed, whole, strict=True):
        assert a["weights"] == b["weights"]
        assert a["grads"] == b["grads"][2:]


@pytest.mark.parametrize("modules", [None, ["!head"], ["body"], ["body.2"], ["Small"]], ids=str)
def test_modules_go_by_the_same_paths_as_on_one_device(tmp_path: Path, modules: list[str] | None) -> None:
    """The DDP wrapper around the module is no part of a path."""
    two = fit(tmp_path / "two", tiny(modules=modules))[0]
    one = fit(tmp_path / "one", tiny(modules=modules), devices=1, strategy="auto")[0]
    what = ("module", "op", "codec", "raw_bytes", "stored_bytes")
    assert [[row[name] for name in what] for row in two["ledger"]] == [
        [row[name] for name in what] for row in one["ledger"]
    ]


def test_an_exception_on_a_rank_is_reported(tmp_path: Path) -> None:
    class Failing(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 1:
                raise ValueError("boom")
            return super().training_step(batch, batch_idx)

    with pytest.raises(Exception, match="boom"):
        fit(tmp_path, tiny(), Failing())
    assert len(fit(tmp_path, tiny())) == 2


def test_summary_is_printed_on_one_rank(tmp_path: Path) -> None:
    fit(tmp_path, TinyKGCallback(bits=2))
    told = [(tmp_path / f"{rank}.log").read_text() for rank in range(2)]
    assert [text.count("Saved tensors:") for text in told] == [1, 0]
