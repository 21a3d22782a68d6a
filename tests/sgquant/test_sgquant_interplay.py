"""``SGQuantCallback`` and what else a Trainer can do: TinyKG, bfloat16, accumulation, two optimizers."""

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from networks import CLASSES, gat, graph
from torch import Tensor
from torch.nn import functional as F
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader

from lightning_tinykg import BitPlan, TinyKGCallback
from lightning_tinykg.sgquant import SGQuantCallback

PLAN = BitPlan({("net.conv2", "update"): 2}, default=8)
"""Four levels in the model's output, so that one sees whether it is quantized."""


class Classifier(L.LightningModule):
    """Node classification on a few graphs; remembers its losses, and how many levels its output had."""

    def __init__(self, graphs: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.graphs = gat(), graphs
        self.losses: list[float] = []
        self.levels: dict[str, list[int]] = {"train": [], "val": []}

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        out: Tensor = self.net(x, edge_index)
        return out

    def step(self, batch: Data, stage: str) -> Tensor:
        out = self(batch.x, batch.edge_index)
        loss = F.cross_entropy(out.float(), batch.y)
        if self.training == (stage == "train"):  # and not in a calibration
            self.levels[stage].append(len(out.unique()))
            self.losses += [loss.item()] if stage == "train" else []
        return loss

    def training_step(self, batch: Data, batch_idx: int) -> Any:
        return self.step(batch, "train")

    def validation_step(self, batch: Data, batch_idx: int) -> None:
        self.step(batch, "val")

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.02)

    def loader(self) -> DataLoader:
        x, edge_index = graph()
        graphs = [x * (1 + number / 4) for number in range(self.graphs)]
        return DataLoader([Data(x=x, edge_index=edge_index, y=x[:, :CLASSES].argmax(dim=1)) for x in graphs])

    train_dataloader = val_dataloader = loader


def fitted(quiet: Any, *callbacks: L.Callback, model: Classifier | None = None, **options: Any) -> Classifier:
    model = model or Classifier()
    L.Trainer(**{"max_epochs": 4, "callbacks": list(callbacks), **quiet, **options}).fit(model)
    return model


def assert_quantized(model: Classifier, fine_tuned: int) -> None:
    """In the last steps and validations, not before, and no more after the fit."""
    for levels in model.levels.values():
        assert [count <= 4 for count in levels] == [False] * (len(levels) - fine_tuned) + [True] * fine_tuned
    assert "forward" not in vars(model.net)


ORDERS: dict[str, Callable[..., list[L.Callback]]] = {
    "TinyKG first": lambda tinykg, sgquant: [tinykg, sgquant],
    "SGQuant first": lambda tinykg, sgquant: [sgquant, tinykg],
}


@pytest.mark.parametrize("order", ORDERS)
def test_activations_of_the_fine_tuning_are_compressed_too(quiet: Any, order: str) -> None:
    """Exactly at 32 bits: the losses are those without it, to the last bit. At 2 bits it trains, and stores less."""
    alone = fitted(quiet, SGQuantCallback(PLAN, finetune_epochs=2))
    stored = {}
    for bits in (32, 2):
        tinykg = TinyKGCallback(bits=bits, min_bytes=0)
        model = fitted(quiet, *ORDERS[order](tinykg, SGQuantCallback(PLAN, finetune_epochs=2)))
        assert_quantized(model, fine_tuned=2)
        assert tinykg.ledger is not None
        stored[bits] = tinykg.ledger.stored_bytes
        assert stored[bits] < tinykg.ledger.raw_bytes
        if bits == 32:
            assert model.losses == alone.losses
    assert stored[2] < stored[32]
    assert model.losses != alone.losses
    assert model.losses[-1] < model.losses[0]


def test_in_bfloat16_the_output_has_its_levels_and_gradients_pass(quiet: Any) -> None:
    model, start = Classifier(), Classifier().state_dict()
    fitted(quiet, SGQuantCallback(PLAN, finetune_epochs=2), model=model, precision="bf16-mixed", max_epochs=2)
    assert_quantized(model, fine_tuned=2)
    assert all(not torch.equal(value, start[name]) for name, value in model.state_dict().items())


def test_gradients_are_accumulated_over_batches_of_one_range(quiet: Any) -> None:
    """Two batches a step: the ranges are of the first two batches, and stay."""
    callback = SGQuantCallback(PLAN, finetune_epochs=2, calibration_batches=2)
    model = fitted(quiet, callback, model=Classifier(graphs=4), accumulate_grad_batches=2)
    assert_quantized(model, fine_tuned=2 * 4)
    assert callback.quantizer is not None
    seen = {site.observed.seen[-1] for site in callback.quantizer.sites.values() if site.observed is not None}
    assert seen == {2}


def test_an_evaluation_before_the_fit_changes_nothing_in_it(quiet: Any) -> None:
    plain = fitted(quiet, SGQuantCallback(PLAN, finetune_epochs=2))
    model, callback = Classifier(), SGQuantCallback(PLAN, finetune_epochs=2)
    trainer = L.Trainer(max_epochs=4, callbacks=[callback], **quiet)
    trainer.validate(model, verbose=False)
    assert model.levels["val"].pop() <= 4
    trainer.fit(model)
    assert_quantized(model, fine_tuned=2)
    assert model.losses == plain.losses


def compiled(model: Classifier, how: str) -> Any:
    """A part of the model compiled, in place or as an attribute, or the whole, as it is given to a Trainer."""
    if how == "attribute":
        model.net = torch.compile(model.net, backend="eager")
    elif how == "in place":
        model.net.compile(backend="eager")
    elif how == "a layer":
        model.net.conv1.compile(backend="eager")
    return torch.compile(model, backend="eager") if how == "the whole" else model


@pytest.mark.compile
@pytest.mark.parametrize("how", ["attribute", "in place", "a layer", "the whole"])
def test_a_compiled_model_is_quantized_and_packed_as_it_is_written(how: str, quiet: Any) -> None:
    found = {}
    for way in ("", how):
        model, callback = Classifier(), SGQuantCallback(4, finetune_epochs=2)
        L.Trainer(**quiet, max_epochs=4, callbacks=[callback]).fit(compiled(model, way))
        with callback.quantizer, torch.no_grad():
            simulated = model(*graph())
        found[way] = model.losses, simulated, callback.pack()(*graph()) + 0
    plain, ours = found.values()
    assert ours[0] == plain[0]
    assert torch.equal(ours[1], plain[1])
    assert torch.equal(ours[2], plain[1])


class TwoOptimizers(Classifier):
    """Steps its two optimizers itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Data, batch_idx: int) -> None:
        loss = self.step(batch, "train")
        self.manual_backward(loss)
        for optimizer in self.optimizers():  # type: ignore[union-attr]  # two
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net.conv1, self.net.conv2)]


@pytest.mark.parametrize("finetune_epochs", [0, 2])
def test_two_optimizers_need_a_calibration_step(quiet: Any, finetune_epochs: int) -> None:
    refused = TwoOptimizers()
    with pytest.raises(RuntimeError, match="give calibration_step"):
        fitted(quiet, SGQuantCallback(PLAN, finetune_epochs=finetune_epochs), model=refused)
    assert not refused.losses  # before the first step, not after the last
    callback = SGQuantCallback(
        PLAN,
        finetune_epochs=finetune_epochs,
        calibration_step=lambda module, batch: module(batch.x, batch.edge_index),
    )
    model = fitted(quiet, callback, model=TwoOptimizers())
    assert_quantized(model, fine_tuned=finetune_epochs)
    assert callback.is_active
    assert callback.pack()(*graph()).unique().numel() <= 4
