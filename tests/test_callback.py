"""``TinyKGCallback`` in a Trainer: what it measures, what it leaves alone, and that it takes itself off again."""

import contextlib
import copy
import csv
import functools
import gc
import logging
import pickle
import signal
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    WeightAveraging,
)
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from lightning_utilities.core import rank_zero
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_tinykg import KGAT, KGRecDataModule, Ledger, TinyKGCallback, keep_exact
from lightning_tinykg.activations.keeping import Saved

METRICS = {"tinykg/bits", "tinykg/raw_mib", "tinykg/stored_mib", "tinykg/ratio"}


# -- what is trained ------------------------------------------------------------------------------------------------


class Small(L.LightningModule):
    """Two layers, ReLU, dropout and tanh, large enough that their activations are rounded; remembers what it saw."""

    def __init__(self, batch_size: int = 64, lr: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 64), nn.Tanh())
        self.head = nn.Linear(64, 4)
        self.batch_size, self.lr = batch_size, lr
        self.losses: list[Tensor] = []
        self.masks: list[Tensor] = []
        self.hooked: list[bool] = []

    def on_fit_start(self) -> None:
        torch.manual_seed(1)

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        hidden = self.body(x)
        self.masks.append(F.dropout(torch.ones(8, 8), 0.5) > 0)
        return F.mse_loss(self.head(hidden), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.hooked.append(is_hooked())
        loss = self.loss(batch)
        self.losses.append(loss.detach().clone())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> Any:
        return DataLoader(examples(), batch_size=self.batch_size)


class TwoOptimizers(Small):
    """Manual optimization: forward, backward, step, and all of it again, in one training step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        # one optimizer, or a list, as it was configured
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            loss = super().training_step(batch, batch_idx)
            assert bool(packed(loss)) == self.hooked[-1]
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.body, self.head)]


class Quasinewton(Small):
    """LBFGS: several closures to a batch."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)


class Evaluating(Small):
    """Computes gradients while it is validated, tested and asked to predict."""

    def __init__(self) -> None:
        super().__init__()
        self.evaluations: list[str] = []

    def evaluate(self, stage: str, batch: Any) -> None:
        assert not is_hooked()
        with torch.enable_grad():
            loss = self.loss(batch)
            assert not packed(loss)
            torch.autograd.grad(loss, list(self.parameters()))
        self.evaluations.append(stage)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate("validate", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate("test", batch)

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        self.evaluate("predict", batch)

    def val_dataloader(self) -> Any:
        return self.train_dataloader()

    test_dataloader = predict_dataloader = val_dataloader


class Failing(Small):
    """Raises in the midst of a training step, until it is healed."""

    def __init__(self, error: BaseException | None) -> None:
        super().__init__()
        self.error = error

    def loss(self, batch: Any) -> Tensor:
        loss = super().loss(batch)
        if self.error is not None and len(self.hooked) > 1:
            raise self.error
        return loss


class OutOfMemory(Small):
    """Has no memory for more than 32 examples."""

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__(batch_size)
        self.sizes: list[int] = []

    def loss(self, batch: Any) -> Tensor:
        loss = super().loss(batch)
        self.sizes.append(len(batch[0]))
        if len(batch[0]) > 32:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss


class Seeded(Small):
    """Its dropout is a function of the step: a Lightning checkpoint does not hold the global random state."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        torch.manual_seed(self.global_step)
        return super().training_step(batch, batch_idx)


class Watched(KGAT):
    """KGAT that remembers its losses."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss: Any = super().training_step(batch, batch_idx)
        self.losses.append(loss.detach().clone())
        return loss


# -- helpers --------------------------------------------------------------------------------------------------------


@functools.cache
def examples() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(256, 64, generator=generator), torch.randn(256, 4, generator=generator))


def fit(module: L.LightningModule, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    ckpt_path, data = options.pop("ckpt_path", None), options.pop("datamodule", None)
    trainer = make_trainer(*callbacks, **options)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer


def make_trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "limit_val_batches": 0,
        "max_epochs": 1,
        "log_every_n_steps": 1,
    }
    return L.Trainer(callbacks=list(callbacks), **(quiet | options))


def tiny(bits: int = 2, **options: Any) -> TinyKGCallback:
    return TinyKGCallback(bits, **({"summary": False} | options))


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def is_hooked() -> bool:
    """Whether anything is installed that looks at what autograd saves, at ops or at modules."""
    hooks = nn.modules.module
    return bool(
        torch._C._autograd._top_saved_tensors_default_hooks(True)
        or torch._C._len_torch_function_stack()
        or hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
    )


def packed(loss: Tensor) -> int:
    """How many of the tensors saved behind a loss are kept by this package."""
    stack, seen, count = [loss.grad_fn], set(), 0
    while stack:
        node: Any = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for name in dir(node):
            if name.startswith("_raw_saved_"):
                raw = getattr(node, name)
                items = raw if isinstance(raw, (tuple, list)) else (raw,)
                count += sum(isinstance(getattr(item, "data", None), Saved) for item in items)
        stack += [edge[0] for edge in node.next_functions]
    return count


def assert_clean(trainer: L.Trainer) -> None:
    """Nothing is left of the callback's work."""
    assert not is_hooked()
    assert "training_step" not in trainer.strategy.__dict__


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More threads add in any order, and sums would not repeat to the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def printed() -> Iterator[list[str]]:
    """What Lightning tells the user on rank 0."""
    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, handler = logging.getLogger("lightning.pytorch.utilities.rank_zero"), Collect()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield messages
    logger.removeHandler(handler)
    logger.setLevel(level)


# -- one line in a Trainer ------------------------------------------------------------------------------------------


def test_metrics_arrive(tmp_path: Path) -> None:
    callback, model = tiny(bits=2), Small()
    trainer = fit(model, callback, logger=CSVLogger(tmp_path))
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert set(found) >= METRICS
    assert found["tinykg/bits"] == callback.bits == 2
    assert found["tinykg/ratio"] == pytest.approx(found["tinykg/raw_mib"] / found["tinykg/stored_mib"], rel=1e-5)
    assert found["tinykg/ratio"] > 3
    assert callback.ledger is not None
    assert found["tinykg/raw_mib"] == pytest.approx(callback.ledger.raw_bytes / 2**20, rel=1e-5)
    # as it was made here
    with (Path(trainer.logger.log_dir) / "metrics.csv").open() as file:  # type: ignore[union-attr, arg-type]
        rows = list(csv.DictReader(file))
    assert set(rows[0]) >= METRICS
    assert [float(row["tinykg/bits"]) for row in rows if row["tinykg/bits"]] == [2.0] * 4
    assert all(model.hooked)


def test_ledger_names_modules_and_ops() -> None:
    callback = tiny()
    fit(Small(), callback, max_steps=1)
    assert callback.ledger is not None
    assert {(entry.module, entry.op) for entry in callback.ledger} >= {
        ("body.1", "Relu.result"),
        ("body.4", "Tanh.result"),
        ("head", "Addmm.mat1"),
        ("Small", "MseLoss.self"),
    }


def test_default_is_8_bits_and_boring_model_fits() -> None:
    trainer = fit(BoringModel(), TinyKGCallback(summary=False), max_steps=2)
    assert set(trainer.callback_metrics) >= METRICS
    assert trainer.callback_metrics["tinykg/bits"] == 8


@pytest.mark.parametrize("attention", ["refresh", "in-graph"])
def test_kgat(attention: Any) -> None:
    def run(*callbacks: L.Callback) -> tuple[Watched, L.Trainer]:
        torch.manual_seed(0)
        model = Watched(dim=32, layer_dims=(32, 16), relation_dim=32, attention=attention)
        data = KGRecDataModule("synthetic:2000", batch_size=256, triple_batch_size="auto")
        return model, fit(model, *callbacks, datamodule=data, max_steps=2)

    plain, _ = run()
    model, trainer = run(tiny(bits=2))
    assert set(trainer.callback_metrics) >= METRICS
    assert trainer.callback_metrics["tinykg/ratio"] > 5
    assert torch.equal(model.losses[0], plain.losses[0])
    assert not same(weights(model), weights(plain))
    exact, trainer = run(tiny(bits=32))
    assert same(weights(exact), weights(plain))
    assert trainer.callback_metrics["tinykg/ratio"] > 1.5


@pytest.mark.parametrize("bits", [0, 3, 16, True, 2.5, "2"])
def test_impossible_bits_are_refused(bits: Any) -> None:
    with pytest.raises(ValueError, match="bits must be one of"):
        TinyKGCallback(bits=bits)


@pytest.mark.parametrize(
    "options", [{"group_size": 0}, {"min_bytes": -1}, {"recipe": "none"}, {"bits": 32, "recipe": "paper"}]
)
def test_impossible_arguments_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        TinyKGCallback(**options)


def test_arguments_reach_the_compression() -> None:
    def codecs(**options: Any) -> set[tuple[str, str]]:
        callback = tiny(**options)
        fit(Small(), callback, max_steps=1)
        assert callback.ledger is not None
        return {(entry.module, entry.codec) for entry in callback.ledger}

    assert ("body.1", "int2") not in codecs()
    assert ("body.1", "int2") in codecs(recipe="paper")
    assert ("head", "exact") not in codecs()
    assert ("head", "exact") in codecs(modules=["!head"])
    assert ("body.3", "exact") in codecs(modules=[nn.Tanh])
    assert not any(codec.startswith("int") for _, codec in codecs(min_bytes=1 << 20))


@pytest.mark.parametrize("whole", ["Small", Small], ids=["name", "class"])
def test_the_lightning_module_stands_for_all_within_it(whole: Any) -> None:
    """Its ``training_step`` is called as a method, past the hooks that see modules run."""

    def rows(modules: Any) -> list[dict[str, Any]]:
        callback = tiny(modules=modules)
        fit(Small(), callback, max_steps=1)
        assert callback.ledger is not None
        return callback.ledger.rows()

    assert rows([whole]) == rows(None)
    if isinstance(whole, str):
        assert all(row["codec"] in ("exact", "held") for row in rows([f"!{whole}"]))


def test_raw_bytes_do_not_depend_on_what_is_compressed() -> None:
    """``modules`` decides what is stored, not what the uncompressed graph would keep."""

    def ledger(**options: Any) -> Ledger:
        callback = tiny(**options)
        fit(Small(), callback, max_steps=1)
        assert callback.ledger is not None
        return callback.ledger

    whole = ledger()
    for modules in (["!head"], ["!body"], ["body.3"], ["!*"]):
        part = ledger(modules=modules)
        assert part.raw_bytes == whole.raw_bytes, modules
        assert whole.stored_bytes < part.stored_bytes <= 1.1 * part.raw_bytes, modules
    assert ledger(bits=32).raw_bytes == whole.raw_bytes


# -- the forward is the user's --------------------------------------------------------------------------------------


def test_forward_and_dropout_are_untouched() -> None:
    plain, model = Small(), Small()
    fit(plain)
    state = torch.get_rng_state()
    fit(model, tiny(bits=2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.losses[0], plain.losses[0])
    assert same(model.masks, plain.masks)
    assert not same(weights(model), weights(plain))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(Small, {}, id="automatic"),
        pytest.param(Small, {"accumulate_grad_batches": 3}, id="accumulation"),
        pytest.param(Small, {"precision": "bf16-mixed"}, id="bf16-mixed"),
        pytest.param(Small, {"precision": "bf16-true"}, id="bf16-true"),
        pytest.param(Small, {"precision": "64-true"}, id="double"),
        pytest.param(Small, {"gradient_clip_val": 0.05}, id="clip-norm"),
        pytest.param(Small, {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}, id="clip-value"),
        pytest.param(TwoOptimizers, {}, id="manual"),
        pytest.param(Quasinewton, {}, id="lbfgs"),
    ],
)
def test_every_way_to_train(kind: Any, options: dict[str, Any]) -> None:
    """At 32 bits nothing changes, to the last bit; at 2 bits every step is compressed and the forward is the same."""
    plain, exact, model = kind(), kind(), kind()
    fit(plain, **options)
    fit(exact, tiny(bits=32), **options)
    trainer = fit(model, tiny(bits=2, recompute="off"), **options)
    assert all(exact.hooked)
    assert all(model.hooked)
    assert not any(plain.hooked)
    assert same(exact.losses, plain.losses)
    assert same(weights(exact), weights(plain))
    assert torch.equal(model.losses[0], plain.losses[0])
    assert len(model.losses) == len(plain.losses)
    assert same(model.masks, plain.masks)
    assert not same(weights(model), weights(plain))
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert set(trainer.callback_metrics) >= METRICS
    assert_clean(trainer)


def test_evaluation_packs_nothing() -> None:
    model, callback = Evaluating(), tiny()
    options: dict[str, Any] = {"inference_mode": False, "limit_val_batches": 1, "num_sanity_val_steps": 1}
    trainer = fit(model, callback, **options, val_check_interval=2)
    assert model.evaluations == ["validate"] * 3
    trainer.limit_test_batches = trainer.limit_predict_batches = 1
    trainer.validate(model, verbose=False)
    trainer.test(model, verbose=False)
    trainer.predict(model)
    assert model.evaluations[3:] == ["validate", "test", "predict"]
    assert all(model.hooked)
    assert_clean(trainer)


def test_evaluation_alone_installs_nothing() -> None:
    trainer = make_trainer(tiny(), inference_mode=False, limit_test_batches=1)
    trainer.test(Evaluating(), verbose=False)
    assert not METRICS & set(trainer.callback_metrics)
    assert_clean(trainer)


def test_training_step_is_wholly_covered() -> None:
    """The loss too, though it is computed outside of any module."""
    found: list[int] = []

    class Counting(Small):
        def on_before_backward(self, loss: Tensor) -> None:
            found.append(packed(loss))

    callback = tiny()
    fit(Counting(), callback, max_steps=2)
    assert callback.ledger is not None
    assert found == [len(callback.ledger)] * 2


# -- the tuners -----------------------------------------------------------------------------------------------------


def test_batch_size_finder_measures_compressed_steps(tmp_path: Path) -> None:
    model, callback = OutOfMemory(), tiny()
    trainer = fit(
        model,
        BatchSizeFinder(init_val=16, max_trials=4, steps_per_trial=1),
        callback,
        default_root_dir=tmp_path,
        max_steps=2,
    )
    assert model.batch_size == 32
    assert set(model.sizes) == {16, 32, 64}
    assert all(model.hooked)
    # the trials leave no trace: the training that follows is that of a run with this batch size from the start
    assert callback.state_dict()["step"] == 2
    assert_clean(trainer)


def test_lr_finder_measures_compressed_steps(tmp_path: Path) -> None:
    model, callback = Small(), tiny()
    trainer = fit(
        model, LearningRateFinder(num_training_steps=5), callback, default_root_dir=tmp_path, max_steps=2, max_epochs=9
    )
    assert len(model.hooked) >= 5
    assert all(model.hooked)
    assert callback.state_dict()["step"] == 2
    assert_clean(trainer)


def test_tuner(tmp_path: Path) -> None:
    model = OutOfMemory()
    trainer = make_trainer(tiny(), default_root_dir=tmp_path)
    assert Tuner(trainer).scale_batch_size(model, init_val=16, max_trials=4, steps_per_trial=1) == 32
    assert_clean(trainer)
    trainer.fit(model)
    assert all(model.hooked)
    assert_clean(trainer)


# -- what fails leaves nothing behind -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (ValueError("boom"), ValueError),
        (torch.OutOfMemoryError("CUDA out of memory."), torch.OutOfMemoryError),
        (KeyboardInterrupt(), SystemExit),
    ],
    ids=["exception", "out-of-memory", "interrupt"],
)
def test_a_failed_fit_leaves_nothing_behind(error: BaseException, raised: type[BaseException]) -> None:
    model, callback = Failing(error), tiny()
    trainer = make_trainer(callback)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(raised):
            trainer.fit(model)
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning switches it off when it is interrupted
    assert len(model.hooked) == 2
    assert_clean(trainer)
    model.error = None
    fresh = fit(model, callback)
    assert all(model.hooked)
    assert len(model.hooked) == 6
    assert_clean(fresh)
    fit(model)
    assert not any(model.hooked[6:])


class Raising(L.Callback):
    """Raises in one hook."""

    def __init__(self, hook: str) -> None:
        def fail(*args: Any, **kwargs: Any) -> None:
            raise ValueError("boom")

        setattr(self, hook, fail)


@pytest.mark.parametrize(
    "hook", ["setup", "on_fit_start", "on_train_start", "on_before_backward", "on_train_batch_end", "on_train_end"]
)
@pytest.mark.parametrize("first", [True, False])
def test_failures_elsewhere_leave_nothing_behind(hook: str, first: bool) -> None:
    callbacks = [Raising(hook), tiny()]
    trainer = make_trainer(*(callbacks if first else callbacks[::-1]))
    with pytest.raises(ValueError, match="boom"):
        trainer.fit(Small())
    assert_clean(trainer)


def test_failure_in_validation_leaves_nothing_behind() -> None:
    class Invalid(Evaluating):
        def evaluate(self, stage: str, batch: Any) -> None:
            raise ValueError("boom")

    trainer = make_trainer(tiny(), limit_val_batches=1, num_sanity_val_steps=0)
    with pytest.raises(ValueError, match="boom"):
        trainer.fit(Invalid())
    assert_clean(trainer)


def test_what_was_wrapped_before_is_wrapped_after() -> None:
    """Another tool's wrapper around the strategy's training step survives, and is called."""
    calls: list[bool] = []
    trainer = make_trainer(tiny(), max_steps=2)
    original = trainer.strategy.training_step

    def other(*args: Any, **kwargs: Any) -> Any:
        calls.append(is_hooked())
        return original(*args, **kwargs)

    wrapper = functools.partial(other)
    trainer.strategy.training_step = wrapper  # type: ignore[method-assign]  # a stand-in
    trainer.fit(Small())
    assert calls == [True, True]
    assert trainer.strategy.__dict__.get("training_step") is wrapper


# -- the module is the user's ---------------------------------------------------------------------------------------


def test_module_can_be_copied_and_pickled_in_mid_fit() -> None:
    found: list[bool] = []

    def check(module: Small) -> None:
        found.append(is_hooked())
        twins: list[Small] = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
        for twin in twins:
            assert "training_step" not in twin.__dict__
            assert twin.training_step.__self__ is twin  # type: ignore[attr-defined]  # a bound method
            assert same(weights(twin), weights(module))
        assert "training_step" not in module.__dict__
        assert b"tinykg" not in pickle.dumps(module)

    class Probe(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            check(pl_module)

    class Copied(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            check(self)
            loss = super().training_step(batch, batch_idx)
            self.losses.clear()
            return loss

    globals()["Copied"] = Copied  # pickle finds a class by its name
    Copied.__qualname__ = "Copied"
    fit(Copied(), tiny(), Probe(), max_steps=2)
    assert found == [True, False] * 2  # in the step, and after it


def test_module_is_let_go_of() -> None:
    def saves() -> int:
        gc.collect()
        return sum(type(thing) is Saved for thing in gc.get_objects())

    before = saves()
    model, callback = Small(), tiny()
    trainer = fit(model, callback, max_steps=2)
    alive, ledger = weakref.ref(model), callback.largest
    assert callback._compression.root is None
    del trainer, model, callback  # Lightning itself gives a callback a reference to the module: `callback.log`
    assert saves() <= before
    assert alive() is None
    assert ledger is not None


def test_weight_averaging_beside_it() -> None:
    plain, model = Small(), Small()
    fit(plain, WeightAveraging())
    fit(model, tiny(bits=32), WeightAveraging())
    assert same(weights(model), weights(plain))
    compressed = Small()
    trainer = fit(compressed, WeightAveraging(), tiny(bits=2))
    assert all(compressed.hooked)
    assert not same(weights(compressed), weights(plain))
    assert_clean(trainer)


# -- more than one --------------------------------------------------------------------------------------------------


def test_two_callbacks_are_refused() -> None:
    with pytest.raises(RuntimeError):
        fit(Small(), tiny(2), tiny(4))
    trainer = make_trainer(tiny(2))
    trainer.callbacks.append(tiny(4))  # type: ignore[attr-defined]  # past Lightning's own check
    with pytest.raises(RuntimeError, match="one TinyKGCallback, got two"):
        trainer.fit(Small())
    assert_clean(trainer)


def test_a_callback_fits_twice() -> None:
    callback, model = tiny(), Small()
    trainer = fit(model, callback, max_steps=2)
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model)
    assert_clean(trainer)
    assert_clean(fit(model, callback, max_steps=2))
    assert all(model.hooked)
    assert len(model.hooked) == 6


def test_second_fit_reports_its_own_ledger(printed: list[str]) -> None:
    """Not that of an earlier fit which happened to be larger."""
    callback = tiny(summary=True)
    fit(Small(batch_size=128), callback, max_steps=1)
    large = callback.largest
    fit(Small(batch_size=64), callback, max_steps=1)
    assert large is not None
    assert callback.largest is not None
    assert callback.largest.raw_bytes < large.raw_bytes
    tables = _tables(printed)
    assert len(tables) == 2
    assert repr(large) in tables[0]
    assert repr(callback.largest) in tables[1]


def test_second_fit_of_a_changed_module_names_its_parts() -> None:
    callback, model = tiny(), Small()
    fit(model, callback, max_steps=1)
    model.head = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4))  # type: ignore[assignment]  # of another type
    fit(model, callback, max_steps=1)
    assert callback.ledger is not None
    assert {entry.module for entry in callback.ledger} >= {"head.0", "head.1"}


# -- where it does not work -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_the_other_package_of_the_same_trainer_is_refused(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``pytorch_lightning.Trainer`` takes any callback; this one says at the first occasion what to write."""
    monkeypatch.setattr(rank_zero, "log", rank_zero.log)  # which the import makes its own
    other = pytest.importorskip("pytorch_lightning")
    from pytorch_lightning.demos.boring_classes import BoringModel as OtherModel

    trainer = other.Trainer(
        accelerator="cpu", callbacks=[tiny()], fast_dev_run=True, enable_progress_bar=False, enable_model_summary=False
    )
    message = (
        r"TinyKGCallback is a callback of lightning\.pytorch\.Trainer, got a pytorch_lightning\..*: write `from light"
    )
    with pytest.raises(TypeError, match=message):
        getattr(trainer, stage)(OtherModel())
    assert not is_hooked()
    assert "training_step" not in trainer.strategy.__dict__


@pytest.mark.parametrize("lazy", [False, True])
def test_modules_that_match_nothing_are_refused(lazy: bool) -> None:
    """Before any step, and once the module is complete."""

    class Lazy(Small):
        def configure_model(self) -> None:
            if lazy and not hasattr(self, "late"):
                self.late = nn.Linear(4, 4)

    model = Lazy()
    trainer = make_trainer(tiny(modules=["boby.*"]))
    with pytest.raises(ValueError, match=r"modules: 'boby\.\*' matches no module of Lazy; the nearest: 'body\.\d'"):
        trainer.fit(model)
    assert not model.hooked
    assert_clean(trainer)
    trainer = make_trainer(tiny(modules=["body.*", "!late"]), max_steps=1)
    if lazy:
        trainer.fit(model)
    else:
        with pytest.raises(ValueError, match="'!late' matches no module"):
            trainer.fit(model)
    assert_clean(trainer)


def test_advice_reaches_the_user_of_torch_func() -> None:
    class Penalized(Small):
        region: Any = contextlib.nullcontext

        def loss(self, batch: Any) -> Tensor:
            loss = super().loss(batch)
            with self.region():
                return loss + torch.func.grad(lambda x: self.head(x).square().sum())(torch.ones(64)).square().mean()

    trainer = make_trainer(tiny())
    with pytest.raises(RuntimeError, match=r"keep_exact\(hooks=False\)"):
        trainer.fit(Penalized())
    assert_clean(trainer)
    plain, model = Penalized(), Penalized()
    model.region = functools.partial(keep_exact, hooks=False)
    fit(plain)
    assert_clean(fit(model, tiny(bits=32)))
    assert same(weights(model), weights(plain))


def test_a_region_of_a_lightning_module() -> None:
    class Partly(Small):
        @keep_exact()
        def loss(self, batch: Any) -> Tensor:
            return super().loss(batch)

    plain, model = Partly(), Partly()
    fit(plain)  # and without the callback it does nothing
    fit(model, tiny(modules=["Partly"]))
    assert all(model.hooked)
    assert same(weights(model), weights(plain))


# -- repeating ------------------------------------------------------------------------------------------------------


def test_noise_is_a_function_of_the_seed() -> None:
    def run(seed: int) -> list[Tensor]:
        model = Small()
        fit(model, tiny(seed=seed))
        return weights(model)

    first = run(0)
    assert same(run(0), first)
    assert not same(run(1), first)


def test_each_step_draws_its_own_noise() -> None:
    grads: list[list[Tensor]] = []

    class Frozen(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            torch.manual_seed(0)
            return super().training_step(batch, batch_idx)

        def on_after_backward(self) -> None:
            grads.append([p.grad.clone() for p in self.parameters() if p.grad is not None])

    fit(Frozen(lr=0.0), tiny(), overfit_batches=1, max_epochs=2)
    assert not same(*grads)


@pytest.mark.parametrize("epochs", [{"limit_train_batches": 2, "max_epochs": 2}, {}], ids=["at-epoch", "mid-epoch"])
def test_a_resumed_fit_repeats_the_uninterrupted_one(tmp_path: Path, epochs: dict[str, Any]) -> None:
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    whole = Seeded()
    fit(whole, tiny(bits=2), save, **epochs)
    checkpoint = tmp_path / "step=2.ckpt"

    def resume(callback: TinyKGCallback) -> Seeded:
        module = Seeded()
        if not epochs:  # a plain DataLoader starts anew in mid-epoch
            module.train_dataloader = lambda: DataLoader(  # type: ignore[method-assign]  # a stand-in
                torch.utils.data.Subset(examples(), range(128, 256)), batch_size=64
            )
        fit(module, callback, ckpt_path=checkpoint, **epochs)
        return module

    resumed = resume(tiny(bits=2))
    assert len(resumed.losses) == 2
    assert same(resumed.losses, whole.losses[2:])
    assert same(weights(resumed), weights(whole))

    class Forgetful(TinyKGCallback):
        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            """Starts its noise anew; the run then differs, so the above proves something."""

        @property
        def state_key(self) -> str:
            return "TinyKGCallback"

    assert not same(weights(resume(Forgetful(bits=2, summary=False))), weights(whole))


@pytest.mark.parametrize(
    "where", ["training_step", "on_before_backward", "on_after_backward", "on_before_optimizer_step"]
)
@pytest.mark.parametrize(
    ("error", "raised"),
    [(ValueError("boom"), ValueError), (KeyboardInterrupt(), SystemExit)],
    ids=["error", "interrupt"],
)
def test_an_interrupted_fit_resumes_where_it_was(
    tmp_path: Path, where: str, error: BaseException, raised: type[BaseException]
) -> None:
    """Wherever in a batch it ends: the batch is begun again, with the noise that it would have had."""

    class Interrupted(Seeded):
        """Its batch is a function of the step: Lightning goes on behind the batch at which it was interrupted."""

        def __init__(self) -> None:
            super().__init__()
            self.error: BaseException | None = None

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters())

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            rows = slice(64 * self.global_step, 64 * (self.global_step + 1))
            loss = super().training_step([part[rows] for part in examples().tensors], batch_idx)
            if where == "training_step":
                self.fail()
            return loss

        def fail(self, *args: Any) -> None:
            if self.error is not None and self.trainer.global_step == 2:
                raise self.error

    whole, failing, resumed = Interrupted(), Interrupted(), Interrupted()
    fit(whole, tiny())
    failing.error = error
    if where != "training_step":
        setattr(failing, where, failing.fail)
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(raised):
            fit(failing, OnExceptionCheckpoint(tmp_path), tiny(), enable_checkpointing=True)
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning switches it off when it is interrupted
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert saved["global_step"] == saved["callbacks"]["TinyKGCallback"]["step"] == 2
    fit(resumed, tiny(), ckpt_path=tmp_path / "on_exception.ckpt", max_steps=4, max_epochs=2)
    assert same(resumed.losses, whole.losses[2:])
    assert same(weights(resumed), weights(whole))


def test_a_failure_between_batches_counts_what_was_done() -> None:
    callback = tiny()
    trainer = make_trainer(callback, Raising("on_validation_start"), limit_val_batches=1, num_sanity_val_steps=0)
    with pytest.raises(ValueError, match="boom"):
        trainer.fit(Evaluating())
    assert callback.state_dict()["step"] == 4


def test_checkpoint_holds_plain_primitives(tmp_path: Path) -> None:
    trainer = fit(Small(), tiny(), max_steps=3)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    checkpoint = torch.load(tmp_path / "model.ckpt", weights_only=True)
    state = checkpoint["callbacks"]["TinyKGCallback"]
    assert state.items() >= {"step": 3, "epoch": 0, "optimizer_steps": 3}.items()
    assert set(state) - {"step", "epoch", "optimizer_steps"} == {"largest_step"}
    assert set(checkpoint["state_dict"]) == set(Small().state_dict())
    Small.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    fit(Small(), tiny(), ckpt_path=tmp_path / "model.ckpt", max_steps=4)
    fit(Small(), ckpt_path=tmp_path / "model.ckpt", max_steps=4)  # and without the callback


# -- the summary ----------------------------------------------------------------------------------------------------


def _tables(messages: list[str]) -> list[str]:
    return [message for message in messages if "Saved tensors" in message]


def test_summary_is_printed_once(printed: list[str]) -> None:
    callback = TinyKGCallback(bits=2)
    fit(Small(), callback)
    (table,) = _tables(printed)
    assert callback.largest is not None
    assert repr(callback.largest) in table
    assert "Relu.result" in table


def test_no_summary(printed: list[str]) -> None:
    fit(Small(), TinyKGCallback(bits=2, summary=False))
    assert not _tables(printed)


def test_summary_is_of_the_largest_step() -> None:
    class Growing(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            size = 64 if batch_idx == 1 else 16
            return super().training_step([part[:size] for part in batch], batch_idx)

    callback, sizes = tiny(), []

    class Sizes(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            assert callback.ledger is not None
            sizes.append(callback.ledger.raw_bytes)

    fit(Growing(), callback, Sizes())
    assert callback.largest is not None
    assert callback.largest.raw_bytes == max(sizes) == sizes[1] > sizes[0]


def test_fit_without_a_step(printed: list[str]) -> None:
    trainer = fit(Small(), TinyKGCallback(bits=2), max_steps=0)
    assert not _tables(printed)
    assert_clean(trainer)


def test_steps_that_save_nothing_or_are_skipped() -> None:
    class Idle(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx else self.head.bias.sum()

    trainer = fit(Idle(), TinyKGCallback(bits=2))
    assert trainer.callback_metrics["tinykg/ratio"] == 1
    assert_clean(trainer)
