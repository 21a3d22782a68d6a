"""Every layer and model of PyTorch, PyTorch Geometric and Lightning's demos as a case: one table."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from inspect import isclass

import layers_conv
import layers_graph
import layers_models
import layers_torch
import torch
from checking import Case
from layers_data import Builder
from layers_torch import samples
from lightning.pytorch.demos import boring_classes, lstm, transformer
from torch import nn
from torch_geometric.nn import aggr, conv, dense, encoding, functional, kge, models, norm, pool, unpool

__all__ = ["CASES", "DATABASE", "FAMILIES", "Family", "case", "samples"]


@dataclass
class Family:
    """The layers that are public in one place.

    Attributes:
        names: the public names.
        table: the cases, by name; after a colon, a variant.
        left_out: public names that are no case, and why.
        elsewhere: names whose cases are not in the table.
        deep: whether these are models rather than single layers. A model is not tested for a bias: roundings meet in
            one path of its gradient, and a product of roundings is unbiased only if they are independent.
    """

    names: Collection[str]
    table: dict[str, Builder]
    left_out: dict[str, str]
    elsewhere: Collection[str] = ()
    deep: bool = False

    def covered(self) -> set[str]:
        """The names that have a case."""
        return {name.partition(":")[0] for name in self.table} | set(self.elsewhere)


def _modules(*places: object) -> list[str]:
    """The modules that some Python modules define."""
    return [
        name
        for place in places
        for name, value in vars(place).items()
        if isclass(value) and issubclass(value, nn.Module) and value.__module__ == vars(place)["__name__"]
    ]


DATABASE = sorted(layers_torch.database())
"""The modules of PyTorch's own database, whose cases are :func:`samples`."""

FAMILIES = {
    "torch_geometric.nn.conv": Family(conv.__all__, layers_conv.CONVS, layers_conv.LEFT_OUT),
    "torch_geometric.nn.aggr": Family(aggr.__all__, layers_graph.AGGREGATIONS, layers_graph.LEFT_OUT_AGGREGATIONS),
    "torch_geometric.nn.models": Family(models.__all__, layers_models.MODELS, layers_models.LEFT_OUT, deep=True),
    "torch_geometric.nn.norm": Family(norm.__all__, layers_graph.NORMS, {}),
    "torch_geometric.nn.pool": Family(pool.__all__, layers_graph.POOLS, layers_graph.LEFT_OUT_POOLS),
    "torch_geometric.nn.dense": Family(dense.__all__, layers_graph.DENSE, {}),
    "torch_geometric.nn": Family(
        [*kge.__all__, *encoding.__all__, *functional.__all__, *unpool.__all__],
        layers_graph.OTHERS,
        layers_graph.LEFT_OUT_OTHERS,
    ),
    "torch.nn": Family(nn.modules.__all__, layers_torch.LAYERS, layers_torch.LEFT_OUT, elsewhere=DATABASE),
    "lightning.pytorch.demos": Family(_modules(boring_classes, lstm, transformer), layers_models.DEMOS, {}, deep=True),
}
"""By the place where they are public."""

CASES = {f"{place}.{name}": place for place, family in FAMILIES.items() for name in family.table}
"""All cases that are made by hand, and the place that each is of."""


def case(name: str) -> Case:
    """A case by its name in :data:`CASES`, seeded."""
    place = CASES[name]
    torch.manual_seed(0)
    made = FAMILIES[place].table[name.removeprefix(f"{place}.")]()
    return replace(made, name=name, z_test=made.z_test and not FAMILIES[place].deep)
