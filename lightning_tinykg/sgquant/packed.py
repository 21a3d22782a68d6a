"""Node features and edge coefficients, really packed: a tensor whose rows are decoded where they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_tinykg.codecs.rows import PackedRows, row_chunks
from lightning_tinykg.sgquant.order import RowOrder
from lightning_tinykg.sgquant.quantize import Level
from lightning_tinykg.sgquant.receivers import EdgesByReceiver
from lightning_tinykg.sgquant.runs import RunWriter
from lightning_tinykg.sgquant.shares import Shares

__all__ = ["PackedFeatures"]


class PackedFeatures(torch.Tensor):
    """A float32 tensor `[n, ...]` whose rows are stored as codes, those of each degree bucket in their own width.

    For whoever uses it, it is a float32 tensor of its shape. Matrix products with it on the left (a Linear on node
    features) decode some rows at a time, and picking rows (an index, a slice, an embedding look-up) decodes those rows.
    Any other operation decodes all of it, which is where rows of different widths meet ("re-matching"), and goes on
    with an ordinary tensor. An operation in place makes floats of it, which this tensor holds from then on. A view
    (`view`, `t`, a slice) is a decoded copy: what is written there is not seen here.

    What it decodes to is what `fake_quantize` gives for the same levels, to the last bit. For inference only: it can't
    require a gradient.

    Args:
        parts: The rows of each bucket.
        order: Which row is where; `None` if there is one part, in the order of the rows.
        row_shape: The shape of a row; `None`: `[d]`.
        run: How many rows lie in one row of a part. Rows of a few elements, such as the attention of an edge, fill
            whole bytes together only; they are made, and decoded, in their order.
        rows: How many there are; needed if there are runs and no order.
        shares: Of rows that are edges: which parts are stored as multiples of a share.

    Raises:
        ValueError: If parts, order and shape do not belong together.

    Example:
        >>> x = torch.tensor([[0.0, 3.0], [1.0, 2.0], [0.2, 0.7]])
        >>> order = RowOrder.of_buckets(torch.tensor([0, 0, 1]), buckets=2)
        >>> packed = PackedFeatures.encode(x, [Level(2, 0.0, 3.0), Level(32)], order)
        >>> packed
        PackedFeatures([3, 2], bits 2 and 32, 18 bytes)
        >>> packed[2], packed @ torch.ones(2, 1)
        (tensor([0.2000, 0.7000]), tensor([[3.0000],
                [3.0000],
                [0.9000]]))
    """

    parts: tuple[PackedRows, ...]
    order: RowOrder | None
    row_shape: tuple[int, ...]
    run: int
    shares: Shares | None

    @staticmethod
    def __new__(
        cls,
        parts: Sequence[PackedRows],
        order: RowOrder | None = None,
        row_shape: Sequence[int] | None = None,
        run: int = 1,
        rows: int | None = None,
        shares: Shares | None = None,
    ) -> PackedFeatures:
        """Wrap the parts, as a tensor without a storage."""
        if not parts:
            raise ValueError("parts must be at least one, got none")
        if order is None and len(parts) > 1:
            raise ValueError(f"order must be given for {len(parts)} parts, got None")
        row_shape = tuple(row_shape) if row_shape is not None else (parts[0].dim // run,)
        counts = order.counts if order is not None else (parts[0].rows if rows is None else rows,)
        wanted = [(-(-count // run), prod(row_shape) * run) for count in counts]
        if wanted != [(part.rows, part.dim) for part in parts]:
            raise ValueError(f"parts must be of {wanted} rows and elements, got {list(parts)}")
        made: PackedFeatures = torch.Tensor._make_wrapper_subclass(
            cls, (sum(counts), *row_shape), dtype=torch.float32, device=parts[0].device
        )
        made.parts, made.order, made.row_shape, made.run, made.shares = tuple(parts), order, row_shape, run, shares
        return made

    @classmethod
    def empty(
        cls,
        shape: Sequence[int],
        levels: Sequence[Level],
        order: RowOrder | None = None,
        device: torch.device | str = "cpu",
        run: int = 1,
        edges: EdgesByReceiver | None = None,
    ) -> PackedFeatures:
        """Room for rows, to be filled by `store`, such as those of a file that is read in pieces.

        Args:
            shape: `[n, ...]`.
            levels: Of each part of the order.
            order: Which row is where; `None`: one part.
            device: Where.
            run: See the class; such rows are filled by a `RunWriter`.
            edges: The edges that the rows are of; needed if a level has a share, not used otherwise.

        Raises:
            ValueError: If the levels do not fit.
        """
        row_shape, device = tuple(shape[1:]), torch.device(device)
        counts = order.counts if order is not None else (shape[0],)
        if len(counts) != len(levels) or sum(counts) != shape[0]:
            raise ValueError(f"levels and order must be of {shape[0]} rows, got {len(levels)} levels for {counts}")
        dim = prod(row_shape) * run
        shares = None
        if any(level.share for level in levels):
            if edges is None:
                raise ValueError("edges must be given for levels with a share, got None")
            shares = Shares.of(tuple(level.share for level in levels), edges)
        parts = [_room(level, -(-count // run), dim, device) for level, count in zip(levels, counts, strict=True)]
        return cls(parts, order, row_shape, run, shape[0], shares)

    @classmethod
    def encode(
        cls,
        x: Tensor,
        levels: Sequence[Level],
        order: RowOrder | None = None,
        run: int = 1,
        edges: EdgesByReceiver | None = None,
    ) -> PackedFeatures:
        """The codes of a tensor, some rows at a time: nothing as large as `x` is made."""
        packed = cls.empty(x.shape, levels, order, x.device, run, edges)
        writer = RunWriter(packed, levels) if run > 1 else None
        by_slot = order is not None and (order.row is not None or run > 1)
        for part in row_chunks(x.size(0), prod(packed.row_shape), x.device):
            rows = x.index_select(0, order.rows(part)) if by_slot and order is not None else x[part]
            if writer is not None:
                writer.write(rows)
            elif by_slot:
                packed.store_slots(part, rows, levels)
            else:
                packed.store(part, rows, levels)
        return packed

    def store(self, rows: slice | Tensor, x: Tensor, levels: Sequence[Level]) -> None:
        """Encode these rows.

        Args:
            rows: Which, int32 or int64 `[k]` or a slice with step 1.
            x: Float `[k, ...]`.
            levels: What `empty` was given.
        """
        self.store_slots(rows if self.order is None else self.order.slots(rows), x, levels)

    @torch.no_grad()
    def store_slots(self, slots: slice | Tensor, x: Tensor, levels: Sequence[Level]) -> None:
        """Encode the rows that are stored in these slots; as `store`."""
        if self.run > 1:
            raise ValueError(f"rows in runs of {self.run} must be filled by a RunWriter, in order")
        flat, divisor = x.reshape(x.size(0), self.parts[0].dim), self.divisors(slots)
        flat = flat if divisor is None else flat * divisor
        for number, which, own in self.slots_by_part(slots):
            own_rows = flat if which is None else flat[which]
            scales = levels[number].scale_and_zero(own_rows.float()) if levels[number].per_row else (None, None)
            self.parts[number].put(own, own_rows, *scales)

    @torch.no_grad()
    def decode(self, rows: Tensor | slice | None = None) -> Tensor:
        """The values of some rows, or of all, as an ordinary tensor: float32 `[k, ...]`."""
        if self.order is None:
            return self.decode_slots(slice(None) if rows is None else rows)
        if rows is None and self.order.row is not None:  # by slot: the slots of rows would have to be made
            out = torch.empty(self.shape, dtype=torch.float32, device=self.device)
            for part in row_chunks(self.size(0), prod(self.row_shape), self.device):
                out[self.order.row[part]] = self.decode_slots(part)
            return out
        return self.decode_slots(self.order.slots(slice(None) if rows is None else rows))

    @torch.no_grad()
    def decode_slots(self, slots: Tensor | slice) -> Tensor:
        """The values of the rows in these slots, `[k, ...]`."""
        if isinstance(slots, slice):
            slots = slice(*slots.indices(self.size(0)))
        elif self.run > 1:
            return self.decode_slots(slice(None)).index_select(0, slots)
        count = slots.numel() if isinstance(slots, Tensor) else max(slots.stop - slots.start, 0)
        out = torch.empty(count, prod(self.row_shape), dtype=torch.float32, device=self.device)
        for number, which, own in self.slots_by_part(slots):
            part = self.parts[number]
            if self.run > 1 and isinstance(own, slice):
                first = own.start // self.run
                values = part.decode(slice(first, -(-own.stop // self.run))).view(-1, out.size(1))
                target = out if which is None else out[which]
                target.copy_(values[own.start - first * self.run : own.stop - first * self.run])
            elif which is None or isinstance(which, slice):
                part.decode(own, out if which is None else out[which])
            else:
                out[which] = part.decode(own)
        if (divisor := self.divisors(slots)) is not None:
            out.div_(divisor)
        return out.view(count, *self.row_shape)

    def divisors(self, slots: Tensor | slice) -> Tensor | None:
        """What is read in each slot is divided by, and what is stored multiplied: float32 `[k, 1]`; `None`: by nothing.

        Of shares what `Shares.divisors` gives, of other rows 1, which changes no bit.
        """
        if self.shares is None:
            return None
        if isinstance(slots, slice):
            slots = slice(*slots.indices(self.size(0)))
            divisor = self.shares.divisors(torch.arange(slots.start, slots.stop, device=self.device))
        else:
            divisor = self.shares.divisors(slots)
        for number, which, _ in self.slots_by_part(slots):
            if not self.shares.parts[number]:
                divisor[slice(None) if which is None else which] = 1
        return divisor[:, None]

    def slots_by_part(self, slots: Tensor | slice) -> Iterator[tuple[int, Tensor | slice | None, Tensor | slice]]:
        """Cut slots by part: its number, which of them are its (`None`: all), and which of its own slots these are."""
        if len(self.parts) == 1:
            yield 0, None, slots
            return
        assert self.order is not None
        for number, start in enumerate(self.order.starts[:-1]):
            stop = self.order.starts[number + 1]
            if isinstance(slots, slice):
                first, last = max(start, slots.start or 0), min(stop, slots.stop)
                if first < last:
                    asked = slots.start or 0
                    yield number, slice(first - asked, last - asked), slice(first - start, last - start)
            elif start < stop:
                # its size is not known before: on a GPU this waits for it, once for each width
                which = ((slots >= start) & (slots < stop)).nonzero().squeeze(1)
                yield number, which, slots.index_select(0, which) - start

    @property
    def nbytes(self) -> int:  # type: ignore[override]  # read-only in PyTorch too, but its stubs do not say so
        """Bytes of codes, scales and zeros. The order, common to all that is stored in it, is not counted."""
        return sum(part.nbytes for part in self.parts)

    def parts_to(self, device: torch.device | str) -> PackedFeatures:
        """The same codes on a device."""
        order = self.order.to(device) if self.order is not None else None
        shares = self.shares.to(device) if self.shares is not None else None
        parts = [part.to(device) for part in self.parts]
        return PackedFeatures(parts, order, self.row_shape, self.run, self.size(0), shares)

    def alias(self) -> PackedFeatures:
        """The same codes in another tensor."""
        return PackedFeatures(self.parts, self.order, self.row_shape, self.run, self.size(0), self.shares)

    # -- as a tensor -------------------------------------------------------------------------------------------------

    # an operation's results are ordinary tensors
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as PyTorch's own classes

    _ops: ClassVar[dict[Any, Callable[..., Any]]] = {}
    """By operation: what is done without decoding all; it may answer `NotImplemented`."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # a class method, as PyTorch wants it; its stubs do not
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """What an operation gives: see the class."""
        kwargs = kwargs or {}
        if func in cls._ops:
            out = cls._ops[func](*args, **kwargs)
            if out is not NotImplemented:
                return out
        decoded: dict[int, Tensor] = {}
        back: dict[int, PackedFeatures] = {}

        def ordinary(value: Any) -> Any:
            if not isinstance(value, PackedFeatures):
                return value
            if id(value) not in decoded:
                decoded[id(value)] = value.decode()
                back[id(decoded[id(value)])] = value
            return decoded[id(value)]

        out = func(*tree_map(ordinary, args), **tree_map(ordinary, kwargs))
        if not func._schema.is_mutable:
            return out
        names = [argument.name for argument in func._schema.arguments]
        for argument, value in [*zip(names, args, strict=False), *kwargs.items()]:
            written = next(one for one in func._schema.arguments if one.name == argument).alias_info
            if isinstance(value, PackedFeatures) and written is not None and written.is_write:
                value._hold(decoded[id(value)])
        return tree_map(lambda value: back.get(id(value), value), out)

    def _hold(self, x: Tensor) -> None:
        """Hold these values, as they are, from now on."""
        nothing = torch.empty(0, dtype=torch.float32, device=x.device)
        self.parts = (PackedRows([x.reshape(x.size(0), -1)], nothing, nothing, 32, prod(self.row_shape)),)
        self.order, self.run, self.shares = None, 1, None

    def requires_grad_(self, requires_grad: bool = True) -> PackedFeatures:
        """Refused: codes have no gradient."""
        if requires_grad:
            _refuse()
        return self

    @property
    def requires_grad(self) -> bool:
        """Never."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def tolist(self) -> list[Any]:
        """The values in lists."""
        values: list[Any] = self.decode().tolist()
        return values

    def numpy(self, *, force: bool = False) -> Any:
        """The values in an array."""
        return self.decode().numpy(force=force)

    def __setitem__(self, index: Any, value: Any) -> None:
        floats = self.decode()
        floats[index] = value
        self._hold(floats)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # as in Tensor
        bits = " and ".join(str(bits) for bits in sorted({part.bits for part in self.parts}))
        return f"PackedFeatures({list(self.shape)}, bits {bits}, {self.nbytes:,} bytes)"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return PackedFeatures, (self.parts, self.order, self.row_shape, self.run, self.size(0), self.shares)


def _room(level: Level, rows: int, dim: int, device: torch.device) -> PackedRows:
    if level.per_row or level.bits == 32:
        return PackedRows.empty(rows, dim, level.bits, device=device)
    scale, zero = level.scale_and_zero(torch.empty(0, dim, dtype=torch.float32, device=device))
    return PackedRows.empty(rows, dim, level.bits, scale, zero, device)


def _refuse() -> NoReturn:
    raise RuntimeError("PackedFeatures can't require a gradient: codes are for inference; train on x.decode()")


# the operations register themselves with the class
from lightning_tinykg.sgquant import packed_ops  # noqa: E402, F401  # registers the operators
