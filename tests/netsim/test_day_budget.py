"""A node that has spent its data budget for today leaves in order, trains alone, and is back after midnight."""

from __future__ import annotations

import trio

from gossip.links import RESTING_WAIT_S
from netsim.world import World
from node.day_budget import DAY_S, BudgetKeeper
from node.describe import describe
from tests.netsim.checked_world import simulate
from tests.netsim.test_world import until

MIDNIGHT_S = 200.0
"""When the simulated day ends."""
BUDGET_BYTES = 25_000


def test_who_has_spent_its_budget_rests_until_midnight_and_trains_on() -> None:
    async def script(world: World) -> None:
        world.calm_since_s = None  # Who rests is not seen, as after a fault.
        nodes = await world.start_all()
        others, sparing = nodes[:2], nodes[2]
        keeper = BudgetKeeper(
            sparing,
            upload_bytes_max=BUDGET_BYTES,
            download_bytes_max=0,
            disk=world.machines[2].disk,
            path="day_traffic.json",
            wall_time_s=lambda: 20_000 * DAY_S - MIDNIGHT_S + trio.current_time(),
        )
        await keeper.load()
        async with trio.open_nursery() as nursery:
            await nursery.start(keeper.run)
            await until(lambda: bool(sparing.ledger.resting), seconds=MIDNIGHT_S / 2)
            await trio.sleep(2 * RESTING_WAIT_S)
            before, step, began_s = sparing.transport.traffic(), sparing.step, trio.current_time()
            assert BUDGET_BYTES <= before.bytes_sent < 1.5 * BUDGET_BYTES
            while trio.current_time() < MIDNIGHT_S - 12:
                await trio.sleep(10)
                assert sparing.links.neighbours == []
                for node in others:
                    assert node.members.state(sparing.local, trio.current_time()) == "left"
            rest_s = trio.current_time() - began_s
            traffic = sparing.transport.traffic()
            assert rest_s > 120
            # Whoever looks whether it is back is told no, and looks again ever more rarely.
            assert traffic.bytes_sent - before.bytes_sent < 1000
            assert traffic.bytes_received - before.bytes_received < 1000
            assert sparing.step - step > 9 * rest_s
            assert sparing.merger.head_height >= 1
            status = describe(sparing, device="cpu", parameters=1, unit="byte", name="sparing")
            assert status.problem == sparing.ledger.resting
            assert status.problem.startswith("today's data budget is spent: ")
            assert status.bytes_sent_today == traffic.bytes_sent

            await until(lambda: len(sparing.links.neighbours) == 2, seconds=30)
            assert trio.current_time() > MIDNIGHT_S
            await until(
                lambda: all(
                    node.members.state(sparing.local, trio.current_time()) == "alive" for node in others
                ),
                seconds=20,
            )
            assert keeper.budget.today.bytes_sent < BUDGET_BYTES / 2
            nursery.cancel_scope.cancel()
        # It finds the others' branch of the chain, and is in their next merge.
        await until(lambda: len({node.merger.head for node in nodes}) == 1, seconds=30)
        height = others[0].merger.head_height
        await until(lambda: all(node.merger.head_height > height for node in nodes), seconds=90)
        last = others[0].merger.head_record
        assert last is not None
        assert sparing.local in {entry.peer for entry in last.record.contributors}
        for node in others:
            assert node.ledger.refusals["resting"] > 0
            assert node.ledger.standing(sparing.local) > 98
            assert sparing.ledger.standing(node.local) > 98

    assert simulate(script, machines=3) == []
