"""Visits: connections that are made for one question, and are no links of the swarm.

Owns who is connected for that alone, in both directions: our hosts, whom we have dialled to ask something, and our
guests, who follow another run and may stay for a while to ask. They are greeted by nobody or in vain, so they are no
neighbours, and links are counted without them (``is_stranger``). Never greets and never judges.

A visit stays a visit. A host that turns out to be of our run is in the address book from then on, and dialled as a link
if one is wanted. ``gossip.links`` sends guests away that stay for longer than it waits for a greeting.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import trio

from p2p.transport import PeerId, PeerRecord, Transport

GUESTS_MAX = 16
"""Of ``Limits.peers_inbound_max`` connections; whoever comes then is sent away at once."""
PARTING_S = 1.0


@dataclass(slots=True)
class _Stay:
    """With one host, for all the questions that go to it at the same time."""

    questions: int = 0
    over: trio.Event = field(default_factory=trio.Event)


class Visits:
    """The visits of one node. ``guests_max`` 0: peers of other runs are not let in."""

    def __init__(self, transport: Transport, *, guests_max: int) -> None:
        self._transport = transport
        self._guests_max = guests_max
        self._hosts: dict[PeerId, _Stay] = {}
        self._guests: set[PeerId] = set()

    def is_stranger(self, peer: PeerId) -> bool:
        """Whether ``peer`` is a host or a guest: connected, if it is, and no link."""
        return peer in self._hosts or peer in self._guests

    def is_host(self, peer: PeerId) -> bool:
        """Whether we are with ``peer`` for a question only."""
        return peer in self._hosts

    @contextlib.asynccontextmanager
    async def visit(self, record: PeerRecord) -> AsyncIterator[None]:
        """Be connected to a peer for the length of the block. Raises PeerUnreachable.

        Who is connected anyway is asked by that way, and stays connected.
        """
        peer = record.peer
        while (parting := self._hosts.get(peer)) is not None and not parting.questions:
            await parting.over.wait()
        if peer in self._transport.peers() and peer not in self._hosts:
            yield
            return
        stay = self._hosts.setdefault(peer, _Stay())
        stay.questions += 1
        try:
            await self._transport.connect(record)
            yield
        finally:
            stay.questions -= 1
            if not stay.questions:
                with trio.move_on_after(PARTING_S) as deadline:
                    deadline.shield = True
                    await self._transport.disconnect(peer, "that was all")
                # Until it is gone it is a stranger, and whoever has another question waits.
                del self._hosts[peer]
                stay.over.set()

    async def wait_over(self, peer: PeerId) -> None:
        """Return once we are not with ``peer`` for a question only."""
        if (stay := self._hosts.get(peer)) is not None:
            await stay.over.wait()

    def admit(self, peer: PeerId) -> bool:
        """Whether ``peer``, who has dialled us and follows another run, may stay for now."""
        # It may have left before its answer was read, and nobody would tell of that again.
        if peer not in self._transport.peers() or self._transport.dialled(peer) is not None:
            return False
        if len(self._guests) >= self._guests_max:
            return False
        self._guests.add(peer)
        return True

    def left(self, peer: PeerId) -> None:
        """``peer`` is not connected any more."""
        self._guests.discard(peer)
