"""Aggregations that pad the messages of each receiver to one length, such as an LSTM over them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch_geometric.nn.aggr import Aggregation, PatchTransformerAggregation

__all__ = ["padded_to"]


@contextmanager
def padded_to(layer: nn.Module, most: int) -> Iterator[None]:
    """Let a layer's aggregations pad the messages of each receiver as they would for the receiver that has the most.

    An LSTM runs over the padding too, so what it makes of one receiver depends on how many messages another has. In a
    block of receivers that would be another number than in the whole graph.

    Args:
        layer: Whose `Aggregation` modules are meant. One that is told a length keeps it.
        most: Messages of the receiver that has the most of the whole graph.

    Example:
        >>> import torch
        >>> from torch_geometric.nn.aggr import GRUAggregation
        >>> aggr, x, index = GRUAggregation(2, 3), torch.randn(3, 2), torch.tensor([0, 1, 1])
        >>> with padded_to(aggr, most=2):
        ...     first = aggr(x[:1], index[:1])
        >>> torch.allclose(first, aggr(x, index)[:1]), torch.allclose(aggr(x[:1], index[:1]), first)
        (True, False)
    """

    def told(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if kwargs.get("max_num_elements") is None:
            # this one counts by itself, and one more
            length = most + isinstance(module, PatchTransformerAggregation)
            kwargs = {**kwargs, "max_num_elements": length}
        return args, kwargs

    handles = [
        module.register_forward_pre_hook(told, with_kwargs=True)
        for module in layer.modules()
        if isinstance(module, Aggregation) and "max_num_elements" in inspect.signature(module.forward).parameters
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
