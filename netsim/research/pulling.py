"""Exchanges in which each member pulls what others hold and averages it with its own.

``GraphGossip`` is ``x <- W x`` for a matrix W that a graph gives (Boyd, Ghosh, Prabhakar, Shah 2006). On
``one-peer-exponential`` it is one-peer exponential averaging (Ying et al., arXiv 2110.13363), exact after log2 n rounds
when n is a power of two. ``RandomPull`` is what the product does, in lockstep and without mixing rules.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence

import trio

from netsim.research.lockstep import Member, Message, Model, Seat, Vector, mean_with, unpack
from netsim.topology import Topology, Weights


class Want(Message, frozen=True, kw_only=True):
    """Asks for the values of a round."""

    round: int


class Puller(Member):
    """Pulls from its ``sources`` of the round and mixes what came."""

    requests = Want

    def begin(self, round_number: int) -> None:
        """Nothing has been received yet."""
        super().begin(round_number)
        self._received: dict[int, Vector] = {}

    async def talk(self) -> None:
        """Pull from all sources at once."""
        async with trio.open_nursery() as nursery:
            for other in self.sources():
                nursery.start_soon(self._pull, other)

    async def answer(self, sender: int, request: Want) -> Model:
        """One's own values, which do not change within the round."""
        self.check_round(request.round)
        return Model(round=self.round, values=self.seat.pack(self.values))

    def end(self) -> None:
        """Mix."""
        self.values = self.mix(self._received)

    @abc.abstractmethod
    def sources(self) -> Sequence[int]:
        """Whom to pull from in this round."""

    @abc.abstractmethod
    def mix(self, received: Mapping[int, Vector]) -> Vector:
        """One's own values with those received, by sender; some may be missing."""

    async def _pull(self, other: int) -> None:
        if model := await self.seat.call(other, Want(round=self.round), Model):
            self._received[other] = unpack(model.values)


class GraphGossip(Puller):
    """Weighted averaging with the neighbours in a graph. The weight of who is missing goes to oneself."""

    def __init__(self, seat: Seat, values: Vector, *, topology: Topology, weights: Weights) -> None:
        super().__init__(seat, values)
        self._topology = topology
        self._weights: Weights = weights

    def sources(self) -> Sequence[int]:
        """The neighbours of the round."""
        return self._topology.at(self.round).neighbours(self.seat.index)

    def mix(self, received: Mapping[int, Vector]) -> Vector:
        """``own + sum of weight * (theirs - own)``."""
        row = self._topology.row(self.seat.index, self._weights, self.round)
        return self.values + sum(row[other] * (received[other] - self.values) for other in sorted(received))


class RandomPull(Puller):
    """The mean of oneself and ``s`` members drawn afresh each round. Who is missing does not count."""

    def __init__(self, seat: Seat, values: Vector, *, s: int) -> None:
        super().__init__(seat, values)
        self._s = s

    def sources(self) -> Sequence[int]:
        """``s`` others."""
        return self.seat.rng.sample(self.seat.others, self._s)

    def mix(self, received: Mapping[int, Vector]) -> Vector:
        """Their mean with one's own."""
        return mean_with(self.values, received)
