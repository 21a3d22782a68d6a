"""What can't be compressed says so and says what to do; what is only next to it works."""

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from comparing import assert_exact, gradients, made, weighted
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from lightning_tinykg import compress_activations
from lightning_tinykg.codecs import kernels

ROWS, WIDTH = 40, 32


def leaf(seed: int = 0) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def tiny(**options: Any) -> compress_activations:
    return compress_activations(**({"bits": 2, "min_bytes": 0} | options))


def score(x: Tensor) -> Tensor:
    return (x.exp() * x).sum()


def assert_clean() -> None:
    """Nothing is left that looks at what autograd saves, at ops or at modules."""
    modules = nn.modules.module
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert not torch._C._len_torch_function_stack()
    assert not modules._global_forward_hooks
    assert not modules._global_forward_pre_hooks


# -- what does not run under hooks -------------------------------------------------------------------------------

ADVICE = r"works by saved-tensor hooks\. torch\.func\.grad, .*keep_exact\(hooks=False\).*torch\.autograd\.grad"


def disabled() -> None:
    with disable_saved_tensors_hooks("not here"):
        pass


REFUSED: dict[str, Callable[[], Any]] = {
    "grad": lambda: grad(score)(leaf()),
    "vjp": lambda: vjp(score, leaf()),
    "jacrev": lambda: jacrev(score)(leaf()),
    "hessian": lambda: hessian(score)(leaf()[0]),
    "vmap of grad": lambda: vmap(grad(score))(leaf()),
    "disabled": disabled,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_refuses_hooks_says_what_to_do(name: str) -> None:
    """PyTorch's own error keeps its type and message, and gets advice."""
    with pytest.raises(RuntimeError, match=ADVICE) as caught, tiny(), tiny():
        REFUSED[name]()
    assert len(caught.value.__notes__) == 1
    assert "saved tensor hooks" in str(caught.value) or str(caught.value) == "not here"
    assert_clean()
    REFUSED[name]()


def test_other_errors_get_no_advice() -> None:
    for error in (RuntimeError("disabled"), KeyError("mine")):
        with pytest.raises(type(error)) as caught, tiny():
            raise error
        assert not getattr(caught.value, "__notes__", [])
    with pytest.raises(RuntimeError, match="shapes") as caught, tiny():
        leaf() @ leaf()
    assert not getattr(caught.value, "__notes__", [])


def test_entered_where_hooks_are_switched_off() -> None:
    message = r"hooks, which are switched off here: enter it outside of torch\.func\.grad, .*\(.*{}.*\)"

    def inside(x: Tensor) -> Tensor:
        with tiny():
            return score(x)

    with pytest.raises(RuntimeError, match=message.format("not here")), disable_saved_tensors_hooks("not here"), tiny():
        pass
    assert_clean()
    for transform in (grad, jacrev):
        with pytest.raises(RuntimeError, match=message.format("saved tensor hooks")):
            transform(inside)(leaf())
        assert_clean()
    context = tiny()
    with pytest.raises(RuntimeError, match="switched off"), disable_saved_tensors_hooks("not here"), context:
        pass
    assert context.state_dict()["step"] == 0
    with context as ledger:
        loss = made(leaf()).exp().sum()
    loss.backward()
    assert len(ledger) == 1


# -- what does run under them ------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(10, WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.act = nn.Tanh()

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        h = self.act(self.linear(x)) * self.table(index)
        return (h.exp() * h).relu()


INDEX = torch.randint(10, (ROWS,), generator=torch.Generator().manual_seed(0))

RUNS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "vmap": lambda net, x: vmap(net)(x, INDEX),
    "vmap of vmap": lambda net, x: vmap(vmap(net))(x.view(4, 10, -1), INDEX.view(4, 10)),
    "vmap in chunks": lambda net, x: vmap(net, chunk_size=16)(x, INDEX),
    "jvp": lambda net, x: sum(jvp(lambda h: net(h, INDEX), (x,), (torch.ones_like(x),))),
    "vmap of jvp": lambda net, x: vmap(lambda r, i: sum(jvp(lambda h: net(h, i), (r,), (torch.ones_like(r),))))(
        x, INDEX
    ),
    "jacfwd": lambda net, x: jacfwd(lambda h: net(h, INDEX[:3]))(x[:3]),
    "functional_call": lambda net, x: functional_call(net, dict(net.named_parameters()), (x, INDEX)),
}


@pytest.mark.parametrize("name", RUNS)
def test_transforms_that_work(name: str) -> None:
    """Exact at 32 bits; at 8 bits compressed, and close."""
    net, x = Net(), leaf()
    leaves = [x, *net.parameters()]

    def loss() -> Tensor:
        return weighted(RUNS[name](net, made(x)))

    want = gradients(loss, leaves)
    assert_exact(loss, leaves)
    with tiny(bits=8) as ledger:
        total = loss()
    got = torch.autograd.grad(total, leaves)
    for a, b in zip(want, got, strict=True):
        assert float((a - b).norm() / a.norm()) < 0.1
    assert any(entry.codec == "int8" for entry in ledger)


@pytest.mark.parametrize("bits", [2, 32])
def test_what_was_vmapped_and_changed_in_place(bits: int) -> None:
    """An ingredient that is gathered from, then overwritten beneath ``vmap``."""
    x = leaf()

    def loss() -> Tensor:
        table = torch.cumsum(x, 0)
        total = (table[INDEX] * leaf(1)).sum()
        vmap(lambda row: row.mul_(2.0))(table)
        return total + table.sum()

    if bits == 32:
        assert_exact(loss, [x])
    else:
        want = gradients(loss, [x])[0]
        with tiny(bits=8):
            total = loss()
        (got,) = torch.autograd.grad(total, x)
        assert float((got - want).norm() / want.norm()) < 0.05


@pytest.mark.parametrize("kernel", ["native", "reference"])  # native code has no tangents, PyTorch's ops would
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("bits", [2, 32])
def test_forward_mode(bits: int, inside: bool, kernel: str) -> None:
    """Tangents are exact, and gradients of a dual loss are as of any other."""
    net, x = Net(), leaf()

    def run(context: Any) -> tuple[Tensor, Tensor]:
        net.zero_grad()
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(made(x), torch.ones(ROWS, WIDTH))
            with context:
                loss = weighted(net(dual, INDEX))
                tangent = forward_ad.unpack_dual(loss).tangent.detach().clone()
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
            grads = torch.cat([forward_ad.unpack_dual(p.grad).primal.flatten() for p in net.parameters()])
        return tangent, grads.clone()

    tangent, want = run(torch.enable_grad())
    with kernels.use(kernel):
        # at 2 bits everything would be made again of what is exact
        again, got = run(tiny(bits=bits, recompute="cheap" if bits == 32 else "off"))
    assert torch.equal(again, tangent)
    assert torch.equal(got, want) == (bits == 32)
    assert got.isfinite().all()


def test_batched_gradients() -> None:
    x = leaf()
    with tiny():
        y = made(x).cumsum(0).exp().tanh().sum(0)
    basis = torch.eye(WIDTH)
    (batched,) = torch.autograd.grad(y, x, basis, is_grads_batched=True, retain_graph=True)
    one_by_one = torch.stack([torch.autograd.grad(y, x, row, retain_graph=True)[0] for row in basis])
    assert torch.equal(batched, one_by_one)


@pytest.mark.parametrize("vectorize", [True, False])
def test_jacobian_of_autograd(vectorize: bool) -> None:
    x = leaf().detach()[0]
    with tiny(bits=32):
        got = torch.autograd.functional.jacobian(torch.tanh, x, vectorize=vectorize)
        second = torch.autograd.functional.hessian(score, x, vectorize=vectorize)
    assert torch.equal(got, torch.autograd.functional.jacobian(torch.tanh, x))
    assert torch.equal(second, torch.autograd.functional.hessian(score, x))


# -- threads -----------------------------------------------------------------------------------------------------


def in_a_thread(work: Callable[[], Any]) -> Any:
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


def test_a_context_is_its_threads() -> None:
    """Modules that run in another thread neither move the path nor become known, and are not compressed."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
    other = nn.Sequential(nn.ELU())
    entered, go_on = threading.Event(), threading.Event()

    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            entered.set()
            go_on.wait(10)
            return x.exp()

    class Prefetching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            kept: list[Tensor] = []
            thread = threading.Thread(target=lambda: kept.append(nn.Sequential(Slow(), other)(made(leaf()))))
            thread.start()
            entered.wait(10)
            x = self.model(x).exp()  # while another thread is within another module
            go_on.set()
            thread.join()
            x = x.sin()  # and after it has left
            assert isinstance(kept[0].grad_fn._raw_saved_self.data, Tensor)  # type: ignore[union-attr]  # there is one
            return x

    with tiny() as ledger:
        loss = Prefetching()(made(leaf())).sum()
    loss.backward()
    where = {entry.op: entry.module for entry in ledger}
    assert where["Tanh.result"] == "model.1"
    assert where["Exp.result"] == where["Sin.self"] == "Prefetching"
    assert "Elu.self" not in where


@pytest.mark.parametrize("shared", [True, False])
def test_contexts_in_two_threads_at_once(shared: bool) -> None:
    """Each sees its own; one and the same object, too, can be entered by both."""
    contexts = [tiny(bits=8)] * 2 if shared else [tiny(bits=8), tiny(bits=8)]
    meet = threading.Barrier(2, timeout=20)
    x = [leaf(0), leaf(1)]
    found: list[Any] = [None, None]

    def work(number: int) -> None:
        model = nn.Sequential(nn.ELU() if number else nn.GELU())
        meet.wait()
        with contexts[number] as ledger:
            meet.wait()
            loss = model(made(x[number])).sum()
            meet.wait()
            if number:
                meet.wait()  # the other leaves first
        if not number:
            meet.wait()
        loss.backward()
        found[number] = [(entry.module, entry.op, entry.codec) for entry in ledger]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [[("0", "Gelu.self", "int8")], [("0", "Elu.self", "int8")]]
    want = [torch.autograd.grad(kind(made(t)).sum(), t)[0] for kind, t in zip((nn.GELU(), nn.ELU()), x, strict=True)]
    for a, t in zip(want, x, strict=True):
        assert float((a - t.grad).norm() / a.norm()) < 0.05  # type: ignore[operator]  # there is one, after a backward
    assert_clean()


@pytest.mark.parametrize("bits", [2, 32])
def test_backward_in_another_thread(bits: int) -> None:
    net, x = Net(), leaf()

    def forward() -> Tensor:
        with tiny(bits=bits):
            return weighted(net(made(x), INDEX))

    want = torch.autograd.grad(forward(), list(net.parameters()))
    loss = forward()
    got = in_a_thread(lambda: torch.autograd.grad(loss, list(net.parameters())))
    for a, b in zip(want, got, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a, b) or bits == 2
    loss = in_a_thread(forward)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(net.parameters())))


def test_left_in_another_thread() -> None:
    context = tiny()
    context.__enter__()
    try:
        with pytest.raises(RuntimeError, match="left in a thread that has not entered it"):
            in_a_thread(lambda: context.__exit__(None, None, None))
        in_a_thread(assert_nothing_packed)
    finally:
        context.__exit__(None, None, None)
    assert_clean()


def assert_nothing_packed() -> None:
    # there is one
    assert isinstance(made(leaf()).exp().grad_fn._raw_saved_result.data, Tensor)  # type: ignore[union-attr]


# -- generators and order ----------------------------------------------------------------------------------------


def steps(x: Tensor, **options: Any) -> Iterator[Tensor]:
    """A generator that computes on within its context."""
    with tiny(**options):
        y = made(x).exp()
        yield y
        yield y.neg().exp()


def test_a_context_in_a_generator() -> None:
    x = leaf()
    with tiny() as ledger:
        first, second = steps(x)
    (first + second).sum().backward()
    assert len(ledger) == 0
    assert_clean()


def test_a_generator_that_is_dropped_half_way() -> None:
    x = leaf()
    generator = steps(x)
    y = next(generator)
    del generator
    gc.collect()
    assert_clean()
    y.sum().backward()


def test_contexts_that_overlap_are_told() -> None:
    """One that is left before what was entered after it would leave the other's hooks on, or take them off."""
    x = leaf()
    generator = steps(x)
    next(generator)

    def overlap() -> None:
        with tiny():
            next(generator)
            generator.close()

    with pytest.raises(RuntimeError, match=r"left before a context that was entered after it: .* generator"):
        overlap()
    assert_clean()
    with tiny() as ledger:
        loss = made(x).exp().sum()
    loss.backward()
    assert len(ledger) == 1


def test_what_is_saved_by_a_context_that_was_left_too_early() -> None:
    """It is kept as it is, and by an alias, so that the graph does not hold itself."""
    first, second = tiny(), tiny()
    x = leaf()
    first.__enter__()
    second.__enter__()
    with pytest.raises(RuntimeError, match="left before"):
        first.__exit__(None, None, None)
    y, z = made(x).exp(), made(x).exp()
    second.__exit__(None, None, None)
    assert_clean()
    z.sum().backward()
    assert torch.equal(x.grad, z)  # type: ignore[arg-type]  # there is one, after a backward
    y.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        y.sum().backward()
    saved = weakref.ref(y.grad_fn._raw_saved_result.data)  # type: ignore[union-attr]  # there is one
    del y
    assert saved() is None


# -- state -------------------------------------------------------------------------------------------------------


def train(model: nn.Module, context: compress_activations, batches: list[Tensor]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in batches:
        with context:
            loss = weighted(model(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_a_plain_loop_resumes(tmp_path: Any) -> None:
    """From a checkpoint of plain primitives, bit for bit; without the context's part it would differ."""

    def new() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4))

    batches = [torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(k)) for k in range(6)]
    whole = new()
    train(whole, tiny(seed=3, recompute="off"), batches)

    model, context = new(), tiny(seed=3, recompute="off")
    train(model, context, batches[:2])
    torch.save({"model": model.state_dict(), "tinykg": context.state_dict()}, tmp_path / "loop.pt")
    checkpoint = torch.load(tmp_path / "loop.pt", weights_only=True)
    assert checkpoint["tinykg"].items() >= {"step": 2, "epoch": 0}.items()
    for forgetful in (False, True):
        model, context = new(), tiny(seed=3, recompute="off")
        model.load_state_dict(checkpoint["model"])
        if not forgetful:
            context.load_state_dict(checkpoint["tinykg"])
        train(model, context, batches[2:])
        same = all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))
        assert same != forgetful


@pytest.mark.parametrize("state", [{}, {"step": -1}, {"step": "2"}, {"step": None}, {"step": 1.5}], ids=str)
def test_a_state_of_something_else_is_refused(state: Any) -> None:
    context = tiny()
    with pytest.raises(ValueError, match=r"state_dict\['step'\] must be a whole number of at least 0, got"):
        context.load_state_dict(state)
    assert context.step == 0


@pytest.mark.parametrize("largest", [[1], 3, [1, 2.5], ["1", "2"], None], ids=str)
def test_a_largest_step_of_something_else_is_refused(largest: Any) -> None:
    with pytest.raises(ValueError, match=r"state_dict\['largest_step'\] must be two integers, got"):
        tiny().load_state_dict({"step": 1, "largest_step": largest})


def test_the_context_can_be_copied_and_pickled() -> None:
    context = tiny(seed=7)
    with context:
        twins = [copy.deepcopy(tiny(seed=7)), pickle.loads(pickle.dumps(tiny(seed=7)))]
    for twin in twins:
        twin.load_state_dict(context.state_dict())
        assert (twin.step, twin.seed, twin.bits) == (1, 7, 2)
        with twin as ledger:
            made(leaf()).exp()
        assert len(ledger) == 1
