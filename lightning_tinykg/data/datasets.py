"""Data sets whose items are whole batches, made at once: no Python per row, and no randomness but a step's own."""

from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset
from torch_geometric.data import Data

from lightning_tinykg.arguments import check_whole
from lightning_tinykg.data.batches import BPRBatch, RankingBatch, TripleBatch
from lightning_tinykg.data.files import sorted_unique
from lightning_tinykg.data.loaders import Step
from lightning_tinykg.data.sampling import NegativeSampler
from lightning_tinykg.data.splits import ItemsByUser

__all__ = ["BPRBatches", "RankingBatches", "StepBatches", "TripleBatches"]

IntArray = npt.NDArray[np.int64]
T = TypeVar("T")


class StepBatches(Dataset[T]):
    """Batches as items: by :class:`Step`, or by number (unshuffled, what ``Trainer(overfit_batches=...)`` asks for).

    A subclass says how a batch is made (:meth:`make`).

    Args:
        num_rows: Rows of the data set.
        batch_size: Size of a batch asked for by number.
        seed: Seed of what :meth:`make` draws.
        stream: A number of its own for each subclass, so that no two draw alike with one seed.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int, stream: int) -> None:
        self.num_rows, self.batch_size, self.seed, self.stream = num_rows, batch_size, seed, stream

    @property
    def num_batches(self) -> int:
        """Batches of an epoch, in one process."""
        return -(-self.num_rows // self.batch_size)

    def __len__(self) -> int:
        """Rows, which Lightning's `BatchSizeFinder` bounds a batch by. Batches are counted by the loader's sampler."""
        return self.num_rows

    def __getitem__(self, step: Step | int) -> T:
        if not isinstance(step, Step):
            if step >= self.num_batches:
                raise IndexError(f"batch must be in 0..{self.num_batches - 1}, got {step}")
            rows = np.arange(step * self.batch_size, min((step + 1) * self.batch_size, self.num_rows))
            step = Step(rows, (0, step, 0))
        return self.make(step.rows, np.random.default_rng([self.seed, self.stream, *step.key]))

    def make(self, rows: IntArray, rng: np.random.Generator) -> T:
        """One batch.

        Args:
            rows: Row numbers, shape ``[B]``.
            rng: What it may draw from.
        """
        raise NotImplementedError  # a subclass says how


class BPRBatches(StepBatches[BPRBatch]):
    """Interactions with one negative each, drawn from what the user has not interacted with.

    Args:
        pairs: Training pairs (user, item), shape ``[2, E]``.
        num_users: Number of users.
        num_items: Number of items.
        seed: Seed of the negatives.
        batch_size: Size of a batch asked for by number.

    Raises:
        ValueError: If a user has interacted with every item.

    Example:
        >>> batches = BPRBatches(np.array([[0], [1]]), num_users=1, num_items=2, seed=0, batch_size=1)
        >>> batches[0].negative
        tensor([0])
    """

    def __init__(self, pairs: IntArray, *, num_users: int, num_items: int, seed: int, batch_size: int) -> None:
        super().__init__(pairs.shape[1], batch_size, seed, stream=1)
        self.pairs = pairs
        self.sampler = NegativeSampler(pairs[0], pairs[1], num_rows=num_users, num_columns=num_items)

    def make(self, rows: IntArray, rng: np.random.Generator) -> BPRBatch:
        """One batch: the interactions ``rows`` and a negative for each."""
        user, positive = self.pairs[:, rows]
        negative = self.sampler.sample(user, rng)
        return BPRBatch(torch.from_numpy(user), torch.from_numpy(positive), torch.from_numpy(negative))


class TripleBatches(StepBatches[TripleBatch]):
    """Edges of the collaborative knowledge graph with one corrupted tail each.

    Args:
        graph: What :func:`~lightning_tinykg.data.collaborative_graph` returns.
        seed: Seed of the corrupted tails.
        batch_size: Size of a batch asked for by number.

    Raises:
        ValueError: If a node is linked to every node by one relation.

    Example:
        >>> graph = Data(edge_index=torch.tensor([[0], [1]]), edge_type=torch.tensor([0]), num_nodes=2, num_relations=1)
        >>> TripleBatches(graph, seed=0, batch_size=1)[0].corrupted
        tensor([0])
    """

    def __init__(self, graph: Data, *, seed: int, batch_size: int) -> None:
        super().__init__(int(graph.edge_index.shape[1]), batch_size, seed, stream=2)
        self.num_relations = int(graph.num_relations)
        self.edges: IntArray = torch.cat([graph.edge_index, graph.edge_type[None]]).numpy()
        head, tail, relation = self.edges
        # Rows of the sampler are the (head, relation) pairs that occur: far fewer than num_nodes * num_relations.
        keys = head * np.int64(graph.num_relations) + relation
        pairs = sorted_unique(keys)
        self.row = np.searchsorted(pairs, keys)
        self.sampler = NegativeSampler(
            self.row, tail, num_rows=pairs.size, num_columns=int(graph.num_nodes), what=("(head, relation)", "nodes")
        )

    def make(self, rows: IntArray, rng: np.random.Generator) -> TripleBatch:
        """One batch: the edges ``rows`` and a corrupted tail for each, sorted by relation."""
        corrupted = self.sampler.sample(self.row[rows], rng)
        order = self.edges[2, rows].argsort(kind="stable")
        edges = self.edges[:, rows[order]]
        counts = np.bincount(edges[2], minlength=self.num_relations).tolist()
        head, tail, relation = map(torch.from_numpy, edges)
        return TripleBatch(head, relation, tail, torch.from_numpy(corrupted[order]), counts)


class RankingBatches(Dataset[RankingBatch]):
    """This rank's users with a target, in chunks. Nobody is ranked twice, and ranks have equally many chunks.

    Args:
        exclude: What a user is not to be recommended, one table or more.
        target: What should be recommended.
        chunk: Most users in a batch.
        num_replicas: Number of ranks.
        rank: This rank.

    Example:
        >>> seen = ItemsByUser.build(np.array([[0, 1], [0, 0]]), num_users=2)
        >>> wanted = ItemsByUser.build(np.array([[1], [1]]), num_users=2)
        >>> RankingBatches([seen], wanted, chunk=10)[0].user  # user 0 has nothing to be found
        tensor([1])
    """

    def __init__(
        self, exclude: list[ItemsByUser], target: ItemsByUser, *, chunk: int, num_replicas: int = 1, rank: int = 0
    ) -> None:
        check_whole("eval_batch_size", chunk, 1)
        self.exclude, self.target = exclude, target
        users = np.flatnonzero(np.diff(target.starts))
        most = -(-users.size // num_replicas)
        self.chunks = np.array_split(users[rank::num_replicas], max(-(-most // chunk), 1)) if users.size else []

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> RankingBatch:
        users = self.chunks[index]
        exclude = np.concatenate([table.gather(users) for table in self.exclude], axis=1)
        return RankingBatch(*(torch.from_numpy(x) for x in (users, exclude, self.target.gather(users))))
