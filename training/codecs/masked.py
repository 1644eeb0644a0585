"""A part of the values that both sides know without being told: one of each few, drawn from a key.

Owns the draw: of every ``one_in`` values in a row one is kept, at a place that a random word says, so that each is kept
with the same chance and their number is certain. What is left out is 0. All who use one key keep the same values: the
mean of masked tensors is itself masked, and nothing of it is lost on the way back (GossipFL, "masks from a seed").

Relies on: ``training.directions`` for the words, the same on every machine; another codec for what is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.codecs.codec import Codec
from training.codecs.plain import BF16
from training.directions import direction_words

_STEP = -0x61C8864680B583EB
"""The odd number next to 2^64 over the golden ratio, signed: the step of SplitMix64's sequence."""


@dataclass(frozen=True, slots=True)
class Masked:
    """One in ``one_in`` values, a power of two, in the form of ``inner``."""

    one_in: int = 16
    inner: Codec = BF16
    lossless = False

    def __post_init__(self) -> None:
        assert self.one_in.bit_count() == 1, "words fall on all places equally often"

    def _places(self, count: int, key: int) -> Tensor:
        """Which of ``count`` values are kept, ascending. A short last group keeps its first."""
        groups = count // self.one_in
        words = direction_words([(key, _STEP)], 0, groups, torch.device("cpu"))[0]
        places = torch.arange(0, groups * self.one_in, self.one_in).add_(words & (self.one_in - 1))
        return torch.cat([places, torch.tensor([groups * self.one_in])]) if count % self.one_in else places

    def size_bytes(self, count: int) -> int:
        """Those of the values that are kept."""
        return self.inner.size_bytes(-(-count // self.one_in))

    def encode(self, values: Tensor, key: int = 0) -> bytes:
        """Raises NotFinite where ``inner`` does."""
        return self.inner.encode(values[self._places(len(values), key)], key)

    def decode(self, data: bytes | memoryview, count: int, key: int = 0) -> Tensor:
        """Raises ValueError for what ``inner`` refuses."""
        places = self._places(count, key)
        values = torch.zeros(count)
        values[places] = self.inner.decode(data, len(places), key)
        return values
