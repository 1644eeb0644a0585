"""A whole swarm goes dark in the middle of a merge: what was accepted can still be had, and the merge is decided."""

import pytest
import trio

from netsim.world import World
from tests.netsim.checked_world import simulate


@pytest.mark.parametrize("seed", range(3))
def test_a_swarm_that_goes_dark_between_acceptance_and_commit_goes_on(seed: int) -> None:
    """What a power cut leaves of a shard that was not synced differs from seed to seed."""

    async def script(world: World) -> None:
        world.calm_since_s = None
        nodes = await world.start_all()
        for node in nodes:
            node.merger._conclude = lambda *_: trio.sleep_forever()  # type: ignore[method-assign]
        with trio.fail_after(80):
            while any(node.merger._member._state.accepted is None for node in nodes):
                await trio.sleep(0.01)
        assert all(node.merger.head_height == 0 for node in nodes)
        for machine in world.machines:
            world.power_cut(machine.number)
            world.switch_on(machine.number)
        await trio.sleep(60)
        heads = {machine.node.merger.head for machine in world.machines if machine.node is not None}
        assert len(heads) == 1
        assert min(machine.node.merger.head_height for machine in world.machines if machine.node) >= 1

    assert simulate(script, seed=seed) == []
