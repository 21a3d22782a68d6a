"""The data module alone: splits, statistics, batches, sharding, and the place in the epoch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_tinykg.data import BPRBatch, KGRecDataModule, SyntheticKG, TripleBatch, collaborative_graph
from lightning_tinykg.data.datasets import RankingBatches
from lightning_tinykg.data.loaders import ShardedBatches
from lightning_tinykg.data.splits import ItemsByUser


def ready(**options: Any) -> KGRecDataModule:
    data = KGRecDataModule("synthetic:1000", **({"batch_size": 64} | options))
    data.prepare_data()
    data.setup()
    return data


def as_set(pairs: Any) -> set[tuple[int, ...]]:
    return set(zip(*np.asarray(pairs).tolist(), strict=True))


def equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


def same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(
        type(a) is type(b) and all(map(equal, a, b)) for a, b in zip(left, right, strict=True)
    )


def overlapping(root: Path) -> Path:
    (root / "train.txt").write_text("0 0 1 2\n1 2 3\n")
    (root / "test.txt").write_text("0 2 4\n1 4\n")
    return root


def test_split_is_disjoint_complete_and_repeatable() -> None:
    data, again, other = ready(), ready(), ready(seed=1)
    train, val, test = (as_set(p) for p in (data.train_pairs, data.val_pairs, data.test_pairs))
    assert not train & val
    assert not train & test
    assert not val & test
    assert train | val | test == as_set(data.files.train)
    assert train == as_set(again.train_pairs)
    assert train != as_set(other.train_pairs)
    assert as_set(data.graph["user", "interacts", "entity"].edge_index) == train  # nothing held out leaks


def test_statistics_and_overlap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = KGRecDataModule(overlapping(tmp_path), val_fraction=0, cache_dir=False)
    data.setup()
    assert data.statistics == {
        "users": 2,
        "items": 5,
        "entities": 5,
        "relations": 0,
        "triples": 0,
        "train_interactions": 5,
        "val_interactions": 0,
        "test_interactions": 3,
        "train_test_overlap": 1,
        "train_test_overlap_fraction": pytest.approx(1 / 3),
    }
    assert data.val_dataloader() == []


def test_drop_seen_test(tmp_path: Path) -> None:
    data = KGRecDataModule(overlapping(tmp_path), drop_seen_test=True, cache_dir=False)
    data.setup()
    assert data.test_pairs.tolist() == [[0, 1], [4, 4]]
    assert data.statistics["train_test_overlap"] == 1  # still told
    # What is held out for validation is the training set's: a dropped test pair does not come back.
    assert len(data.train_pairs.T) + len(data.val_pairs.T) == 5


def test_summary_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        data = ready()
        data.setup("test")
    told = [r.getMessage() for r in caplog.records if "interactions" in r.getMessage()]
    assert len(told) == 1
    assert f"{data.num_users} users" in told[0]
    assert "test pairs in train (0.0%)" in told[0]


def test_an_epoch_goes_through_every_interaction_once_with_valid_negatives() -> None:
    data = ready()
    batches = list(data.train_dataloader())
    train = as_set(data.train_pairs)
    user, positive, negative = (torch.cat(x) for x in zip(*batches, strict=True))
    assert sorted(zip(user.tolist(), positive.tolist(), strict=True)) == sorted(train)
    assert not as_set(torch.stack([user, negative])) & train
    assert all(x.dtype == torch.int64 for x in batches[0])
    assert [len(b.user) for b in batches[:-1]] == [64] * (len(batches) - 1)


def test_triple_phase_follows_and_corrupted_tails_are_no_edges() -> None:
    data = ready(triple_batch_size=100)
    loader = data.train_dataloader()
    batches = list(loader)
    kinds = [type(b) for b in batches]
    first = kinds.index(TripleBatch)
    assert len(batches) == len(loader)
    assert set(kinds[:first]) == {BPRBatch}
    assert set(kinds[first:]) == {TripleBatch}
    graph = collaborative_graph(data.graph)
    edges = as_set(torch.stack([graph.edge_index[0], graph.edge_type, graph.edge_index[1]]))
    triples = batches[first:]
    head, relation, tail, corrupted = (torch.cat(x) for x in zip(*(batch[:4] for batch in triples), strict=True))
    for batch in triples:  # on the host it is known which are of which relation
        assert batch.relation.tolist() == [r for r, count in enumerate(batch.counts) for _ in range(count)]
        assert len(batch.counts) == graph.num_relations
    assert as_set(torch.stack([head, relation, tail])) == edges
    assert not as_set(torch.stack([head, relation, corrupted])) & edges
    assert corrupted.max() < graph.num_nodes


def test_kgat_triple_batch_size() -> None:
    data = ready(triple_batch_size="auto")
    expected = data.statistics["triples"] // (data.statistics["train_interactions"] // 64)
    assert next(b for b in data.train_dataloader() if isinstance(b, TripleBatch)).head.shape == (expected,)


def test_epochs_differ_and_repeat() -> None:
    def epoch(number: int, **options: Any) -> list[BPRBatch]:
        loader = ready(**options).train_dataloader()
        loader.sampler.set_epoch(number)
        return list(loader)

    assert same(epoch(3), epoch(3))
    assert not same(epoch(3), epoch(4))
    assert not same(epoch(3), epoch(3, seed=1))
    assert same(epoch(3), epoch(3, num_workers=2))


def test_global_random_state_is_left_alone() -> None:
    # as it was made here
    before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    data = ready(triple_batch_size=100, num_workers=0)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        list(loader)
    assert torch.equal(before, torch.random.get_rng_state())
    assert (numpy_before == np.random.get_state()[1]).all()  # type: ignore[index]  # as it was made here


@pytest.mark.parametrize("done", [0, 1, 5, 7, 8])
@pytest.mark.parametrize("workers", [0, 1])
def test_loader_goes_on_where_its_state_says(done: int, workers: int) -> None:
    def loader() -> Any:
        loader = ready(triple_batch_size=150, num_workers=workers).train_dataloader()
        loader.sampler.set_epoch(2)
        return loader

    whole = list(loader())
    first = loader()
    batches = iter(first)
    begun = [next(batches) for _ in range(done)]
    state = first.state_dict()
    second = loader()
    second.load_state_dict(state)
    assert same(begun + list(second), whole)
    second.sampler.set_epoch(3)
    assert len(list(second)) == len(whole)  # only that epoch is cut short


@pytest.mark.parametrize(("rows", "ranks", "size"), [(100, 4, 7), (101, 4, 7), (10, 3, 100), (3, 2, 1)])
def test_ranks_share_an_epoch(rows: int, ranks: int, size: int) -> None:
    shards = [list(ShardedBatches(rows, batch_size=size, seed=0, num_replicas=ranks, rank=r)) for r in range(ranks)]
    lengths = {len(ShardedBatches(rows, batch_size=size, seed=0, num_replicas=ranks, rank=r)) for r in range(ranks)}
    assert {len(s) for s in shards} == lengths
    assert len(lengths) == 1
    every = np.concatenate([step.rows for shard in shards for step in shard])
    assert set(every) == set(range(rows))
    assert len(every) - rows < ranks  # filled up, by no more than needed
    assert len({step.key for shard in shards for step in shard}) == sum(map(len, shards))


@pytest.mark.parametrize(("users", "ranks", "chunk"), [(100, 4, 7), (101, 4, 7), (5, 2, 2), (10, 3, 100)])
def test_ranks_rank_every_user_once(users: int, ranks: int, chunk: int) -> None:
    table = ItemsByUser.build(np.stack([np.arange(users), np.arange(users)]), num_users=users)
    shards = [RankingBatches([table], table, chunk=chunk, num_replicas=ranks, rank=r) for r in range(ranks)]
    assert len({len(s) for s in shards}) == 1  # or a rank would wait for another forever
    seen = torch.cat([batch.user for shard in shards for batch in shard])  # type: ignore[attr-defined]  # batches
    assert sorted(seen.tolist()) == list(range(users))
    assert max(len(batch.user) for shard in shards for batch in shard) <= chunk  # type: ignore[attr-defined]  # batches


def test_ranking_batches() -> None:
    data = ready(eval_batch_size=7)
    tables = {"train": as_set(data.train_pairs), "val": as_set(data.val_pairs), "test": as_set(data.test_pairs)}
    for loader, target, exclude in (
        (data.val_dataloader(), tables["val"], tables["train"]),
        (data.test_dataloader(), tables["test"], tables["train"] | tables["val"]),
    ):
        users = {u for u, _ in target}
        wanted, masked = set(), set()
        for batch in loader:
            assert len(batch.user) <= 7
            wanted |= as_set(torch.stack([batch.user[batch.target[0]], batch.target[1]]))
            masked |= as_set(torch.stack([batch.user[batch.exclude[0]], batch.exclude[1]]))
        assert wanted == target
        assert masked == {(u, i) for u, i in exclude if u in users}


def test_user_who_has_seen_everything_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("0 0 1\n1 0\n")
    (tmp_path / "test.txt").write_text("1 1\n")
    data = KGRecDataModule(tmp_path, val_fraction=0, cache_dir=False)
    data.setup()
    with pytest.raises(ValueError, match="user 0 is linked to all 2 items"):
        data.train_dataloader()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"eval_batch_size": -1}, "eval_batch_size must be a whole number of at least 1, got -1"),
        ({"triple_batch_size": 0}, "triple_batch_size must be a whole number of at least 1, 'auto' or None, got 0"),
        ({"sampling": "some"}, "sampling must be one of full, neighbor, got 'some'"),
        ({"val_fraction": 1.0}, "val_fraction must be a number of at least 0 and below 1, got 1.0"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ({"batch_size": 2.5}, r"batch_size must be a whole number of at least 1, got 2\.5"),
        ({"num_workers": -1}, "num_workers must be a whole number of at least 0, got -1"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        KGRecDataModule(**options)


def test_roots() -> None:
    assert KGRecDataModule().root == SyntheticKG()
    assert KGRecDataModule("synthetic:5000", seed=2).root == SyntheticKG(5000, seed=2)
    assert KGRecDataModule(SyntheticKG(700)).root == SyntheticKG(700)
    assert KGRecDataModule("synthetic-data").root == Path("synthetic-data")


def test_dataloaders_are_what_lightning_knows() -> None:
    data = ready()
    assert isinstance(data.train_dataloader(), DataLoader)
    assert isinstance(data.test_dataloader(), DataLoader)
