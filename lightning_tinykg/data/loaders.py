"""Batches drawn as a pure function of (seed, epoch, step, rank): sharded over ranks, resumable, off the global RNG.

The samplers yield whole batches of row numbers, and the data sets of `datasets.py` turn one into tensors at once.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from lightning_tinykg.arguments import check_whole

__all__ = ["PhasedLoader", "ResumableLoader", "ShardedBatches", "Step"]

IntArray = npt.NDArray[np.int64]
T = TypeVar("T")


class Step(NamedTuple):
    """One batch to be made: which rows, and what its randomness is keyed by.

    Attributes:
        rows: Row numbers, shape ``[B]``, int64.
        key: (epoch, step, rank).

    Example:
        >>> Step(np.arange(2), (0, 0, 0)).key
        (0, 0, 0)
    """

    rows: IntArray
    key: tuple[int, int, int]


class ShardedBatches(DistributedSampler[Step]):
    """Shuffled batches of row numbers; every rank gets its own, and as many as the others.

    A ``DistributedSampler``, so that Lightning leaves it alone and calls :meth:`set_epoch`. The last rank's share is
    filled up from the beginning of the permutation, as in PyTorch's sampler.

    Args:
        num_rows: Rows to go through in an epoch.
        batch_size: Rows in a batch of one rank.
        seed: Seed of the shuffling.
        num_replicas: Number of ranks.
        rank: This rank.

    Example:
        >>> sampler = ShardedBatches(5, batch_size=2, seed=0)
        >>> sorted(np.concatenate([step.rows for step in sampler]).tolist())
        [0, 1, 2, 3, 4]
    """

    def __init__(self, num_rows: int, *, batch_size: int, seed: int, num_replicas: int = 1, rank: int = 0) -> None:
        check_whole("batch_size", batch_size, 1)
        super().__init__(range(num_rows), num_replicas=num_replicas, rank=rank, seed=seed)  # type: ignore[arg-type]  # only len is asked
        self.num_rows = num_rows
        self.batch_size = batch_size
        self._resume = (-1, 0)

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[Step]:
        epoch = self.epoch
        order = np.random.default_rng([self.seed, 0, epoch]).permutation(self.num_rows)
        if self.num_rows < self.total_size:
            order = np.resize(order, self.total_size)
        mine = order[self.rank :: self.num_replicas]
        for step in range(self.first_step(), len(self)):
            rows = mine[step * self.batch_size : (step + 1) * self.batch_size]
            yield Step(rows, (epoch, step, self.rank))

    def first_step(self) -> int:
        """The step at which this epoch starts: 0, or where a checkpoint left it."""
        epoch, step = self._resume
        return step if epoch == self.epoch else 0

    def resume(self, epoch: int, step: int) -> None:
        """Start ``epoch`` at ``step``; other epochs are whole.

        Args:
            epoch: The epoch that was under way.
            step: How many of its batches were done.
        """
        self._resume = (epoch, step)


class ResumableLoader(DataLoader[T]):
    """A ``DataLoader`` over :class:`ShardedBatches` whose place in the epoch goes into Lightning's checkpoints.

    Example:
        >>> from lightning_tinykg.data.datasets import BPRBatches
        >>> sampler = ShardedBatches(4, batch_size=1, seed=0)
        >>> pairs = np.array([[0, 0, 1, 1], [0, 1, 1, 2]])
        >>> batches = BPRBatches(pairs, num_users=2, num_items=3, seed=0, batch_size=1)
        >>> loader = ResumableLoader(batches, sampler=sampler, batch_size=None)
        >>> _ = next(iter(loader))
        >>> loader.state_dict()
        {'epoch': 0, 'step': 1}
    """

    _place = (0, 0)

    def __iter__(self) -> Iterator[T]:  # type: ignore[override]  # items, not torch's iterator class
        # A generator starts with its first next(), after Lightning has set the epoch, so that workers do not run ahead.
        sampler = self.sampler
        sharded = isinstance(sampler, ShardedBatches)
        epoch, step = (sampler.epoch, sampler.first_step()) if isinstance(sampler, ShardedBatches) else (0, 0)
        for batch in super().__iter__():
            step += 1
            self._place = (epoch, step)
            yield batch
        if sharded:
            self._place = (epoch, step)

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands: the epoch and how many of its batches were handed out."""
        return {"epoch": self._place[0], "step": self._place[1]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Args:
            state: What :meth:`state_dict` returned.
        """
        self._place = (int(state["epoch"]), int(state["step"]))
        if isinstance(self.sampler, ShardedBatches):
            self.sampler.resume(*self._place)


class PhasedLoader:
    """Loaders one after another in the same epoch.

    ``CombinedLoader(mode="sequential")`` would be this, but Lightning's fit loop refuses it.

    Args:
        loaders: The phases, in order.

    Example:
        >>> from lightning_tinykg.data.datasets import BPRBatches
        >>> batches = BPRBatches(np.array([[0, 0], [0, 1]]), num_users=1, num_items=3, seed=0, batch_size=1)
        >>> phase = ResumableLoader(batches, sampler=ShardedBatches(2, batch_size=1, seed=0), batch_size=None)
        >>> len(list(PhasedLoader([phase, phase])))
        4
    """

    def __init__(self, loaders: list[DataLoader[Any]]) -> None:
        self.loaders = loaders

    @property
    def sampler(self) -> "PhasedLoader":
        """Itself: where Lightning looks for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Tell the phases' samplers.

        Args:
            epoch: Number of the epoch.
        """
        for loader in self.loaders:
            if hasattr(loader.sampler, "set_epoch"):
                loader.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return sum(map(len, self.loaders))

    def __iter__(self) -> Iterator[Any]:
        for loader in self.loaders:
            yield from loader

    def state_dict(self) -> dict[str, Any]:
        """Where each phase stands."""
        return {str(i): x.state_dict() for i, x in enumerate(self.loaders) if isinstance(x, ResumableLoader)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Args:
            state: What :meth:`state_dict` returned.
        """
        for index, place in state.items():
            loader = self.loaders[int(index)]
            if isinstance(loader, ResumableLoader):
                loader.load_state_dict(place)
