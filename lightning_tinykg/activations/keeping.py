"""How a saved tensor is kept: the form that unpack restores it from.

Every form holds all it needs by itself, knows nothing of the context that made it, and restores as often as it is
asked to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_tinykg.activations.deferring import Deferred, defers
from lightning_tinykg.activations.ledger import Entry
from lightning_tinykg.activations.storages import Layout
from lightning_tinykg.activations.workspace import Workspace
from lightning_tinykg.codecs.lossless import Code


class Kept(Protocol):
    """What is kept of one saved tensor."""

    def restore(self, workspace: Workspace) -> Tensor:
        """The tensor: its shape, dtype and device, and values that serve its backward."""


def check_version(tensor: Tensor, version: int, what: str) -> None:
    """Raise what autograd would have raised, had hooks not switched its check off.

    Raises:
        RuntimeError: if the tensor has been modified in place since it was saved.
    """
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{tensor.type()} {list(tensor.shape)}], {what}, is at version {tensor._version}; "
            f"expected version {version} instead."
        )


@dataclass(slots=True)
class Reference:
    """The tensor itself: a parameter, the user's, or one whose exact value is needed.

    It holds a detached alias, never the tensor: an output that holds its own node would never be freed.
    """

    alias: Tensor
    version: int
    what: str

    @classmethod
    def to(cls, tensor: Tensor, what: str) -> Reference:
        """A reference to a tensor, at its present version."""
        return cls(tensor.detach(), tensor._version, what)

    def restore(self, workspace: Workspace | None = None) -> Tensor:
        """The tensor, if it is still what it was.

        Raises:
            RuntimeError: if it has been modified in place.
        """
        check_version(self.alias, self.version, self.what)
        return self.alias.detach()


@dataclass(slots=True, eq=False, weakref_slot=True)
class Record:
    """One run of elements, and all codes of it. A save that needs more precision replaces the code for every save.

    Attributes:
        storage: weak reference to the storage; while it is held, no other storage gets this one's identity.
        value: the code that restores the elements, or None.
        bits: the precision of ``value``; 32 where it is exact.
        reference: the run itself, where it is kept as it is.
        remade: how the elements are made again, where that is done after all.
        asked: the width that was asked for, at the least.
        stays: whether it is left out of compression, and not computed again.
        entry: the ledger's entry that paid for ``value`` or ``reference``.
        factor_of: sequence number of the last product that it was saved by as a factor.
        levels: the codes that restore a side or a sign only, by rule.
        degraded: what is done to the elements before they are given, while it is measured what that costs.
    """

    storage: StorageWeakRef
    value: Code | None = None
    bits: int = 0
    reference: Reference | None = None
    remade: Kept | None = None
    asked: int = 0
    stays: bool = False
    entry: Entry | None = None
    factor_of: int | None = None
    levels: dict[Any, Code] = field(default_factory=dict)
    degraded: Callable[[Tensor], Tensor] | None = None

    def elements(self, workspace: Workspace) -> Tensor:
        """The elements, restored."""
        if self.reference is not None:
            return self.reference.restore()
        if self.remade is not None:
            return self.remade.restore(workspace)
        assert self.value is not None
        elements = self.value.decode(workspace.empty)
        return elements if self.degraded is None else self.degraded(elements)


@dataclass(slots=True)
class Coded:
    """A view of a record's elements."""

    record: Record
    layout: Layout

    def restore(self, workspace: Workspace) -> Tensor:
        """De-quantized, or as it was, to the strides: with others, a kernel may take a path that differs in a bit."""
        return self.layout.restore(self.record.elements(workspace), strided=self.record.bits == 32)


@dataclass(slots=True)
class Levels:
    """A tensor of which only sides, signs or the shape are kept.

    Attributes:
        code: what is kept.
        layout: how it lies.
        record: the record that the code is shared through, as long as anybody has it.
    """

    code: Code
    layout: Layout
    record: Record | None = None

    def restore(self, workspace: Workspace) -> Tensor:
        """Representatives of each element's side."""
        flat = self.code.decode(workspace.empty)
        if flat.numel() and flat.stride() == (0,):  # shape only: zeros without memory
            return flat[0].expand(self.layout.shape)
        return self.layout.restore(flat)


@dataclass(slots=True)
class AsComplex:
    """A complex tensor whose rows are contiguous, by its real and imaginary parts.

    Attributes:
        kept: what is kept of these, which alternate in the last dimension.
        stride: if it is contiguous: its strides, of which those of dimensions of size 1 may be any.
    """

    kept: Kept
    stride: tuple[int, ...] | None

    def restore(self, workspace: Workspace) -> Tensor:
        """The complex tensor."""
        made = torch.view_as_complex(self.kept.restore(workspace).unflatten(-1, (-1, 2)))
        return made if self.stride is None else made.as_strided(made.shape, self.stride)


@dataclass(slots=True)
class Conjugated:
    """A lazily conjugated tensor.

    Attributes:
        kept: what is kept of the tensor that is conjugated.
    """

    kept: Kept

    def restore(self, workspace: Workspace) -> Tensor:
        """The conjugate, as lazily as it was."""
        return self.kept.restore(workspace).conj()


_Function = TypeVar("_Function", bound=Callable[..., Any])


def not_compiled(function: _Function) -> _Function:
    """Have torch.compile never make a graph of a function by itself, nor of what that calls.

    After a graph break, and in a frame that can't be traced, the rest runs as it is written, and torch.compile tries
    each function that is called there: the hooks and the observer too, whose graphs would be of no use, or fail. Where
    an op is traced, the observer is still traced with it.

    Args:
        function: the function, which stays as it is.
    """
    frames = torch._C._dynamo.eval_frame
    if hasattr(frames, "set_code_exec_strategy"):  # since PyTorch 2.7
        skip = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))
    return function


class Saved:
    """What autograd is given in a tensor's place; filled in once the op that saves it is known.

    Attributes:
        tensor: the tensor, until it is encoded.
        version: its version when it was saved.
        kept: what is kept of it, once it is encoded.
        module: path of the module that saved it.
        exact: whether that module is left out of compression.
        attempts: how often no op has claimed it.
        function: the custom function that saved it, by class name: ``CompiledFunction`` is a compiled graph.
        call: a number that all saves of one call of that function share.
        workspace: the memory that it is restored into.
        deferred: its shape, dtype and device, if it is to be restored not before it is computed with.
    """

    __slots__ = (
        "__weakref__", "attempts", "call", "deferred", "exact", "function", "kept", "module", "tensor", "version",
        "workspace",
    )  # fmt: skip  # a table, read as one

    def __init__(self, tensor: Tensor, module: str, exact: bool, workspace: Workspace) -> None:
        self.tensor: Tensor | None = tensor
        self.version = tensor._version
        self.kept: Kept | None = None
        self.module = module
        self.exact = exact
        self.attempts = 0
        self.function = ""
        self.call = -1
        self.workspace = workspace
        self.deferred: tuple[torch.Size, torch.dtype, torch.device] | None = None

    def raw(self) -> Tensor:
        """The tensor, while it is not encoded."""
        assert self.tensor is not None
        return self.tensor

    def fill(self, kept: Kept) -> None:
        """Let go of the tensor for what is kept of it."""
        self.kept, self.tensor = kept, None

    def defer(self, tensor: Tensor) -> None:
        """Have it restored not before it is computed with."""
        self.deferred = tensor.shape, tensor.dtype, tensor.device

    @not_compiled
    def unpack(self) -> Tensor:
        """Give autograd the tensor back, as often as it asks.

        Raises:
            RuntimeError: if what was kept by reference has been modified in place.
        """
        with torch._C.DisableTorchFunction():
            if self.kept is not None:
                if self.deferred is not None and defers():
                    return Deferred(self.kept, self.workspace, *self.deferred)
                return self.kept.restore(self.workspace)
            tensor = self.raw()
            check_version(tensor, self.version, "saved for backward")
            return tensor.detach()
