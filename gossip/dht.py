"""A node's part in the hash table: it answers others, keeps its table fresh, and says where it is.

Owns the answers, the trials of contacts, and how often a node announces itself and looks for its run. A hint source
and no more: what is found goes to the address book, and nothing waits for it. The hash table spans runs, so that any
node of any run leads to all others. What it holds for others are points and signed addresses, never whose run it is.

Who asks says where it answers itself, which is its own word. It is dialled there before it is passed on, one trial
every TRIAL_PAUSE_S. A contact that has been silent for long is asked for a point in its bucket at random, so that
buckets are refreshed and the dead are dropped.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import trio

from gossip.dht_records import RecordRefused, RecordStore, sign_record
from gossip.dht_search import DhtSearch, contacts
from gossip.dht_table import BUCKET_MAX, peer_key
from gossip.ledger import PeerLedger
from gossip.messages import DHT_PROTOCOL, DhtContact, Find, Found, Noted, Provide, ProviderRecord
from p2p.errors import CallRefused
from p2p.identity import Signer
from p2p.limits import Limits
from p2p.rpc import serve_calls
from p2p.transport import PeerId, PeerRecord, Transport

SETTLE_S = 2.0
"""Before the first announcement: whom links are made to in that time is asked over these, and not visited."""
ANNOUNCE_S_MIN, ANNOUNCE_S_MAX, ANNOUNCE_GROWTH = 5.0, 900.0, 3.0
"""Between two announcements, longer each time. Four in the life of a record, so that a missed one is no loss."""
TELL_AGAIN_S = 450.0
"""Who took a record is not told it again before."""
ALONE_S_MAX = 60.0
"""The same for a node without neighbours, which finds them in this way or not at all."""
TRIALS_WAITING_MAX = 64
TRIAL_PAUSE_S = 1.0
STALE_S = 600.0
"""A contact that was not heard for so long is asked something."""
FRESHEN_PAUSE_S = 30.0
HINTS_MAX = 32
"""Providers that one lookup hands on."""
JITTER = 0.25


class Dht:
    """The part of one node, which announces itself under ``key``.

    ``hint(record)`` hears where peers of the same run may be; ``is_alone()``: whether that is urgent.
    """

    def __init__(
        self,
        *,
        transport: Transport,
        search: DhtSearch,
        signer: Signer,
        ledger: PeerLedger,
        limits: Limits,
        rng: random.Random,
        wall_time_s: Callable[[], float],
        key: bytes,
        hint: Callable[[PeerRecord], None],
        is_alone: Callable[[], bool],
    ) -> None:
        self.search = search
        self.store = RecordStore(signer=signer, limits=limits, rng=rng)
        self._transport = transport
        self._signer = signer
        self._ledger = ledger
        self._limits = limits
        self._rng = rng
        self._wall_time_s = wall_time_s
        self._key = key
        self._hint = hint
        self._is_alone = is_alone
        self._trials: dict[PeerId, PeerRecord] = {}
        """Who says of itself, or is said by others, to answer; in the order of hearing of it."""
        self._told_s: dict[PeerId, float] = {}
        """When others took this node's record, if that was lately."""

    async def run(self) -> None:
        """Take part until cancelled."""
        serve_calls(
            self._transport,
            DHT_PROTOCOL,
            Find | Provide,
            self._answer,
            limits=self._limits,
            on_malformed=lambda peer, error: self._ledger.note(peer, "malformed", error.what),
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_announced)
            nursery.start_soon(self._try_contacts)
            nursery.start_soon(self._keep_fresh)

    # --- answering ----------------------------------------------------------------------------------------------------

    async def _answer(self, peer: PeerId, request: Find | Provide) -> Found | Noted:
        self._ledger.admit(peer)
        match request:
            case Find(key=key, addresses=addresses):
                if addresses:
                    self._consider([DhtContact(peer=peer, addresses=addresses)])
                closer = self.search.table.closest(key, exclude=peer)
                return Found(
                    records=self.store.of(key, now_unix_s=self._wall_time_s()),
                    closer=[DhtContact(peer=each.peer, addresses=list(each.addresses)) for each in closer],
                )
            case Provide(record=record):
                self._hold(record, peer)
                return Noted()

    def _hold(self, record: ProviderRecord, peer: PeerId) -> None:
        """Raises CallRefused."""
        try:
            if record.peer != peer:
                raise RecordRefused("signature")
            self.store.put(record, now_unix_s=self._wall_time_s())
        except RecordRefused as refused:
            if refused.reason != "expired":
                self._ledger.note(peer, refused.reason, "a provider record that does not hold")
            raise CallRefused(refused.reason, "this record does not hold here and now") from refused

    # --- who is there -------------------------------------------------------------------------------------------------

    def _consider(self, named: Sequence[DhtContact]) -> None:
        for record in contacts(named, self._limits):
            if len(self._trials) < TRIALS_WAITING_MAX and self.search.table.has_room_for(record):
                self._trials.setdefault(record.peer, record)

    async def _try_contacts(self) -> None:
        while True:
            await trio.sleep(TRIAL_PAUSE_S)
            if self._ledger.resting:
                continue
            # Whom we are connected to because it has dialled us shows nothing about where it can be dialled.
            unproven = self._transport.peers()
            record = next(
                (
                    each
                    for each in self._trials.values()
                    if each.peer not in unproven or self._transport.dialled(each.peer) is not None
                ),
                None,
            )
            if record is not None:
                del self._trials[record.peer]
                await self._ask(record, peer_key(self._signer.peer))

    async def _keep_fresh(self) -> None:
        while True:
            await trio.sleep(FRESHEN_PAUSE_S * self._jitter())
            if self._ledger.resting:
                continue
            stale = self.search.table.stalest(before_s=trio.current_time() - STALE_S)
            if stale is not None:
                await self._ask(stale, self.search.table.key_near(stale.peer, self._rng))

    async def _ask(self, record: PeerRecord, key: bytes) -> None:
        answer = await self.search.ask(record, key)
        if answer is not None:
            self._consider(answer.closer)

    # --- saying where we are, and finding our own ---------------------------------------------------------------------

    async def _keep_announced(self) -> None:
        await trio.sleep(SETTLE_S * self._jitter())
        pause_s = ANNOUNCE_S_MIN
        while True:
            if not self._ledger.resting:
                if len(self.search.table) < BUCKET_MAX or pause_s == ANNOUNCE_S_MAX:
                    await self.search.find(peer_key(self._signer.peer), lambda record: None)
                await self._announce()
            await trio.sleep(pause_s * self._jitter())
            longest_s = ALONE_S_MAX if self._is_alone() else ANNOUNCE_S_MAX
            pause_s = min(ANNOUNCE_GROWTH * pause_s, longest_s)

    async def _announce(self) -> None:
        hints = 0

        def found(record: ProviderRecord) -> None:
            nonlocal hints
            hints += 1
            if hints <= HINTS_MAX:
                self._hint(PeerRecord(PeerId(record.peer), tuple(record.addresses)))

        holders = await self.search.find(self._key, found)
        addresses = self._transport.local.addresses[: self._limits.addresses_per_peer_max]
        if addresses:
            own = sign_record(self._signer, self._key, addresses, now_unix_s=self._wall_time_s())
            self.store.put(own, now_unix_s=self._wall_time_s())
            # Most of those that were closest a moment ago still are, and hold it.
            now_s = trio.current_time()
            self._told_s = {peer: at_s for peer, at_s in self._told_s.items() if at_s > now_s - TELL_AGAIN_S}
            took = await self.search.provide(own, [each for each in holders if each.peer not in self._told_s])
            self._told_s |= {holder.peer: now_s for holder in took}

    def _jitter(self) -> float:
        return self._rng.uniform(1 - JITTER, 1 + JITTER)
