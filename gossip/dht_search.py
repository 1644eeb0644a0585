"""Asking the hash table: one lookup after the other, by calls to whoever ``gossip.dht_lookup`` says is next.

Owns the calls, their deadlines and what is believed of the answers. A record counts when its provider's signature does;
a contact is somebody to ask and nothing more. Never answers: that is ``gossip.dht``. A newcomer that has nothing but a
run id and an address needs no more than this.

Every call ends within CALL_TIMEOUT_S and every lookup within LOOKUP_TIMEOUT_S. What is found is handed on as it comes,
so that nobody waits for the end of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import structlog
import trio

from gossip.address_book import can_be_dialled
from gossip.dht_lookup import ALPHA, Lookup
from gossip.dht_records import RecordRefused, check_record
from gossip.dht_table import RoutingTable
from gossip.ledger import PeerLedger
from gossip.messages import DHT_PROTOCOL, DhtContact, Find, Found, Message, Noted, Provide, ProviderRecord
from gossip.visits import Visits
from p2p.errors import MalformedMessage, TransportError
from p2p.identity import Signer, is_peer_id
from p2p.limits import Limits
from p2p.rpc import call
from p2p.transport import PeerId, PeerRecord, Transport

CALL_TIMEOUT_S = 5.0
"""From the dial to the answer."""
CALLS_MAX = 4
"""Under way at once, for all that this node wants to know."""
LOOKUP_TIMEOUT_S = 30.0
ANSWER_BYTES_MAX = 64 << 10
SEEDS_MAX = 8

T = TypeVar("T", bound=Message)

log = structlog.get_logger()


class DhtSearch:
    """One node's questions to the hash table.

    ``seeds()``: whom to ask as long as ``table`` is all but empty. ``addresses()``: where this node answers such
    questions itself, now; empty where it does not.
    """

    def __init__(
        self,
        *,
        transport: Transport,
        visits: Visits,
        signer: Signer,
        ledger: PeerLedger,
        limits: Limits,
        wall_time_s: Callable[[], float],
        seeds: Callable[[], Iterable[PeerRecord]],
        addresses: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self.table = RoutingTable(signer.peer)
        self._transport = transport
        self._visits = visits
        self._signer = signer
        self._ledger = ledger
        self._limits = limits
        self._wall_time_s = wall_time_s
        self._seeds = seeds
        self._addresses = addresses
        self._calls = trio.Semaphore(CALLS_MAX)

    async def find(self, key: bytes, found: Callable[[ProviderRecord], None]) -> list[PeerRecord]:
        """Look ``key`` up; ``found`` hears of each provider's record once. Returns the closest that have answered."""
        lookup = Lookup(key, self._first_asked(key), local=self._signer.peer)
        known: set[str] = {self._signer.peer}

        async def ask(record: PeerRecord) -> None:
            answer = await self.ask(record, key)
            if answer is None:
                lookup.failed(record.peer)
            else:
                lookup.answered(record.peer, contacts(answer.closer, self._limits))
                for each in answer.records:
                    if each.peer not in known and self._counts(each, key, record.peer):
                        known.add(each.peer)
                        found(each)
            ask_next()

        def ask_next() -> None:
            while (record := lookup.next()) is not None:
                nursery.start_soon(ask, record)

        with trio.move_on_after(LOOKUP_TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                ask_next()
        return lookup.closest()

    async def ask(self, record: PeerRecord, key: bytes) -> Found | None:
        """What one peer says about ``key``, or None; whether it answers is noted in the table."""
        answer = await self._call(record, Find(key=key, addresses=list(self._addresses())), Found)
        if answer is None:
            self.table.failed(record.peer)
        else:
            self.table.answered(record, trio.current_time())
        return answer

    async def provide(self, record: ProviderRecord, holders: Iterable[PeerRecord]) -> list[PeerRecord]:
        """Ask ``holders`` to hold this node's record; returns those that took it."""
        took = []

        async def ask(holder: PeerRecord) -> None:
            if await self._call(holder, Provide(record=record), Noted) is not None:
                took.append(holder)

        async with trio.open_nursery() as nursery:
            for holder in holders:
                nursery.start_soon(ask, holder)
        return took

    def _first_asked(self, key: bytes) -> list[PeerRecord]:
        known = self.table.closest(key)
        if len(known) < ALPHA:
            known += [seed for seed in self._seeds() if seed.peer not in self.table][:SEEDS_MAX]
        return known

    async def _call(self, record: PeerRecord, request: Message, reply_type: type[T]) -> T | None:
        if self._ledger.shuns(record.peer):
            return None
        async with self._calls:
            with trio.move_on_after(CALL_TIMEOUT_S):
                try:
                    async with self._visits.visit(record):
                        return await call(
                            self._transport,
                            record.peer,
                            DHT_PROTOCOL,
                            request,
                            reply_type,
                            timeout_s=CALL_TIMEOUT_S,
                            bytes_max=ANSWER_BYTES_MAX,
                        )
                except MalformedMessage as error:
                    self._ledger.note(record.peer, "malformed", error.what)
                except TransportError as error:
                    log.debug("no answer from the hash table", peer=record.peer, error=error.what)
        return None

    def _counts(self, record: ProviderRecord, key: bytes, teller: PeerId) -> bool:
        try:
            check_record(
                record, key, now_unix_s=self._wall_time_s(), signer=self._signer, limits=self._limits
            )
        except RecordRefused as refused:
            # An old record is no offence: clocks differ.
            if refused.reason != "expired":
                self._ledger.note(teller, refused.reason, "a provider record that does not hold")
            return False
        return True


def contacts(named: Iterable[DhtContact], limits: Limits) -> list[PeerRecord]:
    """Those of ``named`` who have ids and addresses that can be dialled."""
    found = []
    for contact in named:
        usable = tuple(a for a in contact.addresses if can_be_dialled(a, chars_max=limits.address_chars_max))
        if usable and is_peer_id(contact.peer):
            found.append(PeerRecord(PeerId(contact.peer), usable))
    return found
