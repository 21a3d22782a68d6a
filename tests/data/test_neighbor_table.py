"""The sampled neighbours of KGCN: real ones, as many as asked for, the same from the same seed."""

import numpy as np
import pytest
import torch
from torch_geometric.data import HeteroData

from lightning_tinykg.data.graph import build_graph
from lightning_tinykg.data.neighbor_table import neighbor_table

SIZES = {"num_users": 2, "num_items": 10, "num_entities": 40, "num_relations": 3}


def graph(num_triples: int = 60, num_entities: int = 40) -> HeteroData:
    rng = np.random.default_rng(0)
    triples = np.stack([rng.integers(30, size=num_triples), rng.integers(3, size=num_triples), np.arange(num_triples)])
    triples[2] = rng.integers(30, size=num_triples)
    return build_graph(np.array([[0], [1]]), triples, **(SIZES | {"num_entities": num_entities}))


def both_ways(data: HeteroData) -> set[tuple[int, int, int]]:
    head, tail = data["entity", "relates", "entity"].edge_index.tolist()
    kind = data["entity", "relates", "entity"].edge_type.tolist()
    return {*zip(head, kind, tail, strict=True), *zip(tail, kind, head, strict=True)}


def test_what_is_sampled_are_neighbours_by_their_relation() -> None:
    data = graph()
    neighbor, relation = neighbor_table(data, size=4, seed=0)
    known = both_ways(data)
    assert neighbor.shape == relation.shape == (40, 4)
    assert neighbor.dtype == relation.dtype == torch.int64
    with_neighbours = {head for head, _, _ in known}
    assert with_neighbours < set(range(40))
    for entity in range(40):
        found = {(entity, r, n) for n, r in zip(neighbor[entity].tolist(), relation[entity].tolist(), strict=True)}
        assert found <= (known if entity in with_neighbours else {(entity, 3, entity)})  # alone: itself, relation 3


def test_none_comes_twice_where_there_are_enough() -> None:
    head, tail = np.zeros(6, dtype=np.int64), np.arange(1, 7)
    data = build_graph(np.array([[0], [1]]), np.stack([head, head, tail]), **SIZES)
    found = [neighbor_table(data, size=4, seed=seed)[0][0] for seed in range(50)]
    assert all(row.unique().numel() == 4 for row in found)
    assert set(torch.cat(found).tolist()) == set(range(1, 7))  # every neighbour has its chance
    row = neighbor_table(data, size=6, seed=0)[0]
    assert sorted(row[0].tolist()) == [1, 2, 3, 4, 5, 6]
    assert row[3].tolist() == [0] * 6  # fewer: with repeats


def test_the_seed_decides() -> None:
    data = graph()
    first, again, other = (neighbor_table(data, size=4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_a_graph_without_triples() -> None:
    data = build_graph(np.array([[0], [1]]), np.zeros((3, 0), dtype=np.int64), **SIZES)
    neighbor, relation = neighbor_table(data, size=2, seed=0)
    assert neighbor.tolist() == [[i, i] for i in range(40)]
    assert (relation == 3).all()


def test_size_is_checked() -> None:
    with pytest.raises(ValueError, match="size must be a whole number of at least 1, got 0"):
        neighbor_table(graph(), size=0, seed=0)
