"""Peers of the same run on the local network: DNS-SD over multicast DNS (RFC 6763, RFC 6762), by way of zeroconf.

Owns what this node announces there, and the check of what others announce. Never dials, and never believes: an
announcement is a hint, which a dial confirms or not, since a peer proves its id there and its run in the greeting.

Announced are the listening port, the addresses of this machine, the peer id, and a hash of the run id, by which those
who know the run find each other and nobody else reads its name. In a private swarm the hashes are keyed and the peer
id is sealed: who lacks the key sees that somebody listens, and which machines do so together, and no more. So that no
announcement can send a dial elsewhere, only addresses on a network of this machine's own count, and neither loopback
nor link-local ones.

Relies on: zeroconf works in threads of its own and bounds its cache. They hand over names through a short queue; one
at a time is looked up and passed on, CANDIDATE_PAUSE_S apart.
"""

from __future__ import annotations

import contextlib
import ipaddress
import queue
import secrets
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import ifaddr
import structlog
import trio
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from zeroconf import (
    Error,
    IPVersion,
    ServiceBrowser,
    ServiceInfo,
    ServiceStateChange,
    Zeroconf,
)

from p2p.identity import public_key_of
from p2p.limits import DEFAULT_LIMITS
from p2p.service import open_service_nursery
from p2p.swarm_key import SwarmKey
from p2p.transport import PeerId, PeerRecord

SERVICE = "_gossamer._tcp.local."
TAG_CHARS = 16
NONCE_BYTES = 12
TOLD_BYTES_MAX = 64 + NONCE_BYTES + 16
"""A peer id, sealed or not."""
HASH_KEY_USE = "gossamer 2026-11-29 private swarm lan names"
SEAL_KEY_USE = "gossamer 2026-11-29 private swarm lan peer ids"
NAMES_WAITING_MAX = 64
"""Announcements that were heard and not looked up yet; what else comes meanwhile is dropped."""
CANDIDATES_WAITING_MAX = 16
CANDIDATE_PAUSE_S = 1.0
"""So at most 60 candidates a minute, whoever announces how many."""
LOOK_UP_S = 1.0
INTERFACES_LOOK_S = 10.0
"""How soon another network is noticed: a laptop moves, a cable is plugged in."""

Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface

log = structlog.get_logger()


class LanSearch:
    """Announces one node of ``run`` and finds the others; ``listening``: multiaddrs of its listening sockets."""

    def __init__(
        self, *, run: bytes, peer: PeerId, listening: Sequence[str], swarm_key: SwarmKey | None = None
    ) -> None:
        self._names_of = LanNames(run, swarm_key)
        self._name = self._names_of.service(peer)
        self._peer = peer
        self._listening = listening
        self._names: queue.Queue[str] = queue.Queue(NAMES_WAITING_MAX)
        self._named = trio.Event()
        self._send, self.found = trio.open_memory_channel[PeerRecord](CANDIDATES_WAITING_MAX)
        """``found``: where others say that they are; those that are not taken out in time are dropped."""

    async def run(self) -> None:
        """Announce and search until cancelled, on whatever networks this machine is at the time."""
        problem = ""
        while True:
            interfaces = await trio.to_thread.run_sync(own_interfaces)
            said, problem = problem, "this machine is on no network"
            if any(interface.version == 4 for interface in interfaces):
                try:
                    await self._search(interfaces)
                    problem = ""
                    continue
                except (OSError, Error) as error:
                    problem = str(error)
            if problem != said:
                log.warning("no search of the local network for now", error=problem)
            await trio.sleep(INTERFACES_LOOK_S)

    async def _search(self, interfaces: Sequence[Interface]) -> None:
        """Search while ``interfaces`` are those of this machine. Raises OSError or zeroconf.Error."""
        addresses = [str(interface.ip) for interface in interfaces if interface.version == 4]
        zeroconf = await trio.to_thread.run_sync(
            partial(Zeroconf, interfaces=addresses, ip_version=IPVersion.V4Only)
        )
        try:
            await trio.to_thread.run_sync(
                self._announce, zeroconf, interfaces, trio.lowlevel.current_trio_token()
            )
            async with open_service_nursery() as nursery:
                nursery.start_soon(self._look_up, zeroconf, interfaces)
                while True:
                    await trio.sleep(INTERFACES_LOOK_S)
                    if await trio.to_thread.run_sync(own_interfaces) != interfaces:
                        return
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(zeroconf.close)

    def _announce(
        self, zeroconf: Zeroconf, interfaces: Sequence[Interface], token: trio.lowlevel.TrioToken
    ) -> None:
        """In a worker thread, because zeroconf waits for its own."""
        port, addresses = announced(self._listening, interfaces)
        if addresses:
            info = ServiceInfo(
                SERVICE,
                self._name,
                port=port,
                properties={"peer": self._names_of.told(self._peer)},
                server=f"{self._name.partition('.')[0]}.local.",
                parsed_addresses=addresses,
            )
            # Somebody else's use of our name must not keep us from announcing it: a dial tells who is who.
            zeroconf.register_service(info, cooperating_responders=True)
            log.info("announced on the local network", port=port, addresses=addresses)
        else:
            log.warning("not announced on the local network: nothing listens on an address that others reach")
        tag = self._names_of.tag

        def heard(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
            """In zeroconf's thread, for whatever anybody announces."""
            if state_change is ServiceStateChange.Removed or not name.startswith(tag) or name == self._name:
                return
            with contextlib.suppress(queue.Full):
                self._names.put_nowait(name)
                token.run_sync_soon(self._wake, idempotent=True)

        ServiceBrowser(zeroconf, SERVICE, handlers=[heard])

    def _wake(self) -> None:
        self._named.set()

    async def _look_up(self, zeroconf: Zeroconf, interfaces: Sequence[Interface]) -> None:
        while True:
            self._named = trio.Event()
            for name in self._waiting():
                info = ServiceInfo(SERVICE, name)
                look_up = partial(info.request, zeroconf, LOOK_UP_S * 1000)
                with contextlib.suppress(Error):
                    if await trio.to_thread.run_sync(look_up):
                        self._pass_on(info, interfaces)
                await trio.sleep(CANDIDATE_PAUSE_S)
            await self._named.wait()

    def _waiting(self) -> Iterator[str]:
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._names.get_nowait()

    def _pass_on(self, info: ServiceInfo, interfaces: Sequence[Interface]) -> None:
        peer = self._names_of.heard(info.properties.get(b"peer") or b"")
        record = None
        if peer is not None:
            record = candidate(peer, info.port, info.ip_addresses_by_version(IPVersion.All), interfaces)
        if record is None:
            log.debug("announcement on the local network ignored", name=info.name)
            return
        log.debug("found on the local network", peer=record.peer, addresses=record.addresses)
        with contextlib.suppress(trio.WouldBlock):
            self._send.send_nowait(record)


# --- what is announced, and what counts of it -------------------------------------------------------------------------


class LanNames:
    """What members of ``run`` are called in announcements, for everybody to read or for those with the swarm's key."""

    def __init__(self, run: bytes, swarm_key: SwarmKey | None) -> None:
        self._hash_key = None if swarm_key is None else swarm_key.derived(HASH_KEY_USE)
        self._cipher = None if swarm_key is None else ChaCha20Poly1305(swarm_key.derived(SEAL_KEY_USE))
        self.tag = self._hash(b"gossamer/lan/1\0" + run)
        """By what members know each other's announcements."""

    def service(self, peer: PeerId) -> str:
        """The name of the announcement of ``peer``."""
        return f"{self.tag}-{self._hash(peer.encode())}.{SERVICE}"

    def told(self, peer: PeerId) -> bytes:
        """What an announcement says for ``peer``."""
        if self._cipher is None:
            return peer.encode()
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, peer.encode(), self.tag.encode())

    def heard(self, told: bytes) -> PeerId | None:
        """The peer that an announcement means by ``told``; None if it is none."""
        if len(told) > TOLD_BYTES_MAX:
            return None
        if self._cipher is not None:
            nonce, sealed = told[:NONCE_BYTES], told[NONCE_BYTES:]
            try:
                told = self._cipher.decrypt(nonce, sealed, self.tag.encode())
            except (InvalidTag, ValueError):
                return None
        peer = PeerId(told.decode(errors="replace"))
        try:
            public_key_of(peer)
        except ValueError:
            return None
        return peer

    def _hash(self, data: bytes) -> str:
        hashed = blake3(data) if self._hash_key is None else blake3(data, key=self._hash_key)
        return hashed.hexdigest()[:TAG_CHARS]


def own_interfaces() -> list[Interface]:
    """This machine's addresses with the networks they are on, but for loopback and link-local ones."""
    found: list[Interface] = [
        ipaddress.ip_interface(
            f"{entry.ip if isinstance(entry.ip, str) else entry.ip[0]}/{entry.network_prefix}"
        )
        for adapter in ifaddr.get_adapters()
        for entry in adapter.ips
    ]
    return sorted(
        (each for each in set(found) if not each.is_loopback and not each.is_link_local),
        key=lambda each: (each.version, each.packed),
    )


def announced(listening: Iterable[str], interfaces: Iterable[Interface]) -> tuple[int, list[str]]:
    """A port that is listened on, and at which of this machine's addresses; none where it is loopback alone."""
    for multiaddr in listening:
        _, _, host, _, port = multiaddr.split("/")
        listener = ipaddress.ip_address(host)
        addresses = [
            str(each.ip)
            for each in interfaces
            if each.ip == listener or (listener.is_unspecified and each.version == listener.version)
        ]
        if addresses:
            return int(port), addresses[: DEFAULT_LIMITS.addresses_per_peer_max]
    return 0, []


def candidate(
    peer: PeerId,
    port: int | None,
    addresses: Iterable[ipaddress.IPv4Address | ipaddress.IPv6Address],
    interfaces: Sequence[Interface],
) -> PeerRecord | None:
    """Where an announcement says that ``peer`` is; None where that cannot be dialled from here."""
    if port is None or not 0 < port < 1 << 16:
        return None
    near = [
        f"/ip{address.version}/{address}/tcp/{port}"
        for address in addresses
        if any(address in interface.network for interface in interfaces)
    ]
    return PeerRecord(peer, tuple(near[: DEFAULT_LIMITS.addresses_per_peer_max])) if near else None
