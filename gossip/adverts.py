"""How adverts of swarms travel: now and then a node asks another, of whatever run, which ones it knows of.

Owns ADVERTS_PROTOCOL: answers to anybody, visitors of other runs and the command line among them, and the questions of
this node. What is held is ``gossip.advert_table``'s. Nothing is pushed, so that nobody can make another work, and
nothing waits for an advert. Neighbours keep adverts within a swarm; contacts of the hash table take them to others.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import structlog
import trio

from gossip.advert_table import ADVERTS_PER_GIVER_MAX, AdvertTable, giver_of
from gossip.ledger import PeerLedger
from gossip.messages import ADVERTS_PROTOCOL, ADVERTS_TOLD_MAX, Adverts, WantAdverts
from gossip.visits import Visits
from p2p.advert import Advert, AdvertRefused
from p2p.errors import MalformedMessage, TransportError
from p2p.identity import Signer
from p2p.limits import Limits
from p2p.rpc import call, serve_calls
from p2p.transport import PeerId, PeerRecord, Transport

FIRST_ASK_S = 30.0
"""Before the first question, and between two looks for somebody to ask."""
ASK_S = 600.0
"""Between two questions: news reaches a thousand nodes in some hours, and costs each 80 bytes a second at most."""
ASK_TIMEOUT_S = 15.0
"""From the dial to the answer."""
RENEW_S = 600.0
"""The own advert is signed anew after so long, so that its addresses are current."""
JITTER = 0.25

log = structlog.get_logger()


class AdvertExchange:
    """The part of one node.

    ``own()``: the advert of this node, made now, or None where it has none. ``known()``: who may be asked.
    """

    def __init__(
        self,
        *,
        transport: Transport,
        visits: Visits,
        signer: Signer,
        ledger: PeerLedger,
        limits: Limits,
        rng: random.Random,
        wall_time_s: Callable[[], float],
        own: Callable[[], Advert | None],
        known: Callable[[], Sequence[PeerRecord]],
    ) -> None:
        self.table = AdvertTable(signer=signer, limits=limits, rng=rng)
        self._transport = transport
        self._visits = visits
        self._ledger = ledger
        self._limits = limits
        self._rng = rng
        self._wall_time_s = wall_time_s
        self._make_own = own
        self._known = known
        self._own: Advert | None = None
        self._renew_at_s = 0.0

    async def run(self) -> None:
        """Answer, and ask now and then, until cancelled."""
        serve_calls(
            self._transport,
            ADVERTS_PROTOCOL,
            WantAdverts,
            self._answer,
            limits=self._limits,
            on_malformed=lambda peer, error: self._ledger.note(peer, "malformed", error.what),
        )
        pause_s = FIRST_ASK_S
        while True:
            await trio.sleep(pause_s * self._rng.uniform(1 - JITTER, 1 + JITTER))
            known = [record for record in self._known() if not self._ledger.shuns(record.peer)]
            pause_s = ASK_S if known else FIRST_ASK_S
            if known:
                await self._ask(self._rng.choice(known))

    def told(self, count: int = ADVERTS_TOLD_MAX) -> list[bytes]:
        """The own advert, and up to ``count`` in all, as lines."""
        now_s = trio.current_time()
        if self._own is None or now_s >= self._renew_at_s:
            self._own, self._renew_at_s = self._make_own(), now_s + RENEW_S
        return self.table.told(self._own, count, now_unix_s=self._wall_time_s())

    async def _answer(self, peer: PeerId, request: WantAdverts) -> Adverts:
        self._ledger.admit(peer)
        return Adverts(adverts=self.told(request.count))

    async def _ask(self, record: PeerRecord) -> None:
        peer = record.peer
        with trio.move_on_after(ASK_TIMEOUT_S):
            try:
                async with self._visits.visit(record):
                    giver = giver_of(peer, self._transport.host_of(peer))
                    lines = await fetch_adverts(self._transport, peer, ADVERTS_PER_GIVER_MAX)
                self._hold(lines, peer, giver)
            except MalformedMessage as error:
                self._ledger.note(peer, "malformed", error.what)
            except TransportError as error:
                log.debug("told of no swarms", peer=peer, error=error.what)

    def _hold(self, lines: Sequence[bytes], peer: PeerId, giver: str) -> None:
        for line in lines:
            try:
                self.table.put(line, giver, now_unix_s=self._wall_time_s())
            except AdvertRefused as refused:
                # An old one is no offence: clocks differ. Whoever holds a bad one has not looked at any.
                if refused.reason != "expired":
                    self._ledger.note(peer, refused.reason, f"an advert of a swarm: {refused}")
                    return


async def fetch_adverts(transport: Transport, peer: PeerId, count: int = ADVERTS_TOLD_MAX) -> list[bytes]:
    """Lines that a connected peer gives, not checked yet. Raises TransportError or MalformedMessage."""
    want = WantAdverts(count=count)
    reply = await call(transport, peer, ADVERTS_PROTOCOL, want, Adverts, timeout_s=ASK_TIMEOUT_S)
    if len(reply.adverts) > count:
        raise MalformedMessage(f"{len(reply.adverts)} adverts, and {count} were asked for")
    return reply.adverts
