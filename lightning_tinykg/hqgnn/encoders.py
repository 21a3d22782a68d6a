"""What HQGNN asks of an encoder, whatever it is: embeddings, a graph, and a description to make it again from."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_tinykg.models.base import SIZES, RankingModule

__all__ = ["describe", "embed", "lending_the_log", "make", "warm_start"]


def embed(encoder: nn.Module, num_items: int) -> tuple[Tensor, Tensor]:
    """Users `[num_users, d]` and items `[num_items, d]`, from `encoder.embed()`, or `encoder()` if it has none.

    Float32, whatever the encoder computes in: the precision of embeddings is what the quantizers decide.

    Raises:
        TypeError: If it returns anything else than two matrices.
        ValueError: If there are fewer items than the graph has.
    """
    call = getattr(encoder, "embed", encoder)
    result = call()
    if not (
        isinstance(result, tuple) and len(result) == 2 and all(isinstance(x, Tensor) and x.dim() == 2 for x in result)
    ):
        raise TypeError(
            f"{type(encoder).__name__} must return (users [num_users, d], items [num_items, d]) from embed() or "
            f"forward(), got {_shape(result)}"
        )
    users, items = result
    if items.size(0) < num_items:
        raise ValueError(f"{type(encoder).__name__} must embed all {num_items} items, got {items.size(0)} rows")
    return users.float(), items[:num_items].float()


def _shape(result: Any) -> str:
    if isinstance(result, Tensor):
        return f"a tensor of shape {list(result.shape)}"
    if isinstance(result, tuple):
        return f"({', '.join(_shape(part) for part in result)})"
    return f"a {type(result).__name__}"


def describe(encoder: nn.Module) -> dict[str, Any] | None:
    """`class_path` and `init_args` of one of the package's modules, for a checkpoint's hyper-parameters.

    `None` for any other module: who loads the checkpoint has to bring it.

    Example:
        >>> from lightning_tinykg.models import LightGCN
        >>> describe(LightGCN(dim=8))["class_path"]
        'lightning_tinykg.models.lightgcn.LightGCN'
    """
    if not isinstance(encoder, RankingModule):
        return None
    kind = type(encoder)
    private = ("_instantiator", "_class_path", "class_path")
    arguments = {name: value for name, value in encoder.hparams.items() if name not in private}
    outer = arguments.get("encoder")
    if isinstance(outer, Mapping) and "encoder" not in signature(kind).parameters:
        # on the command line Lightning takes the outer module's arguments for those of the module in it, too
        arguments = {**outer.get("init_args", {}), **{name: arguments[name] for name in SIZES if name in arguments}}
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}


def make(description: Mapping[str, Any]) -> nn.Module:
    """The encoder that `describe` was made of.

    A checkpoint must not choose what code is run: the class has to be a `RankingModule` that is imported already.

    Raises:
        ValueError: If there is no such class.

    Example:
        >>> make({"class_path": "os.system", "init_args": {}})
        Traceback (most recent call last):
        ValueError: encoder must name a RankingModule that is imported, such as LightGCN, got 'os.system'
    """
    path = description.get("class_path")
    for kind in _subclasses(RankingModule):
        if f"{kind.__module__}.{kind.__qualname__}" == path:
            return kind(**description.get("init_args", {}))
    raise ValueError(f"encoder must name a RankingModule that is imported, such as LightGCN, got {path!r}")


def _subclasses(kind: type[RankingModule]) -> Iterator[type[RankingModule]]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


def warm_start(encoder: nn.Module, path: str | Path) -> nn.Module:
    """The encoder with the weights of a checkpoint: Lightning's of its own class, or a plain state dict.

    Raises:
        RuntimeError: By torch, if the weights are not those of such an encoder.
    """
    if isinstance(encoder, RankingModule):
        return type(encoder).load_from_checkpoint(path, map_location="cpu")
    state = torch.load(path, map_location="cpu", weights_only=True)
    encoder.load_state_dict(state.get("state_dict", state))
    return encoder


@contextmanager
def lending_the_log(encoder: nn.Module, module: L.LightningModule) -> Iterator[None]:
    """Within it, what the encoder logs is logged in the module's current hook.

    Lightning attaches the Trainer to a nested module, but tells only the outer one which hook is running.
    """
    if not isinstance(encoder, L.LightningModule):
        yield
        return
    before = encoder._current_fx_name
    encoder._current_fx_name = module._current_fx_name
    try:
        yield
    finally:
        encoder._current_fx_name = before
