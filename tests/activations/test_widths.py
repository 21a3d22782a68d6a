"""How many bits: at least what the rule asks, more where more is cheap, and never at more than a hundredth."""

import pytest
import torch

from lightning_tinykg.activations.rules import EXACT, LINEAR, RELU, SMOOTH
from lightning_tinykg.activations.storages import Layout
from lightning_tinykg.activations.widths import Widths
from lightning_tinykg.bits import BitPlan

MIB = 2**20


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_rule_asks_for_at_least(bits: int) -> None:
    widths, rows, coefficients = Widths(BitPlan(default=bits), None), torch.empty(100, 64), torch.empty(100, 4)
    assert widths.least(rows, LINEAR) == bits
    assert widths.least(rows, SMOOTH) >= max(bits, 4)
    assert widths.least(coefficients, LINEAR) >= max(bits, 4)
    assert widths.least(rows, EXACT) == widths.least(rows, RELU) == 32
    assert widths.least(torch.empty(100, 64, dtype=torch.int64), LINEAR) == 32


def test_exact_mode_asks_for_all() -> None:
    assert Widths(BitPlan(default=32), None).least(torch.empty(100, 64), LINEAR) == 32


def test_small_tensors_get_more_bits_at_no_more_than_a_hundredth() -> None:
    widths = Widths(BitPlan(default=2), None)
    widths.charge(100 * MIB)
    small = Layout.of(torch.empty(4096, 64))  # 1 MiB
    given, extra = [], 0
    for _ in range(200):
        bits = widths.better(small, 4, least=2)
        widths.spend(small, bits, least=2)
        extra += widths.size(small, bits) - widths.size(small, 2)
        given.append(bits)
    assert given[0] == 8
    assert given[-1] == 2
    assert MIB / 2 < extra <= MIB


def test_equals_get_no_more_than_was_asked_for() -> None:
    widths = Widths(BitPlan(default=2), None)
    layout = Layout.of(torch.empty(4096, 64))
    for _ in range(20):
        widths.charge(MIB)
        assert widths.better(layout, 4, least=2) == 2
