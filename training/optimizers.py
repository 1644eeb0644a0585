"""How a gradient becomes a step, and the learning rate of each step.

Owns the registry of optimizers. Their state is flat fp32 vectors in layout order, like the weights, so that a
checkpoint is a handful of vectors. Decay acts on the weights themselves (Loshchilov, Hutter, arXiv 1711.05101), and
only on those of kind weight and embedding.

Relies on: gradients are finite and clipped (``training.trainer``), so that no step makes a weight that is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from training.layout import ParameterLayout
from training.spec_sections import AdamWSpec, OptimizerSpec, SgdSpec

MOMENTUM_MIN = 1e-30
"""Momentum of a smaller size becomes zero."""

EPSILON = 1e-8
"""Added to the root of AdamW's mean of squares: torch's default."""

_DECAYED = ("weight", "embedding")


class Optimizer(Protocol):
    """Changes the live weights by the gradient."""

    state: dict[str, Tensor]
    """The vectors of a checkpoint, by name."""

    def take_step(self, rate: float) -> None:
        """Change the weights by the gradient at this learning rate."""

    def resume(self, step: int) -> None:
        """Go on from ``step`` with the ``state`` of then."""

    def fault_of(self, state: Mapping[str, Tensor]) -> str | None:
        """Why finite vectors of the right length cannot be a state of this optimizer; None if they can."""


def build_optimizer(
    spec: OptimizerSpec, layout: ParameterLayout, live: Tensor, gradient: Tensor
) -> Optimizer:
    """The optimizer of a model whose parameters and gradients are views of flat ``live`` and ``gradient``."""
    if isinstance(spec, AdamWSpec):
        return AdamW(spec, layout, live, gradient)
    return Sgd(spec, layout, live, gradient)


class AdamW:
    """Torch's fused AdamW on flat vectors, one call for each stretch of them that decays alike.

    Torch's own class is not used: making one imports torch's compiler, two seconds and 70 MB of every daemon.
    """

    def __init__(self, spec: AdamWSpec, layout: ParameterLayout, live: Tensor, gradient: Tensor) -> None:
        self._spec = spec
        self.state = {"adam_mean": torch.zeros_like(live), "adam_square": torch.zeros_like(live)}
        vectors = (live, gradient, *self.state.values())
        self._decaying = _Stretches.of(layout, vectors, decayed=True)
        self._others = _Stretches.of(layout, vectors, decayed=False)

    def take_step(self, rate: float) -> None:
        """One step of AdamW."""
        self._move(self._decaying, rate, self._spec.weight_decay)
        self._move(self._others, rate, 0.0)

    def _move(self, stretches: _Stretches, rate: float, decay: float) -> None:
        adamw(
            stretches.live,
            stretches.gradient,
            stretches.mean,
            stretches.square,
            [],
            stretches.steps,
            fused=True,
            amsgrad=False,
            beta1=self._spec.beta1,
            beta2=self._spec.beta2,
            lr=rate,
            weight_decay=decay,
            eps=EPSILON,
            maximize=False,
        )

    def resume(self, step: int) -> None:
        """Correct the moments' bias as at ``step``."""
        for steps in (*self._decaying.steps, *self._others.steps):
            steps.fill_(float(step))

    def fault_of(self, state: Mapping[str, Tensor]) -> str | None:
        """A mean of squares is never negative."""
        return "adam_square has a negative element" if bool((state["adam_square"] < 0).any()) else None


@dataclass(frozen=True, slots=True, eq=False)
class _Stretches:
    """The stretches of four flat vectors that decay, or those that do not: views, in flat-vector order."""

    live: list[Tensor]
    gradient: list[Tensor]
    mean: list[Tensor]
    square: list[Tensor]
    steps: list[Tensor]
    """Steps taken, which torch counts for each stretch."""

    @classmethod
    def of(cls, layout: ParameterLayout, vectors: Sequence[Tensor], *, decayed: bool) -> _Stretches:
        """``vectors``: weights, gradient, mean and mean of squares."""
        alike = groupby(layout.spans, key=lambda span: span.kind in _DECAYED)
        ends = [
            (run[0].start, run[-1].stop)
            for decays, spans in alike
            if decays is decayed and (run := list(spans))
        ]
        live, gradient, mean, square = ([vector[start:stop] for start, stop in ends] for vector in vectors)
        return cls(live, gradient, mean, square, [torch.zeros((), device=vectors[0].device) for _ in ends])


class Sgd:
    """Gradient descent with momentum: ``m <- momentum m + g``, ``w <- w - rate (m + decay w)``."""

    def __init__(self, spec: SgdSpec, layout: ParameterLayout, live: Tensor, gradient: Tensor) -> None:
        self._momentum = torch.zeros_like(live)
        self.state = {"momentum": self._momentum}
        self._spec = spec
        self._live = live
        self._gradient = gradient
        self._decay: Tensor | None = None
        if spec.weight_decay:
            self._decay = torch.zeros_like(live)
            for span in layout.spans:
                if span.kind in _DECAYED:
                    self._decay[span.start : span.stop] = spec.weight_decay

    def take_step(self, rate: float) -> None:
        """One step: a few passes over flat vectors."""
        self._momentum.mul_(self._spec.momentum).add_(self._gradient)
        # The momentum of a unit that stopped learning would halve its way down to denormal numbers, with which a
        # processor reckons ten times slower, and stay there.
        torch.hardshrink(self._momentum, MOMENTUM_MIN, out=self._momentum)
        if self._decay is not None:
            self._live.addcmul_(self._live, self._decay, value=-rate)
        self._live.add_(self._momentum, alpha=-rate)

    def resume(self, step: int) -> None:
        """Nothing depends on the step."""

    def fault_of(self, state: Mapping[str, Tensor]) -> str | None:
        """Any finite momentum can be."""
        return None


def learning_rate(spec: OptimizerSpec, steps: int, step: int) -> float:
    """The rate of 0-based ``step`` of ``steps``: a linear warm-up, then a cosine to ``min_rate_fraction``."""
    if step < spec.warmup_steps:
        return spec.learning_rate * (step + 1) / spec.warmup_steps
    progress = min(1.0, (step - spec.warmup_steps) / max(1, steps - spec.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return spec.learning_rate * (spec.min_rate_fraction + (1 - spec.min_rate_fraction) * cosine)
