"""A node that is to be replaced by a newer version of itself stops at a moment at which nothing is lost."""

import trio

from netsim.world import World
from node.gossip_node import GossipNode
from tests.netsim.checked_world import simulate


async def contributing(world: World, number: int) -> GossipNode:
    """The node of a machine, as soon as a merge that it contributed to is under way."""
    node = world.machines[number].node
    assert isinstance(node, GossipNode)
    with trio.fail_after(120):
        while not node.merger.under_way:
            await trio.sleep(0.001)
    return node


async def returned(world: World, number: int) -> GossipNode:
    """The node of a machine that left, started again, once it holds the last merge again."""
    await world.start(number)
    node = world.machines[number].node
    assert isinstance(node, GossipNode)
    with trio.fail_after(60):
        while node.merges.last is None:
            await trio.sleep(0.1)
    return node


def test_who_hands_over_in_a_merge_goes_on_where_it_was() -> None:
    async def script(world: World) -> None:
        await world.start_all()
        node = await contributing(world, 1)
        height = node.merger.head_height
        with trio.fail_after(30):
            await node.wait_settled()
        assert node.merger.head_height == height + 1
        await world.leave(1)
        again = await returned(world, 1)
        assert again.merger.head_height == height + 1
        assert again.merge_host.tokens_at_anchor == node.merge_host.tokens_at_anchor
        assert again.merges.last == node.merges.last

    assert simulate(script) == []


def test_who_just_stops_in_a_merge_takes_the_average_for_its_weights() -> None:
    """What waiting is for: without it, what was learned since the contribution is gone."""

    async def script(world: World) -> None:
        await world.start_all()
        node = await contributing(world, 1)
        merged = node.merger.head_height + 1
        await world.leave(1)
        assert node.merger.head_height < merged
        await trio.sleep(10)
        again = await returned(world, 1)
        with trio.fail_after(60):
            while again.merges.last is None or again.merges.last.height < merged:
                await trio.sleep(0.1)
        assert again.merge_host.tokens_at_anchor > node.trainer.tokens

    assert simulate(script) == []


def test_a_swarm_that_merges_no_more_keeps_nobody_waiting() -> None:
    async def script(world: World) -> None:
        node = (await world.start_all())[0]
        await trio.sleep(5)
        began_s = trio.current_time()
        await node.wait_settled()
        assert trio.current_time() == began_s

    assert simulate(script) == []
