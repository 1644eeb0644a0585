"""Reconciliation over the simulated network: news spreads, partitions heal, hostile neighbours cost nothing."""

from __future__ import annotations

import contextlib
import itertools
import random

import msgspec
import pytest
import trio

from gossip.anti_entropy import AntiEntropy
from gossip.ledger import PeerLedger
from gossip.messages import (
    SYNC_PROTOCOL,
    Notices,
    Swap,
    Versions,
)
from gossip.notices import NoticeTable, _open
from netsim.network import open_sim_network
from p2p.codec import encode
from p2p.frames import receive_message, send_message
from p2p.identity import Identity
from p2p.limits import DEFAULT_LIMITS, Limits
from tests.gossip.world import IDENTITIES, OTHER_RUN, RUN, heartbeat


class Member:
    """One node's notices and their reconciliation."""

    def __init__(self, identity, host, limits, seed):
        self.peer = identity.peer
        self.host = host
        self.table = NoticeTable(signer=identity, run=RUN, incarnation=1, limits=limits)
        self.ledger = PeerLedger()
        self.sync = AntiEntropy(
            transport=host, notices=self.table, ledger=self.ledger, limits=limits, rng=random.Random(seed)
        )

    async def settled(self, others):
        """Wait until this table equals all others; at most a virtual minute."""
        with trio.fail_after(60):
            while any(other.table.versions() != self.table.versions() for other in others):
                await trio.sleep(0.02)


@contextlib.asynccontextmanager
async def swarm(count, *, connected=True, limits=DEFAULT_LIMITS, identities=IDENTITIES):
    async with (
        open_sim_network(random.Random(1), limits=limits) as network,
        trio.open_nursery() as nursery,
        contextlib.AsyncExitStack() as stack,
    ):
        members = []
        for number, identity in enumerate(identities[:count]):
            host = await stack.enter_async_context(network.open_host(identity.peer))
            members.append(Member(identity, host, limits, number))
            nursery.start_soon(members[-1].sync.run)
        if connected:
            await connect_all(members)
        yield network, members
        nursery.cancel_scope.cancel()


async def connect_all(members):
    for number, member in enumerate(members):
        for other in members[:number]:
            await member.host.connect(other.host.local)


@pytest.mark.parametrize(("count", "typical_s", "longest_s"), [(2, 0.3, 0.5), (4, 0.3, 0.5), (6, 1.5, 3.5)])
async def test_news_crosses_a_small_swarm_quickly(autojump_clock, count, typical_s, longest_s):
    # Up to 4 members the author tells everybody at once; beyond, regular rounds reach the rest.
    async with swarm(count) as (_, members):
        for member in members:
            member.table.publish("heartbeat", heartbeat())
        await members[0].settled(members)
        times = []
        for round_number in range(20):
            await trio.sleep(1.5)
            began_s = trio.current_time()
            news = heartbeat(head=bytes([1 + round_number]) * 32)
            members[round_number % count].table.publish("heartbeat", news)
            await members[0].settled(members)
            times.append(trio.current_time() - began_s)
    assert max(times) < longest_s
    assert sorted(times)[10] < typical_s


async def test_counting_heartbeats_wait_for_the_regular_round_but_goodbyes_do_not(autojump_clock):
    async with swarm(2) as (_, (left, right)):
        left.table.publish("heartbeat", heartbeat())
        await left.settled([right])
        await trio.sleep(5)
        rounds = left.sync.rounds + right.sync.rounds
        for step in range(100):
            left.table.publish("heartbeat", heartbeat(step=step))
            await trio.sleep(0.05)
        assert left.sync.rounds + right.sync.rounds - rounds <= 2 * 5 / 0.8 + 1
        left.table.publish("heartbeat", heartbeat(leaving=True))
        began_s = trio.current_time()
        await left.settled([right])
        assert trio.current_time() - began_s < 0.5


async def test_a_swarm_that_is_a_chain_still_agrees(autojump_clock):
    async with swarm(6, connected=False) as (_, members):
        for left, right in itertools.pairwise(members):
            await left.host.connect(right.host.local)
        for member in members:
            member.table.publish("heartbeat", heartbeat())
        began_s = trio.current_time()
        await members[0].settled(members)
        assert trio.current_time() - began_s < 5


async def test_partitioned_halves_agree_after_they_meet_again(autojump_clock):
    async with swarm(4) as (network, members):
        left, right = members[:2], members[2:]
        network.cut([m.peer for m in left], [m.peer for m in right])
        await trio.sleep(30)
        for member in members:
            member.table.publish("heartbeat", heartbeat(step=9))
        await left[0].settled(left)
        await right[0].settled(right)
        assert left[0].table.versions() != right[0].table.versions()
        network.heal()
        await connect_all(members)
        await members[0].settled(members)


async def test_reconcile_with_all_says_goodbye_at_once(autojump_clock):
    async with swarm(4) as (_, members):
        await trio.sleep(3)
        members[0].table.publish("heartbeat", heartbeat(leaving=True))
        await members[0].sync.reconcile_with_all()
        assert all(member.table.get(members[0].peer, "heartbeat") for member in members)


async def test_more_than_one_swap_carries_takes_several_rounds(autojump_clock):
    limits = Limits(notices_per_swap_max=4)
    crowd = [Identity.generate() for _ in range(30)]
    async with swarm(2, connected=False, limits=limits) as (_, (left, right)):
        for identity in crowd:
            stranger = NoticeTable(signer=identity, run=RUN, incarnation=1, limits=limits)
            left.table.offer(encode(stranger.publish("heartbeat", heartbeat())), 0.0)
        await left.host.connect(right.host.local)
        await left.settled([right])
        assert len(right.table.authors()) == 30


async def test_a_full_swap_of_the_largest_notices_fits_a_frame(autojump_clock):
    crowd = [Identity.generate() for _ in range(120)]
    async with swarm(2, connected=False) as (_, (left, right)):
        largest = heartbeat(addresses=["/dns4/" + "a" * 240 + "/tcp/4100"] * 8, agent="x" * 64)
        for identity in crowd:
            stranger = NoticeTable(signer=identity, run=RUN, incarnation=1, limits=DEFAULT_LIMITS)
            left.table.offer(encode(stranger.publish("heartbeat", largest)), 0.0)
        await left.host.connect(right.host.local)
        await left.settled([right])
        assert left.sync.rounds_failed == right.sync.rounds_failed == 0


# --- hostile neighbours -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [OTHER_RUN, RUN])
async def test_notices_of_another_run_or_name_cost_their_sender(autojump_clock, run):
    async with swarm(2) as (_, (honest, hostile)):
        forger = NoticeTable(signer=IDENTITIES[2], run=run, incarnation=1, limits=DEFAULT_LIMITS)
        notice = forger.publish("heartbeat", heartbeat())
        if run == RUN:
            notice = msgspec.structs.replace(notice, author=IDENTITIES[3].peer)
        stream = await hostile.host.open_stream(honest.peer, SYNC_PROTOCOL)
        await send_message(stream, Versions(registers=_open(encode(notice)).row))
        swap = await receive_message(stream, Swap, bytes_max=1 << 20)
        assert (swap.notices, len(swap.want)) == ([], 16)
        await send_message(stream, Notices(notices=[encode(notice)]))
        await trio.sleep(1)
        assert honest.table.authors() == []
        assert honest.ledger.refusals == {"signature": 1}
        assert honest.ledger.standing(hostile.peer) < 100


async def test_wanting_what_is_not_held_gets_nothing(autojump_clock):
    async with swarm(1) as (network, (honest,)), network.open_host(IDENTITIES[3].peer) as asker:
        given = []

        async def answer(_, stream):
            await receive_message(stream, Versions, bytes_max=1 << 20)
            await send_message(stream, Swap(notices=[], want=bytes(16) * 256))
            given.append(await receive_message(stream, Notices, bytes_max=1 << 20))

        asker.serve(SYNC_PROTOCOL, answer)
        await honest.host.connect(asker.local)
        with trio.fail_after(10):
            while not given:
                await trio.sleep(0.1)
        assert given[0] == Notices(notices=[])
        assert honest.ledger.standing(asker.local.peer) == 100


@pytest.mark.parametrize(
    "registers",
    [bytes(39), b"b" * 40 + b"a" * 40, b"a" * 40 + b"a" * 40],
    ids=["not whole", "not sorted", "named twice"],
)
async def test_versions_that_are_none_cost_standing(autojump_clock, registers):
    async with swarm(2) as (_, (honest, hostile)):
        stream = await hostile.host.open_stream(honest.peer, SYNC_PROTOCOL)
        await send_message(stream, Versions(registers=registers))
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some(1)
        assert honest.ledger.refusals == {"malformed": 1}


async def test_wanting_keys_that_are_none_costs_standing(autojump_clock):
    async with swarm(1) as (network, (honest,)), network.open_host(IDENTITIES[3].peer) as hostile:

        async def answer(_, stream):
            await receive_message(stream, Versions, bytes_max=1 << 20)
            await send_message(stream, Swap(notices=[], want=bytes(17)))
            await stream.receive_some()

        hostile.serve(SYNC_PROTOCOL, answer)
        await honest.host.connect(hostile.local)
        with trio.fail_after(10):
            while not honest.ledger.refusals:
                await trio.sleep(0.1)
        assert honest.ledger.refusals == {"malformed": 1}


@pytest.mark.parametrize(
    "garbage", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x01\xff", b"\x00\x00\x00\x09\xa1dtypedSwap"]
)
async def test_garbage_costs_the_stream_and_standing_and_nothing_else(autojump_clock, garbage):
    async with swarm(2) as (_, (honest, hostile)):
        stream = await hostile.host.open_stream(honest.peer, SYNC_PROTOCOL)
        await stream.send_all(garbage)
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some(1)
        assert honest.ledger.refusals == {"malformed": 1}
        honest.table.publish("heartbeat", heartbeat())
        await honest.settled([hostile])


async def test_a_silent_neighbour_does_not_hold_up_the_others(autojump_clock):
    async with (
        swarm(3, connected=False) as (network, (first, second, third)),
        network.open_host(IDENTITIES[3].peer) as mute,
    ):
        mute.serve(SYNC_PROTOCOL, lambda peer, stream: trio.sleep_forever())
        await first.host.connect(mute.local)
        await connect_all([first, second, third])
        for member in (first, second, third):
            member.table.publish("heartbeat", heartbeat())
        began_s = trio.current_time()
        await first.settled([second, third])
        assert trio.current_time() - began_s < 3
        await trio.sleep(60)
        assert first.sync.rounds_failed > 0
