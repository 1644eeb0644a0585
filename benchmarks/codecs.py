"""How fast values are encoded and decoded: fp32 gigabytes per second of one core, for a tensor of 16 MB."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.harness import Figure
from training.codecs.blocks import E3M0, Int8
from training.codecs.codec import Codec
from training.codecs.masked import Masked
from training.codecs.plain import BF16
from training.codecs.sparse import TopK

COUNT = 4 << 20
CODECS: list[tuple[str, Codec, float | None]] = [
    ("bf16", BF16, 1.0),
    ("int8", Int8(), 1.0),
    ("E3M0", E3M0(), 0.3),
    ("Top-K, 1 in 64", TopK(), 0.3),
    ("masked, 1 in 16", Masked(), None),
]
"""Name, codec, and what it has to reach in both directions."""


async def measure(repeats: int = 9) -> list[Figure]:
    """Both directions of every codec."""
    torch.set_num_threads(1)
    values = torch.randn(COUNT, generator=torch.Generator().manual_seed(0))
    figures = []
    for name, codec, bar in CODECS:
        data = codec.encode(values)
        smaller = values.nbytes / len(data)
        for verb, work in (
            ("encode", lambda codec=codec: codec.encode(values)),
            ("decode", lambda codec=codec, data=data: codec.decode(data, COUNT)),
        ):
            rates = tuple(values.nbytes / 1e9 / _seconds(work) for _ in range(repeats))
            figures.append(Figure(f"{verb} {name}, {smaller:.4g} x smaller", "GB/s", rates, at_least=bar))
    return figures


def _seconds(work: Callable[[], object]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s
