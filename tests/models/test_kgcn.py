"""KGCN against its formulas, written out for one user and one entity at a time."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from lightning_tinykg.data import CTRDataModule
from lightning_tinykg.models import KGCN
from lightning_tinykg.models.kgcn import KGCNAggregator

SIZES = {"num_users": 3, "num_items": 4, "num_entities": 6, "num_relations": 2}
ALL = torch.cartesian_prod(torch.arange(3), torch.arange(4))  # every user with every item
AGGREGATORS = ["sum", "concat", "neighbor"]


def ready(tiny: HeteroData, **options: Any) -> KGCN:
    """A model whose embeddings are large enough that users weigh relations differently."""
    model = KGCN(**({"dim": 5, "neighbors": 3} | options))
    model.set_graph(tiny)
    for table in (model.user, model.entity, model.relation):
        nn.init.normal_(table.weight)
    return model


def weights(model: KGCN, user: int, entity: int) -> Tensor:
    """The softmax over an entity's neighbours, from the formula."""
    relation = model.relation.weight[model.neighbor_relation[entity]]
    score = torch.stack([model.user.weight[user] @ r for r in relation])
    return (score / (model.dim if model.scaling == "code" else 1)).softmax(0)


def embedded(model: KGCN, user: int, entity: int, hop: int) -> Tensor:
    """`v_u[hop]`, by recursion."""
    if hop == 0:
        return model.entity.weight[entity]
    around = [
        w * embedded(model, user, int(n), hop - 1)
        for w, n in zip(weights(model, user, entity), model.neighbor[entity], strict=True)
    ]
    own = embedded(model, user, entity, hop - 1)
    mixed = torch.stack(around).sum(0) / (model.neighbors if model.scaling == "code" else 1)
    lin = model.aggregators[hop - 1].lin
    x = {"sum": own + mixed, "concat": torch.cat([own, mixed]), "neighbor": mixed}[model.aggregator]
    y = lin.weight @ x + lin.bias
    return torch.tanh(y) if hop == model.hops else torch.relu(y)


@pytest.mark.parametrize("scaling", ["paper", "code"])
@pytest.mark.parametrize("hops", [1, 2, 3])
@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_score_equals_the_formula(tiny: HeteroData, aggregator: Any, hops: int, scaling: Any) -> None:
    model = ready(tiny, aggregator=aggregator, hops=hops, scaling=scaling)
    for aggregate in model.aggregators:
        nn.init.normal_(aggregate.lin.bias)
    expected = torch.stack([model.user.weight[u] @ embedded(model, u, i, hops) for u, i in ALL.tolist()])
    torch.testing.assert_close(model(*ALL.t()), expected)
    assert expected.std() > 0.1


@pytest.mark.parametrize("hops", [1, 2, 3])
@pytest.mark.parametrize("floats", [1, 100, 1 << 22])
def test_the_full_ranking_scores_exactly_the_pairs(
    tiny: HeteroData, hops: int, floats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_tinykg.models.kgcn._FLOATS", floats)  # in pieces of one row, of some, in one piece
    for aggregator, scaling in (("sum", "code"), ("concat", "paper"), ("neighbor", "paper")):
        model = ready(tiny, hops=hops, aggregator=aggregator, scaling=scaling)
        found = model.score_items(torch.tensor([2, 0, 1, 0]))
        assert found.shape == (4, 4)
        assert not found.requires_grad
        torch.testing.assert_close(found, model(*ALL.t()).detach().view(3, 4)[[2, 0, 1, 0]])


def test_users_see_an_item_differently(tiny: HeteroData) -> None:
    model = ready(tiny)
    field = model.receptive_field(model.user.weight, torch.tensor([1, 1, 1]))
    assert field.entities[1].tolist() == [model.neighbor[1].tolist()] * 3
    model.neighbor_relation[1] = torch.tensor([0, 1, 1])
    field = model.receptive_field(model.user.weight, torch.tensor([1, 1, 1]))
    torch.testing.assert_close(field.weights[0][:, 0], torch.stack([weights(model, u, 1) for u in range(3)]))
    assert (field.weights[0][0] - field.weights[0][1]).abs().max() > 0.01


def test_gradients_are_right_and_reach_every_parameter(tiny: HeteroData) -> None:
    model = ready(tiny, hops=2, dim=3).double()
    model.set_graph(tiny)

    def scores(user: Tensor, entity: Tensor, relation: Tensor) -> Tensor:
        tables = {"user.weight": user, "entity.weight": entity, "relation.weight": relation}
        out: Tensor = torch.func.functional_call(model, tables, tuple(ALL.t()))
        return out

    tables = [table.weight.detach().requires_grad_() for table in (model.user, model.entity, model.relation)]
    assert torch.autograd.gradcheck(scores, tables)
    model(*ALL.t()).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_penalty_is_half_the_squared_norm_of_everything_but_biases(tiny: HeteroData) -> None:
    model = ready(tiny, hops=2)
    for aggregate in model.aggregators:
        nn.init.ones_(aggregate.lin.bias)
    free = sum(p.numel() for name, p in model.named_parameters() if "bias" in name)
    assert free == 10
    expected = sum(p.square().sum() for p in model.parameters()) / 2 - free / 2
    torch.testing.assert_close(model.penalty(), expected)


def test_no_neighbour_is_an_answer_too(tiny: HeteroData) -> None:
    tiny["entity", "relates", "entity"].edge_index = torch.zeros(2, 0, dtype=torch.long)
    tiny["entity", "relates", "entity"].edge_type = torch.zeros(0, dtype=torch.long)
    for aggregator in AGGREGATORS:
        model = ready(tiny, aggregator=aggregator, hops=2)
        assert (model.neighbor_relation == 2).all()
        expected = torch.stack([model.user.weight[u] @ embedded(model, u, i, 2) for u, i in ALL.tolist()])
        torch.testing.assert_close(model(*ALL.t()), expected)


def test_widths_of_the_aggregators() -> None:
    for aggregator in AGGREGATORS:
        layer = KGCNAggregator(4, aggregator, nn.ReLU())  # type: ignore[arg-type]  # one of its literals
        assert layer.lin.weight.shape == (4, 8 if aggregator == "concat" else 4)
        assert layer(torch.ones(2, 3, 4), torch.ones(2, 3, 4)).shape == (2, 3, 4)
    assert [type(layer.activation) for layer in KGCN(hops=3, **SIZES).aggregators] == [nn.ReLU, nn.ReLU, nn.Tanh]


@pytest.mark.parametrize(
    ("argument", "value", "right"),
    [
        ("aggregator", "mean", "sum, concat, neighbor"),
        ("scaling", "none", "must be one of paper, code, got 'none'"),
        ("hops", 0, "at least 1"),
        ("neighbors", 0, "at least 1"),
        ("loss", "mse", "bce, bpr"),
    ],
)
def test_wrong_arguments_are_named(argument: str, value: object, right: str) -> None:
    with pytest.raises(ValueError, match=argument) as error:
        KGCN(**{argument: value})  # type: ignore[arg-type]  # refused
    assert right in str(error.value)
    assert str(value) in str(error.value)


@pytest.mark.slow
def test_music_reaches_the_published_auc(real_data: Path, fit_options: dict[str, Any]) -> None:
    """KGCN-sum on Last.FM: AUC 0.794 (Wang et al., WWW 2019), with the settings of the authors' `main.py`."""
    if not (real_data / "music").is_dir():
        pytest.skip(f"no music in {real_data}")
    L.seed_everything(0)
    data = CTRDataModule(real_data / "music", cache_dir=False)
    model = KGCN(scaling="code")
    trainer = L.Trainer(**fit_options, max_epochs=10, enable_checkpointing=False, limit_val_batches=0)
    trainer.fit(model, data)
    found = trainer.test(model, data, verbose=False)[0]["test/auc"]
    assert found == pytest.approx(0.794, abs=0.01)
