"""Neighbour-sampled training; needs pyg-lib or torch-sparse, or tells so."""

from typing import Any

import numpy as np
import pytest
import torch
import torch_geometric.typing

from lightning_tinykg.data import KGRecDataModule, collaborative_graph, neighbors

needs_sampler = pytest.mark.skipif(
    not (torch_geometric.typing.WITH_PYG_LIB or torch_geometric.typing.WITH_TORCH_SPARSE),
    reason="neither pyg-lib nor torch-sparse is installed",
)


def ready(**options: Any) -> KGRecDataModule:
    data = KGRecDataModule("synthetic:2000", batch_size=64, sampling="neighbor", num_neighbors=(4, 2), **options)
    data.setup()
    return data


def test_missing_sampler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_geometric.typing, "WITH_PYG_LIB", False)
    monkeypatch.setattr(torch_geometric.typing, "WITH_TORCH_SPARSE", False)
    with pytest.raises(ImportError, match=r"needs pyg-lib or torch-sparse.*lightning-tinykg\[sampling\]"):
        ready()
    with pytest.raises(ImportError, match="neither can be imported"):
        neighbors.require_neighbor_sampler()


@needs_sampler
def test_batches_are_neighbourhoods_with_valid_triplets() -> None:
    data = ready()
    whole = collaborative_graph(data.graph)
    edges = set(zip(*whole.edge_index.tolist(), whole.edge_type.tolist(), strict=True))
    train = set(zip(*data.train_pairs.tolist(), strict=True))
    pairs = []
    for batch in data.train_dataloader():
        graph = collaborative_graph(batch)
        node = torch.cat([batch["entity"].n_id, batch["user"].n_id + whole.num_entities])
        assert set(zip(*node[graph.edge_index].tolist(), graph.edge_type.tolist(), strict=True)) <= edges
        user = batch["user"].n_id[batch["user"].src_index].tolist()
        positive = batch["entity"].n_id[batch["entity"].dst_pos_index].tolist()
        negative = batch["entity"].n_id[batch["entity"].dst_neg_index].tolist()
        pairs += list(zip(user, positive, strict=True))
        assert not set(zip(user, negative, strict=True)) & train
        assert max(negative) < data.num_items
    assert sorted(pairs) == sorted(train)


@needs_sampler
def test_batches_repeat_and_leave_the_global_state_alone() -> None:
    state = torch.random.get_rng_state()
    first, again, forked = (next(iter(ready(num_workers=w).train_dataloader())) for w in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    for other in (again, forked):
        assert np.array_equal(first["entity"].n_id, other["entity"].n_id)
        assert np.array_equal(first["entity"].dst_neg_index, other["entity"].dst_neg_index)
