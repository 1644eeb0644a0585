"""How fast variance-corrected mixing is, against the least that mixing could do: an in-place mean of the same tensors.

    python benchmarks/mixing_kernel.py

Both run on one thread over 3 tensors of 16 MB, in turn, and the medians are compared. The bar is a ratio of 0.2.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from training.layout import TensorSpan
from training.mixing import mix

ELEMENTS = 4_000_000
TENSORS = 16
REPEATS = 15
RATIO_MIN = 0.2


def main() -> None:
    """Print the two medians and their ratio; exit 1 below the bar."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    own, *others = (torch.randn(ELEMENTS, generator=generator) * 0.02 for _ in range(3))
    size = ELEMENTS // TENSORS
    spans = [
        TensorSpan(f"tensor.{index}", index * size, (index + 1) * size, (size,), "weight")
        for index in range(TENSORS)
    ]
    plain = own.clone()

    def in_place_mean() -> None:
        plain.add_(others[0]).add_(others[1]).div_(3)

    def corrected() -> None:
        mix("variance_corrected", own, others, spans)

    mean_s, corrected_s = interleaved_medians(in_place_mean, corrected)
    ratio = mean_s / corrected_s
    print(f"in-place mean of 3 x 16 MB      {mean_s * 1e3:7.2f} ms")
    print(f"variance-corrected mix of them  {corrected_s * 1e3:7.2f} ms")
    print(f"ratio                           {ratio:7.3f}    (bar: {RATIO_MIN})")
    raise SystemExit(ratio < RATIO_MIN)


def interleaved_medians(*functions: Callable[[], None]) -> list[float]:
    """The median duration of each function in seconds, measured in turn so that a busy machine slows all alike."""
    times_s: list[list[float]] = [[] for _ in functions]
    for _ in range(REPEATS):
        for function, column in zip(functions, times_s, strict=True):
            began_s = time.perf_counter()
            function()
            column.append(time.perf_counter() - began_s)
    return [statistics.median(column) for column in times_s]


if __name__ == "__main__":
    main()
