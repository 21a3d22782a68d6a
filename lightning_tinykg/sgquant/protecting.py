"""Degree-Quant's protective mask: in training, nodes with many neighbours are now and then left in full precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["check_protect", "protected_nodes", "protection"]


def check_protect(protect: tuple[float, float] | None) -> tuple[float, float] | None:
    """Return `protect` if it is two ascending probabilities, or none.

    Raises:
        ValueError: If it is anything else.

    Example:
        >>> check_protect((0.2, 0.1))
        Traceback (most recent call last):
        ValueError: protect must be two probabilities, the lesser first, got (0.2, 0.1)
    """
    if protect is None:
        return None
    if not isinstance(protect, Sequence) or len(protect) != 2 or not 0 <= protect[0] <= protect[1] <= 1:
        raise ValueError(f"protect must be two probabilities, the lesser first, got {protect}")
    return float(protect[0]), float(protect[1])


def protection(degrees: Tensor, protect: tuple[float, float]) -> Tensor:
    """Probability with which each node is left as it is, by the rank of its degree.

    Nodes with many neighbours add up many quantized values, and gather the most error (Tailor et al., ICLR 2021,
    arXiv 2008.05000). The least degree has the first probability, the greatest the second, what lies between is
    interpolated by rank; nodes of the same degree share the mean of their ranks.

    Args:
        degrees: int64 `[N]`.
        protect: Least and greatest probability.

    Returns:
        Float32 `[N]`.

    Example:
        >>> protection(torch.tensor([7, 1, 3]), (0.0, 0.5))
        tensor([0.5000, 0.0000, 0.2500])
    """
    least, most = protect
    ordered = degrees.sort().values
    before, after = (torch.searchsorted(ordered, degrees, right=right) for right in (False, True))
    rank = (before + after - 1) / (2 * max(degrees.numel() - 1, 1))
    return least + (most - least) * rank.float()


def protected_nodes(degrees: Tensor, protect: tuple[float, float], seed: int, step: int) -> Tensor:
    """Draw the nodes that are left as they are in a step, from a source of its own: no other random number moves.

    Args:
        degrees: int64 `[N]`.
        protect: Least and greatest probability.
        seed: Of the run.
        step: Of the run; the same step draws the same nodes.

    Returns:
        bool `[N]`, on the device of `degrees`.
    """
    generator = torch.Generator().manual_seed((seed * 0x9E3779B1 + step * 0x85EBCA77) % 2**63)
    # drawn on the CPU, so that the same nodes are drawn whatever the device
    drawn = torch.rand(degrees.numel(), generator=generator, dtype=torch.float32).to(degrees.device)
    return drawn < protection(degrees, protect)
