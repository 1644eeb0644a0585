"""Provider records: only true ones count, only for a while, and what one holder keeps of them is bounded."""

import random

import msgspec
import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from gossip import dht_records
from gossip.dht_records import (
    CLOCK_OFF_S,
    RECORD_S,
    RENEWED_S_MIN,
    RecordRefused,
    RecordStore,
    check_record,
    sign_record,
)
from gossip.dht_table import run_key
from gossip.messages import DHT_RECORDS_TOLD_MAX
from netsim.signer import StubSigner, machine_peer, world_key
from p2p.limits import DEFAULT_LIMITS
from tests.gossip.test_address_ranges import at
from tests.gossip.world import IDENTITIES

NOW_S = 1_800_000_000
KEY, OTHER = run_key(bytes(32)), run_key(bytes([1]) * 32)
OURS, THEIRS = IDENTITIES[:2]
ADDRESSES = ["/ip4/192.0.2.7/tcp/4100"]


def check(record, key=KEY, now_s=NOW_S):
    check_record(record, key, now_unix_s=now_s, signer=OURS, limits=DEFAULT_LIMITS)


def new_store(signer=OURS):
    return RecordStore(signer=signer, limits=DEFAULT_LIMITS, rng=random.Random(1))


def stub(number):
    return StubSigner(machine_peer(1, number), world_key(1))


def test_a_record_counts_for_its_key_from_now_until_it_ends():
    record = sign_record(THEIRS, KEY, ADDRESSES, now_unix_s=NOW_S)
    check(record)
    check(record, now_s=NOW_S + RECORD_S - 1)
    check(record, now_s=NOW_S - CLOCK_OFF_S)  # Their clock is ahead of ours.
    for now_s in (NOW_S + RECORD_S, NOW_S - CLOCK_OFF_S - 1):
        with pytest.raises(RecordRefused, match="expired"):
            check(record, now_s=now_s)
    with pytest.raises(RecordRefused, match="malformed"):
        check(record, key=OTHER)


@pytest.mark.parametrize(
    "change",
    [
        {"peer": OURS.peer},
        {"addresses": ["/ip4/192.0.2.8/tcp/4100"]},
        {"expires_unix_s": NOW_S + RECORD_S + 1},
        {"signature": bytes(64)},
    ],
)
def test_a_changed_record_does_not_count(change):
    record = sign_record(THEIRS, KEY, ADDRESSES, now_unix_s=NOW_S)
    with pytest.raises(RecordRefused, match="signature"):
        check(msgspec.structs.replace(record, **change))


@pytest.mark.parametrize("address", ["/ip4/0.0.0.0/tcp/1", "/ip4/192.0.2.7/udp/1", "nowhere"])
def test_an_address_that_cannot_be_dialled_does_not_count(address):
    with pytest.raises(RecordRefused, match="malformed"):
        check(sign_record(THEIRS, KEY, [address], now_unix_s=NOW_S))


def test_the_store_gives_back_what_it_was_given_while_it_counts():
    store = new_store()
    record = sign_record(THEIRS, KEY, ADDRESSES, now_unix_s=NOW_S)
    store.put(record, now_unix_s=NOW_S)
    assert store.of(KEY, now_unix_s=NOW_S) == [record]
    assert store.of(OTHER, now_unix_s=NOW_S) == []
    assert store.of(KEY, now_unix_s=NOW_S + RECORD_S) == []
    assert len(store) == 0


def test_the_newest_word_stands():
    store = new_store()
    old = sign_record(THEIRS, KEY, ADDRESSES, now_unix_s=NOW_S)
    new = sign_record(THEIRS, KEY, ["/ip4/192.0.2.9/tcp/4100"], now_unix_s=NOW_S + RENEWED_S_MIN)
    for record in (new, old, new):
        store.put(record, now_unix_s=NOW_S + RENEWED_S_MIN)
    assert store.of(KEY, now_unix_s=NOW_S) == [new]


def test_what_says_nothing_new_is_not_even_checked():
    store = new_store()
    record = sign_record(THEIRS, KEY, ADDRESSES, now_unix_s=NOW_S)
    store.put(record, now_unix_s=NOW_S)
    store.put(msgspec.structs.replace(record, signature=bytes(64)), now_unix_s=NOW_S)
    assert store.of(KEY, now_unix_s=NOW_S) == [record]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(0, 6), st.integers(1, 3), st.integers(0, 2 * RECORD_S)),
        max_size=120,
    )
)
def test_no_bound_is_ever_passed(puts):
    bounds = {
        "RECORDS_MAX": 40,
        "RECORDS_PER_KEY_MAX": 8,
        "RECORDS_PER_PEER_MAX": 3,
        "RECORDS_PER_RANGE_MAX": 20,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in bounds.items():
            patch.setattr(dht_records, name, value)
        store = new_store(stub(0))
        for number, key, block, at_s in sorted(puts, key=lambda put: put[3]):
            now_s = NOW_S + at_s
            record = sign_record(
                stub(number), run_key(bytes([key]) * 32), [at(block, number)], now_unix_s=now_s
            )
            store.put(record, now_unix_s=now_s)
            assert len(store) == len(store._all()) <= 40
            assert all(len(held) <= 8 for held in store._keys.values())
            assert max(store._of_peer.values()) <= 3
            assert max(store._of_range.values()) <= 20


def test_a_flood_from_one_range_leaves_room_for_others():
    store = new_store(stub(0))
    for number in range(200):
        store.put(sign_record(stub(number), KEY, [at(7, number)], now_unix_s=NOW_S), now_unix_s=NOW_S)
    honest = sign_record(stub(1000), KEY, [at(8, 1)], now_unix_s=NOW_S)
    store.put(honest, now_unix_s=NOW_S)
    assert honest in store._of_key(KEY)
    assert len(store) == dht_records.RECORDS_PER_KEY_MAX
    assert len(store.of(KEY, now_unix_s=NOW_S)) == DHT_RECORDS_TOLD_MAX


def test_who_holds_a_key_does_not_learn_the_run():
    run = blake3(b"spec").digest()
    assert run_key(run) != run
    assert run_key(run) == run_key(bytes(run))
