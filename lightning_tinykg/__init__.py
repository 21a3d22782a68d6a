"""Train knowledge-graph recommenders in a tenth of the activation memory."""

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
from lightning_tinykg.models import KGAT, LightGCN
from lightning_tinykg.strategy import (
    TinyKGDDPStrategy,
    TinyKGFSDPStrategy,
    TinyKGModelParallelStrategy,
    TinyKGStrategy,
)

__version__ = "0.1.0"

__all__ = [
    "KGAT",
    "BitPlan",
    "ConstantBits",
    "CosineAnneal",
    "KGRecDataModule",
    "Ledger",
    "LightGCN",
    "LinearAnneal",
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
