"""Records that were accepted but can no longer be decided: kept for as long as there is hope, then given up."""

from __future__ import annotations

import pytest
import trio
from msgspec.structs import replace

from gossip.merge_record import record_hash
from gossip.messages import Ballot, MergeAccept, MergeCall, MergeRecord
from p2p.errors import CallRefused
from p2p.transport import PeerId
from tests.gossip.merge_world import LIMITS, PERIOD_S, World, open_world, peer_named
from tests.gossip.test_merging import proposer_of

MERGE_S = 10.0
"""More than a merge among members that answer takes, the pause after a failed attempt included."""
RETRY_S = 1.5 * LIMITS.merge_retry_s_max + MERGE_S
"""As long after many failed attempts."""


def accepted_by(world: World, number: int) -> MergeRecord | None:
    """What a member has accepted on the present link."""
    member = world[number].merger._member
    accepted = member._acceptor(world[number].merger._chain.link).accepted
    return accepted.record if accepted is not None else None


async def die_after_acceptance(world: World, *survivors: int) -> MergeRecord:
    """Begin a merge and crash everybody else once all ``survivors`` have accepted its record.

    Nobody has learned by then that it is decided.
    """
    height = world[survivors[0]].merger.head_height
    world.due(height + 1)
    with trio.fail_after(5):
        while None in (accepted := [accepted_by(world, survivor) for survivor in survivors]):
            await trio.sleep(0.001)
    for member in world.up:
        if member.number not in survivors:
            world.crash(member.number)
    await trio.sleep(1)
    assert {member.merger.head_height for member in world.members.values()} == {height}
    record = accepted[0]
    assert record is not None
    return record


async def die_after_commit(world: World, survivor: int) -> bytes:
    """As before, but the other one of two has committed the record, and took that to its grave."""
    other = 1 - survivor

    def die_untold(peer: PeerId, event: str) -> None:
        if (peer, event) == (world[other].peer, "asks") and world[other].merger.head_height:
            world.crash(other)

    world.hook = die_untold
    world.due(1)
    with trio.fail_after(5):
        while world[other].up:
            await trio.sleep(0.001)
    world.hook = lambda peer, event: None
    await trio.sleep(1)
    assert world[survivor].merger.head_height == 0
    assert record_hash(accepted_by(world, survivor)) == world[other].merger.head
    return world[other].merger.head


@pytest.mark.parametrize("survivor", range(2))
async def test_the_survivor_of_two_founders_goes_on_alone(survivor, autojump_clock):
    async with open_world(2) as world:
        lost = await die_after_acceptance(world, survivor)
        assert len(lost.roster) == 2
        await trio.sleep(2.5 * PERIOD_S)
        assert world[survivor].merger.head_height == 0
        assert (
            world[survivor].merger.problem
            == "merge 1: 1 of the 2 promises needed for a record that was accepted before"
        )
        await world.committed(1, within_s=0.5 * PERIOD_S + RETRY_S)
        record = world[survivor].merger.head_record.record
        assert [entry.peer for entry in record.roster] == [peer_named(survivor)]
        assert record.ballot > lost.ballot
        world.due(2)
        await world.committed(2, within_s=MERGE_S)


@pytest.mark.parametrize("count", [3, 5])
@pytest.mark.parametrize("first", [True, False])
async def test_the_last_of_several_goes_on_alone(count, first, autojump_clock):
    async with open_world(count) as world:
        if not first:
            world.due(1)
            await world.committed(1, within_s=5)
        lost = await die_after_acceptance(world, 0)
        await trio.sleep(2.5 * PERIOD_S)
        assert world[0].merger.head_height == lost.height - 1
        await world.committed(lost.height, within_s=0.5 * PERIOD_S + RETRY_S)
        record = world[0].merger.head_record.record
        others = [peer_named(number) for number in range(1, count)]
        assert record.absent == ([] if first else others)
        assert [entry.peer for entry in record.roster] == (
            [peer_named(0)] if first else [peer_named(0), *others]
        )


@pytest.mark.parametrize("survivor", range(2))
@pytest.mark.parametrize("wiped", [True, False])
async def test_who_comes_back_without_the_old_record_takes_the_new_one(survivor, wiped, autojump_clock):
    other = 1 - survivor
    async with open_world(2) as world:
        await die_after_acceptance(world, survivor)
        await world.committed(1, within_s=3 * PERIOD_S + RETRY_S)
        alone = world[survivor].merger.head
        if wiped:
            world[other].disk.files.clear()
        await world.start(other)
        await world.committed(1, within_s=MERGE_S)
        assert world[other].merger.head == alone
        world.due(2)
        await world.committed(2, within_s=MERGE_S)
        world.check_agreement()
        assert len(world[survivor].merger.head_record.record.contributors) == 2
        assert not any(member.offences for member in world.up)


@pytest.mark.parametrize(("merges_alone", "old_wins"), [(1, True), (3, False)])
async def test_who_comes_back_with_the_old_record_committed_is_a_branch(
    merges_alone, old_wins, autojump_clock
):
    """Two participants in the old record, one in each that the survivor makes alone: the larger sum is the head."""
    async with open_world(2) as world:
        survivor = 1 - proposer_of(world)
        old = await die_after_commit(world, survivor)
        await world.committed(1, within_s=3 * PERIOD_S + RETRY_S)
        for point in range(2, merges_alone + 1):
            world.due(point)
            await world.committed(point, within_s=MERGE_S)
        alone = world[survivor].merger.head
        await world.start(1 - survivor)
        with trio.fail_after(MERGE_S):
            while {member.merger.head for member in world.up} != {old if old_wins else alone}:
                await trio.sleep(0.1)
        point = merges_alone + 1
        world.due(point)
        with trio.fail_after(MERGE_S):
            while not all(member.merger.head_record.record.point == point for member in world.up):
                await trio.sleep(0.1)
        await world.committed(world[0].merger.head_height, within_s=MERGE_S)
        world.check_agreement()
        assert len(world[0].merger.head_record.record.contributors) == 2
        assert not any(member.offences for member in world.up)


@pytest.mark.parametrize("count", [2, 3])
async def test_before_the_patience_is_over_the_accepted_record_is_proposed_again(count, autojump_clock):
    async with open_world(count) as world:
        accepted = await die_after_acceptance(world, 0)
        await trio.sleep(2.8 * PERIOD_S)
        await world.start(*range(1, count))
        await world.committed(1, within_s=RETRY_S)
        world.check_agreement()
        assert world[0].merger.head == record_hash(accepted)


async def test_an_acceptance_outlives_a_restart_and_patience_begins_anew(autojump_clock):
    """Who has only just started has heard of nobody, which says nothing about them."""
    async with open_world(2) as world:
        accepted = await die_after_acceptance(world, 0)
        await trio.sleep(2 * PERIOD_S)
        world.crash(0)
        await trio.sleep(1)
        await world.start(0)
        assert accepted_by(world, 0) == accepted
        world.due(1)
        await trio.sleep(2.5 * PERIOD_S)
        assert world[0].merger.head_height == 0
        await world.committed(1, within_s=0.5 * PERIOD_S + RETRY_S)


@pytest.mark.parametrize("first", [True, False])
async def test_half_of_four_go_on_without_the_rest(first, autojump_clock):
    """Three of four decide, so two that have accepted are too few; later, the patience of both must be over."""
    async with open_world(4) as world:
        if not first:
            world.due(1)
            await world.committed(1, within_s=5)
        one, other, *rest = sorted(range(4), key=lambda number: number == proposer_of(world))
        lost = await die_after_acceptance(world, one, other)
        await trio.sleep(1.5 * PERIOD_S)
        world.crash(other)
        await trio.sleep(1)
        await world.start(other)
        world.due(lost.height)
        await trio.sleep(1.2 * PERIOD_S if first else 1.9 * PERIOD_S)
        assert {member.merger.head_height for member in world.up} == {lost.height - 1}
        await world.committed(lost.height, within_s=0.5 * PERIOD_S + RETRY_S)
        world.check_agreement()
        assert world[one].merger.head != record_hash(lost)
        await world.start(*rest)
        await world.committed(lost.height, within_s=MERGE_S)
        world.check_agreement()


@pytest.mark.parametrize("roster", [[0, 1], [0, 1, 2], [0]])
async def test_nobody_can_talk_a_member_out_of_a_record_that_can_still_be_decided(roster, autojump_clock):
    async with open_world(3) as world:
        kept = await die_after_acceptance(world, 0)
        await trio.sleep(1.9 * PERIOD_S)
        ballot = Ballot(attempt=1000, proposer=peer_named(1))
        promise = MergeCall(parent=kept.parent, height=1, point=1, ballot=ballot, absent=[])
        reported = await world[0].merger._answer(peer_named(1), promise)
        assert reported.accepted.record == kept
        entries = [entry for entry in kept.roster if entry.peer in {peer_named(number) for number in roster}]
        contributors = [c for c in kept.contributors if c.peer in {entry.peer for entry in entries}]
        other = replace(
            kept,
            ballot=ballot,
            point=kept.point + 1,
            roster=entries,
            contributors=contributors,
            participants_total=len(contributors),
        )
        accept = MergeAccept(ballot=ballot, record=other, holders=[], disputed=[], timeout_s=1.0)
        with pytest.raises(CallRefused) as refused:
            await world[0].merger._answer(peer_named(1), accept)
        assert refused.value.code == "decidable"
        assert accepted_by(world, 0) == kept
