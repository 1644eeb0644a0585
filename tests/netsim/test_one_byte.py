"""One-byte mode in virtual time: whatever happens to nodes and network, who lives holds the same bits in the end."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator

import trio

from netsim.network import open_sim_network
from netsim.record_learner import sketched_learner
from netsim.world import Machine, World
from node.one_byte_node import OneByteNode
from training.one_byte import OneByteLearner
from training.run_spec import RunSpec, parse_run_spec, run_id

SPEC = parse_run_spec("""
name = "one-byte-world"
[train]
steps = 400
[one_byte]
step_size = 1e-3
batch_records = 16
batch_s_max = 5
""")


def learners(spec: RunSpec):
    def build(machine: Machine) -> OneByteLearner:
        return sketched_learner(spec, run_id(spec), machine.peer)

    return build


@contextlib.asynccontextmanager
async def world(seed: int, machines: int, spec: RunSpec = SPEC) -> AsyncIterator[World]:
    async with open_sim_network(random.Random(seed)) as network, trio.open_nursery() as nursery:
        one = World(network, nursery, spec=spec, seed=seed, learners=learners(spec))
        for _ in range(machines):
            one.add_machine()
        yield one
        nursery.cancel_scope.cancel()


def nodes(world: World) -> list[OneByteNode]:
    return [machine.node for machine in world.up() if isinstance(machine.node, OneByteNode)]


async def all_finish(world: World, *, within_s: float) -> set[bytes]:
    """Wait until every node that is up has finished; returns their state hashes."""
    with trio.fail_after(within_s):
        for node in nodes(world):
            await node.wait_finished()
    return {node.learner.digest() for node in nodes(world)}


async def test_a_swarm_learns_to_the_end_and_holds_the_same_bits(autojump_clock: object) -> None:
    async with world(1, 4) as one:
        await one.start_all()
        hashes = await all_finish(one, within_s=120)
        assert len(hashes) == 1
        assert all(node.logs.records == 4 * 400 for node in nodes(one))
        assert all(node.diverged is None for node in nodes(one))
