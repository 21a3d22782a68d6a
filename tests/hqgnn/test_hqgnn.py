"""HQGNN in a Trainer: any encoder, any width, any estimator; what is logged, scored, kept and resumed."""

import copy
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_tinykg import CosineAnneal, StepAnneal, TinyKGCallback
from lightning_tinykg.data.batches import BPRBatch
from lightning_tinykg.data.graph import add_inverse_edges
from lightning_tinykg.hqgnn import HQGNN
from lightning_tinykg.hqgnn.quantizer import Quantizer
from lightning_tinykg.hqgnn.rotation import Rotation
from lightning_tinykg.models import KGAT, LightGCN
from lightning_tinykg.models.functional import bpr_loss

BITS = (1, 2, 4, 8)


class NGCFStyle(nn.Module):
    """A user's own: two propagation layers with weights, and no idea of Lightning."""

    def __init__(self, graph: Any, dim: int = 16) -> None:
        super().__init__()
        self.sizes = graph["user"].num_nodes, graph.num_items
        self.register_buffer("edges", graph["user", "interacts", "entity"].edge_index, persistent=False)
        self.table = nn.Embedding(sum(self.sizes), dim)
        nn.init.normal_(self.table.weight, std=0.1)
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))

    def forward(self) -> tuple[Tensor, Tensor]:
        user, item = self.edges[0], self.edges[1] + self.sizes[0]
        x, out = self.table.weight, [self.table.weight]
        for layer in self.layers:
            message = torch.zeros_like(x).index_add(0, user, x[item]).index_add(0, item, x[user])
            x = nn.functional.leaky_relu(layer(message / 8 + x))
            out.append(x)
        users, items = torch.cat(out, dim=1).split(self.sizes)
        return users, items


def trained(data: Any, quiet: dict[str, Any], epochs: int = 10) -> LightGCN:
    L.seed_everything(0, verbose=False)
    encoder = LightGCN(dim=16, num_layers=2, lr=0.01, k=[20, 50])
    L.Trainer(**quiet, max_epochs=epochs, limit_val_batches=0).fit(encoder, data)
    return encoder


def fit(model: HQGNN, data: Any, quiet: dict[str, Any], **more: Any) -> L.Trainer:
    ckpt_path = more.pop("ckpt_path", None)
    trainer = L.Trainer(**(quiet | {"max_epochs": 1} | more))
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return trainer


# -- encoders and estimators -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["gste", "ste", "ptq"])
@pytest.mark.parametrize("kind", ["lightgcn", "kgat", "ngcf"])
def test_any_encoder_trains_and_is_tested(kind: str, estimator: Any, make_data: Any, quiet: dict[str, Any]) -> None:
    data = make_data(triple_batch_size="auto" if kind == "kgat" else None)
    data.setup()
    encoder: nn.Module = {
        "lightgcn": lambda: LightGCN(dim=16),
        "kgat": lambda: KGAT(dim=16, layer_dims=(16,), relation_dim=16),
        "ngcf": lambda: NGCFStyle(data.graph),
    }[kind]()
    model = HQGNN(encoder, bits=2, estimator=estimator, lr=0.01)
    trainer = fit(model, data, quiet, max_epochs=2)
    logged = trainer.callback_metrics
    assert {"train/loss", "train/bpr_loss", "val/recall@20", "val/recall@50", "val/ndcg@20", "val/ndcg@50"} <= set(
        logged
    )
    assert {"hqgnn/bits", "hqgnn/clip", "hqgnn/quantization_error", "hqgnn/item_mib", "hqgnn/embedding_mib"} <= set(
        logged
    )
    assert ("hqgnn/delta" in logged) == ("hqgnn/trace" in logged) == (estimator == "gste")
    assert ("train/triple_loss" in logged) == (kind == "kgat")
    assert all(value.isfinite() for value in logged.values())
    found = trainer.test(model, data, verbose=False)[0]
    assert found["test/recall@20"] == model.last_metrics["recall@20"]
    assert set(model.last_metrics) == {"recall@20", "recall@50", "ndcg@20", "ndcg@50"}


@pytest.mark.parametrize("scale", ["table", "node", "group"])
@pytest.mark.parametrize("quantize_users", [False, True])
def test_what_is_scored_is_what_is_encoded(
    scale: Any, quantize_users: bool, make_data: Any, quiet: dict[str, Any]
) -> None:
    data = make_data()
    model = HQGNN(trained(data, quiet), bits=2, scale=scale, group_size=8, quantize_users=quantize_users)
    fit(model, data, quiet)
    users, items = model.tables()
    asked = users.decode() if quantize_users else model.user_embeddings()
    scored = model.eval().embed()
    assert torch.equal(scored[0].detach(), asked)
    assert torch.equal(scored[1].detach(), items.decode())
    best, scores = model.recommend([0, 3], k=5, exclude_seen=False)
    expected = (asked[[0, 3]] @ items.decode().t()).topk(5)
    assert torch.equal(best, expected.indices)
    torch.testing.assert_close(scores, expected.values)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
@pytest.mark.parametrize("options", [{"rotate": "itq"}, {"hessian": "hutchinson", "distillation": 0.5}])
def test_the_encoder_may_compute_in_any_precision(
    precision: Any, options: dict[str, Any], make_data: Any, quiet: dict[str, Any], tmp_path: Path
) -> None:
    """Codes are of float32 embeddings, and so are the rotation and the export."""
    data = make_data()
    model = HQGNN(trained(data, quiet), bits=2, quantizer_lr=0.01, **options)
    trainer = fit(model, data, quiet, precision=precision, max_epochs=2)
    recall = trainer.test(model, data, verbose=False)[0]["test/recall@20"]
    assert recall > 0.3
    users = torch.arange(10)
    items, scores = model.recommend(users, k=5)
    assert scores.dtype == torch.float32
    index = model.export(tmp_path / "index")
    found = index.recommend(users.numpy(), k=5)
    assert (torch.from_numpy(found[0]) == items).float().mean() > 0.9
    torch.testing.assert_close(torch.from_numpy(found[1]), scores, rtol=1e-4, atol=1e-5)


def test_a_rotation_stays_one_whatever_it_is_cast_to() -> None:
    x, rotation = torch.randn(200, 8), Rotation("itq")
    rotation.fit(x, Quantizer(bits=1))
    want = rotation(x)
    assert torch.equal(rotation.to(torch.bfloat16)(x), want)
    assert torch.equal(rotation.double()(x), want)


def test_full_precision_post_training_and_trained_are_one_class(make_data: Any, quiet: dict[str, Any]) -> None:
    """Centring and rotation leave the ranking alone, and at 8 bits hardly anything is lost."""
    data = make_data()
    encoder = trained(data, quiet)
    expected, scores = encoder.recommend([0, 1, 2], k=5)
    for kind in ("itq", "random", "none"):
        model = HQGNN(encoder, bits=8, estimator="ptq", rotate=kind)  # type: ignore[arg-type]  # one of its literals
        model.set_graph(data.graph)
        users, items = (x.detach() for x in model.full_precision())
        exact = (users @ items.t()).softmax(dim=1)  # which no constant per user changes
        torch.testing.assert_close(exact, (lambda u, i: (u @ i.t()).softmax(dim=1))(*encoder.eval().embed()))
        found, _ = model.recommend([0, 1, 2], k=5)
        assert (found == expected).float().mean() > 0.8
    model = HQGNN(encoder, bits=32)
    model.set_graph(data.graph)
    assert torch.equal(model.recommend([0, 1, 2], k=5)[1], scores)
    with pytest.raises(ValueError, match="full precision has no codes"):
        model.tables()


def test_post_training_trains_at_full_precision(make_data: Any, quiet: dict[str, Any]) -> None:
    data = make_data()
    encoder = trained(data, quiet, epochs=2)
    plain, ptq = copy.deepcopy(encoder), HQGNN(copy.deepcopy(encoder), bits=1, estimator="ptq")
    L.seed_everything(1, verbose=False)
    L.Trainer(**quiet, max_epochs=2).fit(plain, data)
    L.seed_everything(1, verbose=False)
    fit(ptq, data, quiet, max_epochs=2)
    for p, q in zip(plain.parameters(), ptq.encoder.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_fixed_delta_of_0_is_the_straight_through_estimator(make_data: Any, quiet: dict[str, Any]) -> None:
    data, states = make_data(), []
    encoder = trained(data, quiet, epochs=2)
    for options in ({"estimator": "ste"}, {"estimator": "gste", "hessian": 0.0}, {"estimator": "gste", "hessian": 0.5}):
        model = HQGNN(copy.deepcopy(encoder), bits=2, **options)
        fit(model, data, quiet)
        states.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(states[0], states[2], strict=True))


def test_fine_tuning_at_one_bit_beats_rounding_after_training(make_data: Any, quiet: dict[str, Any]) -> None:
    """On the mean of two seeds of the training loss: what it is trained for; recall on a toy graph is too coarse."""
    data, gains = make_data(), []
    encoder = trained(data, quiet, epochs=30)
    batch = next(iter(data.train_dataloader()))
    for seed in (0, 1):
        model = HQGNN(copy.deepcopy(encoder), bits=1, scale="table", seed=seed, lr=0.005)
        model.set_graph(data.graph)
        losses = []
        for epochs in (0, 10):
            if epochs:
                fit(model, data, quiet, max_epochs=epochs)
            users, items = model.eval().embed()
            losses.append(bpr_loss(users[batch.user], items[batch.positive], items[batch.negative]).item())
        gains.append(losses[0] - losses[1])
    assert sum(gains) > 0


@pytest.mark.parametrize("users_too", [False, True])
def test_both_ways_to_delta_agree(users_too: bool, make_data: Any, quiet: dict[str, Any]) -> None:
    data = make_data(batch_size=100_000)  # one step
    encoder, deltas = trained(data, quiet), []
    for hessian in ("closed", "hutchinson"):
        # one of its literals
        model = HQGNN(copy.deepcopy(encoder), bits=2, hessian=hessian, quantize_users=users_too)  # type: ignore[arg-type]
        deltas.append(float(fit(model, data, quiet).callback_metrics["hqgnn/delta"]))
    assert deltas[0] > 0
    assert deltas[1] == pytest.approx(deltas[0], rel=0.25)  # Hutchinson stops at a standard error of 5 %


def test_a_sample_of_everything_is_the_full_graph(make_data: Any) -> None:
    data = make_data()
    data.setup()
    batch = next(iter(data.train_dataloader()))
    sampled = add_inverse_edges(data.graph)
    sampled["user"].n_id = torch.arange(data.num_users)
    sampled["entity"].n_id = torch.arange(data.num_entities)
    sampled["user"].src_index = batch.user
    sampled["entity"].dst_pos_index, sampled["entity"].dst_neg_index = batch.positive, batch.negative
    model = HQGNN(LightGCN(dim=16), bits=2, estimator="ste", rotate="random", scale="node")
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]  # a stand-in
    model.set_graph(data.graph)
    torch.testing.assert_close(model.training_step(sampled, 0), model.training_step(batch, 0))


def test_distillation_pulls_the_ranking_to_the_teachers(make_data: Any, quiet: dict[str, Any]) -> None:
    data = make_data()
    encoder = trained(data, quiet)
    missed = []
    for weight in (1e-6, 100.0):
        model = HQGNN(copy.deepcopy(encoder), bits=1, distillation=weight, lr=0.01)
        missed.append(fit(model, data, quiet, max_epochs=10).callback_metrics["train/distillation_loss"])
        assert model.teacher is not None
        assert torch.equal(model.teacher.users, encoder.eval().embed()[0])
    assert missed[1] < missed[0] / 2


def test_evaluation_before_the_fit_does_no_harm(make_data: Any, quiet: dict[str, Any]) -> None:
    """Lightning evaluates in inference mode, whose tensors autograd refuses."""
    data = make_data()
    model = HQGNN(trained(data, quiet), bits=2, quantize_users=True)
    L.Trainer(**quiet).validate(model, data, verbose=False)
    fit(model, data, quiet | {"num_sanity_val_steps": 2})


# -- schedules, checkpoints, resuming --------------------------------------------------------------------------------


def test_bits_are_annealed_by_optimizer_steps_and_evaluated_as_they_are(make_data: Any, quiet: dict[str, Any]) -> None:
    data = make_data()
    model = HQGNN(LightGCN(dim=16), bits=StepAnneal({0: 8, 2: 4, 4: 1}))
    seen: list[tuple[int, float]] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.append((pl_module.item_quantizer.bits, pl_module.item_quantizer.clip_value().item()))

    fit(model, data, quiet, max_steps=6, max_epochs=-1, callbacks=[Watch()])
    assert [bits for bits, _ in seen] == [8, 8, 4, 4, 1, 1]
    assert model.tables()[1].bits == 1
    assert seen[-1][1] == pytest.approx(1, rel=0.05)  # the clip was found anew for each width
    assert seen[0][1] > seen[2][1] > seen[4][1]


@pytest.mark.parametrize("stop", ["epoch", "step"])
@pytest.mark.parametrize("clip", ["learned", "ema"])
def test_a_resumed_fit_repeats_the_uninterrupted_one(
    stop: str, clip: Any, make_data: Any, quiet: dict[str, Any], tmp_path: Path
) -> None:
    def model() -> HQGNN:
        L.seed_everything(0, verbose=False)
        return HQGNN(
            LightGCN(dim=16), bits=CosineAnneal(8, 1, steps=6), clip=clip, distillation=0.5, refresh_every=3, lr=0.01
        )

    steps = {"every_n_epochs": 1} if stop == "epoch" else {"every_n_train_steps": 2}
    # options of several types
    keep = ModelCheckpoint(tmp_path / "kept", save_top_k=-1, **steps)  # type: ignore[arg-type]
    whole = model()
    fit(whole, make_data(), quiet, max_epochs=4, callbacks=[keep], enable_checkpointing=True)
    saved = sorted((tmp_path / "kept").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    assert len(saved) > 1
    resumed = model()
    fit(resumed, make_data(), quiet, max_epochs=4, ckpt_path=saved[0])
    one, other = whole.state_dict(), resumed.state_dict()
    for name in one:
        if isinstance(one[name], Tensor):
            assert torch.equal(one[name], other[name]), name
    assert one["item_quantizer._extra_state"] == other["item_quantizer._extra_state"]
    for found, expected in zip(resumed.tables(), whole.tables(), strict=True):
        assert torch.equal(found.codes, expected.codes)


@pytest.mark.parametrize("kind", [LightGCN, KGAT])
def test_a_checkpoint_is_enough_to_recommend(kind: Any, make_data: Any, quiet: dict[str, Any], tmp_path: Path) -> None:
    data = make_data(triple_batch_size="auto" if kind is KGAT else None)
    model = HQGNN(kind(dim=16), bits=StepAnneal({0: 8, 1: 2}), scale="group", group_size=4)
    trainer = fit(model, data, quiet)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    torch.load(tmp_path / "model.ckpt", weights_only=True)
    loaded = HQGNN.load_from_checkpoint(tmp_path / "model.ckpt")
    assert isinstance(loaded.encoder, kind)
    assert loaded.schedule == model.schedule
    loaded.set_graph(data.graph)
    for found, expected in zip(loaded.recommend([0, 1]), model.recommend([0, 1]), strict=True):
        assert torch.equal(found, expected)


def test_an_own_encoder_is_brought_to_the_checkpoint(make_data: Any, quiet: dict[str, Any], tmp_path: Path) -> None:
    data = make_data()
    data.setup()
    model = HQGNN(NGCFStyle(data.graph), bits=4)
    fit(model, data, quiet).save_checkpoint(tmp_path / "model.ckpt")
    with pytest.raises(TypeError, match="encoder"):
        HQGNN.load_from_checkpoint(tmp_path / "model.ckpt")
    loaded = HQGNN.load_from_checkpoint(tmp_path / "model.ckpt", encoder=NGCFStyle(data.graph))
    loaded.set_graph(data.graph)
    assert torch.equal(loaded.recommend([0])[0], model.recommend([0])[0])


def test_warm_start_from_a_checkpoint(make_data: Any, quiet: dict[str, Any], tmp_path: Path) -> None:
    data = make_data()
    encoder = trained(data, quiet, epochs=1)
    trainer = L.Trainer(**quiet)
    trainer.strategy.connect(encoder)
    trainer.save_checkpoint(tmp_path / "encoder.ckpt", weights_only=True)
    model = HQGNN(LightGCN(), bits=4, warm_start=tmp_path / "encoder.ckpt")
    assert isinstance(model.encoder, LightGCN)
    assert model.encoder.dim == 16
    assert model.lr == encoder.lr
    assert torch.equal(model.encoder.encoder.embedding.weight, encoder.encoder.embedding.weight)
    assert "warm_start" not in model.hparams
    own = NGCFStyle(data.graph)
    torch.save(own.state_dict(), tmp_path / "own.pt")
    other = HQGNN(NGCFStyle(data.graph), warm_start=tmp_path / "own.pt").encoder
    assert torch.equal(other.table.weight, own.table.weight)  # type: ignore[union-attr,arg-type]  # as it was made here


# -- together with the rest ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hessian", ["closed", "hutchinson"])
def test_with_compressed_activations(hessian: Any, make_data: Any, quiet: dict[str, Any]) -> None:
    data = make_data(triple_batch_size="auto")
    model = HQGNN(KGAT(dim=16, layer_dims=(16,), relation_dim=16, attention="in-graph"), bits=2, hessian=hessian)
    tinykg = TinyKGCallback(bits=8, summary=False)
    trainer = fit(model, data, quiet, callbacks=[tinykg], max_epochs=2)
    assert tinykg.largest is not None
    assert tinykg.largest.ratio > 1
    assert {"val/recall@20", "tinykg/ratio", "hqgnn/embedding_mib", "hqgnn/delta"} <= set(trainer.callback_metrics)
    assert trainer.callback_metrics["train/loss"].isfinite()


def test_activations_kept_exactly_change_nothing(make_data: Any, quiet: dict[str, Any]) -> None:
    data, states = make_data(), []
    for callbacks in ([], [TinyKGCallback(bits=32, summary=False)]):
        L.seed_everything(0, verbose=False)
        model = HQGNN(LightGCN(dim=16), bits=2, distillation=0.1)
        fit(model, data, quiet, callbacks=callbacks)
        states.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_training_leaves_torchs_random_state_alone(make_data: Any, quiet: dict[str, Any]) -> None:
    data = make_data()
    encoder = trained(data, quiet, epochs=1)
    states = []
    for options in ({"bits": 32}, {"bits": 2, "hessian": "hutchinson", "rotate": "itq", "distillation": 1.0}):
        L.seed_everything(7, verbose=False)
        fit(HQGNN(copy.deepcopy(encoder), **options), data, quiet)  # type: ignore[arg-type]  # options of several types
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_a_test_ranks_other_widths_beside_it(make_data: Any, quiet: dict[str, Any]) -> None:
    data = make_data()
    encoder = trained(data, quiet)
    model = HQGNN(encoder, bits=1, estimator="ptq", compare=(32, 8, 4, 2, 1))
    L.Trainer(**quiet).test(model, data, verbose=False)
    points = {point.name: point for point in model.points}
    assert list(points) == ["ptq 1 bits", "fp32", "ptq 8 bits", "ptq 4 bits", "ptq 2 bits"]
    exact = L.Trainer(**quiet).test(encoder, data, verbose=False)[0]
    assert points["fp32"].metrics == pytest.approx({name[5:]: value for name, value in exact.items()})
    sizes = [points[name].nbytes for name in ("ptq 1 bits", "ptq 2 bits", "ptq 4 bits", "ptq 8 bits", "fp32")]
    assert sizes == sorted(set(sizes))
    users, items = data.num_users, data.num_items
    assert points["fp32"].nbytes == (users + items) * 16 * 4
    assert points["ptq 2 bits"].nbytes == users * 16 * 4 + items * (4 + 4)


def test_another_loss_by_hutchinson(make_data: Any, quiet: dict[str, Any]) -> None:
    class Hinge(HQGNN):
        def loss(self, users: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
            return (1 - (users * (positives - negatives)).sum(dim=1)).clamp(min=0).square().mean()

    trainer = fit(Hinge(LightGCN(dim=16), bits=2, hessian="hutchinson", refresh_every=2), make_data(), quiet)
    assert trainer.callback_metrics["hqgnn/delta"] > 0


def test_learning_rates_are_apart_and_the_encoders_are_the_default() -> None:
    model = HQGNN(LightGCN(dim=4, lr=0.3, l2=0.7, num_users=2, num_items=2, num_entities=2, num_relations=1))
    # one optimizer, or a list, as it was configured
    groups = model.configure_optimizers().param_groups  # type: ignore[union-attr]
    assert [(group["lr"], len(group["params"])) for group in groups] == [(0.3, 1), (1e-3, 1)]
    assert model.l2 == 0.7
    # one optimizer, or a list, as it was configured
    assert len(HQGNN(LightGCN(dim=4), estimator="ptq").configure_optimizers().param_groups) == 1  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits must be one of 1, 2, 4, 8, 32, got 3"),
        ({"estimator": "lsq"}, "estimator must be one of gste, ste, ptq, got 'lsq'"),
        ({"hessian": "open"}, "hessian must be 'closed', 'hutchinson' or a fixed delta of at least 0, got 'open'"),
        ({"compare": [3]}, "compare must be one of"),
        ({"distillation": -1.0}, "distillation must be a number of at least 0, got -1.0"),
        ({"teacher_top": 0}, "teacher_top must be a whole number of at least 1, got 0"),
        ({"rotate": "pca"}, "rotate must be one of itq, random, none or None, got 'pca'"),
        ({"encoder": {"class_path": "os.system"}}, "encoder must name a RankingModule that is imported"),
    ],
)
def test_what_is_wrong_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HQGNN(**({"encoder": LightGCN()} | options))


def test_an_encoder_that_returns_something_else_is_told_so(make_data: Any) -> None:
    class Wrong(nn.Module):
        def forward(self) -> Tensor:
            return torch.ones(3, 4)

    class Few(nn.Module):
        def forward(self) -> tuple[Tensor, Tensor]:
            return torch.ones(3, 4), torch.ones(1, 4)

    data = make_data()
    data.setup()
    for encoder, kind, message in (
        (Wrong(), TypeError, r"Wrong must return \(users .* got a tensor of shape \[3, 4\]"),
        (Few(), ValueError, r"Few must embed all \d+ items, got 1 rows"),
    ):
        model = HQGNN(encoder)
        model.set_graph(data.graph)
        with pytest.raises(kind, match=message):
            model.embed()
    with pytest.raises(RuntimeError, match="set_graph"):
        HQGNN(LightGCN()).tables()


def test_a_run_of_weights_and_biases_holds_curves_picture_and_index(
    make_data: Any, quiet: dict[str, Any], tmp_path: Path, wandb_logger: Any
) -> None:
    from offline_runs import records

    data = make_data()
    model = HQGNN(LightGCN(dim=16), bits=2, compare=(32, 4))
    trainer = fit(model, data, quiet | {"logger": wandb_logger, "log_every_n_steps": 1}, max_epochs=3)
    trainer.test(model, data, verbose=False)
    index = model.export(tmp_path / "index", faiss=False)
    delta, best = float(model.delta_rule.delta), trainer.callback_metrics["hqgnn/embedding_mib"]
    summary = dict(wandb_logger.experiment.summary)
    files, found = records(wandb_logger)

    rows = [record["history"]["item"] for record in found if record["type"] == "history"]
    curves = {name: [row[name] for row in rows if name in row] for row in rows for name in row}
    steps = len(curves["train/loss"])
    assert steps == trainer.global_step
    for name in ("hqgnn/delta", "hqgnn/trace", "hqgnn/clip", "hqgnn/bits"):
        assert len(curves[name]) == steps, name
    assert curves["hqgnn/delta"][-1] == pytest.approx(delta)
    assert min(curves["hqgnn/delta"]) >= 0
    assert len(curves["val/recall@20"]) == 3
    assert summary["val/recall@20"]["max"] == pytest.approx(max(curves["val/recall@20"]))
    assert curves["hqgnn/embedding_mib"][-1] == pytest.approx(float(best))

    (table,) = (files / "media" / "table" / "hqgnn").glob("recall_against_bytes*.json")
    content = json.loads(table.read_text())
    assert content["columns"][:4] == ["embeddings", "bytes", "MiB", "recall@20"]
    assert [row[0] for row in content["data"]] == ["gste 2 bits", "fp32", "ptq 4 bits"]
    (image,) = (files / "media" / "images" / "hqgnn").glob("recall_against_bytes_plot*.png")
    assert image.read_bytes().startswith(b"\x89PNG")

    (artifact,) = [r["artifact"] for r in found if r["type"] == "artifact" and r["artifact"]["name"] == "hqgnn-index"]
    assert artifact["type"] == "low-bit-index"
    assert json.loads(artifact["metadata"])["checksum"] == index.card["checksum"]
    sent = {entry["path"] for entry in artifact["manifest"]["contents"]}
    assert sent == {path.name for path in (tmp_path / "index").iterdir()}


def test_a_batch_of_something_else_goes_to_the_encoder(make_data: Any) -> None:
    data = make_data()
    data.setup()
    model = HQGNN(LightGCN())
    model.set_graph(data.graph)
    with pytest.raises(TypeError, match="LightGCN has no loss for a str"):
        model.training_step("batch", 0)
    assert isinstance(next(iter(data.train_dataloader())), BPRBatch)


@pytest.mark.ddp
@pytest.mark.timeout(120)
def test_two_ranks_agree(make_data: Any, quiet: dict[str, Any], tmp_path: Path) -> None:
    from lightning.pytorch.strategies import DDPStrategy

    class Report(L.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            found = {
                name: value.tolist() for name, value in pl_module.state_dict().items() if isinstance(value, Tensor)
            }
            (tmp_path / f"{trainer.global_rank}.json").write_text(json.dumps(found))

    L.seed_everything(0, verbose=False)
    model = HQGNN(LightGCN(dim=8), bits=StepAnneal({0: 4, 2: 1}), distillation=0.1)
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    fit(model, make_data(), quiet | {"devices": 2, "strategy": strategy}, callbacks=[Report()], max_epochs=2)
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one["delta_rule.delta"] > 0
    assert one == other
