"""What an op casts or copies for itself is made again of its argument, and is to the last bit what it was."""

import operator
from collections.abc import Callable

import pytest
import torch
from comparing import assert_exact, codecs, compressed, made, weighted
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import CGConv, EdgeConv, GATv2Conv, RGCNConv, TransformerConv

from lightning_tinykg.activations.repeatable import COPIED as COPIED_OP
from lightning_tinykg.activations.repeatable import REPEATABLE
from lightning_tinykg.activations.within import made_within

NODES, EDGES, WIDTH = 200, 3000, 32

generator = torch.Generator().manual_seed(0)
SOURCE = torch.randint(NODES, (EDGES,), generator=generator)
TARGET = torch.randint(NODES, (EDGES,), generator=generator)
SQUARE = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5)
FEATURES = torch.randn(EDGES, WIDTH, generator=generator)
MATRICES = nn.Parameter(torch.randn(4, WIDTH, WIDTH, generator=generator) / WIDTH**0.5)
LINEAR = nn.Linear(WIDTH, WIDTH, bias=False)
KERNEL = nn.Parameter(torch.randn(8, 100, 3, generator=generator) / 300**0.5)
BIAS = nn.Parameter(torch.randn(WIDTH, generator=generator))


def table(seed: int = 0) -> Tensor:
    return torch.randn(NODES, WIDTH, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def rows(a: Tensor) -> Tensor:
    return a[SOURCE].tanh()


def cube(a: Tensor) -> Tensor:
    return rows(a).view(30, 100, WIDTH)


FOLDED: dict[str, Callable[[Tensor], Tensor]] = {
    "matmul": lambda a: cube(a).transpose(1, 2) @ BIAS.repeat(4)[:100, None],
    "matmul from the left": lambda a: SQUARE[:5] @ rows(a).view(100, 30, WIDTH).transpose(1, 2),
    "linear": lambda a: F.linear(cube(a).transpose(0, 1), SQUARE, BIAS),
    "linear without bias": lambda a: F.linear(cube(a).transpose(0, 1), SQUARE),
    "linear of features": lambda a: F.linear(FEATURES.view(30, 100, WIDTH).transpose(0, 1), SQUARE, BIAS) * a[0, 0],
}


@pytest.mark.parametrize("name", FOLDED)
def test_a_product_is_the_same_where_it_needs_no_gradient(name: str) -> None:
    """Of a batch in another order PyTorch makes one product in the forward, and many where there is no gradient."""
    a = table()
    assert_exact(lambda: weighted(FOLDED[name](a).exp()), [a, SQUARE, BIAS], recompute="aggressive")


def before(h: Tensor, other: Tensor) -> Tensor:
    copied = h * 2.0
    h.add_(other)
    return copied


def before_elu(h: Tensor) -> Tensor:
    copied = h * 2.0
    return torch.cat([copied.exp(), F.elu(h, 1.0, True).exp()])  # whose backward is the first


CAST: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "linear": (lambda a: F.linear(rows(a), SQUARE, BIAS), "Addmm.mat1"),
    "linear without bias": (lambda a: F.linear(rows(a), SQUARE), "Mm.self"),
    "its weight": (lambda a: F.linear(rows(a), SQUARE), "Mm.mat2"),
    "linear of cubes": (lambda a: F.linear(cube(a), SQUARE, BIAS), ""),
    "a view of rows": (lambda a: F.linear(rows(a).view(30, 100, WIDTH)[:, :50], SQUARE), ""),
    "matmul": (lambda a: rows(a) @ SQUARE, "Mm.self"),
    "mm": (lambda a: torch.mm(SQUARE, rows(a).t()), "Mm.mat2"),
    "of itself": (lambda a: (h := a.tanh()) @ h.t(), "Mm.self"),
    "bmm": (lambda a: torch.bmm(cube(a), cube(a).transpose(1, 2)), "Bmm.self"),
    "addmm": (lambda a: torch.addmm(BIAS, rows(a), SQUARE, beta=2), "Addmm.mat1"),
    "baddbmm": (lambda a: torch.baddbmm(BIAS, cube(a), SQUARE.expand(30, -1, -1)), "Baddbmm.batch1"),
    "two squares": (lambda a: torch.mm(rows(a)[:WIDTH], rows(a)[WIDTH : 2 * WIDTH]), "Mm.self"),
    "a matrix of each head": (lambda a: cube(a)[:, :, None] @ SQUARE.view(1, 1, WIDTH, WIDTH), ""),
    "log": (lambda a: torch.exp(rows(a) @ SQUARE).log1p(), ""),
    "softmax": (lambda a: (rows(a) @ SQUARE).softmax(-1), ""),
    "cross entropy": (lambda a: F.cross_entropy(rows(a) @ SQUARE, SOURCE % WIDTH), ""),
    "layer norm": (lambda a: F.layer_norm(rows(a) @ SQUARE, (WIDTH,)), ""),
    "convolution": (lambda a: F.conv1d(cube(a).transpose(1, 2), SQUARE[:, :, None]), ""),
    "attention": (lambda a: F.scaled_dot_product_attention(cube(a), cube(a), cube(a)), ""),
    "attention of others": (
        lambda a: F.scaled_dot_product_attention(cube(a)[:, :8], cube(a)[:, 8:24], cube(a)[:, 24:40]),
        "",
    ),
    "einsum": (lambda a: torch.einsum("nd,de->ne", rows(a), SQUARE), ""),
    "the user's features": (lambda a: LINEAR(FEATURES) * rows(a), "Mm.self"),
    "scores": (lambda a: a.tanh() @ (a.sigmoid() * 2).t(), "Mm.mat2"),
    "parts of one": (lambda a: torch.bmm(*rows(a)[:, None].unflatten(2, (2, 4, 4)).squeeze(1).unbind(1)), "Bmm.mat2"),
    "chunks": (lambda a: torch.bmm(*rows(a).view(-1, 4, 8).chunk(2, -1)), ""),
    "a graph convolution": (lambda a: RELATIONS(a, torch.stack([SOURCE, TARGET]), SOURCE % 3), ""),
}

COPIED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a transposed matrix": (lambda a: cube(a).transpose(1, 2) @ torch.ones(100, 1, requires_grad=True), "Mm.self"),
    "linear of a transposed": (lambda a: F.linear(cube(a).transpose(0, 1), SQUARE, BIAS), "Mm.self"),
    "a matrix from the left": (lambda a: SQUARE[:5, :30] @ rows(a).view(100, 30, WIDTH), ""),
    "from the left": (lambda a: BIAS[:30].view(1, 30) @ cube(a).transpose(0, 1), ""),
    "a vector from the left": (lambda a: BIAS[:30] @ cube(a).transpose(0, 1), ""),
    "a matrix for each": (lambda a: cube(a)[:, :, None, None] @ MATRICES, "Bmm.mat2"),
    "rows for each matrix": (lambda a: cube(a).transpose(0, 1)[:, None] @ MATRICES, "Bmm.self"),
    "einsum with a matrix of each head": (lambda a: torch.einsum("nd,kde->nke", rows(a), MATRICES), "Bmm.mat2"),
    "einsum of rows' own matrices": (
        lambda a: torch.einsum("nd,nkde->nke", rows(a)[:99], MATRICES[(SOURCE[:99] % 4)[:, None], :, :]), "Bmm.mat2"
    ),
    "einsum that adds up before it multiplies": (
        lambda a: torch.einsum("nd,kdef->nke", rows(a), MATRICES.unflatten(2, (-1, 2))), ""
    ),
    "einsum over the edges": (lambda a: torch.einsum("bnd,bed->ne", cube(a), cube(a).exp()), "Bmm.self"),
    "in place, in another dtype": (lambda a: rows(a).bfloat16().add_(a[TARGET], alpha=2).exp().float(), ""),
    "in place on columns": (lambda a: (h := a[SOURCE], h[:, :5].mul_(a[TARGET][:, :5]))[0].exp(), ""),
    "in place on all as a view": (lambda a: (h := a[SOURCE], h.view(-1).mul_(2.0))[0].exp(), ""),
    "features in another order": (
        lambda a: LINEAR(FEATURES.view(30, 100, WIDTH).transpose(0, 1)) * a[0], "Mm.self"
    ),
}  # fmt: skip

REPEATED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "reshape": (lambda a: cube(a).transpose(0, 1).reshape(-1, WIDTH).exp(), "Exp.result"),
    "flatten": (lambda a: cube(a).transpose(0, 2).flatten(1).exp(), "Exp.result"),
    "contiguous": (lambda a: cube(a).transpose(0, 2).contiguous().exp(), "Exp.result"),
    "clone": (lambda a: rows(a).clone().exp(), "Exp.result"),
    "expand": (lambda a: a.tanh()[:, None].expand(-1, 3, -1).reshape(-1, WIDTH).exp(), "Exp.result"),
    "half and float": (lambda a: rows(a).half().float().exp(), "Exp.result"),
    "bfloat16": (lambda a: rows(a).bfloat16().exp().double(), "Exp.result"),
    "to": (lambda a: rows(a).to(torch.float64).exp(), "Exp.result"),
    "to by name": (lambda a: rows(a).to(dtype=torch.float16).exp(), "Exp.result"),
    "type as": (lambda a: rows(a).type_as(torch.ones(1, dtype=torch.float64)).exp(), "Exp.result"),
    "nothing to copy": (lambda a: (a[SOURCE] @ SQUARE).contiguous().float().to(a).exp(), "Exp.result"),
    "add in place": (lambda a: a[SOURCE].add_(a[TARGET], alpha=2).exp(), "Exp.result"),
    "+=": (lambda a: operator.iadd(a[SOURCE], 2 * BIAS).exp(), "Exp.result"),
    "*=": (lambda a: operator.imul(a[SOURCE], 0.3).exp(), "Exp.result"),
    "twice in place": (lambda a: a[SOURCE].sub_(a[TARGET]).div_(3).neg_().exp(), "Exp.result"),
    "relu in place": (lambda a: F.relu(F.linear(rows(a), SQUARE), True).exp(), "Exp.result"),
    "a module in place": (lambda a: nn.LeakyReLU(0.3, inplace=True)(rows(a) @ SQUARE).exp(), "Exp.result"),
    "elu in place": (lambda a: F.elu_(rows(a) @ SQUARE, 1.0).exp(), "Exp.result"),
    "what was there before": (lambda a: before(a[SOURCE], a[TARGET]).exp(), "Exp.result"),
    "elu in place and what was there before": (lambda a: before_elu(a[SOURCE] @ SQUARE), "Exp.result"),
    "masked fill": (lambda a: (rows(a) @ SQUARE).masked_fill(FEATURES > 0, -9.0).exp(), "Exp.result"),
    "masked fill with a tensor": (
        lambda a: torch.masked_fill(rows(a) @ SQUARE, FEATURES > 0, value=a[0, 0]).exp(),
        "Exp.result",
    ),
    "masked fill in place": (lambda a: (rows(a) @ SQUARE).masked_fill_(FEATURES > 0, -9.0).exp(), "Exp.result"),
    "where": (lambda a: torch.where(FEATURES > 0, rows(a) @ SQUARE, rows(a)).exp(), "Exp.result"),
    "where, of a constant": (
        lambda a: torch.where(FEATURES > 0, rows(a) @ SQUARE, torch.tensor(-9.0)).exp(),
        "Exp.result",
    ),
    "where, of a number": (lambda a: (rows(a) @ SQUARE).where(FEATURES > 0, -9.0).exp(), "Exp.result"),
    "padded": (lambda a: F.pad(rows(a) @ SQUARE, [2, 0, 0, 3], value=0.5).exp(), "Exp.result"),
    "cropped": (lambda a: F.pad(rows(a) @ SQUARE, (0, 0, -1000, 3)).exp(), "Exp.result"),
    "padded by a mirror": (lambda a: F.pad((rows(a) @ SQUARE)[None], (3, 2), mode="reflect").exp(), "Exp.result"),
    "convolution": (lambda a: F.conv1d(cube(a), KERNEL, BIAS[:8], padding=1).exp(), "Exp.result"),
    "convolution in strides": (lambda a: F.conv1d(cube(a), KERNEL, stride=2, dilation=3).exp(), "Exp.result"),
    "convolution of pictures": (
        lambda a: F.conv2d(rows(a).view(-1, 1, 4, 8), KERNEL[:, :3, :3, None].transpose(1, 3)).exp(),
        "Exp.result",
    ),
    "erf": (lambda a: (rows(a) @ SQUARE).erf().exp(), "Exp.result"),
    "erf in place": (lambda a: (rows(a) @ SQUARE).erf_().exp(), "Exp.result"),
    "arctan": (lambda a: (rows(a) @ SQUARE).atan().exp(), "Exp.result"),
    "GELU by hand": (lambda a: (h := rows(a) @ SQUARE, h * 0.5 * (1 + (h / 2**0.5).erf()))[1].exp(), "Exp.result"),
    "a mask": (lambda a: (rows(a) > 0.1).to(torch.float32).mul(rows(a)).exp(), "Exp.result"),
}

RELATIONS = RGCNConv(WIDTH, WIDTH, 3, num_bases=2)


@pytest.mark.parametrize("recompute", ["cheap", "aggressive", "off"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*CAST, *COPIED])
def test_under_autocast_it_is_exact(name: str, dtype: torch.dtype, recompute: str) -> None:
    """Whether the backward runs under autocast too, which it need not, or not."""
    function, _ = (CAST | COPIED)[name]
    a = table()

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype):
            return weighted(function(a))

    assert_exact(loss, [a, SQUARE, BIAS, MATRICES], recompute=recompute)
    with torch.autocast("cpu", dtype):
        assert_exact(loss, [a, SQUARE, BIAS, MATRICES], recompute=recompute)


@pytest.mark.parametrize("recompute", ["cheap", "aggressive", "off"])
@pytest.mark.parametrize("name", [*CAST, *COPIED, *REPEATED])
def test_without_autocast_it_is_exact(name: str, recompute: str) -> None:
    function, _ = (CAST | COPIED | REPEATED)[name]
    a = table()
    assert_exact(lambda: weighted(function(a)), [a, SQUARE, BIAS, MATRICES], recompute=recompute)


@pytest.mark.parametrize("name", [name for name, (_, op) in CAST.items() if op])
def test_a_cast_is_made_again(name: str) -> None:
    function, op = CAST[name]
    a = table()
    with torch.autocast("cpu", torch.bfloat16):
        _, ledger = compressed(lambda: weighted(function(a)), [a], 8, recompute="aggressive")
    assert codecs(ledger, op) <= {"recipe", "gather"}, ledger.rows()


@pytest.mark.parametrize("name", [name for name, (_, op) in (COPIED | REPEATED).items() if op])
def test_a_copy_is_made_again(name: str) -> None:
    function, op = (COPIED | REPEATED)[name]
    a = table()
    _, ledger = compressed(lambda: weighted(function(a)), [a], 32, recompute="aggressive")
    assert codecs(ledger, op) <= {"recipe", "gather"}, ledger.rows()


def test_a_padding_is_as_it_was() -> None:
    """Its sizes may be a list, which is the user's to change."""
    a = table()

    def loss() -> Tensor:
        sizes = [1, 2]
        padded = F.pad(rows(a) @ SQUARE, sizes).exp()
        sizes[0] = 0
        return weighted(padded)

    assert_exact(loss, [a, SQUARE])


@pytest.mark.parametrize(
    ("op", "rows_of", "weight"),
    [(F.conv1d, (64, 2, 100), (64, 2, 50)), (F.linear, (600, 8), (500, 8))],
    ids=["convolution", "linear"],
)
def test_a_weight_that_is_made_is_not_rounded_together_with_its_rows(
    op: Callable[[Tensor, Tensor], Tensor], rows_of: tuple[int, ...], weight: tuple[int, ...]
) -> None:
    """Of two rounded factors the error may be as large as the product: it is made again of exact ones."""
    x, weights = nn.Parameter(torch.randn(rows_of)), nn.Parameter(torch.randn(weight))

    def loss() -> Tensor:
        factors = made(x), made(weights)
        return weighted(op(*factors).tanh())

    _, ledger = compressed(loss, [x, weights], 8, recompute="aggressive")
    assert codecs(ledger, "Tanh.result") == {"recipe"}, ledger.rows()
    assert codecs(ledger, "Tanh.result from") == {"exact"}, ledger.rows()


def test_a_convolution_that_covers_much_is_kept() -> None:
    """A thousand products for each element are not worth a byte."""
    x, wide = nn.Parameter(torch.randn(6, 500, WIDTH)), nn.Parameter(torch.randn(4, 500, 3) / 40)
    _, ledger = compressed(lambda: weighted(F.conv1d(x, wide).tanh()), [x, wide], 8)
    assert not codecs(ledger, "Tanh.result") & {"recipe", "gather"}, ledger.rows()


def test_what_an_op_has_turned_and_cast_is_nobodys_weight() -> None:
    """Seen in the order that the op saw it in, it has no history: so has a weight, which takes nothing to refer to."""
    a = table()
    with torch.autocast("cpu", torch.bfloat16):
        _, ledger = compressed(
            lambda: weighted(torch.tensordot(cube(a)[:, :WIDTH].asinh(), SQUARE, dims=([1], [0]))), [a], 8
        )
    kept = {entry.codec for entry in ledger if entry.stored_bytes and entry.op.startswith("Mm.self")}
    assert kept == {"int8"}, ledger.rows()


def test_what_was_changed_after_it_was_cast_is_not_what_it_was() -> None:
    a = table()

    def loss() -> Tensor:
        h = made(a)
        out = F.linear(h, SQUARE)
        h.add_(1.0)
        return weighted(out) + weighted(h)

    with torch.autocast("cpu", torch.bfloat16):
        assert_exact(loss, [a, SQUARE], recompute="aggressive")


def test_a_cast_to_integers_is_not_made_again() -> None:
    """It may jump where what it is made of is off by a bit, as sums in any order are."""
    a = table()
    _, ledger = compressed(lambda: weighted(rows(a).exp() * (rows(a) * 10).to(torch.int64)), [a], 32)
    assert codecs(ledger, "Mul.other") == {"int64 as int8", "held"}


def test_a_copy_is_in_order_where_there_is_nothing_to_cast() -> None:
    x = torch.randn(3, 4).t()
    copied = COPIED_OP.op(x, (x.dtype,), tuple(x.shape), tuple(x.shape))
    assert copied.is_contiguous()
    assert torch.equal(copied, x)


def test_a_copy_of_what_lies_in_order_is_no_alias() -> None:
    """It may be computed with in place."""
    x = torch.randn(3, 4)
    COPIED_OP.op(x, (x.dtype,), (3, 4), (4, 3)).zero_()
    assert x.count_nonzero() == 12


@pytest.mark.parametrize("given", [(F.relu, ()), (F.silu, ()), (F.mish, ()), (F.elu, (1.0,)), (F.celu, (1.0,)),
                                   (F.leaky_relu, (0.3,))])  # fmt: skip
def test_an_activation_is_made_again_beside_its_argument(
    given: tuple[Callable[..., Tensor], tuple[float, ...]],
) -> None:
    """Which others may be made of, though the forward wrote over it."""
    function, more = given
    for args, kwargs in (((*more, True), {}), (more, {"inplace": True})):
        x = torch.randn(100) - 1
        before, repeatable = x.clone(), REPEATABLE[function]
        described = repeatable.describe((x, *args), kwargs)
        assert described is not None
        made_again = repeatable.op(*described[0], **described[1])
        assert torch.equal(x, before)
        assert torch.equal(made_again, function(x, *more))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "rgcn": lambda: RGCNConv(64, 64, 3, num_bases=2),
    "edge conv": lambda: EdgeConv(nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64))),
    "crystal graphs": lambda: CGConv(64),
    "gatv2": lambda: GATv2Conv(64, 16, heads=4),
    "transformer": lambda: TransformerConv(64, 16, heads=4),
}


@pytest.mark.parametrize("name", LAYERS)
def test_mixed_precision_stores_no_more_than_full_precision(name: str) -> None:
    """What is cast for a layer's products is not kept beside what it was cast of."""
    torch.manual_seed(0)
    layers, stored = [LAYERS[name]() for _ in range(2)], []
    a = torch.randn(NODES, 64, requires_grad=True)
    edges = (torch.stack([SOURCE, TARGET]), *([SOURCE % 3] if name == "rgcn" else []))

    def loss() -> Tensor:
        h: Tensor = a
        for layer in layers:
            h = F.layer_norm(layer(h, *edges), (64,)).relu()
        return weighted(h.float())

    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            stored.append(compressed(loss, [a], 8)[1].stored_bytes)
    assert stored[1] <= 1.05 * stored[0]


def test_what_relations_sums_are_made_of_is_kept_once_in_mixed_precision() -> None:
    """Each relation's sums are cast: they are as good a reason to keep the table as if they were saved themselves."""
    generator = torch.Generator().manual_seed(0)
    edges = torch.randint(2000, (2, 20_000), generator=generator)
    types = torch.randint(20, (20_000,), generator=generator)
    torch.manual_seed(0)
    layers, a, stored = [RGCNConv(64, 64, 20, num_bases=4) for _ in range(2)], torch.randn(2000, 64), []
    a.requires_grad_()

    def loss() -> Tensor:
        h: Tensor = a
        for layer in layers:
            h = layer(h, edges, types).relu()
        return weighted(h.float())

    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            stored.append(compressed(loss, [a], 8)[1].stored_bytes)
    assert stored[1] <= 1.05 * stored[0]


def test_parts_of_what_was_picked_at_once_are_picked_again_in_mixed_precision() -> None:
    """As in KGAT, which picks the rows of all relations at once, and casts each relation's for a product of its own."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(2000, (10_000,), generator=generator)
    table = nn.Parameter(torch.randn(2000, 64, generator=generator))
    weights = nn.Parameter(torch.randn(20, 64, 64, generator=generator))

    def loss() -> Tensor:
        parts = table[rows].split(500)
        return weighted(torch.cat([part @ weight for part, weight in zip(parts, weights, strict=True)]).float())

    with torch.autocast("cpu", torch.bfloat16):
        _, ledger = compressed(loss, [table, weights], 2)
    assert not any(entry.stored_bytes for entry in ledger if entry.op.startswith("Mm.self"))
    assert "gather" in codecs(ledger, "Mm.self")


def test_an_argument_is_no_copy_of_itself() -> None:
    weight = torch.ones(WIDTH, WIDTH, requires_grad=True)
    x = FEATURES.flip(0)
    assert made_within("linear", F.linear(x, weight).grad_fn, "self", x, (x, weight), {}) is None
    half = x.double()
    assert made_within("linear", F.linear(x, weight).grad_fn, "self", half, (x, weight), {}) is not None


def test_a_variance_that_its_loss_has_bounded_is_no_copy_of_what_it_was_given() -> None:
    """The loss clones it, and bounds the clone in place, which autograd does not see."""
    rows = (torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(0)) * 8).requires_grad_()

    def loss() -> Tensor:
        scores = made(rows)
        return F.gaussian_nll_loss(torch.zeros_like(scores), torch.ones_like(scores), scores.exp())

    assert_exact(loss, [rows])
    assert_exact(loss, [rows], recompute="aggressive")


def test_features_that_were_masked_in_place_are_no_copy_of_what_they_were() -> None:
    """``x = features.clone(); x[masked] = 0``, and a layer: nothing was made within it, and the clone is no more."""
    layer = nn.Linear(WIDTH, WIDTH)

    def loss() -> Tensor:
        x = FEATURES.clone()
        x[FEATURES[:, 0] > 0] = 0.0
        return weighted(layer(x))

    assert_exact(loss, list(layer.parameters()))
    assert_exact(loss, list(layer.parameters()), recompute="aggressive")
