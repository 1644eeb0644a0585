"""kill -9 of real node processes: the rest go on, and who was killed comes back as itself."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import trio

from node.status import NodeStatus
from tests.process.swarm import merged_alike, small_swarm, until

PAUSE_S_MAX = 5.0
STEPS, MERGES = 16_000, 160
"""More steps than anybody gets to take: whenever the kill comes, it is in the middle of the run."""


class Pauses:
    """How long ``peers`` have been seen to take no inner step, at the longest."""

    def __init__(self, peers: Sequence[str]) -> None:
        self.longest_s = 0.0
        self._moved = dict.fromkeys(peers, (-1, 0.0))

    def watching(self, condition: Callable[[list[NodeStatus]], bool]) -> Callable[[list[NodeStatus]], bool]:
        """``condition``, which from now on also notes the steps of whatever it is asked about."""

        def look(statuses: list[NodeStatus]) -> bool:
            for status in statuses:
                self._note(status.peer, status.step)
            return condition(statuses)

        return look

    def _note(self, peer: str, step: int) -> None:
        if peer in self._moved:
            before, moved_s = self._moved[peer]
            if step == before:
                self.longest_s = max(self.longest_s, trio.current_time() - moved_s)
            else:
                self._moved[peer] = step, trio.current_time()


def merged(statuses: list[NodeStatus], *, contributors: int, height: int) -> bool:
    """Whether all report one merge of at least ``height``, to which so many contributed."""
    return merged_alike(statuses, height) and len(statuses[0].last_merge.contributors) == contributors


@pytest.mark.process
@pytest.mark.timeout(240)
@pytest.mark.parametrize("victim", [0, pytest.param(2, marks=pytest.mark.slow)])
async def test_a_killed_node_costs_no_pause_and_returns_to_the_next_merge(
    tmp_path: Path, victim: int
) -> None:
    async with small_swarm(tmp_path, nodes=4, steps=STEPS, merges=MERGES) as swarm:
        dead, rest = swarm[victim], [node for number, node in enumerate(swarm) if number != victim]
        # Whoever adopts a merge writes a checkpoint: here that comes before the one that is due by the clock.
        all_four = await until(
            swarm,
            lambda s: (
                merged(s, contributors=4, height=1) and s[victim].checkpoint_step > 0 and s[victim].mixes > 0
            ),
            seconds=90,
        )
        before = all_four[victim]
        dead.kill()

        pauses = Pauses([status.peer for status in all_four if status is not before])
        height = before.last_merge.height + 1
        three = await until(
            rest, pauses.watching(lambda s: merged(s, contributors=3, height=height)), seconds=60
        )
        assert before.peer not in three[0].last_merge.contributors

        dead.start([three[0].addresses[0]])
        (back,) = await until([dead], lambda s: s[0].phase != "starting", seconds=60)
        assert back.peer == before.peer
        assert back.step >= before.checkpoint_step

        height = three[0].last_merge.height + 1
        last = await until(
            swarm, pauses.watching(lambda s: merged(s, contributors=4, height=height)), seconds=90
        )
        assert before.peer in last[0].last_merge.contributors
        assert pauses.longest_s < PAUSE_S_MAX
        assert all(status.refusals.get("hash", 0) == 0 for status in last)
