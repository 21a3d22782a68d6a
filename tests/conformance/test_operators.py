"""PyTorch's own operator database, under compression: a fast sample, and (``make conformance``) all of it."""

from itertools import islice

import pytest
import torch
from checking import Report, check, in_mixed_precision
from operators import NAMES, cases, check_operator

SAMPLED = 40
"""Parts that the fast sample comes in."""

FAST_WIDTHS = (32, 8, 2)
"""Equal, bounded, and in the groups of few bits. At the others all samples are checked where there is time."""


@pytest.mark.parametrize("sample", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("part", range(SAMPLED))
def test_fast_sample(part: int, sample: int) -> None:
    """The first sample of each operator; the second where there is time."""
    report = Report()
    for name in NAMES[part::SAMPLED]:
        for case in islice(cases(name, torch.float32), sample, sample + 1):
            report.add(check(case, widths=FAST_WIDTHS, z_tests=()))
    assert report.failures == []
    assert report.steps > 0


@pytest.mark.parametrize("count", [1, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
@pytest.mark.parametrize("part", range(SAMPLED))
def test_exact_in_mixed_precision(part: int, count: int) -> None:
    """What an op casts for itself is to the last bit what it was; many ops refuse to be mixed."""
    report = Report()
    for name in NAMES[part::SAMPLED]:
        for case in islice(cases(name, torch.float32), count):
            report.add(check(in_mixed_precision(case), widths=(32,), z_tests=()))
    assert report.failures == []
    assert report.steps > 0


@pytest.mark.parametrize("name", ["mm", "bmm", "expm1", "nn.functional.linear"])
def test_fast_sample_is_unbiased(name: str) -> None:
    report = Report()
    for case in islice(cases(name, torch.float32), 2):
        report.add(check(case, widths=(2,)))
    assert report.failures == []
    assert report.tests


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NAMES)
def test_operator(name: str) -> None:
    assert check_operator(name).failures == []
