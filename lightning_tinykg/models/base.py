"""What every recommender here shares: training on pairs, the full ranking with its metrics, and `recommend`."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import Tensor, nn
from torch_geometric.data import HeteroData
from torch_geometric.utils import cumsum

from lightning_tinykg.arguments import check_number, check_whole, check_wholes
from lightning_tinykg.data.batches import BPRBatch, RankingBatch, TripleBatch
from lightning_tinykg.models.functional import best_scored, bpr_loss, dot_products, half_squared_norm
from lightning_tinykg.models.graph_buffers import HoldsGraph, leave_graph_out_of_ddp
from lightning_tinykg.models.ranking_metrics import ranking_metrics

__all__ = ["RankingModule", "Recommendations"]

SIZES = ("num_users", "num_items", "num_entities", "num_relations")


class Recommendations(NamedTuple):
    """What `Trainer.predict` gives for a chunk of users.

    Attributes:
        user: User ids, int64 `[U]`.
        items: The best items for each, best first, int64 `[U, k]`; `-1` where a user has fewer left.
        scores: Their scores, float `[U, k]`; `-inf` there.
    """

    user: Tensor
    items: Tensor
    scores: Tensor


class RankingModule(HoldsGraph, L.LightningModule):
    """A recommender that scores a user and an item by the dot product of their embeddings.

    A subclass says what its parameters are (`build`), what it needs of the graph (`prepare`) and how nodes are embedded
    (`embed`, and `embed_sampled` for neighbour-sampled batches); training, ranking and metrics are here.

    A training batch is dispatched by its type: a `BPRBatch` is scored on embeddings of the full graph, a PyG
    `HeteroData` from `LinkNeighborLoader` on those of the sampled one. Evaluation is the full ranking: every item is
    scored for every user, the batch's `exclude` pairs (training items) are masked, and Recall@K and NDCG@K are averaged
    over the users with at least one target (NDCG's ideal ranking has min(targets, K) hits). The graph is embedded once
    an evaluation, however many batches of users follow.

    The sizes of the graph may be left out: they are then taken from the Trainer's data module and written into the
    hyper-parameters, so that `load_from_checkpoint` needs no graph. The graph's own tensors are in no checkpoint:
    the Trainer's data module, or `set_graph`, provides them.

    Logged: `train/loss` and `train/bpr_loss`; for each K, `val/recall@K` and `val/ndcg@K`, or `test/recall@K` and
    `test/ndcg@K`.

    Args:
        lr: Adam's learning rate.
        l2: Weight of the L2 penalty on the batch's embeddings.
        k: Cut-off of Recall and NDCG, or several.
        num_users: Users; `None`: from the data module.
        num_items: Items, which are the first entities.
        num_entities: Entities of the knowledge graph, items included.
        num_relations: Relations of the knowledge graph, inverses and "interacts" not counted.

    Raises:
        ValueError: For a `k` that is not positive, or sizes given only in part.
    """

    def __init__(
        self,
        *,
        lr: float,
        l2: float,
        k: int | Sequence[int] = 20,
        num_users: int | None = None,
        num_items: int | None = None,
        num_entities: int | None = None,
        num_relations: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()  # collects the subclass's arguments too
        cutoffs = check_wholes("k", k, 1) if isinstance(k, Sequence) else (check_whole("k", k, 1),)
        if not cutoffs:
            raise ValueError("k must be a whole number of at least 1, or several, got none")
        check_number("lr", lr, least=0)
        check_number("l2", l2, least=0)
        for name, size, least in (
            ("num_users", num_users, 1),
            ("num_items", num_items, 1),
            ("num_entities", num_entities, num_items or 1),  # items are the first of them
            ("num_relations", num_relations, 0),
        ):
            if size is not None:
                check_whole(name, size, least)
        given = (num_users, num_items, num_entities, num_relations)
        if None in given and any(size is not None for size in given):
            raise ValueError(
                f"give all of {', '.join(SIZES)} or none of them, got {dict(zip(SIZES, given, strict=True))}"
            )
        self.lr, self.l2, self.max_k = lr, l2, max(cutoffs)
        self.num_users, self.num_items = num_users or 0, num_items or 0
        self.num_entities, self.num_relations = num_entities or 0, num_relations or 0
        self.metrics = ranking_metrics(cutoffs)
        self.is_built, self.has_graph = False, False
        self._embedded: tuple[Tensor, Tensor] | None = None
        self._scorer: Callable[[Tensor], Tensor] | None = None  # while it predicts
        for name in ("_seen_ptr", "_seen_item"):
            self.register_buffer(name, None, persistent=False)
        self._seen_ptr: Tensor | None
        self._seen_item: Tensor | None

    # -- what a subclass provides ------------------------------------------------------------------------------------

    def build(self) -> None:
        """Create the parameters; the sizes (`self.num_users`, ...) are known by now."""
        raise NotImplementedError  # a model says how

    def prepare(self, data: HeteroData) -> None:
        """Keep what `embed` needs of the graph, as buffers with `persistent=False`, alike in all of DDP's processes."""
        raise NotImplementedError  # a model says how

    def embed(self) -> tuple[Tensor, Tensor]:
        """Embed the full graph.

        Returns:
            Users `[num_users, D]` and items `[num_items, D]` (or more rows, the items first).
        """
        raise NotImplementedError  # a model says how

    def embed_sampled(self, batch: HeteroData) -> tuple[Tensor, Tensor]:
        """Embed the nodes of a sampled graph: users and entities, in the batch's local numbering."""
        raise NotImplementedError  # a model says how

    def scorer(self) -> Callable[[Tensor], Tensor]:
        """What scores all items, `[U, num_items]`, for users int64 `[U]`: here the dot product, by one `embed`."""
        users, items = self.embed()
        return lambda user: dot_products(users[user], items[: self.num_items])

    def penalised(
        self, user: Tensor, positive: Tensor, negative: Tensor, rows: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """What the L2 penalty is taken of: here `rows`, the embeddings that were scored.

        Args:
            user: Ids of the batch's users, `[B]`.
            positive: Ids of their positive items, `[B]`.
            negative: Ids of their negative items, `[B]`.
            rows: Embeddings of these three, `[B, D]` each.
        """
        return rows

    def regularizer(self) -> Tensor | float:
        """What is added to the loss of every batch of pairs; here nothing."""
        return 0.0

    # -- what it may use ---------------------------------------------------------------------------------------------

    def node_table(self, dim: int) -> nn.Embedding:
        """A row of `dim` floats for each entity, then for each user, both Xavier-uniform as tables of their own."""
        table = nn.Embedding(self.num_entities + self.num_users, dim)
        for rows in torch.split(table.weight.data, [self.num_entities, self.num_users]):
            nn.init.xavier_uniform_(rows)
        return table

    # -- the graph ---------------------------------------------------------------------------------------------------

    def _build_if_sized(self) -> None:
        """Called at the end of a subclass's `__init__`: with the sizes given, the parameters can exist at once."""
        if self.num_users and not self.is_built:
            self.build()
            self.is_built = True

    def set_graph(self, data: HeteroData) -> None:
        """Use this graph for training, ranking and `recommend`. Called for you when a Trainer has a data module.

        Args:
            data: Node types `user` and `entity`, edges `interacts` (training only) and `relates`, attributes
                `num_items` and `num_relations`, as `KGRecDataModule.graph`.

        Raises:
            ValueError: If the graph's sizes are not those the model was built for.
        """
        sizes = (data["user"].num_nodes, data.num_items, data["entity"].num_nodes, data.num_relations)
        found = dict(zip(SIZES, (int(size) for size in sizes), strict=True))
        if self.is_built:
            for name, size in found.items():
                if getattr(self, name) != size:
                    raise ValueError(f"the model was built for {name}={getattr(self, name)}, but the graph has {size}")
        else:
            for name, size in found.items():
                setattr(self, name, size)
            self.hparams.update(found)
            self._build_if_sized()
            self.to(self.device)
        user, item = data["user", "interacts", "entity"].edge_index.to(self.device)
        self._seen_item = item[user.argsort(stable=True)]
        self._seen_ptr = cumsum(user.bincount(minlength=self.num_users))
        self.prepare(data)
        self.has_graph = True
        leave_graph_out_of_ddp(self)

    def setup(self, stage: str) -> None:
        """Take the graph, and the sizes where they were not given, from the Trainer's data module."""
        self._take_graph()
        self._require_graph()

    def _take_graph(self) -> None:
        graph = getattr(getattr(self._trainer, "datamodule", None), "graph", None)
        if graph is not None:
            self.set_graph(graph)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is one of the built model: callbacks such as `WeightAveraging` copy it before its own `setup`."""
        if not self.is_built:
            self._take_graph()
        return super().__getstate__() | {"_scorer": None}

    def _require_graph(self) -> None:
        if not self.has_graph:
            raise RuntimeError(
                f"{type(self).__name__} has no graph: fit or test it with datamodule=KGRecDataModule(...), "
                "or call set_graph(datamodule.graph)"
            )

    # -- training ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        """The loss of one batch: BPR on the full or a sampled graph, and the L2 penalty."""
        if isinstance(batch, BPRBatch):
            users, items = self.embed()
            user, positive, negative = batch
            rows = (users[user], items[positive], items[negative])
        elif isinstance(batch, HeteroData):
            users, entities = self.embed_sampled(batch)
            source, good, bad = batch["user"].src_index, batch["entity"].dst_pos_index, batch["entity"].dst_neg_index
            rows = (users[source], entities[good], entities[bad])
            user_id, entity_id = batch["user"].n_id, batch["entity"].n_id
            user, positive, negative = user_id[source], entity_id[good], entity_id[bad]
        else:
            hint = "; give the data module triple_batch_size=None" if isinstance(batch, TripleBatch) else ""
            raise TypeError(f"{type(self).__name__} has no loss for a {type(batch).__name__}{hint}")
        bpr = bpr_loss(*rows)
        penalty = half_squared_norm(*self.penalised(user, positive, negative, rows))
        loss = bpr + self.l2 * penalty + self.regularizer()
        self.log("train/bpr_loss", bpr, batch_size=user.numel())
        self.log("train/loss", loss, batch_size=user.numel(), prog_bar=True)
        return loss

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam over all parameters."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)

    # -- the full ranking --------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Embed the graph once for the whole evaluation."""
        self._reset_metrics()
        self._embedded = self.embed()

    def _reset_metrics(self) -> None:
        self.metrics.reset()
        if self.device.type != "mps":  # which has no float64
            for metric in self.metrics.values():
                metric.set_dtype(torch.float64)

    def validation_step(self, batch: RankingBatch, batch_idx: int) -> None:
        """Rank all items for a chunk of users and update the metrics."""
        assert self._embedded is not None
        users, items = self._embedded
        self._rank(dot_products(users[batch.user], items[: self.num_items]), batch)

    def _rank(self, scores: Tensor, batch: RankingBatch) -> None:
        """Update the metrics with a chunk of users' scores of all items."""
        ranked, _ = best_scored(scores, self.max_k, batch.exclude)
        # -1 would alias the last item of the row above in PyG's flat index; num_items is an id no target has.
        self.metrics.update(ranked.masked_fill(ranked < 0, self.num_items), batch.target)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics over all users."""
        self._log_metrics("val")

    def on_test_epoch_start(self) -> None:
        """As `on_validation_epoch_start`."""
        self.on_validation_epoch_start()

    def test_step(self, batch: RankingBatch, batch_idx: int) -> None:
        """As `validation_step`."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """As `on_validation_epoch_end`."""
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        # compute() sums over ranks, so every rank logs the same number
        values = {f"{stage}/{name}": value.float() for name, value in self.metrics.compute().items()}
        self.log_dict(values, prog_bar=True)
        self.metrics.reset()
        self._embedded = None

    # -- for the user ------------------------------------------------------------------------------------------------

    def on_predict_epoch_start(self) -> None:
        """Embed the graph once for all users."""
        self._scorer = self.scorer()

    def predict_step(self, batch: Tensor, batch_idx: int) -> Recommendations:
        """The best items for a chunk of users, int64 `[U]`: as many as the largest `k`, no training items."""
        assert self._scorer is not None
        return Recommendations(batch, *best_scored(self._scorer(batch), self.max_k, self._seen(batch)))

    def on_predict_epoch_end(self) -> None:
        """Let go of the embeddings."""
        self._scorer = None

    def forward(self, user_ids: Tensor, item_ids: Tensor) -> Tensor:
        """Scores of some pairs.

        Args:
            user_ids: int64 `[B]`.
            item_ids: int64 `[B]`.

        Returns:
            Dot products, float `[B]`; differentiable.
        """
        self._require_graph()
        users, items = self.embed()
        return (users[user_ids] * items[item_ids]).sum(dim=-1)

    @torch.no_grad()
    def recommend(
        self, user_ids: Tensor | Sequence[int], k: int = 20, exclude_seen: bool = True, chunk_size: int = 1024
    ) -> tuple[Tensor, Tensor]:
        """The `k` best items for each user.

        The graph is embedded once a call, so pass many users at a time.

        Args:
            user_ids: int64 `[U]`, or a list.
            k: How many items.
            exclude_seen: Leave out each user's training items.
            chunk_size: Users scored at a time; a chunk takes `chunk_size * num_items` floats.

        Returns:
            `(items, scores)`, `[U, min(k, num_items)]` each, best first, on the model's device. Where a user has fewer
            than `k` items left, the item is `-1` and the score `-inf`.

        Raises:
            RuntimeError: If the model has no graph yet.
            ValueError: For `k < 1` or a user id out of range.
        """
        self._require_graph()
        ids = torch.as_tensor(user_ids, dtype=torch.long, device=self.device).reshape(-1)
        check_whole("k", k, 1)
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_users:
            raise ValueError(f"user_ids must be in 0..{self.num_users - 1}, got {int(ids.min())}..{int(ids.max())}")
        was_training = self.training
        self.eval()
        try:
            scores = self.scorer()
            chunks = [
                best_scored(scores(chunk), k, self._seen(chunk) if exclude_seen else None)
                for chunk in torch.split(ids, chunk_size)
            ]
        finally:
            self.train(was_training)
        return torch.cat([index for index, _ in chunks]), torch.cat([score for _, score in chunks])

    def _seen(self, users: Tensor) -> Tensor:
        """Training items of some users as pairs (row, item), int64 `[2, X]`."""
        assert self._seen_ptr is not None
        assert self._seen_item is not None
        start, count = self._seen_ptr[users], self._seen_ptr[users + 1] - self._seen_ptr[users]
        row = torch.arange(users.numel(), device=users.device).repeat_interleave(count)
        within = torch.arange(row.numel(), device=users.device) - cumsum(count)[:-1].repeat_interleave(count)
        return torch.stack([row, self._seen_item[start[row] + within]])
