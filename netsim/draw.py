"""What a seed decides about a scenario: the machines, their lines, the ways between them, and what goes wrong when.

Owns every draw that is made before or beside the run itself. Each has a generator of its own, named by the seed and by
what is drawn, so that one more machine or fault changes nothing about the others. Pure: nothing here runs anything.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec.structs import replace

from netsim.attackers import ATTACKERS
from netsim.links import LinkModel
from netsim.scenario import (
    Attack,
    BitFlip,
    Break,
    Crash,
    DiskFull,
    DiskSlow,
    Fault,
    Kill,
    Leave,
    Partition,
    PowerCut,
    Range,
    Scenario,
    Slow,
    Stall,
    Suspend,
    Throttle,
)
from training.spec_sections import Init, OuterSpec

ATTACKERS_DRAWN = tuple(sorted(ATTACKERS))
"""Hostile members that random faults may bring."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """One machine, as drawn."""

    slowness: float
    up_bytes_per_s: float
    down_bytes_per_s: float
    disk_s: float
    undiallable: bool


@dataclass(frozen=True, slots=True)
class Strike:
    """One fault at one time. ``name`` is that of its generator, which decides what is only known then."""

    name: str
    at_s: float
    for_s: float
    fault: Fault


@dataclass(frozen=True, slots=True)
class Plan:
    """All that is known of a seed in advance."""

    strikes: tuple[Strike, ...]
    rates: dict[str, float]
    """Kinds of random faults that are on, and how often each strikes per hour."""
    churn_per_hour: float
    calm_at_s: float
    """When faults end and the liveness phase begins; the end of the run when there is none."""
    outer: OuterSpec | None
    """The run's outer step, where the scenario leaves it to the seed."""
    init: Init | None
    """Likewise, whether members begin alike."""

    def of(self, scenario: Scenario) -> Scenario:
        """``scenario`` with all that the seed has drawn for its run."""
        run = scenario.run
        return replace(scenario, run=replace(run, outer=self.outer or run.outer, init=self.init or run.init))

    def told(self) -> dict[str, Any]:
        """For people and results files."""
        run: dict[str, Any] = {} if self.outer is None else {"outer": msgspec.to_builtins(self.outer)}
        if self.init is not None:
            run["init"] = self.init
        return {
            "faults": {kind: round(rate, 2) for kind, rate in self.rates.items()},
            "strikes": len(self.strikes),
            "churn_per_hour": round(self.churn_per_hour, 3),
            "calm_at_s": self.calm_at_s,
        } | run


def generator(seed: int, *names: object) -> random.Random:
    """The generator of one thing."""
    return random.Random("/".join(map(str, (seed, *names))))


def drawn(rng: random.Random, value: Range, *, logarithmic: bool = False) -> float:
    """A number from a range; the number itself when it is one."""
    if not isinstance(value, tuple):
        return value
    low, high = value
    if logarithmic and low > 0:
        return math.exp(rng.uniform(math.log(low), math.log(high)))
    return rng.uniform(low, high)


def hardware(scenario: Scenario, seed: int, number: int) -> Hardware:
    """The machine ``number``. The founder, 0, can always be dialled."""
    rng = generator(seed, "machine", number)
    network = scenario.network
    return Hardware(
        slowness=drawn(rng, scenario.machines.slowness, logarithmic=True),
        up_bytes_per_s=drawn(rng, network.up_bytes_per_s, logarithmic=True) or math.inf,
        down_bytes_per_s=drawn(rng, network.down_bytes_per_s, logarithmic=True) or math.inf,
        disk_s=drawn(rng, scenario.machines.disk_s, logarithmic=True),
        undiallable=rng.random() < network.undiallable and number > 0,
    )


def link(scenario: Scenario, seed: int, source: int, target: int) -> LinkModel:
    """The way from one machine to another: as long in both directions."""
    network = scenario.network
    if matrix := network.latency_matrix_s:
        latency_s = matrix[source % len(matrix)][target % len(matrix)]
    elif isinstance(network.latency_s, tuple):
        rng = generator(seed, "link", min(source, target), max(source, target))
        latency_s = drawn(rng, network.latency_s, logarithmic=True)
    else:
        latency_s = network.latency_s
    return LinkModel(latency_s=latency_s, jitter_s=network.jitter_s)


def plan(scenario: Scenario, seed: int) -> Plan:
    """Everything that can be known before the run begins."""
    calm_at_s = scenario.duration_s - scenario.liveness.last_s
    strikes = []
    for number, fault in enumerate(scenario.fault):
        rng = generator(seed, "fault", number)
        strikes.append(Strike(f"fault/{number}", drawn(rng, fault.at_s), drawn(rng, fault.for_s), fault))
    rates = {}
    spec = scenario.random_faults
    for kind in spec.kinds:
        rng = generator(seed, "random", kind)
        if rng.random() >= spec.on:
            continue
        rate = rates[kind] = drawn(rng, spec.per_hour, logarithmic=True)
        at_s = rng.expovariate(rate / 3600)
        while at_s < calm_at_s:
            for_s = drawn(rng, spec.for_s, logarithmic=True)
            strikes.append(Strike(f"{kind}/{at_s}", at_s, for_s, RANDOM_FAULTS[kind](rng)))
            at_s += rng.expovariate(rate / 3600)
    return Plan(
        strikes=tuple(sorted(strikes, key=lambda strike: strike.at_s)),
        rates=rates,
        churn_per_hour=drawn(generator(seed, "churn"), scenario.churn.per_hour, logarithmic=True),
        calm_at_s=calm_at_s,
        outer=generator(seed, "outer").choice(scenario.outers) if scenario.outers else None,
        init=generator(seed, "init").choice(scenario.inits) if scenario.inits else None,
    )


def core(scenario: Scenario, seed: int, machines: list[int]) -> tuple[int, ...]:
    """The machines that stay for the liveness phase."""
    count = math.ceil(scenario.liveness.core * len(machines))
    return tuple(sorted(generator(seed, "core").sample(machines, count)))


def _how_many(rng: random.Random) -> int:
    """Mostly one machine, now and then many."""
    return 1 + min(int(rng.expovariate(1.0)), 15)


def _partition(rng: random.Random) -> Partition:
    return Partition(
        at_s=0.0,
        count=_how_many(rng) if rng.random() < 0.5 else 0,
        parts=rng.randint(2, 4),
        one_way=rng.random() < 0.3,
        flaps=rng.choice((1, 1, 3, 10)),
    )


RANDOM_FAULTS: dict[str, Callable[[random.Random], Fault]] = {
    "kill": lambda rng: Kill(at_s=0.0, count=_how_many(rng)),
    "power-cut": lambda rng: PowerCut(at_s=0.0, count=_how_many(rng)),
    "leave": lambda rng: Leave(at_s=0.0, count=_how_many(rng)),
    "partition": _partition,
    "stall": lambda rng: Stall(at_s=0.0, count=_how_many(rng)),
    "suspend": lambda rng: Suspend(at_s=0.0, count=_how_many(rng)),
    "slow": lambda rng: Slow(at_s=0.0, count=_how_many(rng), times=rng.uniform(2, 20)),
    "throttle": lambda rng: Throttle(
        at_s=0.0, count=_how_many(rng), bytes_per_s=math.exp(rng.uniform(math.log(4e3), math.log(1e6)))
    ),
    "break": lambda rng: Break(at_s=0.0, count=_how_many(rng)),
    "disk-full": lambda rng: DiskFull(at_s=0.0, count=_how_many(rng)),
    "disk-slow": lambda rng: DiskSlow(at_s=0.0, count=_how_many(rng), operation_s=rng.uniform(0.05, 2.0)),
    "bit-flip": lambda rng: BitFlip(at_s=0.0, count=1),
    "crash": lambda rng: Crash(at_s=0.0, count=_how_many(rng)),
    "attack": lambda rng: Attack(at_s=0.0, attacker=rng.choice(ATTACKERS_DRAWN)),
}
"""One fault of each kind that random faults may bring, with its strength drawn."""
