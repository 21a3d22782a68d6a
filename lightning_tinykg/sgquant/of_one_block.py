"""What stands for a note of one block of edges, so that nobody takes it for the whole."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["OfOneBlock"]


class OfOneBlock(torch.Tensor):
    """Stands for what a layer noted on itself in its last block, so that nobody takes that for the whole.

    It can be passed on, as by a layer that asserts that it has noted something. Whatever else is done with it raises.

    Example:
        >>> OfOneBlock() is not None
        True
        >>> OfOneBlock().shape
        Traceback (most recent call last):
            ...
        RuntimeError: what a layer notes on itself, such as its attention weights, is of one block of edges when it \
passes messages in blocks: ask the model that was packed
    """

    @staticmethod
    def __new__(cls) -> OfOneBlock:
        """Make one, of nothing."""
        made: OfOneBlock = torch.Tensor._make_subclass(cls, torch.empty(0))
        return made

    @classmethod
    def __torch_function__(cls, *_: Any) -> Any:
        """Refuse."""
        raise RuntimeError(
            "what a layer notes on itself, such as its attention weights, is of one block of edges when it passes "
            "messages in blocks: ask the model that was packed"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # as in Tensor
        return "OfOneBlock()"
