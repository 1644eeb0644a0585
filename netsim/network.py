"""Transport in virtual time: a network whose latency, lines, partitions and crashes are under a scenario's command.

Owns the hosts and who can reach whom. A connection and its frames are ``netsim.connection``'s, what a frame meets on
its way ``netsim.links``'s. Deterministic from the injected generator (given ``netsim.determinism``).

What it does not show: handshakes, address translation beyond who can dial whom, the real library's bugs, the cost of
Python. Loss and reordering do not exist above TCP; a bad link is a slow one, a partition is a silence that ends
connections after ``Limits.peer_silence_s``.
"""

from __future__ import annotations

import contextlib
import math
import random
import zlib
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import trio

from netsim.connection import Frame, Side
from netsim.determinism import SimClock, sim_clock
from netsim.links import Cut, Cuts, Line, LinkModel
from p2p.connection_gater import ConnectionGater
from p2p.errors import NotAllowed, PeerUnreachable, ProtocolUnsupported, SwarmKeyMismatch
from p2p.flow import FlowStream
from p2p.limits import DEFAULT_LIMITS, Limits
from p2p.metered import Meter
from p2p.peer_events import PeerEvents
from p2p.protocols import Protocols
from p2p.service import open_service_nursery
from p2p.swarm_key import SwarmKey
from p2p.transport import PeerEvent, PeerId, PeerRecord, ProtocolName, StreamHandler, Traffic

__all__ = ["LinkModel", "SimHost", "SimNetwork", "address_of", "open_sim_network"]


HOME_LINK = LinkModel()
"""Between any two machines unless a scenario says otherwise."""


class Trace(Protocol):
    """Hears of every delivery; hosts by their numbers."""

    def delivered(
        self, at_s: float, source: int, target: int, kind: Frame, stream_id: int, payload: bytes
    ) -> None:
        """A frame is there."""


@dataclass(slots=True)
class Lines:
    """A machine's line, up and down."""

    up: Line
    down: Line


@contextlib.asynccontextmanager
async def open_sim_network(
    rng: random.Random, *, link: LinkModel = HOME_LINK, limits: Limits = DEFAULT_LIMITS
) -> AsyncIterator[SimNetwork]:
    """A network on the current clock, a SimClock; every pair of hosts is joined by ``link`` until told otherwise."""
    network = SimNetwork(rng, link, limits)
    try:
        yield network
    finally:
        network.close()


class SimNetwork:
    """All hosts and links. The verbs of a scenario: set_link, set_line, cut, heal, crash, vanish, break_all."""

    def __init__(self, rng: random.Random, link: LinkModel, limits: Limits) -> None:
        self.limits = limits
        self.clock: SimClock = sim_clock()
        self.rng = rng
        self.hosts: dict[PeerId, SimHost] = {}
        self.cuts = Cuts()
        self.trace: Trace | None = None
        self.deliveries = 0
        """Frames of all kinds."""
        self.messages = 0
        """Those of them that carry bytes of messages."""
        self.connections_broken = 0
        self.undiallable: set[PeerId] = set()
        """Hosts that can dial and not be dialled, as behind most NATs."""
        self.swarm_keys: dict[PeerId, SwarmKey] = {}
        """Of hosts in private swarms: two connect if they have the same, or none."""
        self.allowed: dict[PeerId, Collection[PeerId]] = {}
        """Of hosts that have an allow-list; holds when they come up."""
        self.addresses: dict[PeerId, str] = {}
        """Of hosts that are to come up elsewhere than at ``address_of`` their peer."""
        self.breaks_per_s = 0.0
        """How often each connection breaks by itself; holds for connections made from now on."""
        self._default_link = link
        self._link_of: Callable[[PeerId, PeerId], LinkModel] | None = None
        self._links: dict[tuple[PeerId, PeerId], LinkModel] = {}
        self._lines: dict[PeerId, Lines] = {}
        self._numbers: dict[PeerId, int] = {}
        self._closed = False

    def close(self) -> None:
        """What is still on its way arrives nowhere."""
        self._closed = True

    # --- a scenario's verbs -------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def open_host(self, peer: PeerId) -> AsyncIterator[SimHost]:
        """The transport of ``peer`` for the length of the block; a crash cancels the block.

        Leaving the block says goodbye to every peer. The id may come up again afterwards.
        """
        assert peer not in self.hosts, f"{peer} is up already"
        async with open_service_nursery() as nursery:
            host = self.hosts[peer] = SimHost(self, peer, nursery, self._number(peer), self._lines_of(peer))
            try:
                yield host
            finally:
                host.stop(broken=False)

    def set_link(self, source: PeerId, target: PeerId, model: LinkModel) -> None:
        """Change one direction for everything sent from now on."""
        self._links[source, target] = model
        if (host := self.hosts.get(source)) and (side := host.side(target)):
            side.link = model

    def draw_links(self, link_of: Callable[[PeerId, PeerId], LinkModel]) -> None:
        """Ask ``link_of(source, target)`` for each pair that meets, instead of the one link given."""
        self._link_of = link_of

    def set_line(
        self, peer: PeerId, *, up_bytes_per_s: float | None = None, down_bytes_per_s: float | None = None
    ) -> None:
        """What the machine of ``peer`` can send and receive in all, up or not; None leaves it as it is."""
        lines = self._lines_of(peer)
        if up_bytes_per_s is not None:
            lines.up.bytes_per_s = up_bytes_per_s
        if down_bytes_per_s is not None:
            lines.down.bytes_per_s = down_bytes_per_s

    def cut(self, left: Collection[PeerId], right: Collection[PeerId], *, one_way: bool = False) -> Cut:
        """Hold all frames from ``left`` to ``right``, and back unless ``one_way``, until the cut is healed.

        Connections across die after ``peer_silence_s`` of it, also of a one-way cut: pings are not answered.
        """
        cut = self.cuts.add(left, right, one_way=one_way)
        self.after(self.limits.peer_silence_s, self._expire, cut)
        return cut

    def heal(self, cuts: Iterable[Cut] | None = None) -> None:
        """End ``cuts``, or all: what was sent into them arrives now, where its connection still lives."""
        for cut in list(self.cuts.active if cuts is None else cuts):
            if cut in self.cuts.active:
                self.cuts.active.remove(cut)
        for host in list(self.hosts.values()):
            for side in host.sides():
                side.release()

    def crash(self, peer: PeerId) -> None:
        """Kill a host as ``kill -9`` would: its block is cancelled, its peers notice one latency later."""
        self.hosts[peer].stop(broken=True)

    def vanish(self, peer: PeerId) -> None:
        """Kill a host as a power cut would: its block is cancelled, its peers notice by its silence."""
        host = self.hosts[peer]
        for side in host.sides():
            far = side.other
            self.after(self.limits.peer_silence_s, far.lose, _silence(self.limits))
            side.lose("the power went")
        host.stop(broken=True)

    def break_all(self, peer: PeerId) -> None:
        """Break every connection of a host."""
        for side in self.hosts[peer].sides():
            self.break_connection(side)

    def break_connection(self, side: Side) -> None:
        """Break one connection, at both ends at once."""
        if not side.over:
            self.connections_broken += 1
            side.lose("the connection broke")
            side.other.lose("the connection broke")

    # --- the way there ------------------------------------------------------------------------------------------

    def after(self, delay_s: float, action: Callable[..., None], *args: object) -> None:
        """Run ``action(*args)`` in ``delay_s`` seconds, unless the network is closed by then."""
        self.clock.at(self.clock.current_time() + delay_s, self._unless_closed, action, args)

    def _unless_closed(self, action: Callable[..., None], args: tuple[object, ...]) -> None:
        if not self._closed:
            action(*args)

    def reachable(self, source: PeerId, target: PeerId) -> bool:
        """Whether packets pass in both directions right now."""
        return not (self.cuts.blocks(source, target) or self.cuts.blocks(target, source))

    def link(self, source: PeerId, target: PeerId) -> LinkModel:
        """The model of one direction."""
        if (model := self._links.get((source, target))) is not None:
            return model
        return self._link_of(source, target) if self._link_of is not None else self._default_link

    def connect(self, near: SimHost, far: SimHost) -> None:
        """Join two hosts, ``near`` having dialled; older connections between them end."""
        me, peer = near.local.peer, far.local.peer
        for host, other in ((near, peer), (far, me)):
            if stale := host.side(other):
                stale.lose("a newer connection took its place")
        ours = Side(near, peer, self.link(me, peer), outbound=True)
        theirs = Side(far, me, self.link(peer, me), outbound=False)
        ours.join(theirs)
        theirs.join(ours)
        near.add(ours, outbound=True)
        far.add(theirs, outbound=False)
        if self.breaks_per_s:
            self.after(self.rng.expovariate(self.breaks_per_s), self.break_connection, ours)

    def _expire(self, cut: Cut) -> None:
        # Healed meanwhile? Then this silence is over, and a newer one has its own check.
        if cut not in self.cuts.active:
            return
        for host in list(self.hosts.values()):
            for side in host.sides():
                if cut.touches(host.local.peer, side.peer):
                    side.lose(_silence(self.limits))

    def _number(self, peer: PeerId) -> int:
        return self._numbers.setdefault(peer, len(self._numbers))

    def _lines_of(self, peer: PeerId) -> Lines:
        if peer not in self._lines:
            self._lines[peer] = Lines(Line(self.clock, math.inf), Line(self.clock, math.inf))
        return self._lines[peer]


def _silence(limits: Limits) -> str:
    return f"no sign of life for {limits.peer_silence_s:g} s"


def address_of(peer: PeerId) -> str:
    """The address of a simulated host: an ordinary multiaddr, the same whenever the host comes up again."""
    number = zlib.crc32(peer.encode())
    return f"/ip4/10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}/tcp/4100"


class SimHost:
    """One peer's Transport in the simulated network; its tasks run in ``nursery``."""

    def __init__(
        self, network: SimNetwork, peer: PeerId, nursery: trio.Nursery, number: int, lines: Lines
    ) -> None:
        self.network = network
        self.number = number
        """Of the peer, in the order of first appearance."""
        self.lines = lines
        self.meter = Meter()
        self.protocols = Protocols(network.limits, nursery)
        self.gater = ConnectionGater(network.allowed.get(peer, ()))
        self.nursery = nursery
        self._local = PeerRecord(peer, (network.addresses.get(peer) or address_of(peer),))
        self._events = PeerEvents(network.limits.peer_events_max)
        self._sides: dict[PeerId, Side] = {}

    # --- Transport ----------------------------------------------------------------------------------------------

    @property
    def local(self) -> PeerRecord:
        """Our own id and simulated address."""
        return self._local

    def announce(self, addresses: Sequence[str], relayed: Sequence[str] = ()) -> None:
        """Tell others of more addresses than the one this host is at."""
        own = self.network.addresses.get(self._local.peer) or address_of(self._local.peer)
        self._local = PeerRecord(self._local.peer, tuple(dict.fromkeys((*addresses, own, *relayed))))

    def peers(self) -> frozenset[PeerId]:
        """The peers connected right now."""
        return self._events.connected

    def idle_peers(self) -> list[PeerId]:
        """The connected peers with whom no stream is open, sorted."""
        return sorted(peer for peer, side in self._sides.items() if not side.streams)

    def dialled(self, peer: PeerId) -> str | None:
        """The address at which we have dialled a connected peer; None where it has dialled us."""
        side = self._sides.get(peer)
        return None if side is None else side.dialled

    def host_of(self, peer: PeerId) -> str | None:
        """The IP address of a connected peer."""
        host = self.network.hosts.get(peer) if peer in self._sides else None
        return None if host is None else host.local.addresses[0].split("/")[2]

    def relay_of(self, peer: PeerId) -> PeerId | None:
        """Nobody: every simulated connection is direct."""

    def peer_events(self) -> trio.MemoryReceiveChannel[PeerEvent]:
        """A new subscription to connections coming and going."""
        return self._events.subscribe()

    def serve(self, protocol: ProtocolName, handler: StreamHandler) -> None:
        """Answer inbound streams of ``protocol`` with ``handler``."""
        self.protocols.serve(protocol, handler)

    def traffic(self) -> Traffic:
        """Totals since the host came up, and the streams open now."""
        return Traffic(
            bytes_sent=self.meter.bytes_sent,
            bytes_received=self.meter.bytes_received,
            streams_open=sum(len(side.streams) for side in self._sides.values()),
            streams_refused=self.protocols.streams_refused,
            connections_refused=dict(self.gater.refusals),
        )

    async def connect(self, record: PeerRecord, *, direct: bool = False) -> None:
        """Connect to a peer; takes one and a half round trips. Raises PeerUnreachable."""
        network = self.network
        me, peer = self._local.peer, record.peer
        if peer == me:
            raise PeerUnreachable("that is this node's own id")
        if not self.gater.allows(peer):
            raise PeerUnreachable(f"{peer} is not on this node's allow-list")
        if peer in self._sides:
            return await trio.lowlevel.checkpoint()
        if not record.addresses:
            raise PeerUnreachable(f"cannot reach {peer} (no address is known)")
        if peer in network.undiallable or not network.reachable(me, peer):
            await trio.sleep(network.limits.dial_timeout_s)
            raise PeerUnreachable(f"cannot reach {peer} (no address answered in time)")
        round_trip_s = network.link(me, peer).latency_s + network.link(peer, me).latency_s
        await trio.sleep(1.5 * round_trip_s)
        target = network.hosts.get(peer)
        at = [] if target is None else [a for a in record.addresses if a in target.local.addresses]
        if target is None or not at:
            raise PeerUnreachable(f"cannot reach {peer} (connection refused)")
        if peer in self._sides:  # the peer dialled us at the same moment
            return None
        if not network.reachable(me, peer):
            await trio.sleep(network.limits.dial_timeout_s)
            raise PeerUnreachable(f"cannot reach {peer} (no address answered in time)")
        if network.swarm_keys.get(me) != network.swarm_keys.get(peer):
            if peer in network.swarm_keys:
                target.gater.refuse("swarm-key", f"refused {me}")
            raise SwarmKeyMismatch(f"cannot reach {peer} (one side lacks the other's swarm key)")
        if not target.gater.allows(me):
            target.gater.refuse("not-allowed", f"{me} is not on the allow-list")
            raise NotAllowed(f"cannot reach {peer} (it hung up when it knew who dials)")
        if max(len(self._sides), len(target._sides)) >= network.limits.peers_max or target.inbound_full():
            raise PeerUnreachable(f"cannot reach {peer} (too many connections)")
        network.connect(self, target)
        self._sides[peer].dialled = at[0]
        return None

    async def open_stream(self, peer: PeerId, protocol: ProtocolName) -> FlowStream:
        """A stream to a connected peer, which may be written to at once. Raises PeerUnreachable."""
        await trio.lowlevel.checkpoint()
        if (side := self._sides.get(peer)) is None:
            raise PeerUnreachable(f"not connected to {peer}")
        return side.open_stream(protocol)

    async def answers_at(self, peer: PeerId, address: str) -> None:
        """Whether ``peer`` answers at ``address``; takes one and a half round trips. Raises PeerUnreachable."""
        network, me = self.network, self._local.peer
        if peer in network.undiallable or not network.reachable(me, peer):
            await trio.sleep(network.limits.dial_timeout_s)
            raise PeerUnreachable(f"{address}: no answer in time")
        await trio.sleep(1.5 * (network.link(me, peer).latency_s + network.link(peer, me).latency_s))
        target = network.hosts.get(peer)
        if target is None or address not in target.local.addresses:
            raise PeerUnreachable(f"{address}: connection refused")

    async def hold_reservation(self, relay: PeerId, held: Callable[[], None]) -> None:
        """Nobody relays here. Raises ProtocolUnsupported."""
        await trio.lowlevel.checkpoint()
        raise ProtocolUnsupported(f"{relay} carries no connections")

    def offer_relay(self, offered: bool) -> None:
        """Nobody relays here."""

    async def disconnect(self, peer: PeerId, reason: str) -> None:
        """Close the connection to ``peer``."""
        if side := self._sides.get(peer):
            side.close(reason)
        await trio.lowlevel.checkpoint()

    # --- the simulator's side -----------------------------------------------------------------------------------

    def sides(self) -> list[Side]:
        """Our ends of all connections."""
        return list(self._sides.values())

    def side(self, peer: PeerId) -> Side | None:
        """Our end of the connection to ``peer``, if there is one."""
        return self._sides.get(peer)

    def inbound_full(self) -> bool:
        """Whether no more connections are taken that others make."""
        inbound = sum(side.dialled is None for side in self._sides.values())
        return inbound >= self.network.limits.peers_inbound_max

    def add(self, side: Side, *, outbound: bool) -> None:
        """A connection is up."""
        self._sides[side.peer] = side
        self._events.up(side.peer, outbound=outbound)

    def forget(self, side: Side, reason: str, *, broken: bool) -> None:
        """A connection has ended."""
        if self._sides.get(side.peer) is side:
            del self._sides[side.peer]
            self._events.down(side.peer, reason, broken=broken)

    def stop(self, *, broken: bool) -> None:
        """The host is gone, with or without a word to its peers; its tasks and block are cancelled."""
        if self.network.hosts.get(self._local.peer) is self:
            del self.network.hosts[self._local.peer]
        for side in self.sides():
            side.close("this node is stopping", broken=broken)
        self._events.close()
        self.nursery.cancel_scope.cancel()
