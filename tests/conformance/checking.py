"""Is a compressed step's gradient right? One check for operators, layers and models alike.

A case is run plainly, and then compressed at each width, with nothing too small to compress. What has to hold follows
from what the ledger says was kept:

- no exception that the plain step does not raise, and no non-finite gradient where the plain one is finite: always;
- nothing rounded: gradients **equal** to the last bit (on a GPU, unless two plain steps differ: some kernels add up in
  any order);
- rounded only where the backward is linear in it: gradients **unbiased**, by a z-test;
- rounded where the backward is smooth in it: the error at 8 bits is **bounded** by :data:`BOUND`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from lightning_tinykg import Ledger, compress_activations
from lightning_tinykg.activations.rules import Need, rule_for

WIDTHS = (32, 8, 4, 2, 1)

DRAWS = 200
"""Draws of the z-test."""

FEW_DRAWS = 10
"""Draws that the error of a gradient is the mean of."""

MANY_ELEMENTS = 20_000
"""Elements of a gradient above which one draw is enough, and a z-test too long."""

MORE_DRAWS = 2000
"""Fresh draws that decide where the first have cast doubt: rounding has heavy tails, chance has to strike twice."""

DOUBT, PROOF = 5.0, 6.0
"""Standard errors beyond which a mean casts doubt, and is taken for biased: one element in a million, in a billion."""

BOUND = 0.05
"""The most that smooth saves at 8 bits may change a gradient: relative to its norm, or, where the ops that saved them
are saturated and pass next to nothing on, to the norm that it had if they passed on all they get."""


ORDER = 32
"""Of a gradient that is not the same twice, the difference that the order of additions may make, in epsilons."""

LINEAR_NEEDS = {Need.LINEAR.value, Need.MASK.value, Need.LOGARITHM.value}
"""The needs that promise an unbiased gradient of what is rounded; what is rounded for another is bounded."""


@dataclass
class Case:
    """A step to check.

    Attributes:
        name: what it is called where it fails.
        forward: runs the forward; a tensor or any structure of them. That of a module may be given a copy of it.
        leaves: what gradients are asked of.
        finish: applied to the result outside of the context: makes a gradient well-defined (the sign of an SVD).
        z_test: whether to test it for a bias; not where it saves what another case saves.
        saturated: whether its values are such that ops may pass next to nothing on; see :data:`BOUND`.
        module: the module that the forward runs, if it is one.
    """

    name: str
    forward: Callable[..., Any]
    leaves: Sequence[Tensor]
    finish: Callable[[Any], Any] = lambda result: result
    z_test: bool = True
    saturated: bool = False
    module: nn.Module | None = None


@dataclass
class Kept:
    """What is kept of one saved attribute.

    Attributes:
        codecs: the forms it was kept in.
        needs: what its backward needs of it.
    """

    codecs: set[str] = field(default_factory=set)
    needs: set[str] = field(default_factory=set)

    @property
    def rounded(self) -> bool:
        """Whether it was rounded in any case."""
        return any(map(is_rounded, self.codecs))


@dataclass
class Report:
    """What the checks of some cases have shown.

    Attributes:
        steps: compressed steps that were compared.
        cases: cases that ran.
        refused: cases that the plain op refuses in the forward or the backward, by message.
        saves: what was kept, by autograd node and attribute.
        claims: what was claimed and held: ``exact``, ``unbiased``, ``bounded``.
        errors: by width, the largest error of a gradient, relative to its norm.
        tests: z-tests made.
        failures: what went wrong.
    """

    steps: int = 0
    cases: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    saves: dict[str, Kept] = field(default_factory=dict)
    claims: set[str] = field(default_factory=set)
    errors: dict[int, float] = field(default_factory=dict)
    tests: int = 0
    failures: list[str] = field(default_factory=list)

    def add(self, other: Report) -> None:
        """Add another report to this one."""
        self.steps += other.steps
        self.cases += other.cases
        self.tests += other.tests
        self.claims |= other.claims
        self.failures += other.failures
        for message, count in other.refused.items():
            self.refused[message] = self.refused.get(message, 0) + count
        for where, kept in other.saves.items():
            mine = self.saves.setdefault(where, Kept())
            mine.codecs |= kept.codecs
            mine.needs |= kept.needs
        for bits, error in other.errors.items():
            self.errors[bits] = max(self.errors.get(bits, 0.0), error)


def in_mixed_precision(case: Case) -> Case:
    """The same, its forward under autocast to bfloat16."""

    def forward(*module: nn.Module) -> Any:
        with torch.autocast(case.leaves[0].device.type, torch.bfloat16):
            return case.forward(*module)

    return replace(case, forward=forward)


def check(case: Case, widths: Sequence[int] = WIDTHS, z_tests: Sequence[int] = WIDTHS) -> Report:
    """Run a case plainly and compressed, and compare.

    Args:
        case: the step.
        widths: the widths to run it at.
        z_tests: the widths to test for a bias at, where all that is rounded enters linearly: 200 steps each.
    """
    report = Report()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            want, _ = _gradients(case, None)
        except Exception as error:
            report.refused[_brief(error)] = 1
            return report
        report.cases = 1
        again, _ = (want, None) if want.device.type == "cpu" else _gradients(case, None)
        slack = 0.0 if _identical(want, again) else ORDER * _epsilon(case)
        for bits in widths:
            try:
                _check_width(case, bits, want, case.z_test and bits in z_tests, report, slack)
            except Exception as error:
                report.failures.append(f"{case.name} at {bits} bits raises {type(error).__name__}: {_brief(error)}")
    return report


def _check_width(case: Case, bits: int, want: Tensor, z_test: bool, report: Report, slack: float) -> None:
    got, ledger = _gradients(case, compress_activations(bits, min_bytes=0))
    assert ledger is not None
    report.steps += 1
    needs = set()
    for entry in ledger:
        kept = report.saves.setdefault(entry.op, Kept())
        kept.codecs.add(entry.codec)
        kept.needs.add(entry.need)
        if is_rounded(entry.codec):
            needs.add(entry.need)
    finite = want.isfinite()
    if not got[finite].isfinite().all():
        report.failures.append(f"{case.name} at {bits} bits: a gradient that was finite no longer is")
        return
    if not needs:
        report.claims.add("exact")
        if not _identical(want, got) and not relative(got[finite], want[finite]) <= slack:
            difference = float((got - want)[finite].abs().max())
            report.failures.append(
                f"{case.name} at {bits} bits: nothing was rounded, but gradients differ by {difference}"
            )
        return
    fresh = compress_activations(bits, min_bytes=0, seed=2)
    draws = FEW_DRAWS if want.numel() <= MANY_ELEMENTS else 1
    error = sum(relative(_gradients(case, fresh)[0][finite], want[finite]) for _ in range(draws)) / draws
    report.errors[bits] = max(report.errors.get(bits, 0.0), error)
    if not needs <= LINEAR_NEEDS:
        report.claims.add("bounded")
        if bits == 8 and error > BOUND and case.saturated:
            error *= float(want[finite].norm() / _unsaturated(case)[finite].norm())
        if bits == 8 and error > BOUND:
            report.failures.append(f"{case.name} at {bits} bits: error of {error:.3g}, more than {BOUND}")
    elif z_test:
        report.claims.add("unbiased")
        report.tests += 1
        if (z := bias(case, bits, want)) > 0:
            report.failures.append(f"{case.name} at {bits} bits: biased, by {z:.1f} standard errors")


def is_rounded(codec: str) -> bool:
    """Whether a codec of the ledger changes values."""
    return codec.startswith("int") and codec[3:].removesuffix(" of exp").isdigit()


def relative(got: Tensor, want: Tensor) -> float:
    """The error relative to the norm."""
    error, size = float((got - want).norm()), float(want.norm())
    return error / size if size else (math.inf if error else 0.0)


def bias(case: Case, bits: int, want: Tensor) -> float:
    """The largest bias of a gradient in standard errors, or 0 where it is no more than chance."""
    context = compress_activations(bits, min_bytes=0, seed=1)
    if (z := _z(case, context, want, DRAWS)) < DOUBT:
        return 0.0
    z = _z(case, context, want, MORE_DRAWS)
    return 0.0 if z < PROOF else z


def _z(case: Case, context: compress_activations, want: Tensor, draws: int) -> float:
    """The largest mean error over its standard error: by element, along random directions and along the gradient."""
    finite = want.isfinite()
    if not finite.any():
        return 0.0
    want = torch.view_as_real(want[finite]).flatten() if want.is_complex() else want[finite]
    errors = []
    for _ in range(draws):
        got = _gradients(case, context)[0][finite]
        errors.append((torch.view_as_real(got).flatten() if got.is_complex() else got) - want)
    error = torch.stack(errors)
    # a value that lies next to a level rounds to the other one so rarely that no draw shows it: the mean is then off by
    # a few in as many draws, and the spread does not say so
    rare = 2 * error.abs().max() / draws
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(8, want.numel(), dtype=want.dtype, generator=generator).to(want.device)
    directions = torch.cat([directions, want[None], torch.ones_like(want)[None]])
    error = torch.cat([error, error @ functional.normalize(directions).t()], dim=1)
    # the backward's own arithmetic rounds as well, and not to the mean
    arithmetic = _epsilon(case) * want.abs().max()
    standard_error = ((error.std(0) ** 2) / draws + rare**2).sqrt() + arithmetic
    mean = error.mean(0).abs()
    return float(torch.where(mean == 0, 0.0, mean / standard_error).max())


def _epsilon(case: Case) -> float:
    """The precision of the coarsest of a case's leaves."""
    return max(torch.finfo(leaf.dtype).eps for leaf in case.leaves)


def _unsaturated(case: Case) -> Tensor:
    """The gradient if all smooth ops passed on what they get."""
    return _gradients(case, None, unsaturated=True)[0]


def _pass_all_on(outputs: Sequence[Tensor]) -> None:
    nodes = [out.grad_fn for out in outputs]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        saved = [name.removeprefix("_raw_saved_") for name in dir(node) if name.startswith("_raw_saved_")]
        if len(node.next_functions) == 1 and any(rule_for(node, name) in (Need.SMOOTH, Need.ANGLE) for name in saved):
            node.register_hook(lambda out, given: given if out[0].shape == given[0].shape else None)
        nodes.extend(following for following, _ in node.next_functions)


def _gradients(
    case: Case, context: compress_activations | None, unsaturated: bool = False
) -> tuple[Tensor, Ledger | None]:
    """All gradients in one vector, in float64 (or complex128)."""
    ledger = None
    torch.manual_seed(0)
    if context is None:
        result = case.forward()
    else:
        with context as ledger:
            result = case.forward()
    outputs = [out for out in tree_leaves(case.finish(result)) if isinstance(out, Tensor) and out.requires_grad]
    if not outputs:
        raise ValueError("no output requires a gradient")
    if unsaturated:
        _pass_all_on(outputs)
    weights = [_weights(out) for out in outputs]
    grads = torch.autograd.grad(outputs, case.leaves, weights, allow_unused=True)
    found = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(case.leaves, grads, strict=True)]
    return torch.cat([_dense(grad.detach()).flatten() for grad in found]), ledger


def _dense(grad: Tensor) -> Tensor:
    dense = grad if grad.layout == torch.strided else grad.to_dense()
    return dense.to(torch.complex128 if dense.is_complex() else torch.float64)


def _weights(out: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device, out.dtype)
    return weights if out.layout == torch.strided else weights.to_sparse()


def _identical(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(torch.nan_to_num(a, 7.0), torch.nan_to_num(b, 7.0))


def _brief(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:120]
