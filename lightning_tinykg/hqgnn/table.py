"""A table of embeddings as b-bit codes: what quantization leaves, and what is stored and served."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_tinykg.codecs.packing import check_bits, packed_size
from lightning_tinykg.codecs.uniform import affine, symmetric_zero

__all__ = ["Granularity", "QuantizedTable"]

Granularity = Literal["table", "node", "group"]


@dataclass(frozen=True)
class QuantizedTable:
    r"""Rows of b-bit codes with affine scales: `x = zero + scale * code`.

    One bit is the same formula: code 0 stands for `-s` and code 1 for `+s`, so `zero = -s` and `scale = 2 s`.

    Args:
        codes: uint8 `[n, d]`, values in `0 .. 2**bits - 1`; not packed.
        scale: float32, the size of one quantization step: `[1]` for the table, `[n]` for each node, or `[n, d / group]`
            for each group of neighbouring dimensions.
        zero: float32, the value of code 0, in the shape of `scale`. `None`: the levels lie symmetrically around 0, so
            that it follows from the scale (see `symmetric_zero`) and is not stored.
        bits: 1, 2, 4 or 8.

    Raises:
        TypeError: If codes are not uint8, or scales not float32.
        ValueError: If `bits` is no width, or a shape or code does not fit.

    Example:
        >>> codes = torch.tensor([[0, 3], [1, 2]], dtype=torch.uint8)
        >>> table = QuantizedTable(codes, scale=torch.tensor([1.0, 2.0]), zero=torch.tensor([-1.0, 0.0]), bits=2)
        >>> table.decode()
        tensor([[-1.,  2.],
                [ 2.,  4.]])
        >>> table.granularity, table.nbytes
        ('node', 18)
        >>> QuantizedTable(codes, scale=torch.tensor([1.0, 2.0]), zero=None, bits=2).nbytes
        10
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.codes.dtype != torch.uint8:
            raise TypeError(f"codes must be uint8, got {self.codes.dtype}")
        if self.codes.dim() != 2:
            raise ValueError(f"codes must be a matrix [n, d], got shape {tuple(self.codes.shape)}")
        for name, value in (("scale", self.scale), ("zero", self.zero)):
            if value is not None and value.dtype != torch.float32:
                raise TypeError(f"{name} must be float32, got {value.dtype}")
        if self.zero is not None and self.scale.shape != self.zero.shape:
            raise ValueError(
                f"scale and zero must have one shape, got {tuple(self.scale.shape)} and {tuple(self.zero.shape)}"
            )
        rows, dim = self.codes.shape
        shape = tuple(self.scale.shape)
        grouped = len(shape) == 2 and shape[0] == rows and shape[1] >= 1 and dim % shape[1] == 0
        if shape not in ((1,), (rows,)) and not grouped:
            raise ValueError(
                f"scale must have shape [1], [{rows}] or [{rows}, groups] with groups dividing {dim}, got {list(shape)}"
            )
        if self.codes.numel() and self.bits < 8 and int(self.codes.max()) >= 2**self.bits:
            raise ValueError(f"codes must be below 2**{self.bits}, got {int(self.codes.max())}")

    @property
    def granularity(self) -> Granularity:
        """What shares one scale: the `"table"`, a `"node"` or a `"group"` of a node's dimensions.

        A table of one row has one scale for its only node: it is called `"table"`, which says the same of it.
        """
        if self.scale.dim() == 2:
            return "group"
        return "table" if self.scale.numel() == 1 else "node"

    @property
    def group_size(self) -> int:
        """How many neighbouring dimensions of a row share a scale; all of them unless it is one per group."""
        dim = self.codes.size(1)
        return dim // self.scale.size(1) if self.scale.dim() == 2 else dim

    @property
    def nbytes(self) -> int:
        """Bytes as stored: each row's codes packed to whole bytes, the scales, and the zeros unless symmetric."""
        rows, dim = self.codes.shape
        stored = self.scale.nbytes + (0 if self.zero is None else self.zero.nbytes)
        return rows * packed_size(dim, self.bits) + stored

    def decode(self) -> Tensor:
        """The values the codes stand for, float32 `[n, d]`."""
        zero = symmetric_zero(self.scale, self.bits) if self.zero is None else self.zero
        return affine(self.codes.to(torch.float32), self.scale, zero)

    def __repr__(self) -> str:
        rows, dim = self.codes.shape
        return f"QuantizedTable({rows} x {dim}, {self.bits} bits per {self.granularity}, {self.nbytes:,} bytes)"
