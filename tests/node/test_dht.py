"""The hash table on the simulated network: a newcomer that knows a run's id and an address of any run finds the run."""

from __future__ import annotations

import contextlib
import random

import pytest
import trio
from trio.testing import MockClock

from gossip.adverts import ASK_S, fetch_adverts
from gossip.dht import ALONE_S_MAX, STALE_S
from gossip.dht_table import run_key
from gossip.links import HELLO_WAIT_S
from gossip.messages import DHT_PROTOCOL, HELLO_PROTOCOL, Find, Found, Hello, WantPeers, WantSpec
from gossip.visits import GUESTS_MAX
from netsim.network import address_of, open_sim_network
from netsim.world import ed25519_signer
from node.answers import tell_adverts
from node.rendezvous import Rendezvous
from p2p.advert import read_advert
from p2p.errors import CallRefused, PeerUnreachable, ProtocolUnsupported
from p2p.identity import Identity
from p2p.limits import DEFAULT_LIMITS
from p2p.rpc import call, serve_calls
from p2p.transport import PeerId, PeerRecord
from tests.gossip.world import heartbeat
from tests.node.dht_world import LIES, found_in_s, invitation, lie, live, simulated, spec_named
from training.run_spec import run_id

RUNS = [spec_named(f"run-{number}") for number in range(3)]
HOSTS = [ed25519_signer(31, number) for number in range(13)]
LIARS = [ed25519_signer(32, number) for number in range(len(LIES))]
GATE = HOSTS[0].peer
WARM_S = 30.0
FOUND_S_MAX = 30.0


async def test_a_newcomer_finds_its_swarm_among_the_dead_and_the_hostile(autojump_clock: MockClock) -> None:
    """Twelve honest hosts of three runs and six liars; then four of the twelve die, two of them without a word."""
    nodes: dict[PeerId, Rendezvous] = {}
    key = run_key(run_id(RUNS[1]))
    async with open_sim_network(random.Random(1)) as network, trio.open_nursery() as nursery:
        gate = PeerRecord(GATE, (address_of(GATE),))
        for number, identity in enumerate(HOSTS[:12]):
            bootstrap = [invitation(GATE)] if number else []
            nursery.start_soon(live, network, identity, RUNS[number % 3], nodes, bootstrap)
        for how, identity in zip(LIES, LIARS, strict=True):
            nursery.start_soon(lie, network, identity, how, key, gate)
        await trio.sleep(WARM_S)
        known = {liar.peer for liar in LIARS for node in nodes.values() if liar.peer in node.dht.search.table}
        assert len(known) >= len(LIARS) - 1  # The liars are where they want to be.
        for _ in range(2):
            assert await found_in_s(network, RUNS[1], invitation(GATE)) < FOUND_S_MAX
        for number in (1, 4, 6, 8):
            (network.crash if number < 5 else network.vanish)(HOSTS[number].peer)
        for _ in range(3):
            assert await found_in_s(network, RUNS[1], invitation(GATE)) < FOUND_S_MAX
        # Nobody honest has lost standing with anybody honest by any of this.
        for node in nodes.values():
            assert all(node.ledger.standing(peer) > 90 for peer in nodes)
        nursery.cancel_scope.cancel()


async def test_members_that_know_only_somebody_of_another_run_find_each_other(
    autojump_clock: MockClock,
) -> None:
    """And what the runs say within themselves stays there."""
    first, second, third = HOSTS[1:4]
    async with (
        open_sim_network(random.Random(2)) as network,
        simulated(network, HOSTS[0], RUNS[0]) as gate,
        simulated(network, first, RUNS[1], bootstrap=[invitation(GATE)]) as one,
        simulated(network, second, RUNS[1], bootstrap=[invitation(GATE)]) as other,
        simulated(network, third, RUNS[0], bootstrap=[invitation(GATE)]) as fellow,
    ):
        for node in (gate, one, other, fellow):
            node.notices.publish("heartbeat", heartbeat(addresses=list(node.transport.local.addresses)))
        with trio.fail_after(60):
            while second.peer not in one.links.neighbours:
                await trio.sleep(0.5)
        await trio.sleep(120)
        assert gate.links.neighbours == [third.peer]
        assert set(gate.notices.authors()) == {GATE, third.peer}
        assert set(one.notices.authors()) == set(other.notices.authors()) == {first.peer, second.peer}
        for node in (gate, one, other, fellow):
            assert set(node.ledger.refusals) <= {"wrong-run"}
            # A foreign bootstrap peer is dialled as a member once in five minutes, not once a second.
            assert node.ledger.refusals["wrong-run"] <= 2


async def test_it_is_off_where_nobody_is_known_and_where_it_is_not_wanted(autojump_clock: MockClock) -> None:
    stranger = Identity.generate()
    async with (
        open_sim_network(random.Random(3)) as network,
        simulated(network, HOSTS[0], RUNS[0]) as alone,
        simulated(network, HOSTS[1], RUNS[0], dht=False) as aloof,
        network.open_host(stranger.peer) as host,
    ):
        await trio.sleep(300)
        assert alone.transport.traffic().bytes_sent == 0
        assert tell_adverts(aloof) == {"adverts": []}
        record = PeerRecord(HOSTS[1].peer, (address_of(HOSTS[1].peer),))
        await host.connect(record)
        with pytest.raises(ProtocolUnsupported):
            await call(host, record.peer, DHT_PROTOCOL, Find(key=bytes(32), addresses=[]), Found, timeout_s=5)
        with pytest.raises(PeerUnreachable, match="nobody could be reached"):
            await found_in_s(network, RUNS[1], invitation(HOSTS[1].peer))


async def test_swarms_are_known_to_nodes_of_other_runs(autojump_clock: MockClock) -> None:
    """Two runs have only the gate in common, which is of a third; somebody passing by asks the one about the other."""
    passer_by = Identity.generate()
    async with (
        open_sim_network(random.Random(5)) as network,
        simulated(network, HOSTS[0], RUNS[0]),
        simulated(network, HOSTS[1], RUNS[1], bootstrap=[invitation(GATE)], advertise="for all"),
        simulated(network, HOSTS[2], RUNS[2], bootstrap=[invitation(GATE)]) as other,
        network.open_host(passer_by.peer) as host,
    ):
        with trio.fail_after(20 * ASK_S):  # Whom it asks is drawn each time.
            while not len(other.adverts.table):
                await trio.sleep(10)
        await host.connect(PeerRecord(other.local, other.transport.local.addresses))
        (line,) = await fetch_adverts(host, other.local)
        advert = read_advert(line, trio.current_time())
        assert (advert.claim.about, advert.claim.run) == ("for all", run_id(RUNS[1]).hex())
        assert advert.claim.addresses[0] == invitation(HOSTS[1].peer)
        assert tell_adverts(other) == {"adverts": [line.decode()]}
        assert set(other.ledger.refusals) <= {"wrong-run"}


async def test_who_rests_asks_nothing_answers_nothing_and_is_announced_again_after(
    autojump_clock: MockClock,
) -> None:
    key = run_key(run_id(RUNS[1]))
    async with (
        open_sim_network(random.Random(6)) as network,
        simulated(network, HOSTS[0], RUNS[0]) as gate,
        simulated(network, HOSTS[1], RUNS[1], bootstrap=[invitation(GATE)]) as sparing,
    ):
        await trio.sleep(WARM_S)
        (told,) = gate.dht.store.of(key, now_unix_s=trio.current_time())
        await sparing.rest("enough for today")
        await trio.sleep(10)
        before = sparing.transport.traffic()
        await gate.transport.connect(sparing.transport.local)
        with pytest.raises(CallRefused) as refused:
            await call(
                gate.transport,
                sparing.local,
                DHT_PROTOCOL,
                Find(key=key, addresses=[]),
                Found,
                timeout_s=5,
            )
        assert refused.value.code == "resting"
        await trio.sleep(10)  # It has shown the gate out meanwhile.
        await gate.transport.connect(sparing.transport.local)
        with pytest.raises(CallRefused) as refused:
            await fetch_adverts(gate.transport, sparing.local)
        assert refused.value.code == "resting"
        await trio.sleep(STALE_S)
        after = sparing.transport.traffic()
        assert after.bytes_sent - before.bytes_sent < 2000
        assert gate.dht.store.of(key, now_unix_s=trio.current_time()) == [told]
        sparing.resume()
        await trio.sleep(2 * ALONE_S_MAX)
        (anew,) = gate.dht.store.of(key, now_unix_s=trio.current_time())
        assert anew.expires_unix_s > told.expires_unix_s + STALE_S


async def test_guests_are_bounded_and_leave_the_links_alone(autojump_clock: MockClock) -> None:
    """More than may stay have dialled, say that they follow another run, and do not go by themselves."""
    async with (
        open_sim_network(random.Random(4)) as network,
        simulated(network, HOSTS[0], RUNS[0]) as node,
        simulated(network, HOSTS[1], RUNS[0], bootstrap=[invitation(GATE)]) as fellow,
        contextlib.AsyncExitStack() as stack,
    ):
        await trio.sleep(5)
        for number in range(GUESTS_MAX + 4):
            guest = ed25519_signer(33, number)
            host = await stack.enter_async_context(network.open_host(guest.peer))
            serve_calls(
                host,
                HELLO_PROTOCOL,
                Hello | WantSpec | WantPeers,
                elsewhere,
                limits=DEFAULT_LIMITS,
                on_malformed=lambda peer, error: None,
            )
            await host.connect(PeerRecord(GATE, (address_of(GATE),)))
        await trio.sleep(3)
        assert len(node.transport.peers()) == GUESTS_MAX + 1
        assert node.links.neighbours == [fellow.local]
        await trio.sleep(HELLO_WAIT_S)
        assert node.transport.peers() == {fellow.local}


async def elsewhere(peer: PeerId, request: Hello | WantSpec | WantPeers) -> Hello:
    """As a member of another run answers."""
    raise CallRefused("wrong-run", "this is another one")
