"""A newcomer to a run that has gone on for a while, behind a slow line: soon where the others are, whoever fails."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import cast

import pytest
import torch
import trio

from gossip.store import ShardStore
from netsim.attackers import RottenStore
from netsim.determinism import SimClock, deterministic_scheduling
from netsim.network import LinkModel, open_sim_network
from netsim.quadratic import Quadratic, QuadraticProblem
from netsim.world import Machine, World
from node.gossip_node import GossipNode
from node.status import Arrival
from tests.netsim.test_world import until
from training.run_spec import parse_run_spec, run_id

MEMBERS = 5
DIMENSION = 1 << 17
STATE_BYTES = 8 * DIMENSION
"""Anchor and momentum."""
LINE_BYTES_PER_S = 0.15e6
MERGES_BEFORE = 6
"""More than those of which members keep the differences."""
SLOWER_MAX = 1.3
SPEC = parse_run_spec("""
name = "joining"
init = "shared"
[train]
steps = 16000
[exchange]
every_steps = 400
[schedule]
preset = "every"
[merge]
wait_s_max = 20
[outer]
kind = "nesterov"
""")


def simulated(main: Callable[[World], Awaitable[None]]) -> None:
    """Members that have merged a few times, and then ``main``."""
    problem = QuadraticProblem(dimension=DIMENSION, noise=0.0)

    def learner(machine: Machine) -> Quadratic:
        part = (machine.number % MEMBERS + 1, MEMBERS)
        return Quadratic(SPEC, problem, run=run_id(SPEC), peer=machine.peer, part=part)

    async def run() -> None:
        link = LinkModel(latency_s=0.02)
        async with open_sim_network(random.Random(1), link=link) as network, trio.open_nursery() as nursery:
            world = World(network, nursery, spec=SPEC, seed=1, learners=learner)
            for _ in range(MEMBERS):
                world.add_machine()
            nodes = await world.start_all()
            await until(lambda: all(node.merges.count >= MERGES_BEFORE for node in nodes), seconds=600)
            await main(world)
            nursery.cancel_scope.cancel()

    with deterministic_scheduling(1):
        trio.run(run, clock=SimClock())


async def newcomer(world: World) -> tuple[GossipNode, float]:
    """One more member, and when it came."""
    machine = world.add_machine()
    world.network.set_line(machine.peer, up_bytes_per_s=LINE_BYTES_PER_S, down_bytes_per_s=LINE_BYTES_PER_S)
    began_s = trio.current_time()
    node = await world.start(machine.number, bootstrap=0)
    assert isinstance(node, GossipNode)
    return node, began_s


async def caught_up(node: GossipNode, began_s: float) -> float:
    """How long it took, as a multiple of what the bytes need."""
    await until(lambda: node.merge_host.anchor is not None, seconds=120)
    return (trio.current_time() - began_s) / (STATE_BYTES / LINE_BYTES_PER_S)


async def listen(node: GossipNode, told: list[Arrival]) -> None:
    """What it says of the weights on their way."""
    while True:
        if (arrival := node.merges.arrival) is not None:
            told.append(arrival)
        await trio.sleep(0.1)


async def contributes(node: GossipNode) -> int:
    """To which merge after the first that it took over."""
    began = node.merger.head_height
    await until(
        lambda: node.merges.last is not None and node.merges.last.contributed,
        seconds=120,
    )
    assert node.merges.last is not None
    return node.merges.last.height - began


def holders(node: GossipNode) -> int:
    """From how many it has a real part of what it pulled."""
    pulled = node.fetcher.bytes_pulled
    return sum(size > STATE_BYTES / 50 for size in pulled.values())


def test_a_newcomer_is_soon_where_the_others_are() -> None:
    async def main(world: World) -> None:
        node, began_s = await newcomer(world)
        async with trio.open_nursery() as nursery:
            told: list[Arrival] = []
            nursery.start_soon(listen, node, told)
            assert await caught_up(node, began_s) < SLOWER_MAX
            nursery.cancel_scope.cancel()
        received = [arrival.received for arrival in told if arrival.total == told[-1].total]
        assert received == sorted(received)
        assert 0.99 * STATE_BYTES < told[-1].total < 1.01 * STATE_BYTES
        assert received[0] < 0.3 * STATE_BYTES < 0.7 * STATE_BYTES < received[-1]
        assert len(told[-1].holders) >= 3
        assert holders(node) >= 3
        assert node.fetcher.bytes_pulled.total() < 1.1 * STATE_BYTES
        assert await contributes(node) <= 2

    simulated(main)


@pytest.mark.parametrize(
    "share", [pytest.param(0.1, marks=pytest.mark.slow), 0.5, pytest.param(0.9, marks=pytest.mark.slow)]
)
def test_a_holder_that_dies_costs_no_restart(share: float) -> None:
    async def main(world: World) -> None:
        node, began_s = await newcomer(world)
        await until(lambda: node.fetcher.bytes_pulled.total() > share * STATE_BYTES, seconds=60)
        world.kill(1)
        assert await caught_up(node, began_s) < SLOWER_MAX
        assert node.fetcher.bytes_pulled.total() < 1.1 * STATE_BYTES
        assert holders(node) >= 3
        assert await contributes(node) <= 2

    simulated(main)


def test_a_holder_that_lies_is_dropped_and_named() -> None:
    async def main(world: World) -> None:
        liar = world.machines[MEMBERS - 1].node
        assert liar is not None
        liar.shard_server._store = cast(ShardStore, RottenStore(liar.store))
        node, began_s = await newcomer(world)
        # All pieces are asked for at once, so it has sent a part of several before one has been checked.
        assert await caught_up(node, began_s) < 1.5
        assert node.ledger.last_problem(liar.local).startswith("hash")
        assert holders(node) >= 3
        assert bool(torch.isfinite(node.trainer.read()).all())
        assert await contributes(node) <= 2

    simulated(main)
