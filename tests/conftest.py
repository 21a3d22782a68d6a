"""Fixtures that more than one package's tests use."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets; tests that want it are skipped where it is not."""
    root = Path(os.environ.get("TINYKG_DATA") or Path(__file__).parents[1].parent / "shared" / "data")
    if not root.is_dir():
        pytest.skip(f"no real data in {root}; set TINYKG_DATA to their folder")
    return root
