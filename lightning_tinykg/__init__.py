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
    from lightning_tinykg.callback import TinyKGCallback
    from lightning_tinykg.data import KGRecDataModule
    from lightning_tinykg.hqgnn import HQGNN, LowBitIndex
    from lightning_tinykg.models import KGAT, LightGCN
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
    "BitPlan",
    "ConstantBits",
    "CosineAnneal",
    "KGRecDataModule",
    "Ledger",
    "LightGCN",
    "LinearAnneal",
    "LowBitIndex",
    "Schedule",
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
]

_HOMES = {
    "activations": ("Ledger", "compress_activations", "keep_exact"),
    "bits": ("BitPlan", "ConstantBits", "CosineAnneal", "LinearAnneal", "Schedule", "StepAnneal", "WarmupThen"),
    "callback": ("TinyKGCallback",),
    "data": ("KGRecDataModule",),
    "hqgnn": ("HQGNN", "LowBitIndex"),
    "models": ("KGAT", "LightGCN"),
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
