"""Reconciliation: two tables meet on one stream, compare versions, and both leave with the newest of everything.

Owns SYNC_PROTOCOL and the decision when to meet whom. Never judges a notice: ``gossip.notices`` does. This is
the only way notices travel, not a repair path beside another one, so traffic is bounded by the table
(push-pull anti-entropy: Demers et al., "Epidemic algorithms for replicated database maintenance", 1987, section 1.3).

A round is ``Versions -> Swap``, and ``-> Notices`` if any are wanted. One round carries a bounded number of
notices, chosen at random when there are more; the next round carries on. Rounds are held

* every other second with a random neighbour, less often in large swarms,
* at once with a peer we have just connected to,
* early, when there is news: with a few neighbours for our own, with one for news that others still lack.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from contextlib import closing
from typing import TypeVar

import structlog
import trio

from gossip.ledger import PeerLedger
from gossip.messages import SYNC_PROTOCOL, Heartbeat, Message, Notices, Swap, Versions
from gossip.notices import NoticeTable, Verdict, parse_keys
from p2p.errors import MalformedMessage, StreamBroken, TransportError
from p2p.flow import FlowStream
from p2p.frames import receive_message, send_message
from p2p.limits import Limits
from p2p.transport import Company, PeerId, PeerUp, Transport

INTERVAL_S = 2.0
"""Between regular rounds, give or take JITTER."""
JITTER = 0.2
EARLY_INTERVAL_S = 0.2
"""Early rounds keep this distance."""
INTERVAL_PER_REGISTER_S = 0.002
"""Both grow with the table, whose versions a round carries and compares; members beat less often then, too."""
OWN_NEWS_FANOUT = 3
RELAYED_NEWS_FANOUT = 1
SWAP_RESERVE_BYTES = 64 << 10
"""Room in a frame for everything that is not a notice."""

T = TypeVar("T")
log = structlog.get_logger()


def offer_all(notices: Iterable[bytes], sender: PeerId, table: NoticeTable, ledger: PeerLedger) -> None:
    """Offer what ``sender`` sent to ``table``; a notice that no honest peer passes on costs the sender."""
    now_s = trio.current_time()
    for packed in notices:
        verdict = table.offer(packed, now_s)
        if verdict is Verdict.ACCEPTED or verdict is Verdict.KNOWN:
            continue
        if verdict.blames_sender:
            ledger.note(sender, verdict, "a notice that no honest peer passes on")
        else:
            ledger.refusals[verdict] += 1


class AntiEntropy:
    """Keeps one table in step with those of the connected peers."""

    def __init__(
        self,
        *,
        transport: Transport,
        notices: NoticeTable,
        ledger: PeerLedger,
        limits: Limits,
        rng: random.Random,
        pace: float = 1.0,
        company: Company | None = None,
    ) -> None:
        """``pace``: how much rarer regular rounds are than every INTERVAL_S; ``company``: with whom to be in step,
        all that are connected unless it says otherwise."""
        self._company = company or transport
        self._transport = transport
        self._notices = notices
        self._ledger = ledger
        self._limits = limits
        self._rng = rng
        self._pace = pace
        self._meeting: dict[PeerId, bool] = {}
        """Peers with a round under way, and whether another one shall follow it."""
        self._news_fanout = 0
        self._news = trio.Event()
        self._told: dict[PeerId, tuple[object, ...]] = {}
        self.rounds = 0
        """Rounds begun here and finished."""
        self.rounds_failed = 0

    async def run(self) -> None:
        """Serve and start rounds until cancelled."""
        self._transport.serve(SYNC_PROTOCOL, self._answer)
        self._notices.on_change(self._watch_for_news)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._meet_regularly, nursery)
            nursery.start_soon(self._meet_newcomers, nursery)
            nursery.start_soon(self._spread_news, nursery)

    async def reconcile_with_all(self) -> None:
        """One round with every neighbour at once, to say goodbye or to be up to date now."""
        async with trio.open_nursery() as nursery:
            for peer in self._neighbours():
                nursery.start_soon(self._meet, peer)

    # --- when to meet whom ------------------------------------------------------------------------------------

    def _neighbours(self) -> list[PeerId]:
        return sorted(peer for peer in self._company.peers() if not self._ledger.banned(peer))

    async def _meet_regularly(self, nursery: trio.Nursery) -> None:
        while True:
            await trio.sleep(
                self._interval_s(INTERVAL_S * self._pace) * self._rng.uniform(1 - JITTER, 1 + JITTER)
            )
            self._meet_some(nursery, 1)

    async def _meet_newcomers(self, nursery: trio.Nursery) -> None:
        async for event in self._company.peer_events():
            # The side that dialled starts; a round serves both.
            if isinstance(event, PeerUp) and event.outbound:
                nursery.start_soon(self._meet, event.peer)

    def _watch_for_news(self, author: PeerId, kind: str, body: Message | None) -> None:
        if self._is_news(author, body):
            own = author == self._transport.local.peer
            self._news_fanout = max(self._news_fanout, OWN_NEWS_FANOUT if own else RELAYED_NEWS_FANOUT)
            self._news.set()

    def _is_news(self, author: PeerId, body: Message | None) -> bool:
        """Whether a change is worth an early round; a heartbeat that only counts on is not."""
        match body:
            case None:
                self._told.pop(author, None)
                return False
            case Heartbeat(head=head, leaving=leaving, addresses=addresses):
                telling = (head, leaving, *addresses)
                changed = self._told.get(author) != telling
                self._told[author] = telling
                return changed
            case _:
                return True

    async def _spread_news(self, nursery: trio.Nursery) -> None:
        while True:
            await self._news.wait()
            self._news = trio.Event()
            fanout, self._news_fanout = self._news_fanout, 0
            everyone_met = self._notices.count_authors() <= 1 + len(self._neighbours())
            if fanout > RELAYED_NEWS_FANOUT or not everyone_met:
                self._meet_some(nursery, fanout)
            await trio.sleep(self._interval_s(EARLY_INTERVAL_S))

    def _interval_s(self, least_s: float) -> float:
        return least_s + INTERVAL_PER_REGISTER_S * len(self._notices)

    def _meet_some(self, nursery: trio.Nursery, count: int) -> None:
        neighbours = self._neighbours()
        for peer in self._rng.sample(neighbours, min(count, len(neighbours))):
            nursery.start_soon(self._meet, peer)

    # --- one round --------------------------------------------------------------------------------------------

    async def _meet(self, peer: PeerId) -> None:
        """Hold a round with ``peer``; if one is under way, hold another after it, for it may miss the latest."""
        if peer in self._meeting:
            self._meeting[peer] = True
            return
        self._meeting[peer] = True
        try:
            while self._meeting[peer]:
                self._meeting[peer] = False
                await self._hold_round(peer)
        finally:
            del self._meeting[peer]

    async def _hold_round(self, peer: PeerId) -> None:
        try:
            with trio.fail_after(self._limits.call_timeout_s):
                stream = await self._transport.open_stream(peer, SYNC_PROTOCOL)
                with closing(stream):
                    await self._ask(peer, stream)
            self.rounds += 1
        except MalformedMessage as error:
            self.rounds_failed += 1
            self._ledger.note(peer, "malformed", error.what)
        except (TransportError, trio.BrokenResourceError, trio.TooSlowError) as error:
            # Whatever it was about, the next round is about it too.
            self.rounds_failed += 1
            log.debug("round failed", peer=peer, error=str(error))

    async def _ask(self, peer: PeerId, stream: FlowStream) -> None:
        await send_message(stream, Versions(registers=self._notices.versions()))
        swap = await self._receive(stream, Swap)
        offer_all(swap.notices, peer, self._notices, self._ledger)
        if swap.want:
            wanted = self._notices.held(parse_keys(swap.want))
            await send_message(stream, Notices(notices=self._some_of(wanted)))
            # Who says goodbye is gone next: the end of the stream says that everything has arrived.
            await stream.receive_some(1)

    async def _answer(self, peer: PeerId, stream: FlowStream) -> None:
        if self._ledger.banned(peer) or peer not in self._company.peers():
            return
        try:
            with trio.fail_after(self._limits.call_timeout_s):
                theirs = await self._receive(stream, Versions)
                difference = self._notices.compare(theirs.registers)
                wanted = difference.wanted
                if len(wanted) > self._limits.notices_per_swap_max:
                    wanted = self._rng.sample(wanted, self._limits.notices_per_swap_max)
                swap = Swap(notices=self._some_of(difference.missing), want=b"".join(wanted))
                await send_message(stream, swap)
                if wanted:
                    answer = await self._receive(stream, Notices)
                    offer_all(answer.notices, peer, self._notices, self._ledger)
        except MalformedMessage as error:
            self._ledger.note(peer, "malformed", error.what)
            raise

    async def _receive(self, stream: FlowStream, message_type: type[T]) -> T:
        message = await receive_message(stream, message_type, bytes_max=self._limits.frame_bytes_max)
        if message is None:
            raise StreamBroken("the peer ended the round early")
        return message

    def _some_of(self, notices: list[bytes]) -> list[bytes]:
        """As many as one frame carries; of more, some at random, so that none is passed over for ever."""
        room_bytes = self._limits.frame_bytes_max - SWAP_RESERVE_BYTES
        if sum(map(len, notices)) <= room_bytes and len(notices) <= self._limits.notices_per_swap_max:
            return notices
        self._rng.shuffle(notices)
        chosen = []
        for packed in notices[: self._limits.notices_per_swap_max]:
            room_bytes -= len(packed)
            if room_bytes < 0:
                break
            chosen.append(packed)
        return chosen
