"""How an attention's weights were made, where it is computed by products: before their dropout, and after it.

``scaled_dot_product_attention`` is one op to those who call it. With dropout on a CPU, and wherever no fused kernel
serves, it multiplies, takes a softmax, drops and multiplies again, and saves a weight for each two positions, twice.
By its graph and its arguments both are made again: of the scaled queries and keys, and of the dropout's mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_tinykg.activations import calling
from lightning_tinykg.activations.keeping import Saved
from lightning_tinykg.activations.repeatable import EXACT, Repeatable
from lightning_tinykg.activations.storages import node_name, viewed
from lightning_tinykg.activations.within import IN_ORDER, Made, dropped

ATTENTION = "scaled_dot_product_attention"

_SOFTMAX = {"SafeSoftmax": torch._safe_softmax, "Softmax": torch.softmax}
"""By node: the op; the first gives zeros where all is masked."""


@dataclass(slots=True, eq=False)
class Attention:
    """One call that was computed by products: ``dropout(softmax(q k + mask)) v``.

    Attributes:
        scores: the node of the first product.
        softmax: the node of the softmax.
        dropout: the node of the dropout, if there is one.
        output: the node of the second product.
        queries: the first product's factors, scaled, (batch, queries, dim); None if they were not saved.
        keys: (batch, dim, keys).
        weights: the result of the softmax, (..., queries, keys).
        dropped: what the values are multiplied by, if it was saved.
        mask: the mask as it was given, boolean or to be added.
        causal: whether it is made within, of the positions.
    """

    scores: Any
    softmax: Any
    dropout: Any
    output: Any
    queries: Tensor | None
    keys: Tensor | None
    weights: Tensor | None
    dropped: Tensor | None
    mask: Tensor | None
    causal: bool

    @classmethod
    def of(cls, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Attention | None:
        """The call by its result and its arguments, while all that it saved is raw; None if it was fused.

        It holds what was saved: of a tensor for which a coarse code was found to do, what is met next may want more.
        """
        nodes = _nodes(out.grad_fn) if isinstance(out, Tensor) else None
        if nodes is None:
            return None
        scores, softmax, dropout, output = nodes
        mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
        causal = args[5] if len(args) > 5 else kwargs.get("is_causal", False)
        return cls(
            scores,
            softmax,
            dropout,
            output,
            queries=_raw(scores, "self"),
            keys=_raw(scores, "mat2"),
            weights=_raw(softmax, "result"),
            dropped=_raw(output, "self"),
            mask=mask,
            causal=bool(causal),
        )

    def steps(self) -> Iterator[tuple[Any, Made | None]]:
        """Its nodes in the order in which they ran, and how what they saved was made, where only this tells."""
        yield self.scores, None
        yield self.softmax, self._how_weights()
        if self.dropout is not None:
            yield self.dropout, None
        how = None
        if self.dropout is not None and self.weights is not None and self.dropped is not None:
            how = dropped(self.weights, self.dropout, viewed(self.dropped))  # its mask is kept by now
        yield self.output, how

    def _how_weights(self) -> Made | None:
        q, k, weights = self.queries, self.keys, self.weights
        if q is None or k is None or weights is None or not q.dtype == k.dtype == weights.dtype:
            return None
        masked = node_name(_beyond(_first(self.softmax), IN_ORDER)) == "Add"
        if masked != (self.causal or self.mask is not None):
            return None
        op = _SOFTMAX[node_name(self.softmax)]
        return WEIGHTS, (q, k, self.mask, self.causal, tuple(weights.shape), op), {}, weights


def _nodes(output: Any) -> tuple[Any, Any, Any, Any] | None:
    output = _beyond(output, IN_ORDER | {"ToCopy"})  # of what it casts to 32 bits for itself, it casts the result back
    if output is None or node_name(output) != "Bmm":
        return None
    softmax, dropout = _beyond(_first(output), IN_ORDER), None
    if softmax is not None and node_name(softmax) in ("Mul", "NativeDropout"):
        softmax, dropout = _first(softmax), softmax
    if softmax is None or node_name(softmax) not in _SOFTMAX:
        return None
    scores = _beyond(_first(softmax), IN_ORDER | {"Add"})
    return None if scores is None or node_name(scores) != "Bmm" else (scores, softmax, dropout, output)


def _first(node: Any) -> Any:
    """The node of the first input."""
    return node.next_functions[0][0]


def _beyond(node: Any, names: frozenset[str]) -> Any:
    while node is not None and node_name(node) in names:
        node = _first(node)
    return node


def _raw(node: Any, attribute: str) -> Tensor | None:
    """What a node saved, while it is raw."""
    saved = getattr(node, f"_raw_saved_{attribute}").data
    return saved.tensor if isinstance(saved, Saved) else None


def _weights(
    queries: Tensor, keys: Tensor, mask: Tensor | None, causal: bool, shape: tuple[int, ...], softmax: Any
) -> Tensor:
    scores = torch.bmm(queries, keys).view(shape)
    if causal:
        mask = torch.ones(shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(mask.logical_not(), -torch.inf)
    made: Tensor = softmax(scores if mask is None else scores.add_(mask), -1)
    return made


WEIGHTS = Repeatable(_weights, "attention", EXACT, 4, calling.as_called, adds_up=calling.last_of_the_first)
"""The weights of an attention: as exact as the softmax's argument is, so its factors have to be exact."""
