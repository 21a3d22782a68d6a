"""How many bits a saved tensor gets: at least what its backward needs, and more where more is cheap."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

from torch import Tensor

from lightning_tinykg.activations.rules import ANGLE, EXACT, LOGARITHM, NORM, SMOOTH, UNKNOWN, Need, Rule
from lightning_tinykg.activations.storages import Layout
from lightning_tinykg.bits.plan import BitPlan, Place, bits_now
from lightning_tinykg.codecs.affine import CODE_BITS, FINE_BITS, FLOAT_DTYPES, quantized_size

RAISED_BITS = {bits: 4 if bits < 3 else max(8, bits) for bits in CODE_BITS}
"""By width: the least width of what enters a backward non-linearly, and of coefficients."""

EXTRAS = {2: 100, 4: 100, 8: 100, FINE_BITS: 400}
"""By width: which part of the raw bytes all extras together may take, for one more tensor to have it: a hundredth."""

EXACTLY = 4000
"""Which part of the raw bytes fragile results may take, all together, to be kept exactly."""

NARROW = 16
"""A tensor whose last dimension is narrower than this holds coefficients, not features."""


def is_narrow(tensor: Tensor) -> bool:
    """Whether a tensor has only a few elements in a row."""
    return tensor.dim() < 2 or tensor.shape[-1] < NARROW


class StepSize(NamedTuple):
    """How large a step is: the larger of two is the one with more raw bytes."""

    raw_bytes: int = 0
    """Of all that the uncompressed graph would keep."""
    largest: int = 0
    """Bytes of its largest tensor."""


NO_STEP = StepSize()


class Widths:
    """The widths of one forward.

    Args:
        plan: what is asked for, by module, autograd node with attribute (``Mul.self``), and the how-manieth save of
            that module's node. A width of 32 keeps values exact. An entry that names the node is taken at its word;
            others, and the default, say how many bits features get, and what is more delicate gets more.
        group_size: elements that share a scale; None: by width.
        largest_step: the largest step before this one. Memory has to be there for it, so in a smaller step more is
            cheap.
    """

    def __init__(self, plan: BitPlan, group_size: int | None, largest_step: StepSize = NO_STEP) -> None:
        self.bits = bits_now(plan.default)
        self.place = Place("")
        self.literal = False
        self._plan = plan
        self._saves: Counter[tuple[str, str]] = Counter()
        self._group_size = group_size
        self._largest_step = largest_step
        self._extra = 0
        self._exactly = 0
        self.step = NO_STEP
        """This step, as far as it has come."""

    def turn_to(self, module: str, component: str) -> None:
        """What follows is about the next save of a module's node."""
        if not self._plan.entries:
            return
        self.place = Place(module, component, str(self._saves[module, component]))
        self._saves[module, component] += 1
        entry = self._plan.entry_for(self.place)
        self.bits = bits_now(entry.bits)
        self.literal = entry.component != "*"

    def turn_back(self, bits: int, literal: bool) -> None:
        """What follows is about a save of before, which was asked for so."""
        self.bits, self.literal = bits, literal

    def charge(self, raw_bytes: int) -> None:
        """Note a tensor that the uncompressed graph would keep."""
        self.step = StepSize(self.step.raw_bytes + raw_bytes, max(self.step.largest, raw_bytes))

    def least(self, tensor: Tensor, rule: Rule) -> int:
        """The least width for a tensor under a rule.

        What enters its backward non-linearly gets at least ``RAISED_BITS``, and so does what has only a few elements
        in a row: it holds coefficients (attention weights, scores, degrees), each of which multiplies a whole row of
        features, so its error counts for all of them while it takes a fraction of their memory. Of what is unknown
        nothing is risked: 8 bits; as many has the input of a norm, of which what follows is made.
        """
        if self.bits == 32 or rule is EXACT or not isinstance(rule, Need) or tensor.dtype not in FLOAT_DTYPES:
            return 32
        if self.literal:
            return self.bits
        if rule in (UNKNOWN, NORM):
            return 8
        return self.raised(self.bits) if rule in (SMOOTH, ANGLE, LOGARITHM) or is_narrow(tensor) else self.bits

    def judged(self, least: int) -> int:
        """The width that a form is chosen by: in a plan of saves one for all, or its bytes would not be as reckoned."""
        return 8 if self.literal and least < 32 else least

    def raised(self, least: int) -> int:
        """The width for what asks for more than ``least``, since its error does not average out."""
        return least if self.literal else max(least, RAISED_BITS.get(self.bits, 32))

    def better(self, layout: Layout, itemsize: int, least: int) -> int:
        """The width for a run of elements of ``itemsize`` bytes each: at least ``least``, more where more is cheap.

        A tensor that is small beside the step's largest gets a bit more each time its size halves, as long as all
        such extras together stay below a hundredth of the raw bytes, or a 400th for 12 bits. The score head is small
        and on every path of the gradient: this is what keeps its error from all the rest. Item vectors, whose scores
        are subtracted from one another, are small too. In a step that is smaller than one before it, such as that of
        KGAT's triples, all is small.
        """
        if self.literal:
            return least
        raw_bytes, largest = self._largest
        wish = self.bits + math.log2(max(largest / max(layout.numel * itemsize, 1), 1.0))
        better = min(EXTRAS, key=lambda width: abs(width - wish))
        for width in reversed(EXTRAS):
            if least < width <= better and self._with(layout, width, least) <= raw_bytes // EXTRAS[width]:
                return width
        return least

    def spend(self, layout: Layout, bits: int, least: int) -> None:
        """A run is kept in ``bits`` bits where ``least`` would do."""
        self._extra = self._with(layout, bits, least)

    def affords_exactly(self, tensor: Tensor) -> bool:
        """Whether a fragile result is so small that it is kept exactly, whatever it is given to; counts it if it is.

        A step's scores are: ``sigmoid(scores)`` may be weighted before its logarithm is taken, which nobody sees.
        """
        if self.bits == 32 or self.literal or tensor.dtype not in FLOAT_DTYPES:
            return False
        if (self._exactly + tensor.nbytes) * EXACTLY > self._largest.raw_bytes:
            return False
        self._exactly += tensor.nbytes
        return True

    def group(self, layout: Layout, bits: int) -> int:
        """Elements that share a scale: smaller groups where there are few levels, and none across rows."""
        return layout.group(self._group_size or (32 if bits <= 2 else 64))

    def size(self, layout: Layout, bits: int) -> int:
        """The bytes of a run of elements in a width below 32."""
        return quantized_size(layout.numel, bits, self.group(layout, bits))

    @property
    def _largest(self) -> StepSize:
        """The largest step, this one among them."""
        return max(self.step, self._largest_step)

    def _with(self, layout: Layout, bits: int, least: int) -> int:
        return self._extra + self.size(layout, bits) - self.size(layout, least)
