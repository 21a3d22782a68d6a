"""The CTR protocol's data: labels that are true, a split that leaks nothing, batches that repeat themselves."""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_tinykg.data import CTRBatch, CTRDataModule
from lightning_tinykg.data.ctr import NEGATIVE, CTRChunks, sample_negatives, split_pairs


def ready(**options: Any) -> CTRDataModule:
    data = CTRDataModule("synthetic:1000", **({"batch_size": 100} | options))
    data.setup()
    return data


def triples_of(*parts: Any) -> list[tuple[int, int, int]]:
    # pairs
    return [tuple(int(x) for x in column) for part in parts for column in np.asarray(part).T]  # type: ignore[misc]


def test_negatives_are_distinct_unseen_and_as_many_as_positives() -> None:
    rng = np.random.default_rng(0)
    pairs = np.unique(np.stack([rng.integers(20, size=300), rng.integers(50, size=300)]), axis=1)
    negatives = sample_negatives(pairs, num_users=21, num_items=50, seed=0)
    found = set(zip(*negatives.tolist(), strict=True))
    assert len(found) == negatives.shape[1]
    assert not found & set(zip(*pairs.tolist(), strict=True))
    assert np.array_equal(np.bincount(negatives[0], minlength=21), np.bincount(pairs[0], minlength=21))
    assert negatives[1].min() >= 0
    assert negatives[1].max() < 50


def test_every_unseen_item_is_equally_likely() -> None:
    pairs = np.array([[0, 0], [1, 4]])
    drawn = [sample_negatives(pairs, num_users=1, num_items=6, seed=seed)[1] for seed in range(900)]
    count = np.bincount(np.concatenate(drawn), minlength=6)
    assert count[[1, 4]].tolist() == [0, 0]
    # Each of four items is one of the two drawn in half of 900 trials: 450, standard deviation 15.
    assert (np.abs(count[[0, 2, 3, 5]] - 450) < 5 * 15).all()


def test_who_has_seen_nearly_everything_gets_the_rest() -> None:
    pairs = np.array([[0, 0, 0, 1, 1, 1, 1], [0, 1, 3, 0, 1, 2, 3]])
    assert sample_negatives(pairs, num_users=2, num_items=4, seed=0).tolist() == [[0], [2]]


def test_the_split_is_six_two_two_of_all_labelled_pairs() -> None:
    data = ready()
    parts = {name: triples_of(part) for name, part in data.labelled.items()}
    everything = [triple for part in parts.values() for triple in part]
    assert len({(user, item) for user, item, _ in everything}) == len(everything)  # in one part, with one label
    positives = {(user, item) for user, item, label in everything if label}
    assert positives == set(zip(*data.files.train.tolist(), strict=True))
    for name, share in (("train", 0.6), ("val", 0.2), ("test", 0.2)):
        assert len(parts[name]) == pytest.approx(share * len(everything), abs=1)


def test_the_graph_knows_the_training_pairs_only() -> None:
    data = ready()
    for edge_type, label in ((("user", "interacts", "entity"), 1), (NEGATIVE, 0)):
        edges = set(zip(*data.graph[edge_type].edge_index.tolist(), strict=True))
        assert edges == {(user, item) for user, item, y in triples_of(data.labelled["train"]) if y == label}


def test_a_split_that_the_files_bring_is_pooled(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("0 0 1\n1 2 3\n2 4 5 6\n")
    (tmp_path / "test.txt").write_text("0 2\n1 2\n")  # one pair is in both
    data = CTRDataModule(tmp_path, cache_dir=False)
    data.setup()
    positives = [(user, item) for user, item, y in triples_of(*data.labelled.values()) if y]
    assert sorted(positives) == [(0, 0), (0, 1), (0, 2), (1, 2), (1, 3), (2, 4), (2, 5), (2, 6)]


def test_the_seed_decides() -> None:
    first, again, other = ready(), ready(), ready(seed=1)
    assert np.array_equal(first.labelled["test"], again.labelled["test"])
    assert not np.array_equal(first.labelled["test"], other.labelled["test"])


def test_an_epoch_goes_through_every_pair_once() -> None:
    data = ready()
    batches = list(data.train_dataloader())
    assert all(isinstance(batch, CTRBatch) for batch in batches)
    assert batches[0].label.dtype == torch.float32
    found = torch.stack([torch.cat([getattr(b, name) for b in batches]) for name in ("user", "item", "label")])
    assert sorted(triples_of(found)) == sorted(triples_of(data.labelled["train"]))


@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_share_the_evaluation_without_repeats(ranks: int) -> None:
    labelled = ready().labelled["val"]
    shares = [CTRChunks(labelled, chunk=7, num_replicas=ranks, rank=rank) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    batches = [share[i] for share in shares for i in range(len(share))]
    assert max(batch.user.numel() for batch in batches) <= 7
    assert sorted(triples_of(*(torch.stack([*batch]) for batch in batches))) == sorted(triples_of(labelled))


class Recorder(L.LightningModule):
    """Learns nothing, remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.given: list[list[list[float]]] = []

    def training_step(self, batch: CTRBatch, batch_idx: int) -> torch.Tensor:
        self.given.append([x.tolist() for x in batch])
        return self.weight * 1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_resumed_fit_gets_the_same_batches(tmp_path: Path) -> None:
    def fit(ckpt_path: Path | None = None, **options: Any) -> list[Any]:
        model = Recorder()
        quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        options["enable_checkpointing"] = bool(options)
        trainer = L.Trainer(max_epochs=2, limit_val_batches=0, accelerator="cpu", **quiet, **options)
        trainer.fit(model, CTRDataModule("synthetic:1000", batch_size=100), ckpt_path=ckpt_path)
        return model.given

    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(callbacks=[save])
    assert whole[: len(whole) // 2] != whole[len(whole) // 2 :]
    for step in (1, len(whole) // 2, len(whole) // 2 + 2):
        assert fit(tmp_path / f"step={step}.ckpt") == whole[step:], step


def test_no_validation_pairs_no_loader() -> None:
    data = ready(val_fraction=0.0)
    assert data.val_dataloader() == []
    assert len(data.test_dataloader()) > 0


def test_something_must_be_left_for_training() -> None:
    with pytest.raises(ValueError, match=r"must leave some of the 10 labelled pairs for training, got 0.5 and 0.5"):
        split_pairs(np.zeros((3, 10), dtype=np.int64), val_fraction=0.5, test_fraction=0.5, seed=0)


def test_music_has_the_authors_number_of_pairs(real_data: Path) -> None:
    if not (real_data / "music").is_dir():
        pytest.skip(f"no music in {real_data}")
    data = CTRDataModule(real_data / "music", cache_dir=False)
    data.setup()
    assert data.statistics["positives"] == 21_173
    assert sum(part.shape[1] for part in data.labelled.values()) == 42_346
