"""How long the shards of a merge are, piece by piece: what tells a contribution to this run's model from any other.

Owns the two forms that merges come in. In one, *weights* travel and their average is the result. In the other only the
first record averages weights; after it *updates* travel, in a form that leaves much out, and whoever holds the anchor
before makes the *state* after from them, which is the result. What any of these hold is the host's business.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MergeShape:
    """Bytes of the shards of each piece, in order; ``updates`` and ``states`` are empty where weights always travel."""

    weights: tuple[int, ...]
    updates: tuple[int, ...] = ()
    states: tuple[int, ...] = ()

    @property
    def pieces(self) -> int:
        """How many pieces the model is cut into."""
        return len(self.weights)

    def inputs(self, *, first: bool) -> list[int]:
        """What a contribution consists of; ``first``: to the first record of a run."""
        return list(self.weights if first else self.updates or self.weights)

    def moved(self, *, first: bool) -> list[int]:
        """The updates that a record names: none where its results are what travels."""
        return [] if first else list(self.updates)

    def results(self, *, first: bool) -> list[int]:
        """The results that a record names."""
        return list(self.weights if first else self.states or self.weights)
