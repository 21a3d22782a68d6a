"""The codes that saved tensors are kept in, each shared by all saves of the same elements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_tinykg.activations.books import Books
from lightning_tinykg.activations.keeping import Coded, Kept, Levels, Record, Reference
from lightning_tinykg.activations.ledger import Entry
from lightning_tinykg.activations.rules import Need
from lightning_tinykg.activations.sensitivity import Rounded
from lightning_tinykg.activations.storages import Layout, in_32_bits
from lightning_tinykg.activations.widths import Widths
from lightning_tinykg.codecs.affine import FLOAT_DTYPES, quantize
from lightning_tinykg.codecs.lossless import Code, RawCode, encode_bool, encode_integers
from lightning_tinykg.codecs.noise import make_key


class Forms:
    """Makes the codes of one forward.

    Args:
        books: who pays for them.
        widths: in how many bits.
        key: key of the noise; each code draws its own from it.

    Attributes:
        rounded: where it is asked for: the records that are rounded, and where they were saved.
    """

    def __init__(self, books: Books, widths: Widths, key: int) -> None:
        self.rounded: dict[Record, Rounded] | None = None
        self._books = books
        self._widths = widths
        self._key = key
        self._draws = 0

    def value(self, tensor: Tensor, least: int, entry: Entry, factor_of: int | None = None) -> Coded:
        """The values, in at least ``least`` bits, shared with every other save of the same elements.

        A factor of two products may come to multiply one gradient twice, as in ``a * (a * h)``. Where that is its own
        rounding squared, the variance does not average out: at 2 bits it adds a quarter, at 4 a hundredth.
        """
        layout = Layout.of(tensor)
        record = self._books.record(tensor, layout)
        if factor_of is not None:
            if record.factor_of not in (None, factor_of):
                least = self._widths.raised(least)
            record.factor_of = factor_of
        record.asked = max(record.asked, least)
        run = layout.run(tensor)
        bits = self._widths.better(layout, in_32_bits(tensor.itemsize, tensor.dtype), least)
        if record.bits < bits:
            if record.entry is not None:  # the coarser code is replaced, for every save that has it
                record.entry.stored_bytes = 0
            record.value, record.reference = None, None
            code = self._encode(run, layout, bits)
            whole = tensor.untyped_storage().nbytes()
            if code is None and 2 * layout.numel * tensor.itemsize <= whole:
                code = RawCode(run.reshape(-1).clone())  # not for a slice's sake the whole storage
            if code is not None:
                record.value, record.bits = code, bits if not isinstance(code, RawCode) else 32
                entry.stored_bytes = code.nbytes
                if record.bits < 32:
                    self._widths.spend(layout, bits, least)
                if record.bits < 32 and not self._widths.literal:
                    self._books.linger(tensor)
            else:
                record.reference, record.bits = Reference.to(run.detach(), entry.op), 32
                self._books.refer(tensor, entry)
            record.entry = entry
        entry.codec = "exact" if record.value is None else record.value.name
        self.note_rounded(record, layout, tensor.dtype, entry)
        return Coded(record, layout)

    def note_rounded(self, record: Record, layout: Layout, dtype: torch.dtype, entry: Entry) -> None:
        """For a plan: this record is one that bits are to be found for."""
        if self.rounded is not None and record.value is not None and record.bits < 32:
            found = self.rounded.setdefault(record, Rounded(record, layout, dtype.itemsize))
            found.places.add(self._widths.place)
            if entry.need == Need.UNKNOWN.value:
                found.floor = 8

    def exact(self, tensor: Tensor, entry: Entry) -> Coded:
        """The values, to the last bit."""
        return self.value(tensor, 32, entry)

    def _encode(self, run: Tensor, layout: Layout, bits: int) -> Code | None:
        """A code for a run of elements, or None where keeping it as it is takes no more."""
        if run.dtype == torch.bool:
            return encode_bool(run)
        if not run.is_floating_point():
            return encode_integers(run)
        if bits == 32 or self._widths.size(layout, bits) >= run.nbytes:
            return None
        return quantize(run, bits, key=self.next_key(), group_size=self._widths.group(layout, bits))

    def levels(self, tensor: Tensor, layout: Layout, key: Any, encode: Callable[[Tensor], Code], entry: Entry) -> Kept:
        """A side or a sign of each element, shared with every save that asks the same."""
        record = self._books.record(tensor, layout)
        if record.reference is not None:
            return self.value(tensor, 32, entry)
        if key not in record.levels:
            record.levels[key] = encode(layout.run(tensor))
            entry.stored_bytes = record.levels[key].nbytes
        entry.codec = record.levels[key].name
        return Levels(record.levels[key], layout, record)

    def as_in_the_paper(self, tensor: Tensor, entry: Entry, min_bytes: int) -> Kept:
        """TinyKG to the letter: every float, each save for itself, row by row, float32 scale and zero point."""
        layout = replace(Layout.of(tensor), dense=False)  # rows are the tensor's, however it lies in memory
        run = layout.run(tensor)
        small = run.numel() == 0 or run.nbytes < min_bytes
        if tensor.dtype not in FLOAT_DTYPES or small or self._widths.bits == 32:
            return self.exact(tensor, entry)
        width = run.shape[-1] if run.dim() else 1
        code = quantize(run, self._widths.bits, key=self.next_key(), group_size=width, metadata=torch.float32)
        entry.codec, entry.stored_bytes = code.name, code.nbytes
        return Levels(code, layout)

    def next_key(self) -> int:
        """A key of the noise that nothing else draws from."""
        self._draws += 1
        return make_key(self._key, self._draws)
