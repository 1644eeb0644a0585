"""Where each tensor of a model lies in its flat vector, and how that vector is cut into fragments.

Owns the canonical order that every node of a run agrees on. The flat vector holds the fragments one after the other,
so a fragment is one slice of it: what is read, sent, mixed and written at once. Layer l belongs to fragment l mod S
(strided, so that each exchange touches the whole depth: Streaming DiLoCo, arXiv 2501.18512, section 3.1); all other
tensors go, largest first, to the fragment that is smallest so far. Tied tensors appear once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from blake3 import blake3
from torch import Tensor, nn

Kind = Literal["weight", "bias", "norm", "embedding", "scalar"]
"""State classes: what mixing may do with a tensor. ``norm`` covers the affine tensors of normalisation layers."""

_LAYER = re.compile(r"^blocks\.(\d+)\.")
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


@dataclass(frozen=True, slots=True)
class TensorSpan:
    """One tensor and its place, ``start`` to ``stop`` in elements, in the vector the span was taken from."""

    name: str
    start: int
    stop: int
    shape: tuple[int, ...]
    kind: Kind


@dataclass(frozen=True, slots=True)
class ParameterLayout:
    """The table of a model's tensors. ``spans`` are in flat-vector order; ``bounds[f]`` is where fragment f starts."""

    spans: tuple[TensorSpan, ...]
    bounds: tuple[int, ...]

    @classmethod
    def of(cls, model: nn.Module, fragments: int) -> ParameterLayout:
        """The layout of ``model`` in ``fragments`` fragments, at most one per layer."""
        owned: list[list[tuple[str, Tensor, Kind]]] = [[] for _ in range(fragments)]
        rest = []
        for name, parameter, kind in _named_kinds(model):
            if layer := _LAYER.match(name):
                owned[int(layer.group(1)) % fragments].append((name, parameter, kind))
            else:
                rest.append((name, parameter, kind))
        for item in sorted(rest, key=lambda item: (-item[1].numel(), item[0])):
            min(owned, key=lambda items: sum(parameter.numel() for _, parameter, _ in items)).append(item)
        spans, bounds = [], [0]
        for items in owned:
            spans += list(_laid_out(items, start=bounds[-1]))
            bounds.append(spans[-1].stop)
        return cls(tuple(spans), tuple(bounds))

    @property
    def total(self) -> int:
        """Elements of the flat vector."""
        return self.bounds[-1]

    @property
    def fragments(self) -> int:
        """How many fragments the flat vector is cut into."""
        return len(self.bounds) - 1

    @property
    def digest(self) -> bytes:
        """BLAKE3 of the whole table: equal exactly where flat vectors mean the same."""
        rows = [f"{span.name} {span.start} {span.stop} {span.shape} {span.kind}" for span in self.spans]
        return blake3("\n".join([*rows, str(self.bounds)]).encode()).digest()

    def fragment_slice(self, fragment: int) -> slice:
        """The elements of ``fragment`` in the flat vector."""
        return slice(self.bounds[fragment], self.bounds[fragment + 1])

    def fragment_size(self, fragment: int) -> int:
        """Elements of ``fragment``."""
        return self.bounds[fragment + 1] - self.bounds[fragment]

    def fragment_spans(self, fragment: int) -> tuple[TensorSpan, ...]:
        """The tensors of ``fragment``, placed relative to its start."""
        start, stop = self.bounds[fragment], self.bounds[fragment + 1]
        return tuple(
            TensorSpan(span.name, span.start - start, span.stop - start, span.shape, span.kind)
            for span in self.spans
            if start <= span.start < stop
        )

    def cut(self, values: Tensor, fragment: int) -> Tensor:
        """The part of a flat vector that is ``fragment``: a view."""
        return values[self.fragment_slice(fragment)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """A new flat vector from all fragments in order. Raises ValueError unless each has its size."""
        for fragment, part in enumerate(parts):
            if part.shape != (self.fragment_size(fragment),):
                raise ValueError(f"fragment {fragment} has shape {tuple(part.shape)}")
        if len(parts) != self.fragments:
            raise ValueError(f"{len(parts)} fragments, the model has {self.fragments}")
        return torch.cat(list(parts))

    def views(self, values: Tensor) -> dict[str, Tensor]:
        """The named, shaped tensors of a flat vector: views, on its device."""
        return {span.name: values[span.start : span.stop].view(span.shape) for span in self.spans}


def _named_kinds(model: nn.Module) -> Iterator[tuple[str, Tensor, Kind]]:
    for name, parameter in model.named_parameters():  # names a tied tensor once
        module = model.get_submodule(name.rpartition(".")[0])
        yield name, parameter, _kind(module, parameter)


def _kind(module: nn.Module, parameter: Tensor) -> Kind:
    if parameter.numel() == 1:
        return "scalar"
    if isinstance(module, _NORMS):
        return "norm"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "bias" if parameter.dim() == 1 else "weight"


def _laid_out(items: Iterable[tuple[str, Tensor, Kind]], *, start: int) -> Iterator[TensorSpan]:
    for name, parameter, kind in items:
        stop = start + math.prod(parameter.shape)
        yield TensorSpan(name, start, stop, tuple(parameter.shape), kind)
        start = stop
