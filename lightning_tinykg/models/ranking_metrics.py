"""Recall and NDCG of a full ranking, the same however its users are shared among processes."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch_geometric.metrics import LinkPredMetricCollection, LinkPredNDCG, LinkPredRecall

__all__ = ["ranking_metrics"]


class _Summed:
    """Sums in float64: in float32, the last digit of a mean would hang on how the users are shared among processes."""

    def _compute(self, data: Any) -> Tensor:
        values: Tensor = super()._compute(data)  # type: ignore[misc]  # a mixin's
        return values if values.device.type == "mps" else values.double()  # which has no float64


class _Recall(_Summed, LinkPredRecall): ...  # type: ignore[misc]  # PyG is not typed


class _NDCG(_Summed, LinkPredNDCG): ...  # type: ignore[misc]  # PyG is not typed


def ranking_metrics(cutoffs: Iterable[int]) -> LinkPredMetricCollection:
    """PyG's Recall and NDCG at some cut-offs.

    Args:
        cutoffs: How many of the best items count, at least 1 each.

    Example:
        >>> list(ranking_metrics([20]))
        ['recall@20', 'ndcg@20']
    """
    cutoffs = tuple(cutoffs)
    return LinkPredMetricCollection(
        {f"recall@{c}": _Recall(c) for c in cutoffs} | {f"ndcg@{c}": _NDCG(c) for c in cutoffs}
    )
