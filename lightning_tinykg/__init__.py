"""Train knowledge-graph recommenders in a tenth of the activation memory, and serve them from an eighth of the bytes.

Names are imported when they are first used: a service that loads a `LowBitIndex` needs no torch. Lightning knows the
strategies by name (`Trainer(strategy="ddp_tinykg")`) from this import on.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_tinykg import registry

if TYPE_CHECKING:
    from lightning_tinykg.activations import Ledger, compress_activations, keep_exact
    from lightning_tinykg.bits import (
        BitPlan,
        ConstantBits,
        CosineAnneal,
        LinearAnneal,
        Schedule,
        StepAnneal,
        WarmupThen,
    )
    from lightning_tinykg.bits.expected import ExpectedAccuracy
    from lightning_tinykg.bits.search import AutoBitSelector, random_search
    from lightning_tinykg.bits.space import SearchSpace
    from lightning_tinykg.callback import TinyKGCallback
    from lightning_tinykg.data import CTRDataModule, KGRecDataModule
    from lightning_tinykg.hqgnn import HQGNN, LowBitIndex
    from lightning_tinykg.models import KGAT, KGCN, KGIN, KGNNLS, LightGCN
    from lightning_tinykg.sgquant import SGQuantCallback
    from lightning_tinykg.strategy import (
        TinyKGDDPStrategy,
        TinyKGFSDPStrategy,
        TinyKGModelParallelStrategy,
        TinyKGStrategy,
    )

__version__ = "0.1.0"

__all__ = [
    "HQGNN",
    "KGAT",
    "KGCN",
    "KGIN",
    "KGNNLS",
    "AutoBitSelector",
    "BitPlan",
    "CTRDataModule",
    "ConstantBits",
    "CosineAnneal",
    "ExpectedAccuracy",
    "KGRecDataModule",
    "Ledger",
    "LightGCN",
    "LinearAnneal",
    "LowBitIndex",
    "SGQuantCallback",
    "Schedule",
    "SearchSpace",
    "StepAnneal",
    "TinyKGCallback",
    "TinyKGDDPStrategy",
    "TinyKGFSDPStrategy",
    "TinyKGModelParallelStrategy",
    "TinyKGStrategy",
    "WarmupThen",
    "__version__",
    "compress_activations",
    "keep_exact",
    "random_search",
]

_HOMES = {
    "activations": ("Ledger", "compress_activations", "keep_exact"),
    "bits": ("BitPlan", "ConstantBits", "CosineAnneal", "LinearAnneal", "Schedule", "StepAnneal", "WarmupThen"),
    "bits.expected": ("ExpectedAccuracy",),
    "bits.search": ("AutoBitSelector", "random_search"),
    "bits.space": ("SearchSpace",),
    "callback": ("TinyKGCallback",),
    "data": ("CTRDataModule", "KGRecDataModule"),
    "hqgnn": ("HQGNN", "LowBitIndex"),
    "models": ("KGAT", "KGCN", "KGIN", "KGNNLS", "LightGCN"),
    "sgquant": ("SGQuantCallback",),
    "strategy": ("TinyKGDDPStrategy", "TinyKGFSDPStrategy", "TinyKGModelParallelStrategy", "TinyKGStrategy"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

registry.register()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
