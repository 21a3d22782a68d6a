"""Chooses, for each saved tensor, what is kept of it: the least that serves its backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

from lightning_tinykg.activations.keeping import Coded, Gathered, Kept, Levels, Record, Reference, Saved
from lightning_tinykg.activations.ledger import Entry, Ledger
from lightning_tinykg.activations.rules import EXACT, LINEAR, MASK, SHAPE, SIGN, SMOOTH, Need, Rule, Side, rule_for
from lightning_tinykg.activations.storages import Layout, Provenance, is_plain, node_name, storage_id
from lightning_tinykg.codecs.affine import FLOAT_DTYPES, quantize, quantized_size
from lightning_tinykg.codecs.lossless import (
    Code,
    RawCode,
    ShapeCode,
    encode_bool,
    encode_integers,
    encode_levels,
    encode_signs,
    encode_two_levels,
)
from lightning_tinykg.codecs.noise import make_key
from lightning_tinykg.codecs.packing import BITS

_RAISED_BITS = {1: 4, 2: 4, 4: 8, 8: 8}
"""By width: the least width of what enters a backward non-linearly, and of coefficients."""

_NARROW = 16
"""A tensor whose last dimension is narrower than this holds coefficients, not features."""


@dataclass(slots=True)
class Origin:
    """How a tensor was gathered. Held until the rows die: the table lives at least as long as they do anyway."""

    rows: StorageWeakRef
    rows_version: int
    gather: Callable[..., Tensor]
    table: Tensor
    table_version: int
    index: tuple[Any, ...]
    build: Callable[[Kept, tuple[Any, ...]], tuple[Any, ...]]


class Keeper:
    """What one entry of :class:`~lightning_tinykg.activations.compress_activations` keeps.

    Args:
        bits: width of what is rounded; 32 keeps all values exact.
        group_size: elements that share a scale; None: by width.
        min_bytes: what is smaller is kept as it is.
        by_rules: by the table of rules, or every float as in the paper.
        key: key of the noise.
        ledger: where to write down what is kept.
    """

    def __init__(
        self, *, bits: int, group_size: int | None, min_bytes: int, by_rules: bool, key: int, ledger: Ledger
    ) -> None:
        self.provenance = Provenance()
        self._width = bits
        self._group_size = group_size
        self._min_bytes = min_bytes
        self._by_rules = by_rules
        self._key = key
        self._ledger = ledger
        self._draws = 0
        self._largest = 0
        self._raw_bytes = 0
        self._extra = 0
        self._records: dict[tuple[Any, ...], Record] = {}
        self._storages: dict[int, tuple[StorageWeakRef, Entry]] = {}
        self._origins: dict[int, Origin] = {}

    # -- what the forward does ----------------------------------------------------------------------------------

    def observe(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor], inputs: list[Tensor]
    ) -> None:
        """An op has run: note whose memory its outputs are, and whether they are rows of a table."""
        self.provenance.made(outputs, inputs)
        if self._origins:
            self._origins = {key: origin for key, origin in self._origins.items() if not origin.rows.expired()}
        if self._by_rules and func in _GATHERS and len(outputs) == 1 and outputs[0].requires_grad:
            described = _GATHERS[func](args, kwargs)
            if described is not None:
                self._note_origin(described, outputs[0])

    def _note_origin(self, described: _Described, rows: Tensor) -> None:
        gather, table, index, build = described
        if is_plain(table) and is_plain(rows) and storage_id(table) != storage_id(rows):
            self._origins[storage_id(rows)] = Origin(
                StorageWeakRef(rows.untyped_storage()), rows._version, gather, table, table._version, index, build
            )

    def finish(self) -> None:
        """The forward is over: leave out of the raw count what the user still holds, and let go of everything."""
        self._origins.clear()
        references = {key[0] for key, record in self._records.items() if record.reference is not None}
        for storage, (weak, entry) in self._storages.items():
            if storage not in references and not weak.expired():
                entry.raw_bytes = 0
        self._records.clear()
        self._storages.clear()

    # -- what is kept -------------------------------------------------------------------------------------------

    def keep_as_is(self, saved: Saved, codec: str) -> None:
        """Keep a save by reference, whatever it is."""
        tensor = saved.raw()
        entry = self._enter(saved.module, "", codec, tensor)
        if is_plain(tensor) and not self.provenance.is_users(tensor, None):
            self._charge(tensor, entry)
            entry.stored_bytes = entry.raw_bytes
        saved.fill(Reference(tensor.detach(), saved.version, codec))

    def keep(self, saved: Saved, node: Any, attribute: str, inputs: list[Tensor] | None, op: str) -> None:
        """Keep a save whose node and attribute are known (or None).

        Args:
            saved: the handle; its raw tensor is let go of.
            node: the autograd node, or None.
            attribute: its saved attribute.
            inputs: the inputs of the op that saved it, or None where that is not known.
            op: name of the Python-level function.
        """
        tensor = saved.raw()
        where = f"{node_name(node)}.{attribute}" if node is not None else "unknown"
        entry = self._enter(saved.module, where, "reference", tensor)
        if not is_plain(tensor) or tensor._version != saved.version:
            # what was changed within its op raises when it is unpacked, as autograd would
            saved.fill(Reference(tensor.detach(), saved.version, where))
        elif self.provenance.is_users(tensor, inputs):
            saved.fill(Reference(tensor.detach(), saved.version, where))
            entry.codec = "held"
        else:
            self._charge(tensor, entry)
            rule = rule_for(node, attribute) if self._by_rules else LINEAR
            saved.fill(self._choose(tensor, rule, entry, op))

    def _choose(self, tensor: Tensor, rule: Rule, entry: Entry, op: str) -> Kept:
        """The cheapest form that serves the rule."""
        if tensor.numel() == 0:
            return self._exact(tensor, entry)
        if not self._by_rules:
            return self._as_in_the_paper(tensor, entry)
        if rule is SHAPE:
            entry.codec = "shape"
            return Levels(ShapeCode(tensor.numel(), tensor.dtype, tensor.device), Layout.of(tensor))
        if rule is MASK:
            rule = LINEAR
            if "dropout" in op and tensor.is_floating_point() and not tensor.requires_grad:
                layout = Layout.of(tensor)
                mask = encode_two_levels(layout.run(tensor))
                if mask is not None:
                    return self._levels(tensor, layout, "mask", lambda run: mask, entry)
        floating = tensor.dtype in FLOAT_DTYPES
        least = self._least(tensor, rule)
        if (gathered := self._gathered(tensor, rule, least, entry)) is not None:
            return gathered
        layout = Layout.of(tensor)
        if layout.numel * tensor.itemsize < self._min_bytes:
            return self._exact(tensor, entry)
        if floating and isinstance(rule, Side):
            levels = torch.tensor(rule.levels, dtype=tensor.dtype, device=tensor.device)
            inside = rule.inside
            return self._levels(tensor, layout, rule.key, lambda run: encode_levels(run, inside, levels), entry)
        if floating and rule is SIGN:
            return self._levels(tensor, layout, "sign", encode_signs, entry)
        return self._value(tensor, least, entry)

    def _least(self, tensor: Tensor, rule: Rule) -> int:
        """The least width for a tensor under a rule.

        What enters its backward non-linearly gets at least ``_RAISED_BITS``, and so does what has only a few elements
        in a row: it holds coefficients (attention weights, scores, degrees), each of which multiplies a whole row of
        features, so its error counts for all of them while it takes a fraction of their memory.
        """
        if self._width == 32 or rule is EXACT or not isinstance(rule, Need) or tensor.dtype not in FLOAT_DTYPES:
            return 32
        narrow = tensor.dim() < 2 or tensor.shape[-1] < _NARROW
        return _RAISED_BITS[self._width] if rule is SMOOTH or narrow else self._width

    def _bits(self, run: Tensor, least: int) -> int:
        """The width for a run of elements: at least ``least``, more where more is cheap.

        A tensor that is small beside the step's largest gets a bit more each time its size halves, as long as all
        such extras together stay below a hundredth of the raw bytes. The score head is small and on every path of the
        gradient: this is what keeps its error from all the rest.
        """
        if least == 32:
            return 32
        wish = self._width + math.log2(max(self._largest / run.nbytes, 1.0))
        better = min((width for width in BITS if width >= least), key=lambda width: abs(width - wish))
        return better if self._extra_for(run, better, least) <= self._raw_bytes // 100 else least

    def _extra_for(self, run: Tensor, bits: int, least: int) -> int:
        """What all extras would come to, were this run kept in ``bits`` bits where ``least`` would do."""
        return self._extra + self._code_size(run.numel(), bits) - self._code_size(run.numel(), least)

    def _group(self, bits: int) -> int:
        """Elements that share a scale: smaller groups where there are few levels."""
        return self._group_size or (32 if bits <= 2 else 64)

    def _code_size(self, numel: int, bits: int) -> int:
        return quantized_size(numel, bits, self._group(bits))

    # -- the forms ----------------------------------------------------------------------------------------------

    def _value(self, tensor: Tensor, least: int, entry: Entry) -> Kept:
        """The values, in at least ``least`` bits, shared with every other save of the same elements."""
        layout = Layout.of(tensor)
        record = self._record(tensor, layout)
        run = layout.run(tensor)
        bits = self._bits(run, least)
        if record.bits < bits:
            if record.entry is not None:  # the coarser code is replaced, for every save that has it
                record.entry.stored_bytes = 0
            record.value, record.reference = None, None
            code = self._encode(run, bits)
            whole = tensor.untyped_storage().nbytes()
            if code is None and 2 * layout.numel * tensor.itemsize <= whole:
                code = RawCode(run.reshape(-1).clone())  # not for a slice's sake the whole storage
            if code is not None:
                record.value, record.bits = code, bits if not isinstance(code, RawCode) else 32
                entry.stored_bytes = code.nbytes
                if record.bits < 32:
                    self._extra = self._extra_for(run, bits, least)
            else:
                record.reference, record.bits = Reference.to(run.detach(), entry.op), 32
                entry.stored_bytes = self._reference_bytes(tensor)
            record.entry = entry
        entry.codec = "exact" if record.value is None else record.value.name
        return Coded(record, layout)

    def _exact(self, tensor: Tensor, entry: Entry) -> Kept:
        return self._value(tensor, 32, entry)

    def _encode(self, run: Tensor, bits: int) -> Code | None:
        """A code for a run of elements, or None where keeping it as it is takes no more."""
        if run.dtype == torch.bool:
            return encode_bool(run)
        if not run.is_floating_point():
            return encode_integers(run)
        if bits == 32 or self._code_size(run.numel(), bits) >= run.nbytes:
            return None
        return quantize(run, bits, key=self._next_key(), group_size=self._group(bits))

    def _levels(
        self, tensor: Tensor, layout: Layout, key: Any, encode: Callable[[Tensor], Code], entry: Entry
    ) -> Kept:
        """A side or a sign of each element, shared with every save that asks the same."""
        record = self._record(tensor, layout)
        if record.reference is not None:
            return self._value(tensor, 32, entry)
        if key not in record.levels:
            record.levels[key] = encode(layout.run(tensor))
            entry.stored_bytes = record.levels[key].nbytes
        entry.codec = record.levels[key].name
        return Levels(record.levels[key], layout)

    def _gathered(self, tensor: Tensor, rule: Rule, least: int, entry: Entry) -> Kept | None:
        """A reference to the table and the index, where that is the cheapest form."""
        origin = self._origins.get(storage_id(tensor))
        if (
            origin is None
            or tensor._version != origin.rows_version
            or origin.table._version != origin.table_version
        ):
            return None
        cost = self._cost(origin.table, least) + sum(self._cost(index, 32) for index in origin.index)
        if cost > self._own_cost(tensor, rule, least):
            return None
        table = self._part(origin.table, least, entry, "table")
        index = tuple(self._part(index, 32, entry, "index") for index in origin.index)
        entry.codec = "gather"
        return Gathered(
            origin.gather,
            origin.build(table, index),
            tuple(tensor.shape),
            tuple(tensor.stride()),
            tensor.storage_offset(),
        )

    def _own_cost(self, tensor: Tensor, rule: Rule, least: int) -> int:
        """The bytes of a tensor's own code."""
        if isinstance(rule, Side):
            return tensor.numel() // 8
        if rule is SIGN:
            return tensor.numel() // 4
        return min(self._code_size(tensor.numel(), least), tensor.nbytes) if least < 32 else tensor.nbytes

    def _cost(self, tensor: Tensor, least: int) -> int:
        """The bytes it would take to keep a table or an index as well."""
        if self.provenance.is_users(tensor, (tensor,)):
            return 0
        layout = Layout.of(tensor)
        record = self._records.get(self._record_key(tensor, layout))
        if record is not None and record.bits >= least:
            return 0
        if tensor.dtype in FLOAT_DTYPES and least < 32:
            return self._code_size(layout.numel, least)
        return layout.numel * tensor.itemsize

    def _part(self, tensor: Tensor, least: int, entry: Entry, name: str) -> Kept:
        """Keep the table or the index of a gather: by reference if it is the user's, else in an entry of its own."""
        if self.provenance.is_users(tensor, (tensor,)):
            return Reference.to(tensor, entry.op)
        part = self._enter(entry.module, f"{entry.op} {name}", "", tensor)
        again = self._gathered(tensor, LINEAR, least, part)
        return again if again is not None else self._value(tensor, least, part)

    def _as_in_the_paper(self, tensor: Tensor, entry: Entry) -> Kept:
        """TinyKG to the letter: every float, each save for itself, row by row, float32 scale and zero point."""
        layout = Layout.of(tensor)
        width = tensor.shape[-1] if tensor.dim() else 1
        if tensor.dtype not in FLOAT_DTYPES or layout.numel * tensor.itemsize < self._min_bytes:
            return self._exact(tensor, entry)
        layout = Layout(layout.shape, _row_major(tensor), 0, layout.numel, layout.numel == tensor.numel())
        run = tensor if layout.dense else Layout.of(tensor).run(tensor)
        code = quantize(run, self._width, key=self._next_key(), group_size=width, metadata=torch.float32)
        entry.codec, entry.stored_bytes = code.name, code.nbytes
        return Levels(code, layout if layout.dense else Layout.of(tensor))

    # -- the books ----------------------------------------------------------------------------------------------

    def _enter(self, module: str, op: str, codec: str, tensor: Tensor) -> Entry:
        entry = Entry(module, op, codec, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        self._ledger.entries.append(entry)
        return entry

    def _charge(self, tensor: Tensor, entry: Entry) -> None:
        """Charge a storage's bytes to the first save that keeps it alive."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = (StorageWeakRef(storage), entry)
            entry.raw_bytes = storage.nbytes()
            self._raw_bytes += entry.raw_bytes
            self._largest = max(self._largest, entry.raw_bytes)

    def _reference_bytes(self, tensor: Tensor) -> int:
        """The bytes a further reference keeps alive: the whole storage, unless another reference does already."""
        storage = storage_id(tensor)
        held = any(key[0] == storage and record.reference is not None and record.entry is not None
                   for key, record in self._records.items() if record.reference is not None
                   and record.entry is not None and record.entry.stored_bytes)  # fmt: skip
        return 0 if held else tensor.untyped_storage().nbytes()

    def _record(self, tensor: Tensor, layout: Layout) -> Record:
        key = self._record_key(tensor, layout)
        if key not in self._records:
            self._records[key] = Record(StorageWeakRef(tensor.untyped_storage()))
        return self._records[key]

    @staticmethod
    def _record_key(tensor: Tensor, layout: Layout) -> tuple[Any, ...]:
        geometry = () if layout.dense else (layout.shape, layout.stride)
        return (storage_id(tensor), layout.offset, layout.numel, tensor.dtype, tensor._version, geometry)

    def _next_key(self) -> int:
        self._draws += 1
        return make_key(self._key, self._draws)


def _row_major(tensor: Tensor) -> tuple[int, ...]:
    return tuple(torch.empty(tensor.shape, device="meta").stride())


# -- gathers: ops whose result is rows of a table ---------------------------------------------------------------

_Described = tuple[Callable[..., Tensor], Tensor, tuple[Any, ...], Callable[[Kept, tuple[Any, ...]], tuple[Any, ...]]]


def _index_select(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Described | None:
    names = dict(zip(("input", "dim", "index"), args, strict=False)) | kwargs
    dim = names["dim"]
    if not isinstance(dim, int):
        return None
    return torch.index_select, names["input"], (names["index"],), lambda table, index: (table, dim, index[0])


def _getitem(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Described | None:
    table, item = args
    items = item if isinstance(item, tuple) else (item,)
    index = tuple(i for i in items if isinstance(i, Tensor))
    others = [i for i in items if not isinstance(i, Tensor)]
    if not index or any(i.dtype not in (torch.int64, torch.int32) for i in index):
        return None
    if any(i is not Ellipsis and not isinstance(i, slice) for i in others):
        return None

    def build(kept: Kept, kept_index: tuple[Any, ...]) -> tuple[Any, ...]:
        places = iter(kept_index)
        return kept, tuple(next(places) if isinstance(i, Tensor) else i for i in items)

    return torch.Tensor.__getitem__, table, index, build


def _embedding(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Described | None:
    names = dict(zip(("input", "weight", "padding_idx", "max_norm"), args, strict=False)) | kwargs
    if names.get("max_norm") is not None:  # it changes the table
        return None
    return functional.embedding, names["weight"], (names["input"],), lambda table, index: (index[0], table)


_GATHERS: dict[Any, Callable[[tuple[Any, ...], dict[str, Any]], _Described | None]] = {
    torch.index_select: _index_select,
    torch.Tensor.index_select: _index_select,
    torch.Tensor.__getitem__: _getitem,
    functional.embedding: _embedding,
}
