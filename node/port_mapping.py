"""A port of the router that leads here: asked for by UPnP, kept, and given back.

Owns the search for a router, the mapping of one TCP port, its renewal, and taking it back at the end. Whether anybody
gets through by it is not the router's to say: ``gossip.reachability`` is told where the router claims to forward, has
neighbours dial, and tells others of nothing that was not answered.

Promises: only a mapping that the router has granted to this machine is ever taken back; one that is left over, of a
process that was killed, ends with its lease. A router that hangs, lies or comes and goes costs waits that are bounded,
and none but this task's.

Relies on: miniupnpc blocks, so it works in threads, one at a time. It follows the URLs that devices of the local
network give, and does not bound the length of their answers.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

import structlog
import trio
from miniupnpc import UPnP

from gossip.address_ranges import is_routed
from p2p.listening import multiaddr_of

LEASE_S = 3600
"""Renewed after half of it."""
AGAIN_S = 600.0
"""Until the next search, where no router was found or it refused."""
PORTS_TRIED_MAX = 4
"""The port's own number first, then those after it: another machine of the same home may have it."""
SEARCH_S_MAX = 30.0
"""For a search and the descriptions of what was found."""
CALL_S_MAX = 10.0
"""For any other question."""
TAKE_BACK_S_MAX = 2.0
"""At the end, when somebody waits for the process to stop."""
SSDP = ("239.255.255.250", 1900)
"""Where gateways listen."""
DESCRIPTION = "gossamer"
"""What the router's own pages call the mapping."""

T = TypeVar("T")

log = structlog.get_logger()


class RouterError(Exception):
    """There is no router, or it refuses, or does not answer in time; says which."""


class Router(Protocol):
    """What is asked of a router. Every wait is bounded, and everything raises RouterError."""

    async def discover(self) -> None:
        """Find it; the rest is for the one that was found last."""

    async def add(self, external_port: int, port: int, lease_s: int) -> None:
        """Have it forward ``external_port`` to this machine's ``port``; again, to renew that."""

    async def delete(self, external_port: int) -> None:
        """Have it forward that no more."""

    async def external_address(self) -> str:
        """Where it says that it is on the internet: any text."""


class PortMapping:
    """Keeps ``router`` forwarding to ``port`` of this machine."""

    def __init__(self, router: Router, port: int) -> None:
        self._router = router
        self._port = port
        self._granted: int | None = None
        """The port outside."""
        self._addresses: tuple[str, ...] = ()
        self._on_change: list[Callable[[Sequence[str]], None]] = []
        self._said: tuple[object, ...] = ()

    def on_change(self, callback: Callable[[Sequence[str]], None]) -> None:
        """Call ``callback(addresses)`` now and whenever the router forwards others: one of the internet, or none."""
        self._on_change.append(callback)
        callback(self._addresses)

    async def keep_mapped(self) -> None:
        """Search, map and renew until cancelled; then take the mapping back."""
        try:
            while True:
                try:
                    await self._router.discover()
                    while True:
                        await self._map()
                        await trio.sleep(LEASE_S / 2)
                except RouterError as error:
                    # Another one may be found next, and what that one forwards is not ours to take back.
                    self._granted = None
                    self._became(None)
                    self._say("no port forwarded by the router", error=str(error))
                await trio.sleep(AGAIN_S)
        finally:
            if self._granted is not None:
                with trio.move_on_after(TAKE_BACK_S_MAX) as deadline, contextlib.suppress(RouterError):
                    deadline.shield = True
                    await self._router.delete(self._granted)
                    log.info("port given back to the router", port=self._granted)

    async def _map(self) -> None:
        self._granted = await self._add()
        external = await self._router.external_address()
        address = mapped_address(external, self._granted)
        self._became(address)
        if address is not None:
            self._say("port forwarded", address=address, to=self._port)
        else:
            # It is kept: the router in front of this one may pass everything on, which a dial finds out.
            self._say("port forwarded by a router that is not on the internet itself", address=repr(external))

    async def _add(self) -> int:
        """Returns the port outside."""
        refusal = RouterError("no port is left")
        for external_port in range(self._port, min(self._port + PORTS_TRIED_MAX, 1 << 16)):
            try:
                await self._router.add(external_port, self._port, LEASE_S)
            except RouterError as error:
                refusal = error
            else:
                return external_port
        raise refusal

    def _became(self, address: str | None) -> None:
        addresses = () if address is None else (address,)
        if addresses != self._addresses:
            self._addresses = addresses
            for callback in self._on_change:
                callback(addresses)

    def _say(self, event: str, **facts: object) -> None:
        """Once, and again when it is something else."""
        if (said := (event, *facts.values())) != self._said:
            self._said = said
            log.info(event, **facts)


def mapped_address(external: str, port: int) -> str | None:
    """The address that others would dial; None where ``external`` is no IPv4 address of the internet."""
    try:
        ip = ipaddress.IPv4Address(external)
    except ValueError:
        return None
    return multiaddr_of(external, port) if is_routed(external) and not ip.is_multicast else None


def worth_mapping(listening: Sequence[str], own: Sequence[str]) -> tuple[str, int] | None:
    """Host and port of the first IPv4 socket that a router could forward to.

    None where all listen on loopback, and where one of our ``own`` addresses is on the internet without a router.
    """
    if any(is_routed(address.split("/")[2]) for address in own if address.startswith("/ip4/")):
        return None
    for address in listening:
        _, family, host, _, port = address.split("/")
        if family == "ip4" and not ipaddress.IPv4Address(host).is_loopback:
            return host, int(port)
    return None


class UpnpRouter:
    """Implements Router by miniupnpc: the internet gateway device that answers first on the network of ``host``."""

    def __init__(self, host: str) -> None:
        """``host``: the address that is listened on; unspecified, the machine's routes say which network is asked."""
        self._interface = None if ipaddress.IPv4Address(host).is_unspecified else host
        self._upnp = UPnP()
        self._one_at_a_time = trio.CapacityLimiter(1)
        """Held by a call that nobody waits for any more until it has come to its end."""

    async def discover(self) -> None:
        """Search the local network by multicast."""
        self._upnp = await self._ask(partial(_search, self._interface), SEARCH_S_MAX)

    async def add(self, external_port: int, port: int, lease_s: int) -> None:
        """AddPortMapping, to the address from which this machine speaks with the router."""
        upnp = self._upnp
        wanted = (external_port, "TCP", upnp.lanaddr, port, DESCRIPTION, "", lease_s)
        await self._ask(partial(upnp.addportmapping, *wanted), CALL_S_MAX)

    async def delete(self, external_port: int) -> None:
        """DeletePortMapping."""
        await self._ask(partial(self._upnp.deleteportmapping, external_port, "TCP"), CALL_S_MAX)

    async def external_address(self) -> str:
        """GetExternalIPAddress."""
        return str(await self._ask(self._upnp.externalipaddress, CALL_S_MAX))

    async def _ask(self, question: Callable[[], T], timeout_s: float) -> T:
        try:
            with trio.fail_after(timeout_s):
                # The stubs that come with libp2p are of a trio which called it otherwise.
                return await trio.to_thread.run_sync(  # type: ignore[call-arg]
                    question, abandon_on_cancel=True, limiter=self._one_at_a_time
                )
        except trio.TooSlowError:
            raise RouterError("the router does not answer in time") from None
        except RouterError:
            raise
        except Exception as error:  # The library has no type of its own for what goes wrong.
            raise RouterError(f"the router does not do it: {error}") from error


def _search(interface: str | None) -> UPnP:
    """In a worker thread. Raises RouterError."""
    _check_way(interface)
    upnp = UPnP(multicastif=interface)
    try:
        upnp.discover()
        control = upnp.selectigd()
    except Exception as error:  # As above; and its texts are no help here.
        raise RouterError("no router answers by UPnP") from error
    host = urlsplit(control).hostname or ""
    # Anybody on the local network may answer; requests for a port, which name this machine, do not leave it.
    if not _is_local(host):
        raise RouterError(f"what answers by UPnP is not on the local network: {host!r}")
    return upnp


def _check_way(interface: str | None) -> None:
    """Raises RouterError where nothing can be sent to the local network: the library says that on standard error."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            if interface is not None:
                probe.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(interface))
            probe.connect(SSDP)
        except OSError as error:
            raise RouterError(f"there is no local network to ask: {error.strerror}") from error


def _is_local(host: str) -> bool:
    try:
        return not ipaddress.IPv4Address(host).is_global
    except ValueError:
        return False
