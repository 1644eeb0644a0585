"""A multi-layer perceptron: linear layers with relu or tanh between them.

Owns the architecture and its initial weights. Never owns training state, and knows nothing of fragments.

Shape suffixes: B examples, D features, C classes.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from training.spec_sections import MlpSpec


class MLP(nn.Module):
    """The model of a run; ``generator`` (on the CPU) decides its initial weights."""

    def __init__(self, spec: MlpSpec, generator: torch.Generator) -> None:
        super().__init__()
        self.activation = torch.relu if spec.activation == "relu" else torch.tanh
        linears = [nn.Linear(fan_in, fan_out) for fan_in, fan_out in itertools.pairwise(spec.widths)]
        self.blocks = nn.ModuleList(linears)
        self._initialise(linears, generator)

    def forward(self, x_BD: Tensor) -> Tensor:
        """Logits (B, C) of the classes of examples (fp32)."""
        *hidden, last = self.blocks
        for block in hidden:
            x_BD = self.activation(block(x_BD))
        out: Tensor = last(x_BD)
        return out

    @torch.no_grad()
    def _initialise(self, linears: list[nn.Linear], generator: torch.Generator) -> None:
        """Uniform weights of variance 2 / (fan_in + fan_out) (Glorot, Bengio 2010), zero biases.

        The same bits on every processor, for the reason that ``training.model`` gives.
        """
        for linear in linears:
            drawn = torch.rand(linear.weight.shape, generator=generator)
            bound = math.sqrt(6 / sum(linear.weight.shape))
            linear.weight.copy_(drawn.sub_(0.5).mul_(2 * bound))
            linear.bias.zero_()
