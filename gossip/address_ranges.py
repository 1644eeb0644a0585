"""Whose an address may be, as far as it tells: what one operator gets many of counts as one.

Owns the rule that makes a range of an address, and the choice of few out of many that are in different ones. Pure
functions. Anybody can have a thousand peer ids; addresses in many ranges are harder to come by.
"""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Iterable, Sequence

from p2p.circuits import split_circuit
from p2p.transport import PeerId

RANGE_BITS_IPV4, RANGE_BITS_IPV6 = 16, 32
RANGES_REMEMBERED = 1 << 14
NAMES = "names"
LOCAL = "local"


@functools.lru_cache(maxsize=RANGES_REMEMBERED)
def range_of(address: str) -> str:
    """The range of a multiaddr that can be dialled: its /16 for IPv4, its /32 for IPv6.

    All names together are one range, since who owns a name decides where it leads; so are all addresses that are not
    routed on the internet, since they are on one's own network.
    """
    _, family, host, *_ = address.split("/")
    if family.startswith("dns"):
        return NAMES
    ip = ipaddress.ip_address(host)
    if not ip.is_global:
        return LOCAL
    bits = RANGE_BITS_IPV4 if ip.version == 4 else RANGE_BITS_IPV6
    return str(ipaddress.ip_network((ip, bits), strict=False))


def is_routed(host: str) -> bool:
    """Whether ``host`` is an IP address of the internet, not of a local network or this machine."""
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        return False


def best_for_strangers(addresses: Sequence[str]) -> str:
    """Which of a peer's addresses, at least one, somebody elsewhere is most likely to reach it at.

    Routed ones and names first, then the way through a relay, and last those of a local network.
    """

    def likelihood(address: str) -> int:
        if range_of(address) == LOCAL:
            return 0
        return 1 if split_circuit(address) is not None else 2

    return max(addresses, key=likelihood)


def most_diverse(candidates: Iterable[tuple[PeerId, str]], count: int) -> dict[PeerId, str]:
    """Up to ``count`` peers with their addresses: first those in ranges of their own, then others, in order."""
    first: dict[PeerId, str] = {}
    others: dict[PeerId, str] = {}
    ranges: set[str] = set()
    for peer, address in candidates:
        if peer in first or peer in others:
            continue
        (others if range_of(address) in ranges else first)[peer] = address
        ranges.add(range_of(address))
    return dict(list((first | others).items())[:count])
