"""The exact mode is exact, and so is every rule that claims to be, at any width."""

from collections.abc import Callable

import pytest
import torch
from comparing import assert_exact, codecs, compressed, made, weighted
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import GATConv, GCNConv, RGCNConv, SAGEConv, TransformerConv
from torch_geometric.utils import softmax as segment_softmax

INF, NAN = float("inf"), float("nan")
ROWS, WIDTH, EDGES = 40, 32, 300

generator = torch.Generator().manual_seed(0)
INDEX = torch.randint(ROWS, (EDGES,), generator=generator)
TARGET = torch.randint(ROWS, (EDGES,), generator=generator)
WIDE_INDEX = TARGET[:, None].expand(-1, WIDTH)
MASK = torch.rand(ROWS, WIDTH, generator=generator) < 0.4
WEIGHTS = torch.randn(EDGES, WIDTH, generator=generator)
EDGE_INDEX = torch.stack([INDEX, TARGET])
EDGE_TYPE = torch.randint(3, (EDGES,), generator=generator)
LABELS = torch.randint(WIDTH, (ROWS,), generator=generator)


def leaf(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=source, dtype=torch.float64).to(dtype).requires_grad_()


# -- (1) bits=32, op by op ---------------------------------------------------------------------------------------

OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mul": lambda a, b: a * b,
    "mul itself": lambda a, b: a * a,
    "div": lambda a, b: a / (b.abs() + 0.5),
    "mm": lambda a, b: a @ b.t(),
    "bmm": lambda a, b: torch.bmm(a.view(4, 10, -1), b.view(4, -1, 10)),
    "baddbmm": lambda a, b: torch.baddbmm(a.view(4, 10, -1)[..., :10], a.view(4, 10, -1), b.view(4, -1, 10)),
    "einsum": lambda a, b: torch.einsum("nd,md->nm", a, b),
    "addmm": lambda a, b: torch.addmm(a[:, :1], a, b.t()),
    "addcmul": lambda a, b: torch.addcmul(a, a, b),
    "addcdiv": lambda a, b: torch.addcdiv(a, a, b.abs() + 1),
    "lerp": lambda a, b: torch.lerp(a, b, torch.sigmoid(a)),
    "pow 2": lambda a, b: a**2,
    "pow 3": lambda a, b: a**3,
    "pow 0.5": lambda a, b: (a.abs() + 0.1) ** 0.5,
    "pow tensor": lambda a, b: (a.abs() + 0.1) ** b,
    "scalar pow": lambda a, b: 2.0**a,
    "exp": lambda a, b: a.exp(),
    "expm1": lambda a, b: a.expm1(),
    "log": lambda a, b: (a.abs() + 0.1).log(),
    "log1p": lambda a, b: a.abs().log1p(),
    "sqrt": lambda a, b: (a.abs() + 0.1).sqrt(),
    "rsqrt": lambda a, b: (a.abs() + 0.1).rsqrt(),
    "reciprocal": lambda a, b: (a.abs() + 0.1).reciprocal(),
    "sin": lambda a, b: a.sin() * b.cos(),
    "tanh": lambda a, b: a.tanh(),
    "sigmoid": lambda a, b: a.sigmoid(),
    "erf": lambda a, b: a.erf(),
    "atan2": lambda a, b: torch.atan2(a, b),
    "relu": lambda a, b: F.relu(a),
    "relu in place": lambda a, b: F.relu(a * 1.5, inplace=True),
    "relu6": lambda a, b: F.relu6(a * 9),
    "leaky relu": lambda a, b: F.leaky_relu(a, 0.2),
    "leaky relu in place": lambda a, b: F.leaky_relu(a * 1.5, 0.2, inplace=True),
    "rrelu": lambda a, b: F.rrelu(a, training=True),
    "prelu": lambda a, b: F.prelu(a, b[0, :1]),
    "elu": lambda a, b: F.elu(a),
    "elu in place": lambda a, b: F.elu(a * 1.5, inplace=True),
    "celu": lambda a, b: F.celu(a),
    "selu": lambda a, b: F.selu(a),
    "gelu": lambda a, b: F.gelu(a),
    "silu": lambda a, b: F.silu(a),
    "mish": lambda a, b: F.mish(a),
    "softplus": lambda a, b: F.softplus(a),
    "log sigmoid": lambda a, b: F.logsigmoid(a),
    "hardswish": lambda a, b: F.hardswish(a * 4),
    "hardsigmoid": lambda a, b: F.hardsigmoid(a * 4),
    "hardtanh": lambda a, b: F.hardtanh(a),
    "hardshrink": lambda a, b: F.hardshrink(a),
    "softshrink": lambda a, b: F.softshrink(a),
    "threshold": lambda a, b: F.threshold(a, 0.1, 20.0),
    "glu": lambda a, b: F.glu(a),
    "clamp": lambda a, b: a.clamp(-0.5, 0.5),
    "clamp one side": lambda a, b: a.clamp(min=-0.5) + b.clamp(max=0.5),
    "clamp to infinity": lambda a, b: a.clamp(0.0, INF),
    "clamp from infinity": lambda a, b: a.clamp(-INF, 0.0),
    "clamp by tensors": lambda a, b: torch.clamp(a, b - 0.5, b + 0.5),
    "clamp min by a tensor": lambda a, b: torch.clamp(a, min=b),
    "clamp crossed": lambda a, b: a.clamp(0.5, -0.5),
    "clamp_min": lambda a, b: torch.clamp_min(a, 0.3),
    "clamp_max": lambda a, b: torch.clamp_max(a, 0.3),
    "maximum": lambda a, b: torch.maximum(a, b),
    "minimum": lambda a, b: torch.minimum(a, b),
    "fmax": lambda a, b: torch.fmax(a, b),
    "abs": lambda a, b: a.abs(),
    "nan_to_num": lambda a, b: torch.nan_to_num(a / (b > 0)),
    "where": lambda a, b: torch.where(a > 0, a, b * 2),
    "masked_fill": lambda a, b: (a * b).masked_fill(MASK, 0.5),
    "masked_fill made": lambda a, b: (a * b).masked_fill(a > b, 0.5),
    "masked_scatter": lambda a, b: a.masked_scatter(MASK, b * 2),
    "masked_select": lambda a, b: a.masked_select(b > 0),
    "dropout": lambda a, b: F.dropout(a, 0.3),
    "dropout in place": lambda a, b: F.dropout(a * b, 0.3, inplace=True),
    "alpha dropout": lambda a, b: F.alpha_dropout(a, 0.3, True),
    "feature dropout": lambda a, b: F.dropout1d(a.view(4, 10, -1), 0.3),
    "softmax": lambda a, b: a.softmax(-1),
    "log softmax": lambda a, b: a.log_softmax(-1),
    "segment softmax": lambda a, b: segment_softmax(a[INDEX], TARGET, num_nodes=ROWS),
    "logsumexp": lambda a, b: a.logsumexp(-1),
    "logcumsumexp": lambda a, b: a.logcumsumexp(-1),
    "normalize": lambda a, b: F.normalize(a),
    "normalize 1": lambda a, b: F.normalize(a, p=1),
    "norm inf": lambda a, b: torch.linalg.vector_norm(a, INF, dim=-1),
    "norm 3": lambda a, b: torch.linalg.vector_norm(a, 3, dim=-1),
    "norm 0.5": lambda a, b: torch.linalg.vector_norm(a, 0.5, dim=-1),
    "frobenius": lambda a, b: torch.norm(a),
    "cosine": lambda a, b: F.cosine_similarity(a, b),
    "cdist": lambda a, b: torch.cdist(a, b),
    "layer norm": lambda a, b: F.layer_norm(a, (WIDTH,)),
    "batch norm": lambda a, b: F.batch_norm(a, None, None, training=True),
    "group norm": lambda a, b: F.group_norm(a, 4),
    "rms norm": lambda a, b: F.rms_norm(a, (WIDTH,)),
    "var": lambda a, b: a.var(-1),
    "std": lambda a, b: a.std(-1),
    "mean": lambda a, b: (a * b).mean(0),
    "sum": lambda a, b: (a * b).sum(0),
    "prod": lambda a, b: a.prod(-1),
    "cumprod": lambda a, b: a.cumprod(-1),
    "cumsum": lambda a, b: (a * b).cumsum(-1),
    "max": lambda a, b: a.max(-1).values,
    "amax": lambda a, b: a.amax(-1),
    "amin": lambda a, b: a.amin(-1),
    "median": lambda a, b: a.median(-1).values,
    "sort": lambda a, b: a.sort(-1).values,
    "topk": lambda a, b: a.topk(5).values,
    "cat": lambda a, b: torch.cat([a * b, a], 1),
    "stack": lambda a, b: torch.stack([a * b, a]).prod(0),
    "transpose": lambda a, b: a.t().contiguous().view(ROWS, WIDTH) * b,
    "slices": lambda a, b: a[:, ::2] * b[:, 1::2],
    "flip": lambda a, b: a.flip(0) * b,
    "roll": lambda a, b: a.roll(1, 0) * b,
    "broadcast": lambda a, b: a[:, :1] * b,
    "expand": lambda a, b: a[:1].expand(ROWS, -1) * b,
    "getitem": lambda a, b: a[INDEX] * WEIGHTS,
    "getitem twice": lambda a, b: a[INDEX] * b[TARGET],
    "getitem of two": lambda a, b: a[INDEX, LABELS[INDEX]] * b[TARGET, 0],
    "getitem of columns": lambda a, b: a[:, LABELS] * b[:, LABELS].exp(),
    "getitem of a mask": lambda a, b: a[MASK] * b[MASK],
    "index_select": lambda a, b: a.index_select(0, INDEX) * b.index_select(0, TARGET),
    "index_select of columns": lambda a, b: torch.index_select(a, 1, LABELS) * torch.index_select(b, 1, LABELS),
    "embedding": lambda a, b: F.embedding(INDEX, a) * F.embedding(TARGET, b),
    "embedding with padding": lambda a, b: F.embedding(INDEX, a, padding_idx=3) * F.embedding(TARGET, b),
    "embedding bag": lambda a, b: F.embedding_bag(INDEX.view(-1, 3), a) * WEIGHTS[:100],
    "gather": lambda a, b: a.gather(0, WIDE_INDEX) * b.gather(0, WIDE_INDEX),
    "take": lambda a, b: torch.take(a, WIDE_INDEX) * WEIGHTS,
    "take_along_dim": lambda a, b: torch.take_along_dim(a, LABELS[:, None], 1) * b[:, :1],
    "scatter": lambda a, b: a.scatter(0, WIDE_INDEX[:ROWS], b),
    "scatter_add": lambda a, b: torch.zeros_like(a).scatter_add(0, WIDE_INDEX, a[INDEX] * b[INDEX]),
    "index_add": lambda a, b: torch.zeros_like(a).index_add(0, TARGET, a[INDEX] * b[TARGET]),
    "index_copy": lambda a, b: a.index_copy(0, LABELS, (a * b)),
    "index_put": lambda a, b: a.index_put((LABELS,), a * b),
    "index_fill": lambda a, b: (a * b).index_fill(0, LABELS, 1.0),
    "setitem": lambda a, b: _set(a * 1.5, b),
    "chain of recipes": lambda a, b: torch.tanh(a[INDEX] + b[TARGET]) * a[TARGET],
    "recipe of a slice": lambda a, b: _sliced(a, b),
    "cross entropy": lambda a, b: F.cross_entropy(a, LABELS),
    "nll": lambda a, b: F.nll_loss(a.log_softmax(-1), LABELS, reduction="none"),
    "bce": lambda a, b: F.binary_cross_entropy_with_logits(a, b.sigmoid()),
    "mse": lambda a, b: F.mse_loss(a, b),
    "smooth l1": lambda a, b: F.smooth_l1_loss(a, b),
    "huber": lambda a, b: F.huber_loss(a, b),
    "l1": lambda a, b: F.l1_loss(a, b),
    "kl": lambda a, b: F.kl_div(a.log_softmax(-1), b.softmax(-1), reduction="batchmean"),
    "margin": lambda a, b: F.margin_ranking_loss(a, b, torch.ones_like(a)),
    "triplet": lambda a, b: F.triplet_margin_loss(a, b, a * b),
    "conv1d": lambda a, b: F.conv1d(a.view(4, 10, -1), b.reshape(-1)[:300].view(10, 10, 3)),
    "conv2d": lambda a, b: F.conv2d(a.view(1, 10, 16, 8), b.reshape(-1)[:900].view(10, 10, 3, 3)),
    "attention": lambda a, b: F.scaled_dot_product_attention(*(x.view(2, 2, 10, -1) for x in (a, b, a))),
    "sparse mm": lambda a, b: torch.sparse.mm(_adjacency(), a * b),
    "fft": lambda a, b: torch.fft.irfft(torch.fft.rfft(a) * torch.fft.rfft(b)),
    "complex": lambda a, b: torch.view_as_real(_complex(a) * _complex(b)),
    "complex slices": lambda a, b: torch.view_as_real(_rows(a)[:, 1:3] * _rows(b)[:, 2:4]),
    "complex slices of gathered rows": lambda a, b: _rows(a[INDEX])[:, 1:3].abs() * _rows(b[TARGET])[:, :1].abs(),
    "svd": lambda a, b: torch.linalg.svdvals(a),
    "inverse": lambda a, b: torch.linalg.inv(a[:WIDTH] @ b[:WIDTH].t() + 50 * torch.eye(WIDTH)),
    "unfold": lambda a, b: a.unfold(1, 4, 2).prod(-1),
    "diagonal": lambda a, b: (a[:WIDTH].diagonal() * b[:WIDTH].diagonal()),
    "float64": lambda a, b: (a.double() * b.double()).exp().float(),
    "bfloat16": lambda a, b: (a.bfloat16() * b.bfloat16()).exp().float(),
    "float16": lambda a, b: (a.half() * b.half()).exp().float(),
}  # fmt: skip


def _complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.view(-1, 2))


def _rows(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.reshape(len(x), -1, 2))


def _adjacency() -> Tensor:
    return torch.sparse_coo_tensor(EDGE_INDEX, WEIGHTS[:, 0], (ROWS, ROWS)).coalesce()


def _set(a: Tensor, b: Tensor) -> Tensor:
    a[INDEX[:5]] = b[:5]
    a[:, 3] = 0.0
    a[MASK] = 1.0
    return a * b


def _sliced(a: Tensor, b: Tensor) -> Tensor:
    """A pointwise op of a slice may take another code path than of a whole tensor, and round differently."""
    wide = torch.cat([a, b], 1)
    some = wide[:, ::2]
    kept = some * (some * 0.5).exp()
    return torch.sigmoid(some) * torch.tanh(torch.sigmoid(some)) * kept


@pytest.mark.parametrize("how", ["leaves", "activations"])
@pytest.mark.parametrize("name", OPS)
def test_exact_mode(name: str, how: str) -> None:
    a, b = leaf(ROWS, WIDTH), leaf(ROWS, WIDTH, seed=1)

    def loss() -> Tensor:
        x, y = (a, b) if how == "leaves" else (made(a), made(b))
        return weighted(OPS[name](x, y))

    assert_exact(loss, [a, b])


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("reduce", ["sum", "mean", "amax", "amin", "prod"])
def test_scatter_reduce(reduce: str, include_self: bool) -> None:
    a, b = leaf(ROWS, WIDTH), leaf(EDGES, WIDTH, seed=1)

    def loss() -> Tensor:
        return weighted(made(a).scatter_reduce(0, WIDE_INDEX, made(b), reduce, include_self=include_self))

    for bits in (32, 8, 2) if reduce in ("sum", "mean", "amax", "amin", "prod") else (32,):
        assert_exact(loss, [a, b], bits)


# -- (1) bits=32, model by model ---------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.b(F.gelu(self.a(self.norm(x))))
        return F.normalize(x)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell = kind(WIDTH, 16, num_layers=2, batch_first=True, dropout=0.2, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x.view(4, 10, WIDTH))[0]


class Attention(nn.Module):
    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, dropout=0.1, batch_first=True)
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(4, 10, WIDTH)
        return self.attention(x, x, x, need_weights=self.weights)[0]


class Graph(nn.Module):
    def __init__(self, conv: nn.Module, *extra: Tensor) -> None:
        super().__init__()
        self.conv, self.extra = conv, extra

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, EDGE_INDEX, *self.extra)


class Table(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, WIDTH, **options)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        users, items = self.table(INDEX), self.table(TARGET)
        return (self.linear(users) * items).sum(-1) + (x[INDEX] * users).sum(-1)


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, groups=2), nn.GroupNorm(2, 8), nn.SiLU(inplace=True), nn.AdaptiveAvgPool2d(2),
            nn.Dropout2d(0.2), nn.Flatten(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.view(5, 1, 16, 16))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(
        nn.Linear(WIDTH, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 64), nn.LeakyReLU(0.1), nn.LayerNorm(64),
        nn.Linear(64, 8), nn.Softmax(-1),
    ),
    "in place": lambda: nn.Sequential(
        nn.Linear(WIDTH, 64), nn.Dropout(0.3, inplace=True), nn.ReLU(inplace=True), nn.Linear(64, 64),
        nn.LeakyReLU(0.1, inplace=True), nn.Linear(64, 64), nn.ELU(inplace=True), nn.Linear(64, 9),
    ),
    "batch norm": lambda: nn.Sequential(nn.Linear(WIDTH, 64), nn.BatchNorm1d(64), nn.Tanh(), nn.Linear(64, 8)),
    "residual": lambda: nn.Sequential(*(Residual() for _ in range(3))),
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "rnn": lambda: Recurrent(nn.RNN),
    "multihead": lambda: Attention(False),
    "multihead with weights": lambda: Attention(True),
    "transformer": lambda: nn.TransformerEncoderLayer(WIDTH, 4, 64),
    "bilinear": lambda: nn.ModuleList([nn.Bilinear(WIDTH, WIDTH, 5)]),
    "gat": lambda: Graph(GATConv(WIDTH, 8, heads=4, dropout=0.1)),
    "gat v2-like": lambda: Graph(TransformerConv(WIDTH, 8, heads=2, dropout=0.1)),
    "gcn": lambda: Graph(GCNConv(WIDTH, WIDTH)),
    "sage": lambda: Graph(SAGEConv(WIDTH, WIDTH)),
    "sage max": lambda: Graph(SAGEConv(WIDTH, WIDTH, aggr="max")),
    "rgcn": lambda: Graph(RGCNConv(WIDTH, WIDTH, 3, num_bases=2), EDGE_TYPE),
    "embedding": Table,
    "embedding with a norm": lambda: Table(max_norm=1.0),
    "embedding scaled by frequency": lambda: Table(scale_grad_by_freq=True),
    "image": Image,
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_exact_mode_of_models(name: str, training: bool) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().train(training)
    x = leaf(ROWS, WIDTH)
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def loss() -> Tensor:
        model.load_state_dict(state)  # running statistics and renormalised tables start anew
        if name == "bilinear":
            return weighted(model[0](x, x.flip(0)))
        return weighted(model(x * 1.5))

    ledger = assert_exact(loss, [x, *model.parameters()])
    assert not [entry for entry in ledger if entry.op == "unknown"]


# -- (2) the rules that claim to be exact, at their thresholds ---------------------------------------------------

SPECIAL = [-INF, -7.0, -6.0, -3.0, -1.0, -0.5, -0.1, -1e-6, -0.0, 0.0, 1e-6, 0.1, 0.5, 1.0, 3.0, 6.0, 7.0, INF, NAN]


UNDECIDED = ("hardtanh", "hardshrink", "softshrink", "relu6")
"""Here PyTorch gives the gradient of a NaN both answers, 0 in a vector register and 1 in the rest."""


def special(dtype: torch.dtype) -> Tensor:
    """Every special value, with its neighbours in the dtype, in 20 rows of 32."""
    points = torch.tensor(SPECIAL, dtype=dtype)
    if dtype in (torch.float32, torch.float64):
        up, down = torch.full_like(points, INF), torch.full_like(points, -INF)
        points = torch.cat([points, points.nextafter(up), points.nextafter(down)])
    filler = torch.randn(640 - points.numel(), generator=torch.Generator().manual_seed(0)).to(dtype) * 2
    return torch.cat([points, filler]).view(20, 32)


SIDES: dict[str, tuple[Callable[[Tensor], Tensor], str, str]] = {
    "relu": (F.relu, "Relu.result", "mask"),
    "leaky_relu": (lambda x: F.leaky_relu(x, 0.2), "LeakyRelu.self", "mask"),
    "leaky_relu in place": (lambda x: F.leaky_relu(made(x), 0.2, inplace=True), "LeakyRelu.result", "mask"),
    "threshold": (lambda x: F.threshold(x, 0.1, 20.0), "Threshold.self", "mask"),
    "threshold at infinity": (lambda x: F.threshold(x, INF, 20.0), "Threshold.self", "mask"),
    "threshold at minus infinity": (lambda x: F.threshold(x, -INF, 20.0), "Threshold.self", "mask"),
    "threshold at NaN": (lambda x: F.threshold(x, NAN, 20.0), "Threshold.self", ""),
    "clamp": (lambda x: x.clamp(-0.5, 0.1), "Clamp.self", "mask"),
    "clamp to a point": (lambda x: x.clamp(0.5, 0.5), "Clamp.self", "mask"),
    "clamp min": (lambda x: x.clamp(min=0.1), "Clamp.self", "mask"),
    "clamp max": (lambda x: x.clamp(max=0.1), "Clamp.self", "mask"),
    "clamp to infinity": (lambda x: x.clamp(0.1, INF), "Clamp.self", "mask"),
    "clamp from infinity": (lambda x: x.clamp(-INF, 0.1), "Clamp.self", "mask"),
    "clamp to all": (lambda x: x.clamp(-INF, INF), "Clamp.self", "mask"),
    "clamp min infinity": (lambda x: x.clamp(min=-INF), "Clamp.self", "mask"),
    "clamp max infinity": (lambda x: x.clamp(max=INF), "Clamp.self", "mask"),
    "clamp min at infinity": (lambda x: x.clamp(min=INF), "Clamp.self", "mask"),
    "clamp min at NaN": (lambda x: x.clamp(min=NAN), "Clamp.self", ""),
    "clamp the wrong way": (lambda x: x.clamp(0.1, -0.5), "Clamp.self", ""),
    "clamp_min": (lambda x: torch.clamp_min(x, 0.1), "ClampMin.self", "mask"),
    "clamp_max": (lambda x: torch.clamp_max(x, 0.1), "ClampMax.self", "mask"),
    "hardtanh": (lambda x: F.hardtanh(x), "Hardtanh.self", "mask"),
    "hardtanh in place": (lambda x: F.hardtanh(made(x), inplace=True), "Hardtanh.self", "mask"),
    "hardtanh to infinity": (lambda x: F.hardtanh(x, 0.0, INF), "Hardtanh.self", ""),
    "narrow hardtanh": (lambda x: F.hardtanh(x, 0.1, 0.1001), "Hardtanh.self", ""),
    "relu6": (F.relu6, "Hardtanh.self", "mask"),
    "hardsigmoid": (F.hardsigmoid, "Hardsigmoid.self", "mask"),
    "hardshrink": (lambda x: F.hardshrink(x, 0.1), "Hardshrink.self", "mask"),
    "hardshrink at zero": (lambda x: F.hardshrink(x, 0.0), "Hardshrink.self", "mask"),
    "hardshrink below zero": (lambda x: F.hardshrink(x, -0.1), "Hardshrink.self", ""),
    "softshrink": (lambda x: F.softshrink(x, 0.1), "Softshrink.self", "mask"),
    "nan_to_num": (lambda x: torch.nan_to_num(x), "NanToNum.self", "mask"),
    "abs": (torch.abs, "Abs.self", "sign"),
    "norm 1": (lambda x: torch.linalg.vector_norm(x, 1, dim=-1), "LinalgVectorNorm.self", "sign"),
    "old norm 1": (lambda x: torch.norm(x, 1, dim=-1), "", ""),
}


@pytest.mark.parametrize("bits", [1, 8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SIDES)
def test_sides_at_their_thresholds(name: str, dtype: torch.dtype, bits: int) -> None:
    function, op, codec = SIDES[name]
    x = special(dtype)
    if any(word in name for word in UNDECIDED):
        x = torch.where(x.isnan(), 0.2, x)
    x.requires_grad_()
    ledger = assert_exact(lambda: weighted(function(made(x))), [x], bits)
    if codec:  # or nothing has been tested
        assert codecs(ledger, op) == {codec}
    elif op:
        assert codecs(ledger, op)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 32])
@pytest.mark.parametrize("dropout", [F.dropout, F.dropout1d, F.alpha_dropout, F.feature_alpha_dropout])
@pytest.mark.parametrize("p", [0.1, 0.5, 1 / 3])
def test_dropout_masks(dropout: Callable[..., Tensor], p: float, bits: int) -> None:
    x = leaf(10, 20, 32)
    ledger = assert_exact(lambda: weighted(dropout(made(x), p, True)), [x], bits)
    assert codecs(ledger, "Mul.other") == {"mask", "held"}  # the noise; the weights of the loss
    assert ledger.stored_bytes <= 10 * 20 * 32 // 8 + 8


SHAPES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "index_add": (lambda a, b: a.index_add(0, TARGET, b), "IndexAdd.source"),
    "index_copy": (lambda a, b: a.index_copy(0, torch.arange(ROWS), b[:ROWS]), "IndexCopy.source"),
    "index_put": (lambda a, b: a.index_put((torch.arange(ROWS),), b[:ROWS]), "IndexPut.values"),
    "index_put accumulated": (lambda a, b: a.index_put((TARGET,), b, accumulate=True), "IndexPut.values"),
    "scatter sum": (lambda a, b: a.scatter_reduce(0, WIDE_INDEX, b, "sum"), "ScatterReduce.src"),
    "scatter mean": (lambda a, b: a.scatter_reduce(0, WIDE_INDEX, b, "mean"), "ScatterReduce.src"),
    "gather": (lambda a, b: a.gather(0, WIDE_INDEX), "Gather.self"),
    "take": (lambda a, b: torch.take(a, TARGET), "Take.self"),
    "take of columns": (lambda a, b: torch.take(a.t(), TARGET), "Take.self"),
    "masked_select": (lambda a, b: a.masked_select(MASK), "MaskedSelect.self"),
    "nll": (lambda a, b: F.nll_loss(a, LABELS, reduction="none"), "NllLoss.self"),
    "nll 2d": (lambda a, b: F.nll_loss(a.view(2, 4, 10, 16), LABELS.repeat(8).view(2, 10, 16) % 4), "NllLoss2D.self"),
    "avg pool": (lambda a, b: F.avg_pool2d(a.view(1, 8, 10, 16), 3), "AvgPool2D.self"),
    "max pool": (lambda a, b: F.max_pool2d(a.view(1, 8, 10, 16), 3), "MaxPool2DWithIndices.self"),
    "max pool channels last": (
        lambda a, b: F.max_pool2d(a.view(1, 8, 10, 16).contiguous(memory_format=torch.channels_last), 3),
        "MaxPool2DWithIndices.self",
    ),
    "avg pool channels last": (
        lambda a, b: F.avg_pool2d(a.view(1, 8, 10, 16).contiguous(memory_format=torch.channels_last), 3),
        "AvgPool2D.self",
    ),
    "avg pool 3d": (lambda a, b: F.avg_pool3d(a.view(1, 2, 4, 10, 16), 2), "AvgPool3D.self"),
    "max pool 3d": (lambda a, b: F.max_pool3d(a.view(1, 2, 4, 10, 16), 2), "MaxPool3DWithIndices.self"),
    "adaptive avg": (lambda a, b: F.adaptive_avg_pool2d(a.view(1, 8, 10, 16), 3), "AdaptiveAvgPool2D.self"),
    "adaptive max": (lambda a, b: F.adaptive_max_pool2d(a.view(1, 8, 10, 16), 3), "AdaptiveMaxPool2D.self"),
    "reflection": (lambda a, b: F.pad(a.view(1, 8, 10, 16), (1, 2, 3, 1), "reflect"), "ReflectionPad2D.self"),
    "replication": (lambda a, b: F.pad(a.view(1, 8, 10, 16), (1, 2, 3, 1), "replicate"), "ReplicationPad2D.self"),
    "reflection 1d": (lambda a, b: F.pad(a, (3, 2), "reflect"), "ReflectionPad1D.self"),
    "replication 1d": (lambda a, b: F.pad(a, (3, 2), "replicate"), "ReplicationPad1D.self"),
}


@pytest.mark.parametrize("bits", [1, 32])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, bits: int) -> None:
    function, op = SHAPES[name]
    a, b = leaf(ROWS, WIDTH), leaf(EDGES, WIDTH, seed=1)
    ledger = assert_exact(lambda: weighted(function(made(a), made(b))), [a, b], bits)
    kept = codecs(ledger, op)
    assert kept <= {"shape"}, kept  # a version of PyTorch that saves nothing is as good
    if op in ("Gather.self", "IndexAdd.source", "ScatterReduce.src", "MaxPool2DWithIndices.self"):
        assert kept == {"shape"}


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 32])
def test_comparisons_and_denominators_stay_exact(bits: int) -> None:
    """What is compared with its own extremum must not be rounded: nothing would be equal to it."""
    x = leaf(ROWS, WIDTH)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "amax": lambda h: h.amax(-1),
        "amin": lambda h: h.amin(0),
        "max": lambda h: h.max(),
        "norm inf": lambda h: torch.linalg.vector_norm(h, INF, dim=-1),
        "prod": lambda h: h.prod(-1),
        "cumprod": lambda h: h.cumprod(-1),
        "log": lambda h: h.abs().log(),
        "sqrt": lambda h: h.abs().sqrt(),
        "rsqrt": lambda h: h.abs().rsqrt(),
        "reciprocal": lambda h: h.reciprocal(),
        "denominator": lambda h: WEIGHTS[:ROWS] / h,
        "pow 0.5": lambda h: h.abs() ** 0.5,
        "acos": lambda h: (h / 10).acos(),
    }
    for name, function in functions.items():
        try:
            assert_exact(lambda function=function: weighted(function(made(x))), [x], bits)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def segments(data: Tensor, reduce: str, **where: Tensor) -> Tensor:
    return torch.segment_reduce(data, reduce, axis=0, **where)


COMPARED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str, str]] = {
    "amax": (lambda a, b: a.amax(-1), "Amax.self", "mask"),
    "amax of all": (lambda a, b: a.amax(), "Amax.self", "mask"),
    "amin, two dimensions": (lambda a, b: a.view(4, 10, WIDTH).amin((-1, 0)), "Amin.self", "mask"),
    "amax that keeps them": (lambda a, b: a.view(4, 10, WIDTH).amax((2, 1), keepdim=True), "Amax.self", "mask"),
    "amax of a transposed": (lambda a, b: a.t().amax(0), "Amax.self", "mask"),
    "amax of a slice": (lambda a, b: a[:, 3:19].amax(1), "Amax.self", "mask"),
    "amax of an expanded": (lambda a, b: a[:, None].expand(-1, 3, -1).amax(0), "Amax.self", "mask"),
    "max": (lambda a, b: a.max(), "Max.self", "mask"),
    "min": (lambda a, b: a.min(), "Min.self", "mask"),
    "scatter amax": (lambda a, b: a.scatter_reduce(0, WIDE_INDEX, b, "amax"), "ScatterReduce.src", "mask"),
    "scatter amin": (
        lambda a, b: a.scatter_reduce(0, WIDE_INDEX, b, "amin", include_self=False), "ScatterReduce.src", "mask",
    ),
    "scatter over columns": (
        lambda a, b: a.scatter_reduce(-1, COLUMNS, b[:ROWS], "amax"), "ScatterReduce.src", "mask",
    ),
    "scatter, each to its own": (
        lambda a, b: a.scatter_reduce(0, OWN_INDEX, b[:, :20], "amax"), "ScatterReduce.src", "mask",
    ),
    "scatter in place": (
        lambda a, b: torch.zeros_like(a).scatter_reduce_(0, WIDE_INDEX, b, "amax", include_self=False),
        "ScatterReduce.src", "mask",
    ),
    "segments": (
        lambda a, b: segments(b, "max", lengths=torch.tensor([100, 0, 150, 50])), "SegmentReduce.data", "mask",
    ),
    "segments by offsets": (
        lambda a, b: segments(b, "min", offsets=torch.tensor([0, 250, 300])), "SegmentReduce.data", "mask",
    ),
    "segments' sums": (
        lambda a, b: segments(b, "sum", lengths=torch.tensor([100, 0, 150, 50])), "SegmentReduce.data", "shape",
    ),
    "maximum": (lambda a, b: torch.maximum(a, b[:ROWS]), "Maximum.self", "sign"),
    "minimum": (lambda a, b: torch.min(a, b[:ROWS]), "Minimum.self", "sign"),
}  # fmt: skip
COLUMNS = torch.randint(WIDTH, (ROWS, WIDTH), generator=generator)
OWN_INDEX = torch.randint(ROWS, (EDGES, 20), generator=generator)


@pytest.mark.parametrize("bits", [1, 8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", COMPARED)
def test_what_is_compared_is_kept_by_how_it_compares(name: str, dtype: torch.dtype, bits: int) -> None:
    """Ties, which share a gradient, infinities and NaN among it."""
    function, op, codec = COMPARED[name]
    a, b = leaf(ROWS, WIDTH, dtype=dtype), leaf(EDGES, WIDTH, seed=1, dtype=dtype)
    with torch.no_grad():
        for x in (a, b):
            x.mul_(2).round_()
            x[3, ::4], x[7, ::5], x[11, ::7] = INF, -INF, NAN
        b[13] = a[13]
    ledger = assert_exact(lambda: weighted(function(made(a), made(b))), [a, b], bits)
    assert codecs(ledger, op) == {codec}, ledger.rows()
    node = op.partition(".")[0]
    assert {entry.need for entry in ledger if entry.op.startswith(node) and entry.codec in ("mask", "sign")} <= {
        "compared"
    }


NOT_COMPARED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "the user's": lambda a, b: a.amax(-1),
    "the user's among edges": lambda a, b: torch.zeros(ROWS, WIDTH).scatter_reduce(0, WIDE_INDEX, b, "amax"),
    "a broadcast": lambda a, b: torch.maximum(made(a), made(b)[:1]),
    "another dtype": lambda a, b: torch.maximum(made(a), made(b)[:ROWS].double()),
    "changed since": lambda a, b: torch.maximum(held := made(a), made(b)[:ROWS]) + 0 * held.add_(1).detach(),
    "segments of columns": lambda a, b: torch.segment_reduce(
        made(b), "max", axis=1, lengths=torch.tensor([[20, 12]]).expand(EDGES, 2).contiguous()
    ),
    "what is smaller exactly": lambda a, b: made(a)[:, :1].expand(-1, 512).amax(-1),
}  # fmt: skip


@pytest.mark.parametrize("bits", [2, 32])
@pytest.mark.parametrize("name", NOT_COMPARED)
def test_what_can_not_be_compared_is_exact(name: str, bits: int) -> None:
    a, b = leaf(ROWS, WIDTH), leaf(EDGES, WIDTH, seed=1)
    with torch.no_grad():
        a.abs_()
    function = NOT_COMPARED[name]
    if name == "changed since":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            assert_exact(lambda: weighted(function(a, b)), [a, b], bits)
        return
    ledger = assert_exact(lambda: weighted(function(a, b)), [a, b], bits)
    assert "compared" not in {entry.need for entry in ledger if entry.codec in ("mask", "sign", "shape")}


@pytest.mark.parametrize("bits", [2, 32])
def test_a_maximum_over_neighbours_takes_a_bit_for_each_message(bits: int) -> None:
    layer, x = SAGEConv(WIDTH, WIDTH, aggr="max", root_weight=False), leaf(ROWS, WIDTH)
    _, ledger = compressed(lambda: weighted(layer(made(x), EDGE_INDEX)), [x], bits)
    stored = {e.op: e.stored_bytes for e in ledger if e.op.startswith("ScatterReduce")}
    masks = EDGES * WIDTH // 8 + ROWS * WIDTH // 8
    assert masks <= sum(stored.values()) <= masks + 64, stored


SLICES: dict[str, Callable[[Tensor], Tensor]] = {
    "columns": lambda h: F.gelu(h[:, :16]),
    "other columns": lambda h: F.gelu(h[:, 16:]) * h[:, :16],
    "every other": lambda h: h[:, ::2].tanh().cosh() * h[:, 1::2],
    "chunks": lambda h: torch.cat([part.sinh() * part for part in h.chunk(4, dim=1)]),
    "expanded columns": lambda h: F.silu(h[:, None, :8].expand(-1, 3, -1)),
    "windows": lambda h: F.gelu(h.unfold(1, 8, 4)) * h.unfold(1, 8, 4),
    "transposed columns": lambda h: F.mish(h[:, :16].t()),
}


@pytest.mark.parametrize("name", SLICES)
def test_slices(name: str) -> None:
    """A slice comes back with its strides: contiguous, some kernels differ in the last bit."""
    x = torch.randn(30, 32, requires_grad=True)
    assert_exact(lambda: weighted(SLICES[name](made(x))), [x])


VIEWS: dict[str, Callable[[Tensor], object]] = {
    "log": lambda h: h[:, :8].log_(),
    "sqrt": lambda h: h[:, 4:].sqrt_(),
    "pow": lambda h: h[::2].pow_(-1.5),
    "division": lambda h: h[:, :8].div_(h[:, 8:16].clone() + 1),
    "mul": lambda h: h[3].mul_(h[4].clone()),
    "rows": lambda h: h.view(-1)[10:50].exp_(),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("bits", [32, 8, 2])
def test_ops_in_place_on_views(name: str, bits: int) -> None:
    """Their node is hidden in another, and what it saved is kept exactly: it might be a logarithm's."""
    x = (torch.rand(30, 32) + 1e-3).requires_grad_()

    def loss() -> Tensor:
        h = made(x)
        VIEWS[name](h)
        return weighted(h)

    ledger = assert_exact(loss, [x], bits)
    assert "unknown" not in {entry.op for entry in ledger}


def test_a_check_within_an_op_leaves_nothing() -> None:
    """``cov`` asks for the least of its weights, which saves them in a node that nothing leads to."""
    x, weights = torch.randn(4, 50, requires_grad=True), (torch.rand(50) + 0.1).requires_grad_()
    ledger = assert_exact(lambda: torch.cov(made(x), aweights=made(weights), correction=0).sum(), [x, weights])
    assert "unknown" not in {entry.op for entry in ledger}
