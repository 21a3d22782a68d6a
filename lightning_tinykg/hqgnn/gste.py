r"""The generalised straight-through estimator of HQ-GNN: what the gradient of a rounding is taken to be.

An element `x` is quantized in code units, `u = (x - zero) / scale`, `e = clamp(u, 0, 2**b - 1)`, `q = round(e)`, and
comes back as `zero + scale * q`. Rounding has no useful gradient. The straight-through estimator (STE) passes `g_q` on
as it is; the generalised one (GSTE; Chen et al., RecSys 2023, arXiv 2309.01032; element by element the rule of EWGS,
Lee et al., CVPR 2021, arXiv 2104.00903) corrects it to first order for the distance between `e` and `q`:

    g_e = g_q * (1 + delta * sign(g_q) * (e - q))

since `g(e) = g(q) + H (e - q)`, with the curvature `H` taken to be `delta * |g_q|`. The unit is one quantization step,
so `|e - q| <= 1/2`. Which unit is chosen makes no difference to a `delta` from the Hessian, as long as trace, gradient
and distance are in the same one: `delta * (e - q)` has none. A fixed `delta` does depend on it.

This is not N2UQ's "G-STE" (CVPR 2022), which learns input thresholds.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_tinykg.codecs.packing import check_bits
from lightning_tinykg.codecs.uniform import affine, code_units, gather_up, nearest_codes

__all__ = ["quantize"]


def quantize(
    x: Tensor, scale: Tensor, zero: Tensor, *, bits: int, delta: Tensor | None = None, window: float = 0.0
) -> Tensor:
    r"""Round to the nearest of `2**bits` levels, with a gradient.

    To `x` goes the estimate above, and nothing where `u` lies outside the levels. To the clip range goes what goes by
    PACT (arXiv 1805.06085) and LSQ (arXiv 1902.08153), whatever `delta` is: with `zero = -c` and
    `scale = 2 c / (2**b - 1)`, `c` gets `+g` above the range, `-g` below, and the rounding error's part within. At one
    bit the output is `sign(x) * s` and `s` gets its exact derivative, `g * sign(x)`.

    Args:
        x: Float32 `[n, d]`.
        scale: Size of a step, positive; float32 `[1]`, `[n]` or `[n, groups]`.
        zero: Value of code 0; the shape of `scale`.
        bits: 1, 2, 4 or 8.
        delta: The estimator's factor, a scalar tensor on x's device, read **in the backward**: it may be filled in
            between. `None` is the STE; 0 is the STE too, to the last bit.
        window: How far beyond the outermost levels, in steps, a gradient still passes to `x`. Use it at one bit, where
            the levels `+-mean|x|` lie amid the values.

    Returns:
        Float32 `[n, d]`, to the last bit what :meth:`QuantizedTable.decode` gives of the codes.

    Raises:
        ValueError: If `bits` is no width.

    Example:
        >>> x = torch.tensor([[-0.9, 0.2, 5.0]], requires_grad=True)
        >>> scale, zero = torch.tensor([1.0]), torch.tensor([-1.0])
        >>> y = quantize(x, scale, zero, bits=2, delta=torch.tensor(1.0))
        >>> y
        tensor([[-1.,  0.,  2.]], grad_fn=<QuantizeBackward>)
        >>> y.sum().backward()
        >>> x.grad
        tensor([[1.1000, 1.2000, 0.0000]])
    """
    check_bits(bits)
    arguments = (x, scale, zero, delta, bits, window)
    result: Tensor = Quantize.apply(*arguments)  # type: ignore[no-untyped-call]  # torch does not annotate it
    return result


class Quantize(torch.autograd.Function):
    """`quantize` with its gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, delta: Tensor | None, bits: int, window: float
    ) -> Tensor:
        """Quantize; keep what backward needs: the distance to the level, a mask, and the codes for the clip range."""
        codes = nearest_codes(x, scale, zero, bits)
        u = code_units(x, scale, zero)
        top = 2**bits - 1
        passes = (u >= -window) & (u <= top + window)
        to_range = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        distance = u.clamp(0, top) - codes if delta is not None or (to_range and bits > 1) else None
        clipped = (u < 0) | (u > top) if to_range and bits > 1 else None
        ctx.save_for_backward(passes, distance, clipped, codes.to(torch.uint8) if to_range else None)
        ctx.delta = delta  # not among the saved tensors, which must not change: it is filled in before the backward
        ctx.bits, ctx.shape = bits, scale
        return affine(codes, scale, zero)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """GSTE to `x`, PACT and LSQ to the clip range."""
        passes, distance, clipped, codes = ctx.saved_tensors
        to_x = to_scale = to_zero = None
        if ctx.needs_input_grad[0]:
            to_x = grad
            if ctx.delta is not None:
                # the chain's factors, scale and 1 / scale, cancel, and the sign is that of g_q since scale is positive
                to_x = grad * (1 + ctx.delta * grad.sign() * distance)
            to_x = to_x.where(passes, 0)
        if codes is not None and ctx.bits == 1:
            to_scale, to_zero = gather_up(grad * codes, ctx.shape), gather_up(grad, ctx.shape)
        elif codes is not None:
            to_scale = gather_up(grad * codes.to(grad.dtype).where(clipped, -distance), ctx.shape)
            to_zero = gather_up(grad * clipped, ctx.shape)
        return to_x, to_scale, to_zero, None, None, None
