"""What the loaders of :class:`~lightning_tinykg.data.KGRecDataModule` hand to a model.

NamedTuples, of tensors mostly: Lightning moves them to the device, a ``DataLoader`` pins them, and they unpack by
position.
"""

from typing import NamedTuple, TypeAlias

from torch import Tensor
from torch_geometric.data import HeteroData

__all__ = ["BPRBatch", "RankingBatch", "SampledBatch", "TripleBatch"]


class BPRBatch(NamedTuple):
    """Training triplets of Bayesian personalised ranking (Rendle et al., UAI 2009): positive above negative.

    All int64, shape ``[B]``.

    Attributes:
        user: User ids, in ``0..num_users - 1``.
        positive: Items the user has interacted with in training, in ``0..num_items - 1``.
        negative: Items the user has not interacted with in training.

    Example:
        >>> import torch
        >>> batch = BPRBatch(torch.tensor([0, 1]), torch.tensor([3, 4]), torch.tensor([5, 6]))
        >>> batch.user.shape
        torch.Size([2])
    """

    user: Tensor
    positive: Tensor
    negative: Tensor


class TripleBatch(NamedTuple):
    """Edges of the collaborative knowledge graph for TransR, each with a corrupted tail (KGAT, KDD 2019, section 3.1).

    All int64, shape ``[B]``. Ids are node ids of :func:`~lightning_tinykg.data.collaborative_graph` (entities first,
    then users). An edge ``head -> tail`` is column ``(head, tail)`` of its ``edge_index`` with ``relation`` its
    ``edge_type``: interactions and inverse edges take part, as published.

    Attributes:
        head: Source nodes of the edges.
        relation: Edge types, in ``0..graph.num_relations - 1``.
        tail: Target nodes of the edges.
        corrupted: Nodes for which ``(head, relation, corrupted)`` is no edge.
        counts: How many there are of each relation, if they are sorted by it; None: they come in any order. On the
            host, so that a GPU need not be waited for.

    Example:
        >>> import torch
        >>> TripleBatch(*torch.zeros(4, 8, dtype=torch.long)).relation.shape
        torch.Size([8])
    """

    head: Tensor
    relation: Tensor
    tail: Tensor
    corrupted: Tensor
    counts: list[int] | None = None


class RankingBatch(NamedTuple):
    """A chunk of users for full-ranking evaluation. Every user in it has at least one target.

    Attributes:
        user: User ids, shape ``[U]``, int64.
        exclude: Pairs (row within the chunk, item) to leave out of the ranking, shape ``[2, X]``, int64: training
            items, and for the test set the validation items too.
        target: Pairs (row within the chunk, item) that should be found, shape ``[2, Y]``, int64, sorted by row.

    Example:
        >>> import torch
        >>> batch = RankingBatch(torch.tensor([7]), torch.tensor([[0], [2]]), torch.tensor([[0, 0], [1, 3]]))
        >>> scores = torch.arange(4.0).view(1, 4).clone()
        >>> scores[batch.exclude[0], batch.exclude[1]] = -torch.inf
        >>> scores.topk(2).indices
        tensor([[3, 1]])
    """

    user: Tensor
    exclude: Tensor
    target: Tensor


SampledBatch: TypeAlias = HeteroData
"""A neighbourhood from PyG's ``LinkNeighborLoader``: a :class:`~torch_geometric.data.HeteroData` with local node ids.

``batch["user"].src_index``, ``batch["entity"].dst_pos_index`` and ``batch["entity"].dst_neg_index`` (all ``[B]``,
int64) are the BPR triplets in local ids; ``batch["user"].n_id`` and ``batch["entity"].n_id`` map local ids to global
ones. ``collaborative_graph(batch)`` is the sampled collaborative knowledge graph.
"""
