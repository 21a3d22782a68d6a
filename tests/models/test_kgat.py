from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch_geometric.data import HeteroData

from lightning_tinykg.data.batches import BPRBatch, TripleBatch
from lightning_tinykg.data.graph import add_inverse_edges, collaborative_graph
from lightning_tinykg.models import KGAT
from lightning_tinykg.models.attention import RelationalAttention, RelationGroups
from lightning_tinykg.models.kgat import KGATConv
from lightning_tinykg.models.propagation import SortedEdges

SIZES = {"num_users": 3, "num_items": 4, "num_entities": 6, "num_relations": 2}
BPR = BPRBatch(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2]), torch.tensor([3, 2, 3]))
TRIPLES = TripleBatch(
    torch.tensor([0, 7, 4]), torch.tensor([1, 0, 4]), torch.tensor([4, 1, 1]), torch.tensor([5, 2, 3])
)


def random_edges(num_nodes: int = 7, num_edges: int = 40, relations: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(num_nodes, (2, num_edges)), torch.randint(relations, (num_edges,))


def quiet(model: KGAT) -> KGAT:
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]  # a stand-in
    return model


def test_attention_equals_the_formula_edge_by_edge() -> None:
    edge_index, edge_type = random_edges()
    attention, x = RelationalAttention(3, dim=5, relation_dim=4), torch.randn(7, 5)
    weight = attention(x, RelationGroups(edge_index, edge_type, 7, 3))
    score = torch.stack(
        [
            (x[t] @ attention.transform[r]) @ torch.tanh(x[h] @ attention.transform[r] + attention.relation.weight[r])
            for (t, h), r in zip(edge_index.t(), edge_type, strict=True)
        ]
    )
    for node in edge_index[1].unique():
        arriving = edge_index[1] == node
        torch.testing.assert_close(weight[arriving], score[arriving].softmax(0))


def test_attention_in_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    edge_index, edge_type = random_edges()
    attention, x = RelationalAttention(3, dim=5, relation_dim=4), torch.randn(7, 5)
    groups = RelationGroups(edge_index, edge_type, 7, 3)
    whole = attention(x, groups)
    monkeypatch.setattr("lightning_tinykg.models.attention._CHUNK", 7)
    with torch.no_grad():
        torch.testing.assert_close(attention(x, groups), whole.detach())


def test_relation_mean_gives_each_relation_of_a_node_weight_one() -> None:
    edge_index, edge_type = random_edges()
    weight = RelationGroups(edge_index, edge_type, 7, 3).relation_mean()
    for node, relation in set(zip(edge_index[1].tolist(), edge_type.tolist(), strict=True)):
        mine = weight[(edge_index[1] == node) & (edge_type == relation)]
        assert mine.sum().item() == pytest.approx(1)
        assert mine.unique().numel() == 1


@pytest.mark.parametrize("aggregator", ["bi-interaction", "sum", "concat"])
def test_layer_equals_a_dense_computation(aggregator: str) -> None:
    edge_index, _ = random_edges(num_edges=15)
    x, weight = torch.randn(7, 5), torch.rand(15)
    conv = KGATConv(5, 3, aggregator)  # type: ignore[arg-type]  # one of its literals
    adjacency = torch.zeros(7, 7)
    for (source, target), w in zip(edge_index.t().tolist(), weight, strict=True):
        adjacency[target, source] += w
    n = adjacency @ x

    def act(y: torch.Tensor, lin: torch.nn.Linear | None) -> torch.Tensor:
        assert lin is not None
        y = y @ lin.weight.t() + lin.bias
        return torch.where(y > 0, y, 0.2 * y)

    if aggregator == "concat":
        expected = act(torch.cat([x, n], dim=1), conv.lin)
    else:
        expected = act(x + n, conv.lin)
    if aggregator == "bi-interaction":
        expected = expected + act(x * n, conv.lin_product)
    torch.testing.assert_close(conv(x, edge_index, weight), expected)


def test_a_node_without_edges_keeps_an_embedding() -> None:
    out = KGATConv(5, 3)(torch.randn(2, 5), torch.zeros(2, 0, dtype=torch.long), torch.zeros(0))
    assert out.isfinite().all()


def test_embedding_is_the_row_and_every_normalised_layer(tiny: HeteroData) -> None:
    model = KGAT(dim=8, layer_dims=(6, 4), relation_dim=5, dropout=0.0)
    model.set_graph(tiny)
    users, entities = model.embed()
    assert users.shape == (3, 18)
    assert entities.shape == (6, 18)
    rows = model.embedding.weight
    torch.testing.assert_close(users[:, :8], rows[6:])
    torch.testing.assert_close(entities[:, :8], rows[:6])
    for layer in users[:, 8:].split([6, 4], dim=1):
        torch.testing.assert_close(layer.norm(dim=1), torch.ones(3))


def test_default_widths_are_the_papers() -> None:
    model = KGAT(**SIZES)
    assert [conv.lin.out_features for conv in model.convs] == [64, 32, 16]
    assert model.attentions[0].transform.shape == (6, 64, 64)  # interacts and 2 relations, and their inverses


def test_the_receiver_is_the_head(tiny: HeteroData) -> None:
    """The weight of an edge j -> i is the attention of the triple whose head is i, in TransR's numbering too."""
    model = KGAT(dim=4, relation_dim=4)
    model.set_graph(tiny)
    x, attention = model.embedding.weight, model.attentions[0]
    edges = model.groups.head_node.numel()  # type: ignore[union-attr]  # there is a graph
    assert edges
    graph = collaborative_graph(tiny)
    known = {(h, r, t) for (h, t), r in zip(graph.edge_index.t().tolist(), graph.edge_type.tolist(), strict=True)}
    # there is a graph
    relations = model.groups.head_relation[model.groups.head_of_edge].tolist()  # type: ignore[union-attr]
    for (j, i), r in zip(graph.edge_index.t().tolist(), relations, strict=True):
        assert (i, r, j) in known
    weight = model.attend(x, model.groups)  # type: ignore[arg-type]  # there is a graph
    arriving = graph.edge_index[1] == 1  # item 1: three users and entity 4
    score = torch.stack(
        [
            (x[j] @ attention.transform[r]) @ torch.tanh(x[1] @ attention.transform[r] + attention.relation.weight[r])
            for j, r in zip(graph.edge_index[0][arriving], torch.tensor(relations)[arriving], strict=True)
        ]
    )
    assert score.numel() == 4
    torch.testing.assert_close(weight[arriving], score.softmax(0).detach())


@pytest.mark.parametrize("aggregator", ["bi-interaction", "sum", "concat"])
@pytest.mark.parametrize("attention", ["refresh", "frozen", "in-graph"])
def test_gradient_reaches_everything_it_should(tiny: HeteroData, aggregator: str, attention: str) -> None:
    # one of its literals
    model = quiet(KGAT(dim=8, layer_dims=(8, 4), relation_dim=6, aggregator=aggregator, attention=attention))  # type: ignore[arg-type]
    model.set_graph(tiny)
    model.training_step(BPR, 0).backward()  # type: ignore[union-attr]  # a tensor: a step may give others
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    ranking = {name for name, _ in model.named_parameters() if not name.startswith("attentions")}
    tables = {name for name, _ in model.named_parameters() if name.startswith("attentions")}
    assert reached == (ranking | tables if attention == "in-graph" else ranking)

    model.zero_grad()
    model.training_step(TRIPLES, 0).backward()  # type: ignore[union-attr]  # a tensor: a step may give others
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {"embedding.weight", "attentions.0.transform", "attentions.0.relation.weight"}


def test_in_graph_gradients_are_right(tiny: HeteroData) -> None:
    model = KGAT(dim=3, layer_dims=(3,), relation_dim=2, attention="in-graph", dropout=0.0).double()
    model.set_graph(tiny)
    model.double()

    def embedded(rows: torch.Tensor) -> torch.Tensor:
        return model.propagate(rows, model.edge_index, model.groups, None)  # type: ignore[arg-type]  # there is a graph

    assert torch.autograd.gradcheck(embedded, model.embedding.weight.detach().requires_grad_())


def test_triple_loss_equals_the_formula(tiny: HeteroData) -> None:
    model = quiet(KGAT(dim=4, relation_dim=3, triple_l2=0.1))
    model.set_graph(tiny)
    x, w, e = model.embedding.weight, model.attentions[0].transform, model.attentions[0].relation.weight
    losses, penalties = [], []
    for h, r, t, c in zip(*TRIPLES[:4], strict=True):
        head, tail, corrupted = x[h] @ w[r], x[t] @ w[r], x[c] @ w[r]
        gap = (head + e[r] - tail).square().sum() - (head + e[r] - corrupted).square().sum()
        losses.append(torch.log1p(gap.exp()))
        penalties.append(sum(v.square().sum() / 2 for v in (head, e[r], tail, corrupted)))
    expected = torch.stack(losses).mean() + 0.1 * torch.stack(penalties).mean()
    torch.testing.assert_close(model.training_step(TRIPLES, 0), expected)
    order = TRIPLES.relation.argsort()
    counts = TRIPLES.relation.bincount(minlength=w.size(0)).tolist()
    in_order = TripleBatch(*(ids[order] for ids in TRIPLES[:4]), counts=counts)
    torch.testing.assert_close(model.training_step(in_order, 0), expected)


def test_refresh_follows_the_embeddings_once_an_epoch(tiny: HeteroData) -> None:
    model = KGAT(dim=8, relation_dim=8, dropout=0.0)
    model.set_graph(tiny)
    model.on_train_epoch_start()
    first = model.edge_weight.clone()  # type: ignore[union-attr]  # there is a graph
    with torch.no_grad():
        model.embedding.weight.mul_(30)
    model.embed()
    torch.testing.assert_close(model.edge_weight, first)  # within the epoch: the same
    model.eval()
    evaluated, _ = model.embed()
    torch.testing.assert_close(model.edge_weight, first)  # evaluation leaves training's attention alone ...
    model.train()
    model.on_train_epoch_start()
    assert not torch.allclose(model.edge_weight, first)  # type: ignore[arg-type]  # there is a graph
    torch.testing.assert_close(model.embed()[0], evaluated)  # ... and sees that of the parameters it evaluates


def test_dropout_acts_in_training_only(tiny: HeteroData) -> None:
    model = KGAT(dim=8, attention="frozen", dropout=0.5)
    model.set_graph(tiny)
    assert not torch.equal(model.embed()[0], model.embed()[0])
    model.eval()
    assert torch.equal(model.embed()[0], model.embed()[0])


@pytest.mark.parametrize("attention", ["refresh", "frozen", "in-graph"])
def test_a_sample_of_everything_equals_the_full_graph(tiny: HeteroData, attention: str) -> None:
    # one of its literals
    model = quiet(KGAT(dim=8, attention=attention, dropout=0.0, l2=0.1))  # type: ignore[arg-type]
    model.set_graph(tiny)
    batch = add_inverse_edges(tiny)
    batch["user"].n_id, batch["entity"].n_id = torch.arange(3), torch.arange(6)
    batch["user"].src_index = BPR.user
    batch["entity"].dst_pos_index, batch["entity"].dst_neg_index = BPR.positive, BPR.negative
    torch.testing.assert_close(model.training_step(batch, 0), model.training_step(BPR, 0))


def test_a_sampled_batch_looks_up_global_rows(tiny: HeteroData) -> None:
    model = KGAT(dim=8, attention="frozen", dropout=0.0)
    model.set_graph(tiny)
    batch = tiny.clone()
    batch["user"].n_id, batch["entity"].n_id = torch.tensor([2, 0, 1]), torch.tensor([3, 2, 1, 0, 5, 4])
    users, entities = model.embed_sampled(batch)
    rows = model.embedding.weight
    torch.testing.assert_close(users[:, :8], rows[6 + torch.tensor([2, 0, 1])])
    torch.testing.assert_close(entities[:, :8], rows[torch.tensor([3, 2, 1, 0, 5, 4])])


@pytest.mark.parametrize(
    ("argument", "value", "right"),
    [
        ("aggregator", "mean", "bi-interaction, sum, concat"),
        ("attention", "none", "refresh, frozen, in-graph"),
        ("dropout", 1.0, "must be a number of at least 0 and below 1, got 1.0"),
    ],
)
def test_wrong_arguments_are_named(argument: str, value: object, right: str) -> None:
    with pytest.raises(ValueError, match=argument) as error:
        KGAT(**{argument: value})  # type: ignore[arg-type]  # refused
    assert right in str(error.value)
    assert str(value) in str(error.value)


# -- the sparse product -----------------------------------------------------------------------------------------------


def embedded(model: KGAT, *watches: int) -> list[torch.Tensor]:
    """Users, entities and the gradient of the tables; edge by edge where a layer is watched."""
    seen = [model.convs[at].register_message_forward_hook(lambda *args: None) for at in watches]
    users, entities = model.embed()
    loss = users.sin().sum() + entities.square().sum()
    gradients = torch.autograd.grad(loss, [model.embedding.weight, model.convs[0].lin.weight])
    for hook in seen:
        hook.remove()
    return [users, entities, *gradients]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("attention", ["refresh", "frozen", "in-graph"])
def test_the_product_with_a_matrix_is_the_sum_over_edges(
    make_data: Any, attention: str, dtype: torch.dtype, training: bool
) -> None:
    data = make_data()
    data.setup("fit")
    model = KGAT(5, [4, 3], relation_dim=4, attention=attention, dropout=0.0)
    model.set_graph(data.graph)
    model.to(dtype).train(training)
    torch.testing.assert_close(embedded(model), embedded(model, 0, 1))
    torch.testing.assert_close(embedded(model, 1), embedded(model, 0))


def test_hooks_see_the_edges_of_their_layer(tiny: HeteroData) -> None:
    model = KGAT(5, [4, 3], attention="frozen")
    model.set_graph(tiny)
    messages: list[int] = []
    model.convs[1].register_message_forward_hook(lambda conv, inputs, out: messages.append(out.size(0)))
    model.embed()
    assert model.edge_index is not None
    assert messages == [model.edge_index.size(1)]


def test_a_layer_takes_edges_or_a_matrix() -> None:
    edge_index, weight = torch.tensor([[1, 2], [0, 0]]), torch.tensor([0.5, 2.0])
    x, matrix, conv = torch.randn(3, 4), SortedEdges(edge_index, 3).weighted(weight), KGATConv(4, 2)
    torch.testing.assert_close(conv(x, edge_index, weight, matrix), conv(x, edge_index, weight))


def test_a_layer_of_the_users_own_is_given_the_edges(tiny: HeteroData) -> None:
    class Halved(KGATConv):
        def message(self, x_j: torch.Tensor, edge_weight: torch.Tensor) -> torch.Tensor:
            return 0.5 * super().message(x_j, edge_weight)

    class Other(torch.nn.Module):
        def forward(self, x: torch.Tensor, edge_index: torch.Tensor, edge_weight: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x).index_add(0, edge_index[1], edge_weight[:, None] * x[edge_index[0]])

    model = KGAT(4, [4, 4], attention="frozen", dropout=0.0)
    model.set_graph(tiny)
    before = model.embed()
    for own in (Halved(4, 4), Other()):
        model.convs[0] = own
        assert not torch.equal(model.embed()[0], before[0])


def test_weights_that_change_in_place_are_seen(tiny: HeteroData) -> None:
    model = KGAT(5, [4], attention="frozen", dropout=0.0)
    model.set_graph(tiny)
    before = model.embed()[0]
    assert model.edge_weight is not None
    model.edge_weight.mul_(2)
    after = model.embed()[0]
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, embedded(model, 0)[0])
    with torch.inference_mode():
        torch.testing.assert_close(model.eval().embed()[0], after)


def test_nothing_of_the_size_of_the_edges_is_made(make_data: Any) -> None:
    data = make_data()
    data.setup("fit")
    model = KGAT(8, [8], attention="frozen")
    model.set_graph(data.graph)
    model.embed()  # which sorts the weights
    assert model.edge_index is not None
    edges, made = model.edge_index.size(1), 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal made
            out = func(*args, **(kwargs or {}))
            made = max(
                [made, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor) and not t.is_sparse_csr)]
            )
            return out

    with Sizes():
        users, _ = model.embed()
        users.sum().backward()
    assert made < 8 * edges


@pytest.mark.compile
def test_compiled_without_a_break(tiny: HeteroData) -> None:
    model = KGAT(5, [4, 3], attention="frozen", dropout=0.0)
    model.set_graph(tiny)
    found = []
    for embed in (model.embed, torch.compile(model.embed, fullgraph=True, backend="aot_eager")):
        users, entities = embed()
        (gradient,) = torch.autograd.grad(users.sum() + entities.square().sum(), model.embedding.weight)
        found.append((users, entities, gradient))
    torch.testing.assert_close(found[0], found[1])
