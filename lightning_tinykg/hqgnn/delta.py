"""GSTE's delta in a training step: from the batch's rows, averaged over ranks, and kept until the next."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_tinykg.arguments import check_whole
from lightning_tinykg.codecs.uniform import spread
from lightning_tinykg.hqgnn.hessian import Curvature, bpr_curvature, curvature, merge
from lightning_tinykg.hqgnn.quantizer import Quantizer

__all__ = ["DeltaRule", "Hessian", "step_sizes"]

Hessian = Literal["closed", "hutchinson"] | float

Triple = tuple[Tensor, Tensor, Tensor]


class DeltaRule(nn.Module):
    """Where delta comes from, and its value now, a buffer.

    Args:
        hessian: `"closed"`, `"hutchinson"`, or a fixed delta.
        refresh_every: Steps between two values.
        seed: Of Hutchinson's probes.

    Raises:
        ValueError: If an argument has a value it can't have.

    Example:
        >>> DeltaRule(0.2).delta
        tensor(0.2000)
    """

    def __init__(self, hessian: Hessian = "closed", refresh_every: int = 1, seed: int = 0) -> None:
        super().__init__()
        fixed = isinstance(hessian, int | float) and not isinstance(hessian, bool)
        if hessian not in ("closed", "hutchinson") and not (fixed and 0 <= float(hessian) < float("inf")):
            raise ValueError(f"hessian must be 'closed', 'hutchinson' or a fixed delta of at least 0, got {hessian!r}")
        check_whole("refresh_every", refresh_every, 1)
        check_whole("seed", seed)
        self.hessian, self.refresh_every, self.seed = hessian, refresh_every, seed
        self.delta: Tensor
        self.register_buffer("delta", torch.tensor(float(hessian) if fixed else 0.0))

    def is_due(self, step: int) -> bool:
        """Whether delta is to be found anew in this step."""
        return isinstance(self.hessian, str) and step % self.refresh_every == 0

    @torch.no_grad()
    def refresh(
        self,
        loss: Callable[[Tensor, Tensor, Tensor], Tensor],
        rows: Triple,
        ids: Triple,
        steps: tuple[Tensor | None, Tensor, Tensor],
        step: int,
        mean_over_ranks: Callable[[Tensor], Tensor],
    ) -> Curvature:
        """Find delta, before the backward that reads it.

        Args:
            loss: Of scored rows; looked at by `"hutchinson"` only.
            rows: Users, positives and negatives as they were scored, `[B, d]`.
            ids: Which rows of their tables they are, int64 `[B]`.
            steps: The quantization steps they were rounded with, `[B, d]` or `[B, 1]`; `None`: users were not rounded.
            step: Number of the training step, which the probes are drawn from.
            mean_over_ranks: What makes the ranks agree.

        Returns:
            What delta was made of.
        """
        with torch.autocast(rows[0].device.type, enabled=False):
            exact = (rows[0].detach().float(), rows[1].detach().float(), rows[2].detach().float())
            if self.hessian == "hutchinson":
                found = probe(loss, exact, ids, steps, self.seed + step)
            else:
                found = bpr_curvature(exact, ids, steps)
            trace, gradient = mean_over_ranks(torch.stack([found.trace, found.gradient])).unbind()
        found = Curvature(trace, gradient)
        self.delta.copy_(found.delta)
        return found


def probe(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    rows: Triple,
    ids: Triple,
    steps: tuple[Tensor | None, Tensor, Tensor],
    seed: int,
) -> Curvature:
    """The curvature of any loss in code units, around what was scored: `bpr_curvature` by Hutchinson.

    A row that occurs more than once is moved wherever it occurs.
    """
    users, positives, negatives = rows
    user_step, positive_step, negative_step = steps
    batch, dim = users.shape
    item_count, item_at = merge(torch.cat(ids[1:]))
    user_count, user_at = merge(ids[0])

    def moved(items: Tensor, asking: Tensor | None = None) -> Tensor:
        shift = items[item_at]
        asked = users if asking is None or user_step is None else users + user_step * asking[user_at]
        return batch * loss(asked, positives + positive_step * shift[:batch], negatives + negative_step * shift[batch:])

    points, counts = [users.new_zeros(2 * batch, dim)], [item_count]
    if user_step is not None:
        points, counts = [*points, users.new_zeros(batch, dim)], [*counts, user_count]
    return curvature(moved, points, counts, seed=seed)[0]


def step_sizes(quantizer: Quantizer, x: Tensor, rows: Tensor) -> Tensor:
    """The quantization steps of some rows of `x` `[n, d]`: `[B, 1]` or `[B, d]`."""
    scale, _ = quantizer.range_of(x.detach().float())
    steps = spread(scale, x)
    return steps.expand(x.size(0), -1)[rows]
