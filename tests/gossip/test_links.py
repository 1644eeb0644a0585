"""Links over the simulated network: finding the swarm, keeping to one run, surviving the loss of anybody."""

from __future__ import annotations

import contextlib
import random

import pytest
import trio
from blake3 import blake3

from gossip.address_book import AddressBook
from gossip.anti_entropy import AntiEntropy
from gossip.ledger import BAN_S, PeerLedger
from gossip.links import HELLO_WAIT_S, RESTING_WAIT_S, Links
from gossip.messages import HELLO_PROTOCOL, PROTOCOL_VERSION, Hello, Notice, Notices, WantPeers, WantSpec
from gossip.newcomer import fetch_spec
from gossip.notices import NoticeTable
from netsim.network import address_of, open_sim_network
from p2p.codec import decode
from p2p.errors import AddressError, CallRefused, GossamerError, PeerUnreachable
from p2p.identity import Identity
from p2p.limits import Limits
from p2p.rpc import call
from p2p.service import open_service_nursery
from p2p.transport import PeerRecord
from tests.gossip.world import IDENTITIES, MemoryDisk, heartbeat

SPEC = b"what is trained, and how"
RUN = blake3(SPEC).digest()
LIMITS = Limits()


def invitation(identity):
    return f"{address_of(identity.peer)}/p2p/{identity.peer}"


class World:
    """A simulated network in which nodes come and go."""

    def __init__(self, network):
        self.network = network
        self.disks = {}

    @contextlib.asynccontextmanager
    async def node(self, identity, *, bootstrap=(), spec=SPEC, limits=LIMITS):
        """One node's gossip, on the disk its identity had before."""
        run = blake3(spec).digest()
        rng = random.Random(identity.peer)
        async with open_service_nursery() as nursery, self.network.open_host(identity.peer) as host:
            node = Node()
            node.peer, node.host, node.ledger = identity.peer, host, PeerLedger()
            node.book = AddressBook(
                self.disks.setdefault(identity.peer, MemoryDisk()),
                local=identity.peer,
                limits=limits,
                rng=rng,
            )
            await node.book.load()
            node.table = NoticeTable(signer=identity, run=run, incarnation=1, limits=limits)
            node.links = Links(
                transport=host,
                book=node.book,
                ledger=node.ledger,
                notices=node.table,
                run=run,
                spec=spec,
                agent="test/1",
                bootstrap=bootstrap,
                limits=limits,
                rng=rng,
            )
            sync = AntiEntropy(transport=host, notices=node.table, ledger=node.ledger, limits=limits, rng=rng)
            node.table.publish("heartbeat", heartbeat(addresses=list(host.local.addresses)))
            nursery.start_soon(node.links.run)
            nursery.start_soon(sync.run)
            yield node


class Node:
    """Attributes only."""


@pytest.fixture
async def world():
    async with open_sim_network(random.Random(1), limits=LIMITS) as network:
        yield World(network)


async def wait_for(condition, timeout_s=60.0):
    with trio.fail_after(timeout_s):
        while not condition():
            await trio.sleep(0.1)


async def test_strangers_with_one_bootstrap_peer_become_a_full_mesh(world, autojump_clock):
    async with contextlib.AsyncExitStack() as stack:
        nodes = []
        for identity in IDENTITIES:
            bootstrap = [invitation(IDENTITIES[0])] if nodes else []
            nodes.append(await stack.enter_async_context(world.node(identity, bootstrap=bootstrap)))
        began_s = trio.current_time()
        await wait_for(lambda: all(len(node.links.neighbours) == len(nodes) - 1 for node in nodes))
        assert trio.current_time() - began_s < 10
        assert all(node.links.problem == "" for node in nodes)
        assert not any(node.ledger.refusals for node in nodes)


async def test_links_stay_near_their_target_in_a_larger_swarm(world, autojump_clock):
    limits = Limits(links_target=3, peers_max=12)
    crowd = [Identity.generate() for _ in range(16)]
    async with contextlib.AsyncExitStack() as stack:
        nodes = [
            await stack.enter_async_context(
                world.node(identity, bootstrap=[invitation(crowd[0])], limits=limits)
            )
            for identity in crowd
        ]
        await wait_for(lambda: all(len(node.table.authors()) == len(crowd) for node in nodes))
        await wait_for(lambda: all(len(node.links.neighbours) >= 3 for node in nodes))
        await trio.sleep(10)  # Whoever has more than enough must not go on dialling.
        assert sum(len(node.links.neighbours) for node in nodes[1:]) / 15 < 9


async def test_everybody_can_be_reached_though_few_can_be_connected_at_once(autojump_clock):
    limits = Limits(links_target=3, peers_max=8)
    crowd = [Identity.generate() for _ in range(16)]
    async with (
        open_sim_network(random.Random(1), limits=limits) as network,
        contextlib.AsyncExitStack() as stack,
    ):
        nodes = []
        for identity in crowd:
            known = [invitation(other) for other in crowd[max(0, len(nodes) - 3) : len(nodes)]]
            nodes.append(
                await stack.enter_async_context(World(network).node(identity, bootstrap=known, limits=limits))
            )
        await wait_for(lambda: all(len(node.table.authors()) == len(crowd) for node in nodes))
        with trio.fail_after(60):
            for identity in crowd[1:]:
                await nodes[0].links.reach(identity.peer)
                await trio.sleep(1)
            async with trio.open_nursery() as nursery:  # and all at once, as a proposer does
                for identity in crowd[2:]:
                    nursery.start_soon(nodes[1].links.reach, identity.peer)
        await trio.sleep(20)
        assert all(3 <= len(node.links.neighbours) <= 6 for node in nodes)


async def test_the_swarm_outlives_its_bootstrap_peer_and_a_restarted_node_needs_none(world, autojump_clock):
    first, second, third = IDENTITIES[:3]
    async with world.node(second, bootstrap=[invitation(first)]) as survivor:
        async with world.node(first), world.node(third, bootstrap=[invitation(first)]):
            await wait_for(lambda: len(survivor.links.neighbours) == 2)
            # Long enough for the address books to have been saved.
            await trio.sleep(30)
        await wait_for(lambda: survivor.links.neighbours == [], timeout_s=1)
        async with world.node(third) as restarted:
            await wait_for(lambda: restarted.links.neighbours == [second.peer])


async def test_a_bootstrap_peer_that_comes_up_late_is_found_soon(world, autojump_clock):
    first, second = IDENTITIES[:2]
    async with world.node(second, bootstrap=[invitation(first)]) as early:
        await trio.sleep(3600)
        assert f"no answer from bootstrap peer {first.peer}" in early.links.problem
        async with world.node(first):
            await wait_for(lambda: early.links.neighbours == [first.peer], timeout_s=25)
            assert early.links.problem == ""


async def test_a_killed_neighbour_is_dropped_and_met_again(world, autojump_clock):
    first, second = IDENTITIES[:2]
    async with world.node(first) as survivor:
        async with world.node(second, bootstrap=[invitation(first)]):
            await wait_for(lambda: survivor.links.neighbours == [second.peer])
        await wait_for(lambda: survivor.links.neighbours == [], timeout_s=1)
        async with world.node(second):
            await wait_for(lambda: survivor.links.neighbours == [second.peer])


async def test_partitioned_halves_find_each_other_again(world, autojump_clock):
    limits = Limits(links_target=1)
    async with contextlib.AsyncExitStack() as stack:
        nodes = [
            await stack.enter_async_context(
                world.node(identity, bootstrap=[invitation(IDENTITIES[0])], limits=limits)
            )
            for identity in IDENTITIES[:4]
        ]
        await wait_for(lambda: all(len(node.table.authors()) == 4 for node in nodes))
        left, right = [n.peer for n in nodes[:2]], [n.peer for n in nodes[2:]]
        world.network.cut(left, right)
        await trio.sleep(300)
        assert not any(set(node.links.neighbours) & set(right) for node in nodes[:2])
        world.network.heal()
        nodes[0].table.publish("heartbeat", heartbeat(step=77, addresses=[address_of(nodes[0].peer)]))
        await wait_for(lambda: len({node.table.versions() for node in nodes}) == 1, timeout_s=300)


async def test_peers_of_another_run_part_without_harm(world, autojump_clock):
    ours, theirs = IDENTITIES[:2]
    async with (
        world.node(ours) as home,
        world.node(theirs, bootstrap=[invitation(ours)], spec=b"other") as stranger,
    ):
        await trio.sleep(60)
        assert home.links.neighbours == stranger.links.neighbours == []
        assert home.table.authors() == [ours.peer]
        assert "run" in stranger.links.problem
        assert stranger.ledger.refusals["wrong-run"] > 0
        assert not home.ledger.banned(theirs.peer)


async def test_banned_peers_are_disconnected_refused_and_forgiven(world, autojump_clock):
    first, second = IDENTITIES[:2]
    async with world.node(first) as judge, world.node(second, bootstrap=[invitation(first)]) as culprit:
        await wait_for(lambda: judge.links.neighbours == [second.peer])
        for _ in range(4):
            judge.ledger.note(second.peer, "malformed")
        await wait_for(lambda: second.peer not in judge.host.peers(), timeout_s=1)
        with pytest.raises(PeerUnreachable, match="banned"):
            await judge.links.reach(second.peer)
        await trio.sleep(BAN_S / 2)
        assert culprit.links.neighbours == []
        await wait_for(lambda: judge.links.neighbours == [second.peer], timeout_s=BAN_S)


async def test_reach_connects_and_says_why_not(world, autojump_clock):
    first, second, third = IDENTITIES[:3]
    async with world.node(first, limits=Limits(links_target=0)) as node, world.node(second):
        with pytest.raises(PeerUnreachable, match="no known address"):
            await node.links.reach(second.peer)
        node.book.add(second.peer, [address_of(second.peer)], "heartbeat")
        await node.links.reach(second.peer)
        await node.links.reach(second.peer)
        assert second.peer in node.host.peers()
        node.book.add(third.peer, [address_of(third.peer)], "heartbeat")
        with pytest.raises(PeerUnreachable, match="did not answer"):
            await node.links.reach(third.peer)


async def test_a_hint_from_the_local_network_is_dialled_at_once(world, autojump_clock):
    first, second = IDENTITIES[:2]
    async with world.node(first) as node, world.node(second):
        await trio.sleep(60)
        assert node.links.neighbours == []
        node.links.try_soon(PeerRecord(second.peer, (address_of(second.peer),)), "lan")
        await wait_for(lambda: node.links.neighbours == [second.peer], timeout_s=1)


async def test_a_newcomer_fetches_the_spec_and_believes_only_its_hash(world, autojump_clock):
    first, newcomer = IDENTITIES[:2]
    async with world.node(first) as member, world.network.open_host(newcomer.peer) as host:
        await host.connect(member.host.local)
        assert await fetch_spec(host, first.peer, RUN, timeout_s=5) == SPEC
        with pytest.raises(CallRefused, match="run"):
            await fetch_spec(host, first.peer, bytes(32), timeout_s=5)
        member.links._spec = b"something else"
        with pytest.raises(GossamerError, match="does not match"):
            await fetch_spec(host, first.peer, RUN, timeout_s=5)
        peers = await call(host, first.peer, HELLO_PROTOCOL, WantPeers(count=9), Notices, timeout_s=5)
        [packed] = peers.notices
        assert decode(packed, Notice, bytes_max=1 << 14).author == first.peer
        # It never greets, so it is shown out in the end, and holds no grudge.
        await wait_for(lambda: newcomer.peer not in member.host.peers(), timeout_s=HELLO_WAIT_S + 2)
        assert member.ledger.standing(newcomer.peer) == 100.0


@pytest.mark.parametrize("apart", [-1, 1])
async def test_neighbours_may_be_one_version_apart(world, autojump_clock, apart):
    first, other = IDENTITIES[:2]
    async with world.node(first) as member, world.network.open_host(other.peer) as host:
        await host.connect(member.host.local)
        hello = Hello(run=RUN, version=PROTOCOL_VERSION + apart, agent="x", addresses=[])
        answer = await call(host, first.peer, HELLO_PROTOCOL, hello, Hello, timeout_s=5)
        assert answer.version == PROTOCOL_VERSION
        assert member.links.neighbours == [other.peer]


async def test_strange_greetings_are_refused(world, autojump_clock):
    first, stranger = IDENTITIES[:2]
    async with world.node(first) as member, world.network.open_host(stranger.peer) as host:
        await host.connect(member.host.local)
        newer = Hello(run=RUN, version=PROTOCOL_VERSION + 2, agent="x", addresses=[])
        with pytest.raises(CallRefused, match="version"):
            await call(host, first.peer, HELLO_PROTOCOL, newer, Hello, timeout_s=5)
        for garbage in (b"\xff\xff\xff\xff", b"\x00\x00\x00\x02hi"):
            stream = await host.open_stream(first.peer, HELLO_PROTOCOL)
            await stream.send_all(garbage)
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some(1)
        assert member.ledger.refusals["malformed"] == 2
        with pytest.raises(CallRefused):
            await call(host, first.peer, HELLO_PROTOCOL, WantSpec(run=bytes(32)), Hello, timeout_s=5)
        assert member.links.neighbours == []


async def test_who_rests_parts_in_order_is_left_alone_and_comes_back(world, autojump_clock):
    first, second, newcomer = IDENTITIES[:3]
    async with (
        world.node(first) as keen,
        world.node(second, bootstrap=[invitation(first)]) as sparing,
        world.network.open_host(newcomer.peer) as host,
    ):
        keen.book.add(second.peer, [address_of(second.peer)], "bootstrap")
        await wait_for(lambda: sparing.links.neighbours == [first.peer])
        partings = keen.host.peer_events()
        sparing.links.rest("enough for today")
        assert sparing.links.neighbours == [first.peer]  # There is somebody left to say goodbye to.
        await sparing.links.part_with_all("resting")
        assert not (await partings.receive()).broken
        with pytest.raises(PeerUnreachable, match="nobody for now"):
            await sparing.links.reach(first.peer)
        # A bootstrap peer that does not answer would be tried three times a minute.
        await trio.sleep(1200)
        assert 1200 / 300 - 2 < keen.ledger.refusals["resting"] < 1200 / 150 + 2
        assert keen.ledger.standing(second.peer) == sparing.ledger.standing(first.peer) == 100.0
        assert sparing.links.problem == "enough for today"
        assert "comes back by itself" in keen.links.problem
        # Whoever stays on and asks for other things is shown out soon, and learns nothing.
        await host.connect(sparing.host.local)
        for request in (
            WantSpec(run=RUN),
            WantPeers(count=9),
            Hello(run=RUN, version=PROTOCOL_VERSION, agent="x", addresses=[]),
        ):
            with pytest.raises(CallRefused) as refused:
                await call(host, second.peer, HELLO_PROTOCOL, request, Hello, timeout_s=5)
            assert refused.value.code == "resting"
        await wait_for(lambda: sparing.host.peers() == set(), timeout_s=RESTING_WAIT_S + 2)
        sparing.links.resume()
        await wait_for(lambda: keen.links.neighbours == [second.peer], timeout_s=2)
        assert sparing.links.problem == keen.links.problem == ""


async def test_a_malformed_bootstrap_address_is_a_clear_error(world, autojump_clock):
    with pytest.raises(AddressError, match="does not end in /p2p/"):
        async with world.node(IDENTITIES[0], bootstrap=["/ip4/192.0.2.1/tcp/4100"]):
            raise AssertionError("unreachable")
