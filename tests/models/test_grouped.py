"""Rows times their group's matrix: as a product for each group, and as little is saved of it."""

from typing import Any

import pytest
import torch
from torch import Tensor, library

from lightning_tinykg import compress_activations
from lightning_tinykg.models.grouped import grouped_matmul

COUNTS = [3, 0, 5, 2]
Inputs = tuple[Tensor, Tensor]


def inputs(dtype: torch.dtype = torch.float64, width: int = 3, made: int = 5, times: int = 1) -> Inputs:
    rows = torch.randn(times * sum(COUNTS), width, dtype=dtype, requires_grad=True)
    return rows, torch.randn(len(COUNTS), width, made, dtype=dtype, requires_grad=True)


def one_by_one(rows: Tensor, matrices: Tensor, counts: list[int] = COUNTS) -> Tensor:
    parts = zip(rows.split(counts), matrices.unbind(), strict=True)
    return torch.cat([part @ matrix for part, matrix in parts])


def gradients(y: Tensor, leaves: Inputs) -> tuple[Tensor, ...]:
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return torch.autograd.grad((y * weight).sum(), leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_a_product_for_each_group(dtype: torch.dtype) -> None:
    leaves = inputs(dtype)
    y, want = grouped_matmul(*leaves, COUNTS), one_by_one(*leaves)
    assert y.dtype == dtype
    assert torch.equal(y, want)
    for got, expected in zip(gradients(y, leaves), gradients(want, leaves), strict=True):
        torch.testing.assert_close(got, expected)


def test_its_gradients_and_theirs_are_right() -> None:
    leaves = inputs()
    assert torch.autograd.gradcheck(lambda *given: grouped_matmul(*given, COUNTS), leaves)
    assert torch.autograd.gradgradcheck(lambda *given: grouped_matmul(*given, COUNTS), leaves)


def test_a_group_without_rows_gets_no_gradient() -> None:
    rows, matrices = inputs()
    grouped_matmul(rows, matrices, COUNTS).sum().backward()
    assert matrices.grad is not None
    assert [bool(grad.any()) for grad in matrices.grad] == [True, False, True, True]


def test_of_no_rows_at_all() -> None:
    matrices = torch.randn(2, 3, 4, requires_grad=True)
    y = grouped_matmul(torch.empty(0, 3), matrices, [0, 0])
    y.sum().backward()
    assert y.shape == (0, 4)
    assert matrices.grad is not None
    assert not matrices.grad.any()


@pytest.mark.parametrize(("counts", "said"), [([3, 5, 2], "got 3 that sum to 10"), ([3, 0, 5, 3], "that sum to 11")])
def test_counts_that_do_not_fit_are_refused(counts: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=f"counts must be 4 numbers, .* the 10 rows, .*{said}"):
        grouped_matmul(*inputs(), counts)


def test_pytorch_finds_nothing_wrong_with_the_ops() -> None:
    rows, matrices = inputs()
    library.opcheck(torch.ops.tinykg.grouped_matmul.default, (rows, matrices, COUNTS))
    right = torch.randn(10, 5, dtype=torch.float64, requires_grad=True)
    library.opcheck(torch.ops.tinykg.grouped_outer.default, (rows, right, COUNTS))


def test_under_autocast_it_is_a_product_like_others() -> None:
    leaves = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, want = grouped_matmul(*leaves, COUNTS), one_by_one(*leaves)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, want)
    assert [grad.dtype for grad in gradients(y, leaves)] == [torch.float32] * 2
    with torch.autocast("cpu", torch.bfloat16):
        assert grouped_matmul(*inputs(torch.float64), COUNTS).dtype == torch.float64


# -- compressed -------------------------------------------------------------------------------------------------------

MANY = [100 * count for count in COUNTS]


def step(bits: int | None, leaves: Inputs) -> tuple[tuple[Tensor, ...], Any]:
    """Gradients and ledger of one step in which the rows are computed."""
    if bits is None:
        return gradients(grouped_matmul(leaves[0].cumsum(1), leaves[1], MANY), leaves), None
    with compress_activations(bits, min_bytes=0) as ledger:
        y = grouped_matmul(leaves[0].cumsum(1), leaves[1], MANY)
    return gradients(y, leaves), ledger


def test_in_32_bits_the_gradients_are_the_same_to_the_last_bit() -> None:
    leaves = inputs(torch.float32, times=100)
    for got, want in zip(step(32, leaves)[0], step(None, leaves)[0], strict=True):
        assert torch.equal(got, want)


def test_its_rows_are_rounded_and_its_matrices_are_the_users() -> None:
    leaves = inputs(torch.float32, 32, 16, times=100)
    entries = [entry for entry in step(2, leaves)[1] if "grouped_matmul" in entry.op]
    assert sorted(entry.codec for entry in entries) == ["held", "int2"]


def test_what_it_makes_of_rows_of_a_table_is_made_again() -> None:
    table = torch.randn(50, 32, requires_grad=True)
    matrices = torch.randn(len(COUNTS), 32, 64, requires_grad=True)
    counts = [100 * count for count in MANY]
    index = torch.randint(50, (sum(counts),))

    def made() -> Tensor:
        return grouped_matmul(table.index_select(0, index), matrices, counts).sin()

    want = gradients(made(), (table, matrices))
    with compress_activations(32) as ledger:
        y = made()
    assert {entry.recipe for entry in ledger if entry.op == "Sin.self"} == {"grouped_matmul(index_select(x), x)"}
    assert ledger.stored_bytes < 1024
    for got, expected in zip(gradients(y, (table, matrices)), want, strict=True):
        assert torch.equal(got, expected)


def test_a_few_rows_of_many_groups_are_not_worth_making_again() -> None:
    """Each group's product takes as long to begin as kilobytes take to move."""
    table, matrices = torch.randn(50, 32, requires_grad=True), torch.randn(200, 32, 8, requires_grad=True)
    index = torch.randint(50, (200,))
    with compress_activations(8) as ledger:
        grouped_matmul(table.index_select(0, index), matrices, [1] * 200).sin()
    assert [entry.codec for entry in ledger if entry.op == "Sin.self"] == ["int8"]
