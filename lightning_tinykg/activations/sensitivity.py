r"""How much rounding each saved tensor costs the gradient: measured, on the graph that is there.

The graph of one step holds its tensors at 8 bits. Its backward runs once as it is, and then three times for each
tensor (or group of tensors that share a place), with that tensor alone rounded to 1, 2 and 4 bits: what the gradient of
the parameters moves by is what that costs. Elsewhere the variance falls with the square of the number of levels,
:math:`\mathrm{Var}(b) = C / (2^b - 1)^2` (ActNN, Chen et al., ICML 2021). No forward is repeated, and nothing is kept
longer than the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from lightning_tinykg.activations.keeping import Record
from lightning_tinykg.activations.storages import Layout
from lightning_tinykg.bits.budget import Option
from lightning_tinykg.bits.plan import Place
from lightning_tinykg.codecs.affine import CODE_BITS, dequantize, quantize
from lightning_tinykg.codecs.noise import make_key

MEASURED_BITS = (1, 2, 4)
"""The widths that are tried: from 4 bits on a backward is as good as linear in the error, below it need not be."""


@dataclass
class Rounded:
    """A tensor that is rounded, while the graph that holds it is there.

    Attributes:
        record: its record.
        layout: how it lies.
        itemsize: bytes of an element.
        floor: the least width it may have.
        places: where it was saved, or made again from.
    """

    record: Record
    layout: Layout
    itemsize: int
    floor: int = 1
    places: set[Place] = field(default_factory=set)


@dataclass(frozen=True)
class Sensitive:
    """Tensors that can only have one width together, since they share a place, and what each width would cost.

    Attributes:
        places: where they were saved.
        options: widths, with bytes and variance.
    """

    places: frozenset[Place]
    options: tuple[Option, ...]


def measure(
    loss: Tensor,
    parameters: Iterable[Tensor],
    rounded: Sequence[Rounded],
    size: Callable[[Layout, int], int],
    group: Callable[[Layout, int], int],
    key: int,
) -> tuple[list[Sensitive], float]:
    """Measure what each width of each tensor costs the gradient.

    Args:
        loss: the step's loss, whose graph is compressed at 8 bits; it can be run backward afterwards.
        parameters: what the gradient is taken of.
        rounded: the tensors.
        size: bytes of a layout in a width.
        group: elements that share a scale, of a layout in a width.
        key: of the noise.

    Returns:
        Each group of tensors with its options, and the squared norm of the gradient.
    """
    leaves = [parameter for parameter in parameters if parameter.requires_grad]

    def gradient() -> list[Tensor | None]:
        return list(torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True))

    base = gradient()
    found = []
    for number, tensors in enumerate(_by_shared_places(rounded)):
        variance = {}
        for bits in MEASURED_BITS:
            for place, tensor in enumerate(tensors):
                width = group(tensor.layout, bits)
                noise = make_key(key, number, bits, place)
                tensor.record.degraded = partial(_rounded_again, bits=bits, key=noise, group_size=width)
            variance[bits] = _squared_distance(gradient(), base)
            for tensor in tensors:
                tensor.record.degraded = None
        floor = max(tensor.floor for tensor in tensors)
        places = frozenset(place for tensor in tensors for place in tensor.places)
        found.append(Sensitive(places, tuple(_options(tensors, variance, floor, size))))
    return found, sum(float(g.square().sum()) for g in base if g is not None)


def _options(
    tensors: Sequence[Rounded], variance: dict[int, float], floor: int, size: Callable[[Layout, int], int]
) -> Iterable[Option]:
    for bits in CODE_BITS:
        if bits >= floor:
            near = bits if bits in variance else 4
            nbytes = sum(size(tensor.layout, bits) for tensor in tensors)
            yield Option(bits, nbytes, variance[near] * ((2**near - 1) / (2**bits - 1)) ** 2)
    yield Option(32, sum(tensor.layout.numel * tensor.itemsize for tensor in tensors), 0.0)


def _by_shared_places(rounded: Sequence[Rounded]) -> list[list[Rounded]]:
    """Tensors together that share a place, directly or through others."""
    groups: list[tuple[set[Place], list[Rounded]]] = []
    for tensor in rounded:
        places, tensors = set(tensor.places), [tensor]
        apart = []
        for group in groups:
            if places & group[0]:
                places |= group[0]
                tensors = group[1] + tensors
            else:
                apart.append(group)
        groups = [*apart, (places, tensors)]
    return [tensors for _, tensors in groups]


def _rounded_again(run: Tensor, bits: int, key: int, group_size: int) -> Tensor:
    return dequantize(quantize(run, bits, key=key, group_size=group_size))


def _squared_distance(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> float:
    return sum(float((x - y).square().sum()) for x, y in zip(a, b, strict=True) if x is not None and y is not None)
