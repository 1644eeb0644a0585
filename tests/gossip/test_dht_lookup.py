"""A lookup ends with the closest in an honest network, ends in any other, and gives no liar all of its questions."""

import random

from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from gossip.dht_lookup import ALPHA, ASKED_MAX, NAMED_MAX, Lookup
from gossip.dht_table import BUCKET_MAX, RoutingTable, closest, distance, peer_key
from p2p.identity import peer_id_of
from p2p.transport import PeerRecord
from tests.gossip.test_address_ranges import at

RECORDS = [
    PeerRecord(
        peer_id_of(blake3(b"lookup" + bytes([number >> 8, number & 255])).digest()), (at(1, number % 256),)
    )
    for number in range(300)
]
LOCAL = peer_id_of(bytes(32))
seeds = st.integers(0, 2**32 - 1)


def network(rng, size, among=RECORDS):
    """Records, and what each answers for a key."""
    members = rng.sample(among, size)
    tables = {}
    for member in members:
        tables[member.peer] = RoutingTable(member.peer)
        for other in rng.sample(members, size):
            tables[member.peer].answered(other, 0.0)
    return members, lambda peer, key: tables[peer].closest(key)


def search(lookup, answer, rng):
    """Run it, the answers coming in any order; ``answer(record)`` names others, or is None. Returns who was asked."""
    under_way, asked = [], []
    while True:
        while (record := lookup.next()) is not None:
            under_way.append(record)
            asked.append(record)
        assert len(under_way) <= ALPHA
        if not under_way:
            return asked
        record = under_way.pop(rng.randrange(len(under_way)))
        named = answer(record)
        if named is None:
            lookup.failed(record.peer)
        else:
            lookup.answered(record.peer, named)


@settings(max_examples=12, deadline=None)
@given(seeds, st.integers(1, 60), st.integers(1, 8))
def test_an_honest_network_leads_to_the_closest_with_few_questions(seed, size, known):
    rng = random.Random(seed)
    members, answer = network(rng, size)
    key = rng.randbytes(32)
    lookup = Lookup(key, rng.sample(members, min(known, size)), local=LOCAL)
    asked = search(lookup, lambda record: answer(record.peer, key), rng)
    assert lookup.closest() == closest(members, key)
    assert len(asked) == len(set(asked)) <= 40


@settings(max_examples=12, deadline=None)
@given(seeds, st.floats(0, 0.3))
def test_the_dead_are_passed_over(seed, dead_share):
    rng = random.Random(seed)
    members, answer = network(rng, 40)
    key = rng.randbytes(32)
    dead = set(rng.sample(members, int(dead_share * 40)))
    alive = [member for member in members if member not in dead]
    lookup = Lookup(key, rng.sample(alive, 3), local=LOCAL)
    search(lookup, lambda record: None if record in dead else answer(record.peer, key), rng)
    assert set(lookup.closest()[:3]) <= set(alive)
    # Who holds a record is among the closest; one of them is enough.
    assert set(lookup.closest()) & set(closest(members, key))


@settings(max_examples=12, deadline=None)
@given(seeds, st.booleans(), st.integers(1, 3))
def test_endless_referrals_end_and_leave_questions_for_others(seed, they_answer, liars):
    """Liars among the first eight name others of their own range, closer than anybody honest, who do the same."""
    rng = random.Random(seed)
    key = rng.randbytes(32)
    ordered = sorted(RECORDS, key=lambda each: distance(peer_key(each.peer), key))
    false = [PeerRecord(each.peer, (at(99, 1),)) for each in ordered[:100]]
    existing = [PeerRecord(each.peer, (at(number % 6, 1),)) for number, each in enumerate(ordered[100:])]
    members, answer = network(rng, 40, existing)
    begin = rng.sample(members, 8)
    lying = {record.peer for record in begin[:liars]}
    fakes = {record.peer for record in false}

    def reply(record):
        if record.peer in fakes and not they_answer:
            return None
        if record.peer in lying | fakes:
            return rng.sample(false, BUCKET_MAX)
        return answer(record.peer, key)

    lookup = Lookup(key, begin, local=LOCAL)
    asked = search(lookup, reply, rng)
    assert len(asked) <= ASKED_MAX
    assert len(lookup._candidates) <= NAMED_MAX
    honest = [record for record in closest(members, key) if record.peer not in lying]
    assert set(asked) & set(honest)


def test_nobody_is_asked_twice_nor_oneself():
    lookup = Lookup(bytes(32), RECORDS[:1], local=LOCAL)
    myself = PeerRecord(LOCAL, (at(1, 1),))
    asked = search(lookup, lambda record: [myself, *RECORDS[:4]], random.Random(1))
    assert sorted(record.peer for record in asked) == sorted(record.peer for record in RECORDS[:4])


def test_nobody_known_is_nobody_asked():
    assert Lookup(bytes(32), [], local=LOCAL).next() is None
