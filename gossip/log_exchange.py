"""Two peers compare their logs, and each asks for what it lacks.

Owns the reconciliation of logs, which repairs whatever ``gossip.log_spread`` did not bring: after a new connection, and
whenever a peer turns out to know of something that is not held here. Never decides what counts.

A round is one question, how far the logs of a peer go, answered by nothing where both hold the same; then one for each
log of which the peer holds more, or something else. Both sides ask for themselves, so nothing travels unasked.

Relies on: ``gossip.record_logs`` for what is missing; ``p2p.rpc`` for deadlines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import structlog
import trio

from gossip.ledger import PeerLedger
from gossip.messages import LOG_SYNC_PROTOCOL, Batches, Heads, Message, WantBatches, WantHeads
from gossip.record_log import Head, parse_rows
from gossip.record_logs import RecordLogs
from p2p.errors import CallRefused, CallTimeout, MalformedMessage, TransportError
from p2p.limits import Limits
from p2p.rpc import call, serve_calls
from p2p.transport import Company, PeerId, Transport

HOLLOW_MAX = 64
"""Logs of which a peer tells and sends nothing, before a round with it ends."""
REPLY_RESERVE_BYTES = 64 << 10
"""Room in a frame of batches for everything that is not batches."""

T = TypeVar("T")

log = structlog.get_logger()


class LogExchange:
    """Asks other nodes for the batches this one lacks, and answers them."""

    def __init__(
        self,
        *,
        transport: Transport,
        logs: RecordLogs,
        ledger: PeerLedger,
        limits: Limits,
        take: Callable[[Sequence[bytes], PeerId], bool],
        company: Company,
    ) -> None:
        """``take(batches, sender)`` hands batches to the table; it returns whether any was news. ``company`` is
        answered."""
        self._company = company
        self._transport = transport
        self._logs = logs
        self._ledger = ledger
        self._limits = limits
        self._take = take
        self._asking: dict[PeerId, bool] = {}
        """Peers with a round under way, and whether another one shall follow it."""
        self.compared = trio.Event()
        """Set once a round was held to its end."""
        self.rounds = 0
        """Rounds begun here and finished."""
        self.rounds_failed = 0

    def serve(self) -> None:
        """Answer others from now on."""
        serve_calls(
            self._transport,
            LOG_SYNC_PROTOCOL,
            WantHeads | WantBatches,
            self._answer,
            limits=self._limits,
            on_malformed=lambda peer, error: self._ledger.note(peer, "malformed", error.what),
        )

    async def _answer(self, peer: PeerId, request: WantHeads | WantBatches) -> Message:
        if self._ledger.banned(peer):
            raise CallRefused("banned", "not now")
        if peer not in self._company.peers():
            raise CallRefused("not-greeted", "whose run that is, the greeting says")
        match request:
            case WantHeads(digest=digest):
                return Heads(rows=b"" if digest == self._logs.digest() else self._logs.rows())
            case WantBatches(log=name, names=names):
                room_bytes = self._limits.frame_bytes_max - REPLY_RESERVE_BYTES
                return Batches(batches=self._logs.after(name, names, room_bytes))

    async def ask(self, peer: PeerId) -> bool:
        """Hold a round with ``peer``; returns whether it brought anything. If one is under way, another follows it."""
        if peer in self._asking:
            self._asking[peer] = True
            return False
        self._asking[peer] = True
        brought = False
        try:
            while self._asking[peer]:
                self._asking[peer] = False
                brought |= await self._ask(peer)
        except (MalformedMessage, TransportError) as error:
            self.rounds_failed += 1
            if isinstance(error, MalformedMessage):
                self._ledger.note(peer, "malformed", error.what)
            elif isinstance(error, CallTimeout):
                self._ledger.note(peer, "stall", error.what)
            log.debug("logs not compared", peer=peer, error=str(error))
        finally:
            del self._asking[peer]
        return brought

    async def _ask(self, peer: PeerId) -> bool:
        heads = await self._call(peer, WantHeads(digest=self._logs.digest()), Heads)
        brought, hollow = False, 0
        for head in parse_rows(heads.rows):
            if self._ledger.banned(peer) or hollow > HOLLOW_MAX:
                break
            news = await self._catch_up(peer, head)
            brought |= bool(news)
            hollow += news is None
        if hollow:
            self._ledger.note(peer, "not-served", "batches that it tells of")
        self.rounds += 1
        self.compared.set()
        return brought

    async def _catch_up(self, peer: PeerId, head: Head) -> bool | None:
        """Ask for one log until nothing of it is lacking, or what comes is of no use. None if nothing came."""
        brought = False
        while self._logs.lacks(head):
            names = self._logs.skeleton(head.log)
            reply = await self._call(peer, WantBatches(log=head.log, names=names), Batches)
            if not reply.batches and not brought:
                return None
            if not self._take(reply.batches, peer):
                return brought
            brought = True
        return brought

    async def _call(self, peer: PeerId, request: Message, reply_type: type[T]) -> T:
        return await call(
            self._transport,
            peer,
            LOG_SYNC_PROTOCOL,
            request,
            reply_type,
            timeout_s=self._limits.call_timeout_s,
            bytes_max=self._limits.frame_bytes_max,
        )
