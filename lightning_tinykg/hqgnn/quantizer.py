r"""The quantizer: embeddings to `2**bits` uniform levels between clip bounds, and the table of codes that is served."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_tinykg.arguments import check_choice, check_number, check_whole
from lightning_tinykg.bits.schedule import check_bits
from lightning_tinykg.codecs.packing import packed_size
from lightning_tinykg.codecs.uniform import nearest_codes, symmetric_zero
from lightning_tinykg.hqgnn.calibration import Calibration, best_clip
from lightning_tinykg.hqgnn.gste import quantize
from lightning_tinykg.hqgnn.table import Granularity, QuantizedTable

__all__ = ["Clip", "Quantizer"]

Clip = Literal["learned", "ema"]

SMALLEST = 1e-30
"""A row of zeros has an amplitude too: its step must not be 0."""


class Quantizer(nn.Module):
    r"""Uniform quantization to `2**bits` levels, symmetric around 0, from `-c` to `c`.

    The bound is `c = clip * amplitude`. Per table the amplitude is 1, and `clip` is the bound itself. Per node, or per
    group of a node's dimensions, it is the mean of `|x|` over them, which follows the embedding wherever training takes
    it, and `clip` is one number for the whole table, such as 2.5 times the mean. So nothing is kept per node while
    training; what is exported is a scale per node (BiGeaR, KDD 2022, arXiv 2206.02115, has such scales at one bit).

    `clip` is learned, by PACT's and LSQ's gradient (see `quantize`), as its logarithm: a learning rate is then a
    relative one, and it stays positive. Or it is a moving average of what `calibration` finds in each training batch.
    At one bit the output is `sign(x) * c`, with `c = mean |x|`, which has the least squared error.

    Args:
        bits: 1, 2, 4, 8, or 32: off.
        scale: What shares a scale: `"table"`, `"node"` or `"group"`.
        group_size: Neighbouring dimensions in a group, for `scale="group"`; must divide the width.
        clip: `"learned"` or `"ema"`.
        calibration: How the clip is found: `"mse"`, `"minmax"` or `"percentile"`, see `best_clip`. `None`: `"mse"`, and
            for a scale per table below 8 bits `"percentile"`: the least error is that of the many short rows, the
            ranking that of the few long ones, which a bound common to all would cut. 8 bits have levels for both.
        percentile: Share of the values within the range, for `calibration="percentile"`.
        momentum: Weight of the past in `clip="ema"`.
        window: How far beyond the outermost levels a gradient still passes to `x` at one bit, in steps of `2 c`.

    Raises:
        ValueError: If an argument has a value it can't have.

    Example:
        >>> quantizer = Quantizer(bits=1, scale="node")
        >>> x = torch.tensor([[1.0, -3.0], [0.5, 0.1]])
        >>> quantizer(x).detach()
        tensor([[ 2.0000, -2.0000],
                [ 0.3000,  0.3000]])
        >>> quantizer.encode(x)
        QuantizedTable(2 x 2, 1 bits per node, 10 bytes)
    """

    def __init__(
        self,
        bits: int = 4,
        *,
        scale: Granularity = "node",
        group_size: int = 16,
        clip: Clip = "learned",
        calibration: Calibration | None = None,
        percentile: float = 0.999,
        momentum: float = 0.9,
        window: float = 1.5,
    ) -> None:
        super().__init__()
        check_bits(bits)
        for name, value, choices in (
            ("scale", scale, Granularity),
            ("clip", clip, Clip),
            ("calibration", calibration or "mse", Calibration),
        ):
            check_choice(name, value, get_args(choices))
        check_whole("group_size", group_size, 1)
        check_number("percentile", percentile, least=0, most=1)
        check_number("momentum", momentum, least=0, most=1)
        check_number("window", window, least=0)
        self.bits, self.scale, self.group_size, self.clip = bits, scale, group_size, clip
        self.asked_calibration, self.percentile, self.momentum, self.window = calibration, percentile, momentum, window
        self.calibrated = False
        self.log_clip: Tensor
        if clip == "learned":
            self.log_clip = nn.Parameter(torch.zeros(1))
        else:
            self.register_buffer("log_clip", torch.zeros(1))

    @property
    def calibration(self) -> Calibration:
        """How the clip is found, at the width in force."""
        return self.asked_calibration or ("percentile" if self.scale == "table" and self.bits < 8 else "mse")

    def extra_repr(self) -> str:
        """The settings, for `print`."""
        group = f", group_size={self.group_size}" if self.scale == "group" else ""
        return f"bits={self.bits}, scale={self.scale!r}{group}, clip={self.clip!r}, calibration={self.calibration!r}"

    def get_extra_state(self) -> dict[str, Any]:
        """The width in force, which a schedule may have changed, and whether the clip was found for it."""
        return {"bits": self.bits, "calibrated": self.calibrated}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on with these."""
        self.bits, self.calibrated = int(state["bits"]), bool(state["calibrated"])

    # -- the range ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(self, x: Tensor, **options: Any) -> Tensor:
        """Find the clip for these embeddings: the warm start from a full-precision encoder.

        Args:
            x: Float `[n, d]`, all finite.
            options: Further options of `best_clip`.

        Returns:
            The logarithm of the clip, `[1]`, which it now is.

        Raises:
            ValueError: If `x` is empty or has a value that is not finite.
        """
        if self.bits < 32:
            if x.numel() == 0 or not bool(x.isfinite().all()):
                what = "no rows" if x.numel() == 0 else "values that are not finite"
                raise ValueError(f"embeddings to calibrate on must be finite and at least one, got {what}")
            self.log_clip.copy_(self._measure(x, **options))
        self.calibrated = True
        return self.log_clip

    def _measure(self, x: Tensor, **options: Any) -> Tensor:
        amplitude = self._amplitude(x.detach().float())
        grouped = self._grouped(x.detach().float())
        units = amplitude.reshape(-1, 1)
        weight = units.square().expand_as(grouped)  # the error that counts is that of x, not of x / amplitude
        found = best_clip(
            grouped.abs() / units,
            self.bits,
            self.calibration,
            weight=weight,
            percentile=self.percentile,
            **options,
        )
        return found.log()

    def _grouped(self, x: Tensor) -> Tensor:
        """`[n, d]` with what shares an amplitude in a row."""
        if self.scale == "table":
            return x.reshape(1, -1)
        if self.scale == "node":
            return x
        if x.size(1) % self.group_size:
            raise ValueError(f"group_size must divide the embeddings' width, {x.size(1)}, got {self.group_size}")
        return x.reshape(-1, self.group_size)

    def _amplitude(self, x: Tensor) -> Tensor:
        """Mean of `|x|` over what shares a scale: `[1]` (which is 1), `[n]` or `[n, groups]`."""
        if self.scale == "table":
            return x.new_ones(1)
        mean = self._grouped(x).abs().mean(dim=1).clamp(min=SMALLEST)
        return mean if self.scale == "node" else mean.reshape(x.size(0), -1)

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Step and value of code 0, for float32 `x` `[n, d]`: `(scale, zero)`, `[1]`, `[n]` or `[n, groups]` each."""
        step = self.log_clip.float().exp() * (2 / (2**self.bits - 1)) * self._amplitude(x)
        step = step.clamp(min=torch.finfo(torch.float32).tiny)  # of embeddings that are all the same nothing is left
        return step, symmetric_zero(step, self.bits)

    # -- quantization ------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, delta: Tensor | None = None) -> Tensor:
        """Quantize and give the levels back, with a gradient.

        Args:
            x: Float `[n, d]`.
            delta: GSTE's factor, see `quantize`; `None`: straight-through.

        Returns:
            Float32 `[n, d]`; `x` itself at 32 bits.
        """
        if self.bits == 32:
            return x
        x = x.float()
        if not self.calibrated:
            self.calibrate(x)
        if self.training and self.clip == "ema":
            self._follow(x)
        scale, zero = self.range_of(x)
        window = self.window if self.bits == 1 else 0.0
        return quantize(x, scale, zero, bits=self.bits, delta=delta, window=window)

    @torch.no_grad()
    def _follow(self, x: Tensor) -> None:
        """One step of the moving average, from a sample that costs next to nothing."""
        now = self._measure(x, limit=1 << 14).exp()
        self.log_clip.copy_((self.momentum * self.log_clip.exp() + (1 - self.momentum) * now).log())

    @torch.no_grad()
    def encode(self, x: Tensor) -> QuantizedTable:
        """The codes, deterministic: each value goes to the nearest level.

        Args:
            x: Float `[n, d]`, all finite.

        Returns:
            A table whose `decode()` is what `forward` gives in evaluation, to the last bit.

        Raises:
            ValueError: At 32 bits, where there are no codes; or if a value is not finite.
        """
        if self.bits == 32:
            raise ValueError("bits must be 1, 2, 4 or 8 to encode, got 32: full precision has no codes")
        if not bool(x.isfinite().all()):
            raise ValueError("embeddings to encode must be finite, got NaN or infinity")
        x = x.float()
        if not self.calibrated:
            self.calibrate(x)
        scale, zero = self.range_of(x)
        codes = nearest_codes(x, scale, zero, self.bits).to(torch.uint8)
        return QuantizedTable(codes, scale, None, self.bits)  # the zero of symmetric levels follows from the scale

    @torch.no_grad()
    def error(self, x: Tensor) -> Tensor:
        """Relative quantization error, `|x - Q(x)| / |x|`, a scalar; 0 at 32 bits."""
        if self.bits == 32:
            return x.new_zeros(())
        scale, zero = self.range_of(x.float())
        lost: Tensor = (x - quantize(x.float(), scale, zero, bits=self.bits)).norm()
        relative: Tensor = lost / x.norm().clamp(min=SMALLEST)
        return relative

    def clip_value(self) -> Tensor:
        """The clip, a scalar: the bound itself per table, else in units of a row's mean magnitude."""
        return self.log_clip.detach().exp().squeeze()

    def table_bytes(self, rows: int, dim: int) -> int:
        """What a table of so many embeddings takes: `QuantizedTable.nbytes`, without encoding it.

        Example:
            >>> Quantizer(bits=4, scale="node").table_bytes(10, 64), Quantizer(bits=32).table_bytes(10, 64)
            (360, 2560)
        """
        if self.bits == 32:
            return rows * dim * 4
        scales = {"table": 1, "node": rows, "group": rows * (dim // self.group_size)}[self.scale]
        return rows * packed_size(dim, self.bits) + 4 * scales
