"""The graph convolutions of PyTorch Geometric as cases."""

from __future__ import annotations

import torch
from layers_data import EDGE, EDGES, IN, NODES, OUT, Builder, edges, mlp, positive, searching, step, types, x
from torch import nn
from torch_geometric.nn import aggr
from torch_geometric.nn import conv as c

_CUGRAPH = "needs pylibcugraphops, which needs CUDA"

LEFT_OUT = {
    "MessagePassing": "the base of all others: its subclasses are cases",
    "CuGraphGATConv": _CUGRAPH,
    "CuGraphRGCNConv": _CUGRAPH,
    "CuGraphSAGEConv": _CUGRAPH,
    "FusedGATConv": "needs dgNN, which needs CUDA",
    "PANConv": "needs the sparse matrices of torch-sparse, which is built from source",
    "SplineConv": "needs pyg-lib's spline kernels",
    "WLConv": "hashes integers: it has neither parameters nor a gradient",
}
"""Public names that are no case, and why."""

KINDS = ("a", "b")
RELATIONS = [("a", "to", "b"), ("b", "to", "a"), ("a", "near", "a")]


def features() -> dict[str, torch.Tensor]:
    return {kind: x() for kind in KINDS}


def relations() -> dict[tuple[str, str, str], torch.Tensor]:
    return {relation: edges() for relation in RELATIONS}


def sorted_edges() -> torch.Tensor:
    """By target, as recurrent aggregations want them."""
    graph = edges()
    return graph[:, graph[1].argsort(stable=True)]


def normals() -> torch.Tensor:
    return nn.functional.normalize(torch.randn(NODES, 3)).requires_grad_()


def mesh() -> torch.Tensor:
    """Each edge of a mesh has four neighbours, in order."""
    return torch.stack([torch.randint(NODES, (4 * NODES,)), torch.arange(NODES).repeat_interleave(4)])


def wide(conv: c.GMMConv) -> c.GMMConv:
    """Gaussians as wide as the data: those it starts with are so narrow that they divide what is next to 0 by 1e-8."""
    nn.init.ones_(conv.sigma)
    return conv


PNA = {
    "aggregators": ["mean", "min", "max", "std"],
    "scalers": ["identity", "amplification", "attenuation"],
    "deg": torch.tensor([1, 3, 6, 9, 6, 3, 2]),
}

CONVS: dict[str, Builder] = {
    "SimpleConv": lambda: step(c.SimpleConv(combine_root="self_loop"), x(), edges(), positive(EDGES)),
    "GCNConv": lambda: step(c.GCNConv(IN, OUT), x(), edges()),
    "GCNConv: weights": lambda: step(c.GCNConv(IN, OUT), x(), edges(), positive(EDGES)),
    "ChebConv": lambda: step(c.ChebConv(IN, OUT, K=3), x(), edges(), positive(EDGES)),
    "SAGEConv": lambda: step(c.SAGEConv(IN, OUT), x(), edges()),
    "SAGEConv: max": lambda: step(c.SAGEConv(IN, OUT, aggr="max"), x(), edges()),
    "SAGEConv: projected, normalized": lambda: step(
        c.SAGEConv(IN, OUT, project=True, normalize=True), x(), edges()
    ),
    "SAGEConv: bipartite": lambda: step(c.SAGEConv((IN, IN), OUT), (x(), x(rows=40)), edges()),
    "SAGEConv: LSTM": lambda: step(c.SAGEConv(IN, OUT, aggr="lstm"), x(), sorted_edges()),
    "GraphConv": lambda: step(c.GraphConv(IN, OUT), x(), edges(), positive(EDGES)),
    "GraphConv: max": lambda: step(c.GraphConv(IN, OUT, aggr="max"), x(), edges(), positive(EDGES)),
    "GravNetConv": searching(lambda: step(c.GravNetConv(IN, OUT, 4, 16, k=5), (x() * 0.1).detach().requires_grad_())),
    "GatedGraphConv": lambda: step(c.GatedGraphConv(OUT, num_layers=3), x(), edges(), positive(EDGES)),
    "ResGatedGraphConv": lambda: step(c.ResGatedGraphConv(IN, OUT, edge_dim=EDGE), x(), edges(), x(EDGE, EDGES)),
    "GATConv": lambda: step(c.GATConv(IN, 8, heads=4), x(), edges()),
    "GATConv: edges, dropout, residual": lambda: step(
        c.GATConv(IN, 8, heads=4, edge_dim=EDGE, dropout=0.3, residual=True), x(), edges(), x(EDGE, EDGES)
    ),
    "GATv2Conv": lambda: step(c.GATv2Conv(IN, 8, heads=4), x(), edges()),
    "GATv2Conv: edges, dropout, mean": lambda: step(
        c.GATv2Conv(IN, OUT, heads=2, concat=False, edge_dim=EDGE, dropout=0.3), x(), edges(), x(EDGE, EDGES)
    ),
    "TransformerConv": lambda: step(c.TransformerConv(IN, 16, heads=2), x(), edges()),
    "TransformerConv: edges, beta, dropout": lambda: step(
        c.TransformerConv(IN, 16, heads=2, beta=True, edge_dim=EDGE, dropout=0.2), x(), edges(), x(EDGE, EDGES)
    ),
    "AGNNConv": lambda: step(c.AGNNConv(), x(), edges()),
    "TAGConv": lambda: step(c.TAGConv(IN, OUT), x(), edges(), positive(EDGES)),
    "GINConv": lambda: step(c.GINConv(mlp(IN, OUT), train_eps=True), x(), edges()),
    "GINEConv": lambda: step(c.GINEConv(mlp(IN, OUT), train_eps=True, edge_dim=EDGE), x(), edges(), x(EDGE, EDGES)),
    "ARMAConv": lambda: step(
        c.ARMAConv(IN, OUT, num_stacks=2, num_layers=2, dropout=0.2), x(), edges(), positive(EDGES)
    ),
    "SGConv": lambda: step(c.SGConv(IN, OUT, K=2), x(), edges(), positive(EDGES)),
    "SSGConv": lambda: step(c.SSGConv(IN, OUT, alpha=0.2, K=2), x(), edges(), positive(EDGES)),
    "APPNP": lambda: step(c.APPNP(K=3, alpha=0.1, dropout=0.2), x(), edges(), positive(EDGES)),
    "MFConv": lambda: step(c.MFConv(IN, OUT), x(), edges()),
    "RGCNConv": lambda: step(c.RGCNConv(IN, OUT, 4), x(), edges(), types(4)),
    "RGCNConv: bases": lambda: step(c.RGCNConv(IN, OUT, 4, num_bases=2), x(), edges(), types(4)),
    "RGCNConv: blocks": lambda: step(c.RGCNConv(IN, OUT, 4, num_blocks=4), x(), edges(), types(4)),
    "RGCNConv: embeddings": lambda: step(c.RGCNConv(NODES, OUT, 4), None, edges(), types(4)),
    "FastRGCNConv": lambda: step(c.FastRGCNConv(IN, OUT, 4, num_bases=2), x(), edges(), types(4)),
    "RGATConv": lambda: step(
        c.RGATConv(IN, OUT, 4, num_bases=2, heads=2, edge_dim=EDGE), x(), edges(), types(4), x(EDGE, EDGES)
    ),
    "RGATConv: within relations, multiplicative": lambda: step(
        c.RGATConv(
            IN, 16, 4, heads=2, dim=2, attention_mechanism="within-relation", mod="f-scaled",
            attention_mode="multiplicative-self-attention",
        ), x(), edges(), types(4),
    ),
    "SignedConv": lambda: step(c.SignedConv(IN, OUT, first_aggr=True), x(), edges(), edges()),
    "SignedConv: later": lambda: step(c.SignedConv(8, OUT, first_aggr=False), x(), edges(), edges()),
    "DNAConv": lambda: step(
        c.DNAConv(OUT, heads=4, groups=4, dropout=0.2), torch.randn(NODES, 3, OUT, requires_grad=True), edges()
    ),
    "PointNetConv": lambda: step(c.PointNetConv(mlp(IN + 3, OUT), mlp(OUT, OUT)), x(), x(3), edges()),
    "GMMConv": lambda: step(wide(c.GMMConv(IN, OUT, dim=3, kernel_size=4)), x(), edges(), positive(EDGES, 3)),
    "GMMConv: separate": lambda: step(
        wide(c.GMMConv(IN, OUT, dim=3, kernel_size=4, separate_gaussians=True)), x(), edges(), positive(EDGES, 3)
    ),
    "NNConv": lambda: step(c.NNConv(IN, OUT, mlp(EDGE, IN * OUT)), x(), edges(), x(EDGE, EDGES)),
    "CGConv": lambda: step(c.CGConv(IN, dim=EDGE, batch_norm=True), x(), edges(), x(EDGE, EDGES)),
    "EdgeConv": lambda: step(c.EdgeConv(mlp(2 * IN, OUT)), x(), edges()),
    "DynamicEdgeConv": searching(lambda: step(c.DynamicEdgeConv(mlp(2 * IN, OUT), k=4), x())),
    "XConv": searching(lambda: step(c.XConv(IN, OUT, dim=3, kernel_size=4, hidden_channels=8), x(), x(3))),
    # without self-loops: the angle between a vector of length zero and another has no gradient
    "PPFConv": lambda: step(
        c.PPFConv(mlp(IN + 4, OUT), mlp(OUT, OUT), add_self_loops=False), x(), x(3), normals(), edges()
    ),
    "FeaStConv": lambda: step(c.FeaStConv(IN, OUT, heads=4), x(), edges()),
    "PointTransformerConv": lambda: step(
        c.PointTransformerConv(IN, OUT, mlp(3, OUT), mlp(OUT, OUT)), x(), x(3), edges()
    ),
    "HypergraphConv": lambda: step(c.HypergraphConv(IN, OUT), x(), edges(), positive(NODES)),
    "HypergraphConv: attention": lambda: step(
        c.HypergraphConv(IN, OUT, use_attention=True, heads=2), x(), edges(), hyperedge_attr=x()
    ),
    "LEConv": lambda: step(c.LEConv(IN, OUT), x(), edges(), positive(EDGES)),
    "PNAConv": lambda: step(c.PNAConv(IN, OUT, **PNA, edge_dim=EDGE, towers=2), x(), edges(), x(EDGE, EDGES)),
    "ClusterGCNConv": lambda: step(c.ClusterGCNConv(IN, OUT, diag_lambda=0.5), x(), edges()),
    "GENConv": lambda: step(
        c.GENConv(IN, OUT, learn_t=True, msg_norm=True, learn_msg_scale=True, edge_dim=EDGE),
        x(), edges(), x(EDGE, EDGES),
    ),
    "GENConv: power mean": lambda: step(c.GENConv(IN, OUT, aggr="powermean", p=2.0, learn_p=True), x(), edges()),
    "GCN2Conv": lambda: step(c.GCN2Conv(IN, alpha=0.1, theta=0.5, layer=2), x(), x(), edges(), positive(EDGES)),
    "WLConvContinuous": lambda: step(c.WLConvContinuous(), x(), edges(), positive(EDGES)),
    "FiLMConv": lambda: step(c.FiLMConv(IN, OUT, num_relations=3), x(), edges(), types(3)),
    # negatives are given: PyG samples them with NumPy's generator
    "SuperGATConv": lambda: step(
        c.SuperGATConv(IN, 8, heads=4, dropout=0.2), x(), edges(), edges(),
        run=lambda m, *inputs: (m(*inputs), m.get_attention_loss()),
    ),
    "SuperGATConv: scaled dot product": lambda: step(
        c.SuperGATConv(IN, 8, heads=4, attention_type="SD"), x(), edges(), edges(),
        run=lambda m, *inputs: (m(*inputs), m.get_attention_loss()),
    ),
    "FAConv": lambda: step(c.FAConv(IN, dropout=0.2), x(), x(), edges()),
    "EGConv": lambda: step(c.EGConv(IN, OUT, aggregators=["symnorm", "max", "std"], num_heads=4), x(), edges()),
    "PDNConv": lambda: step(c.PDNConv(IN, OUT, edge_dim=EDGE, hidden_channels=OUT), x(), edges(), x(EDGE, EDGES)),
    "GeneralConv": lambda: step(
        c.GeneralConv(IN, OUT, in_edge_channels=EDGE, heads=2, attention=True, l2_normalize=True),
        x(), edges(), x(EDGE, EDGES),
    ),
    "GeneralConv: dot product": lambda: step(
        c.GeneralConv(IN, OUT, heads=2, attention=True, attention_type="dot_product", skip_linear=True), x(), edges()
    ),
    "HGTConv": lambda: step(c.HGTConv(IN, OUT, (list(KINDS), RELATIONS), heads=2), features(), relations()),
    "HEATConv": lambda: step(
        c.HEATConv(IN, OUT, 3, 4, 8, EDGE, 8, heads=2, dropout=0.2), x(), edges(), types(3, NODES), types(4),
        x(EDGE, EDGES),
    ),
    "HeteroConv": lambda: step(
        c.HeteroConv(
            {
                RELATIONS[0]: c.SAGEConv((IN, IN), OUT),
                RELATIONS[1]: c.GATConv((IN, IN), OUT, add_self_loops=False),
                RELATIONS[2]: c.GCNConv(IN, OUT),
            }
        ), features(), relations(),
    ),
    "HANConv": lambda: step(
        c.HANConv(IN, OUT, (list(KINDS), RELATIONS), heads=2, dropout=0.2), features(), relations()
    ),
    "LGConv": lambda: step(c.LGConv(), x(), edges(), positive(EDGES)),
    "PointGNNConv": lambda: step(c.PointGNNConv(mlp(IN, 3), mlp(IN + 3, OUT), mlp(OUT, IN)), x(), x(3), edges()),
    "GPSConv": lambda: step(c.GPSConv(IN, c.GCNConv(IN, IN), heads=2, dropout=0.1), x(), edges()),
    "GPSConv: performer, layer norm": lambda: step(
        c.GPSConv(IN, c.GINConv(mlp(IN, IN)), heads=2, norm="layer_norm", attn_type="performer"), x(), edges()
    ),
    "AntiSymmetricConv": lambda: step(c.AntiSymmetricConv(IN, num_iters=2), x(), edges()),
    "DirGNNConv": lambda: step(c.DirGNNConv(c.GCNConv(IN, OUT)), x(), edges()),
    "MixHopConv": lambda: step(c.MixHopConv(IN, OUT, powers=[0, 1, 2]), x(), edges(), positive(EDGES)),
    "MeshCNNConv": lambda: step(c.MeshCNNConv(IN, OUT), x(), mesh()),
    "SAGEConv: several aggregations": lambda: step(
        c.SAGEConv(IN, OUT, aggr=["mean", "max", aggr.SoftmaxAggregation(learn=True)]), x(), edges()
    ),
}  # fmt: skip
"""Each convolution; after a colon, a variant of it."""
