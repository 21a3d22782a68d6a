"""The data module: files or a generated graph -> HeteroData -> batches."""

from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler
from torch_geometric.data import HeteroData

from lightning_tinykg.arguments import check_choice, check_number, check_whole, check_wholes
from lightning_tinykg.data.batches import RankingBatch
from lightning_tinykg.data.cache import read_cached
from lightning_tinykg.data.datasets import BPRBatches, RankingBatches, StepBatches, TripleBatches
from lightning_tinykg.data.files import KGRecFiles, contains_pairs
from lightning_tinykg.data.graph import build_graph, collaborative_graph
from lightning_tinykg.data.loaders import PhasedLoader, ResumableLoader, ShardedBatches
from lightning_tinykg.data.neighbors import neighbor_loader, require_neighbor_sampler
from lightning_tinykg.data.splits import ItemsByUser, hold_out
from lightning_tinykg.data.synthetic import SyntheticKG

__all__ = ["KGRecDataModule"]


class KGRecDataModule(L.LightningDataModule):
    """Interactions and a knowledge graph, from files or generated, as batches for training and full-ranking evaluation.

    ``root`` is a folder in one of the formats of :func:`~lightning_tinykg.data.read_folder` (KGAT and LightGCN text
    files, KGCN's raw files, RecBole atomic files; plain, ``.gz`` or ``.xz``), ``"synthetic"``, ``"synthetic:1000000"``
    (about so many edges) or a :class:`~lightning_tinykg.data.SyntheticKG`.

    Training batches are :class:`~lightning_tinykg.data.BPRBatch`, followed in the same epoch by
    :class:`~lightning_tinykg.data.TripleBatch` if ``triple_batch_size`` is given; evaluation batches are
    :class:`~lightning_tinykg.data.RankingBatch`. Shuffling and negatives are functions of (seed, epoch, step, rank): a
    resumed fit repeats itself, also from the middle of an epoch, and the global random state is left alone. Under DDP
    every rank gets its share; ``batch_size`` is per rank.

    Args:
        root: The data.
        batch_size: Interactions in a training batch.
        eval_batch_size: Users in an evaluation batch.
        triple_batch_size: Edges of the collaborative graph in a TransR batch; ``"auto"``: KGAT's
            ``triples // (train interactions // batch_size)``; None: no TransR phase.
        sampling: ``"full"``: batches are ids, the model propagates over the whole graph. ``"neighbor"``: training
            batches are :data:`~lightning_tinykg.data.SampledBatch` from PyG's ``LinkNeighborLoader`` (needs the extra
            ``sampling``).
        num_neighbors: Neighbours sampled per edge type and hop, for ``sampling="neighbor"``; -1: all.
        val_fraction: Share of every user's training interactions held out for validation; 0: none.
        test_fraction: Share of every user's interactions held out for testing where the data bring no split.
        drop_seen_test: Drop test pairs that are in the training set too. The original Last-FM split overlaps by 40 %;
            such pairs can never be ranked, since training items are masked.
        seed: Seed of the splits, the shuffling and the negatives.
        cache_dir: Where parsed files are kept; None: ``lightning_tinykg`` in the user's cache folder; False: nowhere.
        num_workers: Worker processes that make training batches.
        pin_memory: Put batches into pinned memory, for faster copies to a GPU.
        reader_options: Passed to :func:`~lightning_tinykg.data.read_folder`, such as ``min_rating``.

    Attributes:
        graph: The training graph, see :func:`~lightning_tinykg.data.graph.build_graph`. After :meth:`setup`.
        files: What was read, with the ids in the files.
        statistics: Sizes and overlap.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> data = KGRecDataModule("synthetic:1000", batch_size=100)
        >>> data.prepare_data(); data.setup("fit")
        >>> data.num_users, data.num_items
        (42, 71)
        >>> next(iter(data.train_dataloader())).user.shape
        torch.Size([100])
    """

    graph: HeteroData
    files: KGRecFiles
    statistics: dict[str, int | float]

    def __init__(
        self,
        root: str | Path | SyntheticKG = "synthetic",
        *,
        batch_size: int = 1024,
        eval_batch_size: int = 1024,
        triple_batch_size: int | Literal["auto"] | None = None,
        sampling: Literal["full", "neighbor"] = "full",
        num_neighbors: tuple[int, ...] = (10, 10),
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        drop_seen_test: bool = False,
        seed: int = 0,
        cache_dir: str | Path | Literal[False] | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        reader_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            check_whole(name, size, 1)
        if triple_batch_size not in (None, "auto"):
            check_whole("triple_batch_size", triple_batch_size, 1, ", 'auto' or None")
        check_choice("sampling", sampling, ("full", "neighbor"))
        for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
            check_number(name, fraction, least=0, below=1)
        check_whole("seed", seed)
        check_whole("num_workers", num_workers)
        check_wholes("num_neighbors", num_neighbors, -1)  # which stands for all
        self.root = root if isinstance(root, SyntheticKG) else _synthetic(str(root), seed) or Path(root)
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.triple_batch_size = triple_batch_size
        self.sampling, self.num_neighbors = sampling, tuple(num_neighbors)
        self.val_fraction, self.test_fraction, self.drop_seen_test = val_fraction, test_fraction, drop_seen_test
        self.seed, self.cache_dir = seed, cache_dir
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.reader_options = dict(reader_options or {})
        self._ready = False

    @property
    def num_users(self) -> int:
        """Number of users."""
        return self.files.num_users

    @property
    def num_items(self) -> int:
        """Number of items; items are the first entities."""
        return self.files.num_items

    @property
    def num_entities(self) -> int:
        """Number of entities, items included."""
        return self.files.num_entities

    @property
    def num_relations(self) -> int:
        """Number of relations of the knowledge graph, without inverses and without "interacts"."""
        return self.files.num_relations

    def prepare_data(self) -> None:
        """Parse the files once, into the cache, before other ranks want them."""
        if not isinstance(self.root, SyntheticKG) and self.cache_dir is not False:
            self._read()

    def setup(self, stage: str | None = None) -> None:
        """Read, split, build the graph. Calling it again does nothing.

        Args:
            stage: Ignored: all stages share the graph.

        Raises:
            ImportError: If ``sampling="neighbor"`` and neither pyg-lib nor torch-sparse can be imported.
            FileNotFoundError: If the folder or a file is missing.
            ValueError: If a file is malformed; the message names file, line and what was expected.
        """
        if self._ready:
            return
        if self.sampling == "neighbor":
            require_neighbor_sampler()
        self.files = self._read()
        train, test = self.files.train, self.files.test
        num_users = self.files.num_users
        if test is None:
            held = hold_out(train[0], num_users=num_users, fraction=self.test_fraction, seed=[self.seed, 10])
            train, test = train[:, ~held], train[:, held]
        if train.shape[1] == 0:
            raise ValueError(f"{self.root}: no training interactions")
        seen = contains_pairs(train, test)
        if self.drop_seen_test:
            test = test[:, ~seen]
        held = hold_out(train[0], num_users=num_users, fraction=self.val_fraction, seed=[self.seed, 11])
        train, val = train[:, ~held], train[:, held]
        self.train_pairs, self.val_pairs, self.test_pairs = train, val, test
        self._by_user = {
            name: ItemsByUser.build(pairs, num_users=num_users)
            for name, pairs in (("train", train), ("val", val), ("test", test))
        }
        self.graph = build_graph(
            train,
            self.files.triples,
            num_users=num_users,
            num_items=self.num_items,
            num_entities=self.num_entities,
            num_relations=self.num_relations,
        )
        self.statistics = {
            "users": num_users,
            "items": self.num_items,
            "entities": self.num_entities,
            "relations": self.num_relations,
            "triples": self.files.triples.shape[1],
            "train_interactions": train.shape[1],
            "val_interactions": val.shape[1],
            "test_interactions": test.shape[1],
            "train_test_overlap": int(seen.sum()),
            "train_test_overlap_fraction": float(seen.mean()) if seen.size else 0.0,
        }
        self._ready = True
        rank_zero_info(self._summary())

    def train_dataloader(self) -> Any:
        """One epoch of BPR batches, followed by one of TransR batches if they are asked for.

        Returns:
            A ``DataLoader``, or a :class:`~lightning_tinykg.data.loaders.PhasedLoader` of two.

        Raises:
            ValueError: If a user has interacted with every item.
        """
        if self.sampling == "neighbor":
            bpr: Any = neighbor_loader(
                self.graph,
                num_neighbors=self.num_neighbors,
                batch_size=self.batch_size,
                seed=self.seed,
                num_workers=self.num_workers,
                pin_memory=self.pin_memory,
                **self._shard(),
            )
        else:
            sizes = {"num_users": self.num_users, "num_items": self.num_items}
            batches = BPRBatches(self.train_pairs, seed=self.seed, batch_size=self.batch_size, **sizes)
            bpr = self._resumable(batches)
        if self.triple_batch_size is None:
            return bpr
        size = self._triple_batch_size()
        triples = TripleBatches(collaborative_graph(self.graph), seed=self.seed, batch_size=size)
        return PhasedLoader([bpr, self._resumable(triples)])

    def val_dataloader(self) -> Any:
        """Chunks of the users with validation items; training items are to be excluded. No loader if there are none."""
        return self._ranking(["train"], "val") if self.val_pairs.shape[1] else []

    def test_dataloader(self) -> Any:
        """Chunks of the users with test items; training and validation items are to be excluded."""
        return self._ranking(["train", "val"], "test") if self.test_pairs.shape[1] else []

    def predict_dataloader(self) -> Any:
        """Chunks of all users' ids, int64 `[U]`, of which each process has its share."""
        share = self._shard()
        users = torch.arange(self.num_users)[share["rank"] :: share["num_replicas"]]
        return self._in_order(torch.split(users, self.eval_batch_size))

    def _read(self) -> KGRecFiles:
        if isinstance(self.root, SyntheticKG):
            return self.root.generate()
        return read_cached(self.root, self.cache_dir, **self.reader_options)

    def _triple_batch_size(self) -> int:
        if isinstance(self.triple_batch_size, int):
            return self.triple_batch_size
        steps: int = max(self.train_pairs.shape[1] // self.batch_size, 1)
        size: int = max(self.files.triples.shape[1] // steps, 1)
        return size

    def _resumable(self, batches: StepBatches[Any]) -> ResumableLoader[Any]:
        sampler: Sampler[Any] = ShardedBatches(
            batches.num_rows, batch_size=batches.batch_size, seed=self.seed, **self._shard()
        )
        if self.trainer is not None and self.trainer.overfit_batches:  # Lightning sees to loaders that are not phases
            sampler = SequentialSampler(range(batches.num_batches))
        return ResumableLoader(batches, sampler=sampler, batch_size=None, **self._loader_options())

    def _ranking(self, exclude: list[str], target: str) -> DataLoader[RankingBatch]:
        tables = [self._by_user[name] for name in exclude]
        return self._in_order(
            RankingBatches(tables, self._by_user[target], chunk=self.eval_batch_size, **self._shard())
        )

    def _in_order(self, batches: Any) -> DataLoader[Any]:
        # Already sharded: a DistributedSampler of one keeps Lightning from sharding again, which would repeat users.
        sampler: DistributedSampler[Any] = DistributedSampler(batches, num_replicas=1, rank=0, shuffle=False)
        return DataLoader(batches, sampler=sampler, batch_size=None, **self._loader_options(workers=0))

    def _loader_options(self, workers: int | None = None) -> dict[str, Any]:
        # A generator of its own: without one, every epoch of a DataLoader takes a number from the global generator.
        return {
            "num_workers": self.num_workers if workers is None else workers,
            "pin_memory": self.pin_memory,
            "collate_fn": _identity,
            "generator": torch.Generator().manual_seed(self.seed),
        }

    def _shard(self) -> dict[str, int]:
        """Which share of the data is this process's."""
        if self.trainer is not None:
            kwargs = self.trainer.distributed_sampler_kwargs or {}
            return {"num_replicas": kwargs.get("num_replicas", 1), "rank": kwargs.get("rank", 0)}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return {"num_replicas": torch.distributed.get_world_size(), "rank": torch.distributed.get_rank()}
        return {"num_replicas": 1, "rank": 0}

    def _summary(self) -> str:
        n = self.statistics
        name = "synthetic" if isinstance(self.root, SyntheticKG) else str(self.root)
        dropped = ", dropped" if self.drop_seen_test else ""
        return (
            f"{name}: {n['users']:,} users, {n['items']:,} items, {n['entities']:,} entities, "
            f"{n['relations']:,} relations, {n['triples']:,} triples; interactions: {n['train_interactions']:,} train, "
            f"{n['val_interactions']:,} val, {n['test_interactions']:,} test; {n['train_test_overlap']:,} test pairs "
            f"in train ({n['train_test_overlap_fraction']:.1%}{dropped})"
        )


def _identity(batch: Any) -> Any:
    return batch


def _synthetic(root: str, seed: int) -> SyntheticKG | None:
    """The graph that ``"synthetic"`` or ``"synthetic:EDGES"`` means."""
    name, _, edges = root.partition(":")
    if name != "synthetic" or (edges and not edges.isdecimal()):
        return None
    return SyntheticKG(num_edges=int(edges), seed=seed) if edges else SyntheticKG(seed=seed)
