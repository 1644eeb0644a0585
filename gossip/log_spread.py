"""Batches reach every member, each once: pushed along a tree for each log, which grows where the network is fast.

Owns the pushing of batches between neighbours, which is the eager part of epidemic broadcast trees (Leitão, Pereira,
Rodrigues, SRDS 2007). A batch that is news goes to every neighbour but the one it came from; one that has it already
answers with Quiet, and is not sent that log again until it asks for it, Loud, because the neighbour that brought it is
gone. What is lost on the way shows at the next batch of its log, whose predecessor is missing, or in the version
vectors that members tell of (``heard_digest``), and is asked for (``gossip.log_exchange``).

Never decides what counts, nor what is kept.

Relies on: ``gossip.record_logs`` to tell news from what is known.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import structlog
import trio

from gossip.ledger import PeerLedger
from gossip.log_exchange import LogExchange
from gossip.messages import (
    BATCHES_PER_MESSAGE_MAX,
    LOG_NAME_BYTES,
    LOG_PROTOCOL,
    Compare,
    Loud,
    Message,
    Push,
    Quiet,
)
from gossip.record_batches import InvalidBatch
from gossip.record_logs import Offer, RecordLogs
from p2p.errors import MalformedMessage, ProtocolUnsupported, TransportError
from p2p.flow import FlowStream
from p2p.frames import receive_message, send_message
from p2p.limits import Limits
from p2p.transport import Company, PeerDown, PeerId, PeerUp, Transport

QUEUE_MAX = 256
"""Messages that wait for one neighbour; one that is slower than that is told to compare instead."""

LANE_QUIET_S = 15.0
"""A neighbour to whom nothing was said for so long needs no open stream: in a crowd its connection may go."""

DIGESTS_REMEMBERED = 256
"""Version vectors of our own that are recognised when others tell of them."""

RETRY_S_MIN, RETRY_S_MAX = 1.0, 60.0
"""Between attempts to speak to a neighbour, the second where it does not know the protocol."""

UNKNOWN_MAX = 3
"""Digests in a row that one member tells of and that were never ours, before it is asked."""

STILL_S = 2.0
"""Without news for so long, nothing is under way any more: whoever tells of something else is asked at once."""

NEWS = frozenset((Offer.ACCEPTED, Offer.DISPLACED, Offer.FORK))
"""What the table did not hold before."""

log = structlog.get_logger()


@dataclass(slots=True, eq=False)
class _Lane:
    """What is to be said to one neighbour, in order."""

    queue: deque[bytes | Message] = field(default_factory=deque)
    """Packed batches, and what is said besides."""
    filled: trio.Event = field(default_factory=trio.Event)
    quiet: set[bytes] = field(default_factory=set)
    """Logs that it does not want to be pushed."""
    stale: Counter[bytes] = field(default_factory=Counter)
    """By log: batches that it pushed although we had them, since we last asked for that log to be pushed."""
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class LogSpread:
    """The batches of one node on their way to and from its neighbours."""

    def __init__(
        self,
        *,
        transport: Transport,
        logs: RecordLogs,
        ledger: PeerLedger,
        limits: Limits,
        rng: random.Random,
        changed: Callable[[], None],
        company: Company | None = None,
    ) -> None:
        """``changed()`` is called when the table holds something new; it must not block. ``company``: the neighbours,
        all that are connected unless it says otherwise."""
        self._company = company or transport
        self._transport = transport
        self._logs = logs
        self._ledger = ledger
        self._limits = limits
        self._rng = rng
        self._changed = changed
        self._lanes: dict[PeerId, _Lane] = {}
        self._bringers: dict[bytes, PeerId] = {}
        """Who pushed the newest batch of each log."""
        self._digests: dict[bytes, None] = {}
        self._unknown: dict[PeerId, tuple[int, bytes]] = {}
        """How many digests that were never ours each member told of in a row, and the last of them."""
        self._news_s = trio.current_time()
        """When something last came that was not held."""
        self._waits_until_still = False
        self._nursery: trio.Nursery | None = None
        self.exchange = LogExchange(
            transport=transport,
            logs=logs,
            ledger=ledger,
            limits=limits,
            take=self._take_asked,
            company=self._company,
        )
        self.duplicates = 0
        """Batches that were pushed here although they were known."""

    async def run(self) -> None:
        """Serve, push and compare until cancelled."""
        self._transport.serve(LOG_PROTOCOL, self._listen)
        self.exchange.serve()
        events = self._company.peer_events()
        async with trio.open_nursery() as self._nursery:
            for peer in sorted(self._company.peers()):
                self._met(peer)
            async for event in events:
                match event:
                    case PeerUp(peer=peer):
                        self._met(peer)
                    case PeerDown(peer=peer):
                        self._lost(peer)

    def _met(self, peer: PeerId) -> None:
        assert self._nursery is not None
        if peer not in self._lanes:
            lane = self._lanes[peer] = _Lane()
            self._nursery.start_soon(self._speak, peer, lane)
            self._nursery.start_soon(self._compare_with, peer)

    def _lost(self, peer: PeerId) -> None:
        lane = self._lanes.pop(peer, None)
        if lane is None:
            return
        lane.scope.cancel()
        self._unknown.pop(peer, None)
        self._dried_up(sorted(self._bringers), peer)

    def _dried_up(self, names: list[bytes], source: PeerId) -> None:
        """Those of the logs ``names`` that ``source`` brought are to come from elsewhere now."""
        names = [name for name in names if self._bringers.get(name) == source]
        for name in names:
            del self._bringers[name]
            for lane in self._lanes.values():
                lane.stale.pop(name, None)
        self._say_to_all(
            [Loud(logs=b"".join(names[at : at + 64])) for at in range(0, len(names), 64)], but=source
        )

    # --- news -------------------------------------------------------------------------------------------------------

    def publish(self, packed: bytes) -> None:
        """Hold a batch of our own and push it. Raises InvalidBatch."""
        _, name = self._logs.offer(packed)
        self._news_s = trio.current_time()
        self._remember()
        self._push(packed, name, None)

    def _take_pushed(self, packed: bytes, sender: PeerId) -> None:
        assert self._nursery is not None
        offered = self._offer(packed, sender)
        if offered is None:
            return
        outcome, name = offered
        match outcome:
            case Offer.ACCEPTED | Offer.DISPLACED:
                self._bringers[name] = sender
                self._push(packed, name, sender)
            case Offer.KNOWN:
                self._count_duplicate(name, sender)
                # What was asked for has no bringer: the first who pushes that log is as good as any.
                if self._bringers.setdefault(name, sender) != sender:
                    self._say(sender, Quiet(logs=name))
            case Offer.ORPHAN:
                self._nursery.start_soon(self._compare_with, sender)
            case Offer.FULL:
                self._ledger.note(sender, "table-full", "another log than there is room for")
            case _:
                pass

    def _count_duplicate(self, name: bytes, sender: PeerId) -> None:
        """Some cross our Quiet on the way, no more than a queue holds."""
        self.duplicates += 1
        if (lane := self._lanes.get(sender)) is not None:
            lane.stale[name] += 1
            if lane.stale[name] > QUEUE_MAX:
                self._ledger.note(sender, "replay", "batches that we have")

    def _take_asked(self, batches: Sequence[bytes], sender: PeerId) -> bool:
        offered = [self._offer(packed, sender) for packed in batches if not self._ledger.banned(sender)]
        self._remember()
        return any(one is not None and one[0] in NEWS for one in offered)

    def _offer(self, packed: bytes, sender: PeerId) -> tuple[Offer, bytes] | None:
        try:
            outcome, name = self._logs.offer(packed)
        except InvalidBatch as error:
            self._ledger.note(sender, error.fault, "a batch that no honest peer passes on")
            return None
        if outcome in NEWS:
            self._news_s = trio.current_time()
            self._changed()
        if outcome is Offer.FORK:
            self._denounce(name)
        elif outcome is Offer.DISPLACED:
            self._ledger.note(self._logs.proof(name)[0], "openings", "logs of which none can count")
        return outcome, name

    def _denounce(self, name: bytes) -> None:
        """Whoever holds either side of a fork must hear of the other."""
        author, proof = self._logs.proof(name)
        self._ledger.note(author, "equivocation", "two batches after the same one")
        for peer in self._lanes:
            for packed in proof:
                self._say(peer, packed)

    def _push(self, packed: bytes, name: bytes, bringer: PeerId | None) -> None:
        for peer, lane in self._lanes.items():
            if peer != bringer and name not in lane.quiet and not self._ledger.banned(peer):
                self._say(peer, packed)

    def _remember(self) -> None:
        """What we hold now is what others may hear of: once for all that one message brought."""
        self._digests[self._logs.digest()] = None
        if len(self._digests) > DIGESTS_REMEMBERED:
            del self._digests[next(iter(self._digests))]

    # --- comparing --------------------------------------------------------------------------------------------------

    def heard_digest(self, peer: PeerId, digest: bytes) -> None:
        """A member tells of its version vector. One that was never ours, and stays so, is asked about.

        Vectors differ by what is under way, so a single unknown one means nothing while news keeps coming.
        """
        if self._nursery is None or digest in self._digests:
            self._unknown.pop(peer, None)
            return
        count, before = self._unknown.get(peer, (0, b""))
        if count + 1 < UNKNOWN_MAX and digest != before:
            self._unknown[peer] = (count + 1, digest)
            if not self._waits_until_still:
                self._waits_until_still = True
                self._nursery.start_soon(self._ask_once_still)
            return
        self._ask_about(peer)

    async def _ask_once_still(self) -> None:
        """The last batch of a log has none after it that would show its loss."""
        heard_s = trio.current_time()
        while True:
            still_s = max(heard_s, self._news_s) + STILL_S
            if trio.current_time() >= still_s:
                break
            await trio.sleep_until(still_s)
        self._waits_until_still = False
        unknown = [peer for peer, (_, digest) in self._unknown.items() if digest not in self._digests]
        if unknown:
            self._ask_about(unknown[-1])

    def _ask_about(self, peer: PeerId) -> None:
        """Ask ``peer`` what it holds, or a neighbour where it is none."""
        assert self._nursery is not None
        self._unknown.pop(peer, None)
        neighbours = sorted(self._lanes)
        if neighbours:
            asked = peer if peer in self._lanes else self._rng.choice(neighbours)
            self._nursery.start_soon(self._compare_with, asked)

    async def _compare_with(self, peer: PeerId) -> None:
        if not self._ledger.banned(peer) and await self.exchange.ask(peer):
            # What was asked for is not pushed on: others may have it, and ask if they do not.
            self._say_to_all([Compare(digest=self._logs.digest())], but=peer)

    # --- on the wire ------------------------------------------------------------------------------------------------

    def _say_to_all(self, messages: list[Message], *, but: PeerId | None = None) -> None:
        for peer in self._lanes:
            if peer != but:
                for message in messages:
                    self._say(peer, message)

    def _say(self, peer: PeerId, item: bytes | Message) -> None:
        lane = self._lanes.get(peer)
        if lane is None:
            return
        if len(lane.queue) >= QUEUE_MAX:
            lane.queue.clear()
            item = Compare(digest=self._logs.digest())
        lane.queue.append(item)
        lane.filled.set()

    async def _speak(self, peer: PeerId, lane: _Lane) -> None:
        """Send what is queued for ``peer``, until the lane is closed: on one stream while there is something."""
        retry_s = RETRY_S_MIN
        with lane.scope:
            while True:
                await lane.filled.wait()
                try:
                    stream = await self._transport.open_stream(peer, LOG_PROTOCOL)
                    try:
                        # Nothing is ever read here, and what is queued is not for a peer that refuses to listen.
                        await stream.wait_agreed()
                        retry_s = RETRY_S_MIN
                        while lane.filled.is_set():
                            while lane.queue:
                                await send_message(stream, self._next(lane))
                            lane.filled = trio.Event()
                            with trio.move_on_after(LANE_QUIET_S):
                                await lane.filled.wait()
                    finally:
                        stream.close()
                except (TransportError, trio.BrokenResourceError) as error:
                    # What was under way may be lost, and nothing may follow that would show it.
                    log.debug("push failed", peer=peer, error=str(error))
                    if not lane.queue or not isinstance(lane.queue[-1], Compare):
                        self._say(peer, Compare(digest=self._logs.digest()))
                    await trio.sleep(retry_s)
                    if isinstance(error, ProtocolUnsupported):
                        # Just starting at first; for ever, a rendezvous, which holds no records.
                        retry_s = min(2 * retry_s, RETRY_S_MAX)

    def _next(self, lane: _Lane) -> Message:
        item = lane.queue.popleft()
        if not isinstance(item, bytes):
            return item
        batches, room_bytes = [item], self._limits.frame_bytes_max // 2
        while lane.queue and len(batches) < BATCHES_PER_MESSAGE_MAX:
            following = lane.queue[0]
            if not isinstance(following, bytes) or (room_bytes := room_bytes - len(following)) < 0:
                break
            batches.append(following)
            lane.queue.popleft()
        return Push(batches=batches)

    async def _listen(self, peer: PeerId, stream: FlowStream) -> None:
        try:
            while not self._ledger.banned(peer) and peer in self._company.peers():
                message = await receive_message(
                    stream, Push | Quiet | Loud | Compare, bytes_max=self._limits.frame_bytes_max
                )
                if message is None:
                    return
                self._heed(peer, message)
        except MalformedMessage as error:
            self._ledger.note(peer, "malformed", error.what)
            raise

    def _heed(self, peer: PeerId, message: Push | Quiet | Loud | Compare) -> None:
        lane = self._lanes.get(peer)
        match message:
            case Push(batches=batches):
                for packed in batches:
                    if not self._ledger.banned(peer):
                        self._take_pushed(packed, peer)
                self._remember()
            case Quiet(logs=names) if lane is not None:
                lane.quiet.update(name for name in _split(names) if self._logs.head(name) is not None)
            case Loud(logs=names) if lane is not None:
                lane.quiet.difference_update(_split(names))
                # Whoever brings us a log and asks us for it has lost its own source, and with it ours.
                self._dried_up(_split(names), peer)
            case Compare(digest=digest) if self._nursery is not None:
                if digest not in self._digests:
                    self._nursery.start_soon(self._compare_with, peer)
            case _:
                pass


def _split(names: bytes) -> list[bytes]:
    """Raises MalformedMessage unless they are whole."""
    if len(names) % LOG_NAME_BYTES:
        raise MalformedMessage(f"{len(names)} bytes of names that take {LOG_NAME_BYTES} each")
    return [names[at : at + LOG_NAME_BYTES] for at in range(0, len(names), LOG_NAME_BYTES)]
