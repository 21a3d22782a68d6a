"""Train knowledge-graph recommenders in a tenth of the activation memory."""

from lightning_tinykg.activations import Ledger, compress_activations
from lightning_tinykg.callback import TinyKGCallback
from lightning_tinykg.data import KGRecDataModule
from lightning_tinykg.models import KGAT, LightGCN

__version__ = "0.1.0"

__all__ = ["KGAT", "KGRecDataModule", "Ledger", "LightGCN", "TinyKGCallback", "__version__", "compress_activations"]
