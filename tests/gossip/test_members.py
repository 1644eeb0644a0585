"""Member states from the timing of heartbeats."""

from __future__ import annotations

import pytest

from gossip.members import GONE_FACTOR, SUSPECT_S_MAX, SUSPECT_S_MIN, MemberTable
from p2p.transport import PeerId
from tests.gossip.world import heartbeat

ME, PEER = PeerId("me"), PeerId("peer")


def after_beats(interval_s, count=50):
    members = MemberTable(local=ME)
    for beat in range(count):
        members.heard(PEER, heartbeat(step=beat), beat * interval_s)
    return members, (count - 1) * interval_s


def test_one_heartbeat_is_hearsay_and_two_prove_life():
    members = MemberTable(local=ME)
    members.heard(PEER, heartbeat(), 0.0)
    assert members.state(PEER, 0.0) == "suspect"
    members.heard(PEER, heartbeat(step=1), 1.0)
    assert members.state(PEER, 1.0) == "alive"
    assert members.alive(1.0) == [PEER]


def test_a_connection_proves_life_and_losing_it_casts_doubt_until_the_next_heartbeat():
    members = MemberTable(local=ME)
    members.heard(PEER, heartbeat(), 0.0)
    members.connected(PEER)
    assert members.state(PEER, 0.5) == "alive"
    members.disconnected(PEER)
    assert members.state(PEER, 0.6) == "suspect"
    members.heard(PEER, heartbeat(step=1), 0.7)
    assert members.state(PEER, 0.7) == "alive"


def test_a_regular_member_is_suspect_at_the_floor_and_gone_after_it():
    members, last_s = after_beats(1.0)
    assert members.state(PEER, last_s + SUSPECT_S_MIN) == "alive"
    assert members.state(PEER, last_s + SUSPECT_S_MIN + 0.1) == "suspect"
    assert members.state(PEER, last_s + GONE_FACTOR * SUSPECT_S_MIN + 0.1) == "gone"


@pytest.mark.parametrize("interval_s", [6.0, 12.0])
def test_a_slow_member_stretches_its_own_deadline(interval_s):
    members, last_s = after_beats(interval_s)
    assert members.state(PEER, last_s + interval_s) == "alive"


def test_no_member_stretches_its_deadline_beyond_the_cap():
    members, last_s = after_beats(1000.0)
    assert members.state(PEER, last_s + SUSPECT_S_MAX + 0.1) == "suspect"
    assert members.state(PEER, last_s + GONE_FACTOR * SUSPECT_S_MAX + 0.1) == "gone"


def test_goodbye_counts_at_once_and_a_return_too():
    members, last_s = after_beats(1.0)
    members.heard(PEER, heartbeat(leaving=True), last_s + 1)
    assert members.state(PEER, last_s + 1) == "left"
    members.heard(PEER, heartbeat(), last_s + 2)
    assert members.state(PEER, last_s + 2) == "alive"
    assert members.statistics(last_s + 2) == {"alive": 1, "suspect": 0, "gone": 0, "left": 0}


def test_strangers_and_ourselves_are_no_members():
    members, last_s = after_beats(1.0)
    members.heard(ME, heartbeat(), 0.0)
    members.forget(PEER)
    assert members.members(last_s) == []
    assert members.get(PEER, last_s) is None
    assert members.state(PEER, last_s) == "gone"
    assert members.unheard_s(PEER, last_s) == float("inf")
