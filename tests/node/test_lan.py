"""What a node announces on the local network, and what it takes from the announcements of others."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossip.address_book import check_address
from node.lan import PEER_CHARS_MAX, announced, candidate, own_interfaces, run_tag, service_name
from p2p.identity import Identity, public_key_of

PEER = Identity.generate().peer
HERE = [ipaddress.ip_interface("192.168.1.7/24"), ipaddress.ip_interface("2001:db8:7::7/64")]
NEIGHBOUR = ipaddress.ip_address("192.168.1.9")
FAR = ipaddress.ip_address("192.168.2.9")
IPS = st.one_of(st.ip_addresses(), st.ip_addresses(network="192.168.1.0/24"))


def says(peer: str | bytes) -> dict[bytes, bytes | None]:
    return {b"peer": peer.encode() if isinstance(peer, str) else peer}


def test_a_name_tells_the_run_to_those_who_know_it_and_fits_a_label() -> None:
    run, other = bytes(32), bytes([1]) * 32
    name = service_name(run, PEER)
    assert name.startswith(run_tag(run))
    assert not name.startswith(run_tag(other))
    assert run.hex()[:8] not in name
    assert PEER not in name
    assert len(name.partition(".")[0]) <= 63
    assert name == name.lower()


@pytest.mark.parametrize(
    ("listening", "expected"),
    [
        (["/ip4/0.0.0.0/tcp/4100"], (4100, ["192.168.1.7"])),
        (["/ip6/::/tcp/4100"], (4100, ["2001:db8:7::7"])),
        (["/ip4/192.168.1.7/tcp/9"], (9, ["192.168.1.7"])),
        (["/ip4/127.0.0.1/tcp/4100", "/ip4/0.0.0.0/tcp/4101"], (4101, ["192.168.1.7"])),
        (["/ip4/127.0.0.1/tcp/4100"], (0, [])),
        ([], (0, [])),
    ],
)
def test_what_is_announced_is_what_others_reach(
    listening: list[str], expected: tuple[int, list[str]]
) -> None:
    assert announced(listening, HERE) == expected


def test_a_neighbour_is_a_candidate_where_it_is_near() -> None:
    record = candidate(says(PEER), 4100, [FAR, NEIGHBOUR, ipaddress.ip_address("2001:db8:7::9")], HERE)
    assert record is not None
    assert record.peer == PEER
    assert record.addresses == ("/ip4/192.168.1.9/tcp/4100", "/ip6/2001:db8:7::9/tcp/4100")


@pytest.mark.parametrize(
    ("properties", "port", "address"),
    [
        ({}, 4100, NEIGHBOUR),
        ({b"peer": None}, 4100, NEIGHBOUR),
        (says("QmNotEd25519"), 4100, NEIGHBOUR),
        (says(PEER + " "), 4100, NEIGHBOUR),
        (says(b"\xff" * 52), 4100, NEIGHBOUR),
        (says(PEER * 5000), 4100, NEIGHBOUR),
        (says(PEER), 0, NEIGHBOUR),
        (says(PEER), None, NEIGHBOUR),
        (says(PEER), 4100, FAR),
        (says(PEER), 4100, ipaddress.ip_address("127.0.0.1")),
    ],
)
def test_what_names_no_peer_near_by_is_ignored(
    properties: dict[bytes, bytes | None],
    port: int | None,
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    assert candidate(properties, port, [address], HERE) is None


@given(
    peer=st.one_of(st.binary(max_size=2 * PEER_CHARS_MAX), st.just(PEER.encode())),
    port=st.one_of(st.none(), st.integers()),
    addresses=st.lists(IPS, max_size=20),
)
def test_whatever_is_announced_a_candidate_can_be_dialled_and_is_near(
    peer: bytes, port: int | None, addresses: list[ipaddress.IPv4Address | ipaddress.IPv6Address]
) -> None:
    record = candidate(says(peer), port, addresses, HERE)
    if record is None:
        return
    public_key_of(record.peer)
    assert 1 <= len(record.addresses) <= 8
    for address in record.addresses:
        check_address(address, chars_max=256)
        assert any(ipaddress.ip_address(address.split("/")[2]) in each.network for each in HERE)


def test_this_machines_interfaces_have_neither_loopback_nor_duplicates() -> None:
    found = own_interfaces()
    assert len(found) == len(set(found))
    assert not any(each.is_loopback or each.is_link_local for each in found)
