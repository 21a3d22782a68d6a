"""SGQuant: features and attention inside a GNN in few bits, by layer, component and node degree."""

from lightning_tinykg.sgquant.callback import SGQuantCallback
from lightning_tinykg.sgquant.granularity import (
    COMPONENTS,
    DegreeBuckets,
    combined,
    componentwise,
    layerwise,
    topologywise,
    uniform,
)
from lightning_tinykg.sgquant.memory import Memory
from lightning_tinykg.sgquant.model import PackedModel
from lightning_tinykg.sgquant.packed import PackedFeatures
from lightning_tinykg.sgquant.quantizer import SGQuantizer

__all__ = [
    "COMPONENTS",
    "DegreeBuckets",
    "Memory",
    "PackedFeatures",
    "PackedModel",
    "SGQuantCallback",
    "SGQuantizer",
    "combined",
    "componentwise",
    "layerwise",
    "topologywise",
    "uniform",
]
