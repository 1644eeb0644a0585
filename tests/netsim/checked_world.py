"""A world of a few nodes that learn a quadratic, all checkers attached: what tests of the checkers let run."""

import random
from collections.abc import Awaitable, Callable
from functools import partial

import msgspec
import trio

from netsim.checkers import Checker, Report, build, task_census
from netsim.determinism import SimClock, deterministic_scheduling
from netsim.disk import SimDisk
from netsim.network import LinkModel, open_sim_network
from netsim.quadratic import Quadratic, QuadraticProblem
from netsim.results import Failure
from netsim.world import Machine, World
from p2p.limits import DEFAULT_LIMITS
from training.run_spec import RunSpec, parse_run_spec, run_id

SPEC = parse_run_spec("""
name = "checked"
[train]
steps = 6000
[exchange]
every_steps = 50
fragments = 2
[schedule]
preset = "custom"
phases = [{ until = 1.0, merges = 10 }]
[merge]
wait_s_max = 10
period_s = 15
""")
"""A step takes a tenth of a second: a merge a minute, for ten minutes."""
STEP_S = 0.1
SAMPLE_S = 2.0

Script = Callable[[World], Awaitable[None]]


def with_merge(spec: RunSpec, **changes: object) -> RunSpec:
    """``spec`` with other merges."""
    return msgspec.structs.replace(spec, merge=msgspec.structs.replace(spec.merge, **changes))


def simulate(
    script: Script, *, machines: int = 4, seed: int = 1, spec: RunSpec = SPEC, checked: bool = True
) -> list[Failure]:
    """What the checkers find while ``script`` runs in a world whose machines are all off at first."""
    failures: list[Failure] = []

    def report(checker: str, what: str, machine: int | None) -> None:
        failures.append(Failure(checker=checker, what=what, at_s=trio.current_time(), machine=machine))

    with deterministic_scheduling(seed):
        trio.run(partial(_simulate, script, machines, seed, spec, report, checked), clock=SimClock())
    return failures


def caught(failures: list[Failure]) -> set[str]:
    """Which checkers found something."""
    return {failure.checker for failure in failures}


async def _simulate(
    script: Script, machines: int, seed: int, spec: RunSpec, report: Report, checked: bool
) -> None:
    problem = QuadraticProblem()

    def learner(machine: Machine) -> Quadratic:
        part = machine.number % machines + 1, machines
        return Quadratic(spec, problem, run=run_id(spec), peer=machine.peer, part=part)

    with task_census(report):
        async with (
            open_sim_network(random.Random(seed), link=LinkModel(), limits=DEFAULT_LIMITS) as network,
            trio.open_nursery() as nursery,
        ):
            world = World(
                network,
                nursery,
                spec=spec,
                seed=seed,
                learners=learner,
                failed=lambda machine, error: report("crash", repr(error), machine.number),
            )
            for number in range(machines):
                machine = world.add_machine(disk=SimDisk(rng=random.Random(f"{seed}/{number}")))
                machine.costs = type(machine.costs)(step_s=STEP_S)
            checkers = build(world, report) if checked else []
            world.observers.extend(checkers)
            nursery.start_soon(_sample, checkers)
            await script(world)
            for checker in checkers:
                checker.finished(trio.current_time())
            nursery.cancel_scope.cancel()


async def _sample(checkers: list[Checker]) -> None:
    while True:
        await trio.sleep(SAMPLE_S)
        for checker in checkers:
            checker.sample(trio.current_time())
