"""KGIN by hand, on sampled graphs and with dropped edges; its penalty by the definition; that it learns."""

import copy
from itertools import combinations
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch_geometric.data import HeteroData

from lightning_tinykg import KGIN, TinyKGCallback, compress_activations
from lightning_tinykg.data.batches import BPRBatch
from lightning_tinykg.data.graph import add_inverse_edges
from lightning_tinykg.models.functional import distance_correlation
from lightning_tinykg.models.popular import MostPopular


def with_graph(graph: HeteroData, **options: Any) -> KGIN:
    torch.manual_seed(0)
    model = KGIN(**{"dim": 5, "dropout": 0.0, "edge_dropout": 0.0} | options)
    model.set_graph(graph)
    return model


def by_hand(model: KGIN, graph: HeteroData) -> tuple[Tensor, Tensor]:
    """Intents, both aggregations and the sum over the layers, node by node."""
    entities, users = model.embedding.weight[: model.num_entities], model.embedding.weight[model.num_entities :]
    relations = model.num_relations
    attention = model.attention.exp() / model.attention.exp().sum(1, keepdim=True)
    intents = attention @ model.relation.weight
    edges = []
    for (head, tail), relation in zip(
        graph["entity", "relates", "entity"].edge_index.t().tolist(),
        graph["entity", "relates", "entity"].edge_type.tolist(),
        strict=True,
    ):
        edges += [(tail, head, relation), (head, tail, relation + relations)]  # receiver, source, relation
    clicks = graph["user", "interacts", "entity"].edge_index.t().tolist()
    all_entities, all_users = entities, users
    for _ in range(model.num_layers):
        heard_by_entities, heard_by_users = [], []
        for entity in range(model.num_entities):
            rows = [entities[source] * model.relation.weight[r] for to, source, r in edges if to == entity]
            heard_by_entities.append(torch.stack(rows).mean(0) if rows else torch.zeros(model.dim))
        for user in range(model.num_users):
            heard = torch.stack([entities[item] for who, item in clicks if who == user]).mean(0)
            weight = (intents @ users[user]).softmax(0)
            heard_by_users.append(heard + sum(w * p for w, p in zip(weight, intents, strict=True)) * heard)
        entities, users = (F.normalize(torch.stack(rows)) for rows in (heard_by_entities, heard_by_users))
        all_entities, all_users = all_entities + entities, all_users + users
    return all_users, all_entities


@pytest.mark.parametrize("layers", [1, 3])
def test_embeddings_by_hand(tiny: HeteroData, layers: int) -> None:
    model = with_graph(tiny, num_layers=layers, num_intents=3)
    torch.testing.assert_close(model.embed(), by_hand(model, tiny))


def test_a_batch_of_the_whole_graph_is_embedded_alike_in_its_numbering(tiny: HeteroData) -> None:
    model = with_graph(tiny, num_layers=2)
    user, entity = torch.tensor([2, 0, 1]), torch.tensor([3, 2, 1, 0, 5, 4])
    batch = add_inverse_edges(tiny)
    place = {"user": user.argsort(), "entity": entity.argsort()}
    for source, _, target in batch.edge_types:
        edges = batch[source, _, target]
        edges.edge_index = torch.stack([place[source][edges.edge_index[0]], place[target][edges.edge_index[1]]])
    batch["user"].n_id, batch["entity"].n_id = user, entity
    users, entities = model.embed()
    torch.testing.assert_close(model.embed_sampled(batch), (users[user], entities[entity]))


def test_edges_are_dropped_in_training_alone(tiny: HeteroData) -> None:
    model = with_graph(tiny, edge_dropout=0.5)
    whole = with_graph(tiny)
    torch.testing.assert_close(model.eval().embed(), whole.embed())
    seen: list[tuple[int, int]] = []
    model.convs[0].register_forward_pre_hook(lambda module, args: seen.append((args[4].size(1), args[5].size(1))))
    model.train()
    first, second = model.embed()[0], model.embed()[0]
    assert not torch.equal(first, second)
    assert seen == 2 * [(model.related.size(1) // 2, model.clicked.size(1) // 2)]


def test_each_parameter_learns(tiny: HeteroData) -> None:
    model = with_graph(tiny)
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]  # there is no Trainer
    batch = BPRBatch(torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([3, 2]))
    loss: Any = model.training_step(batch, 0)
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())


# -- the penalty -------------------------------------------------------------------------------------------------------


def correlation_by_definition(a: Tensor, b: Tensor) -> float:
    def centred(x: Tensor) -> Tensor:
        n = len(x)
        d = torch.tensor([[abs(float(x[j] - x[k])) for k in range(n)] for j in range(n)], dtype=torch.float64)
        rows, whole = d.sum(1) / n, d.sum() / n**2
        return torch.stack([torch.stack([d[j, k] - rows[j] - rows[k] + whole for k in range(n)]) for j in range(n)])

    def covariance(x: Tensor, y: Tensor) -> float:
        return float((centred(x) * centred(y)).mean().clamp(min=0).sqrt())

    return covariance(a, b) / (covariance(a, a) * covariance(b, b)) ** 0.5


def test_distance_correlation_is_that_of_its_definition() -> None:
    torch.manual_seed(0)
    rows = torch.randn(4, 9, dtype=torch.float64)
    rows[2] = rows[0].square()
    want = sum(correlation_by_definition(a, b) for a, b in combinations(rows, 2))
    assert float(distance_correlation(rows)) == pytest.approx(want, rel=1e-4)


def test_distance_correlation_of_what_is_equal_and_of_one_row() -> None:
    row = torch.randn(9)
    assert float(distance_correlation(torch.stack([row, 3 - 2 * row]))) == pytest.approx(1, rel=1e-4)
    assert float(distance_correlation(row[None])) == 0
    constant = torch.stack([row, torch.ones(9)]).requires_grad_()
    value = distance_correlation(constant)
    value.backward()
    assert value.isfinite()
    assert constant.grad is not None
    assert constant.grad.isfinite().all()


def test_the_penalty_is_in_the_loss(tiny: HeteroData) -> None:
    batch = BPRBatch(torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([3, 2]))
    found = []
    for weight in (0.0, 2.0):
        model = with_graph(tiny, independence=weight)
        model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]  # there is no Trainer
        loss: Any = model.training_step(batch, 0)
        found.append(loss.item())
    assert found[1] - found[0] == pytest.approx(2 * float(distance_correlation(model.intents())), rel=1e-4)


# -- training ----------------------------------------------------------------------------------------------------------


def test_it_clearly_beats_popularity(make_data: Any, fit_options: dict[str, Any]) -> None:
    L.seed_everything(0)
    options = {"edges": 5000, "batch_size": 256, "triple_batch_size": None}
    model = KGIN(dim=16, num_layers=2, lr=5e-3)
    trainer = L.Trainer(**fit_options, max_epochs=20, limit_val_batches=0, enable_checkpointing=False)
    trainer.fit(model, make_data(**options))
    recall = trainer.test(model, make_data(**options), verbose=False)[0]["test/recall@20"]
    popular = L.Trainer(**fit_options).test(MostPopular(), make_data(**options), verbose=False)[0]["test/recall@20"]
    assert recall > 1.2 * popular


def test_a_checkpoint_gives_the_same_recommendations(
    make_data: Any, fit_options: dict[str, Any], tmp_path: Path
) -> None:
    model, data = KGIN(dim=8, num_layers=2), make_data(triple_batch_size=None)
    trainer = L.Trainer(**fit_options, max_epochs=1, callbacks=[TinyKGCallback(bits=2)])
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = KGIN.load_from_checkpoint(tmp_path / "model.ckpt")
    loaded.set_graph(data.graph)
    for found, expected in zip(loaded.recommend([0, 1, 2]), model.recommend([0, 1, 2]), strict=True):
        assert torch.equal(found, expected)


def test_a_step_is_exact_in_exact_mode_and_far_smaller_in_8_bits(make_data: Any) -> None:
    data = make_data(edges=20_000, triple_batch_size=None)
    data.setup("fit")
    model = with_graph(data.graph, dim=32)
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]  # there is no Trainer
    batch = BPRBatch(*(torch.randint(size, (64,)) for size in (model.num_users, model.num_items, model.num_items)))

    def gradient(bits: int | None) -> tuple[Tensor, float]:
        again, ratio = copy.copy(model), 1.0
        again.zero_grad()
        if bits is None:
            loss: Any = again.training_step(batch, 0)
        else:
            with compress_activations(bits=bits) as ledger:
                loss = again.training_step(batch, 0)
            ratio = ledger.ratio
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]), ratio

    plain, _ = gradient(None)
    exact, _ = gradient(32)
    assert torch.equal(exact, plain)
    rounded, ratio = gradient(8)
    assert ratio > 10
    assert float((rounded - plain).norm() / plain.norm()) < 0.02


def test_arguments_are_checked(tiny: HeteroData) -> None:
    with pytest.raises(ValueError, match=r"edge_dropout must be a number of at least 0 and below 1, got 1"):
        KGIN(edge_dropout=1)
    with pytest.raises(ValueError, match="num_intents must be a whole number of at least 1, got 0"):
        KGIN(num_intents=0)
    with pytest.raises(ValueError, match="independence must be a number of at least 0, got -1"):
        KGIN(independence=-1)
    with pytest.raises(
        ValueError, match="num_relations must be at least 1, since intents are made of relations, got 0"
    ):
        KGIN(num_users=1, num_items=1, num_entities=1, num_relations=0)
