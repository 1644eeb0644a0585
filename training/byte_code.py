"""A projected gradient in one byte, and the integer by which it moves a parameter.

Owns the byte of one-byte mode (docs/PROTOCOL.md, "The byte"): bit 7 is the sign, the low 7 bits q are the size,

    |p| = clip * 2^((q - 127) / 16)   for q = 1 .. 127,   0 for q = 0:

eight octaves in steps of 4.4 %, so that rounding to the nearest is at most 2.2 % off. Decoding is arithmetic of whole
numbers and a table that is part of the protocol: no logarithm and no float is asked what a byte means, and every
machine moves a parameter by the same integer. Encoding may use both, since only its author encodes a record.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

STEPS_PER_OCTAVE = 16
SIZE_MAX = 127
SIGN_BIT = 0x80

SIZE_FRACTION_BITS = 30
"""A size of the table, relative to the clip, is in units of 2^-30."""

RATE_FRACTION_BITS = 64
"""A step size times the clip is in units of 2^-64."""

ByteTable = Literal["log", "sign"]
"""``log``: as above. ``sign``: every size but 0 is the clip, so that only the sign is learned from."""


def _power_of_two(numerator: int, denominator: int) -> int:
    """2^(numerator / denominator), rounded to the nearest integer; ``denominator`` is a power of two."""
    guard_bits = 16
    value = 1 << (numerator + guard_bits * denominator)
    while denominator > 1:  # the integer square root of an integer square root is the integer fourth root
        value = math.isqrt(value)
        denominator //= 2
    return (value + (1 << (guard_bits - 1))) >> guard_bits


_LOG_SIZES = (
    0,
    *(
        _power_of_two(SIZE_FRACTION_BITS * STEPS_PER_OCTAVE + q - SIZE_MAX, STEPS_PER_OCTAVE)
        for q in range(1, SIZE_MAX + 1)
    ),
)

SIZES: dict[ByteTable, Sequence[int]] = {
    "log": _LOG_SIZES,
    "sign": (0, *[1 << SIZE_FRACTION_BITS] * SIZE_MAX),
}
"""The size of each q, relative to the clip, in units of 2^-30."""


def encode(gradient: float, clip: float, table: ByteTable = "log") -> int:
    """The byte of a projected gradient. What is not a number becomes 0; what is larger than ``clip`` becomes it."""
    size = abs(gradient) / clip
    if not size > 0:
        return 0
    sign = SIGN_BIT if gradient < 0 else 0
    if table == "sign" or size >= 1:
        return sign | SIZE_MAX
    q = SIZE_MAX + round(STEPS_PER_OCTAVE * math.log2(size))
    return sign | q if q > 0 else 0


def decode(byte: int, clip: float, table: ByteTable = "log") -> float:
    """The projected gradient that ``byte`` stands for: to look at, never to move a parameter by."""
    size = math.ldexp(SIZES[table][byte & SIZE_MAX], -SIZE_FRACTION_BITS) * clip
    return -size if byte & SIGN_BIT else size


def rate_units(step_size: float, clip: float) -> int:
    """``step_size * clip`` as the whole number that coefficients are made from."""
    return round(math.ldexp(step_size * clip, RATE_FRACTION_BITS))


def coefficient(byte: int, rate: int, exponent: int, table: ByteTable = "log") -> int:
    """By how much ``byte`` moves a parameter of sign +1, in units of 2^-exponent: descent, so against its own sign.

    ``rate`` comes from ``rate_units``; 0 <= ``exponent`` <= 62. Rounded to the nearest, halves away from zero.
    """
    shift = SIZE_FRACTION_BITS + RATE_FRACTION_BITS - exponent
    size = (SIZES[table][byte & SIZE_MAX] * rate + (1 << (shift - 1))) >> shift
    return size if byte & SIGN_BIT else -size
