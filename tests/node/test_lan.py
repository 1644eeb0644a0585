"""What a node announces on the local network, and what it takes from the announcements of others."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossip.address_book import check_address
from node.lan import TOLD_BYTES_MAX, LanNames, announced, candidate, own_interfaces
from p2p.identity import Identity, public_key_of
from p2p.swarm_key import SwarmKey

PEER = Identity.generate().peer
HERE = [ipaddress.ip_interface("192.168.1.7/24"), ipaddress.ip_interface("2001:db8:7::7/64")]
NEIGHBOUR = ipaddress.ip_address("192.168.1.9")
FAR = ipaddress.ip_address("192.168.2.9")
IPS = st.one_of(st.ip_addresses(), st.ip_addresses(network="192.168.1.0/24"))


RUN = bytes(32)
KEY = SwarmKey(b"k" * 32)
OPEN, PRIVATE = LanNames(RUN, None), LanNames(RUN, KEY)


@pytest.mark.parametrize("names", [OPEN, PRIVATE], ids=["open", "private"])
def test_a_name_tells_the_run_to_those_who_know_it_and_fits_a_label(names: LanNames) -> None:
    name = names.service(PEER)
    assert name.startswith(names.tag)
    assert not name.startswith(LanNames(bytes([1]) * 32, None).tag)
    assert RUN.hex()[:8] not in name
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
    record = candidate(PEER, 4100, [FAR, NEIGHBOUR, ipaddress.ip_address("2001:db8:7::9")], HERE)
    assert record is not None
    assert record.peer == PEER
    assert record.addresses == ("/ip4/192.168.1.9/tcp/4100", "/ip6/2001:db8:7::9/tcp/4100")


@pytest.mark.parametrize(
    ("port", "address"),
    [(0, NEIGHBOUR), (None, NEIGHBOUR), (4100, FAR), (4100, ipaddress.ip_address("127.0.0.1"))],
)
def test_what_is_not_near_by_is_ignored(
    port: int | None, address: ipaddress.IPv4Address | ipaddress.IPv6Address
) -> None:
    assert candidate(PEER, port, [address], HERE) is None


@pytest.mark.parametrize(
    "told",
    [b"", b"QmNotEd25519", PEER.encode() + b" ", b"\xff" * 52, PEER.encode() * 5000],
    ids=["nothing", "another kind of key", "a space", "no text", "far too long"],
)
def test_what_names_no_peer_is_ignored(told: bytes) -> None:
    assert OPEN.heard(told) is None
    assert PRIVATE.heard(told) is None


def test_a_private_swarm_is_announced_to_its_members_alone() -> None:
    told = PRIVATE.told(PEER)
    assert len(told) <= TOLD_BYTES_MAX
    assert LanNames(RUN, KEY).heard(told) == PEER
    assert PEER.encode() not in told
    assert public_key_of(PEER) not in told
    assert told != PRIVATE.told(PEER)
    assert LanNames(RUN, SwarmKey(b"o" * 32)).heard(told) is None
    assert OPEN.heard(told) is None
    assert LanNames(bytes([1]) * 32, KEY).heard(told) is None, "what was told of one run is not of another"
    assert PRIVATE.heard(told[:-1] + bytes([told[-1] ^ 1])) is None
    assert PRIVATE.heard(PEER.encode()) is None, "nothing that was said in the clear is believed"
    # Who knows the run's id, but not the key, cannot tell that somebody follows it here.
    assert PRIVATE.tag != OPEN.tag
    assert PRIVATE.service(PEER).partition("-")[2] != OPEN.service(PEER).partition("-")[2]


@given(
    names=st.sampled_from([OPEN, PRIVATE]),
    told=st.one_of(
        st.binary(max_size=2 * TOLD_BYTES_MAX), st.just(PEER.encode()), st.just(PRIVATE.told(PEER))
    ),
    port=st.one_of(st.none(), st.integers()),
    addresses=st.lists(IPS, max_size=20),
)
def test_whatever_is_announced_a_candidate_can_be_dialled_and_is_near(
    names: LanNames,
    told: bytes,
    port: int | None,
    addresses: list[ipaddress.IPv4Address | ipaddress.IPv6Address],
) -> None:
    peer = names.heard(told)
    record = None if peer is None else candidate(peer, port, addresses, HERE)
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
