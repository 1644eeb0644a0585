"""Quantised values, in blocks that share a scale: int8, and E3M0 in four bits.

Owns two forms of the same layout: the scales of all blocks, fp32, then the codes. A block's scale is taken from its
largest value, so one large value coarsens no more than its block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.codecs.codec import bytes_of, check_finite, check_scales, check_size, in_blocks, tensor_of

_FP32_MAX = torch.finfo(torch.float32).max

_LARGEST = 127
"""Codes go from -127 to 127; -128 stands for nothing."""


def _blocks(count: int, block: int) -> int:
    return -(-count // block)


def _inverse(scales: Tensor) -> Tensor:
    """By what values are multiplied to come to codes: a block whose largest value is next to nothing becomes zeros."""
    inverse = 1 / scales
    return torch.where(torch.isfinite(inverse), inverse, 0.0)


@dataclass(frozen=True, slots=True)
class Int8:
    """Whole numbers from -127 to 127 times the block's step, a 127th of its largest magnitude.

    A value is off by at most half a step: 1/254 of the largest of its block (Dettmers et al., arXiv 2110.02861, there
    with other codes).
    """

    block: int = 1024
    lossless = False

    def size_bytes(self, count: int) -> int:
        """One for each value and four for each block."""
        return 4 * _blocks(count, self.block) + count

    def encode(self, values: Tensor, key: int = 0) -> bytes:
        """Rounded to nearest, ties to even. Raises NotFinite."""
        rows = in_blocks(values, self.block)
        steps = rows.abs().amax(1) / _LARGEST
        check_finite(steps)
        codes = (rows * _inverse(steps)[:, None]).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8)
        return bytes_of(steps) + bytes_of(codes.flatten()[: len(values)])

    def decode(self, data: bytes | memoryview, count: int, key: int = 0) -> Tensor:
        """Raises ValueError for another length, and for steps that no values have."""
        check_size(self, data, count)
        at = 4 * _blocks(count, self.block)
        steps, codes = tensor_of(data[:at], torch.float32), tensor_of(data[at:], torch.int8)
        check_scales(steps, _FP32_MAX / _LARGEST)
        if count and int(codes.amin()) < -_LARGEST:
            raise ValueError("a code that stands for nothing")
        rows = in_blocks(codes.to(torch.float32), self.block)
        return rows.mul_(steps[:, None]).flatten()[:count]


@dataclass(frozen=True, slots=True)
class E3M0:
    """A sign and a power of two in four bits: 0, or the block's largest magnitude times 1, 1/2 .. 1/64.

    Rounded to the nearest power of two, up from half way; what comes to less than 1/64 so is 0 (the format of Streaming
    DiLoCo, arXiv 2501.18512, which does not say how it rounds). The low half of a byte is the earlier value.
    """

    block: int = 256
    lossless = False

    def size_bytes(self, count: int) -> int:
        """Half of one for each value and four for each block."""
        return 4 * _blocks(count, self.block) + -(-count // 2)

    def encode(self, values: Tensor, key: int = 0) -> bytes:
        """Raises NotFinite."""
        rows = in_blocks(values, self.block)
        scales = rows.abs().amax(1)
        check_finite(scales)
        inverse = _inverse(scales)[:, None]
        packed = torch.empty(len(rows), self.block // 2, dtype=torch.uint8)
        for at in range(0, len(rows), _ROWS):
            bits = (rows[at : at + _ROWS] * inverse[at : at + _ROWS]).view(torch.int32)
            # Half of the mantissa's range is added, so that the exponent is that of the nearest power of two.
            powers = (bits & 0x7FFFFFFF).add_(1 << 22).bitwise_right_shift_(23).sub_(127 - 7).clamp_(0, 7)
            codes = powers.bitwise_or_((bits >> 28).bitwise_and_(8)).to(torch.uint8)
            torch.bitwise_or(codes[:, 0::2], codes[:, 1::2] << 4, out=packed[at : at + _ROWS])
        return bytes_of(scales) + bytes_of(packed.flatten()[: -(-len(values) // 2)])

    def decode(self, data: bytes | memoryview, count: int, key: int = 0) -> Tensor:
        """Raises ValueError for another length, and for scales that no values have."""
        check_size(self, data, count)
        at = 4 * _blocks(count, self.block)
        scales, packed = tensor_of(data[:at], torch.float32), tensor_of(data[at:], torch.uint8)
        check_scales(scales, _FP32_MAX)
        pairs = in_blocks(packed, self.block // 2)
        values = torch.empty(len(scales), self.block)
        for at in range(0, len(scales), _ROWS):
            rows = values[at : at + _ROWS]
            # Two values at a time, moved as one number of twice the size that nobody looks at.
            codes = pairs[at : at + _ROWS].flatten().int()
            torch.index_select(_PAIRS, 0, codes, out=rows.view(torch.float64).view(-1))
            rows.mul_(scales[at : at + _ROWS, None])
        return values.flatten()[:count]


_ROWS = 512
"""Blocks worked on at a time, so that what is in between stays in the cache."""

_LEVELS = torch.tensor([0.0, *(2.0**-power for power in range(6, -1, -1))])
_VALUES = torch.cat([_LEVELS, -_LEVELS])
_PAIRS = torch.stack([_VALUES.repeat(16), _VALUES.repeat_interleave(16)], dim=1).view(torch.float64).flatten()
"""By byte: its two values, as the bits of one double."""
