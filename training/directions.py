"""Random directions that every peer regenerates from a key: one sign, +1 or -1, for each parameter.

Owns the generator of one-byte mode (docs/PROTOCOL.md, "Directions"): SplitMix64 (Steele, Lea, Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014): a Weyl sequence through a 64-bit finalizer, here Stafford's mix 13. Start
and step of the sequence both come from the key, so that no two directions run along the same stretch of one sequence.
Only additions, multiplications, shifts and masks of 64-bit integers: the same bits on every CPU and GPU. Any word is a
pure function of its key and number, so a slice of a direction needs nothing of the rest.

Never knows what a direction is used for, nor how parameters are numbered (``training.integer_state``).

Shape suffixes: R directions, W words, N = 64 W signs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from blake3 import blake3
from torch import Tensor

SIGNS_PER_WORD = 64

KEY_CONTEXT = "gossamer one-byte directions 1"
"""Domain of the keys: no other hash of the protocol can give one."""

Key = tuple[int, int]
"""Start and step of the sequence, as signed 64-bit integers; the step is odd."""


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)
_LOW_BIT_OF_BYTES = 0x0101010101010101


class KeySequence:
    """The keys of one log's directions. ``log`` is whatever names the log: its bytes are hashed with ``run``."""

    def __init__(self, run: bytes, log: bytes) -> None:
        """``run`` has 32 bytes, so that no two pairs of names run into one another."""
        self._key = blake3(run + log, derive_key_context=KEY_CONTEXT).digest()

    def key(self, number: int) -> Key:
        """The key of direction ``number``, below 2^64."""
        digest = blake3(number.to_bytes(8, "little"), key=self._key).digest(length=16)
        start, step = (int.from_bytes(half, "little", signed=True) for half in (digest[:8], digest[8:]))
        return start, step | 1


def direction_words(keys: Sequence[Key], first: int, count: int, device: torch.device) -> Tensor:
    """Words ``first`` to ``first + count`` of each direction: int64 (R, W). Word w holds signs 64 w to 64 w + 63."""
    starts, steps = torch.tensor(keys, dtype=torch.int64).view(-1, 2).to(device).unbind(1)
    z_RW = torch.arange(first + 1, first + count + 1, device=device) * steps[:, None] + starts[:, None]
    z_RW.bitwise_xor_(_shifted_right(z_RW, 30)).mul_(_MIX_1)
    z_RW.bitwise_xor_(_shifted_right(z_RW, 27)).mul_(_MIX_2)
    return z_RW.bitwise_xor_(_shifted_right(z_RW, 31))


def signs_of(words_RW: Tensor) -> Tensor:
    """The signs in words: int8 (R, 64 W), +1 where the bit is clear and -1 where it is set.

    Sign 8 i + j of a word is bit 8 j + i of it: so the signs come out of a few operations on whole words, eight in each
    result, and a little-endian machine has them in order.
    """
    shifts = torch.arange(8, device=words_RW.device)
    bits = (words_RW[..., None] >> shifts).bitwise_and_(_LOW_BIT_OF_BYTES)
    # Byte by byte, without a carry: 0 becomes 1, and 1 becomes 255, which is -1.
    return bits.mul_(0xFE).bitwise_xor_(_LOW_BIT_OF_BYTES).view(torch.int8).flatten(-2)


def _shifted_right(words: Tensor, bits: int) -> Tensor:
    """A logical shift: torch's own repeats the sign of a negative integer."""
    return (words >> bits).bitwise_and_((1 << (64 - bits)) - 1)
