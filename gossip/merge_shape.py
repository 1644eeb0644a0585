"""How long the shards of a merge are, piece by piece, and which pieces a merge moves.

Owns the two forms that merges come in. In one, *weights* travel and their average is the result. In the other *updates*
travel, in a form that leaves much out, and whoever holds the anchor before makes the *state* after from them, which is
the result; the first record averages weights even there, unless all members begin with the same. What any of these hold
is the host's business.

Owns also whose turn it is where pieces move by turns: the first merge, the last one and those outside the schedule move
all pieces, every other one those whose turn its point is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MergeShape:
    """Bytes of the shards of each piece, in order; ``updates`` and ``states`` are empty where weights always travel.

    ``alike``: whether all members begin with the same weights, from which updates can start at once. ``turns``: the
    pieces of each turn, ascending; empty where every merge moves all. ``points``: the scheduled ones.
    """

    weights: tuple[int, ...]
    updates: tuple[int, ...] = ()
    states: tuple[int, ...] = ()
    alike: bool = False
    turns: tuple[tuple[int, ...], ...] = ()
    points: int = 0

    @property
    def pieces(self) -> int:
        """How many pieces the model is cut into."""
        return len(self.weights)

    def moved(self, before: int, point: int, *, first: bool) -> tuple[int, ...]:
        """The pieces that a record at ``point`` moves, ascending, where its parent is at the point ``before``."""
        if first or not self.turns or point == before or point >= self.points:
            return tuple(range(self.pieces))
        return self.turns[(point - 1) % len(self.turns)]

    def by_update(self, *, first: bool) -> bool:
        """Whether updates travel; ``first``: to the first record of a run."""
        return bool(self.updates) and (self.alike or not first)

    def input_sizes(self, moved: Sequence[int], *, first: bool) -> list[int]:
        """What a contribution consists of."""
        sizes = self.updates if self.by_update(first=first) else self.weights
        return [sizes[piece] for piece in moved]

    def update_size(self, piece: int, *, first: bool) -> int | None:
        """Of the update that leads to a result; None where the result itself travels."""
        return self.updates[piece] if self.by_update(first=first) else None

    def result_size(self, piece: int, *, first: bool) -> int:
        """Of the result of a piece that is moved."""
        return self.states[piece] if self.by_update(first=first) else self.weights[piece]
