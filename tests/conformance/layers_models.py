"""The models of PyTorch Geometric and of Lightning's demos as cases."""

from __future__ import annotations

from typing import Any

import torch
from checking import Case
from layers_conv import KINDS, PNA, RELATIONS
from layers_data import (
    EDGE,
    EDGES,
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
)  # fmt: skip
from lightning.pytorch.demos import boring_classes, lstm, transformer
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import conv, norm
from torch_geometric.nn import models as m

LEFT_OUT = {
    "to_captum_input": "no module: reshapes inputs",
    "captum_output_to_dicts": "no module: reshapes results",
    "LabelPropagation": "runs without gradient, and has no parameters",
    "CorrectAndSmooth": "runs without gradient, and has no parameters",
}
"""Public names that are no case, and why."""


def on_graph(model: nn.Module) -> Case:
    return step(model, x(), edges())


def molecule(model: nn.Module) -> Case:
    """A model on thirty atoms, at least 0.5 apart as atoms are: a distance of next to nothing has no gradient."""
    return step(model, types(9, NODES) + 1, grid().requires_grad_(), batch())


def started(model: nn.Module) -> nn.Module:
    """With biases and an output layer that do not start at zero, where nothing would reach the layers before it."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.3)
    return model


class Global(nn.Module):
    """The three parts of a ``MetaLayer``."""

    def __init__(self) -> None:
        super().__init__()
        self.edge, self.node, self.all = mlp(2 * IN + EDGE + 4, EDGE), mlp(IN + EDGE + 4, IN), mlp(IN + 4, 4)
        self.meta = m.MetaLayer(self.of_edges, self.of_nodes, self.of_graphs)

    def of_edges(self, source: Tensor, target: Tensor, attr: Tensor, u: Tensor, graph: Tensor) -> Tensor:
        out: Tensor = self.edge(torch.cat([source, target, attr, u[graph]], 1))
        return out

    def of_nodes(self, x: Tensor, edge_index: Tensor, attr: Tensor, u: Tensor, graph: Tensor) -> Tensor:
        received = attr.new_zeros(len(x), EDGE).index_add(0, edge_index[1], attr)
        out: Tensor = self.node(torch.cat([x, received, u[graph]], 1))
        return out

    def of_graphs(self, x: Tensor, edge_index: Tensor, attr: Tensor, u: Tensor, graph: Tensor) -> Tensor:
        out: Tensor = self.all(torch.cat([torch.zeros(GRAPHS, IN).index_add(0, graph, x), u], 1))
        return out

    def forward(self, *graph: Tensor) -> Any:
        return self.meta(*graph)


class Encoder(nn.Module):
    """Mean and log of the standard deviation of each node."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.spread = conv.GCNConv(IN, OUT), conv.GCNConv(IN, OUT)

    def forward(self, x: Tensor, edge_index: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(x, edge_index), self.spread(x, edge_index)


def reconstruct(model: m.GAE, x: Tensor, edge_index: Tensor, negatives: Tensor) -> Any:
    z = model.encode(x, edge_index)
    losses = [model.recon_loss(z, edge_index, negatives)]
    if isinstance(model, m.VGAE):
        losses.append(model.kl_loss())
    if isinstance(model, m.ARGA):
        losses += [model.reg_loss(z), model.discriminator_loss(z)]
    return losses


def walks(model: nn.Module, sample: str) -> Case:
    """The loss of a skip-gram model on walks from ten nodes."""
    positive, negative = getattr(model, sample)(torch.arange(10))
    return step(model, positive, negative, run=lambda model, *walks: model.loss(*walks))


def infomax() -> Case:
    encoder, order = conv.GCNConv(IN, OUT), torch.randperm(NODES)
    model = m.DeepGraphInfomax(OUT, encoder, lambda z, *_: z.mean(0).sigmoid(), lambda x, e: (x[order], e))
    return step(model, x(), edges(), run=lambda model, *graph: (out := model(*graph), model.loss(*out)))


def memory() -> Case:
    messages = m.tgn.IdentityMessage(EDGE, IN, 8)
    model = m.TGNMemory(NODES, EDGE, IN, 8, messages, m.tgn.LastAggregator())
    model.memory.normal_()
    source, target = edges()
    seen = (source, target, torch.arange(EDGES), torch.randn(EDGES, EDGE))

    def run(model: m.TGNMemory, nodes: Tensor) -> Any:
        model.detach()  # from the step before
        model._reset_message_store()
        model.update_state(*seen)
        return model(nodes)[0]

    return step(model, torch.arange(NODES), run=run)


def events(model: nn.Module) -> Case:
    """Ten events, each with the history of both ends: four events in each of three steps."""
    history = torch.arange(10).repeat_interleave(12), torch.arange(3).repeat_interleave(4).repeat(10)
    data = Data(sub=types(NODES, 10), rel=types(4, 10), obj=types(NODES, 10))
    for end in ("h_sub", "h_obj"):
        data[end], data[f"{end}_t"], data[f"{end}_batch"] = types(NODES, 120), history[1], history[0]
    return step(model, run=lambda model: model(data))


def pretraining() -> Case:
    model = m.GPSE(IN, 8, OUT, layers_mp=3, num_node_targets=4, num_graph_targets=3, virtual_node=False)
    targets = torch.randn(NODES, 4), torch.randn(GRAPHS, 3)

    def run(model: nn.Module, x: Tensor, edge_index: Tensor) -> Any:
        data = Data(x=x, edge_index=edge_index, batch=batch(), y=targets[0], y_graph=targets[1])
        return model(data)[0]

    return step(model, x(), edges(), run=run)


def candidates() -> Case:
    """LPFormer scores pairs of nodes by who stands between them."""
    ranks = (torch.rand(NODES, NODES) * (torch.rand(NODES, NODES) < 0.5)).to_sparse()
    return step(m.LPFormer(IN, OUT, transformer_dropout=0.0), types(NODES, 40).view(2, 20), x(), edges(), ranks)


def equivariant(**options: Any) -> m.ViSNet:
    return m.ViSNet(num_heads=4, num_layers=2, hidden_channels=OUT, num_rbf=8, cutoff=2.0, **options)


def residual() -> m.DeepGCNLayer:
    return m.DeepGCNLayer(conv.GENConv(IN, IN), norm.LayerNorm(IN), nn.ReLU(), block="res+", dropout=0.1)


MODELS: dict[str, Builder] = {
    "MLP": lambda: step(m.MLP([IN, OUT, OUT, 4], dropout=0.2), x()),
    "MLP: plain last, no norm": lambda: step(m.MLP([IN, OUT, 4], norm=None, act="elu"), x()),
    "GCN": lambda: on_graph(m.GCN(IN, OUT, 3, 4, dropout=0.2, norm="BatchNorm")),
    "GCN: jumping knowledge": lambda: on_graph(m.GCN(IN, OUT, 3, 4, jk="lstm")),
    "GraphSAGE": lambda: on_graph(m.GraphSAGE(IN, OUT, 3, 4, dropout=0.2, norm="LayerNorm", jk="cat")),
    "GIN": lambda: on_graph(m.GIN(IN, OUT, 3, 4)),
    "GAT": lambda: on_graph(m.GAT(IN, OUT, 3, 4, heads=4, dropout=0.2, act="elu")),
    "GAT: second version": lambda: on_graph(m.GAT(IN, OUT, 3, 4, heads=4, v2=True, jk="max")),
    "PNA": lambda: on_graph(m.PNA(IN, OUT, 2, 4, **PNA)),
    "EdgeCNN": lambda: on_graph(m.EdgeCNN(IN, OUT, 2, 4)),
    "JumpingKnowledge": lambda: step(m.JumpingKnowledge("lstm", IN, 3), [x(), x(), x()]),
    "JumpingKnowledge: max": lambda: step(m.JumpingKnowledge("max"), [x(), x(), x()]),
    "HeteroJumpingKnowledge": lambda: step(
        m.HeteroJumpingKnowledge(list(KINDS), "lstm", IN, 2), {kind: [x(), x()] for kind in KINDS}
    ),
    "MetaLayer": lambda: step(Global(), x(), edges(), x(EDGE, EDGES), x(4, GRAPHS), batch()),
    "Node2Vec": searching(lambda: walks(m.Node2Vec(edges(), OUT, 10, 5), "sample")),
    "MetaPath2Vec": lambda: walks(
        m.MetaPath2Vec({relation: edges() for relation in RELATIONS}, OUT, RELATIONS[:2], 6, 4), "_sample"
    ),
    "DeepGraphInfomax": infomax,
    "InnerProductDecoder": lambda: step(m.InnerProductDecoder(), x(), edges()),
    "GAE": lambda: step(m.GAE(conv.GCNConv(IN, OUT)), x(), edges(), edges(), run=reconstruct),
    "VGAE": lambda: step(m.VGAE(Encoder()), x(), edges(), edges(), run=reconstruct),
    "ARGA": lambda: step(m.ARGA(conv.GCNConv(IN, OUT), mlp(OUT, 1)), x(), edges(), edges(), run=reconstruct),
    "ARGVA": lambda: step(m.ARGVA(Encoder(), mlp(OUT, 1)), x(), edges(), edges(), run=reconstruct),
    "SignedGCN": lambda: step(m.SignedGCN(IN, OUT, 2), x(), edges(), edges()),
    "RENet": lambda: events(m.RENet(NODES, 4, OUT, seq_len=3, dropout=0.2)),
    "GraphUNet": lambda: on_graph(m.GraphUNet(IN, OUT, 4, depth=2)),
    "SchNet": searching(lambda: molecule(m.SchNet(OUT, OUT, 2, 16, cutoff=2.0))),
    "DimeNet": searching(lambda: molecule(started(m.DimeNet(OUT, 4, 1, 4, 3, 4, cutoff=1.5)))),
    "DimeNetPlusPlus": searching(lambda: molecule(started(m.DimeNetPlusPlus(OUT, 4, 1, 16, 8, OUT, 3, 4, cutoff=1.5)))),
    "GPSE": pretraining,
    "GPSENodeEncoder": lambda: step(m.GPSENodeEncoder(OUT, 8, 16, IN, expand_x=True), x(), x(8)),
    "to_captum_model": lambda: step(
        m.to_captum_model(m.GCN(IN, OUT, 2, 4), "node_and_edge"), x()[None].detach().requires_grad_(),
        positive(1, EDGES), edges(),
    ),
    "DeepGCNLayer": lambda: on_graph(residual()),
    "TGNMemory": memory,
    "AttentiveFP": lambda: step(
        m.AttentiveFP(IN, OUT, 4, EDGE, num_layers=2, num_timesteps=2, dropout=0.1), x(), edges(), x(EDGE, EDGES),
        batch(),
    ),
    "RECT_L": lambda: step(m.RECT_L(IN, OUT, dropout=0.1), x(), edges(), positive(EDGES)),
    "LINKX": lambda: step(m.LINKX(NODES, IN, OUT, 4, 2, num_edge_layers=2), x(), edges(), positive(EDGES)),
    "LightGCN": lambda: step(m.LightGCN(NODES, OUT, 3), edges(), types(NODES, 40).view(2, 20)),
    "MaskLabel": lambda: step(m.MaskLabel(4, IN), x(), types(4, NODES), torch.rand(NODES) < 0.5),
    "GroupAddRev": lambda: on_graph(m.GroupAddRev(conv.SAGEConv(IN // 2, IN // 2), num_groups=2)),
    "GNNFF": searching(lambda: molecule(m.GNNFF(IN, OUT, 2, cutoff=1.5))),
    "PMLP": lambda: on_graph(m.PMLP(IN, OUT, 4, 3, dropout=0.1)),
    "NeuralFingerprint": lambda: step(m.NeuralFingerprint(IN, OUT, 4, 2), x(), edges(), batch()),
    "ViSNet": searching(lambda: molecule(equivariant())),
    "ViSNet: forces": searching(lambda: molecule(equivariant(derivative=True))),
    "LPFormer": candidates,
    "SGFormer": lambda: step(m.SGFormer(IN, OUT, 4, trans_num_heads=2), x(), edges(), batch()),
    "Polynormer": lambda: step(
        m.Polynormer(IN, OUT, 4, local_layers=2, global_layers=1, heads=2), x(), edges(), batch()
    ),
    "ARLinkPredictor": lambda: on_graph(m.ARLinkPredictor(IN, OUT, dropout=0.1)),
}  # fmt: skip
"""Each model; after a colon, a variant of it."""


def language(model: nn.Module) -> Case:
    """Two sequences of twelve words, and what follows each."""
    return step(model, types(50, 24).view(2, 12), types(50, 24).view(2, 12))


def small_lstm() -> Case:
    """The demo with a model of the size of the other cases."""
    module: Any = lstm.LightningLSTM(50)
    module.model = lstm.SimpleLSTM(50, OUT, OUT, 2)
    module.log = lambda *args, **kwargs: None  # there is no trainer

    def run(module: Any, *words: Tensor) -> Any:
        module.hidden = None
        return module.training_step(words, 0)

    return step(module, types(50, 24).view(2, 12), types(50, 24).view(2, 12), run=run)


def training(module: nn.Module, batch: Tensor) -> Case:
    return step(module, batch, run=lambda module, batch: module.training_step(batch, 0))


def small_transformer() -> nn.Module:
    return transformer.Transformer(50, OUT, 2, OUT, 2)


def lightning_transformer() -> Case:
    module: Any = transformer.LightningTransformer(50)
    module.model = small_transformer()
    words = types(50, 24).view(2, 12), types(50, 24).view(2, 12)
    return step(module, *words, run=lambda module, *words: module.training_step(words, 0))


DEMOS: dict[str, Builder] = {
    "BoringModel": lambda: training(boring_classes.BoringModel(), x(32)),
    "ManualOptimBoringModel": lambda: step(
        boring_classes.ManualOptimBoringModel(), x(32), run=lambda module, batch: module.step(batch)
    ),
    "DemoModel": lambda: training(boring_classes.DemoModel(), x(32)),
    "Net": lambda: step(boring_classes.Net(), torch.randn(2, 1, 28, 28, requires_grad=True)),
    "SimpleLSTM": lambda: step(
        lstm.SimpleLSTM(50, OUT, OUT, 2), types(50, 24).view(2, 12), (torch.zeros(2, 2, OUT), torch.zeros(2, 2, OUT))
    ),
    "LightningLSTM": small_lstm,
    "Transformer": lambda: language(small_transformer()),
    "LightningTransformer": lightning_transformer,
    "PositionalEncoding": lambda: step(transformer.PositionalEncoding(IN), torch.randn(2, 12, IN, requires_grad=True)),
}
"""Each module of ``lightning.pytorch.demos``."""
