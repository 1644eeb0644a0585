"""The pieces a model is cut into when it is merged, so that many members share the summing.

Owns where a flat vector in layout order is cut: within fragments, never across them, and within a tensor wherever it
suits, for a merge looks at single values. Fragments are what exchanges move, and follow the layers; pieces only have to
be alike in size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from training.layout import ParameterLayout, TensorSpan

PIECES_MAX = 8
"""As many members sum at once; each piece costs a reference for each contributor in every record."""
PIECE_VALUES_MIN = 1 << 14
"""What is smaller is not worth a request of its own."""
_GRAIN = 4096
"""Pieces are whole blocks of every codec, but for the last one of a fragment."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """Where the pieces of one layout lie: piece p is ``bounds[p]`` to ``bounds[p + 1]`` of the flat vector."""

    bounds: tuple[int, ...]
    turns: tuple[tuple[int, ...], ...]
    """The pieces of each fragment."""
    _spans: tuple[TensorSpan, ...]

    @classmethod
    def of(cls, layout: ParameterLayout, *, streaming: bool) -> Pieces:
        """As many pieces as are worth it, at least one for each fragment.

        ``streaming``: merges move one fragment each, so that its pieces alone are shared out.
        """
        most = max(1, PIECES_MAX // (1 if streaming else layout.fragments))
        bounds = [0]
        firsts = [0]
        for fragment in range(layout.fragments):
            start, size = layout.bounds[fragment], layout.fragment_size(fragment)
            count = min(max(1, size // PIECE_VALUES_MIN), most)
            bounds += [start + size * piece // count // _GRAIN * _GRAIN for piece in range(1, count)]
            bounds.append(start + size)
            firsts.append(len(bounds) - 1)
        turns = tuple(tuple(range(*ends)) for ends in pairwise(firsts))
        return cls(tuple(bounds), turns, layout.spans)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def sizes(self) -> list[int]:
        """Elements of each piece."""
        return [self.size(piece) for piece in range(len(self))]

    def size(self, piece: int) -> int:
        """Elements of ``piece``."""
        return self.bounds[piece + 1] - self.bounds[piece]

    def cut(self, values: Tensor, piece: int) -> Tensor:
        """The elements of a flat vector that are ``piece``: a view."""
        return values[self.bounds[piece] : self.bounds[piece + 1]]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """A new flat vector from all pieces in order."""
        assert [len(part) for part in parts] == self.sizes
        return torch.cat(list(parts))

    def spans(self, piece: int) -> tuple[TensorSpan, ...]:
        """The tensors in ``piece``, or what of them lies in it, placed relative to its start and flat."""
        start, stop = self.bounds[piece], self.bounds[piece + 1]
        return tuple(
            replace(span, start=begin, stop=end, shape=(end - begin,))
            for span in self._spans
            if (begin := max(span.start - start, 0)) < (end := min(span.stop, stop) - start)
        )
