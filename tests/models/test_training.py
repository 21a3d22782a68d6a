import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging

from lightning_tinykg.hqgnn import HQGNN
from lightning_tinykg.models import KGAT, KGCN, KGIN, LightGCN, MostPopular, RankingModule

SMALL: dict[str, Any] = {"dim": 16, "layer_dims": (16, 8), "relation_dim": 16, "lr": 5e-3}


def fit(model: RankingModule, data: Any, options: dict[str, Any], **more: Any) -> L.Trainer:
    ckpt_path = more.pop("ckpt_path", None)
    trainer = L.Trainer(**(options | {"enable_checkpointing": False} | more))
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return trainer


def test_a_fit_logs_what_is_promised(make_data: Any, fit_options: dict[str, Any]) -> None:
    model = KGAT(**SMALL, k=[5, 20])
    trainer = fit(model, make_data(), fit_options, max_epochs=2)
    assert {"train/loss", "train/bpr_loss", "train/triple_loss", "val/recall@20", "val/ndcg@20", "val/recall@5"} <= set(
        trainer.callback_metrics
    )
    found = trainer.test(model, make_data(), verbose=False)[0]
    assert set(found) == {"test/recall@5", "test/ndcg@5", "test/recall@20", "test/ndcg@20"}


@pytest.mark.parametrize("attention", ["refresh", "frozen", "in-graph"])
def test_trained_kgat_clearly_beats_popularity(attention: Any, make_data: Any, fit_options: dict[str, Any]) -> None:
    L.seed_everything(0)
    options = {"edges": 5000, "batch_size": 256}
    model = KGAT(**SMALL, attention=attention)
    trainer = fit(model, make_data(**options), fit_options, max_epochs=20, limit_val_batches=0)
    recall = trainer.test(model, make_data(**options), verbose=False)[0]["test/recall@20"]
    popular = L.Trainer(**fit_options).test(MostPopular(), make_data(**options), verbose=False)[0]["test/recall@20"]
    assert recall > 1.2 * popular


@pytest.mark.parametrize("kind", [KGAT, LightGCN])
def test_checkpoint_gives_the_same_recommendations(kind: Any, make_data: Any, fit_options: dict[str, Any]) -> None:
    triples = "auto" if kind is KGAT else None
    model, data = kind(dim=8), make_data(triple_batch_size=triples)
    trainer = fit(model, data, fit_options, max_epochs=1, enable_checkpointing=True)
    path = Path(fit_options["default_root_dir"]) / "model.ckpt"
    trainer.save_checkpoint(path)
    loaded = kind.load_from_checkpoint(path)
    assert loaded.num_users == data.num_users
    assert not any("edge" in name or "groups" in name for name in torch.load(path, weights_only=True)["state_dict"])
    loaded.set_graph(data.graph)
    for found, expected in zip(loaded.recommend([0, 1, 2]), model.recommend([0, 1, 2]), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("attention", ["refresh", "in-graph"])
@pytest.mark.parametrize("stop", ["epoch", "step"])
def test_a_resumed_fit_repeats_the_uninterrupted_one(
    stop: str, attention: Any, make_data: Any, fit_options: dict[str, Any], tmp_path: Path
) -> None:
    def model() -> KGAT:
        L.seed_everything(0)
        return KGAT(**SMALL, attention=attention, dropout=0.0)

    whole = model()
    # step 2 is amid the first epoch's ranking phase
    steps = {"every_n_epochs": 2} if stop == "epoch" else {"every_n_train_steps": 2}
    # options of several types
    keep = ModelCheckpoint(tmp_path / "kept", save_top_k=-1, **steps)  # type: ignore[arg-type]
    fit(whole, make_data(), fit_options, max_epochs=4, callbacks=[keep], enable_checkpointing=True)
    saved = sorted((tmp_path / "kept").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    assert len(saved) > 1
    resumed = model()
    fit(resumed, make_data(), fit_options, max_epochs=4, ckpt_path=saved[0])
    for (name, p), q in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("average", [WeightAveraging, EMAWeightAveraging])
@pytest.mark.parametrize(
    "make",
    [
        lambda: KGAT(dim=8, layer_dims=(8,)),
        lambda: KGAT(dim=8, layer_dims=(8,), attention="in-graph"),
        lambda: KGIN(dim=8),
        lambda: HQGNN(LightGCN(dim=8), bits=2),
    ],
    ids=["kgat", "kgat-in-graph", "kgin", "hqgnn"],
)
def test_what_copies_a_model_before_it_has_its_sizes_copies_the_built_one(
    make: Any, average: Any, make_data: Any, fit_options: dict[str, Any]
) -> None:
    model, callback = make(), average()
    triples = "auto" if isinstance(model, KGAT) else None
    trainer = fit(model, make_data(triple_batch_size=triples), fit_options, max_epochs=2, callbacks=[callback])
    averaged = callback._average_model.module
    assert [name for name, _ in averaged.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert trainer.test(model, make_data(triple_batch_size=triples), verbose=False)


@pytest.mark.parametrize(
    "make",
    [
        lambda: KGAT(dim=8, layer_dims=(8,), k=[5, 10]),
        lambda: KGCN(dim=8, k=10),
        lambda: HQGNN(LightGCN(dim=8), bits=2, k=10),
        lambda: MostPopular(k=10),
    ],
    ids=["kgat", "kgcn", "hqgnn", "popular"],
)
def test_predictions_are_recommendations_for_all_users(make: Any, make_data: Any, fit_options: dict[str, Any]) -> None:
    model, data = make(), make_data(triple_batch_size=None, eval_batch_size=30)
    trainer = L.Trainer(**fit_options | {"max_epochs": 1, "enable_checkpointing": False})
    if not isinstance(model, MostPopular):
        trainer.fit(model, data)
    chunks: Any = trainer.predict(model, data)
    users, items, scores = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    assert users.tolist() == list(range(data.num_users))
    found, best = model.recommend(users, k=10, chunk_size=30)  # in the same chunks, to the last bit
    assert torch.equal(items, found)
    assert torch.equal(scores, best)
    copy.deepcopy(model)  # nothing that can't be is left behind


def test_popularity_needs_no_training(make_data: Any, fit_options: dict[str, Any]) -> None:
    model, data = MostPopular(), make_data()
    found = L.Trainer(**fit_options).test(model, data, verbose=False)[0]
    assert 0 < found["test/recall@20"] < 1
    _, scores = model.recommend([0], k=3, exclude_seen=False)
    count = data.graph["user", "interacts", "entity"].edge_index[1].bincount(minlength=data.num_items)
    assert scores[0].tolist() == count.topk(3).values.tolist()
