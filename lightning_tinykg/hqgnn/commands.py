"""What ``lightning-tinykg recommend`` and ``lightning-tinykg export`` do."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_tinykg.hqgnn.index import LowBitIndex

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule

__all__ = ["export_checkpoint", "recommend"]


def recommend(args: Sequence[str] | None = None) -> None:
    """Print recommendations from an exported index; imports neither torch nor Lightning.

    Args:
        args: the command line, without the command's name; None: that of the process, from its second argument on.

    Raises:
        SystemExit: For a wrong argument or a refused export, with the reason, or after ``--help``.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-tinykg recommend", description="Recommend items from an exported index: no torch, no GPU."
    )
    parser.add_argument("--index", required=True, type=Path, metavar="DIR", help="the folder that export wrote")
    parser.add_argument("--users", required=True, nargs="+", metavar="USER", help="row numbers, or ids with --ids")
    parser.add_argument("--k", type=int, default=20, help="items for each user (20)")
    parser.add_argument("--ids", action="store_true", help="users and items by their ids in the data set")
    parser.add_argument("--include-seen", action="store_true", help="do not leave out training items")
    parser.add_argument("--backend", choices=("auto", "faiss", "numpy"), default="auto")
    parser.add_argument("--json", action="store_true", help="one JSON object a line: user, items, scores")
    options = parser.parse_args(sys.argv[2:] if args is None else args)
    try:
        index = LowBitIndex.load(options.index, backend=options.backend)
        users = index.rows_of(options.users) if options.ids else [_row(user) for user in options.users]
        items, scores = index.recommend(users, options.k, exclude_seen=not options.include_seen)
    except (ValueError, KeyError, ImportError, OSError) as error:
        parser.exit(1, f"lightning-tinykg recommend: {error.args[0] if isinstance(error, KeyError) else error}\n")
    names = index.item_ids if options.ids else None
    for user, row, values in zip(options.users, items, scores, strict=True):
        left = row >= 0  # a user who has seen nearly everything gets fewer
        found = row[left].tolist() if names is None else names[row[left]].tolist()
        own = [round(value, 6) for value in values[left].tolist()]
        if options.json:
            print(json.dumps({"user": user if options.ids else int(user), "items": found, "scores": own}))
        else:
            pairs = "  ".join(f"{item} ({score:.4g})" for item, score in zip(found, own, strict=True))
            print(f"user {user}: {pairs or 'nothing is left'}")


def export_checkpoint(
    model: LightningModule,
    datamodule: LightningDataModule | None = None,
    ckpt_path: str | None = None,
    out: str = "export",
    **options: Any,
) -> LowBitIndex:
    """Export a model whose weights are in a checkpoint, without a run of training or testing.

    Args:
        model: An `HQGNN`, made as for that training.
        datamodule: Its data: the graph, the ids, the training items.
        ckpt_path: The checkpoint; None: the model as it is.
        out: Where to.
        options: Those of :func:`~lightning_tinykg.hqgnn.export.export_module`.

    Returns:
        The index, loaded.

    Raises:
        TypeError: If the model is no `HQGNN`.
        ValueError: Without data, or if the checkpoint does not fit the model.
    """
    import torch

    from lightning_tinykg.data import KGRecDataModule
    from lightning_tinykg.hqgnn.export import export_module
    from lightning_tinykg.hqgnn.module import HQGNN

    if not isinstance(model, HQGNN):
        name = type(model).__name__
        raise TypeError(f"export takes an HQGNN, got a {name}; an encoder is wrapped in one: HQGNN(encoder, bits=4)")
    if not isinstance(datamodule, KGRecDataModule):
        raise ValueError("export needs a KGRecDataModule: it brings the graph, the ids and the training items")
    datamodule.prepare_data()
    datamodule.setup("fit")
    model.set_graph(datamodule.graph)
    if ckpt_path is not None:
        checkpoint = torch.load(ckpt_path, map_location=model.device, weights_only=True)
        model.on_load_checkpoint(checkpoint)
        try:
            model.load_state_dict(checkpoint["state_dict"])
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"ckpt_path: {ckpt_path} does not fit the model: {error}") from None
    return export_module(model, out, data=datamodule, **options)


def _row(user: str) -> int:
    try:
        return int(user)
    except ValueError:
        raise ValueError(f"--users must be row numbers, got {user!r}; with --ids, ids in the data set") from None
