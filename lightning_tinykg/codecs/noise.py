"""Private, counter-based noise: a hash of (key, position), never a generator with a state.

Stochastic rounding needs one uniform number per element. Drawn from PyTorch's generator it would move the user's
dropout masks, would differ between backends and could not be repeated after a resume. Here number ``i`` of a tensor
is a pure function of ``i`` and of a 64-bit key, which is itself mixed from the seed, the rank, the step and the
tensor's place in the step.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1


def make_key(*parts: int) -> int:
    """Mix integers (seed, rank, step, ...) into a 64-bit key, by the splitmix64 finaliser (Steele et al., 2014).

    Keys are mixed before use, never added to a position: with an added seed, two consecutive seeds would share
    shifted noise.

    Example:
        >>> make_key(0, 1) != make_key(1, 0)
        True
    """
    key = 0
    for part in parts:
        key = (key + (part & _MASK64) + 0x9E3779B97F4A7C15) & _MASK64
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & _MASK64
        key ^= key >> 31
    return key


def _signed(word: int) -> int:
    """The 32-bit word as the int32 with the same bits."""
    return word - (1 << 32) if word >= 1 << 31 else word


def uniform(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """The uniform numbers of positions ``start`` to ``start + count - 1``.

    The hash is the finaliser of MurmurHash3 (Appleby) over the position, with the key's two words injected before
    the first and the second multiplication; the top 24 bits make the number, so it is below 1 in float32.

    Args:
        key: 64 bits, from :func:`make_key`.
        start: the first position.
        count: how many numbers.
        device: where to make them.

    Returns:
        float32, shape ``[count]``, values in ``[0, 1)``.

    Example:
        >>> whole = uniform(7, 0, 100, torch.device("cpu"))
        >>> torch.equal(whole[40:], uniform(7, 40, 60, torch.device("cpu")))
        True
    """
    block, start = divmod(start, 1 << 31)
    if (within := (1 << 31) - start) < count:
        first = uniform(key, (block << 31) + start, within, device)
        return torch.cat([first, uniform(key, (block + 1) << 31, count - within, device)])
    if block:  # positions beyond 2**31 continue under a key of their own
        key = make_key(key, block)
    low, high = _signed(key & 0xFFFFFFFF), _signed(key >> 32)
    word = torch.arange(start, start + count, dtype=torch.int32, device=device)
    shifted = torch.empty_like(word)

    def xor_shift(bits: int) -> None:
        # int32 shifts arithmetically; the mask makes it the logical shift of the definition
        torch.bitwise_right_shift(word, bits, out=shifted)
        shifted.bitwise_and_((1 << (32 - bits)) - 1)
        word.bitwise_xor_(shifted)

    word.bitwise_xor_(low)
    xor_shift(16)
    word.mul_(_signed(0x85EBCA6B))
    word.bitwise_xor_(high)
    xor_shift(13)
    word.mul_(_signed(0xC2B2AE35))
    xor_shift(16)
    torch.bitwise_right_shift(word, 8, out=shifted)
    shifted.bitwise_and_((1 << 24) - 1)
    return shifted.to(torch.float32).mul_(2.0**-24)
