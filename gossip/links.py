"""Staying connected: dial, greet, replace what is lost, let go of whom the ledger has banned.

Owns HELLO_PROTOCOL and the set of greeted neighbours. Never judges a peer (``gossip.ledger``) and never picks an
address (``gossip.address_book``). Bootstrap peers are ordinary peers that are retried for ever; a node that has
once met the swarm does not need them.

Every second, and whenever a connection comes or goes, the set of connections is compared with what is wanted:
``links_target`` neighbours, all of our run, none banned. Even a node with enough neighbours dials one more now and
then, so that two halves of a healed partition find each other again. Whoever is reached for an exchange or a merge
stays connected too, until there are many: then those that have not been used for longest are let go.

Who dials us has chosen us, and may be many under one roof. So a third of ``links_target`` are links that we have
dialled ourselves, into different address ranges as far as members are known in several; the transport keeps room for
them (``Limits.peers_inbound_max``). Visits (``gossip.visits``) are connections that are no links and not counted.

A node may rest, for as long as it likes: then it dials nobody, and whoever comes is told so and shown out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from typing import TypeVar

import msgspec
import structlog
import trio

from gossip.address_book import AddressBook, AddressSource, parse_peer_address
from gossip.address_ranges import most_diverse, range_of
from gossip.anti_entropy import offer_all
from gossip.ledger import PeerLedger
from gossip.messages import (
    HELLO_PROTOCOL,
    PROTOCOL_VERSION,
    VERSIONS_APART_MAX,
    Heartbeat,
    Hello,
    Message,
    Notices,
    SpecBytes,
    WantPeers,
    WantSpec,
)
from gossip.newcomer import PEERS_ASKED
from gossip.notices import NoticeTable
from gossip.visits import Visits
from p2p.errors import (
    CallRefused,
    MalformedMessage,
    PeerUnreachable,
    ProtocolUnsupported,
    SwarmKeyMismatch,
    TransportError,
)
from p2p.limits import Limits
from p2p.peer_events import PeerEvents
from p2p.rpc import call, serve_calls
from p2p.transport import PeerDown, PeerEvent, PeerId, PeerRecord, Transport

LOOK_S = 1.0
CALM_LOOK_S = 10.0
"""Between two looks while no link is missing, new or one too many; whatever changes that ends the wait."""
DIALS_MAX = 8
"""Dials in flight at once."""
EXPLORE_S = 20.0
"""Between dials beyond ``links_target``."""
HELLO_WAIT_S = 15.0
"""A connection that is not greeted by then is closed; a newcomer may be fetching the spec until then."""
RESTING_WAIT_S = 2.0
"""The same while this node rests: as long as a greeting takes to come and to be refused."""
PEERS_ASKED_AFTER_S = 0.5
"""Between greeting a peer and asking it for others."""
SAVE_S = 10.0
SAVED_AT_ONCE = 100
"""Larger books are written less often."""
CROWDED_SHARE, ROOMY_SHARE = 0.75, 0.5
"""With more than the first share of ``peers_max`` connected, idle connections are closed down to the second."""
UNUSED_S = 5.0
"""Connections used more recently are kept: whoever has just connected is about to ask for something."""
MAKE_ROOM_S = 0.1
ANCHOR_AFTER_S = 600.0
"""A link that we have dialled and that has lasted for so long is one to begin the next life with."""
REFUSALS = ("wrong-run", "version", "banned", "resting")
"""Codes a greeting is refused with; what else a peer may write there does not become a counter's name."""

T = TypeVar("T", bound=msgspec.Struct)

log = structlog.get_logger()


class Links:
    """Keeps this node connected to its swarm.

    ``bootstrap``: ``ADDRESS/p2p/PEER`` texts; raises AddressError for one that is not. ``spec``: the canonical
    bytes of the run spec, whose BLAKE3 digest is ``run``. ``guests_max``: how many of other runs may visit at once.
    """

    def __init__(
        self,
        *,
        transport: Transport,
        book: AddressBook,
        ledger: PeerLedger,
        notices: NoticeTable,
        run: bytes,
        spec: bytes,
        agent: str,
        bootstrap: Sequence[str],
        limits: Limits,
        rng: random.Random,
        guests_max: int = 0,
    ) -> None:
        self.visits = Visits(transport, guests_max=guests_max)
        self._transport = transport
        self._book = book
        self._ledger = ledger
        self._notices = notices
        self._run = run
        self._spec = spec
        self._agent = agent
        self._limits = limits
        self._rng = rng
        self._connected_s: dict[PeerId, float] = {}
        self._used_s: dict[PeerId, float] = {}
        """When a connected peer was last reached for."""
        self._greeted = PeerEvents(limits.peer_events_max)
        self._dialling: set[PeerId] = set()
        self._own_choices = -(-limits.links_target // 3)
        self._wake = trio.Event()
        self._last_refusal = ""
        for text in bootstrap:
            peer, address = parse_peer_address(text, chars_max=limits.address_chars_max)
            book.add(peer, [address], "bootstrap")

    @property
    def neighbours(self) -> list[PeerId]:
        """Connected peers of our run, sorted."""
        return sorted(self.peers())

    def peers(self) -> frozenset[PeerId]:
        """The same as a set: as Company, links are those that have been greeted."""
        return self._greeted.connected & self._transport.peers()

    def peer_events(self) -> trio.MemoryReceiveChannel[PeerEvent]:
        """A new subscription to neighbours coming and going."""
        return self._greeted.subscribe()

    @property
    def problem(self) -> str:
        """Why this node has no neighbours, with what is being tried; empty when it has some or expects none."""
        if self._ledger.resting:
            return self._ledger.resting
        if self.neighbours:
            return ""
        if self._last_refusal:
            return self._last_refusal
        return "; ".join(
            f"no answer from bootstrap peer {peer}: {error}" for peer, error in self._book.failing()
        )

    async def run(self) -> None:
        """Serve greetings and keep the links until cancelled."""
        self._ledger.on_ban(lambda peer, problem: self._wake.set())
        self._notices.on_change(self._learn_addresses)
        serve_calls(
            self._transport,
            HELLO_PROTOCOL,
            Hello | WantSpec | WantPeers,
            self._answer,
            limits=self._limits,
            on_malformed=lambda peer, error: self._ledger.note(peer, "malformed", error.what),
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow_events, self._transport.peer_events())
            nursery.start_soon(self._keep, nursery)
            nursery.start_soon(self._explore, nursery)
            nursery.start_soon(self._save_regularly)

    async def reach(self, peer: PeerId) -> None:
        """Connect to ``peer`` if it is not connected. Raises PeerUnreachable.

        Waits while every connection there may be is in use.
        """
        if self._ledger.resting:
            raise PeerUnreachable("this node is in touch with nobody for now")
        self._used_s[peer] = trio.current_time()
        await self.visits.wait_over(peer)
        if peer in self._transport.peers():
            return
        record = self._book.record(peer)
        if record is None or self._ledger.banned(peer):
            raise PeerUnreachable(f"{peer} is {'banned' if record else 'at no known address'}")
        while len(self._transport.peers() | self._dialling) >= self._limits.peers_max - 1:
            await self._let_go(unused_s=0.0)
            await trio.sleep(MAKE_ROOM_S)
        await self._dial(record)
        if peer not in self._transport.peers():
            raise PeerUnreachable(f"{peer} did not answer at {', '.join(record.addresses)}")

    def try_soon(self, record: PeerRecord, source: AddressSource) -> None:
        """A hint from outside of the swarm: ``record`` may be a member, which a dial and a greeting will tell."""
        if self._book.add(record.peer, record.addresses, source):
            self._wake.set()

    # --- resting ----------------------------------------------------------------------------------------------

    def rest(self, why: str) -> None:
        """Dial nobody and greet nobody until ``resume``; ``why`` is for people.

        Who is linked stays so until ``part_with_all``, so that there is somebody to say goodbye to.
        """
        self._ledger.resting = why

    def resume(self) -> None:
        """Be linked again, as after a long sleep."""
        self._ledger.resting = ""
        self._wake.set()

    async def part_with_all(self, reason: str) -> None:
        """Close every connection in order."""
        async with trio.open_nursery() as nursery:
            for peer in sorted(self._transport.peers()):
                nursery.start_soon(self._transport.disconnect, peer, reason)

    # --- the set of links -------------------------------------------------------------------------------------

    async def _follow_events(self, events: trio.MemoryReceiveChannel[PeerEvent]) -> None:
        async for event in events:
            if isinstance(event, PeerDown):
                if event.peer in self._greeted.connected:
                    log.info("disconnected", peer=event.peer, reason=event.reason)
                self._forget(event.peer, event.reason, broken=event.broken)
            self._wake.set()

    def _forget(self, peer: PeerId, reason: str = "gone", *, broken: bool = False) -> None:
        self._connected_s.pop(peer, None)
        self._used_s.pop(peer, None)
        self._greeted.down(peer, reason, broken=broken)
        self.visits.left(peer)

    async def _keep(self, nursery: trio.Nursery) -> None:
        while True:
            self._wake = trio.Event()
            for peer in self._connected_s.keys() - self._transport.peers():
                self._forget(peer)
            await self._part_with_unwelcome()
            await self._let_go(unused_s=UNUSED_S)
            for peer in sorted(self._transport.peers() - self._connected_s.keys()):
                self._connected_s[peer] = trio.current_time()
                if not self.visits.is_host(peer) and not self._ledger.resting:
                    nursery.start_soon(self._greet, peer)
            peers = self._links()
            lacking = self._limits.links_target - len(peers | self._dialling)
            if lacking > 0:
                self._dial_some(nursery, lacking)
                settled = False
            else:
                settled = (
                    not self._choose_some(nursery)
                    and peers <= self._greeted.connected
                    and not self._crowded()
                )
            with trio.move_on_after(CALM_LOOK_S if settled else LOOK_S):
                await self._wake.wait()

    async def _explore(self, nursery: trio.Nursery) -> None:
        while True:
            await trio.sleep(EXPLORE_S * self._rng.uniform(0.5, 1.5))
            if len(self._transport.peers()) < self._limits.peers_max // 2:
                self._dial_some(nursery, 1)

    def _dial_some(self, nursery: trio.Nursery, count: int, outside: Collection[str] = ()) -> bool:
        """Begin to dial up to ``count`` peers, at addresses ``outside`` of these ranges; whether there was any."""
        count = min(count, DIALS_MAX - len(self._dialling))
        if count <= 0:
            return False
        busy = self._transport.peers() | self._dialling
        due = self._book.due(count, exclude=busy, now_s=trio.current_time(), outside=outside)
        welcome = [record for record in due if not self._ledger.shuns(record.peer)]
        for record in welcome:
            self._dialling.add(record.peer)
            nursery.start_soon(self._dial, record)
        return bool(welcome)

    def _choose_some(self, nursery: trio.Nursery) -> bool:
        """Try one more link of our own choice, if they are too few or lead into too few address ranges.

        Returns whether there is anybody to try: most of those who claim to be elsewhere may lie.
        """
        chosen = self._chosen()
        ranges = {range_of(address) for address in chosen.values()}
        if len(ranges) < self._own_choices and self._dial_some(nursery, 1, outside=ranges):
            return True
        return len(chosen) < self._own_choices and self._dial_some(nursery, 1)

    def _chosen(self) -> dict[PeerId, str]:
        """The peers that we have dialled, and where, those connected for longest first."""
        dialled = {peer: self._transport.dialled(peer) for peer in self._links()}
        chosen = {peer: address for peer, address in dialled.items() if address is not None}
        return {peer: chosen[peer] for peer in sorted(chosen, key=self._age_order)}

    def _links(self) -> set[PeerId]:
        """The connected peers, those left out that are here, or we there, for a question only."""
        return {peer for peer in self._transport.peers() if not self.visits.is_stranger(peer)}

    def _age_order(self, peer: PeerId) -> tuple[float, PeerId]:
        return self._connected_s.get(peer, trio.current_time()), peer

    async def _dial(self, record: PeerRecord) -> None:
        self._dialling.add(record.peer)
        try:
            await self._transport.connect(record)
        except TransportError as error:
            self._book.failed(record.peer, error.what, trio.current_time())
            if isinstance(error, SwarmKeyMismatch):
                self._last_refusal = error.what
        finally:
            self._dialling.discard(record.peer)

    async def _part_with_unwelcome(self) -> None:
        now_s = trio.current_time()
        wait_s = RESTING_WAIT_S if self._ledger.resting else HELLO_WAIT_S
        for peer in sorted(self._transport.peers()):
            if self._ledger.banned(peer):
                await self._transport.disconnect(peer, f"banned: {self._ledger.last_problem(peer)}")
            elif peer not in self._greeted.connected and now_s - self._connected_s.get(peer, now_s) > wait_s:
                await self._transport.disconnect(peer, "no greeting")

    async def _let_go(self, *, unused_s: float) -> None:
        """In a crowd, close the connections that are idle and have not been used for longest."""
        if not self._crowded():
            return
        connected = len(self._transport.peers())
        keep = max(int(ROOMY_SHARE * self._limits.peers_max), self._limits.links_target)
        latest_s = trio.current_time() - unused_s
        needed = most_diverse(self._chosen().items(), self._own_choices)
        used_s = {peer: self._last_use_s(peer) for peer in self._transport.idle_peers() if peer not in needed}
        unused = sorted((peer for peer, at_s in used_s.items() if at_s <= latest_s), key=used_s.__getitem__)
        for peer in unused[: connected - keep]:
            await self._transport.disconnect(peer, "not needed for now")

    def _crowded(self) -> bool:
        return len(self._transport.peers()) > CROWDED_SHARE * self._limits.peers_max

    def _last_use_s(self, peer: PeerId) -> float:
        return max(self._used_s.get(peer, 0.0), self._connected_s.get(peer, trio.current_time()))

    # --- greeting ---------------------------------------------------------------------------------------------

    def _hello(self) -> Hello:
        addresses = self._transport.local.addresses[: self._limits.addresses_per_peer_max]
        return Hello(run=self._run, version=PROTOCOL_VERSION, agent=self._agent, addresses=list(addresses))

    async def _greet(self, peer: PeerId) -> None:
        try:
            theirs = await self._ask(peer, self._hello(), Hello)
            self._check(theirs)
        except CallRefused as refused:
            if refused.code == "wrong-run" and self.visits.admit(peer):
                return
            self._last_refusal = f"{peer} refused us: {refused.what}"
            await self._part(peer, refused.code if refused.code in REFUSALS else "refused", refused.what)
        except MalformedMessage as error:
            await self._part(peer, "malformed", error.what)
        except ProtocolUnsupported:
            # A newcomer still fetching the spec has nothing to greet with; it greets us, or leaves by HELLO_WAIT_S.
            log.debug("not greeted", peer=peer)
        except TransportError as error:
            self._book.failed(peer, error.what, trio.current_time())
            await self._transport.disconnect(peer, f"no greeting: {error.what}")
        else:
            self._welcome(peer, theirs)
            # Whoever came at the same time as we did is told to it meanwhile.
            await trio.sleep(PEERS_ASKED_AFTER_S)
            if len(self._transport.peers()) < self._limits.links_target:
                await self._ask_for_peers(peer)

    async def _part(self, peer: PeerId, reason: str, detail: str) -> None:
        self._ledger.note(peer, reason, detail)
        self._book.failed(peer, detail, trio.current_time(), for_long=reason in ("wrong-run", "resting"))
        await self._transport.disconnect(peer, detail)

    def _check(self, hello: Hello) -> None:
        if hello.run != self._run:
            raise CallRefused(
                "wrong-run", f"one side is in run {self._run.hex()[:12]}, the other in {hello.run.hex()[:12]}"
            )
        if abs(hello.version - PROTOCOL_VERSION) > VERSIONS_APART_MAX:
            raise CallRefused(
                "version", f"one side speaks version {PROTOCOL_VERSION}, the other {hello.version}"
            )

    def _welcome(self, peer: PeerId, hello: Hello) -> None:
        self._book.add(peer, hello.addresses, "hello")
        self._book.succeeded(peer)
        self._last_refusal = ""
        if self.visits.is_host(peer):
            return
        if peer not in self._greeted.connected:
            self._greeted.up(peer, outbound=self._transport.dialled(peer) is not None)
            log.info("connected", peer=peer, agent=hello.agent)

    async def _ask_for_peers(self, peer: PeerId) -> None:
        """Peer exchange: heartbeats carry their authors' signed addresses, and go through the table's checks."""
        try:
            known = await self._ask(peer, WantPeers(count=PEERS_ASKED), Notices)
        except (TransportError, MalformedMessage):
            return
        offer_all(known.notices, peer, self._notices, self._ledger)

    async def _ask(self, peer: PeerId, request: msgspec.Struct, reply_type: type[T]) -> T:
        return await call(
            self._transport, peer, HELLO_PROTOCOL, request, reply_type, timeout_s=self._limits.call_timeout_s
        )

    async def _answer(
        self, peer: PeerId, request: Hello | WantSpec | WantPeers
    ) -> Hello | SpecBytes | Notices:
        self._ledger.admit(peer)
        match request:
            case Hello():
                self._check(request)
                self._welcome(peer, request)
                return self._hello()
            case WantSpec(run=run):
                if run != self._run:
                    raise CallRefused("wrong-run", f"this peer is in run {self._run.hex()[:12]}")
                return SpecBytes(spec=self._spec)
            case WantPeers(count=count):
                authors = self._notices.authors()
                chosen = self._rng.sample(authors, min(count, len(authors)))
                beats = (self._notices.packed(author, "heartbeat") for author in chosen)
                return Notices(notices=[beat for beat in beats if beat is not None])

    # --- addresses --------------------------------------------------------------------------------------------

    def _learn_addresses(self, author: PeerId, kind: str, body: Message | None) -> None:
        if isinstance(body, Heartbeat) and self._book.add(author, body.addresses, "heartbeat"):
            self._wake.set()

    async def _save_regularly(self) -> None:
        while True:
            await trio.sleep(SAVE_S * max(1.0, len(self._book) / SAVED_AT_ONCE))
            latest_s = trio.current_time() - ANCHOR_AFTER_S
            self._book.name_anchors(
                (peer, address)
                for peer, address in self._chosen().items()
                if peer in self._greeted.connected and self._connected_s.get(peer, math.inf) <= latest_s
            )
            try:
                await self._book.save()
            except OSError as error:
                log.warning("address book not saved", error=error.strerror)
