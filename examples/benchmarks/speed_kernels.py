"""Codecs against a copy: each set of kernels that runs on the device, and the 8-bit quantizers of other libraries.

The floor is copying the tensor into existing memory. The others' quantizers round to the nearest level and draw no
noise: they have less to do than this package's.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from speed_clock import Clock, against, interleaved
from torch import Tensor

from lightning_tinykg.activations.rules import RELU
from lightning_tinykg.codecs import dequantize, quantize
from lightning_tinykg.codecs.kernels import kernels_for, use
from lightning_tinykg.codecs.lossless import encode_bool, encode_levels, encode_signs, encode_two_levels

KEY = 0x9E3779B97F4A7C15
"""Of the noise."""

OPERATIONS = {"pack": "pack", "unpack": "unpack, fresh memory", "unpack_into": "unpack, existing memory"}
"""What is timed of each codec."""


@dataclass(frozen=True)
class Codec:
    """A way to keep a tensor.

    Attributes:
        name: what is kept of it.
        by: whose kernels.
        tensor: the tensor.
        pack: makes the code.
        unpack: restores the tensor from the code in fresh memory.
        unpack_into: the same into existing memory, if it can.
        nbytes: the bytes of a code.
        context: in which it runs.
        rounds: whether it is to restore the tensor, but for rounding.
    """

    name: str
    by: str
    tensor: Tensor
    pack: Callable[[Tensor], Any]
    unpack: Callable[[Any], Tensor]
    nbytes: Callable[[Any], int]
    unpack_into: Callable[[Any, Tensor], Tensor] | None = None
    context: Callable[[], AbstractContextManager[None]] = field(default=nullcontext)
    rounds: bool = True


def ours(x: Tensor, by: str, group_size: int) -> list[Codec]:
    """This package's codecs, by one of its sets of kernels."""

    def unpack_into(code: Any, out: Tensor) -> Tensor:
        return dequantize(code, out=out.view(-1))

    context = partial(use, by)
    rounding = [
        Codec(
            f"{bits} bit{'s' if bits > 1 else ''}",
            by,
            x,
            partial(quantize, bits=bits, key=KEY, group_size=group_size),
            dequantize,
            lambda code: int(code.nbytes),
            unpack_into,
            context,
        )
        for bits in (8, 4, 2, 1)
    ]

    def put_into(code: Any, out: Tensor) -> Tensor:
        restored: Tensor = code.decode(lambda numel, **_: out.view(-1)[:numel])
        return restored

    def decode(code: Any) -> Tensor:
        restored: Tensor = code.decode()
        return restored

    side = partial(encode_levels, cut=RELU.inside, levels=RELU.levels)
    kept = torch.where(torch.rand_like(x) < 0.8, 1.25, 0.0)
    masks = [
        Codec(name, by, t, encode, decode, lambda code: int(code.nbytes), put_into, context, False)
        for name, t, encode in (
            ("mask of bools", x > 0, encode_bool),
            ("side of ReLU", x, side),
            ("side of ReLU, bfloat16", x.bfloat16(), side),
            ("signs", x, encode_signs),
            ("signs, bfloat16", x.bfloat16(), encode_signs),
            ("mask of dropout", kept, encode_two_levels),
        )
    ]
    return [*rounding, *masks]


def bitsandbytes(x: Tensor, group_size: int) -> Codec:
    """8 bits of a dynamic code book, a scale to a block."""
    functional = importlib.import_module("bitsandbytes.functional")

    def unpack(code: Any) -> Tensor:
        restored: Tensor = functional.dequantize_blockwise(*code, blocksize=group_size)
        return restored

    return Codec(
        "8 bits",
        f"bitsandbytes {version('bitsandbytes')}",
        x,
        partial(functional.quantize_blockwise, blocksize=group_size),
        unpack,
        lambda code: int(code[0].nbytes + code[1].absmax.nbytes),
    )


def torchao(x: Tensor, group_size: int) -> Codec:
    """8 bits, a scale and a zero point to a group."""
    ao = importlib.import_module("torchao.quantization")
    block = (1, group_size)

    def pack(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = x.view(-1, group_size)
        scale, zero = ao.choose_qparams_affine(rows, ao.MappingType.ASYMMETRIC, block, torch.uint8)
        return ao.quantize_affine(rows, block, scale, zero, torch.uint8), scale, zero

    def unpack(code: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        codes, scale, zero = code
        restored: Tensor = ao.dequantize_affine(codes, block, scale, zero, torch.uint8)
        return restored

    return Codec("8 bits", f"torchao {version('torchao')}", x, pack, unpack, lambda code: sum(t.nbytes for t in code))


def per_channel(x: Tensor, group_size: int) -> Codec:
    """8 bits, a scale and a zero point to a group; the range is looked up first, since that is part of the work."""

    def pack(x: Tensor) -> Tensor:
        rows = x.view(-1, group_size)
        low, high = torch.aminmax(rows, dim=1)
        low, high = low.clamp_(max=0), high.clamp_(min=0)  # its zero point is an integer: zero must be a level
        scale = ((high - low) / 255).clamp_(min=torch.finfo(torch.float32).tiny)
        zero = (-low / scale).round_().to(torch.int64)
        return torch.quantize_per_channel(rows, scale, zero, 0, torch.quint8)

    def nbytes(code: Tensor) -> int:
        return code.numel() + 16 * len(code)  # PyTorch keeps a scale and a zero point in 8 bytes each

    return Codec("8 bits", "quantize_per_channel", x, pack, Tensor.dequantize, nbytes)


def codecs(x: Tensor, group_size: int) -> tuple[list[Codec], list[str]]:
    """All that run here, and a word on each that does not."""
    found: list[Codec] = []
    notes: list[str] = []
    for name in ("triton" if x.is_cuda else "native", "reference"):
        with use(name):
            got = kernels_for(x.device).name
        if got == name:
            found += ours(x, name, group_size)
        else:
            notes.append(f"{name} kernels: skipped, they can't be had on this machine")
    for make in (bitsandbytes, torchao):
        if find_spec(make.__name__) is None:
            notes.append(f"{make.__name__}: skipped, it is not installed")
            continue
        found += attempt(make, x, group_size, notes)
    if hasattr(torch, "quantize_per_channel"):
        found += attempt(per_channel, x, group_size, notes)
    else:
        notes.append("torch.quantize_per_channel: skipped, this PyTorch has none")
    return found, notes


def attempt(make: Callable[[Tensor, int], Codec], x: Tensor, group_size: int, notes: list[str]) -> list[Codec]:
    """Another's codec, if it works on a small tensor; it may be installed and not run on this device."""
    logging.disable(logging.WARNING)  # both tell at import which of their GPU libraries they miss
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            codec = make(x, group_size)
            codec.unpack(codec.pack(x.view(-1, group_size)[:64].clone()))
    except Exception as error:
        notes.append(f"{make.__name__}: skipped, it does not run here: {str(error).splitlines()[0][:200]}")
        return []
    finally:
        logging.disable(logging.NOTSET)
    return [codec]


def measure(args: Namespace, done: Callable[[Any], Any], total: Callable[[int], Any]) -> dict[str, Any]:
    """Time all codecs on one tensor.

    Args:
        args: of the command line.
        done: called after each run.
        total: called with the number of runs, before the first.

    Returns:
        ``rows``: a dictionary per codec, with the raw seconds of each operation and its cost against the floor;
        ``notes``: what was skipped.
    """
    device = torch.device(args.device)
    torch.manual_seed(0)
    x = torch.randn(args.rows, args.width, device=device)
    clock = Clock(device, inner=10 if device.type == "cuda" else 1)
    found, notes = codecs(x, args.group_size)
    tensors = {codec.tensor.dtype: codec.tensor for codec in found}
    outs = {dtype: torch.empty_like(tensor) for dtype, tensor in tensors.items()}
    candidates: dict[tuple[str, str, str], Callable[[], dict[str, float]]] = {}
    rows: list[dict[str, Any]] = []
    row: dict[str, Any]

    def timed(function: Callable[[], Any]) -> dict[str, float]:
        return {"seconds": clock.timed(function)[1]}

    def add(row: dict[str, Any], tensor: Tensor, **operations: Callable[[], Any]) -> None:
        """A row, and what is to be timed for it."""
        rows.append(row | {"dtype": str(tensor.dtype), "raw_bytes": tensor.nbytes})
        for operation, function in operations.items():
            candidates[row["codec"], row["by"], operation] = partial(timed, function)

    def within(codec: Codec, function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        def run() -> Any:
            with codec.context():
                return function(*arguments)

        return run

    for dtype, tensor in tensors.items():
        name = f"copy of {str(dtype).removeprefix('torch.')}"
        copy = partial(outs[dtype].copy_, tensor)
        row = {"codec": name, "by": "torch", "bytes": tensor.nbytes, "error": None}
        add(row, tensor, unpack=tensor.clone, unpack_into=copy)
    for codec in found:
        code = within(codec, codec.pack, codec.tensor)()
        restored = within(codec, codec.unpack, code)().view(x.shape)
        error = float((restored - x).norm() / x.norm()) if codec.rounds else None
        del restored
        operations = {
            "pack": within(codec, codec.pack, codec.tensor),
            "unpack": within(codec, codec.unpack, code),
        }
        if codec.unpack_into is not None:
            operations["unpack_into"] = within(codec, codec.unpack_into, code, outs[codec.tensor.dtype])
        row = {"codec": codec.name, "by": codec.by, "bytes": codec.nbytes(code), "error": error}
        add(row, codec.tensor, **operations)
    total(len(candidates) * (args.repeats + 1))
    seconds = interleaved(candidates, args.repeats, done)

    floors = {row["dtype"]: seconds[row["codec"], "torch", "unpack_into"]["seconds"] for row in rows[: len(tensors)]}
    for row in rows:
        for operation in OPERATIONS:
            if (key := (row["codec"], row["by"], operation)) in seconds:
                cost = against(seconds[key]["seconds"], floors[row["dtype"]])
                share = (row["bytes"] + row["raw_bytes"]) / (2 * row["raw_bytes"])  # of the bytes that a copy moves
                row[operation] = cost | {
                    "seconds": seconds[key]["seconds"],
                    "gb_per_s": row["raw_bytes"] / cost["median"] / 1e9,
                    "of_copy_bandwidth": share / cost["ratio"],
                }
    return {"rows": rows, "notes": notes}
