"""LightGCN's sparse product gives what PyG's layers give, edge by edge, whatever the precision, and its gradient."""

from copy import deepcopy
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch_geometric.data import HeteroData
from torch_geometric.nn import LGConv

from lightning_tinykg import TinyKGCallback
from lightning_tinykg.models import LightGCN
from lightning_tinykg.models.propagation import SparseMatrix, propagate, row_starts


def with_graph(graph: HeteroData, **options: Any) -> LightGCN:
    model = LightGCN(dim=5, **options)
    model.set_graph(graph)
    return model


def edge_by_edge(model: LightGCN) -> tuple[Tensor, Tensor]:
    out = model.encoder.get_embedding(model.edge_index, model.edge_weight)
    return out[model.num_items :], out[: model.num_items]


@pytest.fixture
def graph(make_data: Any) -> HeteroData:
    data = make_data()
    data.setup("fit")
    return data.graph


def test_items_are_ranked_in_float32_under_autocast_too(make_data: Any, fit_options: dict[str, Any]) -> None:
    """With a bfloat16's 8 bits many items would score the same; what is served is ranked in float32."""
    data = make_data(triple_batch_size=None)
    model = LightGCN(dim=16, lr=0.01, k=[5, 20])
    L.Trainer(**fit_options | {"max_epochs": 2}).fit(model, data)
    exact, mixed = (
        L.Trainer(**fit_options | {"precision": precision}).test(model, data, verbose=False)
        for precision in ("32-true", "bf16-mixed")
    )
    assert mixed == exact


@pytest.mark.parametrize("num_layers", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_embeddings_and_gradient_are_those_of_the_layers(
    graph: HeteroData, num_layers: int, dtype: torch.dtype
) -> None:
    model = with_graph(graph, num_layers=num_layers).to(dtype)
    table = model.encoder.embedding.weight
    found = []
    for embed in (model.embed, lambda: edge_by_edge(model)):
        users, items = embed()
        assert users.dtype == items.dtype == dtype
        (gradient,) = torch.autograd.grad(users.sin().sum() + items.square().sum(), table)
        found.append((users, items, gradient))
    assert found[0][0].shape == (model.num_users, 5)
    torch.testing.assert_close(found[0], found[1])


def test_the_gradient_is_differentiable_and_right(tiny: HeteroData) -> None:
    model = with_graph(tiny).double()
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)

    def once(x: Tensor) -> Tensor:
        return propagate(x, SparseMatrix.symmetric(model.edge_start, model.edge_index[1], model.edge_weight))

    assert torch.autograd.gradcheck(once, x)
    assert torch.autograd.gradgradcheck(lambda x: once(x).sin(), x)


def test_nodes_without_edges_get_nothing() -> None:
    starts = row_starts(torch.tensor([], dtype=torch.int64), num_nodes=3)
    nothing = torch.tensor([], dtype=torch.int64)
    matrix = SparseMatrix.symmetric(starts, nothing, torch.ones(0))
    assert torch.equal(propagate(torch.ones(3, 2), matrix), torch.zeros(3, 2))


def test_half_precision_is_summed_in_float32(graph: HeteroData) -> None:
    model = with_graph(graph)
    exact = model.embed()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            users, items = model.embed()
        assert torch.equal(users, exact[0])
        assert torch.equal(items, exact[1])
    half = deepcopy(model).to(torch.bfloat16)
    users, items = half.embed()
    assert users.dtype == torch.bfloat16
    torch.testing.assert_close((users.float(), items.float()), exact, rtol=0.05, atol=0.01)
    users.sum().backward()
    assert half.encoder.embedding.weight.grad.dtype == torch.bfloat16


def test_nothing_of_the_size_of_the_edges_is_kept_for_backward(graph: HeteroData) -> None:
    model = with_graph(graph)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() // 5)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.embed()
    edges = model.edge_index.size(1)
    assert edges > 2 * (model.num_users + model.num_items)
    assert all(size < edges for size in kept)


def test_what_looks_into_the_layers_sees_their_edges(tiny: HeteroData) -> None:
    """Hooks on PyG's layers, a replaced method or a replaced layer go on working."""
    model = with_graph(tiny, num_layers=2)
    plain = model.embed()
    seen: list[Any] = []
    removers = [
        model.encoder.convs[0].register_propagate_forward_pre_hook(lambda *args: seen.append("propagate")),
        model.encoder.convs[1].register_forward_hook(lambda *args: seen.append("forward")),
    ]
    torch.testing.assert_close(model.embed(), plain)
    assert seen == ["propagate", "forward"]
    for remover in removers:
        remover.remove()
    model.embed()
    assert len(seen) == 2
    model.encoder.convs[0].message = lambda x_j, edge_weight: torch.zeros_like(x_j)
    assert not torch.equal(model.embed()[0], plain[0])
    del model.encoder.convs[0].message

    class Twice(LGConv):  # type: ignore[misc]  # PyG is untyped here
        def forward(self, *args: Any) -> Tensor:
            return 2 * super().forward(*args)

    model.encoder.convs[0] = Twice(normalize=False)
    assert not torch.equal(model.embed()[0], plain[0])


def test_the_state_dict_is_that_of_earlier_checkpoints(tiny: HeteroData) -> None:
    state = with_graph(tiny).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "encoder.alpha": (4,),
        "encoder.embedding.weight": (7, 5),
    }


@pytest.mark.compile
def test_compiled_without_a_break(graph: HeteroData) -> None:
    model = with_graph(graph)
    found = []
    for embed in (model.embed, torch.compile(model.embed, fullgraph=True, backend="aot_eager")):
        users, items = embed()
        (gradient,) = torch.autograd.grad(users.sum() + items.square().sum(), model.encoder.embedding.weight)
        found.append((users, items, gradient))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_it_learns_in_any_precision_and_compressed(precision: Any, make_data: Any, fit_options: dict[str, Any]) -> None:
    model = LightGCN(dim=16, lr=0.02)
    options = {"precision": precision, "max_epochs": 3, "enable_checkpointing": False, "limit_val_batches": 0}
    losses: list[float] = []

    class Losses(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            losses.append(float(trainer.callback_metrics["train/loss"]))

    callbacks = [Losses(), TinyKGCallback(bits=2, summary=False)]
    L.Trainer(**(fit_options | options), callbacks=callbacks).fit(model, make_data(triple_batch_size=None))
    assert losses[-1] < losses[0]
