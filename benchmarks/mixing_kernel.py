"""How fast variance-corrected mixing is, against the least that mixing could do: an in-place mean of the same tensors.

Both run on one thread over 3 tensors of 16 MB, in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.harness import Figure, ratios
from training.layout import TensorSpan
from training.mixing import mix

ELEMENTS = 4_000_000
SPANS = 16


async def measure(repeats: int = 15) -> list[Figure]:
    """Milliseconds of both, and the speed of the mix as a fraction of the mean's."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    own, *others = (torch.randn(ELEMENTS, generator=generator) * 0.02 for _ in range(3))
    size = ELEMENTS // SPANS
    spans = [
        TensorSpan(f"tensor.{index}", index * size, (index + 1) * size, (size,), "weight")
        for index in range(SPANS)
    ]
    mean = own.clone()
    mean_ms, mix_ms = [], []
    for _ in range(repeats):
        mean_ms.append(_milliseconds(lambda: mean.add_(others[0]).add_(others[1]).div_(3)))
        mix_ms.append(_milliseconds(lambda: mix("variance_corrected", own, others, spans)))
    return [
        Figure("in-place mean of 3 tensors of 16 MB", "ms", tuple(mean_ms)),
        Figure("variance-corrected mix of them", "ms", tuple(mix_ms)),
        Figure("mix speed / mean speed", "x", ratios(mean_ms, mix_ms), at_least=0.2),
    ]


def _milliseconds(function: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    function()
    return (time.perf_counter() - began_s) * 1e3
