"""Losses and the ranking itself, as functions of embeddings."""

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["best_scored", "bpr_loss", "distance_correlation", "dot_products", "half_squared_norm", "top_k"]


def bpr_loss(users: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """Bayesian personalised ranking: the mean of `softplus(-(u.p - u.n))` over the batch.

    Rendle et al., UAI 2009, section 4.1 (arXiv 1205.2618), with dot-product scores.

    Args:
        users: Embeddings of the users, float `[B, D]`.
        positives: Embeddings of an item each user has interacted with, `[B, D]`.
        negatives: Embeddings of an item each user has not interacted with, `[B, D]`.

    Returns:
        The loss, a scalar; `log(2)` where positives and negatives score the same.

    Example:
        >>> one = torch.ones(4, 2)
        >>> f"{bpr_loss(one, one, one).item():.4f}"
        '0.6931'
    """
    return F.softplus(((negatives - positives) * users).sum(dim=-1)).mean()


def half_squared_norm(*rows: Tensor) -> Tensor:
    """`sum |x|^2 / (2 B)` over some `[B, *]` tensors: the L2 penalty of one batch, per row.

    Example:
        >>> half_squared_norm(torch.ones(4, 2), 2 * torch.ones(4, 2))
        tensor(5.)
    """
    return torch.stack([x.square().sum() for x in rows]).sum() / (2 * rows[0].size(0))


def distance_correlation(rows: Tensor) -> Tensor:
    """The distance correlation of each pair of rows, summed: 0 for rows that tell nothing of one another, else up to 1.

    The `D` elements of a row count as draws of a variable (Szekely et al., Annals of Statistics 2007, section 2.2):
    `dCor(a, b) = dCov(a, b) / sqrt(dCov(a, a) dCov(b, b))`, `dCov(a, b)^2 = mean_jk A_jk B_jk`, with `A` the distances
    `|a_j - a_k|` less the means of their row and column, plus that of all.

    Args:
        rows: Float `[P, D]`.

    Returns:
        A scalar, at most `P (P - 1) / 2`.

    Example:
        >>> rows = torch.tensor([[1.0, 2.0, 4.0], [3.0, 5.0, 9.0]])
        >>> f"{distance_correlation(rows).item():.3f}"
        '1.000'
    """
    distance = (rows[:, :, None] - rows[:, None, :]).abs()
    centred = distance - distance.mean(1, keepdim=True) - distance.mean(2, keepdim=True) + distance.mean((1, 2), True)
    flat = centred.flatten(1)
    # a root has no gradient at 0
    covariance = ((flat @ flat.t()) / flat.size(1)).clamp(min=0).add(1e-8).sqrt()
    deviation = covariance.diagonal().sqrt()
    return (covariance / (deviation[:, None] * deviation[None, :])).triu(diagonal=1).sum()


def dot_products(users: Tensor, items: Tensor) -> Tensor:
    """Scores of all items for some users, `[U, I]`: in float32 at least, whatever the embeddings are computed in.

    With the 8 bits of a bfloat16's mantissa, which autocast would give them, hundreds of items would score the same.

    Args:
        users: Float `[U, D]`.
        items: Float `[I, D]`, of the same dtype.

    Example:
        >>> dot_products(torch.ones(1, 2, dtype=torch.bfloat16), torch.ones(3, 2, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    with torch.autocast(users.device.type, enabled=False):
        wide = torch.promote_types(users.dtype, torch.float32)
        return users.to(wide) @ items.to(wide).t()


def top_k(users: Tensor, items: Tensor, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The `k` items with the greatest dot product for every user, the excluded ones left out.

    Args:
        users: Float `[U, D]`.
        items: Float `[I, D]`.
        k: How many; at most `I` come back.
        exclude: int64 `[2, X]`, pairs (row of `users`, item) that must not be recommended.

    Returns:
        `(items, scores)`, both `[U, min(k, I)]`, best first. Where fewer than `k` items are left, the item is `-1` and
        the score `-inf`.

    Example:
        >>> items, seen = torch.tensor([[3.0], [1.0], [2.0]]), torch.tensor([[0], [0]])
        >>> items, _ = top_k(torch.ones(1, 1), items, k=2, exclude=seen)
        >>> items
        tensor([[2, 1]])
    """
    return best_scored(dot_products(users, items), k, exclude)


def best_scored(scores: Tensor, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`top_k` of scores instead of embeddings.

    Args:
        scores: Float `[U, I]`; it is written into.
        k: How many; at most `I` come back.
        exclude: int64 `[2, X]`, pairs (row, item) that must not be recommended.

    Returns:
        `(items, scores)`, as `top_k`.

    Example:
        >>> best_scored(torch.tensor([[3.0, 1.0, 2.0]]), k=2, exclude=torch.tensor([[0], [0]]))[0]
        tensor([[2, 1]])
    """
    if exclude is not None:
        scores[exclude[0], exclude[1]] = float("-inf")
    best, index = scores.topk(min(k, scores.size(1)), dim=-1)
    return index.masked_fill(best == float("-inf"), -1), best
