"""The generated graph: repeatable, of any size, and with something in it to learn."""

import hashlib
import time
from typing import Any

import numpy as np
import pytest

from lightning_tinykg.data import KGRecDataModule, SyntheticKG
from lightning_tinykg.data.files import KGRecFiles


def digest(files: KGRecFiles) -> str:
    return hashlib.sha256(files.train.tobytes() + files.triples.tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("edges", [500, 1000, 25_000, 100_000])
def test_size(edges: int) -> None:
    files = SyntheticKG(num_edges=edges).generate()
    assert abs(files.train.shape[1] + files.triples.shape[1] - edges) < 0.05 * edges
    assert len(np.unique(files.train, axis=1).T) == files.train.shape[1]
    assert len(np.unique(files.triples, axis=1).T) == files.triples.shape[1]
    assert np.bincount(files.train[0], minlength=files.num_users).min() >= 3
    assert (files.triples[0] < files.num_items).any()
    assert (files.triples[2] >= files.num_items).all()


@pytest.mark.parametrize("edges", [500, 1000])
def test_small_graph_gives_a_whole_split(edges: int) -> None:
    data = KGRecDataModule(f"synthetic:{edges}", batch_size=64)
    data.setup()
    assert min(pairs.shape[1] for pairs in (data.train_pairs, data.val_pairs, data.test_pairs)) > 0
    assert len(list(data.train_dataloader())) == len(data.train_dataloader())


def test_seed() -> None:
    assert digest(SyntheticKG(2000, seed=3).generate()) == digest(SyntheticKG(2000, seed=3).generate())
    assert digest(SyntheticKG(2000, seed=3).generate()) != digest(SyntheticKG(2000, seed=4).generate())


@pytest.mark.parametrize(("edges", "expected"), [(1000, "6705844555c1effa"), (25_000, "c30f647f3193655e")])
def test_same_graph_on_every_platform(edges: int, expected: str) -> None:
    # Changing the generator changes every number measured on it: on purpose only.
    assert digest(SyntheticKG(edges).generate()) == expected


def recall(data: KGRecDataModule, scores: np.ndarray, k: int = 20) -> float:
    values = []
    for batch in data.test_dataloader():
        rows = scores[batch.user.numpy()].astype(np.float64)
        rows[batch.exclude[0], batch.exclude[1]] = -np.inf
        found = np.zeros(rows.shape, dtype=bool)
        np.put_along_axis(found, np.argsort(-rows, axis=1)[:, :k], True, axis=1)
        target = batch.target.numpy()
        hits = np.bincount(target[0], weights=found[target[0], target[1]], minlength=len(rows))
        values.append(hits / np.bincount(target[0], minlength=len(rows)))
    return float(np.concatenate(values).mean())


def recalls(data: KGRecDataModule) -> tuple[float, float, float]:
    """Of what shares attributes with a user's items, of what is popular, and of chance."""
    data.setup()
    seen = np.zeros((data.num_users, data.num_items))
    seen[data.train_pairs[0], data.train_pairs[1]] = 1
    head, _, tail = data.files.triples
    items = head < data.num_items
    attributes = np.zeros((data.num_items, data.num_entities))
    attributes[head[items], tail[items]] = 1
    attributes *= np.sqrt(np.log(1 + data.num_items / np.maximum(attributes.sum(axis=0), 1)))
    popular = np.broadcast_to(seen.sum(axis=0), seen.shape)
    chance = np.random.default_rng(0).random(seen.shape)
    return recall(data, seen @ attributes @ attributes.T), recall(data, popular), recall(data, chance)


@pytest.mark.parametrize("seed", [0, 1])
def test_knowledge_beats_popularity_beats_chance(seed: int) -> None:
    knowledge, popularity, chance = recalls(KGRecDataModule("synthetic", seed=seed))
    assert popularity > 2 * chance
    assert knowledge > 3 * popularity


@pytest.mark.parametrize("edges", [5_000, 30_000])
def test_without_taste_there_is_popularity_alone(edges: int) -> None:
    knowledge, popularity, chance = recalls(KGRecDataModule(SyntheticKG(edges, taste=0.0)))
    assert popularity > 1.5 * chance
    assert knowledge < popularity


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"taste": -1.0}, "taste must be a number of at least 0, got -1.0"),
        ({"num_edges": 10}, "num_edges must be a whole number of at least 500, got 10"),
        ({"num_items": 5}, "num_items at least 20, got .* and 5"),
        ({"num_users": 10, "num_interactions": 20}, "num_interactions must be 3 to"),
    ],
)
def test_impossible_sizes(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        SyntheticKG(**options).generate()


@pytest.mark.slow
def test_ten_million_edges_in_a_minute_or_so() -> None:
    begin = time.monotonic()
    files = SyntheticKG(num_edges=10_000_000).generate()
    assert files.train.shape[1] + files.triples.shape[1] > 9_500_000
    assert time.monotonic() - begin < 240
