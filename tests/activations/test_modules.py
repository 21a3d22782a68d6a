"""``modules=``: where to compress."""

import warnings
from typing import Any

import pytest
import torch
from comparing import weighted
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_tinykg import Ledger, compress_activations


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.act = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(x))


class Special(Block):
    pass


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block(), Special()])
        self.head = nn.Sequential(nn.Linear(32, 32), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x).exp()


INNER = {"layers.0.act", "layers.1.act", "layers.2.act", "head.1"}
ALL = INNER | {"Model"}


def run(modules: Any, root: bool = False) -> tuple[Ledger, Model]:
    torch.manual_seed(0)
    model = Model()
    x = torch.randn(100, 32)
    options = {"root": model} if root else {}
    with compress_activations(bits=8, min_bytes=0, recompute="off", modules=modules, **options) as ledger:
        loss = weighted(model(x))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    return ledger, model


def compressed_modules(ledger: Ledger) -> set[str]:
    """Where something of the activations' own (not a weight, not the batch) is kept in a code."""
    return {entry.module for entry in ledger if entry.codec.startswith("int")} & ALL


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (None, ALL),
        ([], ALL),
        (["layers.0"], {"layers.0.act"}),
        (["layers.0.act"], {"layers.0.act"}),
        (["layers.*"], {"layers.0.act", "layers.1.act", "layers.2.act"}),
        (["layers.[01]"], {"layers.0.act", "layers.1.act"}),
        (["*.act"], {"layers.0.act", "layers.1.act", "layers.2.act"}),
        (["Tanh"], {"layers.0.act", "layers.1.act", "layers.2.act"}),
        ([nn.GELU], {"head.1"}),
        ([Block], {"layers.0.act", "layers.1.act", "layers.2.act"}),
        (["Block"], {"layers.0.act", "layers.1.act"}),
        ([Special, "head"], {"layers.2.act", "head.1"}),
        (["Model"], ALL),
        (["!layers.1"], ALL - {"layers.1.act"}),
        (["!layers.*"], {"head.1", "Model"}),
        (["!Tanh"], {"head.1", "Model"}),
        (["!Special", "!head"], {"layers.0.act", "layers.1.act", "Model"}),
        (["layers.*", "!layers.1"], {"layers.0.act", "layers.2.act"}),
        (["layers.*", "!layers.1", "layers.1.act"], {"layers.0.act", "layers.2.act"}),
        (["!Model"], set()),
    ],
)
@pytest.mark.parametrize("root", [True, False])
def test_where_to_compress(modules: Any, expected: set[str], root: bool) -> None:
    ledger, _ = run(modules, root)
    assert compressed_modules(ledger) == expected


def test_what_is_excluded_is_exact() -> None:
    _, plain = run(["!Model"])
    want = [p.grad for p in plain.parameters()]
    torch.manual_seed(0)
    model = Model()
    weighted(model(torch.randn(100, 32))).backward()
    for a, b in zip(want, model.parameters(), strict=True):
        assert torch.equal(a, b.grad)


def test_changing_what_is_excluded_raises() -> None:
    """It is kept by reference, so autograd's own check has to be made up for."""
    layers = nn.Sequential(nn.Linear(32, 32), nn.Tanh())
    with compress_activations(bits=2, min_bytes=0, modules=["!1"]):
        result = layers(torch.randn(10, 32))
    result.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_a_root_of_the_users_own_gives_the_paths() -> None:
    """What is called is a part; the paths start from the whole."""
    whole = nn.ModuleDict({"model": Model()})
    batch = torch.randn(100, 32)
    with compress_activations(bits=8, min_bytes=0, recompute="off", modules=["model.layers.0"], root=whole) as ledger:
        loss = whole["model"](batch).sum()
    loss.backward()
    assert {e.module for e in ledger if e.codec.startswith("int")} == {"model.layers.0.act"}
    assert "model.head.1" in {entry.module for entry in ledger}


def test_outside_of_any_module() -> None:
    x = torch.randn(64, 64, requires_grad=True)

    def saved(modules: Any) -> list[str]:
        with compress_activations(bits=2, modules=modules) as ledger:
            loss = (x.cumsum(0) ** 2).sum()
        loss.backward()
        return [entry.codec for entry in ledger]

    assert saved(None) == ["int2"]
    assert saved(["!head"]) == ["int2"]
    assert not saved(["head"])[0].startswith("int")


# -- what matches nothing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["layer.*"], r"modules: 'layer\.\*' matches no module of Model; the nearest: 'layers\.\d', 'layers\.\d'"),
        (["head", "!haed"], "'!haed' matches no module of Model; the nearest: 'head'"),
        (["!Tahn"], "'!Tahn' matches no module of Model; the nearest: 'Tanh'"),
        ([nn.ReLU], r"ReLU matches no module of Model; the nearest: 'GELU'"),
        ([nn.Bilinear, "qqq"], "'qqq' matches no module of Model; there are: 'Block', 'GELU', .*'head', 'head.0'"),
        (["zzz", nn.LSTM], "'zzz' matches .*; modules: LSTM matches"),
        (["0.act"], r"'0\.act' matches no module"),
    ],
    ids=str,
)
def test_a_pattern_that_matches_nothing(modules: Any, message: str) -> None:
    """It would silently compress everything, or nothing: refused where the root is known, else told once."""
    model = Model()
    with pytest.raises(ValueError, match=message):
        compress_activations(modules=modules, root=model)
    context = compress_activations(modules=modules)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with context:
            torch.randn(4, 4, requires_grad=True).exp()
    with pytest.warns(UserWarning, match=message) as told, context:
        model(torch.randn(10, 32))
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with context:
            model(torch.randn(10, 32))


def test_patterns_of_several_models_in_a_context() -> None:
    """Each has to match in one of them, whether or not the module it matches is called."""
    first, second = Model(), nn.Sequential(nn.Linear(32, 32), nn.Tanh())
    first.spare = nn.Linear(4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with compress_activations(modules=["layers.2", "!spare", "1"]) as ledger:
            second(first(torch.randn(100, 32)))
    assert {"layers.2.act", "1"} <= {entry.module for entry in ledger}


def test_no_warning_beside_an_exception() -> None:
    context = compress_activations(modules=["zzz"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="shapes"), context:
            Model()(torch.randn(10, 33))
    with pytest.warns(UserWarning, match="zzz"), context:
        Model()(torch.randn(10, 32))


def test_a_string_is_no_list_of_patterns() -> None:
    with pytest.raises(
        ValueError, match=r"modules must be a list of patterns, got the string 'head': write \['head'\]"
    ):
        compress_activations(modules="head")


def test_wrappers_are_no_part_of_a_path() -> None:
    torch.manual_seed(0)
    model, modules = nn.DataParallel(Model()), ["layers.*", "!layers.1"]
    for root in (None, model, model.module):
        with compress_activations(bits=8, min_bytes=0, recompute="off", modules=modules, root=root) as ledger:
            model(torch.randn(100, 32)).sum()
        assert compressed_modules(ledger) == {"layers.0.act", "layers.2.act"}
        assert "Model" in {entry.module for entry in ledger}
    compress_activations(modules=modules, root=torch.compile(Model()))
    parts = nn.ModuleDict({"a": checkpoint_wrapper(Model()), "b": torch.compile(Model())})
    compress_activations(modules=["a.layers.0", "!b.head.1", "a"], root=parts)
    with pytest.raises(ValueError, match=r"'layers\.7' matches no module of Model"):
        compress_activations(modules=["layers.7"], root=torch.compile(Model()))
