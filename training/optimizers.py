"""How a gradient becomes a step, and the learning rate of each step.

Owns the registry of optimizers. Their state is flat fp32 vectors in layout order, like the weights, so that a
checkpoint is a handful of vectors. Decay acts on the weights themselves (Loshchilov, Hutter, arXiv 1711.05101), and
only on those of kind weight and embedding.

Relies on: gradients are finite and clipped (``training.trainer``), so that no step makes a weight that is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from training.layout import ParameterLayout
from training.spec_sections import AdamWSpec, OptimizerSpec, SgdSpec

MOMENTUM_MIN = 1e-30
"""Momentum of a smaller size becomes zero."""

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
    spec: OptimizerSpec, model: nn.Module, layout: ParameterLayout, live: Tensor, gradient: Tensor
) -> Optimizer:
    """The optimizer of ``model``, whose parameters and gradients are views of flat ``live`` and ``gradient``."""
    if isinstance(spec, AdamWSpec):
        return AdamW(spec, model, layout, live)
    return Sgd(spec, layout, live, gradient)


class AdamW:
    """Torch's fused AdamW, its moments in flat vectors."""

    def __init__(self, spec: AdamWSpec, model: nn.Module, layout: ParameterLayout, live: Tensor) -> None:
        self.state = {"adam_mean": torch.zeros_like(live), "adam_square": torch.zeros_like(live)}
        parameters = dict(model.named_parameters())
        kinds = {span.name: span.kind for span in layout.spans}
        decayed = [parameters[name] for name in parameters if kinds[name] in _DECAYED]
        others = [parameters[name] for name in parameters if kinds[name] not in _DECAYED]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        self._torch = torch.optim.AdamW(
            groups, betas=(spec.beta1, spec.beta2), weight_decay=spec.weight_decay, fused=True
        )
        mean, square = (layout.views(vector) for vector in self.state.values())
        for name, parameter in parameters.items():
            self._torch.state[parameter] = {
                "step": torch.zeros((), device=live.device),
                "exp_avg": mean[name],
                "exp_avg_sq": square[name],
            }

    def take_step(self, rate: float) -> None:
        """One step of AdamW."""
        for group in self._torch.param_groups:
            group["lr"] = rate
        self._torch.step()

    def resume(self, step: int) -> None:
        """Correct the moments' bias as at ``step``."""
        for state in self._torch.state.values():
            state["step"].fill_(float(step))

    def fault_of(self, state: Mapping[str, Tensor]) -> str | None:
        """A mean of squares is never negative."""
        return "adam_square has a negative element" if bool((state["adam_square"] < 0).any()) else None


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
