r"""How curved the loss is where the embeddings were rounded: the Hessian's trace, and GSTE's `delta` from it.

`delta = max(0, mean of the Hessian's diagonal / mean |gradient|)`, both with respect to the codes, over the rows that
occur in the batch and no others: over a whole table both would depend on how large the catalogue is. It is what makes
`delta * |g|` equal to the curvature on average (see `gste`). EWGS divides by 3 standard deviations of the gradient
instead (arXiv 2104.00903, section 3.3).

The quantizer is the last operation before the score, so the Hessian sees the loss's head only, never the graph.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_tinykg.arguments import check_number

__all__ = ["MAX_DELTA", "Curvature", "TraceEstimate", "bpr_curvature", "bpr_trace", "curvature", "hutchinson"]

MAX_DELTA = 2.0
"""Above it, GSTE would turn the sign of some gradient: `|e - q| <= 1/2`."""

EPSILON = 1e-12


@dataclass(frozen=True)
class Curvature:
    """What `delta` is made of.

    Attributes:
        trace: Mean of the Hessian's diagonal over the elements of the batch's rows, a scalar.
        gradient: Mean absolute gradient over the same elements, a scalar.
    """

    trace: Tensor
    gradient: Tensor

    @property
    def delta(self) -> Tensor:
        """`trace / gradient`, within `0 .. MAX_DELTA`; 0 where it is not a number. A scalar.

        Example:
            >>> Curvature(torch.tensor(1.0), torch.tensor(4.0)).delta, Curvature(torch.zeros(()), torch.zeros(())).delta
            (tensor(0.2500), tensor(0.))
        """
        return (self.trace / (self.gradient + EPSILON)).nan_to_num(0.0, 0.0, 0.0).clamp(0.0, MAX_DELTA)


def bpr_trace(
    users: Tensor,
    positives: Tensor,
    negatives: Tensor,
    user_step: Tensor | float = 1.0,
    positive_step: Tensor | float = 1.0,
    negative_step: Tensor | float = 1.0,
) -> Tensor:
    r"""The trace of the Hessian of the BPR loss with dot-product scores, in closed form.

    With `s = z_u . (z_i - z_j)` and `p = sigmoid(s) sigmoid(-s)`, the second derivative of `softplus(-s)`:

        Tr = mean over the batch of p * ( |z_i - z_j|^2 + 2 |z_u|^2 ),

    each square times `(dz/dq)^2`, the square of the step that the element is quantized with. Rows that occur in several
    triples need no care, for the Hessian's diagonal adds up over triples; a positive must not be its own negative.

    Args:
        users: Float `[B, d]`.
        positives: Float `[B, d]`.
        negatives: Float `[B, d]`.
        user_step: Size of a quantization step, broadcastable to `[B, d]`; 0 where the users are not quantized.
        positive_step: The same of the positive items.
        negative_step: The same of the negative items.

    Returns:
        A scalar, never negative, without gradient.

    Example:
        >>> one = torch.ones(2, 3)
        >>> bpr_trace(one, one, one)   # p = 1/4, and 2 |z_u|^2 = 6
        tensor(1.5000)
    """
    to_users, to_positives, to_negatives, _ = _bpr_diagonals(
        users, positives, negatives, user_step, positive_step, negative_step
    )
    return (to_users + to_positives + to_negatives).sum(dim=1).mean()


@torch.no_grad()
def _bpr_diagonals(
    users: Tensor,
    positives: Tensor,
    negatives: Tensor,
    user_step: Tensor | float,
    positive_step: Tensor | float,
    negative_step: Tensor | float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per triple the Hessian's diagonals, `[B, d]` each, without the mean's `1 / B`; and `-dL/ds`, `[B, 1]`."""
    difference = positives - negatives
    score = (users * difference).sum(dim=1, keepdim=True)
    miss = torch.sigmoid(-score)
    p = torch.sigmoid(score) * miss
    item = p * users.square()
    steps = [torch.as_tensor(step, device=users.device) for step in (user_step, positive_step, negative_step)]
    return (
        p * (difference * steps[0]).square(),
        item * steps[1].square(),
        item * steps[2].square(),
        miss,
    )


@torch.no_grad()
def bpr_curvature(
    rows: tuple[Tensor, Tensor, Tensor],
    ids: tuple[Tensor, Tensor, Tensor],
    steps: tuple[Tensor | None, Tensor, Tensor],
) -> Curvature:
    """Trace and gradient of the BPR loss with respect to the codes, in closed form: no backward, no randomness.

    Without the mean's `1 / B`, which `delta` does not depend on.

    Args:
        rows: Users, positives and negatives as they were scored, float `[B, d]` each.
        ids: Their ids, int64 `[B]` each, users and items apart. A row's gradient is the sum over the triples it is in.
        steps: Their quantization steps, broadcastable to `[B, d]`; `None` for users that are not quantized, which then
            are not counted.

    Returns:
        Scalars on the rows' device; nothing is synchronised.

    Example:
        >>> rows, ids = (torch.ones(1, 2), torch.ones(1, 2), torch.zeros(1, 2)), (torch.tensor([0]),) * 3
        >>> f"{bpr_curvature(rows, (ids[0], ids[1], ids[2] + 1), (None, torch.ones(1, 1), torch.ones(1, 1))).delta:.3f}"
        '0.881'
    """
    users, positives, negatives = (row.detach().float() for row in rows)
    user_id, positive_id, negative_id = ids
    user_step, positive_step, negative_step = steps
    # an item that is both has no say in the loss: the two halves of its gradient cancel
    apart = (positive_id != negative_id)[:, None]
    diagonals = _bpr_diagonals(
        users,
        positives,
        negatives,
        0.0 if user_step is None else user_step,
        positive_step * apart,
        negative_step * apart,
    )
    miss = diagonals[3]
    item_gradient = torch.cat([-miss * users * positive_step * apart, miss * users * negative_step * apart])
    total, gradient, count = (diagonals[1] + diagonals[2]).sum(), *_absolute(torch.cat(ids[1:]), item_gradient)
    if user_step is not None:
        of_users, touched = _absolute(user_id, -miss * (positives - negatives) * user_step)
        total, gradient, count = total + diagonals[0].sum(), gradient + of_users, count + touched
    elements = (count * users.size(1)).clamp(min=1)
    return Curvature(total / elements, gradient / elements)


def _absolute(ids: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """`sum |g|` over the distinct rows, and how many there are."""
    merged, place = merge(ids)
    summed = torch.zeros_like(gradient).index_add_(0, place, gradient)
    return summed.abs().sum(), merged


def merge(ids: Tensor) -> tuple[Tensor, Tensor]:
    """How many distinct ids there are, and for each the number of its value: `unique` without synchronising.

    Example:
        >>> merge(torch.tensor([7, 3, 7]))
        (tensor(2), tensor([1, 0, 1]))
    """
    if not ids.numel():
        return ids.new_zeros(()), ids
    order = ids.argsort(stable=True)
    rank = (ids[order].diff() != 0).long().cumsum(0)
    rank = torch.cat([rank.new_zeros(1), rank])
    place = torch.empty_like(rank)
    place[order] = rank
    return rank[-1] + 1, place


@dataclass(frozen=True)
class TraceEstimate:
    """A trace by Hutchinson's method.

    Attributes:
        trace: Mean over the probes.
        standard_error: Of that mean; infinite for a single probe.
        probes: How many there were.
    """

    trace: float
    standard_error: float
    probes: int


def hutchinson(
    loss: Callable[..., Tensor],
    points: Sequence[Tensor],
    *,
    seed: int = 0,
    tolerance: float = 0.05,
    min_probes: int = 8,
    max_probes: int = 200,
) -> TraceEstimate:
    r"""The trace of the Hessian of any loss, `E[v' H v]` with Rademacher probes `v` (Hutchinson, 1990).

    Stops as soon as the standard error is at most `tolerance * |mean|`, after at least `min_probes`. The noise is that
    of a generator of its own, and torch's is not moved. One graph is built for all probes, by `torch.autograd.grad`, so
    that no parameter holds on to it (`backward(create_graph=True)` leaks), and hooks on saved tensors do not see it.

    Args:
        loss: A function of the points, to a scalar.
        points: Where to take the Hessian, float tensors of any shapes.
        seed: Seed of the probes.
        tolerance: The relative standard error that is good enough; 0: always `max_probes`.
        min_probes: At least so many; 2 or more.
        max_probes: At most so many.

    Returns:
        The estimate, as numbers: this synchronises with the device.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> hutchinson(lambda x: (x**2).sum(), [torch.zeros(5)])   # H = 2 I: each probe finds the trace
        TraceEstimate(trace=10.0, standard_error=0.0, probes=8)
    """
    if not 2 <= min_probes <= max_probes:
        raise ValueError(f"min_probes must be at least 2 and at most max_probes, got {min_probes} and {max_probes}")
    check_number("tolerance", tolerance, least=0)
    with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):
        leaves = [point.detach().requires_grad_() for point in points]
        first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True, materialize_grads=True)
        generator = torch.Generator(leaves[0].device).manual_seed(seed)
        curved = [grad.requires_grad for grad in first]  # not where the loss is linear
        # mean and sum of squared deviations, updated by Welford's recurrence
        mean = deviations = 0.0
        for probe in range(1, max_probes + 1):
            vectors = [_rademacher(leaf, generator) for leaf in leaves]
            sample = 0.0
            if any(curved):
                heads = [g for g, bent in zip(first, curved, strict=True) if bent]
                weights = [v for v, bent in zip(vectors, curved, strict=True) if bent]
                products = torch.autograd.grad(heads, leaves, weights, retain_graph=True, materialize_grads=True)
                sample = float(torch.stack([(v * hv).sum() for v, hv in zip(vectors, products, strict=True)]).sum())
            step = sample - mean
            mean += step / probe
            deviations += step * (sample - mean)
            if probe >= min_probes:
                error = math.sqrt(deviations / (probe - 1) / probe)
                if error <= tolerance * abs(mean) + EPSILON:
                    break
    return TraceEstimate(mean, math.sqrt(deviations / (probe - 1) / probe), probe)


def curvature(
    loss: Callable[..., Tensor], points: Sequence[Tensor], counts: Sequence[Tensor | int], **options: Any
) -> tuple[Curvature, TraceEstimate]:
    """Trace, by Hutchinson, and gradient of any loss.

    Args:
        loss: A function of the points, to a scalar.
        points: In code units: `[rows, d]` each. Rows the loss does not depend on do no harm.
        counts: How many rows of each the loss does depend on.
        options: Those of `hutchinson`.

    Returns:
        What `delta` is made of, and the estimate with its standard error.
    """
    with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):
        leaves = [point.detach().requires_grad_() for point in points]
        gradients = torch.autograd.grad(loss(*leaves), leaves, materialize_grads=True)
    estimate = hutchinson(loss, points, **options)
    elements = sum(torch.as_tensor(n) * x.size(1) for n, x in zip(counts, points, strict=True))
    elements = torch.as_tensor(elements, device=points[0].device).clamp(min=1)
    gradient = torch.stack([g.abs().sum() for g in gradients]).sum() / elements
    return Curvature(estimate.trace / elements, gradient), estimate


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    bits = torch.randint(0, 2, like.shape, generator=generator, device=like.device)
    return bits.to(like.dtype).mul_(2).sub_(1)
