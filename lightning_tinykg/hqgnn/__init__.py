"""Embeddings trained to b bits, and served from their codes (HQ-GNN, Chen et al., RecSys 2023, arXiv 2309.01032).

Names are imported when they are first used: a service that loads a `LowBitIndex` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_tinykg.hqgnn.gste import quantize
    from lightning_tinykg.hqgnn.hessian import TraceEstimate, bpr_trace, hutchinson
    from lightning_tinykg.hqgnn.index import ExportError, LowBitIndex
    from lightning_tinykg.hqgnn.module import HQGNN
    from lightning_tinykg.hqgnn.quantizer import Quantizer
    from lightning_tinykg.hqgnn.table import QuantizedTable

__all__ = [
    "HQGNN",
    "ExportError",
    "LowBitIndex",
    "QuantizedTable",
    "Quantizer",
    "TraceEstimate",
    "bpr_trace",
    "hutchinson",
    "quantize",
]

_HOMES = {
    "HQGNN": "module",
    "ExportError": "index",
    "LowBitIndex": "index",
    "QuantizedTable": "table",
    "Quantizer": "quantizer",
    "TraceEstimate": "hessian",
    "bpr_trace": "hessian",
    "hutchinson": "hessian",
    "quantize": "gste",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
