"""What a lossy codec left out is not lost: it is added to what is sent next.

Owns the residual of one logical sender (error feedback; Seide et al., Interspeech 2014; with decay SparseLoCo, arXiv
2508.15706, section 3). Without it a codec that leaves values out never sends small ones, however long they last.

A residual belongs to one broadcast: the same bytes to everybody. Bytes that did not arrive are taken back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.codecs.codec import Codec


class ErrorFeedback:
    """The residual of one tensor, and the codec that leaves it."""

    def __init__(self, codec: Codec, count: int, *, decay: float = 1.0) -> None:
        """``decay``: what of a residual is left a round later; below 1 none grows for ever."""
        self.codec = codec
        self.decay = decay
        self.residual = torch.zeros(count)
        """fp32, what was not sent yet."""
        self._before = self.residual

    def encode(self, values: Tensor, key: int = 0) -> bytes:
        """The bytes of ``values`` and of what was left out before. Raises ValueError, and nothing has changed then."""
        owed = self.residual.mul(self.decay).add_(values)
        data = self.codec.encode(owed, key)
        self._before = owed
        self.residual = owed - self.codec.decode(data, len(values), key)
        return data

    def take_back(self) -> None:
        """What was encoded last did not arrive: all of it is owed still."""
        self.residual = self._before.clone()
