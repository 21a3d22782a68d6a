"""A graph small enough to reckon with by hand, and a data module small enough to train on."""

from typing import Any

import numpy as np
import pytest
from torch_geometric.data import HeteroData

from lightning_tinykg.data import KGRecDataModule
from lightning_tinykg.data.graph import build_graph

SIZES = {"num_users": 3, "num_items": 4, "num_entities": 6, "num_relations": 2}


@pytest.fixture
def tiny() -> HeteroData:
    """Users 0..2, items 0..3, entities 4 and 5; user 2 has seen all but item 3."""
    interactions = np.array([[0, 0, 1, 2, 2, 2], [0, 1, 1, 0, 1, 2]])
    triples = np.array([[0, 1, 2, 3], [0, 0, 1, 1], [4, 4, 5, 5]])
    return build_graph(interactions, triples, **SIZES)


@pytest.fixture
def make_data() -> Any:
    """A data module on a synthetic graph; every call gives a fresh one."""

    def make(edges: int = 2000, **options: Any) -> KGRecDataModule:
        options = {"batch_size": 256, "triple_batch_size": "auto"} | options
        return KGRecDataModule(f"synthetic:{edges}", **options)

    return make


@pytest.fixture
def fit_options(tmp_path: Any) -> dict[str, Any]:
    """Trainer arguments for a quiet run on the CPU."""
    return {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": tmp_path,
    }
