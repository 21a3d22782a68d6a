"""What PyTorch Geometric has beside convolutions as cases: aggregations, normalization, pooling, dense layers, ..."""

from __future__ import annotations

from typing import Any

import torch
from checking import Case
from layers_conv import PNA
from layers_data import (
    GRAPHS,
    IN,
    NODES,
    OUT,
    Builder,
    batch,
    edges,
    grid,
    mlp,
    positive,
    searching,
    step,
    types,
    x,
)
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import aggr as a
from torch_geometric.nn import dense, encoding, kge, norm, pool
from torch_geometric.nn import functional as f
from torch_geometric.nn.unpool import knn_interpolate

_INDICES = "returns indices, through which no gradient flows"

_BASE = "the base of all others: its subclasses are cases"

LEFT_OUT_AGGREGATIONS = {"Aggregation": _BASE}
LEFT_OUT_OTHERS = {"KGEModel": _BASE}
LEFT_OUT_POOLS = {
    "PANPooling": "needs the sparse matrices of torch-sparse, which is built from source",
    **dict.fromkeys(
        ("KNNIndex", "L2KNNIndex", "MIPSKNNIndex", "ApproxL2KNNIndex", "ApproxMIPSKNNIndex", "graclus", "voxel_grid",
         "fps", "knn", "knn_graph", "approx_knn", "approx_knn_graph", "radius", "radius_graph", "nearest"),
        _INDICES,
    ),
}  # fmt: skip
"""Public names that are no case, and why."""


def to_sets(aggregation: nn.Module, values: Tensor | None = None) -> Case:
    """Twelve sets of five on average, sorted as the recurrent and the sorting aggregations want them."""
    index = torch.cat([torch.arange(12), torch.randint(12, (48,))]).sort().values
    return step(aggregation, x(IN, 60) if values is None else values, index)


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.forward = function


AGGREGATIONS: dict[str, Builder] = {
    "SumAggregation": lambda: to_sets(a.SumAggregation()),
    "MeanAggregation": lambda: to_sets(a.MeanAggregation()),
    "MaxAggregation": lambda: to_sets(a.MaxAggregation()),
    "MinAggregation": lambda: to_sets(a.MinAggregation()),
    "MulAggregation": lambda: to_sets(a.MulAggregation()),
    "VarAggregation": lambda: to_sets(a.VarAggregation()),
    "StdAggregation": lambda: to_sets(a.StdAggregation()),
    "SoftmaxAggregation": lambda: to_sets(a.SoftmaxAggregation(learn=True, channels=IN)),
    "PowerMeanAggregation": lambda: to_sets(
        a.PowerMeanAggregation(p=2.0, learn=True, channels=IN), values=positive(60, IN)
    ),
    "MedianAggregation": lambda: to_sets(a.MedianAggregation()),
    "QuantileAggregation": lambda: to_sets(a.QuantileAggregation([0.25, 0.6])),
    "LSTMAggregation": lambda: to_sets(a.LSTMAggregation(IN, OUT)),
    "GRUAggregation": lambda: to_sets(a.GRUAggregation(IN, OUT)),
    "Set2Set": lambda: to_sets(a.Set2Set(IN, processing_steps=3)),
    "DegreeScalerAggregation": lambda: to_sets(
        a.DegreeScalerAggregation(["mean", "std"], PNA["scalers"], PNA["deg"], train_norm=True)
    ),
    "SortAggregation": lambda: to_sets(a.SortAggregation(k=4)),
    "GraphMultisetTransformer": lambda: to_sets(
        a.GraphMultisetTransformer(IN, k=4, heads=2, layer_norm=True, dropout=0.1)
    ),
    "AttentionalAggregation": lambda: to_sets(a.AttentionalAggregation(mlp(IN, 1), mlp(IN, OUT))),
    "EquilibriumAggregation": lambda: to_sets(a.EquilibriumAggregation(IN, OUT, [OUT, OUT], grad_iter=2)),
    "MLPAggregation": lambda: to_sets(
        a.MLPAggregation(IN, OUT, max_num_elements=20, num_layers=2, hidden_channels=OUT)
    ),
    "DeepSetsAggregation": lambda: to_sets(a.DeepSetsAggregation(mlp(IN, OUT), mlp(OUT, OUT))),
    "SetTransformerAggregation": lambda: to_sets(
        a.SetTransformerAggregation(IN, num_seed_points=2, heads=2, layer_norm=True, dropout=0.1)
    ),
    "LCMAggregation": lambda: to_sets(a.LCMAggregation(IN, OUT)),
    "VariancePreservingAggregation": lambda: to_sets(a.VariancePreservingAggregation()),
    "PatchTransformerAggregation": lambda: to_sets(
        a.PatchTransformerAggregation(IN, OUT, patch_size=2, hidden_channels=OUT, heads=2, dropout=0.1)
    ),
    "MultiAggregation": lambda: to_sets(a.MultiAggregation(["mean", "max", "std"])),
    "MultiAggregation: attention": lambda: to_sets(
        a.MultiAggregation(
            ["mean", "max", "std"], mode="attn", mode_kwargs={"in_channels": IN, "out_channels": IN, "num_heads": 2}
        )
    ),
}

NORMS: dict[str, Builder] = {
    "BatchNorm": lambda: step(norm.BatchNorm(IN), x()),
    "HeteroBatchNorm": lambda: step(norm.HeteroBatchNorm(IN, 3), x(), types(3, NODES)),
    "InstanceNorm": lambda: step(norm.InstanceNorm(IN, affine=True), x(), batch()),
    "LayerNorm": lambda: step(norm.LayerNorm(IN), x(), batch()),
    "LayerNorm: nodes": lambda: step(norm.LayerNorm(IN, mode="node"), x()),
    "HeteroLayerNorm": lambda: step(norm.HeteroLayerNorm(IN, 3), x(), types(3, NODES)),
    "GraphNorm": lambda: step(norm.GraphNorm(IN), x(), batch()),
    "GraphSizeNorm": lambda: step(norm.GraphSizeNorm(), x(), batch()),
    "PairNorm": lambda: step(norm.PairNorm(), x(), batch()),
    "MeanSubtractionNorm": lambda: step(norm.MeanSubtractionNorm(), x(), batch()),
    "MessageNorm": lambda: step(norm.MessageNorm(learn_scale=True), x(), x()),
    "DiffGroupNorm": lambda: step(norm.DiffGroupNorm(IN, groups=4), x()),
}


def with_data(function: Any, *before: Any) -> Case:
    """A function of a graph as one of its tensors."""

    def run(x: Tensor, edge_index: Tensor, batch: Tensor) -> Any:
        return function(*before, Data(x=x, edge_index=edge_index, batch=batch, pos=x.detach()[:, :3])).x

    return step(Call(run), x(), edges(), batch())


def pooled(function: Any) -> Case:
    return step(Call(function), x(), batch())


def pool_by(function: Any) -> Case:
    return step(Call(function), types(8, NODES), x(), batch())


POOLS: dict[str, Builder] = {
    "global_add_pool": lambda: pooled(pool.global_add_pool),
    "global_mean_pool": lambda: pooled(pool.global_mean_pool),
    "global_max_pool": lambda: pooled(pool.global_max_pool),
    "TopKPooling": lambda: step(pool.TopKPooling(IN), x(), edges(), None, batch()),
    "TopKPooling: scores": lambda: step(pool.TopKPooling(IN, min_score=0.02), x(), edges(), None, batch()),
    "SAGPooling": lambda: step(pool.SAGPooling(IN), x(), edges(), None, batch()),
    "EdgePooling": lambda: step(pool.EdgePooling(IN, dropout=0.1), x(), edges(), batch()),
    "ClusterPooling": lambda: step(pool.ClusterPooling(IN), x(), edges(), batch()),
    "ASAPooling": lambda: step(pool.ASAPooling(IN, dropout=0.1), x(), edges(), None, batch()),
    "MemPooling": lambda: step(pool.MemPooling(IN, OUT, heads=2, num_clusters=4), x(), batch()),
    "max_pool": lambda: with_data(pool.max_pool, types(8, NODES)),
    "avg_pool": lambda: with_data(pool.avg_pool, types(8, NODES)),
    "max_pool_x": lambda: pool_by(pool.max_pool_x),
    "avg_pool_x": lambda: pool_by(pool.avg_pool_x),
    "max_pool_neighbor_x": lambda: with_data(pool.max_pool_neighbor_x),
    "avg_pool_neighbor_x": lambda: with_data(pool.avg_pool_neighbor_x),
}


def dense_graphs(layer: nn.Module) -> Case:
    """Three graphs of ten nodes, by their adjacency."""
    adjacency = (torch.rand(GRAPHS, 10, 10) < 0.4).float()
    return step(layer, torch.randn(GRAPHS, 10, IN, requires_grad=True), adjacency)


def dense_pool(function: Any) -> Case:
    adjacency = (torch.rand(GRAPHS, 10, 10) < 0.4).float()
    features, clusters = (torch.randn(GRAPHS, 10, size, requires_grad=True) for size in (IN, 4))
    return step(Call(function), features, ((adjacency + adjacency.mT) / 2).requires_grad_(), clusters)


DENSE: dict[str, Builder] = {
    "Linear": lambda: step(dense.Linear(IN, OUT), x()),
    "HeteroLinear": lambda: step(dense.HeteroLinear(IN, OUT, 3), x(), types(3, NODES)),
    "HeteroDictLinear": lambda: step(dense.HeteroDictLinear({"a": IN, "b": 8}, OUT), {"a": x(), "b": x(8)}),
    "DenseGCNConv": lambda: dense_graphs(dense.DenseGCNConv(IN, OUT)),
    "DenseGINConv": lambda: dense_graphs(dense.DenseGINConv(mlp(IN, OUT), train_eps=True)),
    "DenseGraphConv": lambda: dense_graphs(dense.DenseGraphConv(IN, OUT)),
    "DenseSAGEConv": lambda: dense_graphs(dense.DenseSAGEConv(IN, OUT, normalize=True)),
    "DenseGATConv": lambda: dense_graphs(dense.DenseGATConv(IN, 16, heads=2, dropout=0.1)),
    "dense_diff_pool": lambda: dense_pool(dense.dense_diff_pool),
    "dense_mincut_pool": lambda: dense_pool(dense.dense_mincut_pool),
    "DMoNPooling": lambda: dense_graphs(dense.DMoNPooling(IN, k=4)),
}


def triples(model: nn.Module) -> Case:
    """The loss of twenty triples and their corruptions, which are drawn from PyTorch's generator."""
    return step(model, types(NODES, 20), types(4, 20), types(NODES, 20), run=lambda m, *triple: m.loss(*triple))


OTHERS: dict[str, Builder] = {
    "TransE": lambda: triples(kge.TransE(NODES, 4, OUT)),
    "TransE: squares": lambda: triples(kge.TransE(NODES, 4, OUT, p_norm=2.0)),
    "ComplEx": lambda: triples(kge.ComplEx(NODES, 4, OUT)),
    "DistMult": lambda: triples(kge.DistMult(NODES, 4, OUT)),
    "DistMult: sparse": lambda: triples(kge.DistMult(NODES, 4, OUT, sparse=True)),
    "RotatE": lambda: triples(kge.RotatE(NODES, 4, OUT)),
    "PositionalEncoding": lambda: step(encoding.PositionalEncoding(OUT), positive(NODES)),
    "TemporalEncoding": lambda: step(encoding.TemporalEncoding(OUT), positive(NODES)),
    "bro": lambda: pooled(f.bro),
    "knn_interpolate": searching(lambda: step(Call(knn_interpolate), x(), grid(), grid() + 0.5)),
    "gini": lambda: step(Call(f.gini), x(8)),
}
