"""The ways to train that TinyKG's table compares: bits by the rules or the paper's recipe, and other memory savers."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch.utils.checkpoint import checkpoint

from lightning_tinykg import CosineAnneal, compress_activations
from lightning_tinykg.models import KGAT, KGCN, KGIN

WAYS = (
    *("none", "8", "paper-8", "4", "paper-4", "2", "paper-2", "1", "paper-1"),
    *("anneal", "budget", "checkpoint", "bf16"),
)
"""Those of the table, in its order."""

PLAIN = ("none", "checkpoint", "bf16")
"""Ways in which nothing is compressed."""

LABELS = {
    "none": "uncompressed",
    "anneal": "8 to 2 bits, annealed",
    "budget": "budget: the bytes of 2 bits",
    "checkpoint": "`torch.utils.checkpoint`",
    "bf16": "bf16 autocast",
}


def label(way: str) -> str:
    """What a way is called in a table.

    Example:
        >>> label("2"), label("paper-2"), label("bf16")
        ('2 bits', "2 bits, the paper's recipe", 'bf16 autocast')
    """
    recipe, _, bits = way.rpartition("-")
    width = "1 bit" if bits == "1" else f"{bits} bits"
    return LABELS.get(way) or (f"{width}, the paper's recipe" if recipe else width)


def settings(way: str, epochs: int) -> dict[str, Any]:
    """What a way does, for the kept result.

    Args:
        way: one of `WAYS`.
        epochs: at most, of the run. Annealing is over after 20 of them, or after half of fewer than 40.

    Raises:
        ValueError: for a way that is none.

    Example:
        >>> settings("anneal", epochs=10)
        {'anneal': [8, 2], 'epochs': 5}
        >>> settings("paper-2", epochs=10)
        {'bits': 2, 'recipe': 'paper'}
    """
    if way in PLAIN:
        return {}
    if way == "anneal":
        return {"anneal": [8, 2], "epochs": max(min(20, epochs // 2), 1)}
    if way == "budget":
        return {"budget": "what 2 bits store in the largest step"}
    recipe, _, bits = way.rpartition("-")
    if recipe not in ("", "paper") or bits not in ("8", "4", "2", "1"):
        raise ValueError(f"way must be one of {', '.join(WAYS)}, got {way!r}")
    return {"bits": int(bits)} | ({"recipe": recipe} if recipe else {})


def arguments(described: dict[str, Any], budget: int | None = None) -> dict[str, Any]:
    """The arguments of `TinyKGCallback` for what `settings` describes.

    Args:
        described: by `settings`; not empty.
        budget: bytes, where a budget is asked for.

    Example:
        >>> arguments({"anneal": [8, 2], "epochs": 5})["bits"].bits_at(4)
        2
    """
    if "budget" in described:
        return {"budget": budget}
    if "anneal" in described:
        start, end = described["anneal"]
        return {"bits": CosineAnneal(start=start, end=end, steps=described["epochs"], by="epoch")}
    compress_activations(**described)  # raises where the values are wrong, before anything is trained
    return described


class Checkpointed(Callback):
    """Puts a model's layers into `torch.utils.checkpoint`, from outside: each makes its activations again in backward.

    KGAT and KGIN: each convolution. KGCN and KGNN-LS: the score with its look-ups, which is where nearly all of it is
    kept; a hop alone would keep the gathered rows.
    """

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Wrap them, now that they are there.

        Raises:
            ValueError: for another model.
        """
        again = partial(partial, checkpoint, use_reentrant=False)
        if isinstance(pl_module, (KGAT, KGIN)):
            for conv in pl_module.convs:
                conv.forward = again(conv.forward)
        elif isinstance(pl_module, KGCN):
            pl_module.score = again(pl_module.score)  # type: ignore[method-assign]  # of this instance alone
        else:
            raise ValueError(f"checkpoint needs a KGAT, KGIN, KGCN or KGNNLS, got a {type(pl_module).__name__}")
