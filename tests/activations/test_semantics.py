"""Compression changes what is kept, and nothing else a user could notice."""

import gc
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import pytest
import torch
from comparing import assert_exact, compressed, gradients, identical, made, weighted
from memory import LiveBytes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_tinykg import compress_activations

ROWS, WIDTH = 40, 32
INDEX = torch.randint(ROWS, (300,), generator=torch.Generator().manual_seed(0))
WIDTHS = (1, 2, 4, 8, 32)


def leaf(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (ROWS, WIDTH), generator=generator).requires_grad_()


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(WIDTH, 64), nn.GELU(), nn.Dropout(0.4), nn.Linear(64, 64), nn.Tanh(), nn.LayerNorm(64)
    )


def gradient(model: nn.Module, x: Tensor, context: compress_activations) -> Tensor:
    model.zero_grad()
    torch.manual_seed(5)
    with context:
        loss = weighted(model(x))
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


# -- backward, again and again -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", WIDTHS)
def test_retained_graph_gives_the_same_again(bits: int) -> None:
    model, x = network(), leaf()
    with compress_activations(bits=bits, min_bytes=0):
        loss = weighted(model(x))
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    third = torch.autograd.grad(loss, list(model.parameters()))
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_a_freed_graph_says_so() -> None:
    x = leaf()
    with compress_activations(bits=2, min_bytes=0):
        loss = weighted(made(x).exp())
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("inside", [True, False])
def test_double_backward(inside: bool) -> None:
    """A gradient penalty, in the context and after it."""
    x = leaf()
    weight = leaf(WIDTH, WIDTH, seed=1)

    def penalty(context: compress_activations | None) -> Tensor:
        def first() -> Tensor:
            return (torch.tanh(made(x) @ weight) ** 2).sum()

        def second(loss: Tensor) -> Tensor:
            (g,) = torch.autograd.grad(loss, x, create_graph=True)
            return (g.norm(dim=-1) - 1).square().sum()

        weight.grad = None
        if context is None:
            total = second(first())
        elif inside:
            with context:
                total = second(first())
        else:
            with context:
                loss = first()
            total = second(loss)
        total.backward()
        assert weight.grad is not None
        return weight.grad.clone()

    want = penalty(None)
    assert torch.equal(penalty(compress_activations(bits=32, min_bytes=0)), want)
    rounded = penalty(compress_activations(bits=8, min_bytes=0))
    assert 0 < float((rounded - want).norm() / want.norm()) < 0.1


def test_backward_inside_the_context() -> None:
    model, x = network(), leaf()
    want = gradient(model, x, compress_activations(bits=32, min_bytes=0))
    model.zero_grad()
    torch.manual_seed(5)
    with compress_activations(bits=32, min_bytes=0):
        weighted(model(x)).backward()
        again = model(x).sum()  # and the context goes on
        again.backward()
        model.zero_grad()
        torch.manual_seed(5)
        weighted(model(x)).backward()
    assert torch.equal(torch.cat([p.grad.flatten() for p in model.parameters()]), want)


# -- in place ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 32])
def test_changing_a_weight_after_the_forward_raises(bits: int) -> None:
    x, weight = leaf(), leaf(WIDTH, WIDTH, seed=1)
    with compress_activations(bits=bits, min_bytes=0):
        loss = (made(x) @ weight).sum()
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("bits", [2, 32])
def test_changing_the_batch_after_the_forward_raises(bits: int) -> None:
    batch, weight = torch.randn(ROWS, WIDTH), leaf(WIDTH, WIDTH)
    with compress_activations(bits=bits, min_bytes=0):
        loss = (batch @ weight).sum()
    batch.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_changing_an_exact_result_after_the_forward_raises() -> None:
    x = leaf()
    with compress_activations(bits=2, min_bytes=0):
        result = made(x).abs().sqrt()
        loss = result.sum()
    result.detach().add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def _rows_of(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Something to gather from, and a loss that asks for the rows."""
    table = torch.cumsum(x, 0)
    return table, (table[INDEX] * v).sum()


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "add_": lambda t: t.add_(1.0),
    "mul_": lambda t: t.mul_(2.0),
    "+=": lambda t: t.__iadd__(1.0),
    "setitem": lambda t: t.__setitem__(3, 0.0),
    "view": lambda t: t.view(-1)[5:].mul_(3.0),
    "transposed": lambda t: t.t().mul_(3.0),
    "detached": lambda t: t.detach().zero_(),
    "masked_fill_": lambda t: t.masked_fill_(t > 0, 0.0),
    "index_fill_": lambda t: t.index_fill_(0, INDEX[:2], 7.0),
    "relu_": lambda t: torch.relu_(t),
    "relu": lambda t: F.relu(t, inplace=True),
    "relu, by place": lambda t: F.relu(t, True),
    "leaky relu": lambda t: nn.LeakyReLU(inplace=True)(t),
    "elu": lambda t: nn.ELU(inplace=True)(t),
    "dropout": lambda t: nn.Dropout(0.5, inplace=True)(t),
    "dropout, by place": lambda t: F.dropout(t, 0.5, True, True),
    "foreach": lambda t: torch._foreach_mul_([t], 2.0),
    "out": lambda t: torch.mul(torch.ones(ROWS, WIDTH), 2.0, out=t.detach()),
    "copy_": lambda t: t.copy_(torch.zeros(ROWS, WIDTH)),
    "init": lambda t: nn.init.zeros_(t.detach()),
    "aten": lambda t: torch.ops.aten.mul_(t, 2.0),
    "aten overload": lambda t: torch.ops.aten.mul_.Scalar(t, 2.0),
}


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("how", CHANGES)
def test_changing_an_ingredient_inside_the_forward(how: str, bits: int) -> None:
    """Plain autograd keeps the rows, and does not mind that their table is changed: nor may a recipe."""
    x, v = leaf(), leaf(300, WIDTH, seed=1)

    def loss() -> Tensor:
        table, total = _rows_of(x, v)
        CHANGES[how](table)
        return total + 0.5 * table.sum()

    if bits == 32:
        assert_exact(loss, [x, v])
    else:
        want, got = gradients(loss, [x, v]), compressed(loss, [x, v], bits)[0]
        for a, b in zip(want, got, strict=True):
            assert float((a - b).norm() / a.norm()) < 0.05


@pytest.mark.parametrize("change", ["scale", "set", "renorm"])
def test_changing_a_table_of_weights_inside_the_forward(change: str) -> None:
    """An embedding that is renormalised, or updated as a moving average, once its rows have been taken."""
    table, v = leaf(), leaf(300, WIDTH, seed=1)
    start = table.detach().clone()

    def loss() -> Tensor:
        with torch.no_grad():
            table.copy_(start)
        total = (F.embedding(INDEX, table) * v).sum()
        with torch.no_grad():
            if change == "scale":
                table.mul_(0.9)
            elif change == "set":
                table[:3] = 0.0
            else:
                F.embedding(INDEX, table, max_norm=1.0)
        return total

    assert_exact(loss, [table, v])


def test_changing_after_the_gather_and_before_it_is_asked_for() -> None:
    x, v = leaf(), leaf(300, WIDTH, seed=1)

    def loss() -> Tensor:
        table = torch.cumsum(x, 0)
        rows = table[INDEX]
        table.mul_(3.0)
        return (rows * v).sum() + (table[INDEX] * v).sum()

    assert_exact(loss, [x, v])


def test_changing_an_index_inside_the_forward() -> None:
    x, v = leaf(), leaf(300, WIDTH, seed=1)

    def loss() -> Tensor:
        index = INDEX.clone()
        rows = F.embedding(index.clone(), torch.cumsum(x, 0))
        total = (rows * v).sum()
        index.zero_()
        return total + (torch.cumsum(x, 0)[index] * v).sum()

    assert_exact(loss, [x, v])


# -- hooks of the user's own -------------------------------------------------------------------------------------


def _retained(x: Tensor, model: nn.Module, seen: list[Any]) -> Tensor:
    h = made(x).exp()
    h.retain_grad()
    loss = weighted(model(h))
    loss.register_hook(lambda g: seen.append(h.grad is None))
    return loss


def _scaled(x: Tensor, model: nn.Module, seen: list[Any]) -> Tensor:
    h = made(x).exp()
    h.register_hook(lambda g: seen.append(g.clone()) or 2 * g)
    return weighted(model(h))


def _node_hooks(x: Tensor, model: nn.Module, seen: list[Any]) -> Tensor:
    h = made(x).exp()
    h.grad_fn.register_hook(lambda grads, outputs: seen.append(grads[0].clone()))
    h.grad_fn.register_prehook(lambda grads: tuple(3 * g for g in grads))
    return weighted(model(h))


def _multi_grad(x: Tensor, model: nn.Module, seen: list[Any]) -> Tensor:
    a, b = made(x).exp(), made(x).tanh()
    torch.autograd.graph.register_multi_grad_hook((a, b), lambda grads: seen.extend(g.clone() for g in grads))
    return weighted(model(a * b))


def _accumulated(x: Tensor, model: nn.Module, seen: list[Any]) -> Tensor:
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    return weighted(model(made(x).exp()))


def _module_hooks(x: Tensor, model: nn.Module, seen: list[Any]) -> Tensor:
    for module in model.modules():
        module.register_full_backward_hook(lambda m, i, o: seen.extend(g.clone() for g in (*i, *o) if g is not None))
        module.register_full_backward_pre_hook(lambda m, o: tuple(2 * g for g in o))
        module.register_forward_hook(lambda m, i, o: o * 1.5)
        module.register_forward_pre_hook(lambda m, i: tuple(t.neg() for t in i))
    return weighted(model(made(x).exp()))


@pytest.mark.parametrize("how", [_retained, _scaled, _node_hooks, _multi_grad, _accumulated, _module_hooks])
@pytest.mark.parametrize("bits", [2, 32])
def test_hooks_on_tensors_nodes_and_modules(how: Callable[..., Tensor], bits: int) -> None:
    """They are called as often as plainly, and at 32 bits with the very same gradients."""

    def run(context: Any) -> tuple[list[Any], list[Tensor]]:
        torch.manual_seed(3)
        model, x, seen = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, 8)), leaf(), list[Any]()
        with context:
            loss = how(x, model, seen)
        loss.backward()
        return seen, [t.grad for t in (x, *model.parameters()) if t.grad is not None]

    plain, want = run(torch.enable_grad())
    seen, got = run(compress_activations(bits=bits, min_bytes=0))
    assert len(seen) == len(plain) > 0
    assert len(got) == len(want)
    for a, b in zip([*plain, *want], [*seen, *got], strict=True):
        if isinstance(a, Tensor):
            assert a.shape == b.shape
            assert b.isfinite().all()
            assert torch.equal(a, b) or bits == 2
        else:
            assert a == b


@pytest.mark.parametrize("inside", [True, False])
def test_other_hooks_on_saved_tensors(inside: bool) -> None:
    """Only the innermost pair applies, as PyTorch says."""
    x = leaf()
    offload, context = torch.autograd.graph.save_on_cpu(), compress_activations(bits=2, min_bytes=0)
    if inside:
        with context as ledger, offload:
            loss = made(x).exp().sum()
    else:
        with offload, context as ledger:
            loss = made(x).exp().sum()
    loss.backward()
    assert len(ledger) == (not inside)
    assert x.grad is not None
    assert torch.equal(x.grad, x.detach().exp()) == inside


# -- contexts ----------------------------------------------------------------------------------------------------


def test_fresh_noise_each_time_and_the_same_for_the_same_seed() -> None:
    model, x = network(), leaf()
    context = compress_activations(bits=2, seed=4, min_bytes=0, recompute="off")
    first, second = gradient(model, x, context), gradient(model, x, context)
    assert not torch.equal(first, second)
    again = compress_activations(bits=2, seed=4, min_bytes=0, recompute="off")
    assert torch.equal(gradient(model, x, again), first)
    assert torch.equal(gradient(model, x, again), second)
    assert not torch.equal(
        gradient(model, x, compress_activations(bits=2, seed=5, min_bytes=0, recompute="off")), first
    )


def test_nested_contexts() -> None:
    """The inner one decides within it; the outer one, with nothing lost, around it."""
    x = leaf()
    with compress_activations(bits=32, min_bytes=0) as outer:
        a = made(x).exp().sum()
        with compress_activations(bits=1, min_bytes=0) as inner:
            b = made(x).exp().sum()
        c = made(x).tanh().sum()
    (a + b + c).backward()
    assert [entry.op for entry in outer] == ["Exp.result", "Tanh.result"]
    assert [(entry.op, entry.codec) for entry in inner] == [("Exp.result", "int1")]
    (got,) = torch.autograd.grad((made(x).exp() + made(x).tanh()).sum(), x)
    assert x.grad is not None
    assert not torch.equal(x.grad, got)


def test_the_same_object_nested_in_itself() -> None:
    x = leaf()
    context = compress_activations(bits=2, min_bytes=0)
    with context as outer, context as inner:
        loss = made(x).exp().sum()
    with context as third:
        pass
    loss.backward()
    assert (len(outer), len(inner), len(third)) == (0, 1, 0)


class Own(torch.overrides.TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("outside", [True, False])
def test_with_a_mode_of_the_users_own(outside: bool) -> None:
    x = leaf()
    own, context = Own(), compress_activations(bits=2, min_bytes=0)
    if outside:
        with own, context as ledger:
            loss = made(x).exp().sum()
    else:
        with context as ledger, own:
            loss = made(x).exp().sum()
    loss.backward()
    assert own.seen >= 3
    assert [entry.op for entry in ledger] == ["Exp.result"]


def hooks() -> int:
    module = nn.modules.module
    return len(module._global_forward_hooks) + len(module._global_forward_pre_hooks)


def packs_nothing() -> bool:
    x = leaf()
    y = made(x).exp()
    return isinstance(y.grad_fn._raw_saved_result.data, Tensor)


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        self.linear(x).exp()
        raise KeyError("mine")


def test_an_exception_leaves_nothing_behind() -> None:
    before = hooks()
    context = compress_activations(bits=2, min_bytes=0)
    with pytest.raises(KeyError, match="mine"), context:
        nn.Sequential(nn.Linear(WIDTH, WIDTH), Failing())(leaf())
    assert hooks() == before == 0
    assert not torch.overrides._get_current_function_mode_stack()
    assert packs_nothing()
    with context as ledger:
        loss = made(leaf()).exp().sum()
    loss.backward()
    assert [entry.op for entry in ledger] == ["Exp.result"]


def test_an_exception_that_is_caught_inside() -> None:
    """The path of the module is right again after it."""
    outer = nn.ModuleDict({"failing": Failing(), "good": nn.Linear(WIDTH, WIDTH)})

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = outer

        def forward(self, x: Tensor) -> Tensor:
            try:
                self.parts["failing"](x)
            except KeyError:
                x = x.exp()
            return self.parts["good"](x)

    with compress_activations(bits=2, min_bytes=0) as ledger:
        loss = Model()(made(leaf())).sum()
    loss.backward()
    assert [entry.module for entry in ledger if entry.op == "Exp.result"][-1] == "Model"
    assert "parts.good" in {entry.module for entry in ledger}


def test_no_hook_after_a_normal_end() -> None:
    with compress_activations():
        pass
    assert hooks() == 0
    assert packs_nothing()


# -- what must stay as it was ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", WIDTHS)
def test_generators_masks_and_loss_are_the_same(bits: int) -> None:
    model, x = network(), leaf()
    torch.manual_seed(8)
    want = model(x)
    state = torch.get_rng_state()
    torch.manual_seed(8)
    with compress_activations(bits=bits, min_bytes=0):
        got = model(x)
    assert torch.equal(got, want)
    assert torch.equal(torch.get_rng_state(), state)
    got.sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_no_grad_and_eval_pass_through() -> None:
    model, x = network().eval(), leaf()
    with torch.no_grad(), compress_activations(bits=1, min_bytes=0) as ledger:
        got = model(x)
    assert torch.equal(got, model(x))
    assert len(ledger) == 0
    with torch.inference_mode(), compress_activations(bits=1, min_bytes=0) as ledger:
        model(x)
    assert len(ledger) == 0


def test_tensors_of_inference_mode_as_inputs() -> None:
    """Features that another model computed: not saved by an addition, so plain autograd takes them."""
    with torch.inference_mode():
        features = torch.randn(ROWS, WIDTH)
    x = leaf()
    assert_exact(lambda: weighted(torch.tanh(x + features)), [x])


def test_outputs_are_ordinary_tensors() -> None:
    x = leaf()
    with compress_activations(bits=2, min_bytes=0):
        y = made(x).exp()
    assert type(y) is Tensor
    assert y.grad_fn.name() == "ExpBackward0"
    assert y.grad_fn._saved_result.shape == y.shape


# -- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 32])
@pytest.mark.parametrize("end", ["backward", "dropped", "exception"])
def test_nothing_is_left_behind(bits: int, end: str) -> None:
    """A loss that is dropped frees its graph; and no step is dearer than the last."""
    x, table = leaf(), leaf(ROWS, WIDTH, seed=2)
    batch = torch.randn(ROWS, WIDTH)
    model = network()
    context = compress_activations(bits=bits, min_bytes=0)

    def forward() -> Tensor:
        h = model(made(x) * table[INDEX[:ROWS]] + batch)
        rows = torch.cumsum(h, 0)[INDEX]
        rows.argsort(0)
        if end == "exception":
            raise KeyError
        return F.normalize(torch.tanh(rows + rows.flip(0))).sum()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        x.grad = table.grad = None
        try:
            with context:
                loss = forward()
        except KeyError:
            return
        if end == "backward":
            loss.backward()
        model.zero_grad(set_to_none=True)
        x.grad = table.grad = None

    gc.collect()
    with LiveBytes() as live:
        for _ in range(50):
            step()
        gc.collect()
        left = live.now
    assert left == 0


def test_the_graph_is_freed_without_the_cycle_collector() -> None:
    """An output must not hold its own node."""
    x = leaf(512, 64)
    gc.collect()
    gc.disable()
    try:
        with LiveBytes() as live:
            for bits in (2, 32):
                with compress_activations(bits=bits):
                    y = made(x).exp().tanh().sqrt()
                del y
                assert live.now <= 512 * 64, bits  # a ledger and its context may wait for the collector, no tensor
    finally:
        gc.enable()


def test_no_more_than_one_op_is_raw_at_a_time() -> None:
    """And of what is kept coarsely as much as the largest, for a finer code."""
    x = leaf(4096, 64)
    size = 4096 * 64 * 4

    def forward() -> Tensor:
        h = made(x)
        for _ in range(10):
            h = h.exp().neg().softmax(-1)
        return h.sum()

    with LiveBytes() as live, compress_activations(bits=2):
        loss = forward()
    loss.backward()
    assert live.peak < 7 * size  # 20 saved tensors, plain


# -- what functions get back -------------------------------------------------------------------------------------


class Seen(torch.autograd.Function):
    """Notes the geometry of what it saved, and of what it gets back."""

    saved: list[Any]
    restored: list[Any]

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        Seen.saved = [(t.dtype, t.shape, t.stride(), t.device, t.layout) for t in tensors]
        ctx.save_for_backward(*tensors)
        # a tensor: calls of modules and functions are untyped
        return sum(t.double().sum() for t in tensors if t.is_floating_point())  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        tensors = ctx.saved_tensors
        Seen.restored = [(t.dtype, t.shape, t.stride(), t.device, t.layout) for t in tensors]
        return tuple(
            (grad * torch.ones_like(t, dtype=torch.float64)).to(t.dtype) if t.is_floating_point() else None
            for t in tensors
        )


GEOMETRIES: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda h: h,
    "transposed": lambda h: h.t(),
    "permuted": lambda h: h.view(4, 10, -1).permute(2, 0, 1),
    "expanded": lambda h: h[:, None].expand(-1, 3, -1),
    "row": lambda h: h[3],
    "rows": lambda h: h[3:30],
    "0-d": lambda h: h[3, 3],
    "empty": lambda h: h[:0],
    "unsqueezed": lambda h: h[:, None, :, None],
    "channels last": lambda h: h.view(1, 4, 10, -1).contiguous(memory_format=torch.channels_last),
    "float64": lambda h: h.double(),
    "bfloat16": lambda h: h.bfloat16(),
    "float16": lambda h: h.half(),
    "int64": lambda h: h.detach().mul(100).long(),
    "int32": lambda h: h.detach().mul(100).int(),
    "bool": lambda h: h.detach() > 0,
    "uint8": lambda h: h.detach().abs().mul(50).byte(),
}


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("how", GEOMETRIES)
def test_custom_functions_get_back_what_they_saved(how: str, bits: int) -> None:
    x = leaf()
    with compress_activations(bits=bits, min_bytes=0) as ledger:
        h = GEOMETRIES[how](made(x))
        loss = Seen.apply(h, made(x))
    loss.backward()
    assert Seen.restored == Seen.saved
    assert len(ledger) == 2


@pytest.mark.parametrize("bits", WIDTHS)
def test_slices_come_back_in_their_shape(bits: int) -> None:
    x = leaf()
    with compress_activations(bits=bits, min_bytes=0):
        h = made(x)
        loss = Seen.apply(h[:, ::2], h[::3, 1:5], h[:, :1].expand(-1, 7))
    loss.backward()
    for saved, restored in zip(Seen.saved, Seen.restored, strict=True):
        assert saved[:2] == restored[:2]


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        y = x * x
        ctx.save_for_backward(x, mask, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, mask, y = ctx.saved_tensors
        return grad * 2 * x * mask + 0 * y, None


def test_custom_functions() -> None:
    x = leaf()
    mask = torch.rand(ROWS, WIDTH) < 0.5

    def loss() -> Tensor:
        return weighted(Square.apply(Square.apply(made(x), mask).tanh(), mask).exp())

    assert_exact(loss, [x])
    want, got = gradients(loss, [x])[0], compressed(loss, [x], 8)[0][0]
    assert 0 < float((want - got).norm() / want.norm()) < 0.05


def test_custom_function_is_the_last_op() -> None:
    x, mask = leaf(), torch.ones(ROWS, WIDTH, dtype=torch.bool)
    with compress_activations(bits=8, min_bytes=0) as ledger:
        y = Square.apply(made(x), mask)
    y.sum().backward()
    assert x.grad is not None
    assert float((x.grad - 2 * x.detach()).abs().max()) < 0.05
    assert [entry.op for entry in ledger].count("Square.tensors") == 3


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_checkpoint(reentrant: bool, bits: int) -> None:
    model, head, x = network(), nn.Linear(64, 8), leaf()

    def loss() -> Tensor:
        h = checkpoint(model, made(x), use_reentrant=reentrant)
        return weighted(head(h))

    leaves = [x, *model.parameters(), *head.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if bits == 32:
            assert_exact(loss, leaves)
        else:
            want, got = gradients(loss, leaves), compressed(loss, leaves, bits)[0]
            assert all(g.isfinite().all() for g in got)
            assert torch.equal(got[-1], want[-1])  # the head's bias


@pytest.mark.parametrize("early_stop", [True, False])
def test_nested_checkpoints(early_stop: bool) -> None:
    """With and without the early stop, which leaves a forward that is run again by an exception."""
    model, x = network(), leaf()

    def inner(h: Tensor) -> Tensor:
        return checkpoint(model, h.exp(), use_reentrant=False).tanh()

    def loss() -> Tensor:
        with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
            return weighted(checkpoint(inner, made(x), use_reentrant=False))

    leaves = [x, *model.parameters()]
    assert_exact(loss, leaves)
    with compress_activations(bits=8, min_bytes=0):  # and with the backward, and so the recomputation, inside
        total = loss()
        total.backward()
        again = weighted(model(made(x)))
    again.backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in leaves)
    assert hooks() == 0


def test_a_module_that_is_left_by_an_interrupt() -> None:
    """``always_call`` hooks are not called then; the module around it puts the path right."""

    class Interrupted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    class Patient(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.act = Interrupted(), nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            with suppress(KeyboardInterrupt):
                self.part(x)
            return self.act(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patient = Patient()

        def forward(self, x: Tensor) -> Tensor:
            return self.patient(x).exp()

    with compress_activations(bits=2, min_bytes=0, modules=["!Interrupted"]) as ledger:
        Model()(made(leaf()))
    assert [(entry.module, entry.op) for entry in ledger][-1] == ("Model", "Exp.result")


def test_checkpointed_compression() -> None:
    """The other way round: a context in the function that is checkpointed."""
    model, x = network(), leaf()

    def part(h: Tensor) -> Tensor:
        with compress_activations(bits=32, min_bytes=0):
            return model(h)

    def loss(compress: bool) -> list[Tensor]:
        torch.manual_seed(4)
        total = weighted(checkpoint(part if compress else model, made(x), use_reentrant=False))
        return list(torch.autograd.grad(total, [x, *model.parameters()]))

    for a, b in zip(loss(False), loss(True), strict=True):
        assert torch.equal(a, b)


# -- other kinds of tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", WIDTHS)
def test_autocast(bits: int) -> None:
    model, x = network(), leaf()

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return weighted(model(made(x)).float())

    leaves = [x, *model.parameters()]
    if bits == 32:
        assert_exact(loss, leaves)
        return
    want, got = gradients(loss, leaves), compressed(loss, leaves, bits)[0]
    for a, b in zip(want, got, strict=True):
        assert a.dtype == b.dtype
        assert b.isfinite().all()
        if bits == 8:
            assert float((a - b).norm() / a.norm().clamp(min=1e-6)) < 0.05


@pytest.mark.parametrize("bits", WIDTHS)
def test_float64(bits: int) -> None:
    model, x = network().double(), leaf().detach().double().requires_grad_()

    def loss() -> Tensor:
        return weighted(model(made(x)))

    leaves = [x, *model.parameters()]
    if bits == 32:
        assert_exact(loss, leaves)
        return
    want, got = gradients(loss, leaves), compressed(loss, leaves, bits)[0]
    for a, b in zip(want, got, strict=True):
        assert b.dtype == torch.float64
        assert b.isfinite().all()
        if bits == 8:
            assert float((a - b).norm() / a.norm().clamp(min=1e-6)) < 0.05


@pytest.mark.parametrize("layout", ["coo", "csr"])
@pytest.mark.parametrize("bits", [2, 32])
def test_sparse(layout: str, bits: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adjacency = torch.sparse_coo_tensor(
            torch.stack([INDEX, INDEX.flip(0)]), torch.rand(300), (ROWS, ROWS)
        ).coalesce()
        if layout == "csr":
            adjacency = adjacency.to_sparse_csr()
        x = leaf()
        assert_exact(lambda: weighted(torch.sparse.mm(adjacency, made(x))), [x], bits)
        assert_exact(lambda: weighted(adjacency @ made(x)), [x], bits)


def test_sparse_with_gradients() -> None:
    values, x = leaf(300), leaf()

    def loss() -> Tensor:
        adjacency = torch.sparse_coo_tensor(torch.stack([INDEX, INDEX.flip(0)]), values, (ROWS, ROWS))
        return weighted(torch.sparse.mm(adjacency, made(x)))

    assert_exact(loss, [values, x])


@pytest.mark.parametrize("layout", ["coo", "csr"])
@pytest.mark.parametrize("bits", [2, 4, 8, 32])
def test_what_is_made_of_the_values_of_a_sparse_matrix(layout: str, bits: int) -> None:
    """They are a view, of a matrix that has no storage to look into."""
    edges, weights, layer = torch.stack([INDEX, INDEX.flip(0)]), leaf(300), nn.Linear(1, 64)

    def loss() -> Tensor:
        matrix = torch.sparse_coo_tensor(edges, made(weights), (ROWS, ROWS)).coalesce()
        matrix = matrix.to_sparse_csr() if layout == "csr" else matrix
        scores = torch.sigmoid(layer(matrix.values()[:, None].exp()).relu())
        return weighted(scores * matrix.detach().values()[:, None].tanh())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if bits == 32:
            assert_exact(loss, [weights, *layer.parameters()])
        (_, *got), _ = compressed(loss, [weights, *layer.parameters()], bits)
        (_, *want) = gradients(loss, [weights, *layer.parameters()])
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= (0.5 if bits == 2 else 0.2) * b.norm()


def test_complex() -> None:
    x = leaf()

    def loss() -> Tensor:
        spectrum = torch.fft.rfft(made(x))
        return (spectrum * spectrum.conj() * 2).real.sum() + torch.fft.irfft(spectrum.exp()).sum()

    assert_exact(loss, [x])


def test_a_complex_factor_comes_back_with_its_strides() -> None:
    """Those of dimensions of size 1 may be any, and with others a kernel may take another path."""
    x = leaf(300)
    with compress_activations(8, min_bytes=0):
        column = torch.complex(made(x), made(x)).as_strided((300, 1), (1, 7))
        product = column * column
    saved = cast(Any, product.grad_fn)._saved_self
    assert saved.stride() == (1, 7)
    assert 0 < (saved - column).abs().max() < 0.1


@pytest.mark.parametrize("bits", WIDTHS)
def test_empty_and_scalar_tensors(bits: int) -> None:
    x = leaf()

    def loss() -> Tensor:
        h = made(x)
        nothing = h[:0]
        return (nothing.exp() * nothing).sum() + h[0, 0].exp() * h[1, 1] + h.mean() ** 2

    want, got = gradients(loss, [x])[0], compressed(loss, [x], bits)[0][0]
    assert identical(want, got) if bits == 32 else got.isfinite().all()


# -- arguments ---------------------------------------------------------------------------------------------------


def test_min_bytes() -> None:
    x = leaf(64, 64)

    def forward(min_bytes: int) -> set[str]:
        with compress_activations(bits=2, min_bytes=min_bytes) as ledger:
            loss = (made(x).exp().sum(1).tanh()).sum()
        loss.backward()
        return {f"{entry.op} {entry.codec} {entry.shape}" for entry in ledger}

    size = 64 * 64 * 4
    assert "Exp.result int2 (64, 64)" in forward(0)
    assert "Exp.result int2 (64, 64)" in forward(size)
    assert "Exp.result exact (64, 64)" in forward(size + 1)
    assert "Tanh.result exact (64,)" in forward(257)
    assert "Tanh.result exact (64,)" not in forward(256)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits must be one of 1, 2, 4, 8, 32, got 3"),
        ({"bits": 0}, "bits must be one of 1, 2, 4, 8, 32, got 0"),
        ({"bits": True}, "bits must be one of 1, 2, 4, 8, 32, got True"),
        ({"bits": "2"}, "bits must be one of 1, 2, 4, 8, 32, got '2'"),
        ({"bits": 2.0}, r"bits must be one of 1, 2, 4, 8, 32, got 2\.0"),
        ({"group_size": 0}, "group_size must be a whole number of at least 1, or None, got 0"),
        ({"group_size": 1.5}, "group_size must be a whole number of at least 1, or None, got 1.5"),
        ({"seed": None}, "seed must be a whole number of at least 0, got None"),
        ({"modules": ["head", 3]}, "modules must be module paths, class names or classes, got 3"),
        ({"min_bytes": -1}, "min_bytes must be a whole number of at least 0, got -1"),
        ({"recipe": "magic"}, "recipe must be one of rules, paper, got 'magic'"),
        ({"recipe": "paper", "bits": 32}, "recipe='paper' has no exact mode"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compress_activations(**options)


@pytest.mark.parametrize("group_size", [1, 16, 63, 64, 4096])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_group_sizes(group_size: int, bits: int) -> None:
    x = leaf()
    loss = lambda: weighted(made(x).exp())  # noqa: E731  # a line is enough
    got = compressed(loss, [x], bits, group_size=group_size)[0][0]
    assert got.isfinite().all()


def test_smaller_groups_less_error() -> None:
    x = torch.cat([leaf().detach() * 10.0**k for k in range(-3, 1)]).requires_grad_()
    loss = lambda: weighted(made(x) ** 2)  # noqa: E731  # a line is enough
    want = gradients(loss, [x])[0]
    errors = []
    for group_size in (8, 32, 128, 4096):
        draws = [compressed(loss, [x], 2, group_size=group_size, seed=k)[0][0] - want for k in range(5)]
        errors.append(sum(float(d.square().sum()) for d in draws))
    assert errors == sorted(errors)


NESTED: dict[str, Callable[[Tensor, nn.Linear], Tensor]] = {
    "strided": lambda x, layer: torch.nested.to_padded_tensor(F.gelu(layer(x)), 0.0).tanh(),
    "jagged": lambda x, layer: (F.gelu(layer(x)) * x).values(),
    "attention": lambda x, layer: _attention(layer(x).unflatten(-1, [2, -1]).transpose(1, 2)).values(),
}


def _attention(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x).transpose(1, 2).flatten(-2)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("name", NESTED)
def test_nested_tensors_are_kept_as_they_are(name: str, bits: int) -> None:
    """Of a strided one nobody may ask the shape."""
    torch.manual_seed(0)
    layer, rows = nn.Linear(WIDTH, WIDTH), [leaf(length, WIDTH, seed=length) for length in (5, 17, 9)]
    layout = torch.strided if name == "strided" else torch.jagged

    def loss() -> Tensor:
        return NESTED[name](torch.nested.as_nested_tensor(rows, layout=layout), layer).sum()

    want = gradients(loss, [*rows, layer.weight])
    for got, exact in zip(compressed(loss, [*rows, layer.weight], bits, min_bytes=0)[0], want, strict=True):
        assert (got - exact).norm() <= (0.0 if bits == 32 else 0.05) * exact.norm()
