"""The strategies' names, which Lightning knows as soon as both packages are imported, in whichever order.

``import lightning_tinykg`` imports neither torch nor Lightning: a service that answers from a
:class:`~lightning_tinykg.LowBitIndex` needs none of them. So the names are registered when Lightning is imported, each
with a function that makes the strategy when a Trainer asks for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_LIGHTNING = "lightning.pytorch.strategies"

_DDP = {
    f"ddp_tinykg{suffix}{unused}": (
        "TinyKGDDPStrategy",
        f"DDP with start method {method!r}, activations compressed",
        {"start_method": method, **options},
    )
    for suffix, method in (("", "popen"), ("_spawn", "spawn"), ("_fork", "fork"), ("_notebook", "fork"))
    for unused, options in (("", {}), ("_find_unused_parameters_true", {"find_unused_parameters": True}))
}

STRATEGIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tinykg": ("TinyKGStrategy", "One device, activations compressed", {}),
    **_DDP,
    "fsdp_tinykg": ("TinyKGFSDPStrategy", "FSDP, activations compressed", {}),
    "model_parallel_tinykg": (
        "TinyKGModelParallelStrategy",
        "FSDP 2 and tensor parallel, activations compressed",
        {},
    ),
}
"""Name -> class in :mod:`lightning_tinykg.strategy`, description, arguments."""


def register() -> None:
    """Register the names, now or as soon as Lightning's strategies are imported."""
    if _LIGHTNING in sys.modules:
        _register(sys.modules[_LIGHTNING])
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _register(strategies: ModuleType) -> None:
    for name, (kind, description, options) in STRATEGIES.items():
        make = partial(_make, kind)
        strategies.StrategyRegistry.register(name, make, description=description, override=True, **options)


def _make(kind: str, **options: Any) -> Any:
    return getattr(import_module("lightning_tinykg.strategy"), kind)(**options)


class _Waiting(MetaPathFinder):
    """Finds nothing itself; has Lightning's strategies, once they are imported, followed by ours."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _LIGHTNING:
            return None
        sys.meta_path.remove(self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in sys.meta_path)), None)
        if spec is not None and spec.loader is not None:
            load = partial(_followed, spec.loader.exec_module)
            spec.loader.exec_module = load  # type: ignore[method-assign]  # hides the class's, for this import
        return spec


def _followed(load: Callable[[ModuleType], None], module: ModuleType) -> None:
    load(module)
    _register(module)
