"""How many bits, where and when. Knows nothing of how they are stored."""

from lightning_tinykg.bits.plan import BitPlan, Place, PlanEntry
from lightning_tinykg.bits.schedule import (
    ConstantBits,
    CosineAnneal,
    LinearAnneal,
    Schedule,
    StepAnneal,
    WarmupThen,
)

__all__ = [
    "BitPlan",
    "ConstantBits",
    "CosineAnneal",
    "LinearAnneal",
    "Place",
    "PlanEntry",
    "Schedule",
    "StepAnneal",
    "WarmupThen",
]
