"""How accurate will it be? Judged by full precision's own probabilities, where labels are few."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["ExpectedAccuracy"]

_TEMPERATURES = 301
"""Temperatures that are tried, from a thirtieth to thirty: 2.3 % apart."""


class ExpectedAccuracy:
    r"""The accuracy that is to be expected of a quantized classifier, by what full precision believes.

    A few hundred validation labels can't tell two plans apart that differ by half a point, and the best of a hundred
    plans on them is the luckiest. Full precision's own probabilities of all rows can, labelled or not: of a classifier
    with logits `q` the accuracy

    .. math:: \hat A(q) = \frac 1 N \sum_i p_i(\arg\max_c q_{ic}), \qquad p_i = \mathrm{softmax}(z_i / T)

    is expected, with full precision's logits `z`. The temperature `T` is the one at which the known labels are the most
    likely (Guo et al., ICML 2017, arXiv 1706.04599, section 4.2): a GNN of few labels is right far more often than its
    probabilities say. As no row counts for more than its most probable class, nothing is expected to be better than
    full precision.

    It is what :class:`~lightning_tinykg.bits.search.AutoBitSelector` can have as ``measure``, with :attr:`full` as
    ``reference``.

    Args:
        logits: full precision's, float `[N, classes]`, of all rows that count: all nodes of a graph.
        labels: the classes, int64 `[N]`. Only the known ones are looked at.
        known: which labels may be used: a bool mask `[N]` or row numbers. Those of validation data, not those that the
            model was trained on, which it is too sure of.

    Attributes:
        temperature: what logits are divided by.
        probabilities: full precision's at that temperature, `[N, classes]`.
        full: the accuracy to be expected of full precision itself, 0 to 1.

    Raises:
        ValueError: if the shapes don't go together, no label is known, or a known one is no class.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.5, 0.0], [0.0, 3.0]])
        >>> expected = ExpectedAccuracy(logits, torch.tensor([0, 1, 1, 1]), torch.tensor([0, 1, 2]))
        >>> flipped = logits.clone()
        >>> flipped[2] = flipped[2].flip(0)  # the row that full precision is the least sure of
        >>> 0 < expected.full - expected(flipped) < 0.1
        True
    """

    def __init__(self, logits: Tensor, labels: Tensor, known: Tensor) -> None:
        if logits.dim() != 2 or logits.numel() == 0:
            raise ValueError(f"logits must be of shape [N, classes], got {list(logits.shape)}")
        if labels.shape != logits.shape[:1]:
            raise ValueError(f"labels must be of shape [{logits.shape[0]}], one for each row, got {list(labels.shape)}")
        logits = logits.detach().float()
        some, classes = logits[known], labels[known].long()
        if classes.numel() == 0:
            raise ValueError("known must name at least one label, got none")
        if int(classes.min()) < 0 or int(classes.max()) >= logits.shape[1]:
            wrong = sorted({int(label) for label in classes} - set(range(logits.shape[1])))
            raise ValueError(f"labels must be from 0 to {logits.shape[1] - 1}, got {wrong[0]}")
        temperatures = torch.logspace(-1.5, 1.5, _TEMPERATURES, dtype=torch.float32).tolist()
        losses = torch.stack([functional.cross_entropy(some / temperature, classes) for temperature in temperatures])
        self.temperature: float = temperatures[int(losses.argmin())]
        self.probabilities = (logits / self.temperature).softmax(dim=-1)
        self.full = self(logits)

    @torch.no_grad()
    def __call__(self, logits: Tensor) -> float:
        """The accuracy to be expected of a classifier, 0 to 1.

        Args:
            logits: its, `[N, classes]`, of the same rows.

        Raises:
            ValueError: if their shape is another.
        """
        self._check(logits)
        return float(self.probabilities.gather(1, logits.argmax(dim=-1, keepdim=True)).mean())

    def loss(self, logits: Tensor) -> Tensor:
        """What to fine-tune by: the cross entropy to full precision's probabilities, at its temperature, a scalar.

        Args:
            logits: the quantized model's, `[N, classes]`, of the same rows.

        Raises:
            ValueError: if their shape is another.
        """
        self._check(logits)
        return functional.cross_entropy(logits / self.temperature, self.probabilities)

    def _check(self, logits: Tensor) -> None:
        if logits.shape != self.probabilities.shape:
            raise ValueError(f"logits must be of shape {list(self.probabilities.shape)}, got {list(logits.shape)}")
