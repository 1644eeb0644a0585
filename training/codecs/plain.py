"""Values as they are: fp32 bit for bit, or rounded to bf16 (to nearest, ties to even)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.codecs.codec import bytes_of, check_finite, check_size, tensor_of


@dataclass(frozen=True, slots=True)
class Plain:
    """Little-endian elements of one dtype and nothing else."""

    dtype: torch.dtype

    @property
    def lossless(self) -> bool:
        """Only fp32 is."""
        return self.dtype == torch.float32

    def size_bytes(self, count: int) -> int:
        """Four or two for each value."""
        return count * self.dtype.itemsize

    def encode(self, values: Tensor, key: int = 0) -> bytes:
        """Every value has a form, those that nobody will take among them."""
        return bytes_of(values.to(self.dtype))

    def decode(self, data: bytes | memoryview, count: int, key: int = 0) -> Tensor:
        """Raises ValueError for another length, NotFinite for a value that is not."""
        check_size(self, data, count)
        values = tensor_of(data, self.dtype).to(torch.float32)
        check_finite(values)
        return values


FP32 = Plain(torch.float32)
BF16 = Plain(torch.bfloat16)
