"""Two runs from one seed are one run; and this fails loudly when trio changes what ``netsim.determinism`` relies on."""

import contextlib
import inspect
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import attrs
import pytest
import trio
import trio._core._run as scheduler
from trio.testing import MockClock

from netsim.determinism import FLAG, GENERATOR, SimClock, deterministic_scheduling, sim_clock

Changes = dict[str, object]

ROOT = Path(__file__).parents[2]
SEEDS = 20
SHORT: Changes = {
    "duration_s": 40,
    "nodes": 6,
    "merge_every_s": 13,
    "churn.per_hour": 60,
    "churn.away_s": [1, 15],
    "expect": [],
}
"""Less than a minute, in which half of the machines leave."""


# --- what trio keeps to itself ----------------------------------------------------------------------------------------


def test_trio_still_has_the_two_switches_of_its_scheduler() -> None:
    assert isinstance(getattr(scheduler, FLAG), bool)
    assert isinstance(getattr(scheduler, GENERATOR), random.Random)
    source = inspect.getsource(scheduler.unrolled_run)
    assert f"if {FLAG}:" in source
    assert "batch.sort(key=lambda t: t._counter)" in source
    assert f"{GENERATOR}.shuffle(batch)" in source


def test_trio_still_jumps_as_the_clock_expects() -> None:
    """Otherwise a simulation would sleep for real: a day at a time, so this is read and not tried."""
    assert "clock_autojump_threshold" in {field.name for field in attrs.fields(scheduler.Runner)}
    source = inspect.getsource(scheduler.unrolled_run)
    assert "elif runner.clock_autojump_threshold < timeout:" in source
    assert "assert isinstance(runner.clock, _core.MockClock)\n" in source
    assert "runner.clock._autojump()\n" in source
    assert "_autojump" in vars(MockClock)


def test_trio_still_has_the_next_deadline() -> None:
    seen: list[float] = []

    async def main() -> None:
        deadlines = scheduler.GLOBAL_RUN_CONTEXT.runner.deadlines
        seen.append(deadlines.next_deadline())
        with trio.move_on_at(7.0):
            seen.append(deadlines.next_deadline())
            with trio.move_on_at(5.0):
                seen.append(deadlines.next_deadline())

    assert scheduler.Deadlines().next_deadline() == math.inf
    trio.run(main, clock=SimClock())
    assert seen == [math.inf, 7.0, 5.0]


def test_trios_own_clock_cannot_be_built_upon() -> None:
    """Why a SimClock says that it is a MockClock. Once this fails it can be one."""
    with pytest.raises(TypeError):
        type("Clock", (MockClock,), {})
    clock = SimClock()
    assert isinstance(clock, MockClock)
    assert type(clock) is SimClock
    with pytest.raises(TypeError):
        clock.__class__ = MockClock


# --- order ------------------------------------------------------------------------------------------------------------


def test_the_switches_are_put_back() -> None:
    before = getattr(scheduler, FLAG), getattr(scheduler, GENERATOR)
    with contextlib.suppress(ZeroDivisionError), deterministic_scheduling(1):
        assert getattr(scheduler, FLAG) is True
        assert getattr(scheduler, GENERATOR) is not before[1]
        raise ZeroDivisionError
    assert (getattr(scheduler, FLAG), getattr(scheduler, GENERATOR)) == before


def order_of_waking(seed: int, *, litter: int = 0) -> list[int]:
    """In which order thirty tasks run that become runnable at one moment; ``litter`` moves objects in memory."""
    order: list[int] = []
    scattered: list[object] = []

    async def task(number: int, event: trio.Event) -> None:
        scattered.append([bytearray(37 * litter * number % 501) for _ in range(number * litter % 7)])
        await event.wait()
        order.append(number)
        with trio.move_on_at(10.0):
            await trio.sleep_forever()
        order.append(number)

    async def main() -> None:
        event = trio.Event()
        async with trio.open_nursery() as nursery:
            for number in range(30):
                nursery.start_soon(task, number, event)
            await trio.sleep(1.0)
            event.set()

    with deterministic_scheduling(seed):
        trio.run(main, clock=SimClock())
    assert len(order) == 60
    return order


def test_only_the_seed_decides_in_which_order_tasks_run() -> None:
    assert order_of_waking(1) == order_of_waking(1, litter=1) == order_of_waking(1, litter=5)
    assert len({tuple(order_of_waking(seed)) for seed in range(8)}) == 8


# --- the clock --------------------------------------------------------------------------------------------------------


def test_actions_happen_in_the_order_asked_for_and_before_deadlines_of_the_same_time() -> None:
    happened: list[tuple[str, float]] = []

    async def main() -> None:
        clock = sim_clock()

        def action(name: str) -> None:
            happened.append((name, trio.current_time()))

        def ask_again() -> None:
            clock.at(clock.current_time(), action, "asked for within")

        clock.at(5.0, action, "second")
        clock.at(2.0, action, "first")
        clock.at(5.0, ask_again)
        clock.at(5.0, action, "third")
        clock.at(9.0, action, "after the end")
        clock.at(-1.0, action, "overdue")
        await trio.sleep_until(5.0)
        action("woken")

    trio.run(main, clock=SimClock())
    assert happened == [
        ("overdue", 0.0),
        ("first", 2.0),
        ("second", 5.0),
        ("third", 5.0),
        ("asked for within", 5.0),
        ("woken", 5.0),
    ]


def test_an_action_may_wake_a_task_that_nothing_else_would() -> None:
    async def main() -> float:
        event = trio.Event()
        sim_clock().at(1e8, event.set)
        await event.wait()
        return trio.current_time()

    assert trio.run(main, clock=SimClock()) == 1e8


def test_there_is_no_simulated_clock_in_life() -> None:
    async def main() -> None:
        sim_clock()

    with pytest.raises(RuntimeError, match="SimClock"):
        trio.run(main)


# --- whole runs -------------------------------------------------------------------------------------------------------

PROGRAM = """
import hashlib, json, sys
from netsim.registry import load_scenario, with_changes
from netsim.runner import run_seed

scenario, changes, seeds = json.loads(sys.argv[1])
scenario = with_changes(load_scenario(scenario), changes)
for seed in seeds:
    lines = []
    result = run_seed(scenario, seed, emit=lines.append)
    told = hashlib.sha256(repr(lines[:-1]).encode()).hexdigest()
    summary = {k: v for k, v in result.summary.items() if k not in ("deliveries_per_s", "speedup")}
    print(json.dumps([seed, result.verdict, result.deliveries, result.trace, told, repr(summary)]))
"""


def told_twice(scenario: str, changes: Changes, seeds: Sequence[int]) -> list[list[list[object]]]:
    """What two processes with other hash seeds, taking the seeds in opposite orders, say of each but its time."""
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", PROGRAM, json.dumps([scenario, changes, order])],
                    env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)},
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for hash_seed, order in (("1", list(seeds)), ("2", list(reversed(seeds))))
        ]
        for process in running:
            stack.callback(process.kill)
        told = [sorted(map(json.loads, process.communicate()[0].splitlines())) for process in running]
        assert [process.returncode for process in running] == [0, 0]
    return told


@pytest.mark.timeout(300)
def test_a_seed_of_churn_is_one_history_in_every_process() -> None:
    first, second = told_twice("churn", SHORT, range(SEEDS))
    assert [line[1] for line in first] == ["passed"] * SEEDS
    assert len({line[3] for line in first}) == SEEDS
    assert first == second


@pytest.mark.slow
def test_so_is_a_longer_one() -> None:
    first, second = told_twice("churn", {"duration_s": 180, "churn.per_hour": 10}, [20])
    assert len(first) == 1
    assert first == second


@pytest.mark.parametrize("scenario", ["swarm-test", "crash-anywhere"])
def test_so_is_one_with_faults_of_all_kinds(scenario: str) -> None:
    changes: Changes = {"duration_s": 150, "liveness.last_s": 60, "nodes": 5, "merge_every_s": 30}
    if scenario == "swarm-test":
        changes |= {"random_faults.on": 1.0, "random_faults.per_hour": 60, "random_faults.for_s": [1, 20]}
    first, second = told_twice(scenario, changes, range(3))
    assert len(first) == 3
    assert first == second


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_a_whole_hour_of_churn_is_one_history() -> None:
    first, second = told_twice("churn", {}, range(SEEDS))
    assert [line[1] for line in first] == ["passed"] * SEEDS
    assert first == second
