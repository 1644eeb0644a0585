"""The routing table: bounded whatever happens, right about distances, and not to be taken over from one range."""

import random

from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from gossip.dht_table import BUCKET_MAX, RANGE_MAX, RoutingTable, closest, distance, peer_key, run_key
from p2p.identity import peer_id_of
from p2p.transport import PeerRecord
from tests.gossip.test_address_ranges import at

PEERS = [peer_id_of(blake3(bytes([number >> 8, number & 255])).digest()) for number in range(400)]
LOCAL = PEERS[0]
KEY = run_key(bytes(32))

numbers = st.integers(0, len(PEERS) - 1)
blocks = st.integers(1, 4)


def record(number, block=1):
    return PeerRecord(PEERS[number], (at(block, number % 256),))


def table_of(records):
    table = RoutingTable(LOCAL)
    for each in records:
        table.answered(each, 0.0)
    return table


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["answered", "failed"]), numbers, blocks), max_size=300))
def test_buckets_are_bounded_and_hold_who_answered(events):
    table = RoutingTable(LOCAL)
    answered = set()
    for event, number, block in events:
        if event == "answered":
            table.answered(record(number, block), 1.0)
            answered.add(PEERS[number])
        else:
            table.failed(PEERS[number])
        assert all(len(bucket) <= BUCKET_MAX for bucket in table._buckets.values())
    held = {each.peer for each in (contact.record for contact in table._contacts())}
    assert held <= answered - {LOCAL}
    assert len(table) == len(held)


@settings(max_examples=25, deadline=None)
@given(st.sets(numbers, max_size=40), st.binary(min_size=32, max_size=32))
def test_the_closest_are_the_closest(chosen, key):
    records = [record(number) for number in sorted(chosen)]
    ordered = sorted(records, key=lambda each: distance(peer_key(each.peer), key))
    assert closest(records, key) == ordered[:BUCKET_MAX]


@settings(max_examples=25, deadline=None)
@given(st.sets(numbers, min_size=30, max_size=60), st.binary(min_size=32, max_size=32))
def test_half_of_the_closest_are_of_other_ranges_where_there_are_any(chosen, key):
    ordered = sorted(
        (record(number, 1) for number in chosen), key=lambda each: distance(peer_key(each.peer), key)
    )
    # All but the farthest eight are of one range.
    spread = [PeerRecord(each.peer, (at(2 + i, i),)) for i, each in enumerate(ordered[-8:])]
    found = closest([*ordered[:-8], *spread], key)
    assert len(found) == BUCKET_MAX
    assert sum(each in spread for each in found) == BUCKET_MAX - RANGE_MAX


def test_a_full_bucket_keeps_whom_it_has_and_gives_way_to_rare_ranges_only():
    far = [number for number in range(1, 400) if distance(peer_key(PEERS[number]), peer_key(LOCAL)) >> 255]
    table = table_of(record(number) for number in far[:BUCKET_MAX])
    assert not table.has_room_for(record(far[8]))
    table.answered(record(far[8]), 1.0)
    assert PEERS[far[8]] not in table
    assert table.has_room_for(record(far[9], block=2))
    table.answered(record(far[9], block=2), 1.0)
    assert PEERS[far[9]] in table
    assert PEERS[far[7]] not in table  # The youngest of the crowded range.
    assert all(PEERS[number] in table for number in far[:7])


def test_who_fails_twice_in_a_row_is_dropped():
    table = table_of([record(1), record(2)])
    table.failed(PEERS[1])
    table.answered(record(1), 2.0)
    table.failed(PEERS[1])
    assert PEERS[1] in table
    table.failed(PEERS[1])
    assert PEERS[1] not in table


def test_the_stalest_is_asked_for_a_point_in_its_bucket():
    table = table_of([record(number) for number in range(1, 60)])
    table.answered(record(1), 5.0)
    assert table.stalest(before_s=0.0) is None
    stale = table.stalest(before_s=1.0)
    assert stale is not None
    assert stale.peer != PEERS[1]
    rng = random.Random(1)
    for contact in table._contacts():
        key = table.key_near(contact.record.peer, rng)
        assert distance(key, peer_key(LOCAL)).bit_length() - 1 == table._index(contact.record.peer)
