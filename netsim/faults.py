"""What goes wrong in a world, and that it ends: carries out the strikes of a plan, the arrivals and the churn.

Owns the tasks of a scenario. Each strike undoes itself: after its time, and at the latest when it is cancelled because
the safety phase is over. Everything that happens is told to ``tell`` as an event. Decides nothing in advance, which is
``netsim.draw``'s; what is only known then (who is up) is drawn from the strike's own generator.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import trio

from netsim.attackers import ATTACKERS
from netsim.draw import Plan, Strike, drawn, generator, hardware
from netsim.injection import at_operation
from netsim.links import Cut
from netsim.scenario import (
    Attack,
    BitFlip,
    Break,
    Crash,
    DiskFull,
    DiskSlow,
    Join,
    Kill,
    Leave,
    Partition,
    PowerCut,
    Scenario,
    Slow,
    Stall,
    Suspend,
    Throttle,
)
from netsim.world import Machine, World

Tell = Callable[[str, Sequence[int], str, float | None], None]
"""Told what happened, to which machines, in what words, and until when."""
Ailment: TypeAlias = Slow | Throttle | DiskFull | DiskSlow
"""What makes hardware worse for as long as it lasts."""


class Faults:
    """The tasks of one scenario in one world."""

    def __init__(
        self,
        world: World,
        scenario: Scenario,
        plan: Plan,
        *,
        seed: int,
        tell: Tell,
        add_machine: Callable[[], Machine],
        neighbours: Callable[[int], Sequence[int]],
    ) -> None:
        """``neighbours``: of a machine in the topology, by number."""
        self._world = world
        self._scenario = scenario
        self._plan = plan
        self._seed = seed
        self._tell = tell
        self._add_machine = add_machine
        self._neighbours = neighbours
        self._going_on = 0
        self._ailing: dict[int, list[tuple[Ailment, float]]] = {}
        """By machine, what ails it now and how badly: strikes of one kind may overlap."""

    async def run(self) -> None:
        """Everything up to the end of the safety phase; returns once nothing is left to go wrong."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._arrive)
            for strike in self._plan.strikes:
                nursery.start_soon(self._strike, strike)
            if self._plan.churn_per_hour:
                nursery.start_soon(self._churn, nursery)

    # --- coming and going -------------------------------------------------------------------------------------

    async def _arrive(self) -> None:
        scenario, arrivals = self._scenario, self._scenario.arrivals
        early = scenario.nodes - min(arrivals.later, scenario.nodes - 1)
        times = [(arrivals.over_s * number / max(1, early - 1), number) for number in range(early)]
        late = scenario.nodes - early
        times += [
            (arrivals.later_at_s + arrivals.later_over_s * number / max(1, late), early + number)
            for number in range(late)
        ]
        for at_s, number in times:
            if at_s > trio.current_time():
                await trio.sleep_until(at_s)
            machine = self._world.machines[number]
            if not machine.wanted:
                self._switch_on(machine, generator(self._seed, "arrival", number))

    def _switch_on(self, machine: Machine, rng: random.Random) -> None:
        """Start a machine: one that was there before with what it has, a new one told of some that are up."""
        if machine.wanted:
            return
        known: list[int] | None = None
        if not machine.starts_s and machine.number:
            up = [other.number for other in self._world.up()]
            known = [0]
            if up and (self._scenario.arrivals.bootstrap == "random" or 0 not in up):
                known = rng.sample(up, min(3, len(up)))
        self._tell("start", [machine.number], "", None)
        self._world.switch_on(machine.number, bootstrap=known)

    async def _churn(self, nursery: trio.Nursery) -> None:
        rng = generator(self._seed, "churn-times")
        churn = self._scenario.churn
        while True:
            machines = self._world.machines
            await trio.sleep(rng.expovariate(self._plan.churn_per_hour * len(machines) / 3600))
            machine = rng.choice(machines)
            if machine.node is None:
                continue  # Each machine that is up leaves at the rate given, whoever else is.
            away_s = drawn(rng, churn.away_s, logarithmic=True)
            violent = rng.random() < churn.killed
            how = ("kill" if rng.random() < 0.5 else "power-cut") if violent else "leave"
            replaced = rng.random() < churn.replaced
            self._tell(how, [machine.number], "churn" + (", for good" if replaced else ""), None)
            nursery.start_soon(self._depart, machine, how, away_s, replaced, random.Random(rng.random()))

    async def _depart(
        self, machine: Machine, how: str, away_s: float, replaced: bool, rng: random.Random
    ) -> None:
        await self._end(machine, how)
        await trio.sleep(away_s)
        self._switch_on(self._add_machine() if replaced else machine, rng)

    async def _end(self, machine: Machine, how: str) -> None:
        if how == "leave":
            await self._world.leave(machine.number)
        elif how == "kill":
            self._world.kill(machine.number)
        else:
            self._world.power_cut(machine.number)

    # --- strikes ----------------------------------------------------------------------------------------------

    async def _strike(self, strike: Strike) -> None:
        await trio.sleep_until(strike.at_s)
        rng = generator(self._seed, "strike", strike.name)
        targets = self._targets(strike, rng)
        until_s = strike.at_s + strike.for_s if strike.for_s else None
        kind = strike.fault.__struct_config__.tag
        about = ATTACKERS[strike.fault.attacker].about if isinstance(strike.fault, Attack) else ""
        self._tell(str(kind), [machine.number for machine in targets], about, until_s)
        with self._disturbance():
            await self._carry_out(strike, targets, rng)

    def _targets(self, strike: Strike, rng: random.Random) -> list[Machine]:
        fault, up = strike.fault, self._world.up()
        if isinstance(fault, Join | Attack):
            return [self._add_machine() for _ in range(fault.count if isinstance(fault, Join) else 1)]
        if fault.machines:
            named: set[object] = set()
            for name in fault.machines:
                named |= {"all": {machine.number for machine in up}, "founder": {0}}.get(str(name), {name})
            return [machine for machine in up if machine.number in named]
        count = math.ceil(fault.share * len(up)) if fault.share else max(1, fault.count)
        count = min(count, len(up))
        if fault.pick == "hubs":
            # Shuffled first: whom a tie spares is chance, and not who came first.
            shuffled = rng.sample(up, len(up))
            chosen = sorted(shuffled, key=lambda machine: -len(self._neighbours(machine.number)))[:count]
        else:
            chosen = rng.sample(up, count)
        return sorted(chosen, key=lambda machine: machine.number)

    @contextlib.contextmanager
    def _disturbance(self) -> Iterator[None]:
        """The world is not calm within."""
        self._going_on += 1
        self._world.calm_since_s = None
        try:
            yield
        finally:
            self._going_on -= 1
            if not self._going_on:
                self._world.calm_since_s = trio.current_time()

    async def _carry_out(self, strike: Strike, targets: list[Machine], rng: random.Random) -> None:
        fault, for_s = strike.fault, strike.for_s
        match fault:
            case Kill() | PowerCut() | Leave():
                how = {Kill: "kill", PowerCut: "power-cut", Leave: "leave"}[type(fault)]
                await self._take_down(targets, how, for_s, rng)
            case Crash():
                await self._crash(targets, int(drawn(rng, fault.operation)), for_s, rng)
            case Partition():
                await self._partition(fault, targets, for_s, rng)
            case Stall():
                stalled = [machine.peer for machine in targets]
                everybody = [machine.peer for machine in self._world.machines]
                await self._until_healed([self._world.network.cut(stalled, everybody)], for_s)
            case Break():
                for machine in targets:
                    self._world.network.break_all(machine.peer)
            case Suspend():
                for machine in targets:
                    machine.compute.stall(for_s)
                await trio.sleep(for_s)
            case Slow():
                await self._ail(fault, targets, [drawn(rng, fault.times)] * len(targets), for_s)
            case Throttle():
                await self._ail(fault, targets, [drawn(rng, fault.bytes_per_s)] * len(targets), for_s)
            case DiskFull():
                await self._ail(fault, targets, [0.0] * len(targets), for_s)
            case DiskSlow():
                await self._ail(fault, targets, [drawn(rng, fault.operation_s) for _ in targets], for_s)
            case BitFlip():
                for machine in targets:
                    machine.disk.flip_random_bit(rng)
            case Join():
                await self._join(targets, for_s, rng)
            case Attack():
                await self._attack(targets[0], fault, for_s, rng)

    async def _take_down(self, targets: list[Machine], how: str, for_s: float, rng: random.Random) -> None:
        async with trio.open_nursery() as nursery:
            for machine in targets:
                nursery.start_soon(self._end, machine, how)
        if for_s:
            await trio.sleep(for_s)
            for machine in targets:
                self._switch_on(machine, rng)

    async def _crash(self, targets: list[Machine], operation: int, for_s: float, rng: random.Random) -> None:
        """The power goes in the midst of a disk operation of each that does not await its own already."""
        async with trio.open_nursery() as nursery:
            for machine in targets:
                before, own = rng.random() < 0.5, random.Random(rng.random())
                nursery.start_soon(self._crash_one, machine, operation, before, for_s, own)

    async def _crash_one(
        self, machine: Machine, operation: int, before: bool, for_s: float, rng: random.Random
    ) -> None:
        disk = machine.disk
        if disk.on_operation is not None or disk.on_effect is not None:
            return
        down = trio.Event()

        def pull_the_plug() -> None:
            down.set()
            self._world.power_cut(machine.number)

        at_operation(disk, disk.operations + 1 + operation, "before" if before else "after", pull_the_plug)
        try:
            await down.wait()
        finally:
            if not down.is_set():
                disk.on_operation = disk.on_effect = None
        if for_s:
            await trio.sleep(for_s)
            self._switch_on(machine, rng)

    def _others(self, machines: list[Machine]) -> list[Machine]:
        return [machine for machine in self._world.machines if machine not in machines]

    def _cut(self, parts: Sequence[Sequence[Machine]], *, one_way: bool) -> list[Cut]:
        groups = [[machine.peer for machine in part] for part in parts if part]
        return [
            self._world.network.cut(left, right, one_way=one_way)
            for left, right in itertools.combinations(groups, 2)
        ]

    async def _until_healed(self, cuts: list[Cut], for_s: float) -> None:
        try:
            await trio.sleep(for_s or math.inf)
        finally:
            self._world.network.heal(cuts)

    async def _partition(
        self, fault: Partition, targets: list[Machine], for_s: float, rng: random.Random
    ) -> None:
        parts = [targets, self._others(targets)]
        if not (fault.machines or fault.count or fault.share):
            everybody = list(self._world.machines)
            rng.shuffle(everybody)
            parts = [everybody[part :: fault.parts] for part in range(fault.parts)]
        turn_s = for_s / (2 * fault.flaps - 1)
        for flap in range(fault.flaps):
            if flap:
                await trio.sleep(turn_s)
            await self._until_healed(self._cut(parts, one_way=fault.one_way), turn_s)

    async def _ail(
        self, fault: Ailment, targets: list[Machine], amounts: Sequence[float], for_s: float
    ) -> None:
        """Have ``fault`` hold for each machine with its amount."""
        for machine, amount in zip(targets, amounts, strict=True):
            self._ailing.setdefault(machine.number, []).append((fault, amount))
            self._settle(machine)
        try:
            await trio.sleep(for_s or math.inf)
        finally:
            for machine, amount in zip(targets, amounts, strict=True):
                self._ailing[machine.number].remove((fault, amount))
                self._settle(machine)

    def _settle(self, machine: Machine) -> None:
        """Make the hardware what it is, less what ails it now: the worst of each kind."""
        own = hardware(self._scenario, self._seed, machine.number)
        ailing = self._ailing[machine.number]

        def amounts(kind: type[Ailment]) -> list[float]:
            return [amount for fault, amount in ailing if isinstance(fault, kind)]

        machine.compute.slowness = own.slowness * max(amounts(Slow), default=1.0)
        machine.disk.operation_s = max([own.disk_s, *amounts(DiskSlow)])
        machine.disk.capacity_bytes = min([self._scenario.machines.disk_bytes, *map(int, amounts(DiskFull))])
        self._world.network.set_line(
            machine.peer,
            up_bytes_per_s=min([own.up_bytes_per_s, *amounts(Throttle)]),
            down_bytes_per_s=min([own.down_bytes_per_s, *amounts(Throttle)]),
        )

    async def _join(self, targets: list[Machine], for_s: float, rng: random.Random) -> None:
        for place, machine in enumerate(targets):
            if place:
                await trio.sleep(for_s / (len(targets) - 1))
            self._switch_on(machine, rng)

    async def _attack(self, machine: Machine, fault: Attack, for_s: float, rng: random.Random) -> None:
        machine.spoil = ATTACKERS[fault.attacker].spoil
        self._switch_on(machine, rng)
        try:
            await trio.sleep(for_s or math.inf)
        finally:
            self._world.kill(machine.number)
