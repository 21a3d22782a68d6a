"""Where the gradient is linear in what is rounded, it is unbiased; where it is not, its error is bounded."""

import math
from collections.abc import Callable

import pytest
import torch
from comparing import codecs, compressed, gradients, made, weighted
from torch import Tensor
from torch.nn import functional as F

from lightning_tinykg.models.grouped import grouped_matmul

DRAWS = 240
ROWS, WIDTH = 24, 32
DIRECTIONS = 16

INDEX = torch.randint(ROWS, (200,), generator=torch.Generator().manual_seed(0))


def leaf(seed: int) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed)).double().requires_grad_()


def cube(x: Tensor) -> Tensor:
    return x.view(4, 6, WIDTH)


def complex_of(x: Tensor) -> Tensor:
    return torch.complex(x[:, ::2], x[:, 1::2])


Op = Callable[[Tensor, Tensor, Tensor], Tensor]

LINEAR: dict[str, tuple[Op, str]] = {
    "mul": (lambda a, b, c: a * b, "Mul.self"),
    "square by mul": (lambda a, b, c: a * a, "Mul.self"),
    "mul of a broadcast": (lambda a, b, c: a[:, None, :] * b, "Mul.other"),
    "addcmul": (lambda a, b, c: torch.addcmul(a, b, c), "Addcmul.tensor1"),
    "lerp": (lambda a, b, c: torch.lerp(a, b, c), "Lerp.weight"),
    "mm": (lambda a, b, c: a @ b.t(), "Mm.mat2"),
    "linear": (lambda a, b, c: F.linear(a, b, c[:, 0]), "Addmm.mat1"),
    "linear in 3d": (lambda a, b, c: F.linear(cube(a), b, c[:, 0]), ""),
    "bmm": (lambda a, b, c: torch.bmm(cube(a), cube(b).transpose(1, 2)), "Bmm.mat2"),
    "baddbmm": (lambda a, b, c: torch.baddbmm(cube(c)[..., :6], cube(a), cube(b).transpose(1, 2)), "Baddbmm.batch1"),
    "addbmm": (lambda a, b, c: torch.addbmm(c[:6, :6], cube(a), cube(b).transpose(1, 2)), "Addbmm.batch1"),
    "addmm": (lambda a, b, c: torch.addmm(c[:, :ROWS], a, b.t()), "Addmm.mat1"),
    "mv": (lambda a, b, c: torch.mv(a, b[0]), "Mv.self"),
    "addmv": (lambda a, b, c: torch.addmv(c[:, 0], a, b[0]), "Addmv.mat"),
    "addr": (lambda a, b, c: torch.addr(c, a[:, 0], b[0]), ""),
    "dot": (lambda a, b, c: torch.dot(a.view(-1), b.view(-1)), "Dot.self"),
    "einsum": (lambda a, b, c: torch.einsum("nd,nd,nd->n", a, b, c), ""),
    "numerator": (lambda a, b, c: a.detach() / (c.abs() + 1), "Div.self"),
    "exp": (lambda a, b, c: a.exp(), "Exp.result"),
    "exp2": (lambda a, b, c: a.exp2(), "Exp2.result"),
    "expm1": (lambda a, b, c: a.expm1(), "Expm1.result"),
    "pow 2": (lambda a, b, c: a**2, "Pow.self"),
    "log softmax": (lambda a, b, c: (4 * a).log_softmax(-1), "LogSoftmax.result"),
    "cross entropy": (lambda a, b, c: F.cross_entropy(4 * a, INDEX[:ROWS], reduction="none"), "LogSoftmax.result"),
    "logsumexp": (lambda a, b, c: (4 * a).logsumexp(-1), "Logsumexp.self"),
    "logsumexp over rows": (lambda a, b, c: (4 * a).logsumexp(0, keepdim=True), "Logsumexp.self"),
    "complex product": (lambda a, b, c: torch.view_as_real(complex_of(a) * complex_of(b)), "Mul.self"),
    "product with a conjugate": (lambda a, b, c: (complex_of(a) * complex_of(b).conj()).real, "Mul.other"),
    "mse": (lambda a, b, c: F.mse_loss(a, b, reduction="sum"), "MseLoss.self"),
    "var": (lambda a, b, c: a.var(-1), "Var.self"),
    "std": (lambda a, b, c: a.std(-1), "Std.self"),
    "conv1d": (lambda a, b, c: F.conv1d(cube(a), b.view(-1)[:90].view(5, 6, 3), c.view(-1)[:5]), "Convolution.input"),
    "conv2d": (lambda a, b, c: F.conv2d(a.view(1, 3, 16, 16), b.view(-1)[:54].view(2, 3, 3, 3)), "Convolution.input"),
    "gather": (lambda a, b, c: a[INDEX] * b[INDEX], ""),
    "message": (lambda a, b, c: torch.zeros_like(a).index_add(0, INDEX, a[INDEX] * b[INDEX]) @ c.t(), "Mm.self"),
    "grouped matmul": (
        lambda a, b, c: grouped_matmul(a, b.view(3, WIDTH, 8), [10, 0, 14]),
        "GeneratedBackwardFor_tinykg_grouped_matmul_default.tensors",
    ),
    "two layers": (lambda a, b, c: F.leaky_relu(F.leaky_relu(a @ b.t(), 0.1) @ c, 0.1), "Mm.self"),
}  # fmt: skip
if hasattr(F, "grouped_mm"):  # since PyTorch 2.10; not in double precision
    ENDS = torch.tensor([10, 10, ROWS], dtype=torch.int32)
    LINEAR["grouped mm"] = (
        lambda a, b, c: F.grouped_mm(a.float(), b.float().view(3, WIDTH, 8), offs=ENDS).double(),
        "GroupedMm.self",
    )


CHAINS = ("einsum", "two layers", "message", "complex product", "product with a conjugate")
"""Of several rounded ones in products or sums, one that hardly ever moves shifts all draws of an element, so only the
whole is tested."""


def loss_of(op: Op, leaves: list[Tensor]) -> Callable[[], Tensor]:
    return lambda: weighted(op(*(made(x) for x in leaves)))


@pytest.mark.parametrize("name", LINEAR)
def test_linear_rules_are_unbiased(name: str) -> None:
    op, saved = LINEAR[name]
    leaves = [leaf(seed) for seed in range(3)]
    loss = loss_of(op, leaves)
    want = torch.cat([g.flatten() for g in gradients(loss, leaves)])
    draws = []
    for seed in range(DRAWS):
        grads, ledger = compressed(loss, leaves, 2, seed=seed)
        draws.append(torch.cat([g.flatten() for g in grads]))
    if saved:  # or nothing has been tested
        widths = {codec.removesuffix(" of exp") for codec in codecs(ledger, saved)}
        assert any(codec.startswith("int") and codec[3:].isdigit() for codec in widths), ledger.rows()
    error = torch.stack(draws) - want
    size = want.abs().max()
    spread = error.std(0)
    moving = spread > 1e-9 * size
    assert moving.any()
    # what no rounding reaches is what it was; what lies next to a level may not have moved in so few draws
    assert (error[:, ~moving].abs() <= 0.1 * spread.max()).all()

    # element by element; 240 draws of a few levels have heavier tails than the normal distribution
    z = error.mean(0)[moving] / (spread[moving] / math.sqrt(DRAWS))
    often = (error[:, moving].abs() > 0.5 * spread[moving]).double().mean(0) > 0.1
    if often.any() and name not in CHAINS:
        assert float(z[often].abs().max()) < 6.5
    # overall: the mean along random directions, and along the gradient itself
    generator = torch.Generator().manual_seed(5)
    directions = torch.randn(DIRECTIONS, want.numel(), dtype=want.dtype, generator=generator)
    directions = torch.cat([directions, want[None], want.sign()[None], torch.ones_like(want)[None]])
    along = error @ directions.t()
    moves = along.std(0) > 1e-9 * size
    overall = along.mean(0)[moves] / (along.std(0)[moves] / math.sqrt(DRAWS))
    assert float(overall.abs().max()) < 4.5


SMOOTH: dict[str, Op] = {
    "softmax": lambda a, b, c: a.softmax(-1),
    "tanh": lambda a, b, c: a.tanh(),
    "sigmoid": lambda a, b, c: a.sigmoid(),
    "elu": lambda a, b, c: F.elu(a),
    "celu": lambda a, b, c: F.celu(a),
    "gelu": lambda a, b, c: F.gelu(a),
    "silu": lambda a, b, c: F.silu(a),
    "mish": lambda a, b, c: F.mish(a),
    "softplus": lambda a, b, c: F.softplus(a),
    "log sigmoid": lambda a, b, c: F.logsigmoid(a),
    "hardswish": lambda a, b, c: F.hardswish(a),
    "glu": lambda a, b, c: F.glu(a),
    "sin": lambda a, b, c: a.sin(),
    "cos": lambda a, b, c: a.cos(),
    "sinh": lambda a, b, c: a.sinh(),
    "cosh": lambda a, b, c: a.cosh(),
    "erf": lambda a, b, c: a.erf(),
    "atan": lambda a, b, c: a.atan(),
    "asinh": lambda a, b, c: a.asinh(),
    "pow 3": lambda a, b, c: a**3,
    "normalize": lambda a, b, c: F.normalize(a),
    "norm": lambda a, b, c: a.norm(dim=-1),
    "binary cross entropy": lambda a, b, c: F.binary_cross_entropy_with_logits(a, b.detach().sigmoid()),
    "cosine": lambda a, b, c: F.cosine_similarity(a, b),
    "layer norm": lambda a, b, c: F.layer_norm(a, (WIDTH,)),
    "group norm": lambda a, b, c: F.group_norm(a, 4),
    "batch norm": lambda a, b, c: F.batch_norm(a, None, None, training=True),
    "attention": lambda a, b, c: F.scaled_dot_product_attention(cube(a), cube(b), cube(c)),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_rules_at_8_bits(name: str) -> None:
    """A relative error of at most 2 % of the gradient, on inputs of size one."""
    leaves = [leaf(seed) for seed in range(3)]
    loss = loss_of(SMOOTH[name], leaves)
    want = torch.cat([g.flatten() for g in gradients(loss, leaves)])
    for seed in range(5):
        got = torch.cat([g.flatten() for g in compressed(loss, leaves, 8, seed=seed)[0]])
        assert float((got - want).norm() / want.norm()) < 0.02


def zeros_and_tiny(dtype: torch.dtype) -> Tensor:
    """Rows of zeros, of denormals, of one-sided and of mixed sizes."""
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0] = 0.0
    x[1] = torch.finfo(dtype).smallest_normal / 4
    x[2] *= 1e-7 if dtype != torch.float16 else 1e-4
    x[3, ::2] = 0.0
    x[4] = x[4].abs() * 1e-3
    x[5] = -0.0
    x[6, 0] = 1e4
    x[7] = 1.0
    return x


FINITE: dict[str, Callable[[Tensor], Tensor]] = {
    "amax": lambda h: h.amax(-1),
    "amin": lambda h: h.amin(-1),
    "norm inf": lambda h: torch.linalg.vector_norm(h, float("inf"), dim=-1),
    "norm 2": lambda h: torch.linalg.vector_norm(h, 2, dim=-1),
    "norm 1": lambda h: torch.linalg.vector_norm(h, 1, dim=-1),
    "norm 3": lambda h: torch.linalg.vector_norm(h, 3, dim=-1),
    "normalize": lambda h: F.normalize(h),
    "normalize inf": lambda h: F.normalize(h, p=float("inf")),
    "prod": lambda h: h[:, :4].prod(-1),
    "log": lambda h: (h.abs() + 1e-3).log(),
    "log clamped": lambda h: h.clamp(min=1e-3).log(),
    "sqrt": lambda h: (h.abs() + 1e-3).sqrt(),
    "rsqrt": lambda h: (h.square() + 1e-3).rsqrt(),
    "std": lambda h: (h.var(-1) + 1e-3).sqrt(),
    "denominator": lambda h: 1 / (h.abs() + 1e-3),
    "log softmax": lambda h: h.log_softmax(-1),
    "logsumexp": lambda h: h.logsumexp(-1),
    "softmax": lambda h: h.softmax(-1).clamp_min(1e-3).log(),
    "log sigmoid": F.logsigmoid,
    "layer norm": lambda h: F.layer_norm(h, (WIDTH,)),
    "tanh": lambda h: h.tanh(),
    "scatter amax": lambda h: torch.zeros_like(h).scatter_reduce(0, INDEX[:ROWS, None].expand_as(h), h, "amax"),
    "scatter mean": lambda h: torch.zeros_like(h).scatter_reduce(0, INDEX[:ROWS, None].expand_as(h), h, "mean"),
    "scatter prod": lambda h: torch.ones_like(h).scatter_reduce(0, INDEX[:ROWS, None].expand_as(h), h, "prod"),
    "masked softmax": lambda h: h.masked_fill(h == 0, -torch.inf)[6:].softmax(-1),
    "attention": lambda h: F.scaled_dot_product_attention(h[None], h[None], h[None]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FINITE)
def test_what_was_finite_stays_finite(name: str, dtype: torch.dtype) -> None:
    x = zeros_and_tiny(dtype).requires_grad_()
    function = FINITE[name]

    def loss() -> Tensor:
        return weighted(function(made(x)))

    want = gradients(loss, [x])[0]
    assert want.isfinite().any()
    for bits in (1, 2, 4, 8, 32):
        got = compressed(loss, [x], bits)[0][0]
        assert got[want.isfinite()].isfinite().all(), bits


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_factor_of_two_products_gets_more_bits(bits: int) -> None:
    """In ``a * (a * h)`` the gradient of ``h`` is multiplied by the same rounding twice: its variance is a bias."""
    leaves = [leaf(0), leaf(1)]

    def loss() -> Tensor:
        a, h = map(made, leaves)
        return weighted(a * (a * h))

    want = gradients(loss, leaves)[1]
    mean = torch.stack([compressed(loss, leaves, bits, seed=k)[0][1] for k in range(DRAWS)]).mean(0)
    assert float(((mean - want) * want).sum() / want.square().sum()) < 0.03  # 0.25 at 2 bits


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_paper_recipe_is_unbiased_too(bits: int) -> None:
    """TinyKG to the letter, on what is linear."""
    a, b = leaf(0), leaf(1)
    loss = loss_of(lambda x, y, z: x @ y.t(), [a, b, b])
    want = gradients(loss, [a])[0]
    error = torch.stack([compressed(loss, [a], bits, seed=k, recipe="paper")[0][0] - want for k in range(DRAWS)])
    z = error.mean(0) / (error.std(0) / math.sqrt(DRAWS))
    assert float(z.abs().max()) < 5.5
    assert abs(float(z.sum())) / math.sqrt(z.numel()) < 12  # columns share noise


def test_more_bits_less_error() -> None:
    leaves = [leaf(seed) for seed in range(3)]
    loss = loss_of(lambda a, b, c: torch.tanh(a @ b.t()) @ c, leaves)
    want = torch.cat([g.flatten() for g in gradients(loss, leaves)])

    def error(bits: int) -> float:
        draws = [torch.cat([g.flatten() for g in compressed(loss, leaves, bits, seed=k)[0]]) for k in range(10)]
        return sum(float((g - want).norm()) for g in draws)

    errors = [error(bits) for bits in (1, 2, 4, 8, 32)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 10 * errors[3] > 0
    assert errors[4] == 0
