"""``keep_exact()``: a region in which nothing is rounded, whatever is entered around it."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from comparing import gradients, made, weighted
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, jacrev, vjp, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_tinykg import Ledger, compress_activations, keep_exact
from lightning_tinykg.activations.keeping import Saved
from lightning_tinykg.activations.observer import THREAD

ROWS, WIDTH = 40, 32


def leaf(seed: int = 0) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def tiny(**options: Any) -> compress_activations:
    return compress_activations(**({"bits": 2, "min_bytes": 0} | options))


def rounded(ledger: Ledger) -> list[str]:
    return [entry.op for entry in ledger if entry.codec.startswith("int") and " as " not in entry.codec]


def packed(tensor: Tensor) -> bool:
    return isinstance(tensor.grad_fn._raw_saved_result.data, Saved)  # type: ignore[union-attr]  # there is one


def gradient(of: Callable[[Tensor], Tensor], context: AbstractContextManager[Any]) -> Tensor:
    x = leaf()
    with context:
        loss = weighted(of(made(x)))
    loss.backward()
    assert x.grad is not None
    return x.grad


def test_nothing_within_is_rounded() -> None:
    def partly(h: Tensor) -> Tensor:
        with keep_exact():
            return h.exp().tanh()

    def wholly(h: Tensor) -> Tensor:
        return h.exp().tanh()

    want = gradient(wholly, nullcontext())
    assert torch.equal(gradient(partly, tiny()), want)
    assert not torch.equal(gradient(wholly, tiny()), want)


def test_only_the_region_is_exact() -> None:
    x = leaf()
    with tiny() as ledger:
        h = made(x).exp()
        with keep_exact():
            h = h.neg().exp()
            with keep_exact():
                h = h.sin()
            h = h.neg().exp()
        loss = h.cumsum(0).cos().sum()
    loss.backward()
    assert rounded(ledger) == ["Exp.result", "Cos.self"]
    assert [entry.op for entry in ledger] == ["Exp.result", "Exp.result", "Sin.self", "Exp.result", "Cos.self"]


def test_lossless_forms_are_still_used() -> None:
    x, index = leaf(), torch.randint(ROWS, (400,), generator=torch.Generator().manual_seed(0))
    with tiny() as ledger, keep_exact():
        loss = weighted(made(x)[index].tanh() * torch.cumsum(x, 0)[index])
    loss.backward()
    assert not rounded(ledger)
    assert "gather" in {entry.codec for entry in ledger}


@pytest.mark.parametrize("options", [{}, {"recipe": "paper"}, {"modules": ["1"]}, {"modules": [nn.Tanh]}], ids=str)
def test_it_wins_over_every_setting(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
    x = torch.randn(ROWS, WIDTH)
    leaves = list(model.parameters())
    want = gradients(lambda: weighted(model(x)), leaves)
    with tiny(**options) as ledger, keep_exact():
        loss = weighted(model(x))
    got = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert not rounded(ledger)
    with tiny(recompute="off", **options) as ledger:
        model(x)
    assert rounded(ledger)


def test_it_opts_out_of_the_innermost_context() -> None:
    x = leaf()
    with tiny() as outer:
        with tiny() as inner, keep_exact():
            a = made(x).exp()
        b = made(x).exp()
        with keep_exact():
            with tiny() as within:  # the innermost decides
                c = made(x).exp()
            d = made(x).exp()
    (a + b + c + d).sum().backward()
    assert (rounded(outer), rounded(inner), rounded(within)) == (["Exp.result"], [], ["Exp.result"])
    assert (len(outer), len(inner), len(within)) == (2, 1, 1)


@pytest.mark.parametrize("hooks", [True, False])
def test_outside_of_a_context_it_does_nothing(hooks: bool) -> None:
    x = leaf()
    with keep_exact(hooks=hooks):
        y = made(x).exp()
        assert not packed(y)
        with tiny() as ledger:
            loss = made(x).exp().sum()
    loss.backward()
    assert rounded(ledger) == ["Exp.result"]


@pytest.mark.parametrize("hooks", [True, False])
def test_an_exception_ends_it(hooks: bool) -> None:
    x = leaf()
    with tiny() as ledger:
        with pytest.raises(KeyError), keep_exact(hooks=hooks):
            raise KeyError
        loss = made(x).exp().sum()
    loss.backward()
    assert rounded(ledger) == ["Exp.result"]


def test_as_a_decorator() -> None:
    class Head(nn.Module):
        @keep_exact()
        def forward(self, x: Tensor, depth: int = 2) -> Any:
            return self(x, depth - 1).exp() if depth else x.neg()

    x, head = leaf(), Head()
    for _ in range(2):
        with tiny() as ledger:
            loss = head(made(x)).sum() + made(x).cos().sum()
        loss.backward()
        assert rounded(ledger) == ["Cos.self"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_in_what_is_checkpointed(reentrant: bool) -> None:
    """The region is entered again when the forward is run again, within the context or after it."""

    def part(h: Tensor) -> Tensor:
        with keep_exact():
            return h.exp().tanh()

    def run(h: Tensor) -> Tensor:
        return checkpoint(part, h, use_reentrant=reentrant)

    want = gradient(part, nullcontext())
    got = gradient(run, tiny())  # what goes into a checkpoint is saved outside of it, and rounded
    assert 0 < float((got - want).norm() / want.norm()) < 1
    x = leaf()
    with tiny() as ledger:
        with keep_exact():
            h = made(x)
            loss = weighted(run(h))
            loss.backward()
        assert not rounded(ledger)
    assert torch.equal(x.grad, want)  # type: ignore[arg-type]  # there is one, after a backward


def test_on_a_thread_of_autograds() -> None:
    """On CUDA, backward within a context runs a checkpointed forward on another thread, which is lent the hooks."""
    x, kept = leaf(), list[Tensor]()
    with tiny() as ledger:
        hooks = torch.autograd.graph.saved_tensors_hooks(THREAD.observers[-1].pack, Saved.unpack)

        def rerun() -> None:
            with hooks:
                kept.append(made(x).exp())
                with keep_exact():
                    kept.append(made(x).exp())

        thread = threading.Thread(target=rerun)
        thread.start()
        thread.join()
        with keep_exact():
            thread = threading.Thread(target=rerun)
            thread.start()
            thread.join()
    assert len(rounded(ledger)) == 1
    sum(y.sum() for y in kept).backward()  # type: ignore[union-attr]  # tensors, and no 0


def test_changing_what_is_kept_exactly_raises() -> None:
    x = leaf()
    with tiny(), keep_exact():
        y = made(x).exp()
    y.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_double_backward_within() -> None:
    """A gradient penalty in full precision, beside a loss that is compressed."""
    weight = leaf(1)[:WIDTH].detach().requires_grad_()

    def penalty(context: AbstractContextManager[Any], region: AbstractContextManager[Any]) -> Tensor:
        x = leaf()
        with context:
            other = (made(x) @ weight).exp().sum()
            with region:
                loss = (made(x) @ weight).tanh().square().sum()
                (g,) = torch.autograd.grad(loss, x, create_graph=True)
                total = (g.norm(dim=-1) - 1).square().sum()
        other.backward()
        (grad,) = torch.autograd.grad(total, weight)
        return grad

    want = penalty(nullcontext(), nullcontext())
    assert torch.equal(penalty(tiny(), keep_exact()), want)
    assert not torch.equal(penalty(tiny(), nullcontext()), want)


# -- without hooks -----------------------------------------------------------------------------------------------


def test_without_hooks_autograd_keeps_the_tensors_itself() -> None:
    x = leaf()
    with tiny() as outer, tiny() as inner:
        with keep_exact(hooks=False):
            a = made(x).exp()
            with keep_exact():
                assert not packed(made(x).exp())
        b = made(x).exp()
    assert not packed(a)
    assert packed(b)
    assert (len(outer), len(inner)) == (0, 1)
    (a + b).sum().backward()


def test_without_hooks_leaves_the_users_own_alone() -> None:
    seen: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor.detach()

    x = leaf()
    with tiny(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), keep_exact(hooks=False):
        made(x).exp()
    assert len(seen) == 1
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), tiny() as ledger:
        with keep_exact(hooks=False):
            made(x).exp()
        made(x).exp()
    assert len(seen) == 2
    assert len(ledger) == 1


def _score(x: Tensor) -> Tensor:
    return (x.exp() * x).sum()


TRANSFORMS: dict[str, Callable[[Tensor], Any]] = {
    "grad": lambda x: grad(_score)(x),
    "vjp": lambda x: vjp(_score, x)[1](torch.ones(()))[0],
    "jacrev": lambda x: jacrev(torch.tanh)(x[0]),
    "hessian": lambda x: hessian(_score)(x[0]),
    "vmap of grad": lambda x: vmap(grad(_score))(x),
    "jacfwd of grad": lambda x: jacfwd(grad(_score))(x[0]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func_runs_without_hooks(name: str) -> None:
    """And what it computes can be trained through."""

    def loss(h: Tensor) -> Tensor:
        with keep_exact(hooks=False):
            # a tensor: calls of modules and functions are untyped
            return TRANSFORMS[name](h).sin()  # type: ignore[no-any-return]

    assert torch.equal(gradient(loss, tiny()), gradient(loss, nullcontext()))
    torch.manual_seed(0)
    model = nn.Linear(WIDTH, WIDTH)
    x = torch.randn(ROWS, WIDTH)
    with tiny() as ledger:
        total = weighted(loss(F.relu(model(x))))
    total.backward()
    assert ("Relu.result", "mask") in {(entry.op, entry.codec) for entry in ledger}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_without_hooks_on_an_old_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        """``torch._C._autograd`` before 2.8."""

    monkeypatch.setattr(torch._C, "_autograd", Old())
    with pytest.raises(RuntimeError, match=r"needs PyTorch 2\.8 or later, this is"), keep_exact(hooks=False):
        pass
