"""One-byte mode: bytes that a node receives for each record of another, on real sockets and in netsim.

The model is as small as can be, so that many batches pass in a minute. What is received is counted at the sockets, with
signatures, framing, encryption and reconciliation. What also flows while nothing is learned, heartbeats and signs of
life, is measured in a swarm that has finished, and taken off by the second.
"""

from __future__ import annotations

import logging
import random
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import trio

from benchmarks.harness import Figure
from cli.node_process import NodeProcess, free_ports

if TYPE_CHECKING:
    from netsim.world import World

NODES = 4
SIMULATED_NODES = 16
SIMULATED_STEP_S = 0.1
"""Of one record."""
BARS = {512: 2.5, 64: 6.0}
"""By records a batch: bytes per record at most."""
KEEP_ALIVE_MAX = 100.0
"""Bytes per second and connection."""
STEPS_MAX = 10_000_000
"""More than anybody gets to take."""
WARM_S = 20.0
"""From the moment that all know each other: by then each log has found its tree."""
IDLE_S = 60.0
BATCHES = 8
"""Of each node, at least, in what is measured."""
PROBES = 8
"""Records a step."""
SPEC = """
name = "record-traffic"
init = "shared"
[model]
layers = 1
width = 16
heads = 1
context = 16
[data]
held_out_bytes = 4096
[train]
steps = {steps}
batch = 1
[one_byte]
probes = {probes}
batch_records = {batch}
batch_s_max = 3600
snapshot_records = 0
log_allowance = 1073741824
"""


@dataclass(frozen=True, slots=True)
class _Count:
    """Of one node, since it began."""

    at_s: float
    bytes_received: int
    records: int
    """Of others."""
    connections: int


_Look = Callable[[], Awaitable[list[_Count]]]


async def measure() -> list[Figure]:
    """Bytes per record and node at two sizes of a batch, and what keeps connections alive, both ways."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    figures = await _figures(f"{NODES} processes", _processes)
    return figures + await _figures(f"{SIMULATED_NODES} nodes, netsim", _simulated)


async def _figures(
    where: str, run: Callable[[int, int], Awaitable[list[tuple[_Count, _Count]]]]
) -> list[Figure]:
    idle = await run(1, PROBES)
    quiet = [_per_second(before, after) for before, after in idle]
    figures = []
    for batch, bar in BARS.items():
        counts = await run(STEPS_MAX, batch)
        figures.append(
            Figure(
                f"bytes per record at {batch} a batch, {where}",
                "B",
                tuple(_per_record(pair, rate) for pair, rate in zip(counts, quiet, strict=True)),
                at_most=bar,
            )
        )
    kept = tuple(rate / before.connections for rate, (before, _) in zip(quiet, idle, strict=True))
    return [*figures, Figure(f"  keep-alives per connection, {where}", "B/s", kept, at_most=KEEP_ALIVE_MAX)]


def _per_second(before: _Count, after: _Count) -> float:
    return (after.bytes_received - before.bytes_received) / (after.at_s - before.at_s)


def _per_record(pair: tuple[_Count, _Count], quiet_per_s: float) -> float:
    before, after = pair
    received = after.bytes_received - before.bytes_received - quiet_per_s * (after.at_s - before.at_s)
    return received / (after.records - before.records)


async def _between(look: _Look, *, steps: int, batch: int) -> list[tuple[_Count, _Count]]:
    """What each node received from now until enough batches have passed, or for IDLE_S when there are none."""
    before = await look()
    if steps == 1:
        await trio.sleep(IDLE_S)
        return list(zip(before, await look(), strict=True))
    enough = BATCHES * batch * (len(before) - 1)
    with trio.fail_after(3600):
        while True:
            await trio.sleep(5)
            after = await look()
            pairs = list(zip(before, after, strict=True))
            if all(late.records - early.records >= enough for early, late in pairs):
                return pairs


# --- real sockets ---------------------------------------------------------------------------------------------------


async def _processes(steps: int, batch: int) -> list[tuple[_Count, _Count]]:
    with tempfile.TemporaryDirectory() as folder:
        spec_file = Path(folder) / "run.toml"
        spec_file.write_text(SPEC.format(probes=PROBES, steps=steps, batch=batch))
        swarm = [
            NodeProcess(
                Path(folder),
                f"n{number}",
                port=port,
                part=f"{number}/{NODES}",
                spec_file=spec_file,
                alone=False,
            )
            for number, port in enumerate(free_ports(NODES), start=1)
        ]
        try:
            for node in swarm:
                node.start([swarm[0].address] if node is not swarm[0] else [])
            await _all_met(swarm)
            await trio.sleep(WARM_S)
            return await _between(lambda: _look_at(swarm), steps=steps, batch=batch)
        finally:
            for node in swarm:
                node.kill()


async def _all_met(swarm: Sequence[NodeProcess]) -> None:
    with trio.fail_after(120):
        while True:
            counts = await _look_at(swarm)
            if all(count.connections == NODES - 1 for count in counts):
                return
            await trio.sleep(0.5)


async def _look_at(swarm: Sequence[NodeProcess]) -> list[_Count]:
    counts = []
    for node in swarm:
        node.status = None
        while node.status is None:
            assert node.up, node.last_words()
            await node.look()
            await trio.sleep(0.05)
        status = node.status
        assert status.records is not None
        counts.append(
            _Count(
                trio.current_time(),
                status.bytes_received,
                status.records.applied - PROBES * status.step,
                sum(peer.connected for peer in status.peers),
            )
        )
    return counts


# --- netsim -----------------------------------------------------------------------------------------------------------


async def _simulated(steps: int, batch: int) -> list[tuple[_Count, _Count]]:
    return await trio.to_thread.run_sync(_simulate, steps, batch)


def _simulate(steps: int, batch: int) -> list[tuple[_Count, _Count]]:
    from netsim.determinism import SimClock
    from netsim.network import open_sim_network
    from netsim.record_learner import sketched_learner
    from netsim.world import World
    from node.costs import Costs
    from training.run_spec import parse_run_spec, run_id

    spec = parse_run_spec(SPEC.format(probes=PROBES, steps=steps, batch=batch))

    async def main() -> list[tuple[_Count, _Count]]:
        async with open_sim_network(random.Random(0)) as network, trio.open_nursery() as nursery:
            world = World(
                network,
                nursery,
                spec=spec,
                seed=0,
                learners=lambda machine: sketched_learner(spec, run_id(spec), machine.peer),
            )
            for _ in range(SIMULATED_NODES):
                world.add_machine(costs=Costs(step_s=SIMULATED_STEP_S))
            await world.start_all()
            await trio.sleep(WARM_S + 2 * batch * SIMULATED_STEP_S)

            async def look() -> list[_Count]:
                return _look_into(world)

            try:
                return await _between(look, steps=steps, batch=batch)
            finally:
                nursery.cancel_scope.cancel()

    return trio.run(main, clock=SimClock())


def _look_into(world: World) -> list[_Count]:
    from node.one_byte_node import OneByteNode

    counts = []
    for machine in world.machines:
        node = machine.node
        assert isinstance(node, OneByteNode)
        transport = node.runtime.transport
        counts.append(
            _Count(
                trio.current_time(),
                transport.traffic().bytes_received,
                node.applied.records - PROBES * node.learner.step,
                len(transport.peers()),
            )
        )
    return counts
