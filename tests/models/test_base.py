import math
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch_geometric.data import HeteroData

from lightning_tinykg import HQGNN
from lightning_tinykg.data.batches import BPRBatch, RankingBatch, TripleBatch
from lightning_tinykg.data.graph import add_inverse_edges
from lightning_tinykg.models import KGAT, KGCN, KGIN, LightGCN, MostPopular, RankingModule
from lightning_tinykg.models.functional import bpr_loss, half_squared_norm, top_k

SIZES = {"num_users": 3, "num_items": 4, "num_entities": 6, "num_relations": 2}
BPR = BPRBatch(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2]), torch.tensor([3, 2, 3]))


class Fixed(RankingModule):
    """Given scores: user u likes item i by `SCORES[u, i]`."""

    SCORES = torch.tensor([[4.0, 3, 2, 1], [1, 2, 3, 4], [4, 1, 3, 2]])

    def __init__(self, k: Any = 2) -> None:
        super().__init__(lr=0.1, l2=0.0, k=k, **SIZES)
        self.embedded = 0
        self._build_if_sized()

    def build(self) -> None:
        pass

    def prepare(self, data: HeteroData) -> None:
        pass

    def embed(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.embedded += 1
        return self.SCORES, torch.eye(4)


def evaluate(model: RankingModule, *batches: RankingBatch) -> dict[str, float]:
    logged: dict[str, float] = {}
    # a stand-in
    model.log_dict = lambda values, **kwargs: logged.update({k: float(v) for k, v in values.items()})  # type: ignore[method-assign,assign,misc]
    model.on_test_epoch_start()
    for index, batch in enumerate(batches):
        model.test_step(batch, index)
    model.on_test_epoch_end()
    return logged


def pairs(*rows: tuple[int, int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.long).reshape(-1, 2).t()


def test_losses_equal_a_hand_computation() -> None:
    u, p, n = torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([[2.0, 5], [1, 1]]), torch.tensor([[1.0, 3], [1, 3]])
    expected = (math.log1p(math.exp(-1)) + math.log1p(math.exp(4))) / 2
    assert bpr_loss(u, p, n).item() == pytest.approx(expected)
    assert half_squared_norm(u, p).item() == pytest.approx((1 + 4 + 29 + 2) / 4)


def test_metrics_equal_a_hand_computation() -> None:
    # user 0: item 0 masked, so it sees 1, 2; targets 2, 3: one hit of two, at rank 2
    # user 1: sees 3, 2; target 3: one hit of one, at rank 1
    # user 2: sees 0, 2; target 1: no hit
    batch = RankingBatch(torch.tensor([0, 1, 2]), pairs((0, 0)), pairs((0, 2), (0, 3), (1, 3), (2, 1)))
    found = evaluate(Fixed(), batch)
    ideal = 1 + 1 / math.log2(3)
    assert found == {
        "test/recall@2": pytest.approx((0.5 + 1 + 0) / 3),
        "test/ndcg@2": pytest.approx((1 / math.log2(3) / ideal + 1 + 0) / 3),
    }


def test_chunks_of_users_make_no_difference_and_the_graph_is_embedded_once() -> None:
    whole = RankingBatch(torch.tensor([0, 1, 2]), pairs((0, 0)), pairs((0, 2), (0, 3), (1, 3), (2, 1)))
    parts = [
        RankingBatch(torch.tensor([0]), pairs((0, 0)), pairs((0, 2), (0, 3))),
        RankingBatch(torch.tensor([1, 2]), pairs(), pairs((0, 3), (1, 1))),
    ]
    model = Fixed()
    assert evaluate(model, *parts) == pytest.approx(evaluate(Fixed(), whole))
    assert model.embedded == 1


def test_several_cutoffs() -> None:
    batch = RankingBatch(torch.tensor([0]), pairs(), pairs((0, 1), (0, 3)))
    found = evaluate(Fixed(k=[1, 2, 10]), batch)
    assert {name: value for name, value in found.items() if "recall" in name} == {
        "test/recall@1": 0.0,
        "test/recall@2": 0.5,
        "test/recall@10": 1.0,  # more than there are items
    }


def test_a_masked_item_is_never_a_hit() -> None:
    # All of user 1's items but one are masked: its row has places that nothing may fill, and user 0's must not leak in.
    batch = RankingBatch(torch.tensor([0, 1]), pairs((1, 0), (1, 1), (1, 2)), pairs((0, 3), (1, 0)))
    assert evaluate(Fixed(), batch)["test/recall@2"] == 0.0


def test_top_k_fills_up_with_minus_one() -> None:
    items, scores = top_k(torch.ones(1, 1), torch.tensor([[3.0], [1.0], [2.0]]), 3, pairs((0, 0), (0, 2)))
    assert items.tolist() == [[1, -1, -1]]
    assert scores.tolist() == [[1.0, -math.inf, -math.inf]]


@pytest.mark.parametrize("kind", [KGAT, LightGCN, MostPopular])
def test_recommend_leaves_out_seen_items(kind: type[RankingModule], tiny: HeteroData) -> None:
    model = kind()
    model.set_graph(tiny)
    items, scores = model.recommend([2, 0], k=4)
    assert items[0, 0] == 3
    assert items[0, 1:].tolist() == [-1, -1, -1]
    assert set(items[1].tolist()) == {2, 3, -1}
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    everything, _ = model.recommend([2, 0], k=4, exclude_seen=False)
    assert everything.sort().values.tolist() == [[0, 1, 2, 3]] * 2
    one_by_one, _ = model.recommend(torch.tensor([2, 0]), k=4, chunk_size=1)
    assert torch.equal(one_by_one, items)


def test_recommend_is_an_evaluation_and_restores_the_mode(tiny: HeteroData) -> None:
    model = KGAT(dropout=0.9)
    model.set_graph(tiny)
    assert model.training
    assert torch.equal(model.recommend([0, 1])[1], model.recommend([0, 1])[1])
    assert model.training
    users, items = model.eval().embed()
    torch.testing.assert_close(model(torch.tensor([0]), torch.tensor([2])), (users[0] * items[2]).sum().view(1))


def test_recommend_says_what_is_wrong(tiny: HeteroData) -> None:
    with pytest.raises(RuntimeError, match="set_graph"):
        LightGCN(**SIZES).recommend([0])
    model = LightGCN()
    model.set_graph(tiny)
    with pytest.raises(ValueError, match=r"user_ids must be in 0\.\.2, got 0\.\.3"):
        model.recommend([0, 3])
    with pytest.raises(ValueError, match="k must be a whole number of at least 1, got 0"):
        model.recommend([0], k=0)


def test_wrong_sizes_are_named(tiny: HeteroData) -> None:
    with pytest.raises(ValueError, match=r"num_users=5.* has 3"):
        LightGCN(**(SIZES | {"num_users": 5})).set_graph(tiny)
    with pytest.raises(ValueError, match="all of num_users, num_items"):
        LightGCN(num_users=3)
    with pytest.raises(ValueError, match="k must be"):
        LightGCN(k=0)


def test_lightgcn_equals_a_dense_computation(tiny: HeteroData) -> None:
    model = LightGCN(dim=5, num_layers=2)
    model.set_graph(tiny)
    adjacency = torch.zeros(7, 7)
    for user, item in tiny["user", "interacts", "entity"].edge_index.t().tolist():
        adjacency[4 + user, item] = adjacency[item, 4 + user] = 1
    scale = adjacency.sum(0).clamp(min=1).rsqrt()
    step = scale[:, None] * adjacency * scale
    x = model.encoder.embedding.weight
    expected = (x + step @ x + step @ step @ x) / 3
    users, items = model.embed()
    torch.testing.assert_close(torch.cat([items, users]), expected)


def test_l2_is_of_the_final_embeddings_in_kgat_and_of_the_table_in_lightgcn(tiny: HeteroData) -> None:
    for model in (KGAT(dim=5, layer_dims=(3,), l2=0.1, dropout=0.0), LightGCN(dim=5, l2=0.1)):
        model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]  # a stand-in
        model.set_graph(tiny)
        users, items = model.embed()
        scored = (users[BPR.user], items[BPR.positive], items[BPR.negative])
        table = scored
        if isinstance(model, LightGCN):
            rows = model.encoder.embedding.weight
            table = (rows[4 + BPR.user], rows[BPR.positive], rows[BPR.negative])
        expected = bpr_loss(*scored) + 0.1 * sum(x.square().sum() for x in table) / 6
        torch.testing.assert_close(model.training_step(BPR, 0), expected)


def test_lightgcn_on_a_sample_of_everything_equals_the_full_graph(tiny: HeteroData) -> None:
    model = LightGCN(dim=5, l2=0.1)
    model.log = lambda *args, **kwargs: None  # type: ignore[method-assign]  # a stand-in
    model.set_graph(tiny)
    batch = add_inverse_edges(tiny)
    batch["user"].n_id, batch["entity"].n_id = torch.arange(3), torch.arange(6)
    batch["user"].src_index = BPR.user
    batch["entity"].dst_pos_index, batch["entity"].dst_neg_index = BPR.positive, BPR.negative
    torch.testing.assert_close(model.training_step(batch, 0), model.training_step(BPR, 0))
    # What was sampled in one direction only still counts.
    whole = batch["user", "interacts", "entity"].edge_index
    batch["user", "interacts", "entity"].edge_index = whole[:, :2]
    batch["entity", "rev_interacts", "user"].edge_index = whole[:, 2:].flip(0)
    torch.testing.assert_close(model.training_step(batch, 0), model.training_step(BPR, 0))


def test_lightgcn_refuses_triples(tiny: HeteroData) -> None:
    model = LightGCN()
    model.set_graph(tiny)
    with pytest.raises(TypeError, match=r"TripleBatch.*triple_batch_size=None"):
        model.training_step(TripleBatch(*torch.zeros(4, 2, dtype=torch.long)), 0)


def test_a_trainer_without_a_graph_is_told_so(fit_options: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="KGRecDataModule"):
        L.Trainer(**fit_options).fit(LightGCN(), train_dataloaders=[BPR])


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


MODELS: dict[str, Callable[[], RankingModule]] = {
    "kgat": lambda: KGAT(4, attention="frozen"),
    "kgat in-graph": lambda: KGAT(4, attention="in-graph"),
    "kgin": lambda: KGIN(4),
    "kgcn": lambda: KGCN(4),
    "lightgcn": lambda: LightGCN(4),
    "hqgnn": lambda: HQGNN(LightGCN(4), bits=2),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("alone")
def test_ddp_does_not_send_the_graph_around_at_each_step(name: str, tiny: HeteroData) -> None:
    model = MODELS[name]()
    model.set_graph(tiny)
    state = model.state_dict(keep_vars=True)
    constants = ("metrics.", "encoder.metrics.")  # tiny ones, of the metrics
    graph = {name: buffer for name, buffer in model.named_buffers() if name not in state}
    graph = {name: buffer for name, buffer in graph.items() if not name.startswith(constants)}
    assert graph
    sent = {id(buffer) for buffer in DistributedDataParallel(model).modules_buffers}
    assert not [name for name, buffer in graph.items() if id(buffer) in sent]
