"""A tensor in pieces that are cheap to copy, and in groups that kernels can read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_SCRATCH_BYTES_PER_ELEMENT = 24
_CHUNK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 23}


def chunk_elements(device: torch.device) -> int:
    """Elements to work on at a time: what fits a CPU's cache, or keeps a GPU busy."""
    return _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS["cpu"])


def iterate_chunks(
    tensor: Tensor, multiple: int, scratch: int = _SCRATCH_BYTES_PER_ELEMENT
) -> Iterator[tuple[int, Tensor]]:
    """Cut a tensor into pieces of ``multiple`` elements' multiples that are cheap to copy, in row-major order.

    Args:
        tensor: any shape and strides.
        multiple: each piece but the last has a multiple of this many elements.
        scratch: bytes that an element takes while it is worked on.

    Yields:
        The position of the piece's first element and the piece, a view of the tensor.
    """
    numel = tensor.numel()
    if numel == 0:
        return
    limit = min(
        chunk_elements(tensor.device) * _SCRATCH_BYTES_PER_ELEMENT // scratch,
        max(tensor.nbytes // 4, 1 << 19) // scratch,
    )
    if tensor.is_contiguous():
        rows, row = tensor.view(-1), 1
    else:
        rows, row = tensor, numel // tensor.shape[0]
    # the fewest rows that hold a multiple of `multiple` elements
    unit = multiple // math.gcd(multiple, row)
    if row * unit > max(limit, multiple) and row > 1:
        if row % multiple == 0:
            for i, part in enumerate(tensor):
                yield from ((i * row + start, piece) for start, piece in iterate_chunks(part, multiple, scratch))
            return
        rows, row, unit = tensor.contiguous().view(-1), 1, multiple
    step = max(1, limit // (row * unit)) * unit
    for first in range(0, rows.shape[0], step):
        yield first * row, rows[first : first + step]


def is_memory(tensor: Tensor) -> bool:
    """Whether a tensor's elements are what its memory holds, in order, so that kernels can read it there."""
    return tensor.is_contiguous() and not (tensor._is_zerotensor() or tensor.is_neg())


def iterate_flat(tensor: Tensor, multiple: int) -> Iterator[tuple[int, Tensor]]:
    """A tensor's elements as kernels can read them: all at once, or in copies of pieces.

    Args:
        tensor: any shape and strides.
        multiple: each piece but the last has a multiple of this many elements.

    Yields:
        The position of the first element, and the elements, flat.
    """
    if is_memory(tensor):
        yield 0, tensor.view(-1)
        return
    for start, chunk in iterate_chunks(tensor, multiple, tensor.itemsize):
        flat = torch.empty(chunk.numel(), dtype=tensor.dtype, device=tensor.device)
        flat.view(chunk.shape).copy_(chunk)
        yield start, flat


def iterate_groups(
    tensor: Tensor,
    group_size: int,
    dtypes: tuple[torch.dtype, ...],
    through: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Cut a tensor into groups that kernels can read.

    Args:
        tensor: any shape and strides.
        group_size: elements of a group.
        dtypes: what the kernels read as it is.
        through: a function that each piece is replaced by the result of.

    Yields:
        The position of the first element; a piece of the tensor; and its groups, shape ``[groups, group_size]``: the
        piece itself, or a copy in float32, whose last, short group is filled up with an element of its own.
    """
    direct = 0
    if through is None and tensor.dtype in dtypes and is_memory(tensor):
        flat = tensor.view(-1)
        direct = flat.numel() // group_size * group_size
        if direct:
            yield 0, flat[:direct], flat[:direct].view(-1, group_size)
        tensor = flat[direct:]
    for start, chunk in iterate_chunks(tensor, group_size):
        chunk = chunk if through is None else through(chunk)
        numel = chunk.numel()
        rows = torch.empty(-(-numel // group_size) * group_size, dtype=torch.float32, device=tensor.device)
        rows[:numel].view(chunk.shape).copy_(chunk)
        rows[numel:] = rows[numel - 1]
        yield direct + start, chunk, rows.view(-1, group_size)
