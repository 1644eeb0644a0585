"""Epidemic Learning (de Vos et al., arXiv 2310.01972): send one's values to s others; average what came with one's own.

In ``ELLocal`` each member draws for itself, so it receives from a random number of others and the mean is not
preserved. In ``ELOracle`` the graph of each round is s-regular, so it is.
"""

from __future__ import annotations

import abc
import functools
import random
from collections.abc import Sequence

import trio

from netsim.research.lockstep import Member, Model, Received, Seat, Vector, mean_with, unpack
from netsim.topology import random_regular_graph


class Epidemic(Member):
    """Pushes to its ``targets`` of the round. A message that is lost is missing in the average, and nothing more."""

    requests = Model

    def __init__(self, seat: Seat, values: Vector, *, s: int) -> None:
        super().__init__(seat, values)
        self._s = s

    def begin(self, round_number: int) -> None:
        """Nothing has been received yet."""
        super().begin(round_number)
        self._inbox: dict[int, Vector] = {}

    async def talk(self) -> None:
        """Push to all targets at once."""
        async with trio.open_nursery() as nursery:
            for other in self.targets():
                model = Model(round=self.round, values=self.seat.pack(self.values))
                nursery.start_soon(self.seat.call, other, model, Received)

    async def answer(self, sender: int, request: Model) -> Received:
        """Keep what came for the end of the round."""
        self.check_round(request.round)
        self._inbox[sender] = unpack(request.values)
        return Received()

    def end(self) -> None:
        """Average."""
        self.values = mean_with(self.values, self._inbox)

    @abc.abstractmethod
    def targets(self) -> Sequence[int]:
        """Whom to push to in this round."""


class ELLocal(Epidemic):
    """``s`` others, drawn by each member for itself."""

    def targets(self) -> Sequence[int]:
        """``s`` others."""
        return self.seat.rng.sample(self.seat.others, self._s)


class ELOracle(Epidemic):
    """The neighbours in an ``s``-regular graph over all members, drawn afresh each round; s * n must be even."""

    def targets(self) -> Sequence[int]:
        """The neighbours of this round."""
        return _oracle(self.seat.seed, self.round, self._s, self.seat.members)[self.seat.index]


@functools.lru_cache(maxsize=2)
def _oracle(seed: int, round_number: int, s: int, members: int) -> list[list[int]]:
    """What the oracle tells everybody about a round."""
    graph = random_regular_graph(s, members, random.Random(f"{seed}/oracle/{round_number}"))
    return [sorted(graph.adj[index]) for index in range(members)]
