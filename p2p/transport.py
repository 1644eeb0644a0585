"""The only door to other machines: the Transport interface and the value types that pass through it.

Owns no behaviour. Two implementations exist, ``p2p.libp2p_transport`` (real sockets) and
``netsim.network`` (virtual time); ``tests/conformance`` holds both to the same contract.

The contract, beyond the types:

* Streams are FlowStreams, and so ``trio.abc.HalfCloseableStream``: bytes, ordered, authenticated to ``PeerId``,
  encrypted on the real network. ``receive_some`` returns ``b""`` at the peer's end of file. A stream that breaks raises
  ``trio.BrokenResourceError``; one closed here raises ``trio.ClosedResourceError``; nothing else escapes, but for
  what follows.
* A stream costs no round trip of its own. It may be written to at once; whether the peer speaks its protocol is known
  by the first read, which raises ProtocolUnsupported otherwise, as does every write once the refusal is here. Whoever
  only writes asks ``FlowStream.wait_agreed``.
* A handler runs as one task per inbound stream, at most ``Limits.streams_per_peer_max`` per peer. An
  exception in a handler resets that stream and is logged; it never reaches the daemon. The stream is
  closed when the handler returns.
* A peer that sends past its receive window, or stops answering for ``Limits.peer_silence_s``, is
  disconnected, and a ``PeerDown`` with the reason is published.
* At most ``Limits.peers_max`` peers are connected, of whom at most ``Limits.peers_inbound_max`` have dialled us.
* In a private swarm nobody is connected who has not its key, and with an allow-list nobody who is not on it.
* All waits are bounded: ``connect`` by ``Limits.dial_timeout_s``, the first read's wait for an agreement and every
  wait of a write for the peer to take more by ``Limits.stream_timeout_s``. Other reads wait as long as the caller's
  own deadline.
* A connection may be carried by a third peer, its relay, if the network has such a thing (``relay_of``). It ends when
  the relay's does, and by itself once there is a direct one and nothing is under way on it.
* ``aclose`` is graceful for what was sent before and abrupt for what the other side still sends. What has
  arrived before a stream broke can still be read.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NewType, Protocol

import trio

from p2p.flow import FlowStream

PeerId = NewType("PeerId", str)
"""A libp2p peer id in base58 text. For Ed25519 keys it contains the public key itself."""

ProtocolName = NewType("ProtocolName", str)
"""The name and major version of a stream protocol, for example ``/gossamer/shard/1``."""


@dataclass(frozen=True, slots=True)
class PeerRecord:
    """A peer and the addresses it can be dialled at (multiaddrs without the ``/p2p/`` part)."""

    peer: PeerId
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PeerUp:
    """A connection to ``peer`` is usable; ``outbound`` when we dialled it."""

    peer: PeerId
    outbound: bool


@dataclass(frozen=True, slots=True)
class PeerDown:
    """The last connection to ``peer`` is gone, and why, as a short sentence for people.

    ``broken``: neither side closed it on purpose, so the peer may well be gone too.
    """

    peer: PeerId
    reason: str
    broken: bool


PeerEvent = PeerUp | PeerDown
StreamHandler = Callable[[PeerId, FlowStream], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes moved since the transport opened, with all that carrying them takes, and streams open now."""

    bytes_sent: int
    bytes_received: int
    streams_open: int
    streams_refused: int
    connections_refused: Mapping[str, int]
    """Made by others, by reason: ``swarm-key``, ``not-allowed``."""


class Company(Protocol):
    """Peers that come and go: all that are connected, or those of them that something is to be done with."""

    def peers(self) -> frozenset[PeerId]:
        """The peers that are here right now."""

    def peer_events(self) -> trio.MemoryReceiveChannel[PeerEvent]:
        """A new subscription to their coming and going; on overflow the oldest event is dropped."""


class Transport(Company, Protocol):
    """What a node may ask of the network. Bounded, and allowed to lose, delay and disconnect."""

    @property
    def local(self) -> PeerRecord:
        """Our own id and the addresses others can dial."""

    def peers(self) -> frozenset[PeerId]:
        """The peers connected right now."""

    def announce(self, addresses: Sequence[str], relayed: Sequence[str] = ()) -> None:
        """Tell others of ``addresses`` before our own, and of ``relayed`` after them; ``local`` names them too."""

    def idle_peers(self) -> list[PeerId]:
        """The connected peers with whom no stream is open, sorted."""

    def dialled(self, peer: PeerId) -> str | None:
        """The address at which we have dialled a connected peer; None where it has dialled us, or is not connected."""

    def host_of(self, peer: PeerId) -> str | None:
        """The IP address that a connected peer's packets come from; None where a relay stands between."""

    def relay_of(self, peer: PeerId) -> PeerId | None:
        """Who carries the connection to ``peer``; None for a direct one, and where there is none."""

    def peer_events(self) -> trio.MemoryReceiveChannel[PeerEvent]:
        """A new subscription to connections coming and going; on overflow the oldest event is dropped."""

    async def connect(self, record: PeerRecord, *, direct: bool = False) -> None:
        """Connect to a peer, trying its addresses; returns at once when already connected.

        ``direct``: also where a relay carries the connection that there is, and then not through one again. Raises
        PeerUnreachable, which is SwarmKeyMismatch or NotAllowed where that is why.
        """

    async def answers_at(self, peer: PeerId, address: str) -> None:
        """Whether ``peer`` answers at ``address``, on a connection made for that alone. Raises PeerUnreachable."""

    async def hold_reservation(self, relay: PeerId, held: Callable[[], None]) -> None:
        """Be reachable through ``relay``, a connected peer, until this fails or is cancelled; ``held`` once it is so.

        Raises CallRefused where the relay declines, another TransportError where it is gone or relays nothing.
        """

    def offer_relay(self, offered: bool) -> None:
        """Whether to carry connections for peers that cannot be dialled, if this one is willing to at all."""

    async def open_stream(self, peer: PeerId, protocol: ProtocolName) -> FlowStream:
        """Open a stream to a connected peer, without waiting for it. Raises PeerUnreachable or StreamBroken."""

    def serve(self, protocol: ProtocolName, handler: StreamHandler) -> None:
        """Answer inbound streams of ``protocol`` with ``handler``; to be called once per protocol."""

    async def disconnect(self, peer: PeerId, reason: str) -> None:
        """Close every connection to ``peer``; a no-op when there is none."""

    def traffic(self) -> Traffic:
        """Counters for status and metrics."""
