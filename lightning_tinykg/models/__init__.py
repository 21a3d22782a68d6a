"""Recommenders as LightningModules on PyG layers, with one shared base for loss, ranking and metrics."""

from lightning_tinykg.models.base import RankingModule, Recommendations
from lightning_tinykg.models.kgat import KGAT
from lightning_tinykg.models.kgcn import KGCN
from lightning_tinykg.models.kgin import KGIN
from lightning_tinykg.models.kgnnls import KGNNLS
from lightning_tinykg.models.lightgcn import LightGCN
from lightning_tinykg.models.pairs import PairModule
from lightning_tinykg.models.popular import MostPopular

__all__ = [
    "KGAT",
    "KGCN",
    "KGIN",
    "KGNNLS",
    "LightGCN",
    "MostPopular",
    "PairModule",
    "RankingModule",
    "Recommendations",
]
