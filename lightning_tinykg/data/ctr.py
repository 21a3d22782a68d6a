"""The CTR protocol of KGCN: positives, as many sampled negatives, and whether a user clicks is what is predicted."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_tinykg.data.datasets import StepBatches
from lightning_tinykg.data.splits import ItemsByUser

__all__ = ["NEGATIVE", "CTRBatch", "CTRBatches", "CTRChunks", "label_pairs", "sample_negatives", "split_pairs"]

NEGATIVE = ("user", "negative", "entity")
"""Edge type of the training graph that holds the sampled training negatives."""

IntArray = npt.NDArray[np.int64]


class CTRBatch(NamedTuple):
    """Pairs of a user and an item, and whether the user has interacted with the item.

    Attributes:
        user: User ids, int64 ``[B]``.
        item: Item ids, int64 ``[B]``.
        label: 1 for an interaction, 0 for a sampled negative, float32 ``[B]``.

    Example:
        >>> CTRBatch(torch.tensor([0, 0]), torch.tensor([3, 4]), torch.tensor([1.0, 0.0])).label.mean()
        tensor(0.5000)
    """

    user: Tensor
    item: Tensor
    label: Tensor


def sample_negatives(pairs: IntArray, *, num_users: int, num_items: int, seed: int) -> IntArray:
    """For every user as many items without interaction as there are with one, drawn uniformly, none twice.

    Args:
        pairs: Distinct interactions (user, item), shape ``[2, N]``.
        num_users: Number of users.
        num_items: Number of items.
        seed: Seed of a private generator.

    Returns:
        Pairs (user, item), shape ``[2, M]``, sorted by user. A user who has interacted with more than half of the items
        gets all others, which are fewer.

    Example:
        >>> pairs = np.array([[0, 0, 1], [0, 2, 3]])
        >>> sample_negatives(pairs, num_users=2, num_items=4, seed=0)[:, :2].tolist()  # user 0 has not seen 1 and 3
        [[0, 0], [1, 3]]
    """
    rng = np.random.default_rng([seed, 12])
    table = ItemsByUser.build(pairs, num_users=num_users)
    drawn = []
    for start, stop in zip(table.starts[:-1], table.starts[1:], strict=True):
        seen = np.sort(table.items[start:stop])
        ranks = np.sort(rng.choice(num_items - seen.size, size=min(seen.size, num_items - seen.size), replace=False))
        # The k-th item that is not among the seen ones, as in NegativeSampler.
        drawn.append(ranks + np.searchsorted(seen - np.arange(seen.size), ranks, side="right"))
    users = np.repeat(np.arange(num_users), [items.size for items in drawn])
    return np.stack([users, np.concatenate(drawn)]) if drawn else np.zeros((2, 0), dtype=np.int64)


def label_pairs(pairs: IntArray, *, num_users: int, num_items: int, seed: int) -> IntArray:
    """Interactions with label 1 and sampled negatives with label 0.

    Args:
        pairs: Distinct interactions (user, item), shape ``[2, N]``.
        num_users: Number of users.
        num_items: Number of items.
        seed: Seed of the negatives.

    Returns:
        (user, item, label), shape ``[3, N + M]``.

    Example:
        >>> label_pairs(np.array([[0], [1]]), num_users=1, num_items=2, seed=0).tolist()
        [[0, 0], [1, 0], [1, 0]]
    """
    negatives = sample_negatives(pairs, num_users=num_users, num_items=num_items, seed=seed)
    labels = np.repeat(np.array([1, 0]), [pairs.shape[1], negatives.shape[1]])
    return np.concatenate([np.concatenate([pairs, negatives], axis=1), labels[None]])


def split_pairs(
    labelled: IntArray, *, val_fraction: float, test_fraction: float, seed: int
) -> tuple[IntArray, IntArray, IntArray]:
    """Cut labelled pairs into training, validation and test set at random, whatever the user (as KGCN's authors do).

    Args:
        labelled: (user, item, label), shape ``[3, N]``.
        val_fraction: Share for validation.
        test_fraction: Share for testing.
        seed: Seed of a private generator.

    Returns:
        The three sets, shape ``[3, *]`` each.

    Raises:
        ValueError: If nothing would be left for training.

    Example:
        >>> labelled = label_pairs(np.arange(10).reshape(1, 10).repeat(2, 0), num_users=10, num_items=10, seed=0)
        >>> [part.shape[1] for part in split_pairs(labelled, val_fraction=0.2, test_fraction=0.2, seed=0)]
        [12, 4, 4]
    """
    total = labelled.shape[1]
    # 1e-9: 10 * 0.2 is two pairs on every platform, whatever the last bit of the product.
    num_val, num_test = int(total * val_fraction + 1e-9), int(total * test_fraction + 1e-9)
    if num_val + num_test >= total:
        raise ValueError(
            f"val_fraction and test_fraction must leave some of the {total} labelled pairs for training, "
            f"got {val_fraction} and {test_fraction}"
        )
    order = np.random.default_rng([seed, 13]).permutation(total)
    val, test, train = np.split(labelled[:, order], [num_val, num_val + num_test], axis=1)
    return train, val, test


class CTRBatches(StepBatches[CTRBatch]):
    """Training batches. Nothing is drawn: the negatives are those of the data set, the same in every epoch.

    Args:
        labelled: (user, item, label), shape ``[3, N]``.
        batch_size: Size of a batch asked for by number.

    Example:
        >>> CTRBatches(np.array([[0, 0], [1, 2], [1, 0]]), batch_size=2)[0].label
        tensor([1., 0.])
    """

    def __init__(self, labelled: IntArray, *, batch_size: int) -> None:
        super().__init__(labelled.shape[1], batch_size, seed=0, stream=4)
        self.labelled = labelled

    def make(self, rows: IntArray, rng: np.random.Generator) -> CTRBatch:
        """One batch: the labelled pairs ``rows``."""
        user, item, label = torch.from_numpy(self.labelled[:, rows])
        return CTRBatch(user, item, label.float())


class CTRChunks(Dataset[CTRBatch]):
    """This rank's share of an evaluation set, in chunks. No pair comes twice, and ranks have equally many chunks.

    Args:
        labelled: (user, item, label), shape ``[3, N]``.
        chunk: Most pairs in a batch.
        num_replicas: Number of ranks.
        rank: This rank.

    Example:
        >>> len(CTRChunks(np.zeros((3, 5), dtype=np.int64), chunk=2, num_replicas=2, rank=1))
        2
    """

    def __init__(self, labelled: IntArray, *, chunk: int, num_replicas: int = 1, rank: int = 0) -> None:
        self.batches = CTRBatches(labelled, batch_size=chunk)
        rows = np.arange(labelled.shape[1])
        most = -(-rows.size // num_replicas)
        self.chunks = np.array_split(rows[rank::num_replicas], max(-(-most // chunk), 1)) if rows.size else []

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> CTRBatch:
        return self.batches.make(self.chunks[index], np.random.default_rng(0))
