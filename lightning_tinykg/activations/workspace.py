"""Memory that is used again within one backward: on a CPU, fresh memory costs more than what is computed into it."""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_tinykg.activations.remaking import Making

_WORTH_BYTES = 1 << 20
"""What is smaller comes from memory that the C library keeps anyway."""

_MOST_TIMES = 4
"""A buffer is given for a tensor down to this fraction of it: somebody may keep the tensor, and so the buffer. Buffers
that are free are so many times apart, or as many as were in use at once."""


class Workspace:
    """The buffers that one forward's saved tensors are restored into.

    The C library gives a large tensor's memory back to the system when the tensor is freed, and the next one costs a
    page fault for every 4 KiB of it. Here a buffer is given out again as soon as nobody else holds its storage. On
    other devices PyTorch's allocator does the same, and better.

    A workspace is freed with the graph: nothing of it is alive during the next forward.

    Attributes:
        largest: bytes of the largest tensor that was saved.

    Example:
        >>> workspace = Workspace()
        >>> first = workspace.empty((1 << 20,), dtype=torch.float32, device=torch.device("cpu"))
        >>> address = first.data_ptr()
        >>> del first
        >>> workspace.empty((1024, 1024), dtype=torch.float32, device=torch.device("cpu")).data_ptr() == address
        True
    """

    def __init__(self) -> None:
        self._buffers: list[torch.UntypedStorage] = []
        self._lock = threading.Lock()
        self._holding: deque[weakref.ref[Making]] = deque()
        self.largest = 0

    def empty(self, shape: int | Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous tensor that nobody else has, of any content.

        Args:
            shape: its shape.
            dtype: its dtype.
            device: where it is to be.
        """
        shape = (shape,) if isinstance(shape, int) else shape
        nbytes = math.prod(shape) * dtype.itemsize
        if device.type != "cpu" or nbytes < _WORTH_BYTES:
            return torch.empty(shape, dtype=dtype, device=device)
        with self._lock:
            free = self._free()
            if fitting := [buffer for buffer in free if nbytes <= buffer.nbytes() <= _MOST_TIMES * nbytes]:
                strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
                buffer = min(fitting, key=torch.UntypedStorage.nbytes)
                return torch.empty(0, dtype=dtype).set_(buffer, 0, shape, strides)
            # outgrown: the new one will do for what these were for; what is far smaller has uses of its own
            outgrown = {id(buffer) for buffer in free if buffer.nbytes() < nbytes < _MOST_TIMES * buffer.nbytes()}
            self._buffers = [buffer for buffer in self._buffers if id(buffer) not in outgrown]
            tensor = torch.empty(shape, dtype=dtype)
            self._buffers.append(tensor.untyped_storage())
            return tensor

    def place_for_result(self, tensor: Tensor) -> Tensor | None:
        """Memory for what is computed from a tensor element by element: its own, or what has just its size.

        It is given away for good: it is as large as the result, which may be the user's in the end, and autograd adds
        up gradients in place only where nobody else holds them.

        Returns:
            The tensor itself, if nobody else has any of its memory; a buffer that is free; None where there is none.
        """
        storage, place = tensor.untyped_storage(), tensor
        with self._lock:
            # besides the tensor, the storage's Python object counts, which a buffer is
            if torch._C._storage_Use_Count(storage._cdata) != 2 or storage.nbytes() != tensor.nbytes:
                of_its_size = [buffer for buffer in self._free() if buffer.nbytes() == tensor.nbytes]
                if not of_its_size or tensor.device.type != "cpu":
                    return None
                storage = of_its_size[0]
                place = torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, tensor.stride())
            self._buffers = [buffer for buffer in self._buffers if buffer._cdata != storage._cdata]
            return place

    def _free(self) -> list[torch.UntypedStorage]:
        return [buffer for buffer in self._buffers if torch._C._storage_Use_Count(buffer._cdata) == 1]

    def hold(self, making: Making, made: Tensor) -> None:
        """Hold what was made until all saves of it had it.

        That is memory, so the oldest is let go of where all together would be more than the largest saved tensor.
        """
        making.made = made
        room, kept = max(self.largest, made.nbytes), []
        for reference in (weakref.ref(making), *reversed(self._holding)):
            held = reference()
            if held is None or held.made is None:
                continue
            room -= held.made.nbytes
            if room < 0:
                held.made = None
            else:
                kept.append(reference)
        self._holding = deque(reversed(kept))
