"""Models without item embeddings: both protocols, from the loss to the metrics."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch_geometric.data import HeteroData

from lightning_tinykg import HQGNN, TinyKGCallback
from lightning_tinykg.data import CTRDataModule
from lightning_tinykg.data.batches import BPRBatch, RankingBatch, TripleBatch
from lightning_tinykg.data.ctr import CTRBatch
from lightning_tinykg.models import KGCN, KGNNLS, MostPopular, PairModule

SIZES = {"num_users": 3, "num_items": 4, "num_entities": 6, "num_relations": 2}
BPR = BPRBatch(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2]), torch.tensor([3, 2, 3]))
CTR = CTRBatch(torch.tensor([0, 1, 2, 2]), torch.tensor([0, 3, 2, 3]), torch.tensor([1.0, 0, 1, 0]))


class Fixed(PairModule):
    """Given logits: user u likes item i by `SCORES[u, i]`."""

    SCORES = torch.tensor([[4.0, 3, -2, -1], [-1, 2, 3, 4], [4, 1, 3, 2]])

    def __init__(self, loss: Any = "bce", k: Any = 2) -> None:
        super().__init__(loss=loss, lr=0.1, l2=0.1, k=k, **SIZES)
        self._build_if_sized()

    def build(self) -> None:
        pass

    def prepare(self, data: HeteroData) -> None:
        pass

    def score(self, user: Tensor, item: Tensor) -> tuple[Tensor, None]:
        return self.SCORES[user, item], None

    def score_items(self, user: Tensor) -> Tensor:
        return self.SCORES[user].clone()

    def penalty(self) -> Tensor:
        return torch.tensor(5.0)


def quiet(model: PairModule) -> dict[str, float]:
    """Collect what a model logs."""
    logged: dict[str, float] = {}

    def log(name: str, value: Tensor, **kwargs: Any) -> None:
        logged[name] = float(value)

    model.log = log  # type: ignore[method-assign,assign]  # a stand-in
    # a stand-in
    model.log_dict = lambda values, **kwargs: logged.update({k: float(v) for k, v in values.items()})  # type: ignore[method-assign,assign,misc]
    return logged


def evaluate(model: PairModule, *batches: Any) -> dict[str, float]:
    logged = quiet(model)
    model.on_test_epoch_start()
    for index, batch in enumerate(batches):
        model.test_step(batch, index)
    model.on_test_epoch_end()
    return logged


def pairs(*rows: tuple[int, int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.long).reshape(-1, 2).t()


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_losses_equal_a_hand_computation() -> None:
    model = Fixed()
    logged = quiet(model)
    bce = (softplus(-4) + softplus(4) + softplus(-3) + softplus(2)) / 4
    # a tensor: a step may give others
    assert float(model.training_step(CTR, 0)) == pytest.approx(bce + 0.5)  # type: ignore[arg-type]
    assert logged == {"train/bce_loss": pytest.approx(bce), "train/loss": pytest.approx(bce + 0.5)}
    bce = (softplus(-4) + softplus(-2) + softplus(-3) + softplus(-1) + softplus(3) + softplus(2)) / 6
    # a tensor: a step may give others
    assert float(model.training_step(BPR, 0)) == pytest.approx(bce + 0.5)  # type: ignore[arg-type]
    model = Fixed("bpr")
    logged = quiet(model)
    bpr = (softplus(-5) + softplus(1) + softplus(-1)) / 3
    # a tensor: a step may give others
    assert float(model.training_step(BPR, 0)) == pytest.approx(bpr + 0.5)  # type: ignore[arg-type]
    assert logged["train/bpr_loss"] == pytest.approx(bpr)


def test_auc_and_f1_equal_a_hand_computation_however_the_pairs_are_batched() -> None:
    # Logits 4, 4 (wrong), 3, 2 (wrong), -2 (wrong): six pairs of a positive and a negative, 3 right, one a tie.
    batch = CTRBatch(torch.tensor([0, 1, 2, 2, 0]), torch.tensor([0, 3, 2, 3, 2]), torch.tensor([1.0, 0, 1, 0, 1]))
    auc, f1 = (0.5 + 1 + 0 + 1 + 0 + 0) / 6, 2 * 2 / (2 * 2 + 2 + 1)
    parts = [CTRBatch(*(x[:2] for x in batch)), CTRBatch(*(x[2:] for x in batch))]
    for batches in ([batch], parts):
        assert evaluate(Fixed(), *batches) == {"test/auc": pytest.approx(auc), "test/f1": pytest.approx(f1)}


def test_logits_between_0_and_1_are_not_taken_for_probabilities() -> None:
    model = Fixed()
    model.SCORES = model.SCORES.abs() / 10  # each is above 0, so each pair is predicted to be clicked
    assert evaluate(model, CTR)["test/f1"] == pytest.approx(2 * 2 / (2 * 2 + 2))


def test_an_evaluation_forgets_the_one_before() -> None:
    model = Fixed()
    ranking = RankingBatch(torch.tensor([0]), pairs(), pairs((0, 0)))
    first = evaluate(model, CTR)
    assert evaluate(model, ranking) == {"test/recall@2": 1.0, "test/ndcg@2": 1.0}
    assert evaluate(model, CTR) == first


def test_ranking_metrics_equal_a_hand_computation() -> None:
    # As in test_base: user 0 sees 1, 3 (0 is masked); user 1 sees 3, 2; user 2 sees 0, 2.
    batch = RankingBatch(torch.tensor([0, 1, 2]), pairs((0, 0)), pairs((0, 2), (0, 3), (1, 3), (2, 1)))
    assert evaluate(Fixed(), batch) == {
        "test/recall@2": pytest.approx((0.5 + 1 + 0) / 3),
        "test/ndcg@2": pytest.approx((1 / math.log2(3) / (1 + 1 / math.log2(3)) + 1 + 0) / 3),
    }


def test_what_has_no_loss_is_named() -> None:
    with pytest.raises(TypeError, match=r"TripleBatch.*triple_batch_size=None"):
        Fixed().training_step(TripleBatch(*torch.zeros(4, 2, dtype=torch.long)), 0)
    with pytest.raises(ValueError, match="loss must be one of bce, bpr, got 'mse'"):
        Fixed("mse")


def test_it_is_no_encoder_of_hqgnn(tiny: HeteroData) -> None:
    model = HQGNN(KGCN(**SIZES), bits=4)
    model.set_graph(tiny)
    with pytest.raises(TypeError, match="KGCN has no item embeddings: they depend on the user"):
        model.embed()


@pytest.mark.parametrize("kind", [KGCN, KGNNLS])
@pytest.mark.parametrize("hops", [1, 2])
def test_recommend_leaves_out_seen_items(kind: type[KGCN], hops: int, tiny: HeteroData) -> None:
    model = kind(hops=hops)
    model.set_graph(tiny)
    items, scores = model.recommend([2, 0], k=4)
    assert items[0].tolist() == [3, -1, -1, -1]  # user 2 has seen the others
    assert set(items[1].tolist()) == {2, 3, -1}
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    everything, scores = model.recommend(torch.tensor([2, 0]), k=9, exclude_seen=False, chunk_size=1)
    assert everything.sort().values.tolist() == [[0, 1, 2, 3]] * 2
    torch.testing.assert_close(model(torch.tensor([2] * 4), everything[0]), scores[0], check_device=False)


def test_recommend_says_what_is_wrong(tiny: HeteroData) -> None:
    with pytest.raises(RuntimeError, match="set_graph"):
        KGCN(**SIZES).recommend([0])
    model = KGCN()
    model.set_graph(tiny)
    with pytest.raises(ValueError, match=r"user_ids must be in 0\.\.2, got 0\.\.3"):
        model.recommend([0, 3])
    with pytest.raises(ValueError, match="k must be a whole number of at least 1, got 0"):
        model.recommend([0], k=0)


def test_recommend_is_an_evaluation_and_restores_the_mode(tiny: HeteroData) -> None:
    model = Fixed()
    model.set_graph(tiny)
    modes = []
    model.score_items = lambda user: modes.append(model.training) or model.SCORES[user].clone()  # type: ignore[method-assign,func-returns-value]  # spied on
    assert model.recommend([0, 1], k=2, exclude_seen=False)[0].tolist() == [[0, 1], [3, 2]]
    assert modes == [False]
    assert model.training


# -- under a Trainer ------------------------------------------------------------------------------------------------


def fit(model: Any, data: Any, options: dict[str, Any], **more: Any) -> L.Trainer:
    trainer = L.Trainer(**(options | {"enable_checkpointing": False} | more))
    trainer.fit(model, data)
    return trainer


@pytest.mark.parametrize("kind", [KGCN, KGNNLS])
def test_both_protocols_log_what_is_promised(kind: type[KGCN], make_data: Any, fit_options: dict[str, Any]) -> None:
    extra = {"train/ls_loss"} if kind is KGNNLS else set()
    for data, first, metrics in (
        (CTRDataModule("synthetic:1000"), "train/bce_loss", {"auc", "f1"}),
        (make_data(1000, triple_batch_size=None), "train/bpr_loss", {"recall@20", "ndcg@20"}),
    ):
        model = kind(dim=8, loss="bpr")
        trainer = fit(model, data, fit_options, max_epochs=1)
        wanted = {"train/loss", first} | extra | {f"val/{name}" for name in metrics}
        assert set(trainer.callback_metrics) == wanted
        assert set(trainer.test(model, data, verbose=False)[0]) == {f"test/{name}" for name in metrics}


@pytest.mark.parametrize("loss", ["bce", "bpr"])
@pytest.mark.parametrize("kind", [KGCN, KGNNLS])
def test_trained_it_beats_popularity(kind: type[KGCN], loss: Any, make_data: Any, fit_options: dict[str, Any]) -> None:
    L.seed_everything(0)
    options = {"edges": 5000, "batch_size": 256, "triple_batch_size": None}
    model = kind(dim=16, lr=1e-2, l2=1e-5, loss=loss)
    trainer = fit(model, make_data(**options), fit_options, max_epochs=20, limit_val_batches=0)
    recall = trainer.test(model, make_data(**options), verbose=False)[0]["test/recall@20"]
    popular = L.Trainer(**fit_options).test(MostPopular(), make_data(**options), verbose=False)[0]["test/recall@20"]
    assert recall > 1.2 * popular


@pytest.mark.parametrize("kind", [KGCN, KGNNLS])
def test_a_checkpoint_needs_no_graph_and_scores_the_same(
    kind: type[KGCN], fit_options: dict[str, Any], tmp_path: Path
) -> None:
    model, data = kind(dim=8, hops=2, neighbor_seed=3), CTRDataModule("synthetic:1000")
    trainer = fit(model, data, fit_options, max_epochs=1, enable_checkpointing=True)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = kind.load_from_checkpoint(tmp_path / "model.ckpt")
    assert loaded.hparams == model.hparams
    assert not any("neighbor" in name or "known" in name for name in loaded.state_dict())
    loaded.set_graph(data.graph)
    for found, expected in zip(loaded.recommend([0, 1, 2]), model.recommend([0, 1, 2]), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("bits", [2, 32])
@pytest.mark.parametrize("kind", [KGCN, KGNNLS])
def test_activations_are_compressed_without_edits(
    kind: type[KGCN], bits: int, make_data: Any, fit_options: dict[str, Any]
) -> None:
    for data in (CTRDataModule("synthetic:2000", batch_size=256), make_data(triple_batch_size=None)):
        model, tinykg = kind(dim=16, hops=2), TinyKGCallback(bits=bits, summary=False)
        trainer = fit(model, data, fit_options, max_epochs=1, callbacks=[tinykg])
        assert trainer.callback_metrics["tinykg/ratio"] > 1
        assert trainer.callback_metrics["train/loss"].isfinite()
        assert all(p.isfinite().all() for p in model.parameters())


def trained(options: dict[str, Any], **more: Any) -> list[Tensor]:
    L.seed_everything(0)
    model = KGNNLS(dim=8, hops=2)
    fit(model, CTRDataModule("synthetic:1000"), options, max_epochs=2, **more)
    return [p.detach() for p in model.parameters()]


def test_exact_compression_changes_no_gradient(fit_options: dict[str, Any]) -> None:
    plain = trained(fit_options)
    exact = trained(fit_options, callbacks=[TinyKGCallback(bits=32, summary=False)])
    assert all(torch.equal(p, q) for p, q in zip(plain, exact, strict=True))


@pytest.mark.ddp
def test_two_processes_measure_what_one_measures(fit_options: dict[str, Any]) -> None:
    found = []
    for processes in (1, 2):
        L.seed_everything(0)
        strategy = "ddp_fork" if processes > 1 else "auto"
        trainer = L.Trainer(**(fit_options | {"devices": processes, "strategy": strategy}))
        trainer.test(KGCN(dim=8), CTRDataModule("synthetic:1000", eval_batch_size=50), verbose=False)
        found.append({name: float(value) for name, value in trainer.callback_metrics.items()})
    assert set(found[0]) == {"test/auc", "test/f1"}
    assert found[1] == pytest.approx(found[0], abs=1e-6)
