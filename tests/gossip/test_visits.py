"""Visits: connected for a question, gone after it, and never taken for a link."""

import random

import pytest
import trio

from gossip.visits import Visits
from netsim.network import address_of, open_sim_network
from p2p.errors import PeerUnreachable
from p2p.transport import PeerRecord
from tests.gossip.world import IDENTITIES

US, THEM, THIRD = (identity.peer for identity in IDENTITIES[:3])


def record(peer):
    return PeerRecord(peer, (address_of(peer),))


@pytest.fixture
async def hosts():
    async with (
        open_sim_network(random.Random(1)) as network,
        network.open_host(US) as ours,
        network.open_host(THEM) as theirs,
    ):
        yield ours, theirs


async def test_a_host_is_a_stranger_until_it_is_gone(hosts, autojump_clock):
    ours, _ = hosts
    visits = Visits(ours, guests_max=0)
    async with visits.visit(record(THEM)):
        assert THEM in ours.peers()
        assert visits.is_stranger(THEM)
        assert visits.is_host(THEM)
    assert THEM not in ours.peers()
    assert not visits.is_stranger(THEM)


async def test_a_link_is_used_and_kept(hosts, autojump_clock):
    ours, _ = hosts
    visits = Visits(ours, guests_max=0)
    await ours.connect(record(THEM))
    async with visits.visit(record(THEM)):
        assert not visits.is_stranger(THEM)
    assert THEM in ours.peers()


async def test_questions_at_the_same_time_share_a_connection_and_none_loses_it(hosts, autojump_clock):
    ours, _ = hosts
    visits = Visits(ours, guests_max=0)
    rng = random.Random(3)

    async def ask():
        await trio.sleep(rng.random())
        async with visits.visit(record(THEM)):
            for _ in range(4):
                await trio.sleep(0.05 * rng.random())
                assert THEM in ours.peers()

    async with trio.open_nursery() as nursery:
        for _ in range(60):
            nursery.start_soon(ask)
    assert ours.peers() == frozenset()
    assert not visits.is_host(THEM)


async def test_who_cannot_be_reached_is_no_host(hosts, autojump_clock):
    ours, _ = hosts
    visits = Visits(ours, guests_max=0)
    with pytest.raises(PeerUnreachable):
        async with visits.visit(record(THIRD)):
            pass
    assert not visits.is_host(THIRD)
    await visits.wait_over(THIRD)


async def test_a_link_is_waited_for_until_the_visit_is_over(hosts, autojump_clock):
    ours, _ = hosts
    visits = Visits(ours, guests_max=0)
    async with trio.open_nursery() as nursery, visits.visit(record(THEM)):
        nursery.start_soon(visits.wait_over, THEM)
        await trio.sleep(1)
        assert len(nursery.child_tasks) == 1


async def test_guests_are_few_and_have_dialled_us(hosts, autojump_clock):
    ours, theirs = hosts
    visits = Visits(ours, guests_max=1)
    await ours.connect(record(THEM))
    assert not visits.admit(THEM)  # It was we who dialled.
    await ours.disconnect(THEM, "")
    await trio.sleep(1)
    await theirs.connect(record(US))
    await trio.sleep(1)
    assert visits.admit(THEM)
    assert visits.is_stranger(THEM)
    assert not visits.is_host(THEM)
    await theirs.disconnect(US, "")
    await trio.sleep(1)
    visits.left(THEM)
    assert not visits.admit(THEM)  # Gone already.
    await theirs.connect(record(US))
    await trio.sleep(1)
    assert visits.admit(THEM)
