"""What the process tests share: one command, a swarm of real nodes on loopback, and how to wait for what it does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from cli.node_process import NodeProcess, free_ports
from node.status import NodeStatus

SPEC = """
name = "process-test"
[model]
layers = 2
width = 64
heads = 4
context = 64
[data]
held_out_bytes = 16384
[train]
steps = {steps}
[exchange]
every_steps = 10
fragments = 2
[schedule]
preset = "custom"
phases = [{{ until = 1.0, merges = {merges} }}]
[merge]
wait_s_max = 10
"""


def gossamer(*arguments: str | Path, seconds_max: float = 60) -> subprocess.CompletedProcess[str]:
    """One command in a process of its own, to its end, which must come by itself."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GOSSAMER_")}
    return subprocess.run(
        [sys.executable, "-P", "-m", "cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
        timeout=seconds_max,
        check=False,
    )


@asynccontextmanager
async def small_swarm(
    folder: Path, *, nodes: int, steps: int, merges: int = 1, first_settings: str = ""
) -> AsyncIterator[list[NodeProcess]]:
    """``nodes`` processes on their way, the first one everybody's bootstrap; none outlives the block.

    ``first_settings``: what is in the first one's config.toml.
    """
    spec_file = folder / "run.toml"
    spec_file.write_text(SPEC.format(steps=steps, merges=merges))
    swarm = [
        NodeProcess(
            folder, f"n{number}", port=port, part=f"{number}/{nodes}", spec_file=spec_file, alone=False
        )
        for number, port in enumerate(free_ports(nodes), start=1)
    ]
    swarm[0].home.create()
    swarm[0].home.config_file.write_text(first_settings)
    try:
        for node in swarm:
            node.start([swarm[0].address] if node is not swarm[0] else [])
        await until(swarm, lambda statuses: True, seconds=60)
        yield swarm
    finally:
        for node in swarm:
            node.kill()


async def until(
    nodes: Sequence[NodeProcess], condition: Callable[[list[NodeStatus]], bool], *, seconds: float
) -> list[NodeStatus]:
    """The statuses of ``nodes`` as soon as all answer and ``condition`` holds; fails loudly after ``seconds``."""
    statuses: list[NodeStatus] = []
    with trio.move_on_after(seconds):
        while True:
            for node in nodes:
                assert node.up, f"{node.name} died: {node.last_words()}"
                await node.look()
            if all(node.state not in ("starting", "killed") for node in nodes):
                statuses = [node.status for node in nodes if node.status is not None]
                if condition(statuses):
                    return statuses
            await trio.sleep(0.25)
    words = "\n".join(f"{node.name} {node.state}: {node.status}\n{node.last_words()}" for node in nodes)
    raise AssertionError(f"not within {seconds} s:\n{words}")


def merged_alike(statuses: Sequence[NodeStatus], height: int) -> bool:
    """Whether all report one merge of at least ``height``, with equal weights."""
    reports = [status.last_merge for status in statuses]
    if any(report is None or report.height < height for report in reports):
        return False
    return len({(report.record, report.weights_hash) for report in reports if report is not None}) == 1
