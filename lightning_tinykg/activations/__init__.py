"""TinyKG: what autograd saves, and what is kept of it."""

from lightning_tinykg.activations.compression import compress_activations
from lightning_tinykg.activations.ledger import Entry, Ledger
from lightning_tinykg.activations.opting_out import keep_exact

__all__ = ["Entry", "Ledger", "compress_activations", "keep_exact"]
