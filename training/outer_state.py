"""What members hold alike between two merges, and how little has to travel from one to the next.

Owns the state of a Nesterov outer step, anchor and momentum, as bytes that are hashed and fetched, and the way from one
state to the next by an update: the members' average pseudo-gradient, in a codec. Everybody decodes the same bytes and
takes the same step, so states stay equal bit for bit however much the codec leaves out. What it leaves out is not lost:
a member keeps it in its live weights, as a distance from the anchor of which the next contribution tells again, and an
owner adds it to its next sum (``training.codecs.feedback``).

Relies on: ``training.outer_steps`` for the step. Never knows who the members are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.codecs.codec import Codec
from training.codecs.feedback import encode_with
from training.codecs.named import UPDATE_WIRES
from training.codecs.plain import FP32
from training.mixing import Refused, decoded
from training.outer_steps import nesterov
from training.spec_sections import NesterovSpec, OuterSpec, PairsSpec, PlainOuterSpec


@dataclass(frozen=True, slots=True, eq=False)
class OuterState:
    """An anchor, of the whole model or a piece of it, and the momentum with which it moves; flat fp32 CPU tensors."""

    anchor: Tensor
    momentum: Tensor
    passed: float = 0.0
    """The share of the run's merge points that lie behind it: of all members alike, but not in its bytes."""

    @classmethod
    def joined(cls, parts: Sequence[OuterState], *, passed: float) -> OuterState:
        """The state of the whole from those of all pieces, in order."""
        anchors, momenta = [part.anchor for part in parts], [part.momentum for part in parts]
        return cls(torch.cat(anchors), torch.cat(momenta), passed)

    def of(self, start: int, stop: int) -> OuterState:
        """The state of those elements: views."""
        return OuterState(self.anchor[start:stop], self.momentum[start:stop], self.passed)


def updates_of(spec: OuterSpec) -> Updates | None:
    """How a run's merges move by updates; None where each averages weights."""
    match spec:
        case PlainOuterSpec() | PairsSpec():
            return None
        case NesterovSpec():
            return Updates(UPDATE_WIRES[spec.wire], spec.rate, spec.momentum, spec.warmup)


def streams(spec: OuterSpec) -> bool:
    """Whether merges move one fragment each, in turn."""
    return isinstance(spec, NesterovSpec) and spec.streaming


def state_bytes(count: int) -> int:
    """How long a state of ``count`` values is: the anchor, then the momentum, fp32 both."""
    return FP32.size_bytes(2 * count)


def encode_state(state: OuterState) -> bytes:
    """A state as bytes."""
    return FP32.encode(torch.cat([state.anchor, state.momentum]))


def decode_state(data: bytes, count: int) -> OuterState | Refused:
    """A state, or weights alone, which are a state at rest; or what is wrong with the bytes."""
    at_rest = len(data) == FP32.size_bytes(count)
    values = decoded(FP32, data, count if at_rest else 2 * count)
    if isinstance(values, Refused):
        return values
    return OuterState(values[:count], torch.zeros(count) if at_rest else values[count:])


@dataclass(frozen=True, slots=True)
class Updates:
    """Merges by pseudo-gradients; ``rate`` and ``memory`` as in ``outer_steps.nesterov``.

    Steps grow to them from the plain average over ``warmup``, a share of the run's merge points.
    """

    codec: Codec
    rate: float
    memory: float
    warmup: float = 0.0

    def encode(self, delta: Tensor) -> tuple[bytes, Tensor]:
        """A member's pseudo-gradient, and as much of it as these bytes tell. Raises NotFinite."""
        data = self.codec.encode(delta)
        return data, self.codec.decode(data, len(delta))

    def encode_sum(self, average: Tensor, owed: Tensor) -> tuple[bytes, Tensor]:
        """An average pseudo-gradient, and what is owed once it has been used. Raises NotFinite."""
        return encode_with(self.codec, average, owed)

    def decode(self, data: bytes, count: int) -> Tensor | Refused:
        """What ``encode`` made, or what is wrong with it."""
        return decoded(self.codec, data, count)

    def apply(self, state: OuterState, delta: Tensor) -> OuterState:
        """The state after the members' average pseudo-gradient, at a point that its caller knows."""
        grown = min(1.0, state.passed / self.warmup) if self.warmup else 1.0
        anchor, momentum = nesterov(
            state.anchor,
            state.anchor - delta,
            state.momentum,
            rate=1.0 + (self.rate - 1.0) * grown,
            memory=self.memory * grown,
        )
        return OuterState(anchor, momentum)
