"""A node that says goodbye does not take it back, however long its last checkpoint takes."""

import trio

from gossip.messages import Heartbeat, Message
from netsim.world import World
from p2p.transport import PeerId
from tests.netsim.checked_world import simulate


def test_a_goodbye_stands_while_the_last_checkpoint_is_written() -> None:
    heard: list[bool] = []

    async def script(world: World) -> None:
        observer, leaver = (await world.start_all())[:2]

        def heed(author: PeerId, kind: str, body: Message | None) -> None:
            if author == leaver.local and isinstance(body, Heartbeat):
                heard.append(body.leaving)

        observer.notices.on_change(heed)
        await trio.sleep(20)
        world.machines[1].disk.operation_s = 2.0
        await world.leave(1)
        await trio.sleep(5)
        assert observer.members.state(leaver.local, trio.current_time()) == "left"

    assert simulate(script) == []
    assert heard == sorted(heard)
    assert heard[-1]
