"""Splitting interactions by user, and looking them up by user."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["ItemsByUser", "hold_out"]

IntArray = npt.NDArray[np.int64]


def hold_out(users: IntArray, *, num_users: int, fraction: float, seed: int | list[int]) -> npt.NDArray[np.bool_]:
    """Choose a share of every user's interactions at random; a user keeps at least one.

    A user with ``n`` interactions gives ``floor(n * fraction)`` or one more of them, by chance, so that on average
    ``fraction`` of the interactions of light users too are held out.

    Args:
        users: User of each interaction, shape ``[N]``.
        num_users: Number of users.
        fraction: Share to hold out, in ``[0, 1)``.
        seed: Seed of a private generator.

    Returns:
        True for what is held out, shape ``[N]``.

    Example:
        >>> users = np.repeat(np.arange(3), [10, 10, 1])
        >>> mask = hold_out(users, num_users=3, fraction=0.2, seed=0)
        >>> np.bincount(users[mask], minlength=3).tolist()
        [2, 2, 0]
    """
    rng = np.random.default_rng(seed)
    counts = np.bincount(users, minlength=num_users)
    # 1e-9: 10 * 0.1 is one interaction on every platform, whatever the last bit of the product.
    wanted = np.floor(counts * fraction + 1e-9 + rng.random(num_users) * (1 - 2e-9)).astype(np.int64)
    wanted = np.minimum(wanted, np.maximum(counts - 1, 0))
    order = np.lexsort((rng.random(users.size), users))
    rank = np.empty(users.size, dtype=np.int64)
    rank[order] = np.arange(users.size) - np.repeat(np.cumsum(counts) - counts, counts)
    mask: npt.NDArray[np.bool_] = rank < wanted[users]
    return mask


@dataclass(frozen=True)
class ItemsByUser:
    """Interactions in rows by user, to gather those of a chunk of users at once.

    Attributes:
        starts: Where a user's items begin, shape ``[num_users + 1]``.
        items: Items, sorted by user, shape ``[N]``.

    Example:
        >>> table = ItemsByUser.build(np.array([[1, 0, 1], [5, 6, 7]]), num_users=3)
        >>> table.gather(np.array([2, 1])).tolist()
        [[1, 1], [5, 7]]
    """

    starts: IntArray
    items: IntArray

    @classmethod
    def build(cls, pairs: IntArray, *, num_users: int) -> "ItemsByUser":
        """Sort pairs by user.

        Args:
            pairs: (user, item), shape ``[2, N]``.
            num_users: Number of users.
        """
        counts = np.bincount(pairs[0], minlength=num_users)
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return cls(starts, pairs[1][np.argsort(pairs[0], kind="stable")])

    def gather(self, users: IntArray) -> IntArray:
        """The items of some users.

        Args:
            users: Shape ``[U]``.

        Returns:
            Pairs (position in ``users``, item), shape ``[2, X]``, sorted by position.
        """
        counts = self.starts[users + 1] - self.starts[users]
        rows = np.repeat(np.arange(users.size), counts)
        offsets = np.arange(rows.size) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.stack([rows, self.items[np.repeat(self.starts[users], counts) + offsets]])
