"""One table: what does the backward of an op need of each tensor that it saved?

Stochastic rounding is unbiased only where the gradient is linear in the saved tensor. So each (autograd node, saved
attribute) has a need, from the formula of its backward (PyTorch's ``derivatives.yaml``):

============  ======================================================  =========================  ==================
need          the backward ...                                        kept                       gradient
============  ======================================================  =========================  ==================
``SHAPE``     asks for nothing but the sizes                          nothing                    exact
a ``Side``    asks on which side of a threshold an element lies       1 bit                      exact
``SIGN``      multiplies by the sign                                  2 bits                     exact
``MASK``      multiplies by a constant, possibly a two-level mask     1 bit, or b bits           exact, or unbiased
``LINEAR``    is linear in it (products, matrix products)             b bits                     unbiased
``WEIGHT``    is linear in it; of what is narrow, it is divided by    b bits, or the elements    unbiased, or exact
              a sum of few of its elements
``SMOOTH``    is a smooth, non-linear function of it                  more bits                  bounded
``NORM``      is one too, and what it normalizes is much used         8 bits                     bounded
``ANGLE``     is a periodic function of it                            more bits, of a turn       bounded
``LOGARITHM`` is linear in its exponential                            more bits of that          unbiased
``COMPARED``  compares it with another tensor that it saved           1 or 2 bits, or b bits     exact, or unbiased
``UNKNOWN``   is nobody's knowledge: a custom function's              at least 8 bits            not known
``DIVISOR``   divides by it                                           the elements               exact
``EXACT``     compares it, or needs it as it is                       the elements, as they are  exact
============  ======================================================  =========================  ==================

"Unbiased" is said of one op. A tensor that several ops save is rounded once, for all of them; where two of them lie on
one path of the gradient and multiply element by element, as in ``a * (a * h)``, the square of the rounded value is what
comes through, which exceeds the square by the variance of the rounding. So factors of several products get more bits,
as smooth ones do (:mod:`~lightning_tinykg.activations.widths`): at 4 bits the excess is about a hundredth.

What an exponential gives, or is divided, is often a weight that its sum over a neighbourhood is about to divide:
``e = s.exp(); e / sum(e)[target]``. Rounding is off by a step of the group's range, which is as wide as the largest
weight of any neighbourhood, and the sum of another may be far smaller than that step. So where rows are narrow, and
hold weights, it is kept exactly: mostly that is, made again from the logits. Where they are wide a row has its own
scale.

What a layer norm or an RMS norm normalizes gets 8 bits at any width, since it pays for itself: by groups that never
straddle two rows it has a scale for each row, so that the normalized rows are as exact as they are from a code of their
own, and these, their activation, and what goes into the layers that follow are all made of it again.

What is only compared (:mod:`~lightning_tinykg.activations.compared`) is kept exactly where that takes less.

What is needed as it is, is not made again of sums over edges on a GPU, which are added up in another order each time:
the backward of an infinity norm looks for the elements that equal it.

A node that is not in the table is kept exactly if it is one of PyTorch's own, and is ``UNKNOWN`` if it is a custom
function or a compiled graph. Whoever knows better about a custom function says so in the table:
``RULES["MyFunction"] = {"tensors": EXACT}``. Integers and bools are kept without loss, always.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from math import inf, isnan, nan
from typing import Any

from torch import Tensor

from lightning_tinykg.activations.storages import node_name
from lightning_tinykg.codecs.cuts import Cut


class Need(Enum):
    """What a backward needs of a saved tensor; see the table above."""

    SHAPE = "shape"
    SIGN = "sign"
    MASK = "mask"
    LINEAR = "linear"
    WEIGHT = "weight"
    SMOOTH = "smooth"
    NORM = "norm"
    ANGLE = "angle"
    LOGARITHM = "logarithm"
    COMPARED = "compared"
    UNKNOWN = "unknown"
    DIVISOR = "divisor"
    EXACT = "exact"


SHAPE, SIGN, MASK, LINEAR, WEIGHT, SMOOTH, NORM, ANGLE, LOGARITHM, COMPARED, UNKNOWN, DIVISOR, EXACT = Need


@dataclass(frozen=True)
class Side:
    """A backward that only asks on which side of a threshold an element lies.

    Attributes:
        inside: the question, as the op's own kernel asks it, so that NaN gets the kernel's answer: 1 is yes.
        levels: an element to restore for "no" and one for "yes": any that give the same answer.
    """

    inside: Cut
    levels: tuple[float, float]


Rule = Need | Side

_Rules = Mapping[str, Rule | Callable[[Any], Rule]]

RELU = Side(Cut(0.0, 0.0, above=1, nan=1), (0.0, 1.0))
LEAKY_RELU = Side(Cut(0.0, 0.0, above=1), (-1.0, 1.0))
HARDSIGMOID = Side(Cut(-3.0, 3.0, within=1, open=True), (4.0, 0.0))
FINITE = Side(Cut(-inf, inf, within=1, open=True), (inf, 0.0))


def _threshold(node: Any) -> Rule:
    bound = node._saved_threshold
    if isnan(bound):
        return EXACT
    return Side(Cut(bound, bound, above=1, nan=1, wide_on_cpu=True), (-inf, nan))


def _clamp(node: Any) -> Rule:
    if hasattr(node, "_raw_saved_min") or hasattr(node, "_raw_saved_max"):
        return EXACT  # the ends are tensors
    low, high = getattr(node, "_saved_min", None), getattr(node, "_saved_max", None)
    low, high = -inf if low is None else low, inf if high is None else high
    if not low <= high:
        return EXACT
    return Side(Cut(low, high, within=1), (nan, low if low > -inf else high))


def _hardtanh(node: Any) -> Rule:
    low, high = node._saved_min_val, node._saved_max_val
    if not high - low > max(abs(low), abs(high)) / 64:
        return EXACT  # rounded to bfloat16, nothing might be between them
    return Side(Cut(low, high, within=1, nan=1, open=True), (inf, (low + high) / 2))


def _shrink(node: Any) -> Rule:
    bound = node._saved_lambd
    if not bound >= 0:
        return EXACT
    return Side(Cut(-bound, bound, below=1, above=1, nan=1), (0.0, inf))


def _vector_norm(node: Any) -> Rule:
    # the 2-norm's own backward is linear in x; normalize divides by the norm and multiplies by x again
    return {2: SMOOTH, 1: SIGN}.get(node._saved_ord, EXACT)


def _norm(node: Any) -> Rule:
    return {2: SMOOTH, 1: SIGN}.get(getattr(node, "_saved_p", 2), EXACT)


def _power(node: Any) -> Rule:
    exponent = node._saved_exponent
    if isinstance(exponent, (Tensor, complex)) or exponent != int(exponent) or exponent < 1:
        return EXACT  # near zero the derivative has no bound
    return LINEAR if exponent <= 2 else SMOOTH


def _elu(node: Any) -> Rule:
    # SELU and other alphas have a kink at 0, which rounding moves elements across
    return SMOOTH if node._saved_alpha * node._saved_input_scale == 1 else EXACT


def _reduce(node: Any) -> Rule:
    return {"sum": SHAPE, "mean": SHAPE, "prod": EXACT}.get(node._saved_reduce, COMPARED)


_PRODUCT: _Rules = {"self": LINEAR, "other": LINEAR}
_MATRIX_PRODUCT: _Rules = {"self": LINEAR, "mat2": LINEAR}
# query and key stand in the exponent: what rounding does to large logits has no bound; the rest is linear in the others
_ATTENTION: _Rules = {"query": EXACT, "key": EXACT, "value": LINEAR, "output": LINEAR}
_NORM_INPUT: _Rules = {"input": NORM}
_SMOOTH_NORM_INPUT: _Rules = {"input": SMOOTH}
_SHAPE_ONLY: _Rules = {"self": SHAPE}
_SMOOTH_INPUT: _Rules = {"self": SMOOTH}
_SMOOTH_RESULT: _Rules = {"result": SMOOTH}
_WEIGHTS: _Rules = {"result": WEIGHT}
_COMPARED_WITH_RESULT: _Rules = {"self": COMPARED, "result": COMPARED}
_COMPARED_WITH_OTHER: _Rules = {"self": COMPARED, "other": COMPARED}

RULES: dict[str, _Rules] = {
    # products: linear in each factor
    "Mul": {"self": MASK, "other": MASK},
    "Addcmul": {"tensor1": LINEAR, "tensor2": LINEAR},
    "Dot": {"self": LINEAR, "tensor": LINEAR},
    "Vdot": _PRODUCT,
    "LinalgCross": _PRODUCT,
    "Lerp": {"weight": LINEAR, "self": LINEAR, "end": LINEAR},
    "Mm": _MATRIX_PRODUCT,
    "Bmm": _MATRIX_PRODUCT,
    "GroupedMm": _MATRIX_PRODUCT,
    "Mv": {"self": LINEAR, "vec": LINEAR},
    "Addmm": {"mat1": LINEAR, "mat2": LINEAR},
    "Addmv": {"mat": LINEAR, "vec": LINEAR},
    "Addr": {"vec1": LINEAR, "vec2": LINEAR},
    "Addbmm": {"batch1": LINEAR, "batch2": LINEAR},
    "Baddbmm": {"batch1": LINEAR, "batch2": LINEAR},
    "Linear": {"input": LINEAR, "weight": LINEAR},
    "Convolution": {"input": LINEAR, "weight": LINEAR},
    "SparseAddmm": {"mat2": LINEAR},
    "SparseSampledAddmm": {"mat1": LINEAR, "mat2": LINEAR},
    "SparseMmReduceImpl": {"other": LINEAR},
    "Trilinear": {"i1": LINEAR, "i2": LINEAR, "i3": LINEAR},
    "GridSampler2D": {"input": LINEAR},
    "GridSampler3D": {"input": LINEAR},
    "MseLoss": {"self": LINEAR, "target": LINEAR},
    "Var": _PRODUCT,
    "Std": {"self": LINEAR},
    # a quotient is linear in its numerator alone
    "Div": {"self": WEIGHT, "other": DIVISOR},
    # results whose derivative is themselves
    "Exp": _WEIGHTS,
    "Exp2": _WEIGHTS,
    "Expm1": _WEIGHTS,
    # powers and norms
    "Pow": {"self": _power},
    "LinalgVectorNorm": {"self": _vector_norm, "result": DIVISOR},
    "Norm": {"self": _norm, "result": DIVISOR},
    # sides
    "Relu": {"result": RELU},
    "LeakyRelu": {"self": LEAKY_RELU, "result": LEAKY_RELU},
    "Threshold": {"self": _threshold},
    "Clamp": {"self": _clamp},
    "ClampMin": {"self": _clamp},
    "ClampMax": {"self": _clamp},
    "Hardtanh": {"self": _hardtanh, "result": _hardtanh},
    "Hardsigmoid": {"self": HARDSIGMOID},
    "Hardshrink": {"self": _shrink},
    "Softshrink": {"self": _shrink},
    "NanToNum": {"self": FINITE},
    "Abs": {"self": SIGN},
    # smooth functions of the input
    **dict.fromkeys(
        ("Celu", "Gelu", "Silu", "Mish", "Softplus", "LogSigmoid", "Glu", "Sinh", "Cosh", "Atan", "Asinh", "Erf"),
        _SMOOTH_INPUT,
    ),
    "Elu": {"self": _elu},
    "Sin": {"self": ANGLE},
    "Cos": {"self": ANGLE},
    # smooth functions of the result
    **dict.fromkeys(("Tanh", "Sigmoid", "Softmax", "SafeSoftmax"), _SMOOTH_RESULT),
    # gradient - exp(result) * sum: an item's probability may be rounded to none, its logarithm may not
    "LogSoftmax": {"result": LOGARITHM},
    # the sigmoid of self, less the target
    "BinaryCrossEntropyWithLogits": {"self": SMOOTH, "target": LINEAR},
    # two that are compared
    **dict.fromkeys(("Amax", "Amin", "Max", "Min", "Logsumexp"), _COMPARED_WITH_RESULT),
    **dict.fromkeys(("Maximum", "Minimum"), _COMPARED_WITH_OTHER),
    # normalisation: statistics stay exact
    **dict.fromkeys(("NativeLayerNorm", "FusedRmsNorm"), _NORM_INPUT),
    **dict.fromkeys(
        ("NativeGroupNorm", "NativeBatchNorm", "NativeBatchNormLegit",
         "NativeBatchNormLegitNoTraining", "BatchNormWithUpdate", "BatchNormNoUpdate", "CudnnBatchNorm",
         "MiopenBatchNorm"),
        _SMOOTH_NORM_INPUT,
    ),
    # fused attention
    **dict.fromkeys(
        ("ScaledDotProductFlashAttentionForCpu", "ScaledDotProductFlashAttention",
         "ScaledDotProductEfficientAttention", "ScaledDotProductCudnnAttention"),
        _ATTENTION,
    ),
    # only the sizes
    "IndexAdd": {"source": SHAPE},
    "IndexCopy": {"source": SHAPE},
    "IndexPut": {"values": SHAPE},
    "Put": {"source": SHAPE},
    "ScatterReduce": dict.fromkeys(("self", "src", "result"), _reduce),
    "SegmentReduce": dict.fromkeys(("data", "result"), _reduce),
    "NllLoss": _SHAPE_ONLY,
    "NllLoss2D": _SHAPE_ONLY,
    **dict.fromkeys(
        ("Gather", "MaskedSelect", "Take", "FftR2C", "AvgPool2D", "AvgPool3D", "AdaptiveAvgPool2D", "AdaptiveAvgPool3D",
         "MaxPool2DWithIndices", "MaxPool3DWithIndices", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D",
         "ReflectionPad1D", "ReflectionPad2D", "ReflectionPad3D",
         "ReplicationPad1D", "ReplicationPad2D", "ReplicationPad3D"),
        _SHAPE_ONLY,
    ),
}  # fmt: skip  # a table, read as one
"""The table: node name (without ``Backward0``) -> saved attribute -> need, or a function of the node that gives it."""


def rule_for(node: Any, attribute: str) -> Rule:
    """The need of one saved attribute of an autograd node.

    Args:
        node: the autograd node (a tensor's ``grad_fn``), or None where it is not known.
        attribute: the saved attribute's name without ``_raw_saved_``.

    Returns:
        The need, from :data:`RULES`; for what is not there, ``UNKNOWN`` if it is a custom function, a compiled graph or
        nothing that an op has claimed, and ``EXACT`` if it is an op of PyTorch's own.

    Example:
        >>> import torch
        >>> x = torch.randn(3, requires_grad=True)
        >>> rule_for(x.exp().grad_fn, "result"), rule_for(x.log().grad_fn, "self")
        (<Need.WEIGHT: 'weight'>, <Need.EXACT: 'exact'>)
    """
    if node is None:
        return UNKNOWN
    rule = RULES.get(node_name(node), {}).get(attribute, UNKNOWN if attribute == "tensors" else EXACT)
    return rule if isinstance(rule, (Need, Side)) else rule(node)
