"""The graph as PyG objects: typed for storing and sampling, homogeneous (KGAT's CKG) for message passing."""

import copy

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch_geometric.data import Data, HeteroData

__all__ = ["add_inverse_edges", "build_graph", "collaborative_graph"]

INTERACTS = ("user", "interacts", "entity")
RELATES = ("entity", "relates", "entity")
# PyG's name for an inverse edge type (torch_geometric.transforms.ToUndirected).
INTERACTED = ("entity", "rev_interacts", "user")
RELATED = ("entity", "rev_relates", "entity")

IntArray = npt.NDArray[np.int64]


def build_graph(
    interactions: IntArray,
    triples: IntArray,
    *,
    num_users: int,
    num_items: int,
    num_entities: int,
    num_relations: int,
) -> HeteroData:
    """Put interactions and triples into a :class:`~torch_geometric.data.HeteroData`.

    Args:
        interactions: Training pairs (user, item), shape ``[2, E]``, int64.
        triples: (head, relation, tail), shape ``[3, T]``, int64.
        num_users: Number of user nodes.
        num_items: Number of items; items are the first entities.
        num_entities: Number of entity nodes, items included.
        num_relations: Number of relations of the knowledge graph, without inverses and without "interacts".

    Returns:
        Node types ``user`` and ``entity``; edge types ``(user, interacts, entity)`` and ``(entity, relates, entity)``,
        the latter with ``edge_type`` ``[T]``; graph attributes ``num_items`` and ``num_relations``.

    Example:
        >>> import numpy as np
        >>> sizes = dict(num_users=1, num_items=2, num_entities=3, num_relations=1)
        >>> data = build_graph(np.array([[0], [1]]), np.array([[1], [0], [2]]), **sizes)
        >>> data["entity", "relates", "entity"].edge_index.tolist()
        [[1], [2]]
    """
    data = HeteroData()
    data["user"].num_nodes = num_users
    data["entity"].num_nodes = num_entities
    data[INTERACTS].edge_index = torch.from_numpy(np.ascontiguousarray(interactions))
    data[RELATES].edge_index = torch.from_numpy(np.ascontiguousarray(triples[[0, 2]]))
    data[RELATES].edge_type = torch.from_numpy(np.ascontiguousarray(triples[1]))
    data.num_items = num_items
    data.num_relations = num_relations
    return data


def add_inverse_edges(data: HeteroData) -> HeteroData:
    """A shallow copy of the graph with every edge in both directions, as edge types of their own.

    Neighbour sampling walks edges from target to source: without the inverses a user would have no neighbours.

    Args:
        data: A graph of :func:`build_graph`.

    Returns:
        The graph with ``(entity, rev_interacts, user)`` and ``(entity, rev_relates, entity)`` added.

    Example:
        >>> import numpy as np
        >>> sizes = dict(num_users=1, num_items=2, num_entities=3, num_relations=1)
        >>> data = build_graph(np.array([[0], [1]]), np.array([[1], [0], [2]]), **sizes)
        >>> len(add_inverse_edges(data).edge_types)
        4
    """
    both = copy.copy(data)
    both[INTERACTED].edge_index = data[INTERACTS].edge_index.flip(0)
    both[RELATED].edge_index = data[RELATES].edge_index.flip(0)
    both[RELATED].edge_type = data[RELATES].edge_type
    return both


def collaborative_graph(data: HeteroData) -> Data:
    r"""The collaborative knowledge graph (CKG) of KGAT (Wang et al., KDD 2019, section 2), homogeneous.

    Nodes are the entities first, so that an item's id is its node id, then the users: node ``num_entities + user``.
    With ``R = data.num_relations`` relations in the knowledge graph the edge types are

    - ``0``: user -> item, "interacts";
    - ``1 + r``: head -> tail, relation ``r`` of the knowledge graph;
    - ``(R + 1) + type``: the same edge, inverted.

    So ``(type + R + 1) % (2 * (R + 1))`` is the inverse of any type.

    Args:
        data: A graph of :class:`~lightning_tinykg.data.KGRecDataModule`, or a batch of PyG's ``LinkNeighborLoader`` on
            it: a graph that brings its own inverse edge types keeps exactly those.

    Returns:
        ``edge_index`` ``[2, 2(E + T)]`` (row 0 the source, row 1 the target, PyG's ``source_to_target``) and
        ``edge_type`` ``[2(E + T)]``, both int64 and sorted by target; ``num_nodes``, ``num_entities``, ``num_users``,
        ``num_relations`` (``2 * (R + 1)``, inverses included).

    Example:
        >>> import numpy as np
        >>> sizes = dict(num_users=1, num_items=2, num_entities=3, num_relations=1)
        >>> graph = collaborative_graph(build_graph(np.array([[0], [1]]), np.array([[1], [0], [2]]), **sizes))
        >>> graph.edge_index.tolist()  # 3 is the user
        [[3, 2, 1, 1], [1, 1, 2, 3]]
        >>> graph.edge_type.tolist()
        [0, 3, 1, 2]
    """
    num_entities, num_users = int(data["entity"].num_nodes), int(data["user"].num_nodes)
    base = int(data.num_relations) + 1
    user, item = data[INTERACTS].edge_index
    head, tail = data[RELATES].edge_index
    relation = data[RELATES].edge_type + 1
    if INTERACTED in data.edge_types:
        item_back, user_back = data[INTERACTED].edge_index
        tail_back, head_back = data[RELATED].edge_index
        relation_back = data[RELATED].edge_type + 1
    else:
        item_back, user_back, tail_back, head_back, relation_back = item, user, tail, head, relation

    source = torch.cat([user + num_entities, head, item_back, tail_back])
    target = torch.cat([item, tail, user_back + num_entities, head_back])
    edge_type = torch.cat(
        [torch.zeros_like(user), relation, torch.full_like(user_back, base), relation_back + base],
    )
    order: Tensor = target.argsort(stable=True)
    return Data(
        edge_index=torch.stack([source[order], target[order]]),
        edge_type=edge_type[order],
        num_nodes=num_entities + num_users,
        num_entities=num_entities,
        num_users=num_users,
        num_relations=2 * base,
    )
