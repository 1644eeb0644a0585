"""A text as batches of windows, of which a model learns to tell the next symbol: a byte, or a token.

Owns the step from a text to tensors, alike for every model of text: random windows to learn from, windows that follow
each other to be measured on, and the drawing of a symbol when a model writes. Never knows what a symbol stands for.

Relies on: ``training.data`` for the order in which a node reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor

from training.data import Symbols, TextBatches, held_out_windows

Batch: TypeAlias = tuple[Tensor, Tensor]
"""Inputs of n rows and their targets, int64 (n, ...), for which the model gives logits (n, ..., classes)."""


class TextWindows:
    """The windows of one node's text. Raises DataError for a text that is shorter than one."""

    def __init__(
        self,
        train: Symbols,
        held_out: Symbols,
        *,
        unit: str,
        context: int,
        batch: int,
        seed: bytes,
        evaluation_rows: int,
        device: torch.device,
    ) -> None:
        """``evaluation_rows``: windows in one forward pass of an evaluation."""
        self._batches = TextBatches(train, seed=seed, batch=batch, context=context, unit=unit)
        self._held_out = held_out_windows(held_out, context, unit)
        self._context = context
        self._evaluation_rows = evaluation_rows
        self._device = device

    def batch(self, number: int) -> Batch:
        """Batch ``number``: windows of the training text, and the same one symbol further on."""
        return self._shifted(self._batches.at(number))

    def held_out(self, symbols_max: int | None) -> Iterator[Batch]:
        """The held-out text, or about ``symbols_max`` of it: at least one window."""
        windows = self._held_out
        if symbols_max is not None:
            windows = windows[: max(1, symbols_max // self._context)]
        for start in range(0, len(windows), self._evaluation_rows):
            yield self._shifted(windows[start : start + self._evaluation_rows].copy())

    def _shifted(self, windows: Symbols) -> Batch:
        window_BT = torch.from_numpy(windows).to(self._device, non_blocking=True).long()
        return window_BT[:, :-1], window_BT[:, 1:]


def drawn_symbol(logits_V: Tensor, temperature: float, generator: torch.Generator) -> int:
    """The symbol that comes next, by what a model says on the CPU; ``temperature`` 0 takes the likeliest."""
    if temperature > 0:
        return int(torch.multinomial((logits_V / temperature).softmax(0), 1, generator=generator))
    return int(logits_V.argmax())
