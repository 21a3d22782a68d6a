"""KGAT's relation-aware attention, and TransR, which trains the same relation tables."""

import torch
from torch import Tensor, nn
from torch_geometric.utils import softmax

from lightning_tinykg.data.batches import TripleBatch
from lightning_tinykg.models.graph_buffers import HoldsGraph
from lightning_tinykg.models.grouped import grouped_matmul

__all__ = ["RelationGroups", "RelationalAttention"]

# Edges scored at a time where no gradient is wanted: 2^16 edges of 64 floats are 16 MiB, which malloc can use again.
_CHUNK = 1 << 16


class RelationGroups(HoldsGraph, nn.Module):
    """The edges of a graph, seen as distinct (node, relation) pairs grouped by relation.

    The transform `W_r e` depends on the node and the relation only, not on the edge. A user with a hundred items is the
    head of a hundred edges of the relation "interacts" but one pair, so transforming pairs instead of edge ends costs a
    fraction of the arithmetic and of the memory, and no `[E, d, d]` tensor of gathered matrices is ever made.

    Args:
        edge_index: int64 `[2, E]`; row 0 the tail `t` (the source of the message), row 1 the head `h` (its receiver).
        edge_type: int64 `[E]`, relation of each edge.
        num_nodes: Nodes of the graph.
        num_relations: Relations, inverses included.

    Example:
        >>> edge_index = torch.tensor([[1, 2, 2], [0, 0, 1]])
        >>> groups = RelationGroups(edge_index, torch.tensor([0, 0, 1]), num_nodes=3, num_relations=2)
        >>> groups.head_node, groups.head_count    # (0, relation 0) and (1, relation 1): two pairs for three edges
        (tensor([0, 1]), [1, 1])
    """

    tail_node: Tensor
    tail_of_edge: Tensor
    head_node: Tensor
    head_of_edge: Tensor
    head_relation: Tensor
    target: Tensor

    def __init__(self, edge_index: Tensor, edge_type: Tensor, num_nodes: int, num_relations: int) -> None:
        super().__init__()
        self.num_nodes = num_nodes
        for name, node in (("tail", edge_index[0]), ("head", edge_index[1])):
            pair, of_edge = torch.unique(edge_type * num_nodes + node, return_inverse=True)  # sorted by relation
            relation = pair // num_nodes
            self.register_buffer(f"{name}_node", pair % num_nodes, persistent=False)
            self.register_buffer(f"{name}_of_edge", of_edge, persistent=False)
            # kept as a list: the matrix products are cut by it, and asking the GPU every step would stall it
            setattr(self, f"{name}_count", relation.bincount(minlength=num_relations).tolist())
        self.register_buffer("head_relation", relation, persistent=False)
        self.register_buffer("target", edge_index[1], persistent=False)
        self.tail_count: list[int]
        self.head_count: list[int]

    def relation_mean(self) -> Tensor:
        """Edge weights `1 / |edges of h with relation r|`, float `[E]`: the sum over r of `D_r^-1 A_r`."""
        return self.head_of_edge.bincount().reciprocal()[self.head_of_edge]


class RelationalAttention(nn.Module):
    """Attention `pi(h, r, t) = (W_r e_t)^T tanh(W_r e_h + e_r)`, a softmax over the edges that arrive at `h`.

    Wang et al., KDD 2019 (arXiv 1905.07854), equations 4 and 5; `distance` is their equation 1 (TransR), which has the
    same parameters.

    Memory with gradient: two `[pairs, relation_dim]` tables, and at each edge the gathered rows of both, which the
    product keeps for its backward (`2 E relation_dim` floats). Without gradient the edges are scored in chunks.

    Args:
        num_relations: Relations, inverses included.
        dim: Width of the node embeddings.
        relation_dim: Width of the relation space.

    Example:
        >>> attention = RelationalAttention(num_relations=2, dim=4, relation_dim=3)
        >>> edge_index = torch.tensor([[1, 2, 2], [0, 0, 1]])
        >>> groups = RelationGroups(edge_index, torch.tensor([0, 0, 1]), num_nodes=3, num_relations=2)
        >>> weight = attention(torch.randn(3, 4), groups)
        >>> weight[2]    # the only edge that arrives at node 1
        tensor(1., grad_fn=<SelectBackward0>)
    """

    def __init__(self, num_relations: int, dim: int, relation_dim: int) -> None:
        super().__init__()
        self.relation = nn.Embedding(num_relations, relation_dim)
        self.transform = nn.Parameter(torch.empty(num_relations, dim, relation_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for the relation embeddings and for each relation's matrix."""
        nn.init.xavier_uniform_(self.relation.weight)
        for matrix in self.transform.data:
            nn.init.xavier_uniform_(matrix)

    def forward(self, x: Tensor, groups: RelationGroups) -> Tensor:
        """Attention of every edge.

        Args:
            x: Node embeddings, `[N, dim]`.
            groups: The edges.

        Returns:
            `[E]`, positive, summing to 1 over the edges that arrive at a node.
        """
        tail = grouped_matmul(x.index_select(0, groups.tail_node), self.transform, groups.tail_count)
        head = grouped_matmul(x.index_select(0, groups.head_node), self.transform, groups.head_count)
        head = (head + self.relation(groups.head_relation)).tanh()
        # index_select rather than x[index]: the same rows, twice as fast on a CPU
        size = groups.target.numel() if torch.is_grad_enabled() else _CHUNK
        chunks = zip(torch.split(groups.tail_of_edge, size), torch.split(groups.head_of_edge, size), strict=True)
        scores = [(tail.index_select(0, t) * head.index_select(0, h)).sum(dim=-1) for t, h in chunks]
        score = scores[0] if len(scores) == 1 else torch.cat(scores)
        weight: Tensor = softmax(score, groups.target, num_nodes=groups.num_nodes)
        return weight

    def translate(self, embedding: nn.Embedding, batch: TripleBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Head, relation, tail and corrupted tail of triples in their relation's space, sorted by relation.

        Args:
            embedding: The node table, `[N, dim]`.
            batch: `B` triples.

        Returns:
            `W_r e_h`, `e_r`, `W_r e_t`, `W_r e_t'`, each `[B, relation_dim]`, row for row of the same triple.
        """
        head, relation, tail, corrupted, counts = batch
        if counts is None:
            relation, order = relation.sort(stable=True)
            head, tail, corrupted = head[order], tail[order], corrupted[order]
            counts = relation.bincount(minlength=self.transform.size(0)).tolist()
        h, t, c = (grouped_matmul(embedding(node), self.transform, counts) for node in (head, tail, corrupted))
        return h, self.relation(relation), t, c
