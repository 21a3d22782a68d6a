"""PyTorch's own operator database as cases: each operator that has a gradient, with each of its sample inputs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from checking import MANY_ELEMENTS, WIDTHS, Case, Report, check
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_leaves, tree_map

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)

Z_TESTED = 12
"""Cases of each operator and dtype that are tested for a bias: some operators come with hundreds that differ little."""

_OPERATORS: dict[str, Any] = {
    f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name: op for op in op_db
}


def dtypes(name: str, device: str = "cpu") -> list[torch.dtype]:
    """The dtypes in which an operator has a gradient on a device."""
    op = _OPERATORS[name]
    return [dtype for dtype in DTYPES if op.supports_autograd and dtype in op.supported_backward_dtypes(device)]


NAMES = [name for name in _OPERATORS if dtypes(name)]
"""Operators to check; where one has variants, ``name.variant``."""

WITHOUT_GRADIENT = [name for name in _OPERATORS if not dtypes(name)]
"""Operators that the database says have no gradient in these dtypes on the CPU."""


def cases(name: str, dtype: torch.dtype, device: str = "cpu") -> Iterator[Case]:
    """An operator's samples on a device, as a function and (where there is such a variant) in place.

    What requires a gradient is copied within the forward: it is an activation, not a weight, and so is compressed. Not
    by ``torch.clone``, of which it is known how to do it again.
    """
    op = _OPERATORS[name]
    torch.manual_seed(0)
    for number, sample in enumerate(op.sample_inputs(device, dtype, requires_grad=True)):
        leaves = [t for t in tree_leaves((sample.input, sample.args, sample.kwargs)) if _is_leaf(t)]
        if not leaves:
            continue
        ways = {"": op.op}
        if (
            op.inplace_variant
            and op.supports_inplace_autograd
            and _is_leaf(sample.input)
            and not sample.broadcasts_input
        ):
            ways[" in place"] = op.inplace_variant
        for way, function in ways.items():
            label = f"{name}{way}, {str(dtype).removeprefix('torch.')}, sample {number}"
            forward, finish = _Call(function, sample), sample.output_process_fn_grad
            z_test = not way and sum(leaf.numel() for leaf in leaves) <= MANY_ELEMENTS
            yield Case(label, forward, leaves, finish, z_test, saturated=True)


def check_operator(name: str, device: str = "cpu", most: int | None = None, z_tested: int = Z_TESTED) -> Report:
    """Check an operator in all its dtypes; for a bias, its first cases, at each width in float32, else at 2 bits.

    Args:
        name: the operator, of :data:`NAMES`.
        device: where to run it.
        most: cases of each dtype, or None for all.
        z_tested: of these, how many are tested for a bias.
    """
    report = Report()
    for dtype in dtypes(name, device):
        widths = WIDTHS if dtype == torch.float32 else (2,)
        for number, case in enumerate(islice(cases(name, dtype, device), most)):
            report.add(check(case, z_tests=widths if number < z_tested else ()))
    return report


class _Call:
    """An operator on one sample."""

    def __init__(self, function: Any, sample: Any) -> None:
        self._function = function
        self._sample = sample

    def __call__(self) -> Any:
        sample = self._sample
        args = tree_map(_activation, (sample.input, sample.args, sample.kwargs))
        return self._function(args[0], *args[1], **args[2])


def _is_leaf(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _activation(value: Any) -> Any:
    return torch.ops.aten.clone(value) if _is_leaf(value) else value
