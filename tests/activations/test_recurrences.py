"""Chains of ops: what is made again of what was made before it, step by step."""

from typing import Any

import pytest
import torch
from comparing import weighted
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_tinykg import compress_activations
from lightning_tinykg.activations.costs import DEEPEST
from lightning_tinykg.activations.hindsight import records_in
from lightning_tinykg.activations.keeping import Coded, Record
from lightning_tinykg.activations.remaking import Making, Remade
from lightning_tinykg.activations.repeatable import FLOPS_PER_BYTE
from lightning_tinykg.activations.storages import Layout


class Recurrent(nn.Module):
    """An LSTM by hand: its gates are parts of one product, and each step is made of the one before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.of_input, self.of_state = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width)

    def forward(self, inputs: Tensor) -> Tensor:
        state = memory = torch.zeros_like(inputs[0])
        for x in inputs:
            gates = self.of_input(x) + self.of_state(state)
            write, keep, new, read = gates.chunk(4, dim=-1)
            memory = keep.sigmoid() * memory + write.sigmoid() * new.tanh()
            state = read.sigmoid() * memory.tanh()
        return state


@pytest.mark.parametrize(("bits", "ratio"), [(32, 5.8), (8, 9), (4, 11), (2, 12)])
def test_what_is_made_of_what_came_before_is_not_made_from_the_start(
    bits: int, ratio: float, runs: list[Making]
) -> None:
    """Each op that it is made by is some calls deep in the backward: in exact mode 80 steps were too many of them."""
    torch.manual_seed(0)
    model, inputs = Recurrent(32), torch.randn(80, 64, 32)
    with compress_activations(bits, min_bytes=0) as ledger:
        loss = weighted(model(inputs))
    loss.backward()
    assert ledger.ratio > ratio
    assert 1 < max(making.depth for making in runs) <= DEEPEST


def test_all_parts_of_what_is_made_take_all_the_work() -> None:
    """Each of them a quarter of it, also where one tensor is made of all four."""
    x, layer = torch.randn(200, 16, requires_grad=True), nn.Linear(16, 256)
    with compress_activations(32) as ledger:
        first, second, third, fourth = layer(x).chunk(4, dim=-1)
        weighted((first + second + third + fourth).exp())
    (entry,) = [entry for entry in ledger if entry.op == "Exp.result"]
    product = (1 + 16 / FLOPS_PER_BYTE) * 200 * 256 * 4
    assert product < entry.work < 2 * product


def test_what_something_is_made_of_is_looked_into_once() -> None:
    """And not by every way to it, of which there may be more than a training lasts."""
    layout = Layout.of(torch.ones(3))
    kept: Any = Coded(Record(StorageWeakRef(torch.ones(3).untyped_storage())), layout)
    for _ in range(16):
        kept = Remade(Making(torch.add, (kept, kept), {}, (3,), None, torch.float32, None), layout)
    assert len(list(records_in(kept))) == 2  # the first op is given it twice
