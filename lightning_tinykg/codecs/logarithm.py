"""A tensor of logarithms, by a code of what they are the logarithms of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_tinykg.codecs.affine import AffineCode, Allocate


@dataclass(frozen=True, slots=True)
class LogarithmCode:
    """Logarithms, kept by a code of their exponentials: unbiased in these; minus infinity where one is rounded to 0.

    The backward of a log-softmax is linear in the probabilities. Of their logarithms, which reach far below zero, a
    step of 8 bits may be a tenth, and then all probabilities would be off by a tenth, with a bias.

    Attributes:
        code: of the exponentials.

    Example:
        >>> from lightning_tinykg.codecs.affine import quantize
        >>> logarithms = torch.tensor([0.5, 0.25, 0.25, 0.0]).log()
        >>> LogarithmCode(quantize(logarithms, 8, key=0, through=torch.exp)).decode().exp().round(decimals=2)
        tensor([0.5000, 0.2500, 0.2500, 0.0000])
    """

    code: AffineCode

    @property
    def name(self) -> str:
        """The codec's name in a ledger."""
        return f"{self.code.name} of exp"

    @property
    def nbytes(self) -> int:
        """All that is kept."""
        return self.code.nbytes

    def decode(self, allocate: Allocate = torch.empty) -> Tensor:
        """Restore the logarithms, flat: shape ``[numel]``."""
        return self.code.decode(allocate).log_()
