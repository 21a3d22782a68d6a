"""What an op makes for itself, and saves: a cast under autocast, a copy in another order, a log-softmax, what it drops.

Under autocast a linear layer saves its input in 16 bits, a tensor that nobody else has; a product of a transposed
tensor saves its copy in order. They are as good as the argument that they are made of, and made of it again. That they
are is told by the graph: between the node that saved a tensor and the argument's own there is nothing but a cast or a
copy, and views.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_tinykg.activations.keeping import Levels, Saved
from lightning_tinykg.activations.repeatable import COPIED, DROPOUT, FUSED_DROPOUT, REPEATABLE, SCALED, Repeatable
from lightning_tinykg.activations.storages import is_plain, node_name, storage_id, tensors_in, viewed

IN_ORDER = frozenset({"View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Expand"})
_PERMUTED = frozenset({"T", "Transpose", "Permute"})
_MADE = frozenset({"ToCopy", "Clone"})
"""Nodes of views that keep the order of the elements, of views that do not, and of what makes a tensor anew."""

_VIEWS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "Permute": lambda x, node: x.permute([_signed(dim) for dim in node._saved_dims]),
    "Transpose": lambda x, node: x.transpose(_signed(node._saved_dim0), _signed(node._saved_dim1)),
    "T": lambda x, node: x.t(),
    "Unsqueeze": lambda x, node: x.unsqueeze(_signed(node._saved_dim)),
}
"""By node: the view that it was made by, of a tensor."""

_STEPS = 8
"""Nodes between a save and an argument, at the most."""

_INPUTS = {"self": 0, "input": 0, "mat2": 1, "other": 1, "vec": 1, "weight": 1, "target": 1}
_INPUTS_BESIDE_A_SUM = {"mat1": 1, "mat2": 2, "batch1": 1, "batch2": 2, "mat": 1, "vec": 2}
"""By attribute: which input of its node a saved tensor is, also of a product that is added to something."""

_PRODUCTS = frozenset({"linear", "matmul", "__matmul__", "mm", "bmm"})
"""Ops that save their factors, as they are, cast or copied."""

Made = tuple[Repeatable, tuple[Any, ...], dict[str, Any], Tensor]
"""How a tensor was made: the op, its arguments, and the tensor, of which what was saved may be a view."""

_Origin = tuple[Tensor | None, tuple[torch.dtype, ...], float | None]


def made_within(op: str, node: Any, attribute: str, tensor: Tensor, args: tuple[Any, ...], kwargs: Any) -> Made | None:
    """How a tensor was made of an op's arguments that the op itself made, and saved; None if that is not known.

    Args:
        op: name of the op, as it was called.
        node: the autograd node that saved it.
        attribute: the saved attribute.
        tensor: the saved tensor, which is no argument of the op.
        args: the op's arguments.
        kwargs: its keyword arguments.
    """
    name = node_name(node)
    if op == "cross_entropy" and name == "LogSoftmax":
        return _log_softmax(args, kwargs, tensor)
    place = (_INPUTS_BESIDE_A_SUM if name.startswith(("Add", "Badd")) else _INPUTS).get(attribute)
    made = viewed(tensor)
    if place is None or not tensor.is_floating_point() or place >= len(node.next_functions):
        return None
    if made._version:  # it was changed since, by what may not be in the graph
        return None
    given = [argument for argument in tensors_in((args, kwargs)) if argument.is_floating_point()]
    step, output = node.next_functions[place]
    origin = (_constant(op, attribute, args, made), (), None) if step is None else _origin(step, output, given)
    argument, dtypes, factor = origin
    if argument is None or not is_plain(argument) or argument.device != made.device:
        return None
    if storage_id(argument) == storage_id(made):  # nothing was made: it is the argument
        return None
    if argument.shape == made.shape and not made.is_contiguous():  # cast as it lies, or it would be turned twice
        order = sorted(range(made.dim()), key=made.stride, reverse=True)
        argument, made = argument.permute(order), made.permute(order)
    expanded = tuple(argument.shape)
    if argument.numel() != made.numel():
        if op not in ("matmul", "__matmul__") or min(x.dim() for x in given) < 2:
            return None
        expanded = (*torch.broadcast_shapes(*(x.shape[:-2] for x in given)), *expanded[-2:])
        if math.prod(expanded) != made.numel():
            return None
    how = dtypes or (made.dtype,), expanded, tuple(made.shape)
    return (COPIED, (argument, *how), {}, made) if factor is None else (SCALED, (argument, factor, *how), {}, made)


def dropped(x: Tensor, node: Any, out: Tensor) -> Made | None:
    """How a dropout's result was made, once its mask is kept: that is all it takes to repeat it.

    Args:
        x: what it was given.
        node: its autograd node.
        out: its result.
    """
    name = "" if node is None else node_name(node)
    if name not in ("Mul", "NativeDropout") or not is_plain(out):
        return None
    fused = name == "NativeDropout"
    saved = (node._raw_saved_result1 if fused else node._raw_saved_other).data
    mask = saved.kept if isinstance(saved, Saved) else None
    if fused and mask is not None:
        return FUSED_DROPOUT, (x, mask, 1 / (1 - node._saved_p)), {}, out
    return (DROPOUT, (x, mask), {}, out) if isinstance(mask, Levels) else None


def _origin(step: Any, output: int, given: list[Tensor]) -> tuple[Tensor | None, tuple[torch.dtype, ...], float | None]:
    """The argument that something was cast or copied of, by its place in the graph.

    Returns:
        The argument as a view in the copy's order, None if it is not known; what it was cast to, one after another:
        an attention in mixed precision casts to 16 bits, and what it got to 32; and a number that it was multiplied by
        then, if it was: an attention scales its queries and keys.
    """
    copied = False
    factor: float | None = None
    dtypes: list[torch.dtype] = []
    views: list[tuple[str, Any]] = []  # of the argument, from the copy on
    for _ in range(_STEPS):
        name = node_name(step)
        leaf = step.variable if name == "AccumulateGrad" else None
        for argument in given:
            # all parts of a chunk have one node
            if (argument.grad_fn is step and argument.output_nr == output) or (leaf is not None and argument is leaf):
                known = copied or factor is not None
                return (_seen(argument, views) if known else None), tuple(reversed(dtypes)), factor
        if name in _MADE:
            if views:
                break
            copied = True
            dtypes.append(step._input_metadata[0].dtype)
        elif name == "Mul" and factor is None and not views and _is_by_a_number(step):
            if set(dtypes) - {step._input_metadata[0].dtype}:  # it was cast after it was multiplied
                break
            factor = step._saved_other
            dtypes.clear()
        elif (copied or factor is not None) and (views or name in _PERMUTED):
            views.append((name, step))
        elif name not in IN_ORDER and name not in _PERMUTED:
            break
        step, output = step.next_functions[0]
        if step is None:
            break
    return None, (), None


def _is_by_a_number(product: Any) -> bool:
    """Whether a product's other factor is no tensor, which would be unpacked if it were looked at."""
    return not hasattr(product, "_raw_saved_other") and isinstance(product._saved_other, float)


def _seen(argument: Tensor, views: list[tuple[str, Any]]) -> Tensor | None:
    """The argument as an op has seen it, through the views nearest to it last; None if one is not known."""
    for name, node in reversed(views):
        if name not in _VIEWS:
            return None
        argument = _VIEWS[name](argument, node)
    return argument


def _signed(dim: int) -> int:
    """A dimension as it was given: autograd shows a negative one as an unsigned number of 64 bits."""
    return dim - 2**64 if dim >= 2**63 else dim


def _constant(op: str, attribute: str, args: tuple[Any, ...], made: Tensor) -> Tensor | None:
    """A factor that has no place in the graph, since it needs no gradient."""
    if op not in _PRODUCTS or len(args) < 2:
        return None
    argument = args[1 if attribute == "mat2" else 0]
    return argument if not argument.requires_grad and argument.numel() == made.numel() else None


def _log_softmax(args: tuple[Any, ...], kwargs: Any, result: Tensor) -> Made | None:
    """The log-softmax of a cross entropy's input."""
    logits = args[0] if args else kwargs.get("input")
    if not isinstance(logits, Tensor) or logits.shape != result.shape:
        return None
    dim = 0 if logits.dim() == 1 else 1
    return REPEATABLE[torch.log_softmax], (logits, dim), {"dtype": result.dtype}, result
