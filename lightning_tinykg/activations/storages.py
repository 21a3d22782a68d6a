"""Which memory is it? Identity and layout of the tensors that autograd saves, and which of them are weights.

Many saved tensors are one storage: duplicates, views, transposes, expanded copies. What is decided here is decided by
storage, never by address: addresses are used again.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_VIEWS_AND_CASTS = frozenset(
    {
        "T", "ToCopy", "View", "ReshapeAlias", "Transpose", "Permute", "Expand", "Unsqueeze", "Squeeze", "Select",
        "Slice", "SplitWithSizes", "Split", "Alias", "UnsafeView", "Clone", "AsStrided", "Detach", "Unbind",
    }
)  # fmt: skip  # a table, read as one


def node_name(node: Any) -> str:
    """The name of an autograd node without its suffix: ``MulBackward0`` is ``Mul``.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> node_name((x * x).grad_fn)
        'Mul'
    """
    return _without_suffix(node.name())


@cache
def _without_suffix(name: str) -> str:
    return name.rpartition("::")[2].rstrip("0123456789").removesuffix("Backward")


def tensors_in(value: Any, depth: int = 3) -> list[Tensor]:
    """The tensors in an argument or a result: itself, or in lists, tuples and dicts up to ``depth`` deep.

    Example:
        >>> len(tensors_in([torch.ones(1), {"a": (torch.ones(1), 3)}]))
        2
    """
    if isinstance(value, Tensor):
        return [value]
    found: list[Tensor] = []
    if isinstance(value, (list, tuple, dict)):
        _collect(value, depth, found)
    return found


def _collect(values: Any, depth: int, found: list[Tensor]) -> None:
    for item in values.values() if isinstance(values, dict) else values:
        if isinstance(item, Tensor):
            found.append(item)
        elif depth > 1 and isinstance(item, (list, tuple, dict)):
            _collect(item, depth - 1, found)


def ordinary(tensor: Tensor) -> Tensor:
    """The ordinary tensor that PyG's ``EdgeIndex`` wraps, or its ``Index``, a row of one; any other as it is."""
    if type(tensor) is Tensor or (pyg := sys.modules.get("torch_geometric")) is None:
        return tensor
    return tensor.as_tensor() if isinstance(tensor, (pyg.Index, pyg.EdgeIndex)) else tensor


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is an ordinary strided one, with a storage of its own that can be looked into.

    Sparse, nested, quantized, meta, inference and subclass tensors (other than parameters) are not, nor lazily
    conjugated ones.
    """
    if type(tensor) is not Tensor and type(tensor) is not Parameter:
        return False
    keys = torch._C._dispatch_keys(tensor).raw_repr()  # tell all of it, and are asked for at once
    plain = _PLAIN.get(keys)
    if plain is None:
        plain = _PLAIN[keys] = (
            tensor.layout is torch.strided
            and not tensor.is_nested
            and not tensor.is_conj()
            and not tensor.is_quantized
            and not tensor.is_neg()
            and not tensor.is_meta
            and not tensor.is_inference()
        )
    return plain


_PLAIN: dict[int, bool] = {}


def is_parameter(tensor: Tensor | None) -> bool:
    """Whether it is a ``Parameter``: as ``isinstance``, which is slow to say no."""
    kind = type(tensor)
    return kind is Parameter or (kind is not Tensor and isinstance(tensor, Parameter))


def unwrapped(tensor: Tensor) -> Tensor:
    """The tensor beneath those of ``vmap`` and ``jvp``, which have no storage to look into."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def storage_id(tensor: Tensor) -> int:
    """Which storage a tensor lies in. Good for as long as the storage, or a weak reference to it, is held."""
    cdata: int = tensor.untyped_storage()._cdata
    return cdata


def viewed(tensor: Tensor) -> Tensor:
    """The tensor that a plain one is a view of; itself, where it is of none, or of one without a storage of its own.

    Example:
        >>> x = torch.eye(3)
        >>> viewed(x[0]) is x, viewed(x) is x
        (True, True)
        >>> values = x.to_sparse().values()  # a view of the sparse matrix
        >>> viewed(values) is values
        True
    """
    base = tensor._base
    return base if base is not None and is_plain(base) else tensor


def is_freed(tensor: Tensor) -> bool:
    """Whether a tensor's memory is taken away for now, as FSDP does with the weights of a module that is not running.

    Example:
        >>> weight = torch.ones(3)
        >>> _ = weight.untyped_storage().resize_(0)
        >>> is_freed(weight), is_freed(torch.ones(3)), is_freed(torch.ones(0))
        (True, False, False)
    """
    return tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


def is_weight(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter, a view of one, or a chain of views and casts away from one.

    Correct for plain, DDP, AMP (a cast copy), FSDP1 (a slice of a flat parameter) and FSDP2: neither the type nor the
    storage tells in all of them.

    Example:
        >>> linear = torch.nn.Linear(2, 2)
        >>> is_weight(linear.weight.t()), is_weight(linear(torch.ones(1, 2)))
        (True, False)
    """
    if is_parameter(tensor) or is_parameter(tensor._base):
        return True
    node, base = tensor.grad_fn, tensor._base
    if node is None:  # a leaf, or a view that was taken while no graph is made, of what was computed
        return tensor.requires_grad and (base is None or base.grad_fn is None)
    while node is not None:
        name = node_name(node)
        if name == "AccumulateGrad":
            return True
        edges = node.next_functions
        if name not in _VIEWS_AND_CASTS or len(edges) != 1:
            return False
        node = edges[0][0]
    return False


def is_users_weight(tensor: Tensor) -> bool:
    """Whether a weight lies in the user's memory: not a cast copy, which the graph alone keeps."""
    if not is_weight(tensor):
        return False
    node = tensor.grad_fn
    while node is not None and node_name(node) != "AccumulateGrad":
        if node_name(node) in ("ToCopy", "Clone"):
            return False
        node = node.next_functions[0][0]
    return True


def in_32_bits(nbytes: int, dtype: torch.dtype) -> int:
    """The bytes that floats of fewer bits would have in float32.

    By these it is judged what is large and what is worth its work, so that mixed precision decides as full precision.

    Example:
        >>> in_32_bits(200, torch.bfloat16), in_32_bits(200, torch.float64), in_32_bits(200, torch.bool)
        (400, 200, 200)
    """
    return nbytes * max(4 // dtype.itemsize, 1) if dtype.is_floating_point else nbytes


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """How a tensor lies on the flat run of elements that is kept for it.

    A tensor whose elements fill a run of its storage (contiguous, transposed, permuted, or any of these expanded) is
    kept as that run, so that all views of it share one copy. Any other is kept row by row, without its expanded
    dimensions.

    Attributes:
        shape: the tensor's shape.
        stride: its strides, 0 where it is expanded.
        offset: the run's place in the storage, in elements.
        numel: the run's elements.
        dense: whether it is a run of the storage.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    numel: int
    dense: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        """The layout of a plain tensor.

        Example:
            >>> layout = Layout.of(torch.ones(4, 1).expand(4, 100))
            >>> layout.numel, layout.dense
            (4, True)
        """
        return cls.at(tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    @classmethod
    @lru_cache(maxsize=1024)
    def at(cls, shape: tuple[int, ...], stride: tuple[int, ...], offset: int) -> Layout:
        """The layout of a plain tensor of this geometry."""
        dimensions = sorted((s, n) for n, s in zip(shape, stride, strict=True) if n != 1 and s != 0)
        run, dense = 1, True
        for step, size in dimensions:
            dense = dense and step == run
            run *= size
        return cls(shape, stride, offset, 0 if 0 in shape else run, dense)

    @lru_cache(maxsize=1024)  # noqa: B019  # those of one geometry are one object
    def group(self, limit: int) -> int:
        """A group size of at most ``limit`` that fits the rows, so that no group straddles two of them.

        Rows can differ by orders of magnitude, and what divides by their norm needs each to its own scale. Rows that
        are very narrow, or have no divisor near the limit, are grouped as they come.

        Example:
            >>> [Layout.of(torch.empty(100, *row)).group(64) for row in ((64,), (16,), (4, 16), (176,), (4,))]
            [64, 16, 64, 44, 64]
        """
        dimensions = sorted((s, n) for n, s in zip(self.shape, self.stride, strict=True) if n != 1 and s != 0)
        row = 1
        for _, size in dimensions:
            if row * size > limit:
                break
            row *= size
        if row == 1 and dimensions:  # wider than the limit
            width = dimensions[0][1]
            row = max(divisor for divisor in range(1, limit + 1) if width % divisor == 0)
        return row if 4 * row >= limit else limit

    @property
    def is_rows(self) -> bool:
        """Whether it is a contiguous table, row after row."""
        contiguous = tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        return self.dense and len(self.shape) > 1 and self.stride == contiguous

    def run(self, tensor: Tensor) -> Tensor:
        """The elements to keep: flat where they are a run, otherwise the tensor without its expanded dimensions."""
        if self.dense:
            return tensor.as_strided((self.numel,), (1,), self.offset)
        return tensor[tuple(slice(0, 1) if s == 0 else slice(None) for s in self.stride)]

    def restore(self, flat: Tensor, strided: bool = False) -> Tensor:
        """The tensor on restored elements: of its shape, and of its strides if it was a run or they are asked for."""
        if self.dense:
            return flat.as_strided(self.shape, self.stride, flat.storage_offset())
        small = [1 if s == 0 else n for n, s in zip(self.shape, self.stride, strict=True)]
        rows = flat.view(small)
        if strided:
            rows = flat.new_empty_strided(small, self.stride).copy_(rows)
        return rows.expand(self.shape)
