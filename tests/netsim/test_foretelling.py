"""What a merge would come to is measured on everybody's weights, and changes nobody's."""

import msgspec
import pytest
import torch
import trio

from netsim.world import World
from node.gossip_node import GossipNode
from p2p.errors import GossamerError
from tests.netsim.checked_world import SPEC, Script, simulate
from training.spec_sections import ScheduleSpec

ALONE = msgspec.structs.replace(SPEC, schedule=ScheduleSpec(preset="final-only"))
"""Nobody exchanges anything."""


def played(script: Script, *, machines: int = 4) -> None:
    assert simulate(script, spec=ALONE, machines=machines) == []


async def settled(world: World) -> list[GossipNode]:
    """Everybody has learned for a while, by itself."""
    nodes = [node for node in await world.start_all() if isinstance(node, GossipNode)]
    await trio.sleep(20)
    return nodes


def test_it_is_the_loss_of_the_average_and_the_mean_of_the_losses() -> None:
    async def script(world: World) -> None:
        nodes = await settled(world)
        told = await nodes[1].foretell(1 << 16)
        assert set(told.losses) == {str(node.local) for node in nodes}
        models = [node.trainer.read() for node in nodes]
        # They have gone on since by a step or two of several hundred.
        own = [node.trainer.evaluate() for node in nodes]
        merged = nodes[0].trainer.evaluate(torch.stack(models).mean(0))
        assert told.local == pytest.approx(sum(own) / len(own), rel=0.1)
        assert told.merged == pytest.approx(merged, rel=0.1)
        assert told.merged < told.local
        assert all(node.merge_host.anchor is None and node.merger.head_height == 0 for node in nodes)
        assert all(node.exchanger.mixes == 0 for node in nodes)

    played(script)


def test_alone_there_is_nothing_to_foretell() -> None:
    async def script(world: World) -> None:
        (node,) = await settled(world)
        with pytest.raises(GossamerError, match="nobody"):
            await node.foretell(1 << 16)

    played(script, machines=1)


def test_what_cannot_be_used_is_left_out() -> None:
    async def script(world: World) -> None:
        nodes = await settled(world)
        read = nodes[2].trainer.read
        nodes[2].trainer.read = lambda fragment=None: read(fragment) * 1e6  # type: ignore[method-assign]
        told = await nodes[0].foretell(1 << 16)
        nodes[2].trainer.read = read  # type: ignore[method-assign]
        assert set(told.losses) == {str(nodes[n].local) for n in (0, 1, 3)}
        assert nodes[0].ledger.refusals["norm"] == 1

    assert {failure.checker for failure in simulate(script, spec=ALONE)} <= {"honest-not-banned"}
