"""The slope of a loss along a random direction, from two forward passes.

Owns simultaneous perturbation (Spall, "Multivariate stochastic approximation using a simultaneous perturbation gradient
approximation", IEEE Trans. Automatic Control 37, 1992; for language models: Malladi et al., arXiv 2305.17333):

    p = (L(w + epsilon z) - L(w - epsilon z)) / (2 epsilon),   z of signs.

The weights themselves are never written: each layer is perturbed in a scratch copy as the forward pass comes to it, so
a probe needs the memory of the largest layer and of what belongs to no layer, and has nothing to undo.

Never draws a direction or a batch itself, and knows no records.

Relies on: layers are the members of ModuleLists, each called once in a forward pass and reading its parameters only
then.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.directions import SIGNS_PER_WORD, Key, direction_words, signs_of
from training.integer_state import Grid, GridSpan

WORDS_AT_ONCE = 4096
"""Words of a direction that are made at once: its signs take 256 KiB, and 1 MiB in fp32."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Parameters that are perturbed together, in neighbouring words: one layer, or the rest (``layer`` is None)."""

    layer: nn.Module | None
    spans: tuple[GridSpan, ...]

    @property
    def first(self) -> int:
        return self.spans[0].start // SIGNS_PER_WORD

    @property
    def end(self) -> int:
        return -(-self.spans[-1].stop // SIGNS_PER_WORD)

    @property
    def size(self) -> int:
        """Elements of a scratch copy."""
        return (self.end - self.first) * SIGNS_PER_WORD


class Prober:
    """Probes one model, whose trained parameters are views of flat ``weights`` (fp32, in the order of ``grid``)."""

    def __init__(self, model: nn.Module, grid: Grid, weights: Tensor) -> None:
        self._grid = grid
        self._weights = weights
        self._parameters = dict(model.named_parameters())
        self._groups = _groups(model, grid)
        layers = max((group.size for group in self._groups if group.layer is not None), default=0)
        shared = torch.empty(layers, device=weights.device)
        """One layer at a time is perturbed: the forward pass has left the one before."""
        self._scratch = [
            torch.empty(group.size, device=weights.device) if group.layer is None else shared[: group.size]
            for group in self._groups
        ]

    @torch.no_grad()
    def slope(self, loss: Callable[[], Tensor], key: Key, epsilon: float) -> float:
        """The central difference of ``loss``, which runs the model, along the direction of ``key``."""
        # The words of a direction take a 32nd of the weights, its signs a quarter: only they are made layer by layer.
        words = direction_words([key], 0, self._grid.words, self._weights.device)
        above, below = (self._loss_at(loss, words, step) for step in (epsilon, -epsilon))
        return (above - below) / (2 * epsilon)

    def _loss_at(self, loss: Callable[[], Tensor], words: Tensor, step: float) -> float:
        """``loss`` with the weights ``step`` further along the direction."""
        hooks = []
        try:
            for group, scratch in zip(self._groups, self._scratch, strict=True):
                perturb = functools.partial(self._perturb, group, scratch, words, step)
                if group.layer is None:
                    perturb()
                else:
                    hooks.append(group.layer.register_forward_pre_hook(perturb))
            return loss().item()
        finally:
            for hook in hooks:
                hook.remove()
            for name, view in self._grid.views(self._weights).items():
                self._parameters[name].data = view

    def _perturb(
        self, group: _Group, scratch: Tensor, words: Tensor, step: float, *_of_the_hook: object
    ) -> None:
        for first in range(group.first, group.end, WORDS_AT_ONCE):
            count = min(WORDS_AT_ONCE, group.end - first)
            start, size = first * SIGNS_PER_WORD, count * SIGNS_PER_WORD
            into = scratch[start - group.spans[0].start :][:size]
            into.copy_(signs_of(words[:, first : first + count])[0])
            torch.add(self._weights[start : start + size], into, alpha=step, out=into)
        for span in group.spans:
            start = span.start - group.spans[0].start
            values = scratch[start : start + math.prod(span.shape)]
            self._parameters[span.name].data = values.view(span.shape)


def _groups(model: nn.Module, grid: Grid) -> list[_Group]:
    """Every span of ``grid`` once, in its order: with the layer that it belongs to and nothing else does."""
    layers = [layer for parent in model.modules() if isinstance(parent, nn.ModuleList) for layer in parent]
    inside = {id(module) for layer in layers for module in layer.modules()}
    outside = [module for module in model.modules() if id(module) not in inside]
    homes: dict[int, set[nn.Module | None]] = {}
    for layer in layers:
        for parameter in layer.parameters():
            homes.setdefault(id(parameter), set()).add(layer)
    for module in outside:
        for parameter in module.parameters(recurse=False):
            homes.setdefault(id(parameter), set()).add(None)
    parameters = dict(model.named_parameters())

    def layer_of(span: GridSpan) -> nn.Module | None:
        found = homes[id(parameters[span.name])]
        return next(iter(found)) if len(found) == 1 else None

    return [_Group(layer, tuple(spans)) for layer, spans in itertools.groupby(grid.spans, key=layer_of)]
