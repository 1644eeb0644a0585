"""Addresses: what is dialled, in which order, how often, and what survives a restart."""

from __future__ import annotations

import random

import pytest

from gossip.address_book import (
    BACK_OFF_MAX_S,
    BACK_OFF_PERMANENT_MAX_S,
    PATH,
    AddressBook,
    check_address,
    parse_peer_address,
)
from p2p.errors import AddressError
from p2p.limits import DEFAULT_LIMITS, Limits
from tests.gossip.world import IDENTITIES, MemoryDisk

ME, ALICE, BOB, CAROL = (identity.peer for identity in IDENTITIES[:4])
HOME = "/ip4/192.0.2.7/tcp/4100"


def book(disk=None, limits=DEFAULT_LIMITS):
    return AddressBook(disk or MemoryDisk(), local=ME, limits=limits, rng=random.Random(1))


@pytest.mark.parametrize(
    "text",
    [HOME, "/ip4/127.0.0.1/tcp/1", "/ip6/::1/tcp/65535", "/dns/example.org/tcp/80", "/dns4/a-b.c/tcp/4100"],
)
def test_dialable_addresses_pass(text):
    assert check_address(text, chars_max=256) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "192.0.2.7:4100",
        "/ip4/0.0.0.0/tcp/4100",
        "/ip6/::/tcp/4100",
        "/ip4/224.0.0.1/tcp/4100",
        "/ip4/192.0.2.7/tcp/0",
        "/ip4/192.0.2.7/tcp/65536",
        "/ip4/192.0.2.7/tcp/-1",
        "/ip4/192.0.2.7/tcp/4100/",
        "/ip4/192.0.2.7/tcp/4100/ws",
        "/ip4/192.0.2.7/udp/4100",
        "/ip4/::1/tcp/4100",
        "/ip6/192.0.2.7/tcp/4100",
        "/ip4/192.0.2.777/tcp/4100",
        "/dns/-bad-.org/tcp/4100",
        "/dns/" + "a." * 127 + "a/tcp/4100",
        "/unix/tmp/tcp/4100",
        "/ip4/192.0.2.7/tcp/٤١٠٠",
    ],
)
def test_everything_else_is_refused(text):
    with pytest.raises(AddressError):
        check_address(text, chars_max=256)


def test_peer_addresses_name_their_peer():
    assert parse_peer_address(f"{HOME}/p2p/{ALICE}", chars_max=256) == (ALICE, HOME)
    for text in (HOME, f"{HOME}/p2p/", f"{HOME}/p2p/QmNotEd25519", f"/p2p/{ALICE}"):
        with pytest.raises(AddressError):
            parse_peer_address(text, chars_max=256)


def test_a_peers_own_word_replaces_what_it_said_before_but_never_the_bootstrap_address():
    known = book()
    known.add(ALICE, [HOME], "bootstrap")
    known.add(ALICE, ["/ip4/192.0.2.8/tcp/1", "/ip4/0.0.0.0/tcp/1"], "heartbeat")
    known.add(ALICE, ["/ip4/192.0.2.9/tcp/1"], "heartbeat")
    record = known.record(ALICE)
    assert record is not None
    assert record.addresses == ("/ip4/192.0.2.9/tcp/1", HOME)


def test_bounded_per_peer_and_in_all():
    known = book(limits=Limits(addresses_per_peer_max=2, address_book_max=2))
    known.add(ALICE, [f"/ip4/192.0.2.{n}/tcp/1" for n in range(9)], "hello")
    record = known.record(ALICE)
    assert record is not None
    assert len(record.addresses) == 2
    known.add(BOB, [HOME], "heartbeat")
    assert not known.add(CAROL, [HOME], "heartbeat"), "nobody has failed: no reason to displace anybody"
    known.failed(BOB, "no answer", 0.0)
    assert known.add(CAROL, [HOME], "heartbeat")
    assert known.record(BOB) is None
    assert len(known) == 2


def test_back_off_grows_to_a_cap_and_permanent_peers_come_first_and_stay_near():
    known = book()
    known.add(ALICE, [HOME], "heartbeat")
    known.add(BOB, [HOME], "invite")
    assert [record.peer for record in known.due(2, exclude=(), now_s=0.0)] == [BOB, ALICE]
    waits = []
    for _ in range(30):
        known.failed(ALICE, "no answer", 0.0)
        known.failed(BOB, "no answer", 0.0)
        waits.append((known._entries[ALICE].retry_s, known._entries[BOB].retry_s))
    assert waits[0][0] <= 1.0
    assert BACK_OFF_MAX_S / 2 <= waits[-1][0] <= BACK_OFF_MAX_S
    assert BACK_OFF_PERMANENT_MAX_S / 2 <= waits[-1][1] <= BACK_OFF_PERMANENT_MAX_S
    assert known.due(2, exclude=(), now_s=0.0) == []
    assert [r.peer for r in known.due(2, exclude=(), now_s=BACK_OFF_PERMANENT_MAX_S)] == [BOB]
    assert known.failing() == [(BOB, "no answer")]
    known.succeeded(BOB)
    assert known.failing() == []


def test_excluded_peers_and_ourselves_are_never_due():
    known = book()
    known.add(ME, [HOME], "heartbeat")
    known.add(ALICE, [HOME], "heartbeat")
    assert known.due(5, exclude={ALICE}, now_s=0.0) == []


async def test_a_restarted_node_knows_its_swarm():
    disk = MemoryDisk()
    before = book(disk)
    before.add(ALICE, [HOME], "heartbeat")
    before.add(BOB, ["/dns/example.org/tcp/9"], "bootstrap")
    await before.save()
    after = book(disk)
    await after.load()
    assert {record.peer: record.addresses for record in after.due(9, exclude=(), now_s=0.0)} == {
        ALICE: (HOME,),
        BOB: ("/dns/example.org/tcp/9",),
    }


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[1]",
        b'[{"peer":"\xb3","addresses":[],"successes":0}]',
        b'[{"peer":"x","addresses":["/ip4/0.0.0.0/tcp/1"],"successes":0}]',
    ],
)
async def test_a_damaged_file_is_no_obstacle(data):
    disk = MemoryDisk()
    disk.files[PATH] = data
    known = book(disk)
    await known.load()
    assert len(known) == 0
