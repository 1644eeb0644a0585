"""The processes of a machine: one at a time, whenever it is ended and asked for again; and deaths at counted places."""

from collections.abc import Callable

import pytest
import trio

from netsim.injection import StepCounter, at_operation
from netsim.world import RESTART_S, World
from tests.netsim.checked_world import simulate

ENDS: dict[str, Callable[[World, int], None]] = {
    "kill": World.kill,
    "power-cut": World.power_cut,
    "interrupt": World.interrupt,
    "stop": World.stop,
}


class Log:
    """Observes a world."""

    def __init__(self, world: World) -> None:
        self.lines: list[tuple[str, int]] = []
        world.observers.append(self)

    def started(self, machine: object) -> None:
        self.lines.append(("started", machine.number))  # type: ignore[attr-defined]

    def stopped(self, machine: object, how: str) -> None:
        self.lines.append((how, machine.number))  # type: ignore[attr-defined]


def play(script: Callable[[World], object], *, machines: int = 2) -> None:
    """Run ``script`` in a world whose machines are off; nothing may fail, and nothing be left of it."""
    assert simulate(script, machines=machines, checked=False) == []  # type: ignore[arg-type]


@pytest.mark.parametrize("end", ENDS)
def test_a_machine_asked_for_in_the_moment_it_ends_has_one_more_life(end: str) -> None:
    async def script(world: World) -> None:
        log = Log(world)
        await world.start(0)
        await trio.sleep(3)
        ENDS[end](world, 0)
        world.switch_on(0)
        await trio.sleep(4 * RESTART_S)
        assert [what for what, _ in log.lines if what == "started"] == ["started"] * 2
        assert len(world.machines[0].starts_s) == 2
        assert world.machines[0].node is not None

    play(script)


def test_only_the_last_word_counts() -> None:
    async def script(world: World) -> None:
        await world.start(0)
        for _ in range(3):
            world.kill(0)
            started = world.switch_on(0)
        await started.wait()
        world.kill(0)
        world.switch_on(0)
        world.kill(0)
        await trio.sleep(3 * RESTART_S)
        assert world.machines[0].node is None
        assert len(world.machines[0].starts_s) == 2

    play(script)


@pytest.mark.parametrize("end", ENDS)
def test_a_process_can_end_before_its_node_is_there(end: str) -> None:
    async def script(world: World) -> None:
        log = Log(world)
        machine = world.machines[0]
        machine.disk.operation_s = 1.0
        started = world.switch_on(0)
        await trio.sleep(0.5)
        ENDS[end](world, 0)
        await trio.sleep(10)
        assert not started.is_set()
        assert log.lines == []
        assert machine.process is None
        machine.disk.operation_s = 0.0
        await world.start(0)

    play(script)


def test_who_leaves_before_its_node_is_there_is_gone_at_once() -> None:
    async def script(world: World) -> None:
        world.machines[0].disk.operation_s = 1.0
        world.switch_on(0)
        await trio.sleep(0.5)
        await world.leave(0)
        assert trio.current_time() == 0.5

    play(script)


def test_a_process_that_cannot_begin_is_tried_again_until_it_can() -> None:
    async def script(world: World) -> None:
        disk = world.machines[0].disk
        whole, disk.capacity_bytes = disk.capacity_bytes, 0
        started = world.switch_on(0)
        await trio.sleep(2.5 * RESTART_S)
        assert not started.is_set()
        disk.capacity_bytes = whole
        await started.wait()
        assert trio.current_time() == 3 * RESTART_S

    play(script)


@pytest.mark.parametrize("end", ENDS)
def test_a_machine_can_be_switched_off_between_two_attempts(end: str) -> None:
    async def script(world: World) -> None:
        disk = world.machines[0].disk
        whole, disk.capacity_bytes = disk.capacity_bytes, 0
        world.switch_on(0)
        await trio.sleep(1)
        ENDS[end](world, 0)
        await world.machines[0].ended.wait()
        assert trio.current_time() == 1
        disk.capacity_bytes = whole
        await world.start(0)
        assert trio.current_time() == 1

    play(script)


def test_each_end_is_told_once_and_how_it_was() -> None:
    async def script(world: World) -> None:
        log = Log(world)
        for end in ENDS.values():
            await world.start(0)
            await trio.sleep(1)
            end(world, 0)
            await world.machines[0].ended.wait()
        world.kill(0)
        assert log.lines[1::2] == [("killed", 0), ("power-cut", 0), ("interrupted", 0), ("left", 0)]
        assert len(log.lines) == 8

    play(script)


def test_an_interrupted_process_says_that_it_closes_and_writes_nothing() -> None:
    async def script(world: World) -> None:
        await world.start(0)
        other = await world.start(1, bootstrap=0)
        await trio.sleep(3)
        disk, peer = world.machines[0].disk, world.machines[0].peer
        at = disk.operations
        assert peer in other.runtime.transport.peers()
        world.interrupt(0)
        await trio.sleep(0.1)
        assert peer not in other.runtime.transport.peers()
        assert disk.operations == at

    play(script)


# --- counted places ---------------------------------------------------------------------------------------------


def test_steps_are_counted_of_one_machine_only_in_all_its_lives() -> None:
    async def script(world: World) -> None:
        acted: list[int] = []
        counters = [
            StepCounter(machine, at=50, action=lambda number=machine.number: acted.append(number))
            for machine in world.machines
        ]
        for counter in counters:
            trio.lowlevel.add_instrument(counter)
        await world.start(0)
        await trio.sleep(5)
        first, second = counters
        assert (second.steps, second.living, second.acted) == (0, set(), False)
        assert first.steps > 50
        assert acted == [0]
        assert len(first.living) > 10
        world.kill(0)
        await trio.sleep(1)
        assert first.living == set()
        before = first.steps
        await world.start(0)
        await world.start(1)
        await trio.sleep(5)
        assert first.steps > before
        assert second.steps > 50
        assert acted == [0, 1], "each once"

    play(script)


def test_the_action_comes_before_the_very_step() -> None:
    async def script(world: World) -> None:
        seen: list[int] = []
        counter = StepCounter(world.machines[0], at=0, action=lambda: seen.append(counter.steps))
        trio.lowlevel.add_instrument(counter)
        world.switch_on(0)
        assert counter.steps == 0
        await trio.sleep(1)
        assert seen == [1]
        assert counter.acted

    play(script)


def test_an_action_at_an_operation_comes_once_before_or_after_its_effect() -> None:
    async def script(world: World) -> None:
        disk = world.machines[0].disk
        seen: list[tuple[str, int, bool]] = []

        def look(moment: str) -> None:
            seen.append((moment, disk.operations, bool(disk.files_in(""))))

        at_operation(disk, 2, "before", lambda: look("before"))
        await disk.list("")
        await disk.write_atomic("first", b"1")
        at_operation(disk, 3, "after", lambda: look("after"))
        await disk.write_atomic("second", b"2")
        await disk.write_atomic("third", b"3")
        at_operation(disk, 1, "after", lambda: look("overdue"))
        await disk.list("")
        assert seen == [("before", 2, False), ("after", 3, True), ("overdue", 5, True)]

    play(script)
