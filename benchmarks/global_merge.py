"""The global merge of 10 M fp32 values among four node processes, whole and with one of them killed in the middle.

The nodes are ordinary daemons that have finished a run of one inner step, so the merge has the machine to itself. The
time is the daemon's own: from the moment a merge is wanted to the moment the last of the four has its live weights
on the new anchor. Every merge is of the same size; the first one, which also opens connections, is not counted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import trio

from benchmarks.harness import Figure
from cli.node_process import NodeProcess, free_ports
from node.control import ControlError, MergeNow
from node.status import NodeStatus

NODES = 4
HIVEMIND_S = 1.33
"""What averaging as much among four peers took with hivemind 1.1.12 on two such cores."""
SURVIVORS_S_MAX = 5.0
SETTLE_S = 4.0
"""Between merges: afterwards every node measures its anchor and writes a checkpoint of 120 MB."""
KILL_AFTER_S = 0.15
"""Into the merge: contributions are on their way, sums are not."""
SPEC = """
name = "merge-bench"
[model]
layers = 8
width = 320
heads = 4
context = 64
[data]
held_out_bytes = 4096
[train]
steps = 1
batch = 1
[exchange]
fragments = 8
[schedule]
preset = "final-only"
"""


async def measure(repeats: int = 5) -> list[Figure]:
    """Seconds per merge, and seconds from a kill to the survivors' commit."""
    with tempfile.TemporaryDirectory() as folder:
        swarm = _swarm(Path(folder))
        try:
            for node in swarm:
                node.start([swarm[0].address] if node is not swarm[0] else [])
            statuses = await _agreed(swarm, height=1)
            parameters = statuses[0].parameters
            whole_s = [await _merge(swarm) for _ in range(repeats + 1)]
            killed_s = [await _merge_with_a_death(swarm) for _ in range(repeats)]
        finally:
            for node in swarm:
                node.kill()
    size = f"{parameters / 1e6:.1f} M fp32 values, 4 processes"
    return [
        Figure(f"global merge of {size}", "s", tuple(whole_s[1:]), at_most=HIVEMIND_S),
        Figure(
            "  the same, one killed in the middle: kill to commit",
            "s",
            tuple(killed_s),
            at_most=SURVIVORS_S_MAX,
        ),
    ]


def _swarm(folder: Path) -> list[NodeProcess]:
    spec_file = folder / "run.toml"
    spec_file.write_text(SPEC)
    return [
        NodeProcess(
            folder, f"n{number}", port=port, part=f"{number}/{NODES}", spec_file=spec_file, alone=False
        )
        for number, port in enumerate(free_ports(NODES), start=1)
    ]


async def _merge(swarm: Sequence[NodeProcess]) -> float:
    """One merge started by hand; the slowest node's duration."""
    await trio.sleep(SETTLE_S)
    height = await _height(swarm)
    await swarm[0].ask("merge_now", MergeNow())
    statuses = await _agreed(swarm, height=height + 1)
    return max(status.last_merge.duration_s for status in statuses if status.last_merge is not None)


async def _merge_with_a_death(swarm: Sequence[NodeProcess]) -> float:
    """Seconds from the SIGKILL of the last node, in the middle of a merge, to the last survivor's commit."""
    survivors, victim = swarm[:-1], swarm[-1]
    await trio.sleep(SETTLE_S)
    height = await _height(swarm)
    killed_s = 0.0

    async def start_merge() -> None:
        # Whoever proposes, the merge may be decided in a second attempt: this one answer is not what is waited for.
        try:
            await swarm[0].ask("merge_now", MergeNow())
        except ControlError as error:
            print(error.what)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(start_merge)
        await trio.sleep(KILL_AFTER_S)
        victim.kill()
        killed_s = trio.current_time()
        await _agreed(survivors, height=height + 1, every_s=0.02)
        took_s = trio.current_time() - killed_s
    victim.start([node.address for node in survivors])
    await _agreed(swarm, height=height + 1)
    return took_s


async def _height(swarm: Sequence[NodeProcess]) -> int:
    statuses = await _agreed(swarm, height=1)
    assert statuses[0].last_merge is not None
    return statuses[0].last_merge.height


async def _agreed(swarm: Sequence[NodeProcess], *, height: int, every_s: float = 0.2) -> list[NodeStatus]:
    """The statuses once all report the same merge of at least ``height``, know each other, and are idle."""
    with trio.fail_after(120):
        while True:
            for node in swarm:
                await node.look()
            statuses = [node.status for node in swarm if node.status is not None]
            merges = [status.last_merge for status in statuses]
            records = {merge.record for merge in merges if merge is not None and merge.height >= height}
            alive = all(
                sum(peer.state == "alive" for peer in status.peers) >= len(swarm) - 1 for status in statuses
            )
            if len(statuses) == len(swarm) and None not in merges and len(records) == 1 and alive:
                return statuses
            await trio.sleep(every_s)
