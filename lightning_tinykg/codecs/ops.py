"""The quantizer as operators of PyTorch's: ``torch.compile`` and ``torch.export`` see through a call of it.

Eagerly nothing goes through here, since a dispatch costs more than the arithmetic of a small tensor. Neither operator
has a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, library

from lightning_tinykg.codecs import affine
from lightning_tinykg.codecs.packing import packed_size

_Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@library.custom_op("tinykg::quantize", mutates_args=())
def quantize_parts(tensor: Tensor, bits: int, key: int, group_size: int, metadata: torch.dtype) -> _Parts:
    """:func:`~lightning_tinykg.codecs.quantize`, giving the tensors of the code.

    Args:
        tensor: the tensor.
        bits: 1 to 12.
        key: 64 bits of key, as a signed integer.
        group_size: elements that share a scale and a zero point.
        metadata: dtype of scale and zero point.

    Returns:
        Codes, zero points, scales, and the places and elements of the groups that are kept as they are.
    """
    code = affine.quantize(tensor, bits, key=key % (1 << 64), group_size=group_size, metadata=metadata)
    return code.codes, code.zero, code.scale, code.exact_index, code.exact_value


@quantize_parts.register_fake
def _(tensor: Tensor, bits: int, key: int, group_size: int, metadata: torch.dtype) -> _Parts:
    groups = (tensor.numel() + group_size - 1) // group_size
    exact = library.get_ctx().new_dynamic_size()
    return (
        tensor.new_empty(groups, packed_size(group_size, bits), dtype=torch.uint8),
        tensor.new_empty(groups, dtype=metadata),
        tensor.new_empty(groups, dtype=metadata),
        tensor.new_empty(exact, dtype=torch.int32),
        tensor.new_empty(exact, group_size),
    )


@library.custom_op("tinykg::dequantize", mutates_args=())
def dequantize_parts(
    codes: Tensor, zero: Tensor, scale: Tensor, exact_index: Tensor, exact_value: Tensor, numel: int, bits: int
) -> Tensor:
    """:func:`~lightning_tinykg.codecs.dequantize`, from the tensors of the code.

    Args:
        codes: as :func:`quantize_parts` gives them, as the next four.
        zero: zero points.
        scale: scales.
        exact_index: places of the groups that are kept as they are.
        exact_value: their elements, shape ``[k, group_size]``, in the tensor's dtype.
        numel: elements of the tensor.
        bits: 1 to 12.

    Returns:
        Shape ``[numel]``.
    """
    group_size, dtype = exact_value.shape[1], exact_value.dtype
    parts = (codes, zero, scale, exact_index, exact_value)
    return affine.dequantize(affine.AffineCode(*parts, numel, dtype, bits, group_size))


@dequantize_parts.register_fake
def _(
    codes: Tensor, zero: Tensor, scale: Tensor, exact_index: Tensor, exact_value: Tensor, numel: int, bits: int
) -> Tensor:
    return exact_value.new_empty(numel)
