"""Eclipse: somebody with many peer ids and addresses of one range wants to be all that a node sees.

Goal: whatever the attacker puts into the address book, and however often it dials, the node stays linked to honest
members that it has chosen itself, as long as it knows of any; and without what defends it, it would not.
"""

from __future__ import annotations

import contextlib
import random

import pytest
import trio
from trio.testing import MockClock

from gossip.address_ranges import range_of
from gossip.links import ANCHOR_AFTER_S
from gossip.messages import HELLO_PROTOCOL, PROTOCOL_VERSION, Hello, Notices, WantPeers, WantSpec
from netsim.network import SimHost, SimNetwork, open_sim_network
from netsim.world import ed25519_signer
from p2p.errors import GossamerError
from p2p.limits import Limits
from p2p.rpc import serve_calls
from p2p.transport import PeerId, PeerRecord
from tests.gossip.test_address_ranges import at
from tests.gossip.test_links import RUN, Node, World, wait_for

LIMITS = Limits(peers_max=24, peers_inbound_max=15, links_target=9, address_book_max=256)
HONEST = [ed25519_signer(1, number) for number in range(8)]
VICTIM = ed25519_signer(2, 0)
SYBILS = [ed25519_signer(3, number).peer for number in range(60)]
SYBIL_BLOCK = 200
PAUSE_S = 0.5


def where(number: int) -> str:
    """Of the ``number``-th honest member: each is in a range of its own."""
    return at(10 + number, number)


@contextlib.asynccontextmanager
async def open_eclipse():
    async with open_sim_network(random.Random(1), limits=LIMITS) as network:
        for number, identity in enumerate(HONEST):
            network.addresses[identity.peer] = where(number)
        network.addresses[VICTIM.peer] = at(1, 1)
        for number, peer in enumerate(SYBILS):
            network.addresses[peer] = at(SYBIL_BLOCK, number)
        async with contextlib.AsyncExitStack() as stack:
            world = World(network)
            for number, identity in enumerate(HONEST):
                known = [f"{where(0)}/p2p/{HONEST[0].peer}"] if number else []
                await stack.enter_async_context(world.node(identity, bootstrap=known, limits=LIMITS))
            yield world


async def besiege(network: SimNetwork, peer: PeerId) -> None:
    """One of many: greets like a member, knows nobody, and dials the victim again whenever it is let go."""
    async with network.open_host(peer) as host:
        greet(host)
        while True:
            with contextlib.suppress(GossamerError):
                await host.connect(PeerRecord(VICTIM.peer, (at(1, 1),)))
                # A stream that stays open keeps the connection from counting as idle.
                await host.open_stream(VICTIM.peer, HELLO_PROTOCOL)
            await trio.sleep(PAUSE_S)


def greet(host: SimHost) -> None:
    async def answer(_: PeerId, request: Hello | WantSpec | WantPeers) -> Hello | Notices:
        if isinstance(request, Hello):
            addresses = list(host.local.addresses)
            return Hello(run=RUN, version=PROTOCOL_VERSION, agent="sybil", addresses=addresses)
        return Notices(notices=[])

    serve_calls(
        host,
        HELLO_PROTOCOL,
        Hello | WantSpec | WantPeers,
        answer,
        limits=LIMITS,
        on_malformed=lambda peer, error: None,
    )


def honest_links(node: Node) -> list[PeerId]:
    return [identity.peer for identity in HONEST if identity.peer in node.links.neighbours]


def chosen_ranges(node: Node) -> int:
    dialled = {node.host.dialled(peer) for peer in node.host.peers()} - {None}
    return len({range_of(address) for address in dialled})


def flood(node: Node) -> None:
    """As if it had been told of: the attacker's own addresses, and lies about the ranges of others."""
    for number, peer in enumerate(SYBILS):
        node.book.add(peer, [at(SYBIL_BLOCK, number), at(10 + number % len(HONEST), 77)], "heartbeat")


@pytest.mark.parametrize("defended", [True, False])
async def test_a_third_of_the_links_are_of_ones_own_choice(
    autojump_clock: MockClock, *, defended: bool
) -> None:
    """The victim knows all honest members, and the attackers are there first, with every connection it has."""
    async with open_eclipse() as world, trio.open_nursery() as siege:
        await trio.sleep(30)
        for peer in SYBILS:
            siege.start_soon(besiege, world.network, peer)
        async with world.node(VICTIM, limits=LIMITS) as victim:
            if not defended:
                victim.links._own_choices = 0
            await trio.sleep(5)
            assert len(victim.host.peers()) >= LIMITS.links_target
            flood(victim)
            for number, identity in enumerate(HONEST):
                victim.book.add(identity.peer, [where(number)], "exchange")
            if defended:
                await wait_for(lambda: chosen_ranges(victim) >= 3, timeout_s=90)
                assert len(honest_links(victim)) >= 2
                await wait_for(lambda: {each.peer for each in HONEST} <= set(victim.table.authors()))
            else:
                await trio.sleep(90)
                assert honest_links(victim) == []
                assert victim.table.authors() == [VICTIM.peer]
        siege.cancel_scope.cancel()


async def test_a_restarted_node_begins_with_those_that_were_good_for_long(autojump_clock: MockClock) -> None:
    """While it was off its address book was filled with the attacker's entries, and everybody dials it at once."""
    async with open_eclipse() as world, trio.open_nursery() as siege:
        async with world.node(
            VICTIM, bootstrap=[f"{where(0)}/p2p/{HONEST[0].peer}"], limits=LIMITS
        ) as victim:
            await wait_for(lambda: len(honest_links(victim)) == len(HONEST))
            await trio.sleep(ANCHOR_AFTER_S + 60)
            flood(victim)
            await trio.sleep(60)
        for peer in SYBILS:
            siege.start_soon(besiege, world.network, peer)
        async with world.node(VICTIM, limits=LIMITS) as again:
            anchors = again.book._begun_with
            assert len({range_of(address) for address in anchors.values()}) == len(anchors) >= 2
            await wait_for(lambda: set(anchors) <= set(again.links.neighbours), timeout_s=5)
        siege.cancel_scope.cancel()
