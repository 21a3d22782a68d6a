"""The list of protections keeps up with the source; ``make protections`` takes them out."""

from pathlib import Path

import pytest
from protections import Protection, protections

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("protection", protections(), ids=lambda protection: protection.protects)
def test_it_is_still_there(protection: Protection) -> None:
    assert (ROOT / protection.file).read_text().count(protection.old) == 1
    path, _, name = protection.test.partition("::")
    name = name.partition("[")[0]
    assert (ROOT / path).exists()
    assert not name or f"def {name}(" in (ROOT / path).read_text()


def test_the_runner_tells_a_test_that_fails_from_one_that_does_not() -> None:
    noise = "torch.add(level, noise < x, out=level)"
    file = "lightning_tinykg/codecs/kernels/reference.py"
    test = "tests/codecs/test_affine.py::test_constants_cost_no_more"
    assert not Protection("nothing", file, noise, noise, test).fails_without()
    assert Protection("all", file, noise, "raise ValueError", test).fails_without()
