"""``SGQuantCallback`` in a Trainer: when it quantizes, what it logs, and that a resumed fit repeats."""

import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from networks import AGNN, CLASSES, NODES, gat, graph
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader

from lightning_tinykg import KGAT, BitPlan, KGRecDataModule, LightGCN
from lightning_tinykg.sgquant import SGQuantCallback, componentwise, layerwise, topologywise


def loader() -> DataLoader:
    x, edge_index = graph()
    return DataLoader([Data(x=x, edge_index=edge_index, y=x[:, :CLASSES].argmax(dim=1))])


class Classifier(L.LightningModule):
    """Node classification on one graph; remembers what its network put out, and when."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = net or gat(dropout=0.3)
        self.losses: list[float] = []
        self.outputs: dict[str, list[Tensor]] = {"train": [], "val": [], "test": []}

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        out: Tensor = self.net(x, edge_index)
        return out

    def step(self, batch: Data, stage: str) -> Tensor:
        out = self.net(batch.x, batch.edge_index)
        if self.net.training == (stage == "train"):
            self.outputs[stage].append(out.detach().clone())
        loss = F.cross_entropy(out, batch.y)
        self.log(f"{stage}/loss", loss, batch_size=1)
        return loss

    def training_step(self, batch: Data, batch_idx: int) -> Tensor:
        torch.manual_seed(100 + self.trainer.global_step)  # dropout repeats, however the fit came here
        loss = self.step(batch, "train")
        if self.training:
            self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Data, batch_idx: int) -> None:
        self.step(batch, "val")

    def test_step(self, batch: Data, batch_idx: int) -> None:
        self.step(batch, "test")

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.02)

    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader()

    def test_dataloader(self) -> Any:
        return loader()


def levels(out: Tensor) -> int:
    return len(out.unique())


def plan() -> BitPlan:
    """Few levels in the model's output, so that one sees whether it is quantized."""
    return BitPlan({("net.conv2", "update"): 2}, default=8)


def test_the_last_epochs_train_and_validate_quantized(quiet: Any) -> None:
    model, callback = Classifier(), SGQuantCallback(plan(), finetune_epochs=2)
    trainer = L.Trainer(max_epochs=5, callbacks=[callback], **quiet)
    trainer.fit(model)
    for stage in ("train", "val"):
        assert [levels(out) <= 4 for out in model.outputs[stage]] == [False, False, False, True, True]
    assert len(model.losses) == 5  # the calibration was no training step
    assert callback.is_active
    metrics = trainer.callback_metrics
    assert callback.quantizer is not None
    memory = callback.quantizer.memory()
    assert metrics["sgquant/average_bits"].item() == pytest.approx(memory.average_bits)
    assert metrics["sgquant/packed_MiB"].item() == pytest.approx(memory.packed_bytes / 2**20)
    assert metrics["sgquant/ratio"].item() == pytest.approx(memory.ratio)
    assert "train/loss" in metrics

    # detached after the fit, quantized in a test
    with torch.no_grad():
        assert levels(model.eval().net(*graph())) > 4
    trainer.test(model, verbose=False)
    assert levels(model.outputs["test"][0]) <= 4
    assert torch.equal(model.outputs["test"][0], model.outputs["val"][-1])
    with torch.no_grad():
        assert torch.equal(callback.pack()(*graph()), model.outputs["test"][0])


def test_without_finetuning_the_training_is_untouched_and_the_test_is_quantized(quiet: Any) -> None:
    plain, model = Classifier(), Classifier()
    L.Trainer(max_epochs=3, **quiet).fit(plain)
    callback = SGQuantCallback(plan())
    trainer = L.Trainer(max_epochs=3, callbacks=[callback], **quiet)
    trainer.fit(model)
    assert model.losses == plain.losses
    assert callback.is_active
    trainer.test(model, verbose=False)
    assert levels(model.outputs["test"][0]) <= 4


@pytest.mark.parametrize("stage", ["test", "validate"])
def test_a_trained_model_is_calibrated_when_it_is_evaluated(quiet: Any, stage: str) -> None:
    model, callback = Classifier(), SGQuantCallback(plan())
    trainer = L.Trainer(callbacks=[callback], **quiet)
    getattr(trainer, stage)(model, verbose=False)
    assert levels(model.outputs["test" if stage == "test" else "val"][-1]) <= 4
    assert callback.quantizer is not None
    assert not callback.quantizer.is_attached


def test_without_training_data_it_is_calibrated_on_what_is_evaluated(quiet: Any) -> None:
    class Untrained(Classifier):
        train_dataloader = L.LightningModule.train_dataloader

    model = Untrained()
    L.Trainer(callbacks=[SGQuantCallback(plan())], **quiet).test(model, loader(), verbose=False)
    assert levels(model.outputs["test"][-1]) <= 4


def test_a_fit_resumed_amid_the_finetuning_repeats_bit_for_bit(quiet: Any, tmp_path: Path) -> None:
    quiet = quiet | {"enable_checkpointing": True}

    def fit(epochs: int, ckpt_path: Path | None = None) -> Classifier:
        callback = SGQuantCallback(topologywise([8, 4, 4, 2]), finetune_epochs=4 - (6 - epochs), protect=(0.0, 0.5))
        saving = ModelCheckpoint(tmp_path / str(epochs), save_last=True)
        model = Classifier()
        trainer = L.Trainer(max_epochs=epochs, callbacks=[callback, saving], **quiet)
        trainer.fit(model, ckpt_path=ckpt_path, weights_only=ckpt_path is not None or None)
        return model

    whole = fit(6)  # quantized from the third epoch on
    first = fit(4)
    rest = fit(6, ckpt_path=tmp_path / "4" / "last.ckpt")
    assert first.losses + rest.losses == whole.losses
    for name, value in whole.state_dict().items():
        assert torch.equal(rest.state_dict()[name], value)


def test_the_best_checkpoint_is_tested_with_its_own_ranges(quiet: Any, tmp_path: Path) -> None:
    quiet = quiet | {"enable_checkpointing": True}
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    callback = SGQuantCallback(plan(), finetune_epochs=2)
    model = Classifier()
    L.Trainer(max_epochs=4, callbacks=[callback, saving], **quiet).fit(model)
    again = SGQuantCallback(32)
    fresh = Classifier()
    trainer = L.Trainer(callbacks=[again], **quiet)
    trainer.test(fresh, ckpt_path=tmp_path / "epoch=2.ckpt", weights_only=True, verbose=False)
    assert torch.equal(fresh.outputs["test"][-1], model.outputs["val"][2])


def test_a_second_fit_begins_in_full_precision(quiet: Any) -> None:
    callback = SGQuantCallback(plan(), finetune_epochs=1)
    for _ in range(2):
        model = Classifier()
        L.Trainer(max_epochs=2, callbacks=[callback], **quiet).fit(model)
        assert [levels(out) <= 4 for out in model.outputs["train"]] == [False, True]


def test_ranges_are_of_as_many_batches_as_asked_for(quiet: Any) -> None:
    for batches in (1, 3):
        callback = SGQuantCallback(finetune_epochs=5, calibration_batches=batches)
        L.Trainer(max_epochs=5, callbacks=[callback], **quiet).fit(Classifier())
        assert callback.quantizer is not None
        seen = [site.observed.seen[-1] for site in callback.quantizer.sites.values() if site.observed is not None]
        assert set(seen) == {batches}


@pytest.mark.parametrize("make", [KGAT, LightGCN])
def test_recommenders_are_fine_tuned_and_ranked_quantized(make: Any, quiet: Any) -> None:
    quiet = quiet | {"limit_train_batches": 4}
    data = KGRecDataModule("synthetic:2000", batch_size=256, triple_batch_size="auto" if make is KGAT else None)
    model = make(dim=8, layer_dims=(8,)) if make is KGAT else make(dim=8, num_layers=2)
    callback = SGQuantCallback(componentwise(embedding=4, update=4, attention=8), finetune_epochs=1)
    trainer = L.Trainer(max_epochs=2, callbacks=[callback], **quiet)
    trainer.fit(model, data)
    assert callback.quantizer is not None
    parameters = {site.parameter for site in callback.quantizer.sites.values()} - {None}
    assert parameters == {"embedding.weight" if make is KGAT else "encoder.embedding.weight"}
    (quantized,) = trainer.test(model, data, verbose=False)
    (plain,) = L.Trainer(**quiet).test(model, data, verbose=False)
    assert quantized["sgquant/average_bits"] < 8
    assert quantized["test/recall@20"] != plain["test/recall@20"]


def test_an_exception_leaves_the_module_as_it_was(quiet: Any) -> None:
    class Failing(Classifier):
        def on_train_batch_end(self, *args: Any) -> None:
            if self.trainer.current_epoch == 1:
                raise RuntimeError("it failed")

    model = Failing()
    with pytest.raises(RuntimeError, match="it failed"):
        L.Trainer(max_epochs=2, callbacks=[SGQuantCallback(plan(), finetune_epochs=2)], **quiet).fit(model)
    assert "forward" not in vars(model.net)
    assert "log" not in vars(model)
    pickle.dumps(model.net)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": 3.5}, r"bits must be one of .*, got 3\.5"),
        ({"finetune_epochs": -1}, "finetune_epochs must be a whole number of at least 0, got -1"),
        ({"calibration_batches": 0}, "calibration_batches must be a whole number of at least 1, got 0"),
    ],
)
def test_arguments_that_cannot_be_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SGQuantCallback(**options)


def test_what_does_not_fit_the_module_is_named_before_it_trains(quiet: Any) -> None:
    def fit(model: Any, callback: SGQuantCallback, **options: Any) -> None:
        L.Trainer(callbacks=[callback], **quiet, **({"max_epochs": 1} | options)).fit(model)

    with pytest.raises(
        ValueError, match="MessagePassing layers, which are what is quantized, got a BoringModel without"
    ):
        fit(BoringModel(), SGQuantCallback())
    with pytest.raises(ValueError, match=r"match nothing: net\.conv3"):
        fit(Classifier(), SGQuantCallback(layerwise({"net.conv3": 2})))
    with pytest.raises(ValueError, match="finetune_epochs=1 counts from the last epoch: give the Trainer max_epochs"):
        fit(Classifier(), SGQuantCallback(finetune_epochs=1), max_epochs=-1, max_steps=2)
    manual = Classifier(AGNN())
    manual.automatic_optimization = False
    with pytest.raises(RuntimeError, match="give calibration_step"):
        fit(manual, SGQuantCallback(finetune_epochs=1))
    with pytest.raises(RuntimeError, match="pack needs a calibrated module"):
        SGQuantCallback().pack()


def test_a_calibration_step_of_ones_own(quiet: Any) -> None:
    model = Classifier()
    seen: list[int] = []

    def step(module: Any, batch: Data) -> Tensor:
        seen.append(batch.num_nodes)
        assert not module.training
        out: Tensor = module.net(batch.x, batch.edge_index)
        return out

    callback = SGQuantCallback(plan(), finetune_epochs=1, calibration_step=step)
    L.Trainer(max_epochs=2, callbacks=[callback], **quiet).fit(model)
    assert seen == [NODES]
