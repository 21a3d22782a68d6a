"""Files or a generated knowledge graph -> PyG ``HeteroData`` -> batches."""

from lightning_tinykg.data.batches import BPRBatch, RankingBatch, SampledBatch, TripleBatch
from lightning_tinykg.data.ctr import CTRBatch
from lightning_tinykg.data.ctr_module import CTRDataModule
from lightning_tinykg.data.formats import read_folder
from lightning_tinykg.data.graph import collaborative_graph
from lightning_tinykg.data.module import KGRecDataModule
from lightning_tinykg.data.synthetic import SyntheticKG

__all__ = [
    "BPRBatch",
    "CTRBatch",
    "CTRDataModule",
    "KGRecDataModule",
    "RankingBatch",
    "SampledBatch",
    "SyntheticKG",
    "TripleBatch",
    "collaborative_graph",
    "read_folder",
]
