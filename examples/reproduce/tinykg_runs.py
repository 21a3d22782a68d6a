"""One run of TinyKG's table: a model on a data set, trained in one way with one seed, and tested once."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from reporting import quiet_trainer
from rich.progress import Progress
from tinykg_ways import PLAIN, Checkpointed, arguments
from tinykg_ways import settings as way_settings

from lightning_tinykg import TinyKGCallback, data, models

CONFIGS = Path(__file__).parents[1] / "configs"
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """A model on a data set.

    Attributes:
        model: as in the names of the configs: ``kgat``, ``kgcn``, ``kgcn-ctr`` ... or ``popularity``.
        set: name of the data set's folder, or ``synthetic:SIZE``.
    """

    model: str
    set: str

    @property
    def file(self) -> str:
        """Name of the file of its results."""
        return f"{self.model}-{self.set.replace(':', '')}.jsonl"

    @property
    def config(self) -> Path:
        """The case's own config, or that of `music`, which then has not been tuned for this data set."""
        own = CONFIGS / f"{self.model}-{self.set.partition(':')[0].replace('-', '')}.yaml"
        return own if own.exists() else CONFIGS / f"{self.model}-music.yaml"

    def read(self) -> dict[str, Any]:
        """What the config says of the model, the data and the stopping."""
        if self.model == "popularity":
            return {}
        config = yaml.safe_load(self.config.read_text())
        given = {c["class_path"].rpartition(".")[2]: c["init_args"] for c in config["trainer"]["callbacks"]}
        every = config["trainer"].get("check_val_every_n_epoch", 1)
        return ({"validates_every": every} if every > 1 else {}) | {
            "config": self.config.name,
            "model": [config["model"]["class_path"].rpartition(".")[2], config["model"]["init_args"]],
            "data": [
                config["data"]["class_path"].rpartition(".")[2],
                {name: value for name, value in config["data"]["init_args"].items() if name != "root"},
            ],
            "monitor": given["ModelCheckpoint"]["monitor"],
            "epochs": config["trainer"]["max_epochs"],
            "patience": given.get("EarlyStopping", {}).get("patience"),  # None: all epochs
        }

    def settings(self, way: str, epochs: int | None = None, patience: int | None = None) -> dict[str, Any]:
        """What a result depends on, besides the seed: the config, as far as it is not overruled, and the way."""
        settings = self.read()
        if not settings:
            return {}
        settings["epochs"] = settings["epochs"] if epochs is None else epochs
        settings["patience"] = settings["patience"] if patience is None else patience
        return settings | {"compression": way_settings(way, settings["epochs"])}


class Record(Callback):
    """What a run leaves behind: curve, times, bytes. A part of its checkpoints, so a resumed run leaves all of it.

    Args:
        progress: where it shows how far the run is.
        name: of the run.
        monitor: the validation metric.
        tinykg: the callback that compresses, if there is one.
    """

    def __init__(self, progress: Progress, name: str, monitor: str, tinykg: TinyKGCallback | None) -> None:
        self.progress, self.name, self.monitor, self.tinykg = progress, name, monitor, tinykg
        self.task = progress.add_task(name, total=None)
        self.kept: dict[str, Any] = {
            "curve": [], "seconds": [], "epochs": 0, "steps": 0, "raw": 0, "stored": 0, "sum_raw": 0, "sum_stored": 0,
        }  # fmt: skip
        self.start = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = _now()

    def on_train_batch_end(self, *rest: Any) -> None:
        """Add up what the step kept, and keep that of the largest."""
        if self.tinykg is None or self.tinykg.ledger is None:
            return
        raw, stored = self.tinykg.ledger.raw_bytes, self.tinykg.ledger.stored_bytes
        self.kept["steps"] += 1
        self.kept["sum_raw"] += raw
        self.kept["sum_stored"] += stored
        if raw > self.kept["raw"]:
            self.kept["raw"], self.kept["stored"] = raw, stored

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.kept["seconds"].append(_now() - self.start)  # of training alone

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        curve = self.kept["curve"]
        curve.append(float(trainer.callback_metrics[self.monitor]))
        self.kept["epochs"] = trainer.current_epoch + 1
        text = f"{self.name}: epoch {self.kept['epochs']}, {self.monitor} {curve[-1]:.4f}, best {max(curve):.4f}"
        self.progress.update(self.task, description=text)

    def summary(self) -> dict[str, Any]:
        """What the result says of it. Bytes where they were counted; `stored_mib` is of the largest step."""
        kept = self.kept
        summary: dict[str, Any] = {
            "best": max(kept["curve"]),  # on the validation set
            "epochs": kept["epochs"],
            "seconds_per_epoch": statistics.median(kept["seconds"]),
            "curve": [round(value, 5) for value in kept["curve"]],
        }
        if kept["steps"]:
            summary["stored_mib"] = kept["stored"] / MIB
            summary["mean_raw_mib"] = kept["sum_raw"] / kept["steps"] / MIB
            summary["mean_stored_mib"] = kept["sum_stored"] / kept["steps"] / MIB
        return summary

    def state_dict(self) -> dict[str, Any]:
        return self.kept

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.kept = state_dict


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class Runner:
    """Trains what is asked for.

    Attributes:
        root: the folder that holds the data sets.
        out: where unfinished runs keep their checkpoints.
        progress: where it says what it does.
        accelerator: Lightning's.
    """

    root: Path
    out: Path
    progress: Progress
    accelerator: str = "cpu"
    counted: dict[str, tuple[int, int]] = field(default_factory=dict)

    def create(self, case: Case, settings: dict[str, Any], seed: int) -> tuple[Any, Any]:
        """The model and the data of a run. The seed decides the initialisation and dropout; the split is fixed."""
        L.seed_everything(seed, verbose=False)
        (model_name, model_options), (data_name, data_options) = settings["model"], settings["data"]
        model = getattr(models, model_name)(**model_options)
        return model, getattr(data, data_name)(**(data_options | {"root": self.folder(case)}))

    def folder(self, case: Case) -> str:
        """Where the data are."""
        return case.set if case.set.startswith("synthetic") else str(self.root / case.set)

    def trainer(self, way: str, callbacks: Sequence[Callback] = (), **options: Any) -> L.Trainer:
        """A quiet one, of the way's precision, with its layers in checkpoints if that is the way."""
        precision = "bf16-mixed" if way == "bf16" else "32-true"
        more = [Checkpointed()] if way == "checkpoint" else []
        return quiet_trainer(self.accelerator, precision=precision, callbacks=[*callbacks, *more], **options)

    def count(self, case: Case, settings: dict[str, Any], way: str, bits: int = 32) -> tuple[int, int]:
        """Raw and stored bytes of the largest step, of one epoch that is thrown away. They do not hang on the seed."""
        key = json.dumps([case.set, settings["model"], settings["data"], way, bits])
        if key not in self.counted:
            self.counted[key] = self._count(case, settings, way, bits)
        return self.counted[key]

    def _count(self, case: Case, settings: dict[str, Any], way: str, bits: int) -> tuple[int, int]:
        model, module = self.create(case, settings, seed=0)
        tinykg = TinyKGCallback(bits, summary=False)
        trainer = self.trainer(way, [tinykg], max_epochs=1, limit_val_batches=0, enable_checkpointing=False)
        trainer.fit(model, module)
        assert tinykg.largest is not None
        held = 0
        if way == "checkpoint" and isinstance(model, models.PairModule) and settings["data"][0] == "KGRecDataModule":
            pairs = min(module.batch_size, module.train_pairs.shape[1])
            held = 4 * pairs * 8  # ids of users, positives and negatives: the checkpoint holds them, unseen
        return tinykg.largest.raw_bytes + held, tinykg.largest.stored_bytes + held

    def run(
        self, case: Case, way: str, seed: int, settings: dict[str, Any], logger: Any = False, *, tests: bool = True
    ) -> dict[str, Any]:
        """One run: train, then test with the checkpoint that was best on the validation set, if it is to be tested.

        Goes on with the last whole epoch of an earlier call that was interrupted.
        """
        if case.model == "popularity":
            trainer = self.trainer(way, enable_checkpointing=False)
            module = data.KGRecDataModule(self.folder(case))
            return dict(trainer.test(models.MostPopular(), module, verbose=False)[0])
        tinykg = self.compression(case, settings, seed)
        name = f"{case.file.removesuffix('.jsonl')}-{way}-seed{seed}"
        record = Record(self.progress, name, settings["monitor"], tinykg)
        watched: dict[str, Any] = {"monitor": settings["monitor"], "mode": "max"}
        unfinished = self.out / "checkpoints" / name
        check_unfinished(unfinished, settings)
        best = ModelCheckpoint(unfinished, save_last=True, **watched)
        callbacks: list[Callback] = [record, best, *([tinykg] if tinykg else [])]
        if settings["patience"] is not None:
            callbacks.append(EarlyStopping(patience=settings["patience"], **watched))
        raw = self.count(case, settings, "none")[0] if tests else None
        stored = self.count(case, settings, way)[0] if tests and way in PLAIN else None
        model, module = self.create(case, settings, seed)
        every = settings.get("validates_every", 1)
        often = {"max_epochs": settings["epochs"], "check_val_every_n_epoch": every}
        trainer = self.trainer(way, callbacks, **often, logger=logger)
        last = unfinished / "last.ckpt"
        resumed = last.exists()
        trainer.fit(model, module, ckpt_path=str(last) if resumed else None)
        result = record.summary()  # before the test, which restores that of the best epoch
        if tests:
            result |= trainer.test(model, module, ckpt_path=best.best_model_path, verbose=False)[0]
        self.progress.remove_task(record.task)
        if raw is not None:
            result["raw_mib"] = raw / MIB
        if stored is not None:
            result["stored_mib"] = stored / MIB
        if logger:
            numbers = {name: value for name, value in result.items() if isinstance(value, float) and "/" not in name}
            logger.log_metrics({f"result/{name}": value for name, value in numbers.items()})
        shutil.rmtree(unfinished)
        device = trainer.strategy.root_device
        result["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return result | {"resumed": resumed, "threads": torch.get_num_threads(), "torch": torch.__version__}

    def compression(self, case: Case, settings: dict[str, Any], seed: int) -> TinyKGCallback | None:
        """The callback that compresses, if the way asks for one; a budget is counted first."""
        described = settings["compression"]
        if not described:
            return None
        budget = self.count(case, settings, "none", bits=2)[1] if "budget" in described else None
        return TinyKGCallback(**arguments(described, budget), seed=seed, summary=False)


def check_unfinished(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse to go on with what was begun with other settings.

    Raises:
        SystemExit: if it was.
    """
    note = folder / "settings.json"
    if note.exists() and json.loads(note.read_text()) != settings:
        raise SystemExit(f"{folder} was begun with other settings: remove it, or choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(settings))
