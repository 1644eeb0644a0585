"""What every codec is: a pure way from a flat tensor to bytes and back.

Owns the interface, and the checks that all codecs share. A codec has no state and no randomness of its own: what a
lossy one leaves out is kept by ``training.codecs.feedback``, at the sender.

What is decoded may come from anyone. Every codec bounds the bytes that it takes, which follow from the number of values
alone, refuses any other number, and gives finite values of bounded size or none. It runs on the CPU as separate
multiplications and additions, so that the same bytes come to the same bits everywhere.
"""

from __future__ import annotations

import sys
from typing import Protocol

import torch
from torch import Tensor

assert sys.byteorder == "little", "tensors are sent as they lie in memory, and the wire is little-endian"


class NotFinite(ValueError):
    """Values of which one is NaN or infinite."""


class Codec(Protocol):
    """One form of values on the wire."""

    @property
    def lossless(self) -> bool:
        """Whether what is decoded equals what was encoded, bit for bit."""

    def size_bytes(self, count: int) -> int:
        """The bytes that ``count`` values take: exactly these, whatever the values."""

    def encode(self, values: Tensor, key: int = 0) -> bytes:
        """The bytes of a flat fp32 CPU tensor. Raises NotFinite for a value that has no form.

        ``key``, a signed 64-bit integer, is what a codec that leaves values out at random draws from; the others take
        no notice of it.
        """

    def decode(self, data: bytes | memoryview, count: int, key: int = 0) -> Tensor:
        """``count`` finite fp32 values, in memory of their own. Raises ValueError for what no encoder makes of such."""


def check_finite(values: Tensor) -> None:
    """Raise NotFinite if one of them is NaN or infinite."""
    # The extremes are NaN where a value is, and infinite where the largest or smallest is.
    if len(values) and not bool(torch.isfinite(values.amax()) & torch.isfinite(values.amin())):
        raise NotFinite("a value is not finite")


def check_size(codec: Codec, data: bytes | memoryview, count: int) -> None:
    """Raise ValueError unless ``data`` has the length of ``count`` values."""
    expected = codec.size_bytes(count)
    if len(data) != expected:
        raise ValueError(f"{len(data)} bytes for {count} values, expected {expected}")


def check_scales(scales: Tensor, largest: float) -> None:
    """Raise ValueError unless all are between 0 and ``largest``: NaN and infinity are not."""
    if not bool(((scales >= 0) & (scales <= largest)).all()):
        raise ValueError("a scale is negative, too large or not a number")


def bytes_of(tensor: Tensor) -> bytes:
    """The memory of a tensor."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def tensor_of(data: bytes | memoryview, dtype: torch.dtype) -> Tensor:
    """A flat tensor of the elements in ``data``, in memory of its own."""
    return torch.frombuffer(bytearray(data), dtype=dtype) if len(data) else torch.empty(0, dtype=dtype)


def in_blocks(values: Tensor, block: int) -> Tensor:
    """``values`` as rows of ``block``, (blocks, block), the last one filled up with zeros; a view where it is full."""
    missing = -len(values) % block
    if missing:
        values = torch.nn.functional.pad(values, (0, missing))
    return values.view(-1, block)
