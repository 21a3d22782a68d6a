"""Makes a training step leave no trace."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


class Undo:
    """What is done to a module within this context is undone at its end, any number of times.

    That is: contents of parameters, buffers and all other tensors, gradients, attributes (counters, metric states),
    containers, however deep, and random generators of the module's own. Not: objects of other kinds.
    """

    def __init__(self, module: nn.Module) -> None:
        self._seen: dict[int, Any] = {}  # and kept alive, so that no other object gets its id
        self._steps: list[Callable[[], Any]] = []
        self._remember(module)

    def __enter__(self) -> None:
        """Nothing to be done: what is to be restored is known."""

    def __exit__(self, *exc: object) -> None:
        for step in self._steps:
            step()

    def _remember(self, value: Any) -> None:
        if id(value) in self._seen or not isinstance(value, _REMEMBERED):
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self._remember_tensor(value)
        elif isinstance(value, torch.Generator):
            self._steps.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, nn.Module):
            # a lazy module changes its class when it is made: there is no way back, and none is needed
            if not any(map(is_lazy, value.parameters(recurse=False))):
                self._remember(vars(value))
        else:
            if not isinstance(value, tuple):
                self._steps.append(partial(refill, value, copy.copy(value)))
            for item in value.values() if isinstance(value, dict) else value:
                self._remember(item)

    def _remember_tensor(self, tensor: Tensor) -> None:
        if is_lazy(tensor) or tensor.is_inference():
            return
        if tensor.layout != torch.strided or 0 not in tensor.stride():  # PyTorch writes to no expanded tensor
            self._steps.append(partial(_rewrite, tensor, tensor.data, tensor.detach().clone()))
        if tensor.is_leaf:
            self._remember(tensor.grad)  # first: it has to be where the tensor is, and may have been moved with it
            self._steps.append(partial(setattr, tensor, "grad", tensor.grad))


_REMEMBERED = (Tensor, nn.Module, torch.Generator, dict, list, set, tuple, deque)


def _rewrite(tensor: Tensor, data: Tensor, contents: Tensor) -> None:
    tensor.data = data.copy_(contents)  # the same memory as before: it may have been given another


def refill(container: Any, contents: Any) -> None:
    """Give a container its former contents again, in place."""
    container.clear()
    container.extend(contents) if isinstance(container, (list, deque)) else container.update(contents)
