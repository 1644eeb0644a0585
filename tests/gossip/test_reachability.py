"""Whether a peer can be dialled: what follows from what neighbours say, and who is dialled because somebody asks."""

from __future__ import annotations

import contextlib
import random

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from gossip.address_ranges import best_for_strangers
from gossip.messages import REACH_PROTOCOL, DialBack, WantDialBack
from gossip.reachability import (
    ASKED_AGAIN_S,
    CALM_LOOK_S,
    PORTS_MAX,
    Reachability,
    Verdict,
    judge,
    where_to_dial,
)
from netsim.network import open_sim_network
from p2p.circuits import circuit_address
from p2p.errors import CallRefused, PeerUnreachable
from p2p.limits import Limits
from p2p.rpc import call
from p2p.service import open_service_nursery
from tests.gossip.test_links import World, invitation, wait_for
from tests.gossip.world import IDENTITIES

LIMITS = Limits()
HERE = "/ip4/45.1.0.7/tcp/4100"
RELAY = IDENTITIES[0].peer


def view(host="45.1.0.7", *answered):
    return DialBack(host=host, answered=list(answered))


@pytest.mark.parametrize(
    ("views", "verdict"),
    [
        ([], Verdict("unknown", ())),
        ([view("192.168.1.9", "/ip4/192.168.1.9/tcp/4100"), view("127.0.0.1")], Verdict("unknown", ())),
        ([view("no address at all", HERE)], Verdict("unknown", ())),
        ([view()], Verdict("private", ())),
        ([view("45.1.0.7", HERE)], Verdict("public", (HERE,))),
        ([view("45.1.0.7", HERE), view(), view()], Verdict("private", ())),
        ([view("45.1.0.7", HERE), view("45.1.0.7", HERE), view()], Verdict("public", (HERE,))),
        ([view("45.1.0.7", HERE), view("10.0.0.1")], Verdict("public", (HERE,))),
        ([view("45.1.0.7", HERE, HERE, HERE), view(), view()], Verdict("private", ())),
    ],
)
def test_half_of_those_who_can_tell_decide(views, verdict):
    assert judge(views, [HERE]) == verdict


def test_nobody_has_us_tell_of_what_was_not_asked_for():
    lies = ("/ip4/203.0.113.9/tcp/4100", "/ip4/45.1.0.7/tcp/22", "nonsense", "/dns/example.org/tcp/4100")
    assert judge([view("45.1.0.7", *lies)], [HERE]) == Verdict("private", ())
    # The port that was claimed, at the address of a router that forwards it.
    seen = [view("45.1.0.7", HERE, *lies)]
    assert judge(seen, ["/ip4/192.168.1.5/tcp/4100"]) == Verdict("public", (HERE,))


@given(st.lists(st.builds(DialBack, host=st.text(max_size=20), answered=st.lists(st.text(), max_size=8))))
def test_whatever_is_said_there_is_a_verdict(views):
    verdict = judge(views, [HERE])
    assert set(verdict.addresses) <= {address for each in views for address in each.answered}


def test_nobody_has_a_third_party_dialled():
    claimed = [
        "/ip4/192.168.1.5/tcp/4100",
        "/ip4/203.0.113.9/tcp/22",
        "/ip4/203.0.113.9/tcp/4100",
        "/dns/example.org/tcp/443",
        circuit_address("/ip4/203.0.113.9/tcp/80", RELAY),
    ]
    assert where_to_dial("45.1.0.7", claimed) == [HERE, "/ip4/45.1.0.7/tcp/22"]
    assert where_to_dial("2001:db8::7", ["/ip6/fe80::1/tcp/4100"]) == ["/ip6/2001:db8::7/tcp/4100"]
    many = [f"/ip4/45.1.0.7/tcp/{port}" for port in range(1, 9)]
    assert where_to_dial("45.1.0.7", many) == many[:PORTS_MAX]


def test_strangers_are_told_of_the_address_that_most_can_reach():
    local, routed, name = "/ip4/192.168.1.5/tcp/4100", "/ip4/45.1.0.9/tcp/4100", "/dns/example.org/tcp/4100"
    circuit = circuit_address(routed, RELAY)
    assert best_for_strangers([local, circuit, routed]) == routed
    assert best_for_strangers([local, circuit]) == circuit
    assert best_for_strangers([local, name, circuit]) == name
    assert best_for_strangers([local, "/ip4/10.0.0.1/tcp/1"]) == local
    assert best_for_strangers([circuit_address(local, RELAY), local]) == circuit_address(local, RELAY)


# --- over the simulated network -----------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def swarm(*, hidden=(), routed=True):
    """Five nodes, the first everybody's bootstrap; ``hidden`` ones can dial and not be dialled."""
    async with (
        open_sim_network(random.Random(1), limits=LIMITS) as network,
        contextlib.AsyncExitStack() as stack,
    ):
        world, nodes = World(network), []
        nursery = await stack.enter_async_context(open_service_nursery())
        for number, identity in enumerate(IDENTITIES[:5]):
            if routed:
                network.addresses[identity.peer] = f"/ip4/45.{number}.0.1/tcp/4100"
            if number in hidden:
                network.undiallable.add(identity.peer)
        for identity in IDENTITIES[:5]:
            first = IDENTITIES[0]
            address = f"{network.addresses[first.peer]}/p2p/{first.peer}" if routed else invitation(first)
            bootstrap = [address] if nodes else []
            node = await stack.enter_async_context(world.node(identity, bootstrap=bootstrap))
            node.changes = []
            node.reachability = Reachability(
                transport=node.host, links=node.links, book=node.book, ledger=node.ledger, limits=LIMITS
            )
            node.reachability.on_change(lambda node=node: node.changes.append(node.host.local.addresses))
            nursery.start_soon(node.reachability.run)
            nodes.append(node)
        yield nodes, network


async def test_each_finds_out_whether_it_can_be_dialled(autojump_clock):
    async with swarm(hidden=(2, 4)) as (nodes, _):
        await wait_for(lambda: all(node.reachability.reach != "unknown" for node in nodes))
        assert [node.reachability.reach for node in nodes] == [
            "public",
            "public",
            "private",
            "public",
            "private",
        ]
        assert not any(node.ledger.refusals for node in nodes)
        assert not any(node.reachability.relays for node in nodes), "here nobody relays"
        assert not any(node.changes for node in nodes), "and nothing new is to be told"


async def test_on_a_local_network_nobody_asks(autojump_clock):
    async with swarm(hidden=(2,), routed=False) as (nodes, _):
        await trio.sleep(10 * CALM_LOOK_S)
        assert all(node.links.neighbours for node in nodes)
        assert all(node.reachability.reach == "unknown" for node in nodes)


async def test_what_has_changed_is_found_out_in_time(autojump_clock):
    async with swarm() as (nodes, network):
        await wait_for(lambda: all(node.reachability.reach == "public" for node in nodes))
        network.undiallable.add(nodes[3].peer)
        await trio.sleep(ASKED_AGAIN_S + 60)
        assert nodes[3].reachability.reach == "private"
        network.undiallable.clear()
        # Carried somewhere else, where it has no connection at first: it asks at once when it has one again.
        cut = network.cut([nodes[3].peer], [node.peer for node in nodes if node is not nodes[3]])
        await wait_for(lambda: nodes[3].reachability.reach == "unknown", timeout_s=120)
        network.heal([cut])
        await wait_for(lambda: nodes[3].reachability.reach == "public", timeout_s=120)


async def test_a_port_of_the_router_is_asked_about_at_once_and_told_where_it_answers(autojump_clock):
    """Also where it is opened while the last question is still under way."""
    mapped = "/ip4/45.3.0.1/tcp/4101"
    async with swarm(hidden=(3,)) as (nodes, _):
        asked, opened = trio.Event(), set()

        async def answers_at(peer, address):
            asked.set()
            await trio.sleep(5)
            if address not in opened:
                raise PeerUnreachable(address)

        for node in nodes:
            node.host.answers_at = answers_at
        hidden = nodes[3].reachability
        hidden.mapped_at(["/ip4/45.3.0.1/tcp/4102"])
        await wait_for(lambda: hidden.reach == "private")
        hidden.mapped_at([])
        asked = trio.Event()
        await asked.wait()
        opened.add(mapped)
        hidden.mapped_at([mapped])
        await trio.sleep(3 * CALM_LOOK_S)
        assert hidden.reach == "public"
        assert nodes[3].host.local.addresses[0] == mapped
        assert "/ip4/45.3.0.1/tcp/4102" not in nodes[3].host.local.addresses
        opened.clear()
        hidden.mapped_at([])
        await trio.sleep(3 * CALM_LOOK_S)
        assert hidden.reach == "private"


async def test_one_question_at_a_time_is_worked_on(autojump_clock):
    async with swarm(hidden=(1,)) as (nodes, _):
        await wait_for(lambda: nodes[0].peer in nodes[1].links.neighbours)
        refused = []

        async def ask():
            try:
                return await call(
                    nodes[1].host,
                    nodes[0].peer,
                    REACH_PROTOCOL,
                    WantDialBack(addresses=list(nodes[1].host.local.addresses)),
                    DialBack,
                    timeout_s=15,
                )
            except CallRefused as error:
                refused.append(error.code)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(ask)
        assert len(refused) >= 2
        assert set(refused) == {"busy"}
