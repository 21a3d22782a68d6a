r"""A rotation of users and items before quantization, which no dot product can see and every rounding can.

`u . x = (u R) . (x R)` for an orthogonal `R`, so scores at full precision stay what they were, while the error of
rounding `x R` depends on `R`: where dimensions differ in spread, or are correlated, one scale for a whole row is a poor
fit, and a rotation evens them out. `"random"` does that blindly; `"itq"` looks for the rotation that loses least, by
turns (Gong and Lazebnik, CVPR 2011, "Iterative Quantization", section 2.2, there at one bit, here at any):

    B = Q(X R),    R = argmin |B - X R|^2 = V U'    with U S V' the singular value decomposition of B' X.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_tinykg.hqgnn.quantizer import Quantizer

__all__ = ["Rotate", "Rotation"]

Rotate = Literal["itq", "random", "none"]

ROWS = 8192
"""Rows that the rotation is found from: a regular sample."""
CALIBRATE_EVERY = 5
"""Turns of ITQ after which the clip is found anew, which takes longer than the turn itself."""


class Rotation(nn.Module):
    """An orthogonal matrix, found once and then kept, in checkpoints too.

    Args:
        kind: `"itq"`, `"random"` or `"none"`.
        seed: Of the random rotation, which ITQ starts from.
        steps: Turns of ITQ.

    Example:
        >>> x, rotation = torch.randn(100, 8), Rotation("itq")
        >>> rotation.fit(x, Quantizer(bits=1))
        >>> torch.allclose(rotation(x).norm(dim=1), x.norm(dim=1), atol=1e-5)
        True
    """

    def __init__(self, kind: Rotate = "itq", seed: int = 0, steps: int = 30) -> None:
        super().__init__()
        self.kind, self.seed, self.steps = kind, seed, steps
        self.matrix: Tensor | None
        self.register_buffer("matrix", None, persistent=False)  # its size is the encoder's, known late

    def extra_repr(self) -> str:
        """The settings, for `print`."""
        return f"{self.kind!r}, seed={self.seed}"

    def get_extra_state(self) -> dict[str, Any]:
        """The matrix, of whatever size."""
        return {"matrix": None if self.matrix is None else self.matrix.cpu()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on with this matrix."""
        matrix = state["matrix"]
        self.matrix = matrix if matrix is None or self.matrix is None else matrix.to(self.matrix.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotation:
        """Move it; it stays in float32: rounded to 16 bits, it would be no rotation."""
        matrix = self.matrix
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # of PyTorch
        if matrix is not None and self.matrix is not None:
            self.matrix = matrix.to(self.matrix.device)
        return self

    @torch.no_grad()
    def fit(self, x: Tensor, quantizer: Quantizer) -> None:
        """Find the rotation for these rows.

        Args:
            x: Float `[n, d]`, as they will be rotated and quantized.
            quantizer: What they will be quantized with; its clip is left somewhere near.
        """
        if self.kind == "none" or quantizer.bits == 32:
            return
        with torch.autocast(x.device.type, enabled=False):
            matrix = self._found(x, quantizer)
        with torch.inference_mode(False):  # Lightning's evaluation, whose tensors no later training could use
            self.matrix = matrix.clone()

    def _found(self, x: Tensor, quantizer: Quantizer) -> Tensor:
        """The matrix."""
        # on the CPU: the same on every device, and small
        generator = torch.Generator().manual_seed(self.seed)
        dim = x.size(1)
        basis, signs = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator))
        matrix: Tensor = (basis * signs.diagonal().sign()).float().to(x.device)
        if self.kind == "itq":
            sample = x[:: -(-x.size(0) // ROWS)].float()
            was_training = quantizer.training
            quantizer.eval()
            for step in range(self.steps):
                if step % CALIBRATE_EVERY == 0:
                    quantizer.calibrate(sample @ matrix, limit=1 << 15)
                rounded = quantizer(sample @ matrix)
                left, _, right = torch.linalg.svd(sample.t() @ rounded)
                matrix = left @ right
            quantizer.train(was_training)
        return matrix

    def forward(self, x: Tensor) -> Tensor:
        """`x R`, `[n, d]`; `x` itself as long as there is no rotation."""
        if self.matrix is None:
            return x
        with torch.autocast(x.device.type, enabled=False):
            return x.float() @ self.matrix.to(x.device)
