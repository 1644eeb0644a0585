"""Whole merges in virtual time: who dies when, who is cut off, who comes late; one chain and one anchor in the end."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import trio
from msgspec.structs import replace

from gossip.merge_chain import RECORDS
from gossip.merge_member import PROMISE
from gossip.merge_record import Link, genesis_hash, owners, ranking, record_hash, sign_acknowledgement
from gossip.messages import (
    MERGE_PROTOCOL,
    Ballot,
    CommittedRecord,
    MergeAccept,
    MergeCall,
    MergeCommit,
    MergeOutlook,
    MergePlan,
    MergeReply,
    Outbid,
    RosterEntry,
    ShardRef,
)
from p2p.errors import CallRefused
from p2p.rpc import call
from tests.gossip.merge_world import LIMITS, PERIOD_S, PIECES, CheapSigner, World, open_world, peer_named
from tests.gossip.test_merge_record import FIRST
from tests.gossip.world import RUN


def proposer_of(world: World, head: bytes | None = None) -> int:
    """The number of the member whose turn comes first after ``head``, or after the present head."""
    head = head or world[0].merger.head
    first = ranking(head, list(world.members))[0]
    return world.members[first].number


def crash_at(world: World, victim: int, event: int) -> list[str]:
    """Crash ``victim`` at its ``event``-th merge event; returns the list in which its events are kept."""
    events: list[str] = []

    def hook(peer, name):
        if peer == peer_named(victim):
            events.append(name)
            if len(events) == event:
                world.crash(victim)

    world.hook = hook
    return events


async def events_of_a_quiet_merge(count: int, replicas: int) -> Counter:
    """How many events each member has in a merge without faults."""
    async with open_world(count, replicas=replicas) as world:
        events = Counter()
        world.hook = lambda peer, name: events.update([world.members[peer].number])
        world.due(1)
        await world.committed(1, within_s=5)
        await trio.sleep(1)
        return events


@pytest.mark.parametrize("count", range(1, 8))
@pytest.mark.parametrize("replicas", [1, 2])
async def test_everybody_ends_with_the_weighted_sum_of_everybody(count, replicas, autojump_clock):
    async with open_world(count, replicas=replicas) as world:
        world.due(1)
        took_s = await world.committed(1, within_s=5)
        assert took_s < 0.5  # three exchanges, two transfers of 0.04 s, and nothing that polls
        world.check_agreement()
        record = world[0].merger.head_record.record
        assert [c.peer for c in record.contributors] == [peer_named(number) for number in range(count)]
        weights = [min(1 + number, 1 + count) for number in range(count)]
        expected = [
            sum(weight * (number * 1000 + piece) for number, weight in enumerate(weights))
            for piece in range(PIECES)
        ]
        assert all(member.numbers.anchors == [(world[0].merger.head, expected)] for member in world.up)
        assert all(member.numbers.contributed == [True] for member in world.up)
        assert sum(member.merger.statistics().attempts for member in world.up) == 1
        assert not any(member.offences for member in world.up)


async def test_merges_follow_each_other(autojump_clock):
    async with open_world(3) as world:
        for point in range(1, 6):
            world.due(point)
            await world.committed(point, within_s=5)
        world[1].merger.merge_now()
        await world.committed(6, within_s=5)
        world.check_agreement()
        assert world[0].merger.head_participants == 18
        assert world[0].merger.head_record.record.point == 5
        world.due(5)
        await trio.sleep(10)
        assert world[0].merger.head_height == 6


@pytest.mark.parametrize("count", [3, 4])
@pytest.mark.parametrize("replicas", [1, 2])
async def test_the_rest_commits_whoever_dies_at_whatever_message(count, replicas, autojump_clock):
    quiet = await events_of_a_quiet_merge(count, replicas)
    for victim, events in quiet.items():
        for event in range(1, events + 1):
            async with open_world(count, replicas=replicas) as world:
                crash_at(world, victim, event)
                world.due(1)
                with trio.fail_after(10):
                    while world[victim].up:
                        await trio.sleep(0.01)
                took_s = await world.committed(1, within_s=30)
                world.check_agreement()
                assert took_s < 2, (victim, event, took_s)


@pytest.mark.parametrize("replicas", [1, 2])
async def test_whoever_dies_and_comes_back_ends_on_the_same_chain(replicas, autojump_clock):
    quiet = await events_of_a_quiet_merge(3, replicas)
    for victim, events in quiet.items():
        for event in range(1, events + 1):
            async with open_world(3, replicas=replicas) as world:
                crash_at(world, victim, event)
                world.due(1)
                with trio.fail_after(10):
                    while world[victim].up:
                        await trio.sleep(0.01)
                world.hook = lambda peer, name: None
                await trio.sleep(0.3)
                await world.start(victim)
                world.due(1)
                await world.committed(1, within_s=30)
                world.due(2)
                await world.committed(2, within_s=30)
                world.check_agreement()
                contributors = world[0].merger.head_record.record.contributors
                assert len(contributors) == 3


async def test_all_die_at_any_moment_and_come_back(autojump_clock):
    """A promise survives on disk; so does a decision of which only the proposer knew."""
    for moment in range(1, 45):
        async with open_world(3) as world:
            world.due(1)
            await trio.sleep(0.01 * moment)
            heads = {member.merger.head for member in world.up if member.merger.head_height}
            for number in range(3):
                world.crash(number)
            await trio.sleep(1)
            await world.start(0, 1, 2)
            world.due(1)
            await world.committed(1, within_s=30)
            world.check_agreement()
            assert heads <= {world[0].merger.head}, "a decided link was decided again"


async def test_a_silent_death_costs_the_deadline_of_a_call(autojump_clock):
    """As when a machine loses power: nothing breaks, nobody answers."""
    async with open_world(4) as world:
        world.due(1)
        await world.committed(1, within_s=5)
        silent = proposer_of(world)
        rest = {peer_named(number) for number in range(4)} - {peer_named(silent)}
        world.network.cut([peer_named(silent)], rest)
        for member in world.up:
            if member.number != silent:
                member.merger.due(2)
        began_s = trio.current_time()
        with trio.fail_after(30):
            while not all(member.merger.head_height == 2 for member in world.up if member.number != silent):
                await trio.sleep(0.01)
        # The next in turn goes after a second; it waits for the silent one's promise, and again for its sums.
        assert trio.current_time() - began_s < 5
        world.network.heal()
        await world.committed(2, within_s=40)
        world.check_agreement()


async def test_everybody_proposing_at_once_ends_in_one_record(autojump_clock):
    for seed in range(10):
        async with open_world(4, seed=seed) as world:
            world.due(1)
            await trio.sleep(0.02 * seed)
            for member in world.up:
                member.merger._nursery.start_soon(member.merger._propose)
            await world.committed(1, within_s=30)
            world.check_agreement()


async def test_a_minority_waits_and_says_so_and_the_majority_goes_on(autojump_clock):
    async with open_world(5) as world:
        world.due(1)
        await world.committed(1, within_s=5)
        world.network.cut([peer_named(0), peer_named(1)], [peer_named(n) for n in (2, 3, 4)])
        await trio.sleep(15)
        world.due(2)
        await trio.sleep(20)
        assert [world[n].merger.head_height for n in range(5)] == [1, 1, 2, 2, 2]
        said = {world[n].merger.problem for n in (0, 1)} - {""}  # whoever proposes says so
        assert said == {"merge 2: 2 of the 3 promises needed, 5 members count"}
        assert world[2].merger.problem == ""
        world.network.heal()
        await world.committed(2, within_s=10)
        world.check_agreement()
        assert {world[n].merger.problem for n in (0, 1)} == {""}


async def test_after_a_long_partition_the_larger_branch_wins(autojump_clock):
    async with open_world(5) as world:
        world.due(1)
        await world.committed(1, within_s=5)
        world.network.cut([peer_named(0), peer_named(1)], [peer_named(n) for n in (2, 3, 4)])
        await trio.sleep(3.5 * PERIOD_S)
        world.due(2)
        await world.committed(2, within_s=10)
        minority, majority = world[0].merger.head_record, world[2].merger.head_record
        assert minority.record.absent == [peer_named(n) for n in (2, 3, 4)]
        assert majority.record.absent == [peer_named(n) for n in (0, 1)]
        world.network.heal()
        with trio.fail_after(10):
            while len({member.merger.head for member in world.up}) > 1:
                await trio.sleep(0.1)
        assert world[0].merger.head == record_hash(majority.record)
        world.due(3)
        await world.committed(3, within_s=10)
        world.check_agreement()
        record = world[0].merger.head_record.record
        assert len(record.contributors) == 5
        assert record.participants_total == 5 + 3 + 5
        assert not any(member.offences for member in world.up)


async def test_the_last_of_two_goes_on_alone_after_three_periods(autojump_clock):
    async with open_world(2) as world:
        world.due(1)
        await world.committed(1, within_s=5)
        world.crash(1)
        world.due(2)
        await trio.sleep(2 * PERIOD_S)
        assert world[0].merger.head_height == 1
        await world.committed(2, within_s=2 * PERIOD_S)


async def test_a_swarm_outlives_those_who_merged_last(autojump_clock):
    async with open_world(5) as world:
        for number in (2, 3, 4):
            world.crash(number)
        await trio.sleep(1)
        world.due(1)
        await world.committed(1, within_s=5)
        assert {entry.peer for entry in world[0].merger.head_record.record.roster} == {
            peer_named(0),
            peer_named(1),
        }
        await world.start(2, 3, 4)
        await world.committed(1, within_s=5)
        world.crash(0)
        world.crash(1)
        world.due(2)
        await trio.sleep(2 * PERIOD_S)
        assert world[2].merger.head_height == 1, "they may be back any moment"
        await world.committed(2, within_s=2 * PERIOD_S)
        record = world[2].merger.head_record.record
        assert record.absent == [peer_named(0), peer_named(1)]
        assert {peer_named(number) for number in (2, 3, 4)} <= {entry.peer for entry in record.roster}
        await world.start(0, 1)
        await world.committed(2, within_s=10)
        world.due(3)
        await world.committed(3, within_s=10)
        world.check_agreement()
        assert len(world[0].merger.head_record.record.contributors) == 5


async def test_one_of_many_does_not_make_itself_the_electorate(autojump_clock):
    """A record that names who has a voice must name most of those whom its acceptors believe alive."""
    async with open_world(5) as world:
        for number in (1, 2, 3, 4):
            world.crash(number)
        await trio.sleep(1)
        world.due(1)
        await world.committed(1, within_s=5)
        await world.start(1, 2, 3, 4)
        await world.committed(1, within_s=5)
        world.crash(0)
        await trio.sleep(3.5 * PERIOD_S)
        link = Link.after(world[1].merger.head_record.record)
        member = world[1].merger._member
        record = replace(
            world[1].merger.head_record.record,
            parent=link.parent,
            height=link.height,
            absent=[peer_named(0)],
            roster=[
                RosterEntry(peer=peer_named(0), last_height=1),
                RosterEntry(peer=peer_named(1), last_height=1),
            ],
        )
        with pytest.raises(CallRefused, match="no voice"):
            member._check_founders(link, record)


async def test_a_restarted_member_does_not_take_its_own_silence_for_the_others(autojump_clock):
    async with open_world(3) as world:
        world.due(1)
        await world.committed(1, within_s=5)
        for number in range(3):
            world.crash(number)
        await trio.sleep(10 * PERIOD_S)
        await world.start(0)
        world.due(2)
        await trio.sleep(2 * PERIOD_S)
        assert world[0].merger.head_height == 1


async def test_a_late_joiner_takes_the_chain_and_contributes_to_the_next_merge(autojump_clock):
    async with open_world(4) as world:
        world.crash(3)
        await trio.sleep(1)
        for point in (1, 2, 3):
            world.due(point)
            await world.committed(point, within_s=5)
        world[3].disk.files.clear()
        await world.start(3)
        await world.committed(3, within_s=5)
        assert world[3].numbers.contributed == [False]
        world.due(4)
        await world.committed(4, within_s=5)
        world.check_agreement()
        assert peer_named(3) in [c.peer for c in world[0].merger.head_record.record.contributors]


async def test_a_newcomer_takes_a_chain_that_is_longer_than_anyone_keeps(autojump_clock):
    async with open_world(3) as world:
        world.crash(2)
        await trio.sleep(1)
        kept = LIMITS.merge_records_kept
        for point in range(1, kept + 6):
            world.due(point)
            await world.committed(point, within_s=5)
        assert len(world[0].disk.files) == kept + 1
        await world.start(2)
        await world.committed(kept + 5, within_s=10)
        world.due(kept + 6)
        await world.committed(kept + 6, within_s=5)
        world.check_agreement()
        assert not any(member.offences for member in world.up)


async def test_a_member_that_missed_one_commit_walks_to_it_before_the_next(autojump_clock):
    async with open_world(3) as world:
        world.due(1)
        await world.committed(1, within_s=5)
        world.crash(2)
        world.due(2)
        await world.committed(2, within_s=10)
        await world.start(2)
        world.due(3)  # The call finds the restarted member a link behind.
        await world.committed(3, within_s=10)
        world.check_agreement()


async def test_a_lying_owner_is_outvoted_by_the_sums_themselves(autojump_clock):
    async with open_world(4, replicas=2) as world:
        liar = next(n for n in range(4) if n != proposer_of(world))
        world[liar].numbers.lies_about = set(range(PIECES))
        world.due(1)
        await world.committed(1, within_s=10)
        world.check_agreement()
        anchor = world[0].numbers.anchors[0][1]
        assert anchor == [sum((n + 1) * (1000 * n + f) for n in range(4)) for f in range(PIECES)]
        assert (peer_named(liar), "equivocation") in world[proposer_of(world, genesis_hash(RUN))].offences


@pytest.mark.parametrize("liar", range(4))
async def test_inputs_of_another_size_cost_nobody_but_their_author(liar, autojump_clock):
    async with open_world(4) as world:
        world[liar].numbers.shard_bytes = 17
        honest = [n for n in range(4) if n != liar]
        told = liar != proposer_of(
            world
        )  # Whoever proposes first finds fault with the others, and gets nowhere.
        world.due(1)
        with trio.fail_after(30):
            for n in honest:
                await world[n].merger.wait_committed(1)
        assert [c.peer for c in world[honest[0]].merger.head_record.record.contributors] == [
            peer_named(n) for n in honest
        ]
        for n in honest:
            assert {peer for peer, _ in world[n].offences} <= {peer_named(liar)}
        assert told <= any((peer_named(liar), "shape") in world[n].offences for n in honest)


@pytest.mark.parametrize("liar", range(4))
async def test_a_sum_that_nobody_may_adopt_costs_its_owner_and_holds_nobody_up(liar, autojump_clock):
    async with open_world(4, replicas=1) as world:
        world[liar].numbers.absurd = True
        first = proposer_of(world)
        world.due(1)
        with trio.fail_after(60):
            for n in range(4):
                if n != liar:
                    await world[n].merger.wait_committed(1)
        record = world[(liar + 1) % 4].merger.head_record.record
        summed_by = {peer for per_piece in owners_of(record) for peer in per_piece}
        assert peer_named(liar) not in summed_by
        for n in range(4):
            if n != liar:
                assert {peer for peer, _ in world[n].offences} <= {peer_named(liar)}
        if liar != first and peer_named(liar) not in {c.peer for c in record.contributors}:
            assert (peer_named(liar), "norm") in world[first].offences


def owners_of(record):
    names = [contribution.peer for contribution in record.contributors]
    return owners(record.parent, names, PIECES, 1)


async def test_inputs_that_the_host_refuses_are_left_out(autojump_clock):
    async with open_world(4) as world:
        for member in world.up:
            if member.number != 2:
                member.numbers.refuses = {peer_named(2)}
        world.due(1)
        await world.committed(1, within_s=10)
        world.check_agreement()
        assert [c.peer for c in world[0].merger.head_record.record.contributors] == [
            peer_named(n) for n in (0, 1, 3)
        ]
        assert world[2].numbers.contributed == [False]


async def test_a_member_without_disk_space_does_not_vote_and_says_so(autojump_clock):
    async with open_world(4) as world:
        world[1].disk.capacity_bytes = 0
        world.due(1)
        with trio.fail_after(10):
            while not all(world[n].merger.head_height == 1 for n in (0, 2, 3)):
                await trio.sleep(0.1)
        assert world[1].merger.problem.startswith("this node cannot vote")
        world[1].disk.capacity_bytes = 1 << 20
        await world.committed(1, within_s=10)
        world.due(2)
        await world.committed(2, within_s=10)
        assert world[1].merger.problem == ""
        world.check_agreement()


async def test_a_damaged_promise_is_silence_until_the_next_link(autojump_clock):
    async with open_world(3) as world:
        world.due(1)
        await trio.sleep(0.1)
        world.crash(0)
        world[0].disk.flip_bit(PROMISE, 40)
        await world.start(0)
        world.crash(1)
        world.due(1)
        await trio.sleep(20)
        assert world[0].merger.head_height == world[2].merger.head_height == 0
        await world.start(1)
        world.due(1)
        await world.committed(1, within_s=40)
        world.due(2)
        await world.committed(2, within_s=5)
        assert len(world[0].merger.head_record.record.contributors) == 3


async def test_a_damaged_record_is_fetched_again(autojump_clock):
    async with open_world(3) as world:
        for point in (1, 2):
            world.due(point)
            await world.committed(point, within_s=5)
        world.crash(0)
        newest = next(path for path in world[0].disk.files if path.endswith(world[1].merger.head.hex()))
        world[0].disk.flip_bit(newest, 100)
        await world.start(0)
        assert world[0].merger.head_height == 1
        await world.committed(2, within_s=5)
        world.check_agreement()


async def test_a_damaged_record_does_not_bring_back_a_vote_that_was_given(autojump_clock):
    """Its link is decided; what this member promised there has made room for what it promised on the next."""
    async with open_world(3) as world:
        for point in (1, 2):
            world.due(point)
            await world.committed(point, within_s=5)
        link = world[0].merger.head_record.record.parent
        newest = next(path for path in world[0].disk.files if path.endswith(world[0].merger.head.hex()))
        promise = MergeCall(
            parent=world[0].merger.head,
            height=3,
            point=3,
            ballot=Ballot(attempt=7, proposer=peer_named(1)),
            absent=[],
        )
        await world[0].merger._answer(peer_named(1), promise)
        for number in range(3):
            world.crash(number)
        world[0].disk.flip_bit(newest, 100)
        world[0].disk.files[f"{RECORDS}/notes.txt"] = b"not ours"
        for _ in range(2):
            await world.start(0)
            assert world[0].merger.head == link
            again = MergeCall(
                parent=link, height=2, point=2, ballot=Ballot(attempt=0, proposer=peer_named(1)), absent=[]
            )
            with pytest.raises(CallRefused, match="damaged"):
                await world[0].merger._answer(peer_named(1), again)
            world.crash(0)
        await world.start(0, 1, 2)
        await world.committed(2, within_s=10)
        reply = await world[0].merger._answer(
            peer_named(1), replace(promise, ballot=Ballot(attempt=6, proposer=peer_named(1)))
        )
        assert reply == Outbid(ballot=promise.ballot)
        world.check_agreement()


async def test_an_owner_whose_store_is_full_is_left_out_and_takes_the_anchor_later(autojump_clock):
    async with open_world(4) as world:
        full = world[next(n for n in range(4) if n != proposer_of(world))]

        def fill_after_the_call(peer, event):
            full.numbers.full |= (peer, event) == (full.peer, "answered")

        world.hook = fill_after_the_call
        world.due(1)
        with trio.fail_after(10):
            while not all(member.merger.head_height == 1 for member in world.up):
                await trio.sleep(0.1)
        assert full.numbers.anchors == []
        assert "not adopted" in full.merger.problem
        assert len(full.merger.head_record.record.contributors) == 3
        world.hook = lambda peer, event: None
        full.numbers.full = False
        await world.committed(1, within_s=10)
        world.check_agreement()
        assert not any(member.offences for member in world.up)


async def test_all_bring_the_results_home_while_the_proposer_looks_at_them(autojump_clock):
    async with open_world(4) as world:
        for member in world.up:
            member.numbers.transfer_s = 1.0
        world.due(1)
        took_s = await world.committed(1, within_s=10)
        # Inputs to the owners, then results to everybody: two transfers, each of them once.
        assert 2.0 < took_s < 2.5
        for member in world.up:
            assert set(member.numbers.fetches.values()) == {1}
        world.check_agreement()


async def test_a_transfer_that_is_under_way_when_the_record_is_proposed_is_waited_for(autojump_clock):
    async with open_world(4) as world:
        slow = world[(proposer_of(world) + 1) % 4]
        slow.numbers.transfer_s = 1.5
        world.due(1)
        await world.committed(1, within_s=10)
        assert set(slow.numbers.fetches.values()) == {1}
        world.check_agreement()


HOSTILE = {
    "a call in another's name": lambda link: MergeCall(
        parent=link.parent, height=1, point=1, ballot=Ballot(attempt=0, proposer=peer_named(0)), absent=[]
    ),
    "a call that skips ahead": lambda link: MergeCall(
        parent=link.parent, height=5, point=1, ballot=Ballot(attempt=0, proposer=peer_named(1)), absent=[]
    ),
    "a plan nobody promised": lambda link: MergePlan(
        parent=link.parent,
        ballot=Ballot(attempt=0, proposer=peer_named(1)),
        contributors=FIRST.contributors,
        timeout_s=1.0,
    ),
    "an outlook under another ballot": lambda link: MergeOutlook(
        ballot=Ballot(attempt=9, proposer=peer_named(1)), record=FIRST, timeout_s=1.0
    ),
    "a record with forged contributions": lambda link: MergeAccept(
        ballot=Ballot(attempt=9, proposer=peer_named(1)),
        record=replace(FIRST, contributors=[replace(c, weight=1) for c in FIRST.contributors]),
        holders=[],
        disputed=[],
        timeout_s=1.0,
    ),
    "a record of a monstrous model": lambda link: MergeAccept(
        ballot=Ballot(attempt=9, proposer=peer_named(1)),
        record=replace(FIRST, results=[ShardRef(root=bytes(32), size=1 << 30)] * PIECES),
        holders=[],
        disputed=[],
        timeout_s=1.0,
    ),
    "a commit without a quorum": lambda link: MergeCommit(
        committed=CommittedRecord(
            record=FIRST,
            ballot=FIRST.ballot,
            acknowledgements=[sign_acknowledgement(CheapSigner(peer_named(1)), FIRST, FIRST.ballot)],
        )
    ),
}


@pytest.mark.parametrize("attack", HOSTILE)
async def test_a_hostile_request_is_refused_counted_and_changes_nothing(attack, autojump_clock):
    async with open_world(2) as world:
        request = HOSTILE[attack](Link.genesis(RUN))
        with pytest.raises(CallRefused):
            await call(world[1].host, peer_named(0), MERGE_PROTOCOL, request, MergeReply, timeout_s=5)
        assert world[0].offences[0][0] == peer_named(1)
        assert world[0].disk.files == {}
        assert world[0].merger.head_height == 0


async def test_an_outlook_that_was_promised_nothing_brings_nothing_home_and_blames_nobody(autojump_clock):
    async with open_world(2) as world:
        ballot = Ballot(attempt=0, proposer=peer_named(1))
        outlook = MergeOutlook(ballot=ballot, record=replace(FIRST, ballot=ballot), timeout_s=1.0)
        with pytest.raises(CallRefused, match="promised"):
            await call(world[1].host, peer_named(0), MERGE_PROTOCOL, outlook, MergeReply, timeout_s=5)
        assert not world[0].numbers.fetches
        assert not world[0].offences


async def test_members_that_were_heard_lately_cannot_be_left_out(autojump_clock):
    async with open_world(3) as world:
        world.due(1)
        await world.committed(1, within_s=5)
        link = Link.after(world[0].merger.head_record.record)
        grab = MergeCall(
            parent=link.parent,
            height=2,
            point=2,
            ballot=Ballot(attempt=0, proposer=peer_named(1)),
            absent=[peer_named(2)],
        )
        with pytest.raises(CallRefused) as refused:
            await call(world[1].host, peer_named(0), MERGE_PROTOCOL, grab, MergeReply, timeout_s=5)
        assert refused.value.code == "present"


@pytest.mark.parametrize("seed", range(12))
async def test_a_stormy_day_leaves_one_chain(seed, autojump_clock):
    """Crashes, restarts and partitions shorter than three periods; at no height do two records ever exist."""
    luck = random.Random(seed)
    async with open_world(5, replicas=1 + seed % 2, seed=seed) as world:
        for point in range(1, 6):
            world.due(point)
            for _ in range(4):
                await trio.sleep(luck.random())
                match luck.randrange(4):
                    case 0:
                        world.crash(luck.randrange(5))
                    case 1:
                        left = set(luck.sample(range(5), luck.randint(1, 2)))
                        world.network.cut(
                            [peer_named(n) for n in left], [peer_named(n) for n in set(range(5)) - left]
                        )
                    case _:
                        world.network.heal()
                        await world.start(*(n for n in range(5) if not world[n].up))
                        world.due(point)
        world.network.heal()
        await world.start(*(n for n in range(5) if not world[n].up))
        world.due(6)
        with trio.fail_after(120):
            while not all(
                member.merger.head_record and member.merger.head_record.record.point == 6
                for member in world.up
            ):
                await trio.sleep(0.1)
        await world.committed(world[0].merger.head_height, within_s=10)
        world.check_agreement()
        names = {}
        for member in world.members.values():
            for path in member.disk.files:
                if path.startswith(RECORDS):
                    name = path.removeprefix(f"{RECORDS}/")
                    record = member.merger._chain.get(bytes.fromhex(name)).record
                    assert names.setdefault(record.height, name) == name
