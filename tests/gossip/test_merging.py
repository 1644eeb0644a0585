from __future__ import annotations
import pytest, trio
from tests.gossip.merge_world import open_world


@pytest.mark.parametrize("count", range(1, 8))
async def test_everybody_ends_with_the_sum_of_everybody(count, autojump_clock):
    async with open_world(count) as world:
        world.due(1)
        took_s = await world.committed(1, within_s=5)
        print(
            count, took_s, [(m.merger.statistics().attempts, m.merger.problem, m.offences) for m in world.up]
        )
        world.check_agreement()
