"""Message passing a block of receivers at a time, so that no tensor of messages as long as the edges ever exists.

The edges that arrive at a node are all in one block, in the order in which they came. So whatever a layer does with a
receiver's messages (a sum, a mean, a maximum, a softmax, an update) sees exactly those that it sees otherwise, padded
as in the whole graph where an aggregation pads them (`padding.py`), and the sum of a receiver's messages adds up in the
same order: results are equal to the last bit wherever an operation treats the rows that it is given one by one, on one
thread. Where it need not be so: matrix products *within* `message`, `aggregate` or `update`, whose rounding a BLAS may
let depend on how many rows there are; and with more threads than one, which may add in any order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch_geometric.nn import MessagePassing

from lightning_tinykg.arguments import check_whole
from lightning_tinykg.sgquant.blocked import BlockedLayer, Storage
from lightning_tinykg.sgquant.receivers import BlockCache

__all__ = ["in_blocks"]


@contextmanager
def in_blocks(
    model: nn.Module,
    block_edges: int = 1 << 14,
    storage: Storage | None = None,
    cache: BlockCache | None = None,
) -> Iterator[None]:
    """Let a model's layers pass messages in blocks, for as long as the context lasts.

    Args:
        model: A model with PyG `MessagePassing` layers. It is not changed: `propagate` and `edge_updater` are covered
            on the instances, and uncovered in the end.
        block_edges: Edges of a block, at most, unless a single receiver has more.
        storage: What is stored while it runs.
        cache: Remembers graphs from one context to the next.

    Raises:
        ValueError: If `block_edges` is below 1.

    Example:
        >>> import torch
        >>> from torch_geometric.nn import GATConv
        >>> x, edges, conv = torch.randn(4, 3), torch.tensor([[1, 2, 3, 0], [0, 0, 2, 1]]), GATConv(3, 2).eval()
        >>> plain = conv(x, edges)
        >>> with in_blocks(conv, block_edges=2):
        ...     torch.equal(conv(x, edges), plain)
        True
    """
    check_whole("block_edges", block_edges, 1)
    cache, storage, covered = cache or BlockCache(), storage or Storage(), []
    try:
        for layer in model.modules():
            if isinstance(layer, MessagePassing):
                blocked = BlockedLayer(layer, block_edges, cache, storage)
                for name in ("propagate", "edge_updater"):
                    covered.append((layer, name, layer.__dict__.get(name)))
                    layer.__dict__[name] = getattr(blocked, name)
        yield
    finally:
        for layer, name, before in reversed(covered):
            if before is None:
                del layer.__dict__[name]
            else:
                layer.__dict__[name] = before
