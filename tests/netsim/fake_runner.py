"""Stands in for ``netsim.runner``: a swarm made of formulas, which misbehaves where the scenario's ``about`` says so.

``about = "raise:3 die:4 hang:5"``: seed 3 raises in the middle, the process of seed 4 dies, seed 5 never ends.
``refuse`` refuses the scenario, ``fail:6`` lets a check fail, ``slow`` takes a tenth of a second.
"""

import functools
import math
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from netsim.results import Event, Failure, Sample, SeedResult
from netsim.scenario import Scenario
from p2p.errors import GossamerError


def plan(scenario: Scenario, seed: int) -> dict[str, Any]:
    return {"churn per hour": round(random.Random(seed).uniform(0.5, 1), 3), "core": [0, 1, 2]}


def run_seed(
    scenario: Scenario,
    seed: int,
    *,
    variant: str = "",
    until_s: float | None = None,
    trace: Path | None = None,
    emit: Callable[[Sample | Event | SeedResult], None],
    progress: Callable[[float], None] | None = None,
) -> SeedResult:
    orders = dict(order.partition(":")[::2] for order in scenario.about.split() if ":" in order)
    if "refuse" in scenario.about.split():
        raise GossamerError("the scenario is impossible", why="it says so", fix="another one")
    if "slow" in scenario.about.split():
        time.sleep(0.1)
    end_s = scenario.duration_s if until_s is None else min(until_s, scenario.duration_s)
    rng = random.Random(f"{seed}/{scenario.run.exchange.rule}")
    faults = _faults(scenario, rng, seed, variant)
    commits = 0
    sent = [0.0] * scenario.nodes
    at_s = 0.0
    while at_s <= end_s:
        for event in faults:
            if at_s - scenario.sample_every_s < event.at_s <= at_s:
                emit(event)
        down = _down(faults, at_s)
        up = [machine not in down for machine in range(scenario.nodes)]
        if scenario.merge_every_s and at_s // scenario.merge_every_s > commits:
            commits += 1
            emit(
                Event(
                    seed=seed,
                    variant=variant,
                    at_s=at_s,
                    what="commit",
                    machines=[0],
                    detail=f"height {commits}",
                )
            )
        cut = any(event.what == "partition" and event.at_s <= at_s < (event.until_s or 0) for event in faults)
        dispersion = (
            0.02 + 0.9 * math.exp(-at_s / 120) * rng.uniform(0.8, 1.2) + 0.3 * cut * rng.uniform(0.8, 1)
        )
        since_merge_s = at_s % scenario.merge_every_s if scenario.merge_every_s else at_s
        sent = [
            total + (0 if down_ else rng.uniform(0.5, 1.5) * 4000 * scenario.sample_every_s)
            for total, down_ in zip(sent, [not on for on in up], strict=True)
        ]
        emit(
            Sample(
                seed=seed,
                variant=variant,
                at_s=at_s,
                up=sum(up),
                seen=[
                    max(1, sum(up) // (2 if cut else 1) + rng.choice([0, 0, 0, 1])) if on else None
                    for on in up
                ],
                step=[int(at_s / scenario.machines.step_s) if on else None for on in up],
                loss=[
                    (3 * math.exp(-at_s / 200) + 0.05 + 0.002 * since_merge_s) * rng.lognormvariate(0, 0.2)
                    if on
                    else None
                    for on in up
                ],
                dispersion=dispersion,
                height=[commits if on else None for on in up],
                bytes_sent=[int(total) for total in sent],
            )
        )
        if progress is not None:
            progress(at_s)
        if at_s >= end_s / 2:
            _misbehave(orders, seed)
        at_s += scenario.sample_every_s
    if trace is not None:
        trace.write_text(f"trace of seed {seed}\n")
    failures = []
    if orders.get("fail") == str(seed):
        failures.append(
            Failure(
                checker="equal-anchors", what="machines 1 and 2 differ at height 3", at_s=180.5, machine=2
            )
        )
    result = SeedResult(
        seed=seed,
        variant=variant,
        verdict="failed" if failures else "passed",
        failures=failures,
        drawn=plan(scenario, seed),
        trace=f"{rng.getrandbits(128):032x}",
        virtual_s=end_s,
        wall_s=0.01,
        deliveries=1000 + seed,
        summary={
            "final_loss": 0.05 + 0.001 * seed,
            "dispersion": dispersion,
            "commits": float(commits),
            "commit_share": 0.97,
            "bytes_per_node": sum(sent) / len(sent),
            "up_share": 0.93,
            "speedup": end_s / 0.01,
        },
    )
    emit(result)
    return result


def _misbehave(orders: dict[str, str], seed: int) -> None:
    if orders.get("raise") == str(seed):
        raise ZeroDivisionError("a bug")
    if orders.get("die") == str(seed):
        os.kill(os.getpid(), signal.SIGSEGV)
    if orders.get("hang") == str(seed):
        time.sleep(3600)


def _faults(scenario: Scenario, rng: random.Random, seed: int, variant: str) -> list[Event]:
    """Departures and returns for churn, and the faults that the scenario names."""
    event = functools.partial(Event, seed=seed, variant=variant)
    events = []
    for fault in scenario.fault:
        begins_s, for_s = (
            value[0] if isinstance(value, tuple) else value for value in (fault.at_s, fault.for_s)
        )
        machines = [machine for machine in fault.machines if isinstance(machine, int)]
        until_s = begins_s + for_s if for_s else None
        events.append(
            event(at_s=begins_s, what=str(fault.__struct_config__.tag), machines=machines, until_s=until_s)
        )
    if scenario.liveness.last_s:
        events.append(event(at_s=scenario.duration_s - scenario.liveness.last_s, what="phase", machines=[0]))
    churn = scenario.churn.per_hour
    assert not isinstance(churn, tuple)
    for _ in range(int(churn * scenario.nodes * scenario.duration_s / 3600)):
        begins_s, machine = rng.uniform(0, scenario.duration_s), rng.randrange(scenario.nodes)
        events.append(event(at_s=begins_s, what=rng.choice(["kill", "leave"]), machines=[machine]))
        events.append(event(at_s=begins_s + rng.uniform(10, 300), what="start", machines=[machine]))
    return sorted(events, key=lambda event: event.at_s)


def _down(faults: list[Event], at_s: float) -> set[int]:
    down: set[int] = set()
    for event in faults:
        if event.at_s <= at_s and event.what in ("kill", "leave"):
            down |= set(event.machines)
        elif event.at_s <= at_s and event.what == "start":
            down -= set(event.machines)
    return down
