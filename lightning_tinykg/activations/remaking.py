"""Tensors that are made again when they are needed: gathered from a table, or computed by a few cheap ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lightning_tinykg.activations.keeping import Coded, Levels, Reference
from lightning_tinykg.activations.repeatable import INDEX_SELECT
from lightning_tinykg.activations.storages import Layout
from lightning_tinykg.activations.workspace import Workspace
from lightning_tinykg.codecs.affine import AffineCode
from lightning_tinykg.codecs.kernels import kernels_for


@dataclass(slots=True, eq=False, weakref_slot=True)
class Making:
    """How one tensor is made again, for every save of it.

    Several saves of one tensor are asked for shortly after one another: by the op that used it, and by the op that
    made it. Between the first and the last it is held, so that it is made once.

    Attributes:
        op: the op, called as in the forward.
        args: its arguments; what is kept stands for each tensor.
        kwargs: its keyword arguments.
        shape: shape of what it makes.
        stride: its strides; None where it is contiguous.
        dtype: dtype of what it makes.
        autocast: dtype of the autocast that it runs under; None if it runs under none.
        saves: the saves that are views of it, and what is made from it in its turn.
        asked: how many of them had it in this backward.
        made: what it made, while it is held.
        exact: whether nothing that it is made of is rounded.
        depth: how many ops it is made by, one after another.
    """

    op: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None
    dtype: torch.dtype
    autocast: torch.dtype | None
    saves: int = 0
    asked: int = 0
    made: Tensor | None = None
    exact: bool = field(init=False)
    depth: int = field(init=False)

    def __post_init__(self) -> None:
        self.exact = _is_exact(self.args)
        self.depth = 1 + _depth(self.args)

    def run(self, workspace: Workspace) -> tuple[Tensor, bool]:
        """Make the tensor.

        Returns:
            The tensor, and whether nobody else has it, so that it can be computed with in place.
        """
        made = self._in_order(self._run(workspace)) if self.made is None else self.made
        if self.saves < 2:
            return made, True
        self.asked += 1
        if self.asked >= self.saves:  # the next backward of a graph that is retained asks all over again
            self.asked, self.made = 0, None
        elif self.made is None:
            workspace.hold(self, made)
        return made, False

    def _in_order(self, made: Tensor) -> Tensor:
        """As it lay: arguments that lie otherwise than they did, since they were rounded, give another order."""
        if self.stride is None:
            return made.contiguous()
        if made.stride() == self.stride:
            return made
        return made.new_empty_strided(self.shape, self.stride).copy_(made)

    def _run(self, workspace: Workspace) -> Tensor:
        into, operands = _INTO.get(self.op), []
        if into is not None and into.rows and (rows := _few_rows(self.args, into.rows, workspace)) is not None:
            return rows.view(self.shape)
        out = None
        for argument in self.args:
            operand, own = _restored(argument, workspace)
            operands.append(operand)
            if (
                own
                and into is not None
                and into.in_place
                and operand.shape == self.shape
                and operand.dtype == self.dtype
            ):
                out = operand
        if self.op is torch.Tensor.__getitem__ and operands[0].is_cuda:
            operands[1] = _places(operands[1], self.shape)
        device = next((o.device.type for o in operands if isinstance(o, Tensor)), None)
        if device is not None and self.autocast != _autocast(device):
            with torch.autocast(device, self.autocast, enabled=self.autocast is not None):
                return self.op(*operands, **self.kwargs)
        fits = into is not None and self.stride is None and not self.kwargs and self.autocast is None
        if into is None or not fits or not into.fits(*operands):
            return self.op(*operands, **self.kwargs)
        if out is None:
            where = next(operand.device for operand in operands if isinstance(operand, Tensor))
            out = workspace.empty(self.shape, dtype=self.dtype, device=where)
        into.run(*operands, out=out)
        return out


def _is_exact(argument: Any) -> bool:
    if isinstance(argument, tuple):
        return all(_is_exact(item) for item in argument)
    if isinstance(argument, Remade):
        return argument.making.exact
    return not isinstance(argument, Coded) or argument.record.bits == 32


def _depth(argument: Any) -> int:
    if isinstance(argument, tuple):
        return max(map(_depth, argument), default=0)
    return argument.making.depth if isinstance(argument, Remade) else 0


def _places(items: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Places for the first mask among the items of an index: how many there are is known, and need not be waited for.

    Args:
        items: the index.
        shape: of what it gives.
    """
    at = next((i for i, item in enumerate(items) if isinstance(item, Tensor)), len(items))
    mask = items[at : at + 1]
    if not mask or mask[0].dtype != torch.bool or any(item != slice(None) for item in items[:at]):
        return items
    places = torch.nonzero_static(mask[0], size=shape[at])
    return (*items[:at], *places.unbind(1), *items[at + 1 :])


def _autocast(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


@dataclass(slots=True, eq=False)
class Remade:
    """A view of a tensor that is made again when it is needed.

    Attributes:
        making: how it is made.
        layout: how the view lies.
    """

    making: Making
    layout: Layout

    def __post_init__(self) -> None:
        self.making.saves += 1

    def restore(self, workspace: Workspace) -> Tensor:
        """Make it again, or take what was made for another save."""
        return self.run(workspace)[0]

    def run(self, workspace: Workspace) -> tuple[Tensor, bool]:
        """As :meth:`Making.run`."""
        made, own = self.making.run(workspace)
        shape, stride, offset = self.layout.shape, self.layout.stride, self.layout.offset
        if not offset and made.shape == shape and made.stride() == stride:
            return made if own else made.detach(), own
        return made.as_strided(shape, stride, made.storage_offset() + offset), False


def _restored(argument: Any, workspace: Workspace) -> tuple[Any, bool]:
    """What an argument stands for, and whether nobody else has it."""
    if isinstance(argument, tuple):
        return tuple(_restored(item, workspace)[0] for item in argument), False
    if isinstance(argument, Remade):
        return argument.run(workspace)
    if isinstance(argument, (Reference, Coded, Levels)):
        return argument.restore(workspace), False
    return argument, False


# -- the ops, into memory that is there -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Into:
    """An op that can write into memory that is there, with the same bits as the op itself.

    Attributes:
        run: the op, with ``out=``.
        in_place: whether ``out`` may be one of the operands.
        rows: for a gather of rows: gives its table and its index.
        fits: whether it can be called with these operands.
    """

    run: Callable[..., Any]
    in_place: bool = True
    rows: Callable[..., tuple[Any, Any] | None] | None = None
    fits: Callable[..., bool] = lambda *operands: isinstance(operands[0], Tensor)


def _few_rows(
    args: tuple[Any, ...], rows: Callable[..., tuple[Any, Any] | None], workspace: Workspace
) -> Tensor | None:
    """Rows of a table that is kept rounded, without restoring the others; None where that is no gain."""
    found = rows(*args)
    if found is None or not isinstance(found[0], Coded) or not isinstance(found[1], (Reference, Coded)):
        return None
    record, layout = found[0].record, found[0].layout
    if not isinstance(record.value, AffineCode) or record.degraded is not None or not layout.is_rows:
        return None
    index = found[1].restore(workspace)
    if index.dtype == torch.bool:
        return None
    count = layout.shape[0]
    if 2 * index.numel() > count:
        return None
    return record.value.rows(index.reshape(-1).remainder(count), layout.numel // count)


def _index_into(table: Tensor, items: tuple[Any, ...], out: Tensor) -> None:
    if len(items) == 1 and table.is_contiguous():
        kernels_for(table.device).gather(table, items[0].contiguous(), out)
    else:
        torch.ops.aten.index.Tensor_out(table, list(items), out=out)


def _select_into(table: Tensor, dim: int, index: Tensor, out: Tensor) -> None:
    if dim == 0 and table.is_cuda and table.is_contiguous():
        kernels_for(table.device).gather(table, index.contiguous(), out)
    else:
        torch.index_select(table, dim, index, out=out)


def _embedding_into(index: Tensor, table: Tensor, out: Tensor) -> None:
    _select_into(table, 0, index.reshape(-1), out.view(-1, table.shape[1]))


_GATHERS = {
    INDEX_SELECT: _Into(_select_into, False, lambda table, dim, index: (table, index) if dim == 0 else None),
    torch.Tensor.__getitem__: _Into(
        _index_into,
        False,
        lambda table, items: (table, items[0]) if len(items) == 1 else None,
        lambda table, items: all(isinstance(item, Tensor) and item.dtype != torch.bool for item in items),
    ),
    functional.embedding: _Into(_embedding_into, False, lambda index, table: (table, index)),
}

_RUN: dict[str, Callable[..., Any]] = {
    "add": torch.add,
    "__add__": torch.add,
    "__radd__": torch.add,
    "sub": torch.sub,
    "__sub__": torch.sub,
    "mul": torch.mul,
    "__mul__": torch.mul,
    "__rmul__": torch.mul,
    "div": torch.div,
    "__truediv__": torch.div,
    "neg": torch.neg,
    "__neg__": torch.neg,
    "exp": torch.exp,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": lambda x, inplace=False, *, out: torch.clamp_min(x, 0, out=out),
    "leaky_relu": lambda x, slope=0.01, inplace=False, *, out: torch._C._nn.leaky_relu(x, slope, out=out),
}

_INTO: dict[Any, _Into] = _GATHERS | {
    getattr(owner, name): _Into(run)
    for owner in (torch, torch.Tensor, functional)
    for name, run in _RUN.items()
    if hasattr(owner, name)
}
