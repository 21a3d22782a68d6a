"""Saved tensors that a backward only compares: which messages equal the maximum, how far logits are below their sum.

Of a maximum over neighbours, the backward asks which messages equal it. Alone, either is needed to the last bit. Of
both together a bit for each message is enough: other tensors give the same answers, 1 where a message differs from the
maximum and 0 where it does not, and zeros for the maximum. So it is with a log-sum-exp, whose backward takes the
exponential of a difference: the probability, in which it is linear.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_tinykg.activations.following import Follower
from lightning_tinykg.activations.forms import Forms
from lightning_tinykg.activations.keeping import Kept, Levels, Saved
from lightning_tinykg.activations.ledger import Entry
from lightning_tinykg.activations.rules import COMPARED, LOGARITHM
from lightning_tinykg.activations.storages import Layout, is_plain, node_name
from lightning_tinykg.activations.values import Values
from lightning_tinykg.activations.widths import Widths
from lightning_tinykg.codecs.affine import FLOAT_DTYPES, quantize
from lightning_tinykg.codecs.chunks import chunk_elements
from lightning_tinykg.codecs.logarithm import LogarithmCode
from lightning_tinykg.codecs.lossless import Code, ShapeCode, encode_bool, encode_signs

_Answer = Callable[[Any, str, Tensor, Tensor], Tensor | None]


class Comparison(NamedTuple):
    """What the backward of a node compares.

    Attributes:
        asked: the saved attributes that are compared: an answer is kept of each.
        other: the one that they are compared with: zeros are restored for it.
        answer: of the node, one of ``asked``, its tensor and the other: whether elements differ, or numbers whose signs
            tell which is more, or logarithms of probabilities; of the tensor's shape, None if it can't be told.
        bits: of an answer; 0 for logarithms, which are rounded.
    """

    asked: tuple[str, ...]
    other: str
    answer: _Answer
    bits: int


def _dim(dim: int, tensor: Tensor) -> int:
    """A dimension that a node has, where negative ones read as unsigned."""
    return (dim - (1 << 64) if dim >> 63 else dim) % max(tensor.dim(), 1)


def _unreduced(node: Any, tensor: Tensor, result: Tensor) -> Tensor:
    """A result, with a dimension of size 1 for each that was reduced."""
    if node._saved_keepdim:
        return result
    dims = [_dim(dim, tensor) for dim in node._saved_dim] or range(tensor.dim())
    return result.reshape([1 if dim in dims else size for dim, size in enumerate(tensor.shape)])


def _differs(result: Tensor, dim: int, index: Tensor, like: Tensor) -> Tensor:
    """Whether elements differ from those of the result that an index names: a chunk at a time."""
    differs = torch.empty_like(like, dtype=torch.bool)
    rows = max(chunk_elements(like.device) * like.shape[0] // max(like.numel(), 1), 1)
    by_row = dim == 0 and not any(index.stride()[1:])
    for start in range(0, like.shape[0], rows):
        some = slice(start, start + rows)
        if by_row:
            picked = result.index_select(0, index[some].reshape(like[some].shape[0], -1)[:, 0])
        else:
            picked = (result if dim == 0 else result[some]).gather(dim, index[some])
        torch.ne(like[some], picked, out=differs[some])
    return differs


def _extreme(node: Any, attribute: str, tensor: Tensor, result: Tensor) -> Tensor:
    return tensor.ne(_unreduced(node, tensor, result))


def _extreme_of_all(node: Any, attribute: str, tensor: Tensor, result: Tensor) -> Tensor:
    # of NaN it is the NaNs that get the gradient
    return tensor.ne(result).logical_and_(tensor.isnan().logical_and_(result.isnan()).logical_not_())


def _extreme_of_rows(node: Any, attribute: str, tensor: Tensor, result: Tensor) -> Tensor | None:
    if attribute == "self":  # what was there before
        return tensor.ne(result)
    index = node._saved_index
    if index.shape != tensor.shape or not tensor.numel():
        return None
    dim = _dim(node._saved_dim, tensor)
    if any(here < there for n, (here, there) in enumerate(zip(result.shape, tensor.shape, strict=True)) if n != dim):
        return None
    within = tuple(slice(size) if n != dim else slice(None) for n, size in enumerate(tensor.shape))
    return _differs(result[within], dim, index, tensor)


def _extreme_of_segments(node: Any, attribute: str, data: Tensor, result: Tensor) -> Tensor | None:
    # a node has either
    ends = node._saved_lengths.cumsum(-1) if node._saved_offsets is None else node._saved_offsets[..., 1:].contiguous()
    if node._saved_axis != 0 or ends.dim() != 1 or not data.numel() or not result.numel():
        return None
    places = torch.arange(data.shape[0], dtype=ends.dtype, device=data.device)
    # what is in no segment is not asked for
    segment = torch.searchsorted(ends, places, right=True).clamp_(max=result.shape[0] - 1)
    index = segment.view(-1, *[1] * (data.dim() - 1)).expand_as(data)
    return _differs(result, 0, index, data).logical_and_(data.isnan().logical_not_())


def _order(node: Any, attribute: str, tensor: Tensor, other: Tensor) -> Tensor | None:
    # infinities that are equal have no difference; what is not a number stays that
    alike = tensor.shape == other.shape and tensor.dtype == other.dtype
    return (tensor - other).masked_fill_(tensor == other, 0) if alike else None


def _logarithm(node: Any, attribute: str, tensor: Tensor, result: Tensor) -> Tensor:
    return tensor - _unreduced(node, tensor, result)


COMPARISONS = {
    "Amax": Comparison(("self",), "result", _extreme, 1),
    "Amin": Comparison(("self",), "result", _extreme, 1),
    "Max": Comparison(("self",), "result", _extreme_of_all, 1),
    "Min": Comparison(("self",), "result", _extreme_of_all, 1),
    "ScatterReduce": Comparison(("self", "src"), "result", _extreme_of_rows, 1),
    "SegmentReduce": Comparison(("data",), "result", _extreme_of_segments, 1),
    "Maximum": Comparison(("self",), "other", _order, 2),
    "Minimum": Comparison(("self",), "other", _order, 2),
    "Logsumexp": Comparison(("self",), "result", _logarithm, 0),
}
"""By node: what it compares, where the table of rules says that it does."""


class Comparer:
    """Keeps what is compared in one forward.

    Args:
        values: the storages.
        forms: gives the keys of the noise.
        widths: in how many bits.
        follower: knows what can be made again; None where nothing is.
        min_bytes: what is smaller is kept as it is.
    """

    def __init__(self, values: Values, forms: Forms, widths: Widths, follower: Follower | None, min_bytes: int) -> None:
        self._values = values
        self._forms = forms
        self._widths = widths
        self._follower = follower
        self._min_bytes = min_bytes
        self._node: Any = None
        self._kept: dict[str, Levels] = {}

    def kept(self, node: Any, attribute: str, given: Any, entry: Entry) -> Kept | None:
        """What is kept of a saved attribute for a comparison; None if it has to be exact.

        Args:
            node: the autograd node.
            attribute: the attribute, of which nothing is kept yet.
            given: what the op was given, with tensors among it.
            entry: where to write down what is kept.
        """
        if self._node is not node:  # its saves come one after the other
            self._node, self._kept = node, self._compare(node, given)
        kept = self._kept.pop(attribute, None)
        if kept is not None:
            entry.need, entry.codec, entry.stored_bytes = COMPARED.value, kept.code.name, kept.code.nbytes
        return kept

    def forget(self) -> None:
        """Let go of the last node."""
        self._node, self._kept = None, {}

    def _compare(self, node: Any, given: Any) -> dict[str, Levels]:
        """What is kept of each attribute; nothing if they can't be compared, or take less exactly."""
        comparison = COMPARISONS[node_name(node)]
        tensors = {}
        for attribute in (*comparison.asked, comparison.other):
            saved = getattr(node, f"_raw_saved_{attribute}").data
            tensor = saved.tensor if isinstance(saved, Saved) else None
            if tensor is None or not is_plain(tensor) or tensor._version != saved.version:
                return {}
            if tensor.dtype not in FLOAT_DTYPES or self._values.is_users(tensor, given):
                return {}
            tensors[attribute] = tensor
        exactly = sum(self._bytes_exactly(tensor) for tensor in tensors.values())
        other = tensors.pop(comparison.other)
        least = self._widths.least(other, LOGARITHM)
        if exactly < self._min_bytes or (not comparison.bits and least == 32):
            return {}
        compared = sum(
            tensor.numel() * comparison.bits // 8 or self._widths.size(Layout.of(tensor), least)
            for tensor in tensors.values()
        )
        if compared >= exactly:
            return {}
        kept = {comparison.other: Levels(ShapeCode(other.numel(), other.dtype, other.device), Layout.of(other))}
        for attribute, tensor in tensors.items():
            answer = comparison.answer(node, attribute, tensor, other)
            if answer is None:
                return {}
            layout = Layout.of(answer)
            kept[attribute] = Levels(self._code(answer, layout, tensor.dtype, comparison.bits or least), layout)
        return kept

    def _code(self, answer: Tensor, layout: Layout, dtype: torch.dtype, bits: int) -> Code:
        run = layout.run(answer)
        if answer.dtype == torch.bool:
            return encode_bool(run, dtype)
        if bits == 2:
            return encode_signs(run)
        return LogarithmCode(
            quantize(
                run, bits, key=self._forms.next_key(), group_size=self._widths.group(layout, bits), through=torch.exp
            )
        )

    def _bytes_exactly(self, tensor: Tensor) -> float:
        """The bytes to keep a tensor, or what it is made of, exactly."""
        layout = Layout.of(tensor)
        record = self._values.of(tensor).record(layout, tensor.dtype, tensor._version)
        if record is not None and record.bits == 32:
            return 0
        own = layout.numel * tensor.itemsize
        return own if self._follower is None else self._follower.bytes_exactly(tensor, own)
