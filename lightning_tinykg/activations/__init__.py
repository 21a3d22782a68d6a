"""TinyKG: what autograd saves, and what is kept of it."""

from lightning_tinykg.activations.compression import compress_activations, keep_exact
from lightning_tinykg.activations.ledger import Entry, Ledger

__all__ = ["Entry", "Ledger", "compress_activations", "keep_exact"]
