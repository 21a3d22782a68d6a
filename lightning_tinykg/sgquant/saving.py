"""A packed model as a folder: its codes, its weights, and where in the model each is met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_tinykg.sgquant.files import PackedFileError, describe, read_folder, restore, tensors_of, write_folder
from lightning_tinykg.sgquant.packed import PackedFeatures
from lightning_tinykg.sgquant.quantize import Level
from lightning_tinykg.sgquant.shares import SHARES
from lightning_tinykg.sgquant.storing import PackedSite
from lightning_tinykg.sgquant.wiring import Spot

__all__ = ["load_model", "save_model"]

Sites = Mapping[Spot, PackedSite]
Tables = Mapping[str, PackedFeatures]


def save_model(
    folder: Path, model: nn.Module, sites: Sites, points: Sequence[int], tables: Tables, said: Mapping[str, Any]
) -> None:
    """Write a packed model.

    Args:
        folder: Made if it is not there.
        model: The model without its packed tables.
        sites: What is stored, and how.
        points: The last degree of each bucket but the last.
        tables: The packed tables.
        said: Whatever else is to be read again.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, table in tables.items():
        tensors |= tensors_of(f"table.{name}", table)
    card = {
        "model": type(model).__name__,
        "sites": [_plain(spot, site) for spot, site in sites.items()],
        "points": list(points),
        "tables": {name: describe(table) for name, table in tables.items()},
        "said": dict(said),
    }
    write_folder(folder, "model", tensors, card)


def load_model(folder: Path, model: nn.Module) -> tuple[Sites, list[int], Tables, dict[str, Tensor], dict[str, Any]]:
    """Read a packed model.

    Args:
        folder: Where it was written to.
        model: One of the same class, whose tables are as large.

    Returns:
        Sites, points, tables, the model's other weights and buffers, and what else was said.

    Raises:
        PackedFileError: If the folder is missing or corrupt, or of another model.
    """
    tensors, card = read_folder(folder, "model")
    if type(model).__name__ != card["model"]:
        raise PackedFileError(f"{folder}: must be loaded into a {card['model']}, got a {type(model).__name__}")
    tables = {name: restore(f"table.{name}", tensors, said) for name, said in card["tables"].items()}
    parameters = dict(model.named_parameters())
    for name, table in tables.items():
        found = parameters.get(name)
        if found is None or found.shape != table.shape:
            got = "none" if found is None else list(found.shape)
            raise PackedFileError(f"{folder}: {name} has shape {list(table.shape)}, the given model's is {got}")
    dense = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    return dict(_site(plain) for plain in card["sites"]), card["points"], tables, dense, card["said"]


def _plain(spot: Spot, site: PackedSite) -> dict[str, Any]:
    return {
        "spot": list(spot),
        "owner": list(site.owner),
        "is_stored": site.is_stored,
        "of_edges": site.of_edges,
        "dim": site.dim,
        "levels": [list(level) for level in site.levels],
        "parameter": site.parameter,
    }


def _level(bits: int, low: Any, high: Any, share: Any = "") -> Level:
    """A level of a card; those of the first version of the format have three items, and of the second a bool."""
    low, high = (tuple(end) if isinstance(end, list) else end for end in (low, high))
    return Level(bits, low, high, SHARES[share] if isinstance(share, bool) else share)


def _site(plain: Mapping[str, Any]) -> tuple[Spot, PackedSite]:
    levels = tuple(_level(*level) for level in plain["levels"])
    owner = Spot(*plain["owner"])
    site = PackedSite(owner, plain["is_stored"], plain["of_edges"], plain["dim"], levels, plain["parameter"])
    return Spot(*plain["spot"]), site
