"""Transport over real sockets: TCP, Noise and yamux, as libp2p peers speak them.

Owns the dials, the table of connections and the tasks that answer inbound streams. It never decides whom to dial or
ban, and asks ``connection_gater`` whom to let in. A connection may as well run inside a stream of another one, through
a relay (``circuits``, ``relay``); a direct one is always used in its place. From the library comes what must not be
written twice: the Noise handshake that binds a connection to a peer id (``noise_handshake``). The layers around it are
this package's own (``multistream``, ``noise_stream``, ``yamux``), wire-compatible and bounded: the library's host lets
an exception of any handler end the program, offers plaintext, never frees an inbound connection slot, believes
announced lengths and does not enforce receive windows.

A broken handler, a hostile dialler or a misbehaving connection costs itself and nothing else.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

import trio

from p2p import multistream
from p2p.address_race import race
from p2p.circuits import Circuits, split_circuit
from p2p.connection_gater import ConnectionGater
from p2p.errors import (
    GossamerError,
    NotAllowed,
    PeerUnreachable,
    StreamBroken,
    SwarmKeyMismatch,
)
from p2p.flow import FlowStream
from p2p.identity import Identity
from p2p.limits import DEFAULT_LIMITS, Limits
from p2p.listening import dialable_addresses, host_and_port, listen_on, multiaddr_of
from p2p.metered import Meter, MeteredStream
from p2p.noise_handshake import NoiseHandshake
from p2p.noise_stream import NoiseStream
from p2p.peer_events import PeerEvents
from p2p.protocols import Protocols
from p2p.relay import Relay, RelayTerms
from p2p.service import open_service_nursery
from p2p.swarm_key import SwarmKey
from p2p.transport import PeerEvent, PeerId, PeerRecord, ProtocolName, StreamHandler, Traffic
from p2p.yamux import Session

YAMUX_PROTOCOL = "/yamux/1.0.0"
CONNECTIONS_PER_PEER_MAX = 2
"""Two, because two peers may dial each other at the same moment, and a restarted peer replaces a stale one."""
RETIRE_LOOK_S = 1.0


@contextlib.asynccontextmanager
async def open_libp2p(
    identity: Identity,
    *,
    listen: Sequence[str],
    announce: Sequence[str] = (),
    limits: Limits = DEFAULT_LIMITS,
    swarm_key: SwarmKey | None = None,
    allowed: Collection[PeerId] = (),
    relay_terms: RelayTerms | None = None,
) -> AsyncIterator[Libp2pTransport]:
    """A transport that listens on ``listen`` (such as ``/ip4/0.0.0.0/tcp/4100``; port 0 picks a free one).

    With nothing to listen on it only dials. ``announce``: addresses to tell others instead of those of our
    interfaces, for a port that a router forwards. With a ``swarm_key`` only peers that have the same are connected,
    and where ``allowed`` names any, only those. With ``relay_terms``, and once ``offer_relay`` says so, connections are
    carried for peers that cannot be dialled. Leaving the block says goodbye to every peer. Raises AddressError or
    PortInUse before anything else is started.
    """
    async with contextlib.AsyncExitStack() as sockets, open_service_nursery() as nursery:
        listeners = [await sockets.enter_async_context(await listen_on(address)) for address in listen]
        addresses = tuple(announce) or dialable_addresses(listeners)
        listening = tuple(multiaddr_of(*listener.socket.getsockname()[:2]) for listener in listeners)
        handshake, gater = NoiseHandshake(identity, swarm_key), ConnectionGater(allowed)
        local = PeerRecord(identity.peer, addresses)
        transport = Libp2pTransport(local, listening, handshake, gater, limits, nursery, relay_terms)
        for listener in listeners:
            nursery.start_soon(trio.serve_listeners, transport.accept, [listener])
        try:
            yield transport
        finally:
            with trio.CancelScope(shield=True):
                await transport.aclose()


@dataclass(eq=False, slots=True)
class _Connection:
    peer: PeerId
    session: Session
    dialled: str | None
    """At which address, if by us."""
    host: str | None
    """Of the other end, as its packets name it; None for a circuit."""
    relay: PeerId | None
    """Through whom, if not directly."""
    gone: trio.Event = field(default_factory=trio.Event)


class Libp2pTransport:
    """Implements Transport. Made by ``open_libp2p``, whose nursery runs all of its tasks."""

    def __init__(
        self,
        local: PeerRecord,
        listening: tuple[str, ...],
        handshake: NoiseHandshake,
        gater: ConnectionGater,
        limits: Limits,
        nursery: trio.Nursery,
        relay_terms: RelayTerms | None,
    ) -> None:
        self._own = local
        self._local = local
        self._handshake = handshake
        self._gater = gater
        self.listening = listening
        """The sockets' own addresses, whatever is announced; a wildcard stands for every interface of its family."""
        self._limits = limits
        self._nursery = nursery
        self._meter = Meter()
        self._events = PeerEvents(limits.peer_events_max)
        self._connections: dict[PeerId, list[_Connection]] = {}
        self._dials: dict[PeerId, trio.Lock] = {}
        self._protocols = Protocols(limits, nursery)
        self._handshakes: Counter[str] = Counter()
        self._circuits = Circuits(self, limits=limits, take=self._take_circuit)
        self._circuits.serve()
        self.relay = None if relay_terms is None else Relay(self, relay_terms, limits=limits)
        if self.relay is not None:
            self.relay.serve()

    # --- Transport ----------------------------------------------------------------------------------------------

    @property
    def local(self) -> PeerRecord:
        """Our own id and where we can be dialled."""
        return self._local

    def announce(self, addresses: Sequence[str], relayed: Sequence[str] = ()) -> None:
        """Tell others of ``addresses`` before our own, and of ``relayed`` after them, from now on."""
        most = max(0, self._limits.addresses_per_peer_max - len(addresses) - len(relayed))
        told = (*addresses, *self._own.addresses[:most], *relayed)
        self._local = PeerRecord(self._own.peer, tuple(dict.fromkeys(told)))

    def peers(self) -> frozenset[PeerId]:
        """The peers connected right now."""
        return self._events.connected

    def idle_peers(self) -> list[PeerId]:
        """The connected peers with whom no stream is open, sorted."""
        return sorted(
            peer
            for peer, links in self._connections.items()
            if not any(link.session.streams_open for link in links)
        )

    def dialled(self, peer: PeerId) -> str | None:
        """The address at which we have dialled a connected peer; None where it has dialled us."""
        links = self._connections.get(peer, [])
        return next((link.dialled for link in links if link.dialled is not None), None)

    def host_of(self, peer: PeerId) -> str | None:
        """The IP address that a connected peer's packets come from; None where a relay stands between."""
        links = self._connections.get(peer, [])
        return next((link.host for link in links if link.host is not None), None)

    def relay_of(self, peer: PeerId) -> PeerId | None:
        """Who carries the connection to ``peer``; None for a direct one, and where there is none."""
        links = self._connections.get(peer, [])
        return None if any(link.relay is None for link in links) else next((li.relay for li in links), None)

    def peer_events(self) -> trio.MemoryReceiveChannel[PeerEvent]:
        """A new subscription to connections coming and going."""
        return self._events.subscribe()

    def serve(self, protocol: ProtocolName, handler: StreamHandler) -> None:
        """Answer inbound streams of ``protocol`` with ``handler``."""
        self._protocols.serve(protocol, handler)

    def traffic(self) -> Traffic:
        """Totals since the transport opened, and the streams open now."""
        return Traffic(
            bytes_sent=self._meter.bytes_sent,
            bytes_received=self._meter.bytes_received,
            streams_open=sum(
                link.session.streams_open for links in self._connections.values() for link in links
            ),
            streams_refused=self._protocols.streams_refused,
            connections_refused=dict(self._gater.refusals),
        )

    async def connect(self, record: PeerRecord, *, direct: bool = False) -> None:
        """Connect to a peer over the first of its addresses that works. Raises PeerUnreachable.

        ``direct``: also where a relay carries the connection that there is, and not through one again.
        """
        if record.peer == self._local.peer:
            raise PeerUnreachable("that is this node's own id")
        if not self._gater.allows(record.peer):
            raise PeerUnreachable(f"{record.peer} is not on this node's allow-list")
        lock = self._dials.setdefault(record.peer, trio.Lock())
        try:
            async with lock:
                if direct and self.relay_of(record.peer) is not None:
                    addresses = tuple(each for each in record.addresses if split_circuit(each) is None)
                    await self._dial(PeerRecord(record.peer, addresses))
                elif record.peer not in self._connections:
                    await self._dial(record)
        finally:
            if not lock.statistics().tasks_waiting and not lock.locked():
                self._dials.pop(record.peer, None)

    async def open_stream(self, peer: PeerId, protocol: ProtocolName) -> FlowStream:
        """A stream to a connected peer, which may be written to at once. Raises PeerUnreachable or StreamBroken."""
        links = self._connections.get(peer)
        if not links:
            raise PeerUnreachable(f"not connected to {peer}")
        link = next((link for link in reversed(links) if link.relay is None), links[-1])
        try:
            stream = await link.session.open_stream()
        except trio.BrokenResourceError as error:
            raise PeerUnreachable(f"the connection to {peer} is gone: {error}") from error
        await multistream.propose(stream, protocol)
        return stream

    async def answers_at(self, peer: PeerId, address: str) -> None:
        """Whether ``peer`` answers at ``address``, on a connection made for that alone. Raises PeerUnreachable."""
        host, port = host_and_port(address)
        try:
            with trio.fail_after(self._limits.dial_timeout_s):
                socket = MeteredStream(await trio.open_tcp_stream(host, port), self._meter)
                try:
                    await self._handshake.dial(socket, peer)
                finally:
                    await trio.aclose_forcefully(socket)
        except (OSError, GossamerError, trio.TooSlowError) as error:
            raise PeerUnreachable(f"{address}: {str(error) or 'no answer in time'}") from error

    async def hold_reservation(self, relay: PeerId, held: Callable[[], None]) -> None:
        """Be reachable through ``relay`` until this fails or is cancelled; ``held`` is called once it is so."""
        await self._circuits.hold_reservation(relay, held)

    def offer_relay(self, offered: bool) -> None:
        """Whether to carry connections for peers that cannot be dialled, if this one is willing to at all."""
        if self.relay is not None:
            self.relay.offered = offered

    async def disconnect(self, peer: PeerId, reason: str) -> None:
        """Close every connection to ``peer``."""
        await self._close(self._connections.get(peer, []), reason)

    async def aclose(self) -> None:
        """Say goodbye to every peer and end all subscriptions."""
        await self._close(
            [link for links in self._connections.values() for link in links], "this node is stopping"
        )
        self._events.close()

    async def _close(self, links: Sequence[_Connection], reason: str) -> None:
        async with trio.open_nursery() as nursery:
            for link in links:
                nursery.start_soon(link.session.aclose, reason)
        for link in links:
            await link.gone.wait()

    # --- making connections -------------------------------------------------------------------------------------

    async def _dial(self, record: PeerRecord) -> None:
        """Try all addresses, direct ones first: a relay's line carries everything twice."""
        if len(self._connections) >= self._limits.peers_max:
            raise PeerUnreachable(f"already connected to {self._limits.peers_max} peers")
        if not record.addresses:
            raise PeerUnreachable(f"cannot reach {record.peer} (no address is known)")
        ordered = sorted(record.addresses, key=lambda address: split_circuit(address) is not None)
        failures = await race(
            ordered[: self._limits.addresses_per_peer_max],
            partial(self._dial_address, record.peer),
            timeout_s=self._limits.dial_timeout_s,
        )
        if failures is None:
            return
        kind = PeerUnreachable
        for address, error in failures:
            if isinstance(error, PeerUnreachable):
                kind = type(error)
            if isinstance(error, SwarmKeyMismatch):
                self._gater.tell(
                    logging.WARNING, "swarm-key at a peer", f"{record.peer} at {address}: {error}"
                )
        tried = "; ".join(f"{address}: {error}" for address, error in failures)
        raise kind(f"cannot reach {record.peer} ({tried or 'no address answered in time'})")

    async def _dial_address(self, peer: PeerId, address: str) -> None:
        """Connect to ``peer`` at one address, which may lead through a relay."""
        if (circuit := split_circuit(address)) is not None:
            relay_address, relay = circuit
            await self.connect(PeerRecord(relay, (relay_address,)))
            stream: trio.abc.Stream = await self._circuits.open(relay, peer)
            host = None
        else:
            relay = None
            socket = await trio.open_tcp_stream(*host_and_port(address))
            stream, host = MeteredStream(socket, self._meter), _host_of(socket)
        try:
            carrier = await self._handshake.dial(stream, peer)
            await self._select_multiplexer(carrier)
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        self._nursery.start_soon(
            self._run, self._register(peer, carrier, dialled=address, host=host, relay=relay)
        )

    async def accept(self, socket: trio.SocketStream) -> None:
        """Take one inbound connection from its first byte to its end."""
        if (host := _host_of(socket)) is not None:
            await self._take(MeteredStream(socket, self._meter), host, host=host, relay=None)

    async def _take_circuit(self, stream: FlowStream, source: PeerId, relay: PeerId) -> None:
        await self._take(stream, f"{source} by way of {relay}", host=None, relay=relay, expected=source)

    async def _take(
        self,
        stream: trio.abc.Stream,
        origin: str,
        *,
        host: str | None,
        relay: PeerId | None,
        expected: PeerId | None = None,
    ) -> None:
        """``origin``: where it came from, for people; ``expected``: whoever must be at its other end."""
        counted = host or str(relay)
        if (
            self._handshakes.total() >= self._limits.handshakes_max
            or self._handshakes[counted] >= self._limits.handshakes_per_address_max
        ):
            return
        self._handshakes[counted] += 1
        try:
            with trio.fail_after(self._limits.dial_timeout_s):
                carrier, peer = await self._handshake.answer(stream)
                if not self._gater.allows(peer):
                    self._gater.refuse(
                        "not-allowed", f"{peer}, who dialled from {origin}, is not on the allow-list"
                    )
                    return
                if expected not in (None, peer):
                    self._gater.tell(logging.WARNING, "circuit", f"{origin} is {peer}: hung up")
                    return
                if not await self._agreed_on_multiplexer(carrier):
                    return
        except SwarmKeyMismatch as error:
            self._gater.refuse(
                "swarm-key",
                f"refused who dialled from {origin}: {error}; if it is to be let in, give it a new invite:"
                " gossamer invite",
            )
            return
        except (OSError, GossamerError, trio.TooSlowError) as error:
            self._gater.tell(
                logging.INFO, "handshake", f"none with {origin}: {str(error) or type(error).__name__}"
            )
            return
        finally:
            self._handshakes[counted] -= 1
            self._handshakes += Counter()  # drops the zeros
        if peer in self._connections or self._has_room_for_inbound():
            await self._run(self._register(peer, carrier, dialled=None, host=host, relay=relay))

    async def _agreed_on_multiplexer(self, carrier: NoiseStream) -> bool:
        """Raises GossamerError for anything but an agreement, or an end: who only looks whether we answer hangs up."""
        with contextlib.suppress(StreamBroken):
            await multistream.answer(carrier, {YAMUX_PROTOCOL})
            return True
        return False

    def _has_room_for_inbound(self) -> bool:
        inbound = sum(self.dialled(peer) is None for peer in self._connections)
        return len(self._connections) < self._limits.peers_max and inbound < self._limits.peers_inbound_max

    async def _select_multiplexer(self, carrier: NoiseStream) -> None:
        try:
            await multistream.select(carrier, YAMUX_PROTOCOL)
        except StreamBroken as error:
            raise NotAllowed(
                f"it hung up when it knew who dials; if it has an allow-list, {self._local.peer} is not on it"
            ) from error

    # --- living connections ---------------------------------------------------------------------------------------

    def _register(
        self,
        peer: PeerId,
        carrier: NoiseStream,
        *,
        dialled: str | None,
        host: str | None,
        relay: PeerId | None,
    ) -> _Connection:
        session = Session(
            carrier,
            initiator=dialled is not None,
            limits=self._limits,
            admit=partial(self._protocols.admit, peer),
        )
        link = _Connection(peer, session, dialled, host, relay)
        links = self._connections.setdefault(peer, [])
        if len(links) >= CONNECTIONS_PER_PEER_MAX:
            oldest = next((each for each in links if each.relay is not None), links[0])
            oldest.session.end("replaced by a newer connection")
        links.append(link)
        self._events.up(peer, outbound=dialled is not None)
        return link

    async def _run(self, link: _Connection) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._accept_streams, link)
                if link.relay is not None:
                    nursery.start_soon(self._retire, link)
                await link.session.run()
        finally:
            links = self._connections[link.peer]
            links.remove(link)
            if not links:
                del self._connections[link.peer]
                self._events.down(link.peer, link.session.reason, broken=link.session.broken)
            link.gone.set()

    async def _retire(self, circuit: _Connection) -> None:
        """End a circuit once there is a direct connection as well and nothing is under way on the circuit."""
        session = circuit.session
        while session.streams_open or self.relay_of(circuit.peer) is not None:
            with trio.move_on_after(RETIRE_LOOK_S):
                return await session.closed.wait()
        await session.aclose("a direct connection has taken its place")
        return None

    async def _accept_streams(self, link: _Connection) -> None:
        with contextlib.suppress(trio.EndOfChannel):
            while True:
                self._protocols.answer(link.peer, await link.session.accept_stream())


def _host_of(socket: trio.SocketStream) -> str | None:
    """The IP address at the other end; None where it is gone already."""
    try:
        return str(socket.socket.getpeername()[0])
    except OSError:
        return None
