"""KGNN-LS: label propagation against its definition, for one pair at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import HeteroData

from lightning_tinykg.data.ctr import NEGATIVE, CTRBatch
from lightning_tinykg.models import KGCN, KGNNLS

# User 0 likes 0 and 1; user 1 likes 1; user 2 likes 0, 1, 2 (see conftest). User 0 dislikes 2, user 1 dislikes 0 and 3.
DISLIKES = torch.tensor([[0, 1, 1], [2, 0, 3]])
ALL = torch.cartesian_prod(torch.arange(3), torch.arange(4))


@pytest.fixture
def labelled(tiny: HeteroData) -> HeteroData:
    tiny[NEGATIVE].edge_index = DISLIKES
    return tiny


def ready(graph: HeteroData, **options: Any) -> KGNNLS:
    model = KGNNLS(**({"dim": 5, "neighbors": 3, "hops": 2} | options))
    model.set_graph(graph)
    for table in (model.user, model.relation):
        nn.init.normal_(table.weight)
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]  # a stand-in
    return model


def known(graph: HeteroData, user: int, entity: int) -> float | None:
    for edge_type, label in ((("user", "interacts", "entity"), 1.0), (NEGATIVE, 0.0)):
        if [user, entity] in graph[edge_type].edge_index.t().tolist():
            return label
    return None


def propagated(model: KGNNLS, graph: HeteroData, user: int, item: int, entity: int, hop: int) -> Tensor:
    """The label of an entity after `hop` steps, with that of `item` held out, by recursion."""
    label = None if entity == item else known(graph, user, entity)
    if hop == 0 or label is not None:
        return torch.tensor(0.5 if label is None else label)
    likes = model.relation.weight[model.neighbor_relation[entity]] @ model.user.weight[user]
    code = model.scaling == "code"
    around = [propagated(model, graph, user, item, int(n), hop - 1) for n in model.neighbor[entity]]
    mixed = torch.stack(around) @ (likes / (model.dim if code else 1)).softmax(0)
    return mixed / (model.neighbors if code else 1)


@pytest.mark.parametrize("scaling", ["paper", "code"])
@pytest.mark.parametrize("hops", [1, 2, 3])
def test_predicted_labels_equal_the_definition(labelled: HeteroData, hops: int, scaling: Any) -> None:
    model = ready(labelled, hops=hops, scaling=scaling)
    user, item = ALL.t()
    found = model.predicted_labels(user, model.receptive_field(model.user(user), item))
    expected = torch.stack([propagated(model, labelled, u, i, i, hops) for u, i in ALL.tolist()])
    torch.testing.assert_close(found, expected)
    if hops > 1:  # one hop from an item there are no items in this graph, and nothing is known of other entities
        assert found.std() > 0.01


def test_an_items_own_label_is_held_out(labelled: HeteroData) -> None:
    model = ready(labelled)
    pairs = torch.tensor([[0, 1]]).t()
    user, item = pairs

    def predicted() -> Tensor:
        return model.predicted_labels(user, model.receptive_field(model.user(user), item))

    before = predicted()
    at = model.known == user * model.num_entities + item
    assert int(at.sum()) == 1
    model.known_label[at] = 0.0
    assert torch.equal(predicted(), before)
    model.known_label[~at] = 1 - model.known_label[~at]  # those of the others count
    assert not torch.equal(predicted(), before)


def test_the_loss_is_kgcns_and_the_label_smoothness(labelled: HeteroData) -> None:
    user, item = ALL.t()
    batch = CTRBatch(user, item, torch.tensor([known(labelled, u, i) or 0.0 for u, i in ALL.tolist()]))
    for scaling in ("paper", "code"):
        model = ready(labelled, ls_weight=0.3, scaling=scaling)
        predicted = model.predicted_labels(user, model.receptive_field(model.user(user), item))
        if scaling == "paper":
            smoothness = F.binary_cross_entropy(predicted, batch.label)
        else:
            smoothness = F.binary_cross_entropy_with_logits(predicted, batch.label)
        plain = super(KGNNLS, model).regularise(user, item, batch.label, None)
        assert plain == {}
        base = F.binary_cross_entropy_with_logits(model(user, item), batch.label) + model.l2 * model.penalty()
        torch.testing.assert_close(model.training_step(batch, 0), base + 0.3 * smoothness)


def test_scores_are_kgcns(labelled: HeteroData) -> None:
    ours, theirs = ready(labelled), KGCN(dim=5, neighbors=3, hops=2)
    theirs.set_graph(labelled)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    assert torch.equal(ours(*ALL.t()), theirs(*ALL.t()))


def test_the_smoothness_trains_the_weights_and_nothing_else(labelled: HeteroData) -> None:
    model = ready(labelled)
    user, item = ALL.t()
    label = torch.ones(12)
    _, field = model.score(user, item)
    _, loss = model.regularise(user, item, label, field)["ls_loss"]
    loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {"user.weight", "relation.weight"}


def test_certain_labels_give_finite_gradients(labelled: HeteroData) -> None:
    # All is known around item 1 but itself, and all of it is liked, or all disliked: the prediction is 1, or 0.
    model = ready(labelled, hops=2)
    user, item = torch.tensor([0, 0]), torch.tensor([1, 1])
    for value in (0.0, 1.0):
        model.zero_grad()
        model.neighbor[:] = 0
        model.known, model.known_label = torch.tensor([0]), torch.tensor([value])
        predicted = model.predicted_labels(user, model.receptive_field(model.user(user), item))
        torch.testing.assert_close(predicted, torch.full((2,), value))
        _, field = model.score(user, item)
        _, loss = model.regularise(user, item, torch.tensor([0.0, 1.0]), field)["ls_loss"]
        loss.backward()
        assert loss.isfinite()
        assert model.relation.weight.grad is not None
        assert model.relation.weight.grad.abs().max() < 1e-3


def test_without_given_negatives_as_many_as_positives_are_sampled(tiny: HeteroData) -> None:
    model = ready(tiny)
    user, item = ALL.t()
    label, is_known = model.labels(user, item)
    likes = set(zip(*tiny["user", "interacts", "entity"].edge_index.tolist(), strict=True))
    found = {(u, i): float(y) for (u, i), y, k in zip(ALL.tolist(), label, is_known, strict=True) if k}
    assert {pair for pair, y in found.items() if y == 1} == likes
    disliked = [u for (u, _), y in found.items() if y == 0]
    assert [disliked.count(u) for u in range(3)] == [2, 1, 1]  # user 2 has one item left
    assert (label[~is_known] == 0.5).all()
    again = ready(tiny)
    assert torch.equal(again.known, model.known)


def test_weight_is_checked() -> None:
    with pytest.raises(ValueError, match="ls_weight must be a number of at least 0, got -1"):
        KGNNLS(ls_weight=-1)
