"""The rules of the chain, and that a record or certificate that breaks one is refused, whichever it is."""

from __future__ import annotations

from collections import Counter

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from gossip.merge_record import (
    Link,
    RecordRefused,
    capped_weights,
    check_committed,
    check_record,
    check_rootless,
    electorate,
    genesis_hash,
    next_roster,
    outranks,
    owners,
    quorum,
    ranking,
    record_hash,
    sign_acknowledgement,
    sign_contribution,
)
from gossip.merge_shape import MergeShape
from gossip.messages import Ballot, CommittedRecord, Contribution, MergeRecord, RosterEntry, ShardRef
from p2p.codec import decode, encode
from tests.gossip.merge_world import CheapSigner, peer_named
from tests.gossip.world import OTHER_RUN, RUN

PIECES = 2
SHAPE = MergeShape((100,) * PIECES)
PEERS = [peer_named(number) for number in range(5)]
ANY = CheapSigner(PEERS[0])
"""Checks everybody's signatures."""


def ref(text):
    return ShardRef(root=blake3(text.encode()).digest(), size=100)


def contribution(peer, link):
    inputs = [ref(f"{peer}/{piece}") for piece in range(PIECES)]
    return sign_contribution(
        CheapSigner(peer), link, Contribution(peer=peer, weight=10, moved=list(range(PIECES)), inputs=inputs)
    )


def record_on(link, contributors=PEERS[:3], founders=PEERS[:4], absent=()):
    """A record that follows every rule."""
    return MergeRecord(
        run=link.run,
        parent=link.parent,
        height=link.height,
        point=link.point + 1,
        ballot=Ballot(attempt=0, proposer=PEERS[0]),
        contributors=[contribution(peer, link) for peer in sorted(contributors)],
        results=[ref(f"result/{piece}") for piece in range(PIECES)],
        moved=list(range(PIECES)),
        updates=[],
        roster=next_roster(link, contributors, founders),
        absent=list(absent),
        participants_total=link.participants_total + len(contributors),
    )


BALLOT = Ballot(attempt=2, proposer=PEERS[1])


def committed(record, peers, ballot=BALLOT):
    acknowledgements = [sign_acknowledgement(CheapSigner(peer), record, ballot) for peer in sorted(peers)]
    return CommittedRecord(record=record, ballot=ballot, acknowledgements=acknowledgements)


GENESIS = Link.genesis(RUN)
FIRST = record_on(GENESIS)
SECOND_LINK = Link.after(FIRST)
SECOND = record_on(SECOND_LINK, contributors=PEERS[1:5])


def test_hashes_are_as_documented():
    assert genesis_hash(RUN) == blake3(b"gossamer/genesis/1\x00" + RUN).digest() == GENESIS.parent
    assert record_hash(FIRST) == blake3(encode(FIRST)).digest() == SECOND_LINK.parent
    assert decode(encode(FIRST), MergeRecord, bytes_max=1 << 20) == FIRST


def test_the_roster_follows_from_the_parents_roster_and_the_contributors():
    assert FIRST.roster == [RosterEntry(peer=p, last_height=1) for p in PEERS[:3]] + [
        RosterEntry(peer=PEERS[3], last_height=0)
    ]
    assert [(e.peer, e.last_height) for e in SECOND.roster] == list(zip(PEERS, [1, 2, 2, 2, 2], strict=True))
    link = SECOND_LINK
    for _ in range(4):
        link = Link.after(record_on(link, contributors=PEERS[1:3]))
    # PEERS[0] contributed at height 1, PEERS[3] never: more than three heights later neither has a voice.
    assert [entry.peer for entry in link.roster] == PEERS[1:3]


def test_the_electorate_is_the_parents_roster_and_at_genesis_ones_own():
    assert electorate(FIRST, GENESIS) == frozenset(PEERS[:4])
    assert electorate(SECOND, SECOND_LINK) == frozenset(PEERS[:4])
    without = record_on(SECOND_LINK, contributors=PEERS[:2], absent=PEERS[2:4])
    assert electorate(without, SECOND_LINK) == frozenset(PEERS[:2])


@given(st.integers(1, 100))
def test_two_quorums_always_share_a_member(count):
    needed = quorum(range(count))
    assert needed <= count < 2 * needed


def test_a_good_chain_verifies():
    check_record(FIRST, GENESIS, SHAPE, ANY)
    check_committed(committed(FIRST, PEERS[1:4]), GENESIS, SHAPE, ANY)
    check_committed(committed(SECOND, PEERS[:3]), SECOND_LINK, SHAPE, ANY)
    check_rootless(committed(SECOND, PEERS[:3]), RUN, SHAPE, ANY)


FORGERIES = {
    "another run": {"run": OTHER_RUN},
    "another parent": {"parent": bytes(32)},
    "a skipped height": {"height": 3},
    "an earlier point": {"point": 0},
    "too few results": {"results": SECOND.results[:1]},
    "too many results": {"results": SECOND.results * 2},
    "a padded roster": {"roster": [*SECOND.roster, RosterEntry(peer=peer_named(9), last_height=2)]},
    "a shortened roster": {"roster": SECOND.roster[1:]},
    "unsorted contributors": {"contributors": SECOND.contributors[::-1]},
    "a contributor named twice": {
        "contributors": [SECOND.contributors[0], *SECOND.contributors],
        "participants_total": 8,
    },
    "a wrong total": {"participants_total": 100},
    "an absent stranger": {"absent": [peer_named(9)]},
    "an absent contributor": {"absent": [PEERS[1]]},
    "an inflated weight": {
        "contributors": [replace(SECOND.contributors[0], weight=99), *SECOND.contributors[1:]]
    },
    "a swapped input": {
        "contributors": [
            replace(SECOND.contributors[0], inputs=SECOND.contributors[1].inputs),
            *SECOND.contributors[1:],
        ]
    },
    "a contribution to another link": {
        "contributors": [contribution(PEERS[1], GENESIS), *SECOND.contributors[1:]]
    },
    "a contribution of too few pieces": {
        "contributors": [
            replace(SECOND.contributors[0], inputs=SECOND.contributors[0].inputs[:1]),
            *SECOND.contributors[1:],
        ]
    },
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_record_that_breaks_a_rule_is_refused(forgery):
    with pytest.raises(RecordRefused):
        check_record(replace(SECOND, **FORGERIES[forgery]), SECOND_LINK, SHAPE, ANY)


GOOD = committed(SECOND, PEERS[:3])
CERTIFICATES = {
    "no quorum": committed(SECOND, PEERS[:2]),
    "a voice without a right": committed(SECOND, [*PEERS[:3], PEERS[4]]),
    "one voice twice": replace(GOOD, acknowledgements=[GOOD.acknowledgements[0], *GOOD.acknowledgements[:2]]),
    "unsorted": replace(GOOD, acknowledgements=GOOD.acknowledgements[::-1]),
    "another ballot": replace(GOOD, ballot=Ballot(attempt=3, proposer=PEERS[1])),
    "another record": replace(GOOD, record=replace(SECOND, point=9)),
    "acknowledged before it was proposed": committed(
        replace(SECOND, ballot=Ballot(attempt=5, proposer=PEERS[0])), PEERS[:3]
    ),
    "a forged voice": replace(
        GOOD,
        acknowledgements=[
            *GOOD.acknowledgements[:2],
            replace(GOOD.acknowledgements[2], signature=GOOD.acknowledgements[1].signature),
        ],
    ),
}


@pytest.mark.parametrize("forgery", CERTIFICATES)
def test_a_certificate_that_proves_no_decision_is_refused(forgery):
    with pytest.raises(RecordRefused):
        check_committed(CERTIFICATES[forgery], SECOND_LINK, SHAPE, ANY)


def test_a_record_out_of_reach_of_its_parent_is_checked_in_itself():
    for forgery in (CERTIFICATES["a forged voice"], committed(FIRST, PEERS[:3])):
        with pytest.raises(RecordRefused):
            check_rootless(forgery, RUN, SHAPE, ANY)
    with pytest.raises(RecordRefused):
        check_rootless(GOOD, OTHER_RUN, SHAPE, ANY)


def test_ranking_changes_with_the_parent():
    first = {ranking(bytes([salt]) * 32, PEERS)[0] for salt in range(50)}
    assert first == set(PEERS)
    assert ranking(RUN, PEERS) == ranking(RUN, PEERS[::-1])


@given(st.integers(1, 9), st.integers(1, 20), st.integers(1, 4), st.binary(min_size=32, max_size=32))
def test_owners_share_the_pieces_evenly(count, pieces, replicas, parent):
    peers = [peer_named(number) for number in range(count)]
    chosen = owners(parent, peers, pieces, replicas)
    assert chosen == owners(parent, peers[::-1], pieces, replicas)
    assert all(len(set(each)) == len(each) == min(replicas, count) for each in chosen)
    load = Counter(owner for each in chosen for owner in each)
    assert max(load[peer] for peer in peers) - min(load[peer] for peer in peers) <= 1


@given(st.lists(st.integers(1, 1 << 40), min_size=1, max_size=50))
def test_no_weight_counts_for_more_than_twice_the_median(weights):
    capped = capped_weights(weights)
    ordered = sorted(weights)
    twice_the_median = ordered[(len(weights) - 1) // 2] + ordered[len(weights) // 2]
    assert capped == [min(weight, twice_the_median) for weight in weights]
    assert capped_weights([5]) == [5]
    assert capped_weights([1, 1, 100]) == [1, 1, 2]


def test_more_participants_win_then_the_lower_hash():
    assert outranks(5, bytes([9]), 4, bytes([1]))
    assert outranks(5, bytes([1]), 5, bytes([9]))
    assert not outranks(5, bytes([9]), 5, bytes([9]))
    assert not outranks(4, bytes([1]), 5, bytes([9]))
