"""Watching a real node: a killed peer shows in its metrics and in ``gossamer top``, and strangers do no harm."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio

from cli.node_process import NodeProcess, free_ports
from cli.top_view import Moment
from node.metrics_server import CLIENTS_MAX
from node.status import NodeStatus
from tests.process.swarm import small_swarm, until
from tests.scraping import scrape

SHOWN_S_MAX = 10.0
STEPS, MERGES = 16_000, 64
"""More steps than anybody gets to take."""
PAUSE_S_MAX = 5.0


def acquainted(statuses: list[NodeStatus]) -> bool:
    """Whether everybody sees everybody alive and has mixed with somebody."""
    return all(
        [peer.state for peer in status.peers] == ["alive"] * (len(statuses) - 1) and status.mixes > 0
        for status in statuses
    )


@asynccontextmanager
async def top_of(node: NodeProcess) -> AsyncIterator[AsyncIterator[Moment]]:
    """What ``gossamer top --json`` prints about ``node``, as it comes."""
    command = [sys.executable, "-P", "-m", "cli", "top", "--json", "--home", str(node.home.data_folder)]
    process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE)

    async def moments() -> AsyncIterator[Moment]:
        received = b""
        async for chunk in process.stdout:
            *lines, received = (received + chunk).split(b"\n")
            for line in lines:
                yield msgspec.json.decode(line, type=Moment)

    try:
        yield moments()
    finally:
        process.kill()
        await process.wait()


async def hold_open(port: int, byte_every_s: float) -> None:
    """Ask for the metrics for ever, a byte at a time, and again as soon as that is cut off."""
    while True:
        try:
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                while True:
                    await stream.send_all(b"G")
                    await trio.sleep(byte_every_s)
        except OSError:
            await trio.sleep(byte_every_s)
        except trio.BrokenResourceError:
            continue


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_a_killed_peer_shows_within_ten_seconds(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    settings = f'[metrics]\nlisten = "127.0.0.1:{port}"\n'
    async with small_swarm(tmp_path, nodes=3, steps=STEPS, merges=MERGES, first_settings=settings) as swarm:
        watched, dead = swarm[0], swarm[2]
        before = (await until(swarm, acquainted, seconds=90))[0]
        told = await scrape(port)
        assert told["gossamer_members alive"] == told["gossamer_connections"] == 2
        assert told["gossamer_step"] >= before.step
        assert told["gossamer_received_bytes_total"] >= before.bytes_received > 0
        assert told["gossamer_mixes_total"] >= before.mixes
        assert told["process_open_fds"] < told["process_max_fds"]

        async with top_of(watched) as moments, trio.open_nursery() as nursery:
            # Twice as many as the endpoint has room for, all of them slow, until the end of the test.
            for _ in range(2 * CLIENTS_MAX):
                nursery.start_soon(hold_open, port, 0.2)
            assert (await anext(moments)).members["alive"] == 2

            dead.kill()
            with trio.fail_after(SHOWN_S_MAX):
                async for moment in moments:
                    if moment.members["alive"] == 1:
                        break
                while (told := await scrape(port))["gossamer_members alive"] == 2:
                    await trio.sleep(0.2)
            (victim,) = [peer for peer in moment.status.peers if peer.state != "alive"]
            assert (victim.state, victim.connected) == ("suspect", False)
            assert told["gossamer_members suspect"] == 1

            # The strangers at the endpoint hold up nobody's training.
            await until([watched], lambda s: s[0].step > moment.status.step, seconds=PAUSE_S_MAX)
            nursery.cancel_scope.cancel()
