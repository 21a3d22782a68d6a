"""The weights of an attention are made again, though PyTorch makes them within one op; and they are what they were."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparing import assert_exact, codecs, compressed, gradients, made, weighted
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_tinykg import Ledger

BATCH, HEADS, QUERIES, KEYS, DIM = 4, 3, 24, 20, 8

generator = torch.Generator().manual_seed(0)


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_()


def leaves_of(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    queries, keys, values = (drawn(BATCH, n, HEADS, DIM, dtype=dtype) for n in (QUERIES, KEYS, KEYS))
    return queries, keys, values


LEAVES = {dtype: leaves_of(dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)}
BIAS = drawn(HEADS, QUERIES, KEYS)
FLOAT_MASK = drawn(QUERIES, KEYS).detach()
BOOL_MASK = torch.rand(BATCH, 1, QUERIES, KEYS, generator=generator) > 0.3
BOOL_MASK[0, 0, 0] = False  # a query that may look at nothing

CALLS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "plain": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.2),
    "without dropout, of three dimensions": lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0]),
    "a mask to be added": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=FLOAT_MASK.to(q), dropout_p=0.2
    ),
    "a boolean mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, BOOL_MASK, 0.2),
    "causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.2),
    "causal, by position": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.2, True),
    "a bias that is learned": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=BIAS.to(q), dropout_p=0.2
    ),
    "a bias that is made": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=BIAS.to(q).tanh(), dropout_p=0.2
    ),
    "another scale": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.2, scale=2.0),
    "a negative scale": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.2, scale=-0.5),
    "of itself": lambda q, k, v: F.scaled_dot_product_attention(q, q, q, dropout_p=0.2),
    "queries without a gradient": lambda q, k, v: F.scaled_dot_product_attention(q.detach(), k, v, dropout_p=0.2),
    "keys without a gradient": lambda q, k, v: F.scaled_dot_product_attention(q, k.detach(), v, dropout_p=0.2),
    "values without a gradient": lambda q, k, v: F.scaled_dot_product_attention(q, k, v.detach(), dropout_p=0.2),
    "only values with one": lambda q, k, v: F.scaled_dot_product_attention(q.detach(), k.detach(), v, dropout_p=0.2),
    "one of several queries' keys": lambda q, k, v: F.scaled_dot_product_attention(
        torch.cat([q, q], 1), k, v, dropout_p=0.2, enable_gqa=True
    ),
}


def loss_of(call: Callable[[Tensor, Tensor, Tensor], Tensor], leaves: tuple[Tensor, Tensor, Tensor]) -> Any:
    return lambda: weighted(call(*(made(leaf).transpose(1, 2) for leaf in leaves)))


@pytest.mark.parametrize("recompute", ["cheap", "aggressive", "off"])
@pytest.mark.parametrize("dtype", LEAVES)
@pytest.mark.parametrize("name", CALLS)
def test_an_attention_is_exact(name: str, dtype: torch.dtype, recompute: str) -> None:
    leaves = LEAVES[dtype]
    assert_exact(loss_of(CALLS[name], leaves), [*leaves, BIAS], recompute=recompute)


@pytest.mark.parametrize("name", CALLS)
def test_an_attention_under_autocast_is_exact(name: str) -> None:
    """And so is what is made again where the backward runs under autocast too."""
    leaves = LEAVES[torch.float32 if "added" not in name and "bias" not in name else torch.bfloat16]

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out: Tensor = loss_of(CALLS[name], leaves)()
            return out

    assert_exact(loss, [*leaves, BIAS])
    with torch.autocast("cpu", torch.bfloat16):
        assert_exact(loss, [*leaves, BIAS])


UNMASKED = ("plain", "causal", "causal, by position", "another scale", "a negative scale", "of itself")


@pytest.mark.parametrize("bits", [32, 8, 2])
@pytest.mark.parametrize("name", UNMASKED)
def test_no_weights_are_kept(name: str, bits: int) -> None:
    """Neither what the softmax made nor what the dropout left of it: here exact queries and keys take less."""
    leaves = queries, keys, values = drawn(2, 128, 3, 8), drawn(2, 128, 3, 8), drawn(2, 128, 3, 8)
    _, ledger = compressed(loss_of(CALLS[name], leaves), leaves, bits)
    assert codecs(ledger, "SafeSoftmax.result") == {"recipe"}, ledger.rows()
    mask = 2 * 3 * 128 * 128 / 8
    assert ledger.stored_bytes < mask + queries.nbytes + keys.nbytes + values.nbytes + 100, ledger.rows()


def test_weights_are_made_again_of_exact_queries_and_keys() -> None:
    """Where queries look at few keys, the weights change with the last of their bits."""
    leaves = drawn(2, 128, 3, 8), drawn(2, 128, 3, 8), drawn(2, 128, 3, 8)
    sharp = loss_of(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.2, scale=10.0), leaves)
    want, (got, ledger) = gradients(sharp, leaves), compressed(sharp, leaves, 8)
    assert codecs(ledger, "SafeSoftmax.result") == {"recipe"}
    assert (got[2] - want[2]).norm() < 1e-6 * want[2].norm()  # of the values' gradient nothing else is rounded


def test_a_mask_that_was_made_is_added_again() -> None:
    queries, keys, values = LEAVES[torch.float32]
    padding = torch.rand(BATCH, 1, 1, KEYS, generator=generator) > 0.3

    def loss() -> Tensor:
        mask = torch.zeros(QUERIES, KEYS) + padding.logical_not() * -1e9
        out: Tensor = loss_of(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.2),
            (queries, keys, values),
        )()
        return out

    ledger = assert_exact(loss, [queries, keys, values], recompute="aggressive")
    assert codecs(ledger, "SafeSoftmax.result") == {"recipe"}


def test_parts_of_one_tensor_are_counted_each() -> None:
    """Exact queries and keys take more than a code of the weights, though both are parts of one tensor."""
    h = drawn(3, 8, 4, 64, 16)

    def loss() -> Tensor:
        queries, keys, values = made(h).asinh().unbind(0)
        return weighted(F.scaled_dot_product_attention(queries, keys, values, dropout_p=0.1))

    _, ledger = compressed(loss, [h], 8)
    assert codecs(ledger, "SafeSoftmax.result") == {"int8"}, ledger.rows()


def attended(module: nn.MultiheadAttention, x: Tensor, **options: Any) -> Ledger:
    def loss() -> Tensor:
        h = made(x)
        return weighted(module(h, h, h, **options)[0])

    leaves = [x, *module.parameters()]
    assert_exact(loss, leaves)
    return compressed(loss, leaves, 8)[1]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("need_weights", [True, False])
def test_a_module_keeps_what_it_is_given(need_weights: bool, dropout: float, batch_first: bool) -> None:
    """Its queries, keys and values are one linear layer of that, and its weights are made of these."""
    x, module = (
        drawn(*((8, 128) if batch_first else (128, 8)), 32),
        nn.MultiheadAttention(32, 2, dropout, batch_first=batch_first),
    )
    ledger = attended(module, x, need_weights=need_weights)
    if dropout or need_weights:  # else a fused kernel attends
        op = "Softmax.result" if need_weights else "SafeSoftmax.result"
        assert codecs(ledger, op) == {"recipe"}, ledger.rows()
        exactly = [x.nbytes] * 2  # what is given, and what the last layer is given
        assert ledger.stored_bytes < sum(exactly) + (dropout > 0) * 8 * 2 * 128 * 128 / 8 + 1000, ledger.rows()


@pytest.mark.parametrize("batch_first", [True, False])
def test_an_encoder_layer_in_which_nobody_looks_ahead(batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=batch_first)
    x = drawn(*((8, 128) if batch_first else (128, 8)), 32)
    mask = nn.Transformer.generate_square_subsequent_mask(128)

    def loss() -> Tensor:
        return weighted(layer(made(x), src_mask=mask, is_causal=True))

    leaves = [x, *layer.parameters()]
    assert_exact(loss, leaves)
    want, (got, ledger) = gradients(loss, leaves), compressed(loss, leaves, 8)
    assert codecs(ledger, "SafeSoftmax.result") == {"recipe"}, ledger.rows()
    off = torch.cat([(a - b).flatten() for a, b in zip(want, got, strict=True)])
    assert off.norm() < 0.01 * torch.cat([a.flatten() for a in want]).norm()


def test_what_a_module_calls_may_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops of a module's function are seen one by one; but it is still that function, and calls what it would."""
    attended(nn.MultiheadAttention(32, 2), drawn(8, 8, 32), need_weights=False)
    calls = []
    attend = F.scaled_dot_product_attention

    def replaced(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(len(args))
        out: Tensor = attend(*args, **kwargs)
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", replaced)
    attended(nn.MultiheadAttention(32, 2), drawn(8, 8, 32), need_weights=False)
    assert len(calls) == 3  # plain, exact and at 8 bits


def test_others_who_watch_see_the_same_ops() -> None:
    """A mode of the user's, around the context, sees what happens within the function, as the context does."""
    names: list[str] = []

    class Watching(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    x, module = drawn(8, 8, 32), nn.MultiheadAttention(32, 2)
    with Watching():
        compressed(lambda: weighted(module(made(x), x, x)[0]), [x], 8)
    assert "softmax" in names


def test_an_attention_within_vmap_is_exact() -> None:
    """What it is given there is seen without the dimension that is mapped: of these its weights are not made again."""
    queries, keys, values = LEAVES[torch.float32]
    masks = torch.randn(QUERIES, KEYS, BATCH, generator=generator)  # of as many as there are, and mapped at the end

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)

    def loss() -> Tensor:
        given = [made(leaf).transpose(1, 2) for leaf in (queries, keys, values)]
        return weighted(torch.vmap(attend, (0, 0, 0, 2))(*given, masks))

    assert_exact(loss, [queries, keys, values])
