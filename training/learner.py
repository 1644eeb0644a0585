"""What a node trains, as the node sees it: counters, flat weights in fragments, steps, a loss and a saved state.

Owns the seam between a node and what learns in it, and what every learner demands of the values it is given. In life
that is ``training.trainer``; a simulation may hand in anything whose weights are a flat vector. A learner never waits,
never looks at a clock and knows no peers. It is not thread-safe: the node calls one method at a time, except ``read``,
which may run beside the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from training.layout import ParameterLayout
from training.run_spec import RunSpec


@dataclass(frozen=True, slots=True)
class SliceReport:
    """What a slice of inner steps did; ``loss`` is their mean training loss."""

    steps: int
    tokens: int
    loss: float


class Learner(Protocol):
    """One node's model in training. Weights are flat fp32 CPU tensors in the order of ``layout``."""

    @property
    def spec(self) -> RunSpec:
        """The run."""

    @property
    def step(self) -> int:
        """Inner steps since the beginning of the run."""

    @property
    def tokens(self) -> int:
        """What was learned from since the beginning of the run: the weight of this learner in a merge."""

    @property
    def layout(self) -> ParameterLayout:
        """Where each tensor lies in the weights, and how they are cut into fragments."""

    @property
    def device(self) -> torch.device:
        """Where the steps are computed."""

    def run_slice(self, steps: int) -> SliceReport:
        """Take ``steps`` inner steps."""

    def read(self, fragment: int | None = None) -> Tensor:
        """A copy of the live weights, or of one fragment of them."""

    def add(self, fragment: int | None, delta: Tensor) -> None:
        """Add ``delta`` to the live weights, or to one fragment. Raises ValueError unless every element is finite."""

    def write(self, values: Tensor) -> None:
        """Replace the live weights. Raises ValueError unless every element is finite."""

    def evaluate(self, values: Tensor | None = None, *, bytes_max: int | None = None) -> float:
        """Held-out loss of the live weights, or of ``values``; ``bytes_max`` bounds the data it reads."""

    def save(self) -> bytes:
        """Everything needed to go on."""

    def load(self, data: bytes) -> None:
        """Go on from what ``save`` returned. Raises CheckpointError, and changes nothing, unless all of it is sound."""


def check_values(values: Tensor, count: int) -> None:
    """Raise ValueError unless ``values`` is what may enter weights: ``count`` elements, all of them finite."""
    if values.shape != (count,):
        raise ValueError(f"shape {tuple(values.shape)}, expected ({count},)")
    if not all_finite(values):
        raise ValueError("an element is not finite")


def all_finite(values: Tensor) -> bool:
    """Whether every element is a finite number."""
    # A sum is finite only if every term is, and far cheaper; large terms may still overflow it.
    return math.isfinite(values.sum().item()) or bool(torch.isfinite(values).all())
