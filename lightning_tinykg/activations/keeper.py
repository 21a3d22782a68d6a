"""Chooses, for each saved tensor, what is kept of it: the least that serves its backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_tinykg.activations import changes
from lightning_tinykg.activations.books import Books
from lightning_tinykg.activations.compared import Comparer
from lightning_tinykg.activations.costs import Costs
from lightning_tinykg.activations.decisions import Decider, Decisions
from lightning_tinykg.activations.deferring import is_deferrable
from lightning_tinykg.activations.following import Follower
from lightning_tinykg.activations.forms import Forms
from lightning_tinykg.activations.fragile import FRAGILE, Fragiles
from lightning_tinykg.activations.functions import Function
from lightning_tinykg.activations.hindsight import records_in
from lightning_tinykg.activations.keeping import (
    AsComplex,
    Conjugated,
    Kept,
    Levels,
    Reference,
    Saved,
)
from lightning_tinykg.activations.ledger import Entry, Ledger
from lightning_tinykg.activations.recipe_book import RecipeBook
from lightning_tinykg.activations.rules import (
    ANGLE,
    COMPARED,
    DIVISOR,
    EXACT,
    LINEAR,
    LOGARITHM,
    MASK,
    SHAPE,
    SIGN,
    UNKNOWN,
    WEIGHT,
    Need,
    Rule,
    Side,
    rule_for,
)
from lightning_tinykg.activations.storages import (
    Layout,
    in_32_bits,
    is_plain,
    node_name,
    tensors_in,
)
from lightning_tinykg.activations.values import Values
from lightning_tinykg.activations.widths import StepSize, Widths, is_narrow
from lightning_tinykg.activations.within import Made
from lightning_tinykg.activations.workspace import Workspace
from lightning_tinykg.bits.plan import BitPlan
from lightning_tinykg.codecs.affine import FLOAT_DTYPES, quantize
from lightning_tinykg.codecs.logarithm import LogarithmCode
from lightning_tinykg.codecs.lossless import (
    Code,
    ShapeCode,
    encode_levels,
    encode_signs,
    encode_two_levels,
)

_MULTIPLIES = frozenset({"mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply", "multiply_"})
"""Ops that multiply by what they are given, and by no mask that they have made."""

_THROUGH: dict[Rule, Callable[[Tensor], Tensor]] = {
    ANGLE: lambda angles: angles.remainder(2 * math.pi),
    LOGARITHM: torch.exp,
}
"""What is rounded in a tensor's place."""


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
        largest_step: of those before.
        decisions: what was decided in these.
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
        largest_step: StepSize,
        decisions: Decisions,
    ) -> None:
        self.ledger = ledger
        self.values = Values()
        self.workspace = Workspace()
        self.widths = Widths(plan, group_size, largest_step)
        self._min_bytes = min_bytes
        self._by_rules = by_rules
        self._books = Books(ledger, self.values, self.workspace)
        self.forms = Forms(self._books, self.widths, key)
        self._follower: Follower | None = None
        if by_rules and recompute != "off":
            recipes = RecipeBook(self.values, min_bytes)
            given = plan, group_size, min_bytes, largest_step, recompute
            costs = Costs(self.widths, recompute)
            decider = Decider(costs, self.widths, self.values, decisions, *given)
            self._follower = Follower(recipes, costs, decider, self.forms, self._books, self.widths, self.values)
        self._comparer = Comparer(self.values, self.forms, self.widths, self._follower, min_bytes)
        self._fragiles = Fragiles(self.forms, self._follower, self.workspace)

    # -- what the forward does ----------------------------------------------------------------------------------

    def before(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """An op is about to run: if it writes in place what something is to be made from again, copy that first."""
        self._books.next_op(function.backward)
        if (function.may_write or kwargs) and (changes.LENT or self.values.any_apart):
            written = tensors_in(function.written(args, kwargs))
            changes.before_change(written)
            self.values.before_change(written)
        if function.of_data:
            self.values.set_apart(args)
        elif function.lends:
            self.values.lend(args[:1])
        self._fragiles.before(function, args, kwargs)

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """An op has run: note whose memory its results are, and how they can be made again."""
        if type(out) is not Tensor or not out.requires_grad:
            self.values.made(out, (args, kwargs))
        self._fragiles.after(out)
        if self._follower is not None:
            self._follower.recipes.note(func, args, kwargs, out, exactly=self.widths.bits == 32)

    def observe_dropout(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        """A dropout has run, and what it saved is kept."""
        if self._follower is not None:
            self._follower.observe_dropout(args, kwargs, out)

    def observe_made(self, made: Made | None) -> None:
        """How something was made that an op saves and nobody else has seen."""
        if self._follower is not None:
            self._follower.write(made)

    def finish(self) -> None:
        """The forward is over: leave out of the count what the user still holds, and let go of everything."""
        self.values.forget_recipes()
        self._comparer.forget()
        self._fragiles.clear()
        if self._follower is not None:
            self._follower.finish()
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
        conjugated = tensor.is_complex() and tensor.is_conj() and type(tensor) is Tensor
        plain = tensor.conj() if conjugated else tensor  # which is a view without the bit
        if not is_plain(plain) or tensor._version != saved.version:
            # what was changed within its op raises when it is unpacked, as autograd would
            saved.fill(Reference(tensor.detach(), saved.version, where))
        elif self.values.is_users(tensor, given):
            saved.fill(Reference(tensor.detach(), saved.version, where))
            entry.codec = "held"
        else:
            tensor = plain
            self._books.charge(saved, tensor, entry)
            self.widths.charge(in_32_bits(entry.raw_bytes, tensor.dtype))
            self.widths.turn_to(saved.module, where)
            if saved.exact or (node is None and attribute):
                kept = self._choose(tensor, EXACT, entry, op, node, computes=False)
                for record in records_in(kept):
                    record.stays = True
            elif self._by_rules:
                rule = rule_for(node, attribute)
                if where in FRAGILE and self.widths.affords_exactly(tensor):
                    rule = EXACT
                if self._follower is not None and node is not None and given is not None and rule is not SHAPE:
                    self._follower.observe_within(op, node, attribute, tensor, given)
                compared = self._comparer.kept(node, attribute, given, entry) if rule is COMPARED else None
                kept = compared or self._choose(tensor, rule, entry, op, node)
            else:
                kept = self.forms.as_in_the_paper(tensor, entry, self._min_bytes)
            saved.fill(Conjugated(kept) if conjugated else kept)
            if is_deferrable(tensor, where):
                saved.defer(tensor)
            if where in FRAGILE:
                self._fragiles.note(tensor, saved, entry)
        return entry

    def _choose(self, tensor: Tensor, rule: Rule, entry: Entry, op: str, node: Any, computes: bool = True) -> Kept:
        """The cheapest form that serves the rule; ``computes`` tells whether it may be computed again."""
        steady = rule in (EXACT, COMPARED, UNKNOWN)  # a backward may look for what equals it
        rule = EXACT if rule in (DIVISOR, COMPARED) else rule
        if rule is WEIGHT:
            rule = EXACT if is_narrow(tensor) else LINEAR
            if rule is EXACT and self.widths.literal:  # a plan is taken at its word, unless exactly takes no more
                if self._follower and (remade := self._follower.remade(tensor, EXACT, 32, entry, computes, own=8)):
                    return remade
                rule = LINEAR
        entry.need = rule.value if isinstance(rule, Need) else "side"
        if tensor.numel() == 0:
            return self.forms.exact(tensor, entry)
        if rule is SHAPE:
            entry.codec = "shape"
            return Levels(ShapeCode(tensor.numel(), tensor.dtype, tensor.device), Layout.of(tensor))
        if tensor.is_complex():  # by its real and imaginary parts, which are floats like others, and made like others
            rule = rule if rule in (LINEAR, MASK) else EXACT
            contiguous = tensor.is_contiguous()
            if tensor.dim() and (contiguous or tensor.stride(-1) == 1) and tensor.nbytes >= self._min_bytes:
                parts = torch.view_as_real(tensor.detach()).flatten(-2)
                stride = tensor.stride() if contiguous else None
                return AsComplex(self._choose(parts, rule, entry, op, node, computes), stride)
        factor_of = None
        if rule is MASK:
            rule, factor_of = LINEAR, node._sequence_nr()
            # what another op multiplies by may be anything: on a GPU, where nobody looks for a third level, not asked
            drops = "dropout" in op or (tensor.is_cpu and op not in _MULTIPLIES)
            if drops and tensor.is_floating_point() and not tensor.requires_grad:
                layout = Layout.of(tensor)
                mask = encode_two_levels(layout.run(tensor))
                if mask is not None:
                    return self.forms.levels(tensor, layout, "mask", lambda run: mask, entry)
        floating = tensor.dtype in FLOAT_DTYPES
        least = self.widths.least(tensor, rule)
        if self._follower is not None:
            remade = self._follower.remade(tensor, rule, least, entry, computes, steady)
            if remade is not None:
                return remade
        layout = Layout.of(tensor)
        if layout.numel * tensor.itemsize < self._min_bytes:
            return self.forms.exact(tensor, entry)
        if floating and isinstance(rule, Side):
            inside, levels = rule.inside, rule.levels
            return self.forms.levels(tensor, layout, inside, lambda run: encode_levels(run, inside, levels), entry)
        if floating and rule in _THROUGH and least < 32:
            group = self.widths.group(layout, least)

            def encode(run: Tensor) -> Code:
                code = quantize(run, least, key=self.forms.next_key(), group_size=group, through=_THROUGH[rule])
                return LogarithmCode(code) if rule is LOGARITHM else code

            return self.forms.levels(tensor, layout, (rule, least), encode, entry)
        if floating and rule is SIGN:
            return self.forms.levels(tensor, layout, "sign", encode_signs, entry)
        return self.forms.value(tensor, least, entry, factor_of)
