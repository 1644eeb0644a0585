"""The exact arithmetic of a global merge: the same inputs give the same bits on every processor.

Owns the weighted average and the hash of weights. It uses only fp64 multiplications, additions and one division per
element, each a separate operation in the order of the inputs: fused forms (``alpha=``, ``lerp``, ``addcmul``) and
reductions round differently from one processor to the next.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from blake3 import blake3
from torch import Tensor

CHUNK = 1 << 15
"""Elements averaged at a time; two fp64 buffers of this many stay in a processor's cache."""

WEIGHT_SUM_MAX = 1 << 53
"""Integers up to here are exact in fp64."""


def weighted_average(inputs: Sequence[tuple[Tensor, int]]) -> Tensor:
    """sum(weight * values) / sum(weight), rounded once to fp32, for flat fp32 CPU tensors of one length.

    The inputs are added in the order given, which the caller makes canonical. A weight is a positive count, here of
    tokens since the parent merge. Raises ValueError without inputs, for unequal shapes or for weights out of range.
    """
    weight_sum = sum(weight for _, weight in inputs)
    if not inputs or min(weight for _, weight in inputs) < 1 or weight_sum > WEIGHT_SUM_MAX:
        raise ValueError("an average needs inputs, each with a positive weight, of at most 2^53 in all")
    if any(values.shape != inputs[0][0].shape for values, _ in inputs):
        raise ValueError("the inputs of an average have different shapes")
    average = torch.empty_like(inputs[0][0])
    total = torch.empty(CHUNK, dtype=torch.float64)
    term = torch.empty(CHUNK, dtype=torch.float64)
    for start in range(0, len(average), CHUNK):
        stop = min(start + CHUNK, len(average))
        total_C, term_C = total[: stop - start], term[: stop - start]
        total_C.zero_()
        for values, weight in inputs:
            term_C.copy_(values[start:stop])
            total_C.add_(term_C.mul_(float(weight)))
        average[start:stop].copy_(total_C.div_(float(weight_sum)))
    return average


def weights_hash(values: Tensor) -> bytes:
    """BLAKE3, 32 bytes, of the little-endian bytes of flat fp32 ``values``."""
    return blake3(values.contiguous().view(torch.uint8).numpy().data).digest()
