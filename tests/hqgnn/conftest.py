"""A small data set, and quiet Trainers."""

from typing import Any

import pytest

from lightning_tinykg.data import KGRecDataModule


@pytest.fixture
def make_data() -> Any:
    """A data module on a synthetic graph; every call gives a fresh one."""

    def make(edges: int = 2000, **options: Any) -> KGRecDataModule:
        return KGRecDataModule(f"synthetic:{edges}", **({"batch_size": 256} | options))

    return make


@pytest.fixture
def quiet(tmp_path: Any) -> dict[str, Any]:
    return {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": tmp_path,
    }
