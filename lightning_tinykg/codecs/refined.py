r"""12 bits: a code of 8, and one of 4 of what that leaves.

Between 8 bits and the exact 32 there is a factor of four in bytes, and under a budget a tensor that decides would have
to take it whole. The remainder of stochastic rounding is less than one step `s` to either side. Rounded to 4 bits,
again stochastically, it is restored with a variance of at most

.. math:: (2 s / 15)^2 / 4

a 56th of that of 8 bits, in 13 bits an element where 8 take 8.5. The code is as unbiased as its parts: whatever the
first restores, the expectation of the second is what is missing. It is made by the kernels that there are, on any
device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lightning_tinykg.codecs.affine import AffineCode, Allocate, dequantize, quantize, quantized_size
from lightning_tinykg.codecs.noise import make_key

REFINED_BITS = 12
"""The width: 8 bits, and 4 of the remainder."""

LEVELS = {bits: 2.0**bits - 1 for bits in range(1, 9)} | {REFINED_BITS: 255 * 7.5}
"""By width: into how many steps a group's range is divided."""


@dataclass(frozen=True, slots=True)
class RefinedCode:
    """A tensor in 12 bits.

    Attributes:
        coarse: it in 8 bits.
        fine: what is missing in ``coarse``, in 4 bits.
    """

    coarse: AffineCode
    fine: AffineCode

    @property
    def name(self) -> str:
        """The codec's name in a ledger."""
        return f"int{REFINED_BITS}"

    @property
    def nbytes(self) -> int:
        """All that is kept."""
        return self.coarse.nbytes + self.fine.nbytes

    def decode(self, allocate: Allocate = torch.empty) -> Tensor:
        """Restore the tensor, flat: shape ``[numel]``, in its own dtype."""
        return self.coarse.decode(allocate).add_(self.fine.decode(allocate))


def round_to(tensor: Tensor, bits: int, *, key: int, group_size: int) -> AffineCode | RefinedCode:
    """Quantize a tensor to any width that there is.

    To 12 bits, it needs the tensor's own memory once more meanwhile.

    Args:
        tensor: as for :func:`~lightning_tinykg.codecs.affine.quantize`.
        bits: 1 to 8, or 12.
        key: of the noise.
        group_size: elements that share a scale and a zero point.

    Returns:
        Its code.

    Raises:
        ValueError: if an argument can't be used.

    Example:
        >>> x = torch.randn(1000)
        >>> error = {bits: (round_to(x, bits, key=0, group_size=64).decode() - x).square().mean() for bits in (8, 12)}
        >>> bool(error[12] < error[8] / 40)
        True
    """
    if bits != REFINED_BITS:
        return quantize(tensor, bits, key=key, group_size=group_size)
    coarse = quantize(tensor, 8, key=key, group_size=group_size)
    missing = dequantize(coarse).neg_().view(tensor.shape).add_(tensor)
    if coarse.exact_index.numel():  # infinity minus infinity: nothing is missing there
        missing.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    return RefinedCode(coarse, quantize(missing, 4, key=make_key(key, 1), group_size=group_size))


@lru_cache(maxsize=4096)
def rounded_size(numel: int, bits: int, group_size: int) -> int:
    """The bytes of what :func:`round_to` returns, were no group of it kept exactly.

    Example:
        >>> [rounded_size(64 * 1000, bits, group_size=64) for bits in (4, 8, 12)]
        [36000, 68000, 104000]
    """
    parts = (8, 4) if bits == REFINED_BITS else (bits,)
    return sum(quantized_size(numel, part, group_size) for part in parts)
