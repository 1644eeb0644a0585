"""Whether others can dial this peer, and by which way where they cannot.

Owns REACH_PROTOCOL: neighbours are asked to dial back, and asked themselves they dial nobody but the host that the
question came from. Owns what follows from the answers: the addresses others are told of, whether this peer relays for
others, the reservations at relays where it cannot be dialled itself, and the attempts to replace a relayed connection
by a direct one. Never decides whom to be connected with (``gossip.links``).

Only neighbours who see this peer at an address of the internet can tell what the internet can do; on a local network
alone nobody is asked, and nothing changes. One who lies costs a detour, or a dial that fails, until the next look.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import structlog
import trio

from gossip.address_book import AddressBook, can_be_dialled
from gossip.address_ranges import is_routed, most_diverse
from gossip.ledger import PeerLedger
from gossip.links import Links
from gossip.messages import REACH_PROTOCOL, DialBack, WantDialBack
from p2p.circuits import circuit_address, split_circuit
from p2p.errors import CallRefused, MalformedMessage, TransportError
from p2p.limits import Limits
from p2p.listening import multiaddr_of
from p2p.rpc import call, serve_calls
from p2p.transport import PeerId, PeerRecord, Transport

ASKED_MAX = 4
"""Neighbours who are asked at a time."""
LOOK_S = 2.0
"""While something is to be done about relays."""
CALM_LOOK_S = 10.0
ASKED_AGAIN_S = 600.0
"""Once there was an answer: routers are switched off and laptops carried home."""
RELAYS_WANTED = 2
"""One may go at any moment."""
DECLINED_S = 300.0
"""Until a relay that declined, or a peer that could not be dialled directly, is tried again."""
PORTS_MAX = 4
"""Of one question."""
DIAL_BACKS_MAX = 4
"""Questions that are worked on at once, one of each peer."""

Reach = Literal["unknown", "public", "private"]
"""``public``: others can dial this peer. ``private``: they cannot. ``unknown``: nobody could tell so far."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What follows from what neighbours have said."""

    reach: Reach
    addresses: tuple[str, ...]
    """At which most of them got an answer."""


def judge(views: Sequence[DialBack], claimed: Sequence[str]) -> Verdict:
    """What those say together who see this peer on the internet: at least half of them must have got an answer.

    ``claimed``: the addresses they were asked about. An answer from anywhere but the host that they see, at a port of
    these, was never asked for, and others are not told of it.
    """
    answers = [
        set(view.answered) & set(where_to_dial(view.host, claimed)) for view in views if is_routed(view.host)
    ]
    if not answers:
        return Verdict("unknown", ())
    counted = Counter(address for answered in answers for address in answered)
    agreed = tuple(sorted(address for address, votes in counted.items() if 2 * votes >= len(answers)))
    reached = sum(bool(answered) for answered in answers)
    return Verdict("public" if 2 * reached >= len(answers) else "private", agreed)


def where_to_dial(host: str, claimed: Sequence[str]) -> list[str]:
    """Where an asker whose packets come from ``host`` may be dialled: there and nowhere else, at the ports it claims.

    So nobody can have a third party dialled. Names and ways through relays are passed over.
    """
    ports = dict.fromkeys(
        port
        for address in claimed
        if split_circuit(address) is None
        for _, family, _, _, port in [address.split("/")]
        if family in ("ip4", "ip6")
    )
    return [multiaddr_of(host, int(port)) for port in list(ports)[:PORTS_MAX]]


class Reachability:
    """What one peer knows of its own reachability, and does about it."""

    def __init__(
        self, *, transport: Transport, links: Links, book: AddressBook, ledger: PeerLedger, limits: Limits
    ) -> None:
        self.reach: Reach = "unknown"
        self.mapped: tuple[str, ...] = ()
        """Where a router says that it forwards to this peer."""
        self._transport = transport
        self._links = links
        self._book = book
        self._ledger = ledger
        self._limits = limits
        self._confirmed: tuple[str, ...] = ()
        self._relays: dict[PeerId, str] = {}
        """At which this peer holds a reservation, and its address through each."""
        self._asking: dict[PeerId, trio.CancelScope] = {}
        """Relays that are asked or hold a reservation of ours."""
        self._ask_at_s = 0.0
        self._not_before_s: dict[PeerId, float] = {}
        """When to try a relay again, or a direct connection."""
        self._dialled_back: set[PeerId] = set()
        self._on_change: list[Callable[[], None]] = []

    @property
    def relays(self) -> list[PeerId]:
        """Through whom this peer can be reached, sorted."""
        return sorted(self._relays)

    def mapped_at(self, addresses: Sequence[str]) -> None:
        """A router says that it forwards ``addresses`` to this peer, and no others: ask about them, and soon."""
        self.mapped = tuple(addresses)
        self._ask_at_s = 0.0

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call ``callback()`` when others have to be told of other addresses."""
        self._on_change.append(callback)

    async def run(self) -> None:
        """Look, ask and answer until cancelled."""
        serve_calls(
            self._transport,
            REACH_PROTOCOL,
            WantDialBack,
            self._dial_back,
            limits=self._limits,
            on_malformed=lambda peer, error: self._ledger.note(peer, "malformed", error.what),
        )
        await trio.sleep(LOOK_S)
        async with trio.open_nursery() as nursery:
            while True:
                await self._look()
                self._keep_relays(nursery)
                busy = self._replace_circuits(nursery) or self.reach == "private"
                await trio.sleep(LOOK_S if busy else CALM_LOOK_S)

    # --- can we be dialled? -------------------------------------------------------------------------------------

    async def _look(self) -> None:
        if not self._links.neighbours:
            # Wherever this peer is when it has some again, it has to be asked anew.
            self._ask_at_s = 0.0
            self._learn(Verdict("unknown", ()))
        elif (now_s := trio.current_time()) >= self._ask_at_s:
            # Before the question, so that a mapping which is made meanwhile leads to another one.
            self._ask_at_s = now_s + ASKED_AGAIN_S
            verdict = await self._ask_around()
            if verdict.reach != "unknown":
                self._learn(verdict)
            else:
                self._ask_at_s = 0.0

    async def _ask_around(self) -> Verdict:
        """What a few neighbours say, in as many places of the internet as there are."""
        local = [each for each in self._transport.local.addresses if split_circuit(each) is None]
        own = list(dict.fromkeys((*self.mapped, *local)))[: self._limits.addresses_per_peer_max]
        seen = {peer: self._transport.host_of(peer) for peer in self._links.neighbours}
        near = [(peer, multiaddr_of(host, 1)) for peer, host in seen.items() if host and is_routed(host)]
        views: list[DialBack] = []

        async def ask(peer: PeerId) -> None:
            try:
                view = await call(
                    self._transport,
                    peer,
                    REACH_PROTOCOL,
                    WantDialBack(addresses=own),
                    DialBack,
                    timeout_s=self._limits.call_timeout_s,
                )
            except (TransportError, MalformedMessage) as error:
                log.debug("not dialled back", peer=peer, error=error.what)
            else:
                views.append(view)

        if own:
            async with trio.open_nursery() as nursery:
                for peer in most_diverse(near, ASKED_MAX):
                    nursery.start_soon(ask, peer)
        return judge(views, own)

    def _learn(self, verdict: Verdict) -> None:
        if verdict.reach != self.reach:
            log.info("reachability", reach=verdict.reach, addresses=verdict.addresses)
        self.reach = verdict.reach
        self._confirmed = verdict.addresses
        self._transport.offer_relay(verdict.reach == "public")
        self._tell()

    def _tell(self) -> None:
        before = self._transport.local.addresses
        self._transport.announce(self._confirmed, list(self._relays.values()))
        if self._transport.local.addresses != before:
            for callback in self._on_change:
                callback()

    # --- dialling others back -----------------------------------------------------------------------------------

    async def _dial_back(self, peer: PeerId, request: WantDialBack) -> DialBack:
        if self._ledger.shuns(peer):
            raise CallRefused("banned", "this peer dials nobody back for you now")
        host = self._transport.host_of(peer)
        if host is None:
            raise CallRefused("relayed", "a relay stands between, so it cannot be told where the asker is")
        if peer in self._dialled_back or len(self._dialled_back) >= DIAL_BACKS_MAX:
            raise CallRefused("busy", "too many have asked to be dialled back; ask another peer, or later")
        chars_max = self._limits.address_chars_max
        usable = [each for each in request.addresses if can_be_dialled(each, chars_max=chars_max)]
        answered: list[str] = []

        async def dial(address: str) -> None:
            try:
                await self._transport.answers_at(peer, address)
            except TransportError as error:
                log.debug("cannot be dialled", peer=peer, error=error.what)
            else:
                answered.append(address)

        self._dialled_back.add(peer)
        try:
            async with trio.open_nursery() as nursery:
                for address in where_to_dial(host, usable):
                    nursery.start_soon(dial, address)
        finally:
            self._dialled_back.discard(peer)
        return DialBack(host=host, answered=sorted(answered))

    # --- being reached through relays ---------------------------------------------------------------------------

    def _keep_relays(self, nursery: trio.Nursery) -> None:
        now_s, neighbours = trio.current_time(), set(self._links.neighbours)
        self._not_before_s = {peer: at_s for peer, at_s in self._not_before_s.items() if at_s > now_s}
        for relay, asking in self._asking.items():
            if relay not in neighbours or self.reach != "private":
                asking.cancel()
        if self.reach == "private" and len(self._asking) < RELAYS_WANTED:
            for relay, address in self._candidates(RELAYS_WANTED - len(self._asking)).items():
                self._asking[relay] = trio.CancelScope()
                nursery.start_soon(self._rely_on, relay, address)

    def _candidates(self, count: int) -> dict[PeerId, str]:
        """Neighbours whom we have dialled on the internet, so others can: few, in different places."""
        dialled = {peer: self._transport.dialled(peer) for peer in self._links.neighbours}
        fit = [
            (peer, address)
            for peer, address in dialled.items()
            if address is not None
            and split_circuit(address) is None
            and is_routed(self._transport.host_of(peer) or "")
            and peer not in self._asking
            and peer not in self._not_before_s
        ]
        return most_diverse(fit, count)

    async def _rely_on(self, relay: PeerId, address: str) -> None:
        try:
            with self._asking[relay]:
                await self._transport.hold_reservation(relay, partial(self._held, relay, address))
        except TransportError as error:
            log.debug("no relay", peer=relay, error=error.what)
            self._not_before_s[relay] = trio.current_time() + DECLINED_S
        except MalformedMessage as error:
            self._ledger.note(relay, "malformed", error.what)
            self._not_before_s[relay] = trio.current_time() + DECLINED_S
        finally:
            del self._asking[relay]
            if self._relays.pop(relay, None) is not None:
                log.info("relay lost", peer=relay)
                self._tell()

    def _held(self, relay: PeerId, address: str) -> None:
        log.info("reachable through a relay", peer=relay)
        self._relays[relay] = circuit_address(address, relay)
        self._tell()

    # --- doing without relays -----------------------------------------------------------------------------------

    def _replace_circuits(self, nursery: trio.Nursery) -> bool:
        """Whoever is connected through a relay is dialled directly, from both ends: one of them may get through.

        Returns whether anybody is.
        """
        circuits = [peer for peer in self._links.neighbours if self._transport.relay_of(peer) is not None]
        for peer in circuits:
            if peer not in self._not_before_s:
                self._not_before_s[peer] = trio.current_time() + DECLINED_S
                nursery.start_soon(self._dial_directly, peer)
        return bool(circuits)

    async def _dial_directly(self, peer: PeerId) -> None:
        record = self._book.record(peer)
        direct = [each for each in record.addresses if split_circuit(each) is None] if record else []
        if not direct:
            return
        try:
            await self._transport.connect(PeerRecord(peer, tuple(direct)), direct=True)
        except TransportError as error:
            log.debug("only through a relay", peer=peer, error=error.what)
        else:
            log.info("connected directly, without the relay", peer=peer)
