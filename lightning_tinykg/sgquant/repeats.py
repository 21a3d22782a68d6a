"""Tensors that come again unchanged, such as a full graph's features in each step: what was made of them is kept."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Repeats"]


@dataclass
class _Seen:
    tensor: weakref.ref[Tensor]
    version: int
    circumstances: Any
    result: Tensor | None = None
    result_version: int = 0


class Repeats:
    """Keeps the result for a tensor from its second coming on, so that what comes once takes no memory.

    Example:
        >>> repeats, x, made = Repeats(), torch.ones(2), []
        >>> def double(x):
        ...     made.append(1)
        ...     return 2 * x
        >>> [repeats.of("spot", x, None, double).sum().item() for _ in range(4)], len(made)
        ([4.0, 4.0, 4.0, 4.0], 2)
    """

    def __init__(self) -> None:
        self._seen: dict[Hashable, _Seen] = {}

    def of(self, key: Hashable, x: Tensor, circumstances: Any, make: Callable[[Tensor], Tensor]) -> Tensor:
        """The result for a tensor.

        Args:
            key: Where it comes from; one tensor is kept for each.
            x: The tensor. With a gradient, or in inference mode, nothing is kept of it.
            circumstances: What else the result depends on; compared by `==`.
            make: Makes the result.
        """
        if (x.requires_grad and torch.is_grad_enabled()) or x.is_inference() or torch.is_inference_mode_enabled():
            return make(x)
        seen = self._seen.get(key)
        if (
            seen is None
            or seen.tensor() is not x
            or seen.version != x._version
            or seen.circumstances != circumstances
            or (seen.result is not None and seen.result._version != seen.result_version)  # someone wrote into it
        ):
            self._seen[key] = _Seen(weakref.ref(x), x._version, circumstances)
            return make(x)
        if seen.result is None:
            seen.result = make(x)
            seen.result_version = seen.result._version
        return seen.result

    def clear(self) -> None:
        """Forget all."""
        self._seen.clear()
