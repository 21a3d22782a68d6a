"""A fixed number of sampled neighbours for every entity: the receptive field of KGCN and KGNN-LS."""

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import HeteroData

from lightning_tinykg.arguments import check_whole
from lightning_tinykg.data.graph import RELATES

__all__ = ["neighbor_table"]


def neighbor_table(graph: HeteroData, *, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sample `size` neighbours of every entity in the knowledge graph, once (KGCN, Wang et al., WWW 2019, section 2.2).

    As in the authors' code (hwwang55/KGCN, `construct_adj`) a triple makes its head and its tail neighbours of one
    another by the same relation, and an entity with fewer than `size` neighbours has some of them more than once. Where
    there are enough, none comes twice. An entity without any, which the authors' data have not, is its own neighbour by
    a relation of its own, number `num_relations`.

    Args:
        graph: The training graph, see :func:`~lightning_tinykg.data.graph.build_graph`.
        size: Neighbours of an entity.
        seed: Seed of the sampling: the same table on every rank, and in a resumed run.

    Returns:
        Neighbours and the relations that lead to them, int64 `[num_entities, size]` each, on the CPU.

    Raises:
        ValueError: If `size` is not positive.

    Example:
        >>> import numpy as np
        >>> from lightning_tinykg.data.graph import build_graph
        >>> sizes = dict(num_users=1, num_items=2, num_entities=4, num_relations=1)
        >>> graph = build_graph(np.array([[0], [1]]), np.array([[1], [0], [2]]), **sizes)
        >>> neighbor, relation = neighbor_table(graph, size=2, seed=0)
        >>> neighbor.tolist()  # 1 and 2 have one another, 0 and 3 nobody
        [[0, 0], [2, 2], [1, 1], [3, 3]]
        >>> relation[:2].tolist()
        [[1, 1], [0, 0]]
    """
    check_whole("size", size, 1)
    num_entities = int(graph["entity"].num_nodes)
    head, tail = graph[RELATES].edge_index.cpu().numpy()
    kind = graph[RELATES].edge_type.cpu().numpy()
    alone = np.setdiff1d(np.arange(num_entities), np.concatenate([head, tail]))
    source = np.concatenate([head, tail, alone])
    target = np.concatenate([tail, head, alone])
    relation = np.concatenate([kind, kind, np.full_like(alone, int(graph.num_relations))])

    rng = np.random.default_rng([seed, 20])
    order = np.lexsort((rng.random(source.size), source))  # by entity, and shuffled within it
    count = np.bincount(source, minlength=num_entities)
    start = np.cumsum(count) - count
    repeated = (rng.random((num_entities, size)) * count[:, None]).astype(np.int64)
    pick = np.where(count[:, None] >= size, np.arange(size), repeated)
    edge = order[start[:, None] + pick]
    return torch.from_numpy(target[edge]), torch.from_numpy(relation[edge])
