"""Push-sum averaging (Kempe, Dobra, Gehrke 2003; SGP, Assran et al., arXiv 1811.10792) on a directed graph.

Everybody holds a mass: values x and a weight w, at first 1. Each round it keeps one equal part and sends one to each of
its out-neighbours; x/w converges to the mean of the initial values on any strongly connected graph, because the sum of
all mass never changes. A link that loses mass therefore changes the limit.
"""

from __future__ import annotations

import trio

from netsim.research.lockstep import Member, Message, Received, Seat, Vector, unpack
from netsim.topology import Topology


class Parcel(Message, frozen=True, kw_only=True):
    """A share of a member's mass, made in ``round`` and not always sent in it."""

    round: int
    values: bytes
    weight: float


class PushSum(Member):
    """Push-sum over lossy links.

    ``keep``: a parcel stays with its sender until it is acknowledged, is sent again each round, and is taken once,
    however often it arrives; for a neighbour that owes an acknowledgement no second parcel is made. Otherwise what is
    lost is gone.
    """

    requests = Parcel

    def __init__(self, seat: Seat, values: Vector, *, topology: Topology, keep: bool) -> None:
        super().__init__(seat, values)
        self._neighbours = topology.neighbours(seat.index)
        self._keep = keep
        self._weight = 1.0
        self._unconfirmed: dict[int, tuple[int, Vector, float]] = {}
        self._taken: dict[int, int] = {}
        """When the last parcel taken from each sender was made."""
        self._inbox: list[tuple[int, Vector, float]] = []

    @property
    def estimate(self) -> Vector:
        """x/w."""
        return self.values / self._weight

    def begin(self, round_number: int) -> None:
        """Part with a share for each neighbour that has taken the last one."""
        super().begin(round_number)
        free = [other for other in self._neighbours if other not in self._unconfirmed]
        parts = len(free) + 1
        self.values, self._weight = self.values / parts, self._weight / parts
        for other in free:
            self._unconfirmed[other] = (round_number, self.values, self._weight)

    async def talk(self) -> None:
        """Send every parcel that is not known to have arrived."""
        async with trio.open_nursery() as nursery:
            for other in sorted(self._unconfirmed):
                nursery.start_soon(self._send, other)

    async def answer(self, sender: int, request: Parcel) -> Received:
        """Take a parcel, unless it has been taken before."""
        if request.round > self._taken.get(sender, -1):
            self._taken[sender] = request.round
            self._inbox.append((sender, unpack(request.values), request.weight))
        return Received()

    def end(self) -> None:
        """Add what came to one's own mass, in the order of the senders."""
        for _, values, weight in sorted(self._inbox, key=lambda parcel: parcel[0]):
            self.values, self._weight = self.values + values, self._weight + weight
        self._inbox.clear()
        if not self._keep:
            self._unconfirmed.clear()

    async def _send(self, other: int) -> None:
        made, values, weight = self._unconfirmed[other]
        parcel = Parcel(round=made, values=self.seat.pack(values), weight=weight)
        if await self.seat.call(other, parcel, Received):
            del self._unconfirmed[other]
