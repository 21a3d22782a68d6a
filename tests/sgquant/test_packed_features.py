"""Packed features: a tensor for whoever uses it, and the fake-quantized values to the last bit."""

import copy
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_tinykg.sgquant.order import RowOrder
from lightning_tinykg.sgquant.packed import PackedFeatures
from lightning_tinykg.sgquant.quantize import Level, fake_quantize
from lightning_tinykg.sgquant.runs import RunWriter, run_of, runs_nbytes

sys.path.insert(0, str(Path(__file__).parents[1] / "codecs"))
from memory import LiveBytes  # a helper of the codecs' tests

LEVELS = (Level(8, -2.0, 2.0), Level(32), Level(3, -1.5, 2.5), Level(1, -1.0, 1.0))
WIDTHS = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 16, 32])


def mixed(rows: int = 60, dim: int = 12) -> tuple[PackedFeatures, Tensor]:
    """Features of four widths, and what they are worth."""
    x, bucket = torch.randn(rows, dim), torch.randint(0, 4, (rows,))
    return PackedFeatures.encode(x, LEVELS, RowOrder.of_buckets(bucket, 4)), fake_quantize(x, LEVELS, bucket)


@settings(max_examples=80, deadline=None)
@given(
    bits=st.lists(WIDTHS, min_size=1, max_size=4),
    rows=st.integers(0, 40),
    shape=st.sampled_from([(5,), (1,), (3, 4), ()]),
    per_row=st.booleans(),
    run=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_packed_is_worth_what_is_simulated(
    bits: list[int], rows: int, shape: tuple[int, ...], per_row: bool, run: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    x, bucket = torch.randn(rows, *shape), torch.randint(0, len(bits), (rows,))
    per_row &= not run
    levels = [Level(b) if per_row or b == 32 else Level(b, -1.5, 1.0 + b) for b in bits]
    order = RowOrder.of_buckets(bucket, len(bits)) if len(bits) > 1 else None
    if run and order is not None:
        order = RowOrder(order.counts, row=order.rows(slice(None)))  # as edges have it
    packed = PackedFeatures.encode(x, levels, order, run_of(x[:1].numel()) if run else 1)
    expected = fake_quantize(x, levels, bucket)
    assert packed.shape == x.shape
    assert torch.equal(packed.decode(), expected)
    if rows:
        index = torch.randint(0, rows, (9,))
        assert torch.equal(packed.decode(index), expected[index])
        assert torch.equal(packed.decode(slice(3, 20)), expected[3:20])


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x @ torch.ones(12, 5),
        lambda x: F.linear(x, torch.linspace(-1, 1, 60).view(5, 12)),
        lambda x: F.linear(x, torch.linspace(-1, 1, 60).view(5, 12), torch.arange(5.0)),
        lambda x: torch.addmm(torch.arange(300.0).view(60, 5), x, torch.ones(12, 5), beta=2, alpha=0.5),
        lambda x: x[7],
        lambda x: x[-1],
        lambda x: x[3:50],
        lambda x: x[50:3],
        lambda x: x[:, 2:4],
        lambda x: x[torch.tensor([5, -1, 5])],
        lambda x: x[torch.arange(60) % 3 == 0],
        lambda x: x[torch.tensor([1, 2]), torch.tensor([3, 4])],
        lambda x: x.index_select(0, torch.tensor([5, 59])),
        lambda x: x.index_select(-2, torch.tensor([5, 59])),
        lambda x: x.index_select(1, torch.tensor([5, 1])),
        lambda x: F.embedding(torch.tensor([[1, 2], [3, 59]]), x),
        lambda x: torch.cat([x, x]),
        lambda x: x.split([10, 50])[1],
        lambda x: x.t() @ x,
        lambda x: x.relu() + x,
        lambda x: x.view(-1, 3, 4).sum(-1),
        lambda x: x.double(),
        lambda x: F.dropout(x, 0.5, False).detach().to("cpu") * 2,
        lambda x: torch.stack(list(x)),
        lambda x: torch.tensor(x.tolist()),
        lambda x: torch.from_numpy(x.numpy()),
    ],
)
@pytest.mark.parametrize("grad_mode", [True, False])
def test_it_can_be_used_as_the_tensor_it_is_worth(use: Callable[[Tensor], Tensor], grad_mode: bool) -> None:
    packed, dense = mixed()
    with torch.set_grad_enabled(grad_mode):
        found = use(packed)
    assert type(found) is Tensor
    assert torch.equal(found, use(dense))


def test_asking_for_its_shape_or_passing_it_on_decodes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, dense = mixed(rows=4000)
    monkeypatch.delattr(PackedFeatures, "decode_slots")
    assert (packed.shape, packed.dim(), packed.numel(), len(packed)) == (dense.shape, 2, dense.numel(), 4000)
    assert (packed.dtype, packed.device, packed.is_floating_point()) == (torch.float32, dense.device, True)
    for same in (packed.detach(), F.dropout(packed, 0.5, False), packed.to(torch.float32), packed.clone()):
        assert isinstance(same, PackedFeatures)
    assert F.dropout(packed, 0.5, False) is packed
    with pytest.raises(AttributeError, match="decode_slots"):
        packed.relu()
    assert packed.nbytes < dense.nbytes / 2
    assert "bits 1 and 3 and 8 and 32" in repr(packed)


def test_a_product_decodes_some_rows_at_a_time() -> None:
    packed = PackedFeatures.encode(torch.randn(40_000, 100), [Level(2, -2.0, 2.0)])
    weight = torch.randn(100, 8)
    with LiveBytes() as live:
        out = packed @ weight
    assert live.peak < out.nbytes + packed.decode().nbytes / 2


def test_a_write_is_seen_in_it_and_not_in_its_copies() -> None:
    for write in (
        lambda x: x.mul_(2),
        lambda x: x.__setitem__(3, 7.0),
        lambda x: x.index_fill_(0, torch.tensor([1]), 5.0),
        lambda x: torch.add(torch.ones(60, 12), 1, out=x),
        lambda x: F.relu(x, inplace=True),
    ):
        packed, dense = mixed()
        was, other = dense.clone(), packed.clone()
        write(packed)
        write(dense)
        assert torch.equal(packed.decode(), dense)
        assert torch.equal(other.decode(), was)


def test_it_is_copied_pickled_and_a_parameter_without_gradient() -> None:
    packed, dense = mixed()
    for same in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), nn.Parameter(packed, requires_grad=False)):
        assert isinstance(same, PackedFeatures)
        assert torch.equal(same.decode(), dense)


def test_it_can_have_no_gradient() -> None:
    packed, _ = mixed()
    for ask in (packed.requires_grad_, lambda: nn.Parameter(packed), lambda: setattr(packed, "requires_grad", True)):
        with pytest.raises(RuntimeError, match="can't require a gradient"):
            ask()
    assert not packed.requires_grad
    weight = torch.ones(12, 5, requires_grad=True)
    (packed @ weight).sum().backward()  # the weights can, though
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, packed.decode().sum(0)[:, None].expand(12, 5))


def test_runs_waste_no_bits_and_are_written_in_order() -> None:
    x, levels = torch.rand(1000), [Level(2, 0.0, 1.0)]
    packed = PackedFeatures.empty((1000,), levels, run=run_of(1))
    writer = RunWriter(packed, levels)
    for piece in x.split([1, 300, 7, 0, 692]):
        writer.write(piece)
    assert torch.equal(packed.decode(), fake_quantize(x, levels))
    assert packed.nbytes == runs_nbytes(1000, 1, 2) <= 1000 * 2 / 8 + 32 + 8
    with pytest.raises(ValueError, match="must be filled by a RunWriter"):
        packed.store(slice(0, 3), x[:3], levels)


def test_parts_that_do_not_belong_together_are_refused() -> None:
    packed, _ = mixed()
    order = packed.order
    assert order is not None
    with pytest.raises(ValueError, match="order must be given for 4 parts"):
        PackedFeatures(packed.parts)
    with pytest.raises(ValueError, match="parts must be of"):
        PackedFeatures(packed.parts, RowOrder((60, 0, 0, 0), slot=order.slot))
    with pytest.raises(ValueError, match="parts must be at least one"):
        PackedFeatures([])
    with pytest.raises(ValueError, match="levels and order must be of 60 rows, got 1 levels"):
        PackedFeatures.empty((60, 12), LEVELS[:1], order)
    with pytest.raises(ValueError, match="one of slot and row must be given"):
        RowOrder((60,))
    with pytest.raises(ValueError, match=r"slot or row must be int32 \[59\]"):
        RowOrder((59,), slot=order.slot)
    with pytest.raises(ValueError, match="bucket must be below 2, got 3"):
        RowOrder.of_buckets(torch.tensor([0, 3]), 2)
    with pytest.raises(IndexError, match=r"index must be in -60\.\.59, got 60"):
        packed.select(0, 60)
