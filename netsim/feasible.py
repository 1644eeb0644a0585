"""Whether a scenario can be run at all: what its values, each allowed by itself, cannot be together, and its memory.

Everything here is decided before anything runs, and in well under a second; ``netsim.runner`` relies on it having been
asked. Never reads files.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator
from pathlib import Path

import msgspec

from netsim.draw import RANDOM_FAULTS
from netsim.experiments import CRITERIA
from netsim.registry import ScenarioError, small_form, variant_of
from netsim.results import METRICS
from netsim.scenario import NODES_MAX, Attack, Fault, Join, Scenario
from netsim.topology import draw_topology
from p2p.errors import GossamerError
from p2p.schema import nearest
from training.run_spec import SpecError
from training.schedules import check_fan_out
from training.spec_sections import PHASE_MERGES_MAX

# Measured: 0.28 GB with 20 nodes, 0.40 with 200, 0.63 with 400 and 2.0 with 1,000; after an hour of 16, 0.37.
PROCESS_BYTES = 400 << 20
"""A process with torch and everything else imported, and what is kept of its results."""
NODE_BYTES = 512 << 10
"""A node without its weights: tasks, connections, caches."""
MEMBER_BYTES = 2 << 10
"""What one node knows of one other member."""
MODEL_COPIES = 12
"""Of the weights that a node comes to hold: live, anchor, two moments, snapshots, and shards on its simulated disk."""
MEMORY_SHARE = 0.9
"""Of the memory that is available may be used."""

NOT_ZERO = ("step_s", "slowness", "times", "per_hour")
"""Keys by which something is divided, or without which virtual time would stand still."""


def check_scenario(scenario: Scenario) -> None:
    """Raise ScenarioError unless ``scenario``, all of its variants and its small form can be run."""
    forms = [(scenario.name, scenario)]
    if scenario.experiment is not None:
        _check_criterion(scenario)
        for name, whole in ((scenario.name, scenario), (f"{scenario.name} --small", small_form(scenario))):
            assert whole.experiment is not None
            forms += [
                (f"{name}, variant {variant.name}", variant_of(whole, variant.name))
                for variant in whole.experiment.variants
            ]
    for name, form in forms:
        for what, why, fix in _problems(form):
            raise ScenarioError(f"cannot run the scenario {name}: {what}", why=why, fix=fix)


def check_memory(scenario: Scenario, *, processes: int, available_bytes: int | None = None) -> None:
    """Raise ScenarioError unless ``processes`` at once, each with one seed of ``scenario``, fit into memory."""
    available = memory_available_bytes() if available_bytes is None else available_bytes
    fitting = processes_that_fit(scenario, available_bytes=available)
    if processes <= fitting:
        return
    nodes = f"{scenario.nodes:,} nodes" + (f" in each of {processes} processes" if processes > 1 else "")
    fewer = _nodes_that_fit(scenario, int(available * MEMORY_SHARE))
    raise ScenarioError(
        f"{nodes} need about {_gib(memory_bytes(scenario) * processes)} of memory",
        why=f"{_gib(available)} are available, and a machine that swaps gets nowhere",
        fix=f"run fewer at once: -j {fitting}" if fitting else f"--nodes {fewer}, or a smaller model",
    )


def processes_that_fit(scenario: Scenario, *, available_bytes: int | None = None) -> int:
    """How many seeds of ``scenario`` at once fit into memory; 0 if not even one."""
    available = memory_available_bytes() if available_bytes is None else available_bytes
    return int(available * MEMORY_SHARE) // memory_bytes(scenario)


def memory_bytes(scenario: Scenario) -> int:
    """About what one process takes that runs one seed of ``scenario``."""
    machines = scenario.nodes + sum(fault.count for fault in scenario.fault if isinstance(fault, Join))
    parameters = (
        scenario.learner.dimension if scenario.learner.kind == "quadratic" else scenario.run.model.parameters
    )
    return PROCESS_BYTES + machines * (NODE_BYTES + machines * MEMBER_BYTES + MODEL_COPIES * 4 * parameters)


def memory_available_bytes() -> int:
    """Memory that can be had without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except OSError:  # no Linux: all there is has to do as an estimate
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


Problem = tuple[str, str, str]
"""What is wrong, why it matters, what to do."""


def _problems(scenario: Scenario) -> Iterator[Problem]:
    yield from _range_problems(scenario)
    yield from _size_problems(scenario)
    yield from _time_problems(scenario)
    for number, fault in enumerate(scenario.fault):
        yield from _fault_problems(scenario, fault, f"fault[{number}]")
    yield from _random_fault_problems(scenario)
    yield from _expect_problems(scenario)
    try:
        check_fan_out(scenario.run, scenario.nodes)
    except SpecError as error:
        yield error.what, error.why, error.fix


def _range_problems(scenario: Scenario) -> Iterator[Problem]:
    """Ranges run from low to high, and some values cannot be 0."""
    sections: dict[str, msgspec.Struct] = {
        "network": scenario.network,
        "machines": scenario.machines,
        "churn": scenario.churn,
    }
    if scenario.random_faults.kinds:
        sections["random_faults"] = scenario.random_faults
    sections |= {f"fault[{number}]": fault for number, fault in enumerate(scenario.fault)}
    for section, values in sections.items():
        for field, value in msgspec.structs.asdict(values).items():
            key = f"{section}.{field}"
            match value:
                case (float() as low, float() as high) if low > high:
                    yield (
                        f"{key} runs from {low:g} down to {high:g}",
                        "a range is [low, high]",
                        f"write {key} = [{high:g}, {low:g}]",
                    )
                case (0.0, float()) | 0.0 if field in NOT_ZERO and section != "churn":
                    yield (
                        f"{key} may be 0",
                        "then it would come again and again without any time passing",
                        "use a number above 0, for example 0.1",
                    )


def _size_problems(scenario: Scenario) -> Iterator[Problem]:
    """The graph, the regions, and how many machines there are in the end."""
    if scenario.nodes > 1 or scenario.topology != "full":
        try:
            draw_topology(scenario.topology, scenario.nodes, random.Random(0))
        except GossamerError as error:
            yield error.what, error.why, error.fix
    matrix = scenario.network.latency_matrix_s
    if any(len(row) != len(matrix) for row in matrix):
        yield (
            f"network.latency_matrix_s has {len(matrix)} rows of {', '.join(str(len(row)) for row in matrix)}",
            "it says how far each region is from each",
            "give every row as many numbers as there are rows",
        )
    if scenario.arrivals.later >= scenario.nodes:
        yield (
            f"arrivals.later = {scenario.arrivals.later} of {scenario.nodes} nodes",
            "the founder is there from the beginning",
            f"use at most {scenario.nodes - 1}, or more nodes",
        )
    joining = sum(fault.count for fault in scenario.fault if isinstance(fault, Join))
    if scenario.nodes + joining > NODES_MAX:
        yield (
            f"{scenario.nodes} nodes and {joining} that join are more than {NODES_MAX:,}",
            "a swarm has no more members than that",
            f"let at most {NODES_MAX - scenario.nodes} join",
        )


def _time_problems(scenario: Scenario) -> Iterator[Problem]:
    """The schedule of merges, the end, and what is to happen after it."""
    end_s = scenario.duration_s
    if every_s := scenario.merge_every_s:
        merges = int(end_s / every_s + 1e-9)
        if merges < 1:
            yield (
                f"a merge every {every_s:g} s never comes due in {end_s:g} s",
                "a scenario with a schedule of merges is about merges",
                f"--duration {every_s:g}s or longer, or --set merge_every_s={end_s / 2:g}",
            )
        if merges > PHASE_MERGES_MAX:
            longest_s, apart_s = PHASE_MERGES_MAX * every_s, math.ceil(end_s / PHASE_MERGES_MAX)
            yield (
                f"a merge every {every_s:g} s for {end_s:g} s makes {merges} merges",
                f"a run has at most {PHASE_MERGES_MAX}",
                f"--duration {longest_s:g}s, or --set merge_every_s={apart_s}",
            )
    if scenario.liveness.last_s >= end_s:
        yield (
            f"the liveness phase of {scenario.liveness.last_s:g} s fills all of the {end_s:g} s",
            "it comes after the faults, at the end",
            f"--set liveness.last_s={end_s / 2:g}, or a longer --duration",
        )
    for what, at_s in [
        ("arrivals.over_s", scenario.arrivals.over_s),
        ("arrivals.later_at_s", scenario.arrivals.later_at_s if scenario.arrivals.later else 0.0),
    ]:
        if at_s >= end_s:
            yield _too_late(what, at_s, end_s)


def _fault_problems(scenario: Scenario, fault: Fault, where: str) -> Iterator[Problem]:
    kind = fault.__struct_config__.tag
    begins_s = fault.at_s[0] if isinstance(fault.at_s, tuple) else fault.at_s
    faults_end_s = scenario.duration_s - scenario.liveness.last_s
    if begins_s >= faults_end_s:
        yield _too_late(f"{where} ({kind})", begins_s, faults_end_s)
    for machine in fault.machines:
        if isinstance(machine, int) and machine >= scenario.nodes:
            yield (
                f"{where} ({kind}) names machine {machine} of {scenario.nodes}",
                "machines are numbered from 0, the founder",
                f"use 0 to {scenario.nodes - 1}, or more --nodes",
            )
    if fault.count > scenario.nodes and not isinstance(fault, Join):
        yield (
            f"{where} ({kind}) happens to {fault.count} of {scenario.nodes} machines",
            "there are not so many",
            f"use a count of at most {scenario.nodes}",
        )
    named = [bool(fault.machines), bool(fault.count), bool(fault.share)]
    if sum(named) > 1:
        yield (
            f"{where} ({kind}) says more than one of machines, count and share",
            "each says to whom it happens",
            "keep one of them",
        )
    if isinstance(fault, Join) and not fault.count:
        yield (f"{where} (join) brings nobody", "it has no count", f"for example count = 4 in {where}")
    if isinstance(fault, Attack):
        from netsim.attackers import ATTACKERS  # which brings torch

        if fault.attacker not in ATTACKERS:
            yield _unknown(f"{where}.attacker", fault.attacker, list(ATTACKERS))


def _random_fault_problems(scenario: Scenario) -> Iterator[Problem]:
    known = list(RANDOM_FAULTS)
    for kind in scenario.random_faults.kinds:
        if kind not in known:
            yield _unknown("random_faults.kinds", kind, known)


def _expect_problems(scenario: Scenario) -> Iterator[Problem]:
    for number, expected in enumerate(scenario.expect):
        if expected.metric not in METRICS:
            yield _unknown(f"expect[{number}].metric", expected.metric, list(METRICS))
        bounds = [bound for bound in (expected.at_least, expected.at_most) if bound is not None]
        if not bounds or any(math.isnan(bound) for bound in bounds):
            yield (
                f"expect[{number}] ({expected.metric}) bounds nothing",
                "an expectation without a bound is always met",
                "give it at_least or at_most",
            )


def _check_criterion(scenario: Scenario) -> None:
    assert scenario.experiment is not None
    if (criterion := scenario.experiment.criterion) not in CRITERIA:
        what, why, fix = _unknown("experiment.criterion", criterion, list(CRITERIA))
        raise ScenarioError(f"cannot run the scenario {scenario.name}: {what}", why=why, fix=fix)


def _too_late(what: str, at_s: float, end_s: float) -> Problem:
    return (
        f"{what} comes at {at_s:g} s, when all is over since {end_s:g} s",
        "it would never happen, and the scenario would show nothing",
        f"a --duration beyond {at_s:g} s, or set it earlier",
    )


def _unknown(key: str, value: str, known: list[str]) -> Problem:
    near = nearest(value, known)
    return (
        f"{key}: there is no {value}",
        f"there are {', '.join(known)}" if known else "there are none",
        f"did you mean {near}?" if near else "use one of them",
    )


def _nodes_that_fit(scenario: Scenario, allowed_bytes: int) -> int:
    low, high = 1, scenario.nodes
    while low < high:
        middle = (low + high + 1) // 2
        fits = memory_bytes(msgspec.structs.replace(scenario, nodes=middle)) <= allowed_bytes
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"
