"""A rendezvous in the simulated network: members find each other by it, and it is none of them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator

import trio
from trio.testing import MockClock

from gossip.newcomer import fetch_spec, members_known_to
from gossip.store import ShardStore
from netsim.network import address_of
from netsim.world import Machine, World, open_world
from node.base import BaseSource
from node.rendezvous import Rendezvous
from node.runtime import ContactOptions
from p2p.identity import Identity
from p2p.service import open_service_nursery
from p2p.transport import PeerRecord
from tests.gossip.world import MemoryDisk
from tests.netsim.test_world import SPEC, anchors, finished, live, small_corpus, until
from training.run_spec import canonical_bytes, run_id


@contextlib.asynccontextmanager
async def rendezvous_on(world: World, machine: Machine) -> AsyncIterator[Rendezvous]:
    """A process on ``machine``, which the world itself does not start."""
    async with world.network.open_host(machine.peer) as transport, open_service_nursery() as nursery:
        rendezvous = Rendezvous(
            transport=transport,
            disk=machine.disk,
            signer=machine.identity,
            rng=random.Random(machine.number),
            options=ContactOptions(agent="netsim", limits=world.network.limits),
            spec=world.spec,
            wall_time_s=trio.current_time,
        )
        nursery.start_soon(rendezvous.run)
        yield rendezvous


async def test_members_find_each_other_by_it_merge_without_it_and_outlive_it(
    autojump_clock: MockClock,
) -> None:
    async with open_world(SPEC, small_corpus(), machines=4, seed=7) as world:
        place = world.machines[3]
        async with rendezvous_on(world, place) as rendezvous:
            nodes = [await world.start(number, bootstrap=3) for number in range(3)]
            await until(lambda: all(node.merges.count == 1 for node in nodes), seconds=60)
            assert sorted(rendezvous.members.peers()) == sorted(node.local for node in nodes)
            # One mechanism keeps it out of everything: it has said nothing.
            for node in nodes:
                assert place.peer in node.transport.peers()
                assert place.peer not in node.notices.authors()
                assert place.peer not in node.members.peers()
            assert rendezvous.notices.authors() == sorted(node.local for node in nodes)
        await until(lambda: finished(nodes), seconds=90)
        assert len(anchors(nodes)) == 1
        for node in nodes:
            record = node.merger.head_record.record
            assert [entry.peer for entry in record.roster] == sorted(node.local for node in nodes)
            assert len(record.contributors) == 3
            assert node.ledger.refusals.total() == 0
        # And what a life of it has learned is there in the next, though nobody tells it anything.
        assert live(world) == nodes
        async with rendezvous_on(world, place) as again:
            await until(lambda: len(again.members.peers()) == 3, seconds=30)


async def test_a_newcomer_gets_spec_members_and_base_from_whom_it_names(autojump_clock: MockClock) -> None:
    data = bytes(range(256)) * 40
    async with open_world(SPEC, small_corpus(), machines=2, seed=8) as world:
        member, place = world.machines
        async with rendezvous_on(world, place):
            node = await world.start(0, bootstrap=1)
            ref = await node.store.put(data, owner="base")
            await until(lambda: place.peer in node.links.neighbours, seconds=10)
            await trio.sleep(5)
            newcomer = Identity.generate()
            async with world.network.open_host(newcomer.peer) as transport:
                await transport.connect(PeerRecord(place.peer, (address_of(place.peer),)))
                spec = await fetch_spec(transport, place.peer, run_id(SPEC), timeout_s=5)
                assert spec == canonical_bytes(SPEC)
                known = await members_known_to(transport, place.peer, limits=world.network.limits)
                assert known == [PeerRecord(member.peer, (address_of(member.peer),))]
                source = BaseSource(
                    path=None,
                    store=ShardStore(MemoryDisk(), quota_bytes=1 << 20),
                    transport=transport,
                    bootstrap=[f"{address_of(place.peer)}/p2p/{place.peer}"],
                    limits=world.network.limits,
                )
                assert await source._obtain(ref, None) == data
