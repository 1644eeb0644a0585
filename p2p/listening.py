"""Listening sockets, and the multiaddrs by which they are named. The only file with multiaddr in it.

Owns how a port is claimed, and which addresses of this machine others can dial. Accepts nothing and dials nothing.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket as stdlib_socket
from collections.abc import Sequence

import ifaddr
import trio
from multiaddr import Multiaddr

from p2p.errors import AddressError, PortInUse

LISTEN_BACKLOG = 128


async def listen_on(address: str) -> trio.SocketListener:
    """Raises AddressError, or PortInUse."""
    host, port = host_and_port(address)
    try:
        return trio.SocketListener(await _bound_socket(host, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(
                f"port {port} on {host} is taken",
                why="another program, or another node, is listening there",
                fix=f"stop it (ss -ltnp 'sport = :{port}' names it) or choose another port",
            ) from error
        raise AddressError(
            f"cannot listen on {address}: {error.strerror}",
            why="no peer could connect to this node",
            fix="listen on an address of this machine, for example /ip4/0.0.0.0/tcp/4100",
        ) from error


async def _bound_socket(host: str, port: int) -> trio.socket.SocketType:
    family = stdlib_socket.AF_INET6 if ":" in host else stdlib_socket.AF_INET
    socket = trio.socket.socket(family, stdlib_socket.SOCK_STREAM)
    try:
        # Never SO_REUSEPORT: a second node on the port must fail, not take half of the connections.
        socket.setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_REUSEADDR, 1)
        if family == stdlib_socket.AF_INET6:
            socket.setsockopt(stdlib_socket.IPPROTO_IPV6, stdlib_socket.IPV6_V6ONLY, 1)
        await socket.bind((host, port))
        socket.listen(LISTEN_BACKLOG)
    except BaseException:
        socket.close()
        raise
    return socket


def host_and_port(address: str) -> tuple[str, int]:
    """Host and TCP port of a multiaddr. Raises AddressError for anything else than name or IP, then TCP."""
    with contextlib.suppress(Exception):  # multiaddr raises a new type for every way to be wrong
        parsed = Multiaddr(address)
        (kind, host), (tcp, port), *rest = [(protocol.name, value) for protocol, value in parsed.items()]
        known = kind in {"ip4", "ip6", "dns", "dns4", "dns6"} and tcp == "tcp"
        if known and all(name == "p2p" for name, _ in rest):
            return str(host), int(str(port))
    raise AddressError(
        f"{address!r} is not an address",
        why="an address names a host and one of its TCP ports, below 65536",
        fix="write for example /ip4/0.0.0.0/tcp/4100",
    )


def dialable_addresses(listeners: Sequence[trio.SocketListener]) -> tuple[str, ...]:
    """What others can dial: a wildcard stands for every interface of its family, loopback last resort."""
    addresses: list[str] = []
    for listener in listeners:
        host, port = listener.socket.getsockname()[:2]
        ip = ipaddress.ip_address(host)
        reachable = _interface_ips(ip.version) if ip.is_unspecified else [ip]
        addresses += [multiaddr_of(str(each), port) for each in reachable]
    return tuple(dict.fromkeys(addresses))


def multiaddr_of(ip: str, port: int) -> str:
    return f"/ip{6 if ':' in ip else 4}/{ip}/tcp/{port}"


def _interface_ips(version: int) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    found = []
    for adapter in ifaddr.get_adapters():
        for entry in adapter.ips:
            ip = ipaddress.ip_address(entry.ip if isinstance(entry.ip, str) else entry.ip[0])
            if ip.version == version and not ip.is_link_local:
                found.append(ip)
    outside = [ip for ip in found if not ip.is_loopback]
    return outside or found
