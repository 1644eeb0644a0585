"""A small internet for a test: hosts in subnets of their own behind shaped lines, some of them behind NAT.

Network namespaces, a router between the subnets, and for each hidden host a gateway of its own that masquerades it
(nftables): it can dial, and nobody can dial it. Where that is not to be had, tests are skipped and say so.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from tests.process.namespaces import ip

MASQUERADE = """
table ip nat {
    chain out { type nat hook postrouting priority srcnat; oifname "eth0" masquerade; }
}
table ip filter {
    chain in { type filter hook input priority filter; iifname "eth0" ct state new drop; }
    chain through { type filter hook forward priority filter; iifname "eth0" ct state new drop; }
}
"""
"""As home routers do: what nobody inside has asked for is dropped without a word."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a host is: in the subnet 45.<10 subnet>.0.0/24, with a line of ``mbit_per_s`` up and down."""

    subnet: int
    mbit_per_s: float
    hidden: bool = False


@contextmanager
def internet(places: Sequence[Place]) -> Iterator[list[str]]:
    """The namespaces of the hosts, in the order of ``places``; all are gone after the block."""
    if shutil.which("nft") is None:
        pytest.skip(
            "address translation is not to be had here: nft is not installed (apt-get install nftables)"
        )
    prefix = f"gi{os.getpid()}"
    router = f"{prefix}-router"
    with contextlib.ExitStack() as undo:

        def space(name: str) -> str:
            ip("netns", "add", name)
            undo.callback(ip, "netns", "del", name)
            ip("-n", name, "link", "set", "lo", "up")
            return name

        try:
            _forwards(space(router))
            for subnet in sorted({place.subnet for place in places}):
                ip("-n", router, "link", "add", f"net{subnet}", "type", "bridge")
                ip("-n", router, "addr", "add", f"{_net(subnet)}.1/24", "dev", f"net{subnet}")
                ip("-n", router, "link", "set", f"net{subnet}", "up")
            hosts = []
            for number, place in enumerate(places, start=1):
                host = space(f"{prefix}-{number}")
                hosts.append(host)
                outer = space(f"{prefix}-gate{number}") if place.hidden else host
                port = f"port{number}"
                ip("-n", router, "link", "add", port, "type", "veth", "peer", "eth0", "netns", outer)
                ip("-n", router, "link", "set", port, "master", f"net{place.subnet}", "up")
                _reach(outer, f"{_net(place.subnet)}.{10 + number}", f"{_net(place.subnet)}.1")
                for where, card in ((router, port), (outer, "eth0")):
                    _shape(where, card, place.mbit_per_s)
                if place.hidden:
                    # Every home has the same addresses inside.
                    ip("-n", outer, "link", "add", "lan", "type", "veth", "peer", "eth0", "netns", host)
                    ip("-n", outer, "addr", "add", "192.168.1.1/24", "dev", "lan")
                    ip("-n", outer, "link", "set", "lan", "up")
                    _reach(host, "192.168.1.2", "192.168.1.1")
                    _forwards(outer)
                    _run("ip", "netns", "exec", outer, "nft", "-f", "-", text=MASQUERADE)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
            pytest.skip(f"network namespaces are not to be had here: {reason}")
        yield hosts


def _net(subnet: int) -> str:
    return f"45.{10 * subnet}.0"


def _reach(space: str, address: str, gateway: str) -> None:
    ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
    ip("-n", space, "link", "set", "eth0", "up")
    ip("-n", space, "route", "add", "default", "via", gateway)


def _forwards(space: str) -> None:
    _run("ip", "netns", "exec", space, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")


def _shape(space: str, card: str, mbit_per_s: float) -> None:
    shape = ("rate", f"{mbit_per_s:g}mbit", "burst", "64kb", "latency", "200ms")
    _run("tc", "-n", space, "qdisc", "add", "dev", card, "root", "tbf", *shape)


def _run(*command: str, text: str = "") -> None:
    subprocess.run(command, input=text, check=True, capture_output=True, text=True, timeout=10)
