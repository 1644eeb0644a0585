"""kill -9 of real node processes: the rest go on, and who was killed comes back as itself."""

from pathlib import Path

import pytest
import trio

from cli.node_process import NodeProcess
from tests.process.swarm import merged_alike, small_swarm, until

PAUSE_S_MAX = 10.0


async def longest_pause_s(nodes: list[NodeProcess], *, seconds: float) -> float:
    """The longest time any of ``nodes`` took no inner step while it still had some to take."""
    moved_s = {node.name: trio.current_time() for node in nodes}
    steps = {node.name: -1 for node in nodes}
    longest_s = 0.0
    with trio.move_on_after(seconds):
        while True:
            for node in nodes:
                await node.look()
                assert node.status is not None
                if node.status.step != steps[node.name] or node.status.step == node.status.steps_total:
                    steps[node.name], moved_s[node.name] = node.status.step, trio.current_time()
                longest_s = max(longest_s, trio.current_time() - moved_s[node.name])
            await trio.sleep(0.25)
    return longest_s


@pytest.mark.process
@pytest.mark.timeout(240)
@pytest.mark.parametrize("victim", [0, pytest.param(2, marks=pytest.mark.slow)])
async def test_a_killed_node_costs_no_pause_and_returns_to_the_next_merge(
    tmp_path: Path, victim: int
) -> None:
    async with small_swarm(tmp_path, nodes=4, steps=1600, points=(0.5, 1.0)) as swarm:
        dead, rest = swarm[victim], [node for number, node in enumerate(swarm) if number != victim]
        before = await until([dead], lambda s: s[0].checkpoint_step > 0 and s[0].mixes > 0, seconds=90)
        dead.kill()

        assert await longest_pause_s(rest, seconds=8.0) < PAUSE_S_MAX
        first = await until(rest, lambda s: merged_alike(s, height=1), seconds=90)
        assert first[0].last_merge is not None
        assert before[0].peer not in first[0].last_merge.contributors
        assert len(first[0].last_merge.contributors) == 3

        others = [node.status.addresses[0] for node in rest if node.status is not None]
        dead.start(others[:1])
        back = await until([dead], lambda s: s[0].phase != "starting", seconds=60)
        assert back[0].peer == before[0].peer
        assert back[0].step >= before[0].checkpoint_step

        last = await until(swarm, lambda s: merged_alike(s, height=2), seconds=120)
        assert last[0].last_merge is not None
        assert len(last[0].last_merge.contributors) == 4
        assert all(status.refusals.get("hash", 0) == 0 for status in last)
