"""One seed of a scenario, from nothing to its result: builds the world, lets it run, looks at it, and judges.

Owns the order of a simulation: the safety phase in which anything may go wrong, the liveness phase in which a healthy
core must agree, and the end. A run stops at its first failure, because what follows from it explains nothing. Nothing
outside of the run is touched; equal scenarios and seeds give equal traces in every process.

Relies on ``netsim.draw`` for what a seed decides, ``netsim.faults`` for carrying it out, ``netsim.checkers`` for what
must hold.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import trio
from msgspec.structs import replace

from netsim import checkers, draw
from netsim.compute import SimCompute
from netsim.determinism import SimClock, deterministic_scheduling
from netsim.disk import SimDisk
from netsim.faults import Faults
from netsim.learners import learners
from netsim.metrics import Metrics
from netsim.network import SimNetwork, open_sim_network
from netsim.product_errors import errors_told, told
from netsim.results import Event, Failure, Sample, SeedResult
from netsim.scenario import ExpectSpec, Scenario
from netsim.sharing import notices_worked_out_once
from netsim.signer import StubSigner, machine_peer, world_key
from netsim.topology import draw_topology
from netsim.trace import Trace
from netsim.world import Machine, World, ed25519_signer
from node.costs import Costs
from p2p.identity import Signer
from p2p.transport import PeerId
from training.schedules import Schedule
from training.spec_sections import PHASE_MERGES_MAX, ScheduleSpec

CHECK_EVERY_S = 1.0
"""Virtual time between two looks of the checkers."""
FAILURES_TOLD = 20

GARBAGE_OBJECTS = 70_000
"""Objects made and not let go of before cycles among them are looked for."""

Emit = Callable[[Sample | Event | SeedResult], None]


def plan(scenario: Scenario, seed: int) -> dict[str, Any]:
    """What the seed decides in advance, for people."""
    return draw.plan(fitted(scenario), seed).told()


def run_seed(
    scenario: Scenario,
    seed: int,
    *,
    variant: str = "",
    until_s: float | None = None,
    trace: Path | None = None,
    emit: Emit,
    progress: Callable[[float], None] | None = None,
) -> SeedResult:
    """Run one seed in this thread and return how it ended; ``emit`` gets every line as it happens, the result last.

    ``until_s`` ends it earlier, before the liveness phase and the expectations. ``trace``: a file that gets a JSON line
    for each delivery and event. Raises GossamerError for a scenario that cannot be run, before anything does.
    """
    run = _Run(fitted(scenario), seed, variant=variant, until_s=until_s, emit=emit, progress=progress)
    torch.set_num_threads(1)
    with (
        run.traced(trace),
        errors_told(run.log_failure),
        deterministic_scheduling(seed),
        notices_worked_out_once(),
        _rare_collection(),
    ):
        began_s = time.perf_counter()
        trio.run(run.main, clock=SimClock())
        result = run.result(time.perf_counter() - began_s)
    emit(result)
    return result


@contextlib.contextmanager
def _rare_collection() -> Iterator[None]:
    """Within the block cycles are looked for a hundred times less often: a world keeps most of what it makes."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_OBJECTS, before[1], before[2])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def fitted(scenario: Scenario) -> Scenario:
    """The scenario with steps and merges of its run made to fit its duration, where it asks for that."""
    if not scenario.merge_every_s:
        return scenario
    count = min(PHASE_MERGES_MAX, max(1, round(scenario.duration_s / scenario.merge_every_s)))
    steps = max(1, round(count * scenario.merge_every_s / scenario.machines.step_s))
    phase = replace(Schedule.of(scenario.run).at(0.0), until=1.0, merges=count)
    run = replace(
        scenario.run,
        train=replace(scenario.run.train, steps=steps),
        schedule=ScheduleSpec(preset="custom", phases=(phase,)),
    )
    return replace(scenario, run=run)


class _Run:
    """The state of one run."""

    def __init__(
        self,
        scenario: Scenario,
        seed: int,
        *,
        variant: str,
        until_s: float | None,
        emit: Emit,
        progress: Callable[[float], None] | None,
    ) -> None:
        self._plan = draw.plan(scenario, seed)
        self._scenario = scenario = self._plan.of(scenario)
        self._seed = seed
        self._variant = variant
        self._until_s = until_s
        self._emit = emit
        self._progress = progress
        self._learners = learners(scenario, seed)
        self._topology = draw_topology(scenario.topology, scenario.nodes, draw.generator(seed, "topology"))
        self._trace = Trace()
        self._failures: list[Failure] = []
        self._scope = trio.CancelScope()
        self._now_s = 0.0
        self._deliveries = 0
        self._summary: dict[str, float] = {}
        self._core: tuple[int, ...] = ()

    @contextlib.contextmanager
    def traced(self, path: Path | None) -> Iterator[None]:
        """Write the trace to ``path`` within."""
        if path is None:
            yield
            return
        with path.open("w", encoding="utf-8") as file:
            self._trace = Trace(file)
            yield

    # --- the run ----------------------------------------------------------------------------------------------

    async def main(self) -> None:
        """Build the world and let it run."""
        scenario = self._scenario
        async with (
            open_sim_network(draw.generator(self._seed, "network")) as network,
            trio.open_nursery() as nursery,
        ):
            network.trace = self._trace
            world = self._build(network, nursery)
            metrics = Metrics(
                world,
                self._tell,
                exact_loss=scenario.learner.kind == "quadratic",
                founders=scenario.nodes - scenario.arrivals.later,
            )
            guards = checkers.build(world, self._fail)
            world.observers += [metrics, *guards]
            with self._scope:
                await self._phases(world, metrics, guards)
                for guard in guards:
                    guard.finished(trio.current_time())
                self._judge(metrics)
            self._now_s = trio.current_time()
            self._deliveries = network.deliveries
            nursery.cancel_scope.cancel()

    def _build(self, network: SimNetwork, nursery: trio.Nursery) -> World:
        scenario, seed = self._scenario, self._seed
        numbers: dict[PeerId, int] = {}
        network.draw_links(
            lambda source, target: draw.link(scenario, seed, numbers.get(source, 0), numbers.get(target, 0))
        )
        network.breaks_per_s = scenario.network.breaks_per_hour / 3600
        self._world = World(
            network,
            nursery,
            spec=scenario.run,
            seed=seed,
            learners=self._learners,
            signer=_stub_signer if scenario.machines.signatures == "stub" else ed25519_signer,
            eligible=self._eligible if scenario.topology != "full" else None,
            failed=self._node_failed,
        )
        self._numbers = numbers
        for _ in range(scenario.nodes):
            self._add_machine()
        return self._world

    def _add_machine(self) -> Machine:
        scenario, number = self._scenario, len(self._world.machines)
        own = draw.hardware(scenario, self._seed, number)
        disk = SimDisk(
            capacity_bytes=scenario.machines.disk_bytes, rng=draw.generator(self._seed, "disk", number)
        )
        disk.operation_s = own.disk_s
        machine = self._world.add_machine(
            disk=disk,
            compute=SimCompute(slowness=own.slowness),
            costs=Costs(step_s=scenario.machines.step_s),
        )
        self._numbers[machine.peer] = number
        network = self._world.network
        network.set_line(
            machine.peer, up_bytes_per_s=own.up_bytes_per_s, down_bytes_per_s=own.down_bytes_per_s
        )
        if own.undiallable:
            network.undiallable.add(machine.peer)
        return machine

    def _eligible(self, peer: PeerId, other: PeerId) -> bool:
        """Who may mix with whom; machines that joined later may mix with anybody."""
        mine, theirs = self._numbers[peer], self._numbers.get(other, math.inf)
        if max(mine, theirs) >= self._topology.members:
            return True
        return theirs in self._neighbours(mine)

    def _neighbours(self, number: int) -> tuple[int, ...]:
        """In the topology, which those who joined later are no part of."""
        return self._topology.neighbours(number) if number < self._topology.members else ()

    async def _phases(self, world: World, metrics: Metrics, guards: Sequence[checkers.Checker]) -> None:
        end_s = self._scenario.duration_s if self._until_s is None else self._until_s
        faults = Faults(
            world,
            self._scenario,
            self._plan,
            seed=self._seed,
            tell=self._tell,
            add_machine=self._add_machine,
            neighbours=self._neighbours,
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._look, metrics, guards)
            with trio.move_on_at(min(self._plan.calm_at_s, end_s)):
                await faults.run()
                await trio.sleep_forever()
            if self._scenario.liveness.last_s and end_s > self._plan.calm_at_s:
                self._calm_down(world)
                await trio.sleep_until(end_s)
            nursery.cancel_scope.cancel()

    def _calm_down(self, world: World) -> None:
        """Only a core stays, on a network that works."""
        self._core = world.core = draw.core(
            self._scenario, self._seed, [machine.number for machine in world.machines if machine.honest]
        )
        self._tell("phase", world.core, "liveness: faults are over, this core stays", None)
        world.network.heal()
        for machine in world.machines:
            if machine.number not in world.core:
                world.kill(machine.number)
            elif not machine.wanted:
                world.switch_on(machine.number, bootstrap=None if machine.starts_s else world.core[:3])
        world.calm_since_s = trio.current_time()

    async def _look(self, metrics: Metrics, guards: Sequence[checkers.Checker]) -> None:
        next_sample_s = 0.0
        while True:
            now_s = trio.current_time()
            for guard in guards:
                guard.sample(now_s)
            if now_s >= next_sample_s:
                next_sample_s = now_s + self._scenario.sample_every_s
                self._emit(metrics.sample(self._seed, self._variant))
                if self._progress is not None:
                    self._progress(now_s)
            await trio.sleep(CHECK_EVERY_S)

    # --- judging ----------------------------------------------------------------------------------------------

    def _judge(self, metrics: Metrics) -> None:
        self._emit(metrics.sample(self._seed, self._variant))
        self._summary = metrics.summary()
        if self._until_s is None:
            for expected in self._scenario.expect:
                self._expect(expected)

    def _expect(self, expected: ExpectSpec) -> None:
        value = self._summary.get(expected.metric, math.nan)
        low = -math.inf if expected.at_least is None else expected.at_least
        high = math.inf if expected.at_most is None else expected.at_most
        if not low <= value <= high:
            bounds = f"{'' if expected.at_least is None else f'at least {low:g} '}"
            bounds += f"{'' if expected.at_most is None else f'at most {high:g}'}"
            self._fail("expect", f"{expected.metric} is {value:g}, expected {bounds.strip()}", None)

    def _fail(self, checker: str, what: str, machine: int | None) -> None:
        if len(self._failures) < FAILURES_TOLD:
            at_s = _virtual_time_s()
            self._failures.append(Failure(checker=checker, what=what, at_s=at_s, machine=machine))
        self._scope.cancel()

    def _node_failed(self, machine: Machine, error: BaseException) -> None:
        if machine.honest:
            self._fail("crash", f"a node ended with {told(error)}", machine.number)

    def log_failure(self, text: str) -> None:
        """The product has logged an error: nothing a peer or a disk does may be one."""
        self._fail("log", text, None)

    def _tell(self, what: str, machines: Sequence[int], detail: str, until_s: float | None) -> None:
        event = Event(
            seed=self._seed,
            variant=self._variant,
            at_s=trio.current_time(),
            what=what,
            machines=sorted(machines),
            detail=detail,
            until_s=until_s,
        )
        self._trace.happened(event)
        self._emit(event)

    def result(self, wall_s: float) -> SeedResult:
        """How it ended."""
        return SeedResult(
            seed=self._seed,
            variant=self._variant,
            verdict="failed" if self._failures else "passed",
            failures=self._failures,
            drawn=self._plan.told() | {"core": list(self._core)},
            trace=self._trace.hexdigest(),
            virtual_s=self._now_s,
            wall_s=wall_s,
            deliveries=self._deliveries,
            summary=self._summary
            | {
                "deliveries_per_s": self._deliveries / max(wall_s, 1e-9),
                "speedup": self._now_s / max(wall_s, 1e-9),
            },
        )


def _stub_signer(seed: int, number: int) -> Signer:
    return StubSigner(machine_peer(seed, number), world_key(seed))


def _virtual_time_s() -> float:
    try:
        return trio.current_time()
    except RuntimeError:
        return math.nan
