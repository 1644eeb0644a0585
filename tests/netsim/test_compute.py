"""The simulated processor: time passes as it is charged, one call at a time in each lane, and stalls hold it up."""

import pytest
import trio

from netsim.compute import SimCompute
from netsim.determinism import SimClock, deterministic_scheduling
from node.compute import Compute, Lane


class Machine:
    """A compute and the order and times in which its calls were made."""

    def __init__(self, slowness: float = 1.0) -> None:
        self.compute: Compute = SimCompute(slowness=slowness)
        self.made: list[tuple[str, float]] = []

    async def work(self, name: str, lane: Lane = "train", cost_s: float = 1.0) -> None:
        await self.compute.run(
            lambda: self.made.append((name, trio.current_time())), lane=lane, cost_s=cost_s
        )


async def test_a_call_is_made_when_its_cost_has_passed_and_its_result_returned(
    autojump_clock: SimClock,
) -> None:
    compute = SimCompute(slowness=10.0)
    assert await compute.run(trio.current_time, lane="train", cost_s=0.5) == 5.0
    compute.slowness = 1.0
    assert await compute.run(trio.current_time, lane="side", cost_s=0.5) == 5.5


async def test_what_a_call_raises_is_the_callers_and_frees_the_lane(autojump_clock: SimClock) -> None:
    compute = SimCompute()
    with pytest.raises(ZeroDivisionError):
        await compute.run(lambda: 1 // 0, lane="train", cost_s=1.0)
    assert await compute.run(trio.current_time, lane="train", cost_s=1.0) == 2.0


@pytest.mark.parametrize("cost_s", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_a_lane_is_first_come_first_served_and_lanes_do_not_wait_for_each_other(
    seed: int, cost_s: float
) -> None:
    async def main() -> Machine:
        machine = Machine()
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(machine.work, f"train-{number}", "train", cost_s)
                nursery.start_soon(machine.work, f"side-{number}", "side", 2 * cost_s)
                await trio.testing.wait_all_tasks_blocked() if cost_s else await trio.lowlevel.checkpoint()
        return machine

    with deterministic_scheduling(seed):
        made = trio.run(main, clock=SimClock()).made
    for lane, step_s in (("train", cost_s), ("side", 2 * cost_s)):
        assert [entry for entry in made if entry[0].startswith(lane)] == [
            (f"{lane}-{number}", pytest.approx((number + 1) * step_s)) for number in range(4)
        ]


async def test_who_is_cancelled_while_waiting_or_working_makes_no_call_and_holds_nobody_up(
    autojump_clock: SimClock,
) -> None:
    machine = Machine()

    async def cancelled(name: str) -> None:
        with trio.move_on_after(0.5):
            await machine.work(name)

    async with trio.open_nursery() as nursery:
        for name in ("working", "waiting"):
            nursery.start_soon(cancelled, name)
        await trio.sleep(0.1)
        nursery.start_soon(machine.work, "next")
    assert machine.made == [("next", pytest.approx(1.5))]


async def test_a_stall_stops_both_lanes_and_makes_work_under_way_late(autojump_clock: SimClock) -> None:
    machine = Machine()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(machine.work, "under way", "train", 2.0)
        await trio.sleep(1.0)
        machine.compute.stall(10.0)
        await trio.sleep(4.0)
        nursery.start_soon(machine.work, "asked meanwhile", "side", 1.0)
        await trio.sleep(1.0)
        machine.compute.stall(3.0)  # over before the other
        machine.compute.stall(7.0)  # two seconds more than it
    assert dict(machine.made) == pytest.approx({"under way": 14.0, "asked meanwhile": 14.0})
    await machine.work("afterwards")
    assert machine.made[-1] == ("afterwards", pytest.approx(15.0))
