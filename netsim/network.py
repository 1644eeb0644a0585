"""Transport in virtual time: a network whose latency, partitions and crashes are under a scenario's command.

Owns the hosts, the connections between them and the one task that delivers everything, in order of due time,
from a heap. Streams are the very ``p2p.flow.FlowStream`` of the real network, so flow control, time limits and
errors are not imitated but shared. Deterministic from the injected generator (given ``netsim.determinism``).

What it does not show: handshakes, NAT, the real library's bugs, the cost of Python. Loss and reordering do not
exist above TCP; a bad link is a slow one, a partition is a silence that ends connections after
``Limits.peer_silence_s``.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import random
import zlib
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass, replace

import trio

from p2p.errors import PeerUnreachable
from p2p.flow import FlowStream, Meter
from p2p.limits import DEFAULT_LIMITS, Limits
from p2p.peer_events import PeerEvents
from p2p.protocols import Protocols
from p2p.service import open_service_nursery
from p2p.transport import PeerEvent, PeerId, PeerRecord, ProtocolName, StreamHandler, Traffic

FRAME_OVERHEAD_BYTES = 48
"""What a frame costs on a link with limited bandwidth, beyond its payload."""


@dataclass(frozen=True, slots=True)
class LinkModel:
    """One direction between two hosts."""

    latency_s: float = 0.02
    jitter_s: float = 0.0
    """Uniform extra delay; order is kept, as TCP keeps it."""
    bytes_per_s: float = math.inf


@dataclass(slots=True)
class _Link:
    """The state of one direction: when it is free, and what waits behind a partition."""

    model: LinkModel
    free_at: float = -math.inf
    last_due: float = -math.inf
    cut: bool = False
    held: list[tuple[int, Callable[[], None]]] | None = None


@contextlib.asynccontextmanager
async def open_sim_network(
    rng: random.Random, *, link: LinkModel = LinkModel(), limits: Limits = DEFAULT_LIMITS
) -> AsyncIterator[SimNetwork]:
    """A network on the current clock; every pair of hosts is joined by ``link`` until told otherwise."""
    async with open_service_nursery() as nursery:
        network = SimNetwork(rng, link, limits)
        nursery.start_soon(network.deliver)
        yield network


class SimNetwork:
    """All hosts and links. The verbs of a scenario: set_link, partition, heal, crash."""

    def __init__(self, rng: random.Random, link: LinkModel, limits: Limits) -> None:
        self.limits = limits
        self.hosts: dict[PeerId, SimHost] = {}
        self._rng = rng
        self._default_link = link
        self._links: dict[tuple[PeerId, PeerId], _Link] = {}
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._more = trio.lowlevel.ParkingLot()

    # --- a scenario's verbs -------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def open_host(self, peer: PeerId) -> AsyncIterator[SimHost]:
        """The transport of ``peer`` for the length of the block; a crash cancels the block.

        Leaving the block says goodbye to every peer. The id may come up again afterwards.
        """
        assert peer not in self.hosts, f"{peer} is up already"
        async with open_service_nursery() as nursery:
            host = self.hosts[peer] = SimHost(self, peer, nursery)
            try:
                yield host
            finally:
                host.stop("the peer closed the connection")

    def set_link(self, source: PeerId, target: PeerId, model: LinkModel) -> None:
        """Change one direction for everything sent from now on."""
        self._link(source, target).model = model

    def partition(self, left: Collection[PeerId], right: Collection[PeerId]) -> None:
        """Cut all links between two groups; connections across die after ``peer_silence_s`` of it."""
        for a in left:
            for b in right:
                for source, target in ((a, b), (b, a)):
                    link = self._link(source, target)
                    if not link.cut:
                        link.cut, link.held = True, []
                        self.after(self.limits.peer_silence_s, _expire(self, source, target, link.held))

    def heal(self) -> None:
        """Restore every link; what was sent into a partition arrives now, if its connection still lives."""
        for (source, target), link in self._links.items():
            if link.cut:
                held, link.cut, link.held = link.held or [], False, None
                for size, arrive in held:
                    self.send(source, target, size, arrive)

    def crash(self, peer: PeerId) -> None:
        """Kill a host as ``kill -9`` would: its block is cancelled, its peers notice one latency later."""
        self.hosts[peer].stop("the connection broke")

    # --- the wires ----------------------------------------------------------------------------------------------

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Run ``action`` in ``delay_s`` seconds."""
        self._schedule(trio.current_time() + delay_s, action)

    def send(self, source: PeerId, target: PeerId, size: int, arrive: Callable[[], None]) -> None:
        """Carry ``size`` bytes over one link; ``arrive`` runs when they get there. Order is kept."""
        link = self._link(source, target)
        if link.held is not None:
            link.held.append((size, arrive))
            return
        sent_at = (
            max(trio.current_time(), link.free_at) + (size + FRAME_OVERHEAD_BYTES) / link.model.bytes_per_s
        )
        link.free_at = sent_at
        delay = link.model.latency_s + (
            self._rng.random() * link.model.jitter_s if link.model.jitter_s else 0.0
        )
        link.last_due = max(link.last_due, sent_at + delay)
        self._schedule(link.last_due, arrive)

    def reachable(self, source: PeerId, target: PeerId) -> bool:
        """Whether packets pass in both directions right now."""
        return not (self._link(source, target).cut or self._link(target, source).cut)

    def latency_s(self, source: PeerId, target: PeerId) -> float:
        """The latency of one direction."""
        return self._link(source, target).model.latency_s

    async def deliver(self) -> None:
        """The one task that makes everything happen, in order of (due time, order of sending)."""
        while True:
            while self._due and self._due[0][0] <= trio.current_time():
                heapq.heappop(self._due)[2]()
            with trio.move_on_at(self._due[0][0] if self._due else math.inf):
                await self._more.park()

    def _schedule(self, due: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._due, (due, next(self._order), action))
        if self._due[0][2] is action:
            self._more.unpark()

    def _link(self, source: PeerId, target: PeerId) -> _Link:
        return self._links.setdefault((source, target), _Link(replace(self._default_link)))


def address_of(peer: PeerId) -> str:
    """The address of a simulated host: an ordinary multiaddr, the same whenever the host comes up again."""
    number = zlib.crc32(peer.encode())
    return f"/ip4/10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}/tcp/4100"


def _expire(
    network: SimNetwork, source: PeerId, target: PeerId, held: list[tuple[int, Callable[[], None]]]
) -> Callable[[], None]:
    def check() -> None:
        # Healed and cut again in between? Then this silence is over, and the newer one has its own check.
        if network._link(source, target).held is held and (host := network.hosts.get(source)):
            host.lose(target, f"no sign of life for {network.limits.peer_silence_s:g} s")

    return check


class _Side:
    """One end of one connection. Implements FrameSink by carrying frames to the other end."""

    def __init__(self, host: SimHost, peer: PeerId, *, outbound: bool) -> None:
        self.host = host
        self.peer = peer
        self.streams: dict[int, FlowStream] = {}
        self.over = False
        self._other: _Side | None = None
        self._ids = itertools.count(1 if outbound else 2, 2)

    def join(self, other: _Side) -> None:
        """Make ``other`` the far end."""
        self._other = other

    def carry(self, size: int, arrive: Callable[[_Side], None]) -> None:
        """Run ``arrive(far end)`` there when a frame of ``size`` bytes gets there and the connection still is."""
        other = self._other
        assert other is not None

        def land() -> None:
            if not other.over:
                arrive(other)

        self.host.network.send(self.host.local.peer, self.peer, size, land)

    def open_stream(self) -> FlowStream:
        """A new outbound stream."""
        stream = self.new_stream(next(self._ids))
        self.carry(0, lambda far: far.open_inbound(stream.stream_id))
        return stream

    def open_inbound(self, stream_id: int) -> None:
        """The other end has opened a stream."""
        if self.host.protocols.admit(self.peer):
            self.host.protocols.answer(self.peer, self.new_stream(stream_id))
        else:
            self.carry(0, lambda near: near.reset_stream(stream_id))

    def new_stream(self, stream_id: int) -> FlowStream:
        """Register a stream under ``stream_id``, in either direction."""
        limits = self.host.network.limits
        stream = FlowStream(
            self,
            stream_id,
            credit=limits.receive_window_bytes,
            window_bytes=limits.receive_window_bytes,
            timeout_s=limits.stream_timeout_s,
            meter=self.host.meter,
        )
        self.streams[stream_id] = stream
        return stream

    def close(self, reason: str, *, tell: str) -> None:
        """End the connection here for ``reason``; the other end learns ``tell`` one latency later."""
        self.carry(0, lambda far: far.lose(tell))
        self.lose(reason)

    def lose(self, reason: str) -> None:
        """The connection is over at this end."""
        self.over = True
        for stream in self.streams.values():
            stream.break_off(reason)
        self.streams.clear()
        self.host.forget(self, reason)

    # --- FrameSink ----------------------------------------------------------------------------------------------

    async def wait_sendable(self) -> None:
        """Wait for nothing: credits bound what is under way."""

    def send_data(self, stream: FlowStream, payload: memoryview) -> None:
        """Carry bytes; landing outside of the window ends the connection."""
        data = bytes(payload)

        def arrive(far: _Side) -> None:
            if (target := far.streams.get(stream.stream_id)) is None:
                far.carry(0, lambda near: near.reset_stream(stream.stream_id))
            elif target.accept_bytes(len(data)):
                target.deliver(data)
            else:
                far.close("the peer sent past its receive window", tell="the connection broke")

        self.carry(len(data), arrive)

    def send_credit(self, stream: FlowStream, count: int) -> None:
        """Carry credit."""
        self._to_stream(stream, lambda target: target.add_credit(count))

    def send_eof(self, stream: FlowStream) -> None:
        """Carry the end of one direction."""
        self._to_stream(stream, FlowStream.deliver_eof)

    def send_reset(self, stream: FlowStream) -> None:
        """Carry the end of both."""
        self.carry(0, lambda far: far.reset_stream(stream.stream_id))

    def forget(self, stream: FlowStream) -> None:
        """Frames for this stream are discarded from now on."""
        self.streams.pop(stream.stream_id, None)

    def reset_stream(self, stream_id: int) -> None:
        """The other end has reset a stream."""
        if stream := self.streams.pop(stream_id, None):
            stream.break_off("the peer reset the stream")

    def _to_stream(self, stream: FlowStream, action: Callable[[FlowStream], None]) -> None:
        def arrive(far: _Side) -> None:
            if target := far.streams.get(stream.stream_id):
                action(target)

        self.carry(0, arrive)


class SimHost:
    """One peer's Transport in the simulated network; its tasks run in ``nursery``."""

    def __init__(self, network: SimNetwork, peer: PeerId, nursery: trio.Nursery) -> None:
        self.network = network
        self.meter = Meter()
        self.protocols = Protocols(network.limits, nursery)
        self._local = PeerRecord(peer, (address_of(peer),))
        self._nursery = nursery
        self._events = PeerEvents(network.limits.peer_events_max)
        self._sides: dict[PeerId, _Side] = {}

    # --- Transport ----------------------------------------------------------------------------------------------

    @property
    def local(self) -> PeerRecord:
        """Our own id and simulated address."""
        return self._local

    def peers(self) -> frozenset[PeerId]:
        """The peers connected right now."""
        return self._events.connected

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
        )

    async def connect(self, record: PeerRecord) -> None:
        """Connect to a peer; takes one and a half round trips. Raises PeerUnreachable."""
        me, peer = self._local.peer, record.peer
        if peer == me:
            raise PeerUnreachable("that is this node's own id")
        if peer in self._sides:
            return await trio.lowlevel.checkpoint()
        if not record.addresses:
            raise PeerUnreachable(f"cannot reach {peer} (no address is known)")
        if not self.network.reachable(me, peer):
            await trio.sleep(self.network.limits.dial_timeout_s)
            raise PeerUnreachable(f"cannot reach {peer} (no address answered in time)")
        await trio.sleep(1.5 * (self.network.latency_s(me, peer) + self.network.latency_s(peer, me)))
        target = self.network.hosts.get(peer)
        if target is None or not set(target.local.addresses) & set(record.addresses):
            raise PeerUnreachable(f"cannot reach {peer} (connection refused)")
        if peer in self._sides:  # the peer dialled us at the same moment
            return None
        if max(len(self._sides), len(target._sides)) >= self.network.limits.peers_max:
            raise PeerUnreachable(f"cannot reach {peer} (too many connections)")
        near, far = _Side(self, peer, outbound=True), _Side(target, me, outbound=False)
        near.join(far)
        far.join(near)
        for side in (near, far):
            side.host._sides[side.peer] = side
            side.host._events.up(side.peer, outbound=side is near)
        return None

    async def open_stream(self, peer: PeerId, protocol: ProtocolName) -> trio.abc.HalfCloseableStream:
        """A stream to a connected peer, after one round trip. Raises as the real one does."""
        if (side := self._sides.get(peer)) is None:
            raise PeerUnreachable(f"not connected to {peer}")
        stream = side.open_stream()
        await self.protocols.request(peer, stream, protocol)
        return stream

    async def disconnect(self, peer: PeerId, reason: str) -> None:
        """Close the connection to ``peer``."""
        if side := self._sides.get(peer):
            side.close(reason, tell="the peer closed the connection")
        await trio.lowlevel.checkpoint()

    # --- the simulator's side -----------------------------------------------------------------------------------

    def stop(self, tell: str) -> None:
        """The host is gone: every peer learns ``tell``, and its tasks and block are cancelled."""
        if self.network.hosts.get(self._local.peer) is self:
            del self.network.hosts[self._local.peer]
        for side in list(self._sides.values()):
            side.close("this node is stopping", tell=tell)
        self._events.close()
        self._nursery.cancel_scope.cancel()

    def lose(self, peer: PeerId, reason: str) -> None:
        """The connection to ``peer``, if there is one, has fallen silent."""
        if side := self._sides.get(peer):
            side.lose(reason)

    def forget(self, side: _Side, reason: str) -> None:
        """A connection has ended."""
        if self._sides.get(side.peer) is side:
            del self._sides[side.peer]
            self._events.down(side.peer, reason)
