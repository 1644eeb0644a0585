"""Whose turn it is, how long anybody waits, and that no pause grows without bound."""

from __future__ import annotations

import math
import random

import pytest

from gossip.merge_pace import CALL_FLOOR_S, MergePace
from gossip.merge_record import Link, ranking
from gossip.merge_turns import MergeTurns, turns_before
from gossip.messages import Ballot
from p2p.limits import Limits
from tests.gossip.merge_world import peer_named
from tests.gossip.world import RUN

LIMITS = Limits()
LINK = Link.genesis(RUN)
RANKED = ranking(LINK.parent, [peer_named(number) for number in range(4)])


def turns_of(peer):
    return MergeTurns(local=peer, pace=MergePace(LIMITS), limits=LIMITS, rng=random.Random(1))


def turn_s(turns, now_s, alive=RANKED):
    return turns.turn_s(LINK.parent, alive, 0, now_s)


def test_nobody_proposes_what_nobody_wants():
    assert turn_s(turns_of(RANKED[0]), 5.0) == math.inf


def test_the_first_goes_at_once_and_each_further_one_a_turn_later():
    for place, peer in enumerate(RANKED):
        turns = turns_of(peer)
        assert turns.due(1, LINK, 5.0)
        assert not turns.due(1, LINK, 6.0)
        assert turn_s(turns, 6.0) == 5.0 + place * LIMITS.merge_turn_s


def test_a_merge_by_hand_waits_for_no_turn_unless_another_is_proposing():
    for peer in RANKED:
        turns = turns_of(peer)
        turns.want_unscheduled(5.0)
        assert turn_s(turns, 5.0) == 5.0
        turns.heard(Ballot(attempt=0, proposer=RANKED[0]), 5.0)
        assert turn_s(turns, 5.0) > 5.0 or peer == RANKED[0]
        turns.decided(Link(RUN, bytes(32), 2, 0, (), 4), 6.0)
        assert turn_s(turns, 6.0) == math.inf


@pytest.mark.parametrize("attempt", range(9))
def test_the_next_attempt_goes_around(attempt):
    met = Ballot(attempt=attempt, proposer=RANKED[0])
    assert turns_before(RANKED[(attempt + 1) % 4], RANKED, met) == 0
    assert turns_before(RANKED[attempt % 4], RANKED, met) == 3


def test_a_live_proposer_is_waited_for_and_a_dead_one_is_not():
    turns = turns_of(RANKED[1])
    turns.due(1, LINK, 0.0)
    turns.heard(Ballot(attempt=0, proposer=RANKED[0]), 1.0)
    patient_s = turn_s(turns, 1.0)
    assert patient_s == 1.0 + MergePace(LIMITS).patience_s(0)
    assert turns.lost(RANKED[0], 2.0)
    assert not turns.lost(RANKED[2], 2.0)
    assert turn_s(turns, 2.0) == 2.0
    turns.heard(Ballot(attempt=0, proposer=RANKED[0]), 3.0)  # It lives after all.
    assert turn_s(turns, 3.0) == 3.0 + MergePace(LIMITS).patience_s(0)
    # Once the failure detector drops it, the ranking is that of the rest: somebody is next at once.
    rest = RANKED[1:]
    following = turns_of(ranking(LINK.parent, rest)[1 % len(rest)])
    following.due(1, LINK, 0.0)
    following.heard(Ballot(attempt=0, proposer=RANKED[0]), 1.0)
    assert turn_s(following, 4.0, alive=rest) == 4.0


def test_failures_are_retried_ever_more_slowly_within_a_bound():
    turns = turns_of(RANKED[0])
    turns.due(1, LINK, 0.0)
    pauses = []
    for _ in range(12):
        ballot = turns.next_ballot(None)
        turns.failed(ballot, None, 100.0)
        pauses.append(turn_s(turns, 100.0) - 100.0)
        assert turns.next_ballot(None) > ballot
    assert 0.5 <= pauses[0] <= 1.0
    assert LIMITS.merge_retry_s_max <= max(pauses) <= 1.5 * LIMITS.merge_retry_s_max


def test_a_ballot_is_above_what_an_earlier_life_promised():
    promised = Ballot(attempt=7, proposer=RANKED[3])
    assert turns_of(RANKED[0]).next_ballot(promised) == Ballot(attempt=8, proposer=RANKED[0])


def test_a_commit_ends_what_was_wanted_up_to_its_point():
    turns = turns_of(RANKED[0])
    turns.due(2, LINK, 0.0)
    first = Link(RUN, bytes(32), 2, 1, (), 4)
    turns.decided(first, 3.0)
    assert turn_s(turns, 3.0, RANKED) < math.inf
    turns.decided(Link(RUN, bytes(32), 3, 2, (), 8), 4.0)
    assert turn_s(turns, 4.0) == math.inf


def test_waits_follow_what_was_observed_and_forget_it_when_it_misled():
    pace = MergePace(LIMITS)
    assert pace.call_s() == LIMITS.merge_call_timeout_s
    pace.called(0.01)
    assert pace.call_s() == CALL_FLOOR_S
    pace.called(1.0)
    assert pace.call_s() == 4.0
    pace.missed()
    assert pace.call_s() == LIMITS.merge_call_timeout_s
    assert pace.transfer_s(1 << 50) == LIMITS.merge_transfer_timeout_s
    assert pace.transfer_s(10 << 20) == pytest.approx(23.0)
