"""Chooses, for each saved tensor, what is kept of it: the least that serves its backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lightning_tinykg.activations import changes
from lightning_tinykg.activations.books import Books
from lightning_tinykg.activations.costs import Costs
from lightning_tinykg.activations.fragile import FRAGILE
from lightning_tinykg.activations.functions import Function
from lightning_tinykg.activations.keeping import Coded, Kept, Levels, Record, Reference, Saved
from lightning_tinykg.activations.ledger import Entry, Ledger
from lightning_tinykg.activations.recipes import Ingredient, Recipe, RecipeBook
from lightning_tinykg.activations.remaking import Making, Remade
from lightning_tinykg.activations.repeatable import DROPOUT, FUSED_DROPOUT
from lightning_tinykg.activations.rules import (
    ANGLE,
    EXACT,
    LINEAR,
    MASK,
    SHAPE,
    SIGN,
    SMOOTH,
    Need,
    Rule,
    Side,
    rule_for,
)
from lightning_tinykg.activations.sensitivity import Rounded
from lightning_tinykg.activations.storages import (
    Layout,
    is_plain,
    node_name,
    storage_id,
    tensors_in,
)
from lightning_tinykg.activations.values import Values
from lightning_tinykg.activations.widths import Widths
from lightning_tinykg.activations.workspace import Workspace
from lightning_tinykg.bits.plan import BitPlan
from lightning_tinykg.codecs.affine import FLOAT_DTYPES, quantize
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
from lightning_tinykg.codecs.refined import round_to


class Keeper:
    """What one entry of :class:`~lightning_tinykg.activations.compress_activations` keeps.

    Args:
        plan: which widths where; 32 keeps values exact.
        group_size: elements that share a scale; None: by width.
        min_bytes: what is smaller is kept as it is.
        by_rules: by the table of rules, or every float as in the paper.
        recompute: how much work a byte is worth: ``"off"``, ``"cheap"`` or ``"aggressive"``.
        key: key of the noise.
        ledger: where to write down what is kept.
    """

    def __init__(
        self,
        *,
        plan: BitPlan,
        group_size: int | None,
        min_bytes: int,
        by_rules: bool,
        recompute: str,
        key: int,
        ledger: Ledger,
    ) -> None:
        self.ledger = ledger
        self.values = Values()
        self.workspace = Workspace()
        self.widths = Widths(plan, group_size)
        self._min_bytes = min_bytes
        self._by_rules = by_rules
        self._key = key
        self._books = Books(ledger, self.values)
        self._costs = Costs(self.widths, recompute)
        self._draws = 0
        self.rounded: dict[Record, Rounded] | None = None
        """Where it is asked for: the records that are rounded, and where they were saved."""
        self._recipes = RecipeBook(self.values, min_bytes) if by_rules and recompute != "off" else None
        self._fragile: WeakValueDictionary[int, Record] = WeakValueDictionary()

    # -- what the forward does ----------------------------------------------------------------------------------

    def before(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """An op is about to run: if it writes in place what something is to be made from again, copy that first."""
        self._books.next_op(function.backward)
        if (function.may_write or kwargs) and changes.LENT:
            changes.before_change(tensors_in(function.written(args, kwargs)))
        if self._fragile and function.amplifies:
            self._keep_fragile(tensors_in(function.amplified.of(args, kwargs)))

    def _keep_fragile(self, tensors: Iterable[Tensor]) -> None:
        """Keep what was rounded exactly, since an op uses it that may blow up its error."""
        for tensor in tensors:
            record = self._fragile.pop(storage_id(tensor), None) if is_plain(tensor) else None
            if record is not None and record.entry is not None:
                whole = tensor if tensor._base is None else tensor._base
                with torch.no_grad(), torch._C.DisableTorchFunction():
                    self._value(whole.detach(), 32, record.entry)

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """An op has run: note whose memory its results are, and how they can be made again."""
        if type(out) is not Tensor or not out.requires_grad:
            self.values.made(out, (args, kwargs))
        if self._recipes is not None:
            self._recipes.note(func, args, kwargs, out)

    def observe_dropout(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        """A dropout has run, and its mask is kept: that is all it takes to repeat it."""
        x, node = args[0] if args else kwargs.get("input"), cast(Any, out.grad_fn)
        name = "" if node is None else node_name(node)
        if self._recipes is None or not isinstance(x, Tensor):
            return
        if name == "Mul" and isinstance(mask := _kept(node._raw_saved_other), Levels):
            self._recipes.write(DROPOUT, (x, mask), {}, out)
        elif name == "NativeDropout" and self.widths.bits < 32 and (mask := _kept(node._raw_saved_result1)) is not None:
            self._recipes.write(FUSED_DROPOUT, (x, mask, 1 / (1 - node._saved_p)), {}, out)

    def finish(self) -> None:
        """The forward is over: leave out of the count what the user still holds, and let go of everything."""
        self.values.forget_recipes()
        self._fragile.clear()
        self._books.close()

    # -- what is kept -------------------------------------------------------------------------------------------

    def keep(self, saved: Saved, node: Any, attribute: str, given: Any, op: str) -> Entry:
        """Keep a save whose node and attribute are known (or None).

        Args:
            saved: the handle; its raw tensor is let go of.
            node: the autograd node, or None.
            attribute: its saved attribute; without a node, the name of one that hides it.
            given: what the op that saved it was given, with tensors among it; None where that is not known.
            op: name of the Python-level function.

        Returns:
            Its entry in the ledger.
        """
        tensor = saved.raw()
        where = f"{node_name(node)}.{attribute}" if node is not None else attribute or "unknown"
        if node is None and saved.function:
            where = f"{saved.function}.tensors"
        entry = self._books.enter(saved.module, where, "reference", tensor)
        if not is_plain(tensor) or tensor._version != saved.version:
            # what was changed within its op raises when it is unpacked, as autograd would
            saved.fill(Reference(tensor.detach(), saved.version, where))
        elif self.values.is_users(tensor, given):
            saved.fill(Reference(tensor.detach(), saved.version, where))
            entry.codec = "held"
        else:
            self._books.charge(saved, tensor, entry)
            self.widths.charge(entry.raw_bytes)
            self.widths.turn_to(saved.module, where)
            if saved.exact or (node is None and attribute):
                kept = self._choose(tensor, EXACT, entry, op, node, computes=False)
            elif self._by_rules:
                kept = self._choose(tensor, rule_for(node, attribute), entry, op, node)
            else:
                kept = self._as_in_the_paper(tensor, entry)
            saved.fill(kept)
            if where in FRAGILE and isinstance(kept, Coded) and kept.record.bits < 32:
                self._fragile[storage_id(tensor)] = kept.record
        return entry

    def _choose(self, tensor: Tensor, rule: Rule, entry: Entry, op: str, node: Any, computes: bool = True) -> Kept:
        """The cheapest form that serves the rule; ``computes`` tells whether it may be computed again."""
        entry.need = rule.value if isinstance(rule, Need) else "side"
        if tensor.numel() == 0:
            return self._exact(tensor, entry)
        if rule is SHAPE:
            entry.codec = "shape"
            return Levels(ShapeCode(tensor.numel(), tensor.dtype, tensor.device), Layout.of(tensor))
        factor_of = None
        if rule is MASK:
            rule, factor_of = LINEAR, node._sequence_nr()
            if "dropout" in op and tensor.is_floating_point() and not tensor.requires_grad:
                layout = Layout.of(tensor)
                mask = encode_two_levels(layout.run(tensor))
                if mask is not None:
                    return self._levels(tensor, layout, "mask", lambda run: mask, entry)
        floating = tensor.dtype in FLOAT_DTYPES
        least = self.widths.least(tensor, rule)
        if (remade := self._remade(tensor, rule, least, entry, computes)) is not None:
            return remade
        layout = Layout.of(tensor)
        if layout.numel * tensor.itemsize < self._min_bytes:
            return self._exact(tensor, entry)
        if floating and isinstance(rule, Side):
            inside, levels = rule.inside, rule.levels
            return self._levels(tensor, layout, inside, lambda run: encode_levels(run, inside, levels), entry)
        if floating and rule is ANGLE and least < 32:
            group = self.widths.group(layout, least)

            def wrapped(run: Tensor) -> Code:
                return round_to(run.remainder(2 * math.pi), least, key=self._next_key(), group_size=group)

            return self._levels(tensor, layout, (rule, least), wrapped, entry)
        if floating and rule is SIGN:
            return self._levels(tensor, layout, "sign", encode_signs, entry)
        return self._value(tensor, least, entry, factor_of)

    # -- the forms ----------------------------------------------------------------------------------------------

    def _value(self, tensor: Tensor, least: int, entry: Entry, factor_of: int | None = None) -> Coded:
        """The values, in at least ``least`` bits, shared with every other save of the same elements.

        A factor of two products may come to multiply one gradient twice, as in ``a * (a * h)``. Where that is its own
        rounding squared, the variance does not average out: at 2 bits it adds a quarter, at 4 a hundredth.
        """
        layout = Layout.of(tensor)
        record = self._books.record(tensor, layout)
        if factor_of is not None:
            if record.factor_of not in (None, factor_of):
                least = self.widths.raised(least)
            record.factor_of = factor_of
        run = layout.run(tensor)
        bits = self.widths.better(layout, tensor.itemsize, least)
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
                    self.widths.spend(layout, bits, least)
            else:
                record.reference, record.bits = Reference.to(run.detach(), entry.op), 32
                self._books.refer(tensor, entry)
            record.entry = entry
        entry.codec = "exact" if record.value is None else record.value.name
        self._note_rounded(record, layout, tensor.dtype, entry)
        return Coded(record, layout)

    def _note_rounded(self, record: Record, layout: Layout, dtype: torch.dtype, entry: Entry) -> None:
        """For a plan: this record is one that bits are to be found for."""
        if self.rounded is not None and record.value is not None and record.bits < 32:
            found = self.rounded.setdefault(record, Rounded(record, layout, dtype.itemsize))
            found.places.add(self.widths.place)
            if entry.need == Need.UNKNOWN.value:
                found.floor = 8

    def _exact(self, tensor: Tensor, entry: Entry) -> Kept:
        return self._value(tensor, 32, entry)

    def _encode(self, run: Tensor, layout: Layout, bits: int) -> Code | None:
        """A code for a run of elements, or None where keeping it as it is takes no more."""
        if run.dtype == torch.bool:
            return encode_bool(run)
        if not run.is_floating_point():
            return encode_integers(run)
        if bits == 32 or self.widths.size(layout, bits) >= run.nbytes:
            return None
        return round_to(run, bits, key=self._next_key(), group_size=self.widths.group(layout, bits))

    def _levels(self, tensor: Tensor, layout: Layout, key: Any, encode: Callable[[Tensor], Code], entry: Entry) -> Kept:
        """A side or a sign of each element, shared with every save that asks the same."""
        record = self._books.record(tensor, layout)
        if record.reference is not None:
            return self._value(tensor, 32, entry)
        if key not in record.levels:
            record.levels[key] = encode(layout.run(tensor))
            entry.stored_bytes = record.levels[key].nbytes
        entry.codec = record.levels[key].name
        return Levels(record.levels[key], layout, record)

    def _remade(self, tensor: Tensor, rule: Rule, least: int, entry: Entry, computes: bool) -> Kept | None:
        """How to make the tensor again, where that is the cheapest form."""
        recipe = None if self._recipes is None else self._recipes.find(tensor)
        if recipe is None or (recipe.computes and not computes):
            return None
        # an angle is rounded by the turn, which what it is made of is not; and at 8 bits what enters a function that
        # bends is to be as exact as 8 bits of itself
        if rule is ANGLE or (rule is SMOOTH and least > 4 and recipe.computes and not self.widths.literal):
            least = 32
        if (cost := self._costs.of_remaking(recipe, tensor, rule, least)) is None:
            return None
        entry.codec = "recipe" if recipe.computes else "gather"
        entry.recipe, entry.work = recipe.text(), int(cost.work)
        return self._follow(recipe, least, Layout.of(tensor), entry)

    def _follow(self, recipe: Recipe, least: int, layout: Layout, entry: Entry) -> Kept:
        """Keep all that a recipe starts from; every save of what it makes follows it together."""
        least = self._costs.needed(recipe, least)
        # where it is asked for what is rounded, each save follows for itself, so that its place is noted
        making = recipe.makings.get(least) if self.rounded is None else None
        if making is None:
            args = self._argument(recipe.args, least, entry)
            op = recipe.repeatable.op
            making = Making(op, args, recipe.kwargs, recipe.shape, recipe.dtype, recipe.autocast)
            recipe.makings[least] = making
        return Remade(making, layout)

    def _argument(self, argument: Any, least: int, entry: Entry) -> Any:
        """What is kept in an argument's place: of tensors a form, of tuples what is in them, all else itself."""
        if isinstance(argument, tuple):
            return tuple(self._argument(item, least, entry) for item in argument)
        return self._ingredient(argument, least, entry) if isinstance(argument, Ingredient) else argument

    def _ingredient(self, ingredient: Ingredient, least: int, entry: Entry) -> Kept:
        """Keep one ingredient: by reference if it is free, else in an entry of its own, or by its own recipe."""
        tensor, layout = ingredient.tensor(), ingredient.layout
        least = least if ingredient.floating else 32
        record = self._costs.kept(ingredient, least)
        if tensor is not None and ingredient.free:
            record = self._books.record(tensor, layout)
            if record.bits < 32:
                record.reference, record.bits = Reference.to(layout.run(tensor), entry.op), 32
        elif record is None:
            if tensor is None or self._costs.of_ingredient(ingredient, least, math.inf, []).work:
                assert ingredient.recipe is not None  # it is made again in its turn
                return self._follow(ingredient.recipe, least, layout, entry)
            name = f"{entry.op} {'from' if ingredient.floating else 'index'}"
            record = self._value(tensor, least, self._books.enter(entry.module, name, "", tensor)).record
        if record.reference is not None:
            self._books.lend(record)
        self._note_rounded(record, layout, ingredient.dtype, entry)
        return Coded(record, layout)

    def _as_in_the_paper(self, tensor: Tensor, entry: Entry) -> Kept:
        """TinyKG to the letter: every float, each save for itself, row by row, float32 scale and zero point."""
        layout = replace(Layout.of(tensor), dense=False)  # rows are the tensor's, however it lies in memory
        run = layout.run(tensor)
        small = run.numel() == 0 or run.nbytes < self._min_bytes
        if tensor.dtype not in FLOAT_DTYPES or small or self.widths.bits == 32:
            return self._exact(tensor, entry)
        width = run.shape[-1] if run.dim() else 1
        code = quantize(run, self.widths.bits, key=self._next_key(), group_size=width, metadata=torch.float32)
        entry.codec, entry.stored_bytes = code.name, code.nbytes
        return Levels(code, layout)

    def _next_key(self) -> int:
        self._draws += 1
        return make_key(self._key, self._draws)


def _kept(raw: Any) -> Kept | None:
    """What is kept of a save, if it is ours."""
    return raw.data.kept if isinstance(raw.data, Saved) else None
