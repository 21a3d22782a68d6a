"""The collaborative knowledge graph, against one made by hand."""

import numpy as np
import torch
from torch_geometric.data import HeteroData

from lightning_tinykg.data import collaborative_graph
from lightning_tinykg.data.graph import add_inverse_edges, build_graph


def hand_made() -> HeteroData:
    # 2 users, items 0 and 1, entities 2 and 3, relations 0 and 1.
    return build_graph(
        np.array([[0, 0, 1], [0, 1, 1]]),
        np.array([[0, 1, 2], [0, 1, 0], [2, 3, 3]]),
        num_users=2,
        num_items=2,
        num_entities=4,
        num_relations=2,
    )


# (source, type, target): users are nodes 4 and 5; 0 interacts, 1 and 2 the relations, 3 to 5 their inverses.
FORWARD = {(4, 0, 0), (4, 0, 1), (5, 0, 1), (0, 1, 2), (1, 2, 3), (2, 1, 3)}
EDGES = FORWARD | {(target, kind + 3, source) for source, kind, target in FORWARD}


def edges(graph: HeteroData) -> set[tuple[int, ...]]:
    data = collaborative_graph(graph)
    return set(zip(data.edge_index[0].tolist(), data.edge_type.tolist(), data.edge_index[1].tolist(), strict=True))


def test_collaborative_graph() -> None:
    graph = collaborative_graph(hand_made())
    assert edges(hand_made()) == EDGES
    assert graph.edge_index.shape == (2, 12)
    assert (graph.num_nodes, graph.num_entities, graph.num_users, graph.num_relations) == (6, 4, 2, 6)
    assert (graph.edge_index[1].diff() >= 0).all()
    assert graph.edge_index.dtype == graph.edge_type.dtype == torch.int64
    graph.validate()


def test_inverse_edge_types_are_not_doubled() -> None:
    both = add_inverse_edges(hand_made())
    assert edges(both) == EDGES
    assert collaborative_graph(both).num_edges == 12
    assert len(hand_made().edge_types) == 2  # the original is left alone


def test_sampled_graph_keeps_only_its_own_inverse_edges() -> None:
    both = add_inverse_edges(hand_made())
    store = both["entity", "rev_relates", "entity"]
    store.edge_index, store.edge_type = store.edge_index[:, :1], store.edge_type[:1]
    assert edges(both) == EDGES - {(3, 5, 1), (3, 4, 2)}


def test_graph_without_triples() -> None:
    none = np.zeros((3, 0), dtype=np.int64)
    data = build_graph(np.array([[0], [1]]), none, num_users=1, num_items=2, num_entities=2, num_relations=0)
    assert edges(data) == {(2, 0, 1), (1, 1, 2)}
