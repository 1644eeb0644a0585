"""Ranges of addresses, and what the address book makes of somebody who has many addresses of one."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossip.address_book import ANCHORS_MAX, AddressBook, check_address
from gossip.address_ranges import LOCAL, NAMES, most_diverse, range_of
from p2p.identity import peer_id_of
from p2p.limits import Limits
from tests.gossip.world import MemoryDisk

ROOM = 12


def peer(number: int):
    return peer_id_of(number.to_bytes(32, "big"))


def at(block: int, host: int) -> str:
    """An address in the ``block``-th range of 11.0.0.0/8."""
    return f"/ip4/11.{block}.{host // 250}.{host % 250 + 1}/tcp/4100"


def small_book(disk: MemoryDisk | None = None) -> AddressBook:
    return AddressBook(
        disk or MemoryDisk(),
        local=peer(10**6),
        limits=Limits(address_book_max=ROOM),
        rng=random.Random(1),
    )


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("/ip4/8.8.4.4/tcp/1", "8.8.0.0/16"),
        ("/ip4/8.8.200.1/tcp/99", "8.8.0.0/16"),
        ("/ip6/2a00:1450:4001:80b::200e/tcp/1", "2a00:1450::/32"),
        ("/ip4/192.168.1.1/tcp/1", LOCAL),
        ("/ip4/10.1.2.3/tcp/1", LOCAL),
        ("/ip4/127.0.0.1/tcp/1", LOCAL),
        ("/ip6/fd00::1/tcp/1", LOCAL),
        ("/dns/a.example.org/tcp/1", NAMES),
        ("/dns4/example.net/tcp/1", NAMES),
    ],
)
def test_the_range_of_an_address(address: str, expected: str) -> None:
    assert check_address(address, chars_max=256)
    assert range_of(address) == expected


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), max_size=40), st.integers(0, 10))
def test_as_many_ranges_as_there_are_come_first(members: list[tuple[int, int]], count: int) -> None:
    candidates = [(peer(number), at(block, number)) for number, block in members]
    chosen = most_diverse(candidates, count)
    first_seen = dict(reversed(candidates))
    assert chosen.items() <= first_seen.items()
    assert len(chosen) == min(count, len(first_seen))
    ranges = {range_of(address) for address in first_seen.values()}
    assert len({range_of(address) for address in chosen.values()}) == min(count, len(ranges))


actions = st.lists(
    st.tuples(
        st.sampled_from(["heartbeat", "hello", "exchange", "bootstrap", "failed", "succeeded"]),
        st.integers(0, 60),
        st.lists(st.integers(0, 8), min_size=1, max_size=3),
    ),
    max_size=120,
)


@given(actions)
@settings(max_examples=200)
def test_the_count_of_each_range_is_that_of_the_entries_whatever_happens(
    history: list[tuple[str, int, list[int]]],
) -> None:
    book = small_book()
    permanent = set()
    for what, number, blocks in history:
        match what:
            case "failed":
                book.failed(peer(number), "no answer", 0.0)
            case "succeeded":
                book.succeeded(peer(number))
            case _:
                addresses = [at(block, number) for block in blocks]
                book.add(peer(number), addresses, what)  # type: ignore[arg-type]
                if what == "bootstrap" and book.record(peer(number)) is not None:
                    permanent.add(peer(number))
        assert len(book) <= ROOM
        assert all(book.record(kept) is not None for kept in permanent)
    counted: dict[str, int] = {}
    for entry in book._entries.values():
        for each in {range_of(address) for address in entry.sources}:
            counted[each] = counted.get(each, 0) + 1
    assert dict(book._crowd) == counted


@given(
    honest=st.integers(1, ROOM - 2),
    flood=st.lists(st.integers(0, 10_000), max_size=200),
    failing=st.booleans(),
    claims=st.booleans(),
    data=st.data(),
)
@settings(max_examples=100)
def test_whoever_has_one_range_drives_nobody_out_of_the_book(
    honest: int, flood: list[int], *, failing: bool, claims: bool, data: st.DataObject
) -> None:
    """Before, between or after the flood, with honest peers that are off for now, and liars that claim more."""
    arrivals = [("honest", number) for number in range(honest)] + [("flood", number) for number in flood]
    book = small_book()
    for kind, number in data.draw(st.permutations(arrivals)):
        if kind == "honest":
            book.add(peer(number), [at(100 + number, number)], "heartbeat")
            if failing:
                book.failed(peer(number), "off for the night", 0.0)
        else:
            also = [at(number % 3, 77)] if claims else []
            book.add(peer(10_000 + number), [at(50, number), *also], "heartbeat")
    for number in range(honest):
        assert book.record(peer(number)) is not None


def test_an_address_that_is_wanted_elsewhere_is_dialled_there_alone() -> None:
    """Who claims an address in another range must be there, or the dial fails."""
    book = small_book()
    book.add(peer(1), [at(1, 1), at(2, 1)], "heartbeat")
    book.add(peer(2), [at(1, 2)], "heartbeat")
    (record,) = book.due(9, exclude=(), now_s=0.0, outside={range_of(at(1, 0))})
    assert (record.peer, record.addresses) == (peer(1), (at(2, 1),))
    assert book.due(9, exclude=(), now_s=0.0, outside={range_of(at(1, 0)), range_of(at(2, 0))}) == []


async def test_anchors_come_first_in_the_next_life_and_are_never_displaced() -> None:
    disk = MemoryDisk()
    before = small_book(disk)
    for number in range(8):
        before.add(peer(number), [at(number // 2, number)], "heartbeat")
    # The four oldest links lead into two ranges, the others into two more: one of each range is an anchor.
    before.name_anchors((peer(number), at(number // 2, number)) for number in range(8))
    await before.save()

    after = small_book(disk)
    await after.load()
    for number in range(100):
        after.add(peer(1000 + number), [at(200, number)], "heartbeat")
        after.failed(peer(1000 + number), "no answer", 0.0)
    anchors = {peer(number) for number in (0, 2, 4, 6)}
    assert {record.peer for record in after.due(ANCHORS_MAX, exclude=(), now_s=0.0)} == anchors
    # Who was cut off for all of a life still has them in the one after.
    after.name_anchors([])
    await after.save()
    third = small_book(disk)
    await third.load()
    assert {record.peer for record in third.due(ANCHORS_MAX, exclude=(), now_s=0.0)} == anchors


async def test_a_file_of_anchors_only_is_bounded_too() -> None:
    disk = MemoryDisk()
    disk.files["peers.json"] = (
        "["
        + ",".join(
            f'{{"peer":"{peer(n)}","addresses":["{at(n, n)}"],"successes":0,"anchor":"{at(n, n)}"}}'
            for n in range(10)
        )
        + "]"
    ).encode()
    book = small_book(disk)
    await book.load()
    assert len(book._begun_with) == ANCHORS_MAX
