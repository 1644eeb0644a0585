"""Flat tensors to the bytes of a shard and back.

Owns the wire forms: the raw little-endian elements, fp32 or bf16 (rounded to nearest, ties to even), and nothing
around them. What the numbers must satisfy is for ``training.mixing`` to check.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from training.spec_sections import Wire

ELEMENT_BYTES: dict[Wire, int] = {"fp32": 4, "bf16": 2}

_DTYPES: dict[Wire, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}

assert sys.byteorder == "little", "tensors are sent as they lie in memory, and the wire is little-endian"


def encode_values(values: Tensor, wire: Wire) -> bytes:
    """The wire bytes of a flat fp32 CPU tensor."""
    assert values.dtype == torch.float32
    assert values.dim() == 1
    return values.to(_DTYPES[wire]).contiguous().view(torch.uint8).numpy().tobytes()


def decode_values(data: bytes | memoryview, count: int, wire: Wire) -> Tensor:
    """``count`` fp32 values from wire bytes, in memory of their own. Raises ValueError for any other length."""
    expected = count * ELEMENT_BYTES[wire]
    if len(data) != expected:
        raise ValueError(f"{len(data)} bytes for {count} {wire} values, expected {expected}")
    return torch.frombuffer(bytearray(data), dtype=_DTYPES[wire]).to(torch.float32)
