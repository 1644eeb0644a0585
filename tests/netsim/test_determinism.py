"""Two runs from one seed are one run. This file fails loudly when trio renames what ``netsim.determinism`` pins."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import trio
import trio._core._run as scheduler

from netsim.determinism import FLAG, GENERATOR, deterministic_scheduling

PROGRAM = """
import hashlib, random
import trio
from netsim.determinism import SimClock, deterministic_scheduling
from netsim.network import LinkModel, open_sim_network
from p2p.transport import PeerId, ProtocolName

ECHO = ProtocolName("/test/echo/1")
trace = hashlib.sha256()

async def main():
    rng = random.Random(7)
    async with open_sim_network(rng, link=LinkModel(latency_s=0.01, jitter_s=0.05)) as network:
        async def node(number):
            async with network.open_host(PeerId(f"peer-{number}")) as host:
                async def echo(peer, stream):
                    while data := await stream.receive_some():
                        trace.update(f"{trio.current_time()!r} {host.local.peer} {peer} {data!r};".encode())
                        await stream.send_all(data)
                host.serve(ECHO, echo)
                await trio.sleep(1)
                for target in range(8):
                    if target != number:
                        with trio.move_on_after(rng.uniform(0.1, 0.5)):
                            await host.connect(network.hosts[PeerId(f"peer-{target}")].local)
                            stream = await host.open_stream(PeerId(f"peer-{target}"), ECHO)
                            await stream.send_all(bytes([number]))
                            await stream.receive_some()
                await trio.sleep(10)
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(node, number)

with deterministic_scheduling(3):
    trio.run(main, clock=SimClock())
print(trace.hexdigest())
"""


def test_trio_still_has_the_two_names() -> None:
    assert isinstance(getattr(scheduler, FLAG), bool)
    assert isinstance(getattr(scheduler, GENERATOR), random.Random)


def test_the_switches_are_put_back() -> None:
    before = getattr(scheduler, FLAG), getattr(scheduler, GENERATOR)
    with deterministic_scheduling(1):
        assert getattr(scheduler, FLAG) is True
        assert getattr(scheduler, GENERATOR) is not before[1]
    assert (getattr(scheduler, FLAG), getattr(scheduler, GENERATOR)) == before


def test_tasks_run_in_an_order_that_only_the_seed_decides() -> None:
    async def main() -> list[int]:
        order: list[int] = []

        async def task(number: int) -> None:
            await trio.lowlevel.checkpoint()
            order.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(30):
                nursery.start_soon(task, number)
        return order

    def run(seed: int) -> list[int]:
        with deterministic_scheduling(seed):
            return trio.run(main)

    assert run(1) == run(1)
    assert len({tuple(run(seed)) for seed in range(8)}) > 1


def test_a_world_repeats_itself_in_other_processes() -> None:
    traces = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.getcwd()},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for hash_seed in ("1", "2", "3")
    }
    assert len(traces) == 1
    assert len(traces.pop().strip()) == 64
