"""A small data set."""

from typing import Any

import pytest

from lightning_tinykg.data import KGRecDataModule


@pytest.fixture
def make_data() -> Any:
    """A data module on a synthetic graph; every call gives a fresh one."""

    def make(edges: int = 2000, **options: Any) -> KGRecDataModule:
        return KGRecDataModule(f"synthetic:{edges}", **({"batch_size": 256} | options))

    return make
