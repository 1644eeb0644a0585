"""Averaging in pairs: each round everybody is matched with one other, and both take the mean of the two."""

from __future__ import annotations

import random

from netsim.research.lockstep import Member, Model, Vector, unpack


class RandomMatching(Member):
    """A perfect matching drawn afresh each round, by everybody alike (with odd n, one sits out).

    The lower of two calls; its request carries its values and the reply the other's. If the request is lost neither
    changes; if the reply is lost only one does, and the mean moves, which no number of further messages would rule out.
    """

    requests = Model

    def begin(self, round_number: int) -> None:
        """Draw the matching."""
        super().begin(round_number)
        self._theirs: Vector | None = None
        order = list(range(self.seat.members))
        random.Random(f"{self.seat.seed}/matching/{round_number}").shuffle(order)
        place = order.index(self.seat.index) ^ 1
        self._partner = order[place] if place < len(order) else self.seat.index

    async def talk(self) -> None:
        """Swap values, if it is one's turn to call."""
        if self.seat.index < self._partner:
            offer = Model(round=self.round, values=self.seat.pack(self.values))
            if reply := await self.seat.call(self._partner, offer, Model):
                self._theirs = unpack(reply.values)

    async def answer(self, sender: int, request: Model) -> Model:
        """The other half of the swap."""
        self.check_round(request.round)
        self._theirs = unpack(request.values)
        return Model(round=self.round, values=self.seat.pack(self.values))

    def end(self) -> None:
        """Both hold the mean of the two, bit for bit: addition commutes."""
        if self._theirs is not None:
            self.values = (self.values + self._theirs) / 2
