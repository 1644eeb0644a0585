"""The notice table: converges whatever the order, and holds nothing unchecked."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossip.messages import Notice
from gossip.notices import (
    AUTHOR_SILENCE_S,
    PURPOSE,
    Difference,
    NoticeTable,
    Verdict,
    _claim_of,
    _Versions,
)
from p2p.codec import encode
from p2p.errors import MalformedMessage
from p2p.limits import DEFAULT_LIMITS, Limits
from tests.gossip.world import IDENTITIES, OTHER_RUN, RUN, heartbeat

ALICE, BOB, CAROL = IDENTITIES[:3]


def table(identity=ALICE, *, run=RUN, incarnation=1, limits=DEFAULT_LIMITS):
    return NoticeTable(signer=identity, run=run, incarnation=incarnation, limits=limits)


def _history():
    """Notices of three authors over two lives each, equivocations included: the pool schedules draw from."""
    notices = []
    for author in (ALICE, BOB, CAROL):
        for incarnation in (1, 2):
            said = table(author, incarnation=incarnation)
            notices += [said.publish("heartbeat", heartbeat(step=step)) for step in range(3)]
            notices.append(said.publish("heartbeat", heartbeat(leaving=True)))
        twin = table(author, incarnation=2)
        notices.append(twin.publish("heartbeat", heartbeat(agent="twin")))
    return notices


HISTORY = _history()


@given(st.permutations(range(len(HISTORY))), st.lists(st.sampled_from(range(len(HISTORY)))))
def test_tables_that_saw_the_same_notices_are_equal(order, repeats):
    reference, shuffled = table(IDENTITIES[3]), table(IDENTITIES[4])
    for index in range(len(HISTORY)):
        reference.offer(encode(HISTORY[index]), 0.0)
    for index in [*repeats, *order, *repeats]:
        shuffled.offer(encode(HISTORY[index]), 0.0)
    assert shuffled.versions() == reference.versions()


@given(st.lists(st.sampled_from(range(len(HISTORY)))), st.lists(st.sampled_from(range(len(HISTORY)))))
def test_one_exchange_of_differences_makes_two_tables_equal(left_seen, right_seen):
    left, right = table(IDENTITIES[3]), table(IDENTITIES[4])
    for seen, side in ((left_seen, left), (right_seen, right)):
        for index in seen:
            side.offer(encode(HISTORY[index]), 0.0)
    of_left, of_right = left.compare(right.versions()), right.compare(left.versions())
    for_left, for_right = of_right.missing, of_left.missing
    assert sorted(right.held(of_left.wanted)) == sorted(for_left)
    assert sorted(left.held(of_right.wanted)) == sorted(for_right)
    for packed in for_left:
        assert left.offer(packed, 0.0) is Verdict.ACCEPTED
    for packed in for_right:
        right.offer(packed, 0.0)
    assert left.versions() == right.versions()
    assert left.compare(right.versions()) == Difference(missing=[], wanted=[])


@pytest.mark.parametrize(
    "registers",
    [bytes(39), b"b" * 40 + b"a" * 40, b"a" * 40 + b"a" * 40],
    ids=["not whole", "not sorted", "named twice"],
)
def test_versions_that_are_none_are_not_compared(registers):
    with pytest.raises(MalformedMessage):
        table().compare(registers)


def test_bytes_that_are_no_notice_are_malformed():
    assert table().offer(b"\xff" * 8, 0.0) is Verdict.MALFORMED
    assert table().offer(encode(heartbeat()), 0.0) is Verdict.MALFORMED


def _forgeries():
    """Hostile variants of one genuine notice of BOB's, and what must become of each."""
    genuine = table(BOB).publish("heartbeat", heartbeat())

    def signed(**changes: object) -> Notice:
        changed = msgspec.structs.replace(genuine, **changes)
        return msgspec.structs.replace(changed, signature=BOB.sign(PURPOSE, _claim_of(RUN, changed)))

    return {
        "someone else's name": (msgspec.structs.replace(genuine, author=CAROL.peer), Verdict.SIGNATURE),
        "a later sequence": (msgspec.structs.replace(genuine, sequence=9), Verdict.SIGNATURE),
        "a later incarnation": (msgspec.structs.replace(genuine, incarnation=9), Verdict.SIGNATURE),
        "another body": (
            msgspec.structs.replace(genuine, body=encode(heartbeat(step=7))),
            Verdict.SIGNATURE,
        ),
        "another run": (table(BOB, run=OTHER_RUN).publish("heartbeat", heartbeat()), Verdict.SIGNATURE),
        "not a peer id": (msgspec.structs.replace(genuine, author="0" * 52), Verdict.SIGNATURE),
        "garbage for a body": (signed(body=b"\xff" * 8), Verdict.MALFORMED),
        "a body of another type": (signed(body=encode(genuine)), Verdict.MALFORMED),
        "an unknown kind": (signed(kind="rumour"), Verdict.UNKNOWN_KIND),
        "too large": (signed(body=bytes(12 << 10)), Verdict.OVERSIZED),
    }


@pytest.mark.parametrize("forgery", _forgeries())
def test_hostile_notices_leave_no_trace(forgery):
    notice, expected = _forgeries()[forgery]
    held = table(limits=Limits(notice_bytes_max=8 << 10))
    before = held.versions()
    assert held.offer(encode(notice), 0.0) is expected
    assert held.versions() == before
    assert held.authors() == []


def test_replays_are_known_not_news():
    bob = table(BOB)
    first, second = (bob.publish("heartbeat", heartbeat(step=step)) for step in (1, 2))
    held = table()
    assert [held.offer(encode(n), 0.0) for n in (second, first, second)] == [
        Verdict.ACCEPTED,
        Verdict.KNOWN,
        Verdict.KNOWN,
    ]
    assert held.get(BOB.peer, "heartbeat") == second


def test_own_notice_from_a_forgotten_life_makes_the_incarnation_jump():
    forgotten = table(incarnation=40)
    returned = [forgotten.publish("heartbeat", heartbeat(step=step)) for step in range(5)][-1]
    restored = table(incarnation=7)
    restored.publish("heartbeat", heartbeat(step=3))
    other = table(BOB)
    other.offer(encode(returned), 0.0)

    assert restored.offer(encode(returned), 0.0) is Verdict.ACCEPTED

    assert restored.incarnation == 41
    assert restored.statistics().incarnation_jumps == 1
    now_said = restored.get(ALICE.peer, "heartbeat")
    assert now_said is not None
    assert other.offer(encode(now_said), 0.0) is Verdict.ACCEPTED
    assert other.body_of(ALICE.peer, "heartbeat", type(heartbeat())).step == 3


def test_full_table_keeps_the_living_and_drops_the_longest_silent():
    held = table(limits=Limits(members_max=3))
    bob, carol, dave = (
        encode(table(identity).publish("heartbeat", heartbeat())) for identity in IDENTITIES[1:4]
    )
    assert held.offer(bob, 0.0) is Verdict.ACCEPTED
    assert held.offer(carol, 5.0) is Verdict.ACCEPTED
    assert held.offer(dave, 10.0) is Verdict.TABLE_FULL
    assert held.offer(dave, AUTHOR_SILENCE_S) is Verdict.ACCEPTED
    assert held.authors() == [CAROL.peer, IDENTITIES[3].peer]


def test_who_heeds_changes_is_told_of_what_is_held_then_of_every_change_and_of_what_is_dropped():
    held = table(limits=Limits(members_max=2))
    held.publish("heartbeat", heartbeat())
    told = []
    held.on_change(lambda author, kind, body: told.append((author, kind, body)))
    bob = encode(table(BOB).publish("heartbeat", heartbeat()))
    assert [held.offer(bob, 0.0) for _ in range(2)] == [Verdict.ACCEPTED, Verdict.KNOWN]
    held.publish("heartbeat", heartbeat(step=1))
    held.offer(encode(table(CAROL).publish("heartbeat", heartbeat())), AUTHOR_SILENCE_S)
    assert told == [
        (ALICE.peer, "heartbeat", heartbeat()),
        (BOB.peer, "heartbeat", heartbeat()),
        (ALICE.peer, "heartbeat", heartbeat(step=1)),
        (BOB.peer, "heartbeat", None),
        (CAROL.peer, "heartbeat", heartbeat()),
    ]


def test_the_largest_notices_within_their_own_bounds_are_accepted():
    address = "/dns4/" + "a" * 240 + "/tcp/4100"
    said, held = table(BOB), table()
    largest = heartbeat(addresses=[address] * 8, agent="x" * 64)
    assert held.offer(encode(said.publish("heartbeat", largest)), 0.0) is Verdict.ACCEPTED


def test_publishing_too_much_is_refused():
    with pytest.raises(ValueError, match="more than peers accept"):
        table(limits=Limits(notice_bytes_max=300)).publish("heartbeat", heartbeat())


@given(
    st.lists(
        st.tuples(
            st.sampled_from([bytes([n]) * 16 for n in range(9)]),
            st.none() | st.binary(min_size=24, max_size=24),
        )
    )
)
def test_versions_are_what_sorting_them_would_give(changes):
    kept, plain = _Versions(), {}
    for key, stamp in changes:
        if stamp is not None:
            kept.put(key + stamp)
            plain[key] = stamp
        elif key in plain:
            kept.drop(key)
            del plain[key]
    assert kept.to_bytes() == b"".join(sorted(key + stamp for key, stamp in plain.items()))


def test_authors_are_counted_without_listing_them():
    held = table()
    counts = [held.count_authors()]
    held.offer(encode(table(BOB).publish("heartbeat", heartbeat())), 0.0)
    counts.append(held.count_authors())
    held.publish("heartbeat", heartbeat())
    held.publish("heartbeat", heartbeat(step=1))
    counts.append(held.count_authors())
    assert counts == [0, 1, 2]
    assert len(held.authors()) == 2
