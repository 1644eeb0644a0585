"""How fast the simulator is: deliveries per second, how many a round costs, and virtual against real time.

Each measurement is a process of its own, one core, checkers included: real nodes, real wire bytes, the analytic learner
but for the digits. Memory is the peak of that process.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping

import trio

from benchmarks.harness import Figure

REPEATS = 3
SETTINGS: Mapping[str, tuple[str, dict[str, object]]] = {
    "sixteen": ("ideal", {"nodes": 16, "duration_s": 3600.0, "machines.step_s": 1.0}),
    "digits": ("digits", {}),
    "thousand": ("thousand", {}),
}


async def measure() -> list[Figure]:
    """The figures of docs/LOG.md."""
    sixteen = [await _run("sixteen") for _ in range(REPEATS)]
    digits = [await _run("digits") for _ in range(REPEATS)]
    thousand = await _run("thousand")
    return [
        Figure("netsim: messages delivered, 16 nodes", "/s", _all(sixteen, "messages_per_s"), at_least=3000),
        Figure("netsim: deliveries per node and round", "", _all(sixteen, "per_node_round"), at_most=80),
        Figure(
            "netsim: virtual / real time, 16 nodes for an hour", "x", _all(sixteen, "speedup"), at_least=100
        ),
        Figure("netsim: node-updates, 64 nodes on digits", "/s", _all(digits, "updates_per_s"), at_least=500),
        Figure("netsim: 1,000 nodes for 20 rounds", "s", (thousand["wall_s"],), at_most=600),
        Figure(
            "netsim: deliveries per node and round, 1,000 nodes",
            "",
            (thousand["per_node_round"],),
            at_most=80,
        ),
        Figure("netsim: memory of 1,000 nodes", "GB", (thousand["gigabytes"],), at_most=4),
    ]


def _all(runs: list[dict[str, float]], name: str) -> tuple[float, ...]:
    return tuple(run[name] for run in runs)


async def _run(name: str) -> dict[str, float]:
    ended = await trio.run_process([sys.executable, "-m", "benchmarks.simulation", name], capture_stdout=True)
    figures: dict[str, float] = json.loads(ended.stdout)
    return figures


def simulate(name: str) -> dict[str, float]:
    """Run one of SETTINGS in this process. Raises AssertionError when its checkers found something."""
    from netsim.registry import load_scenario, with_changes
    from netsim.results import Sample
    from netsim.runner import run_seed

    scenario_name, changes = SETTINGS[name]
    scenario = with_changes(load_scenario(scenario_name), changes)
    steps: list[int | None] = []

    def see(line: object) -> None:
        if isinstance(line, Sample):
            steps[:] = line.step

    began_s = time.perf_counter()
    result = run_seed(scenario, 0, emit=see)
    wall_s = time.perf_counter() - began_s
    assert result.verdict == "passed", result.failures
    return {
        "wall_s": wall_s,
        "messages_per_s": result.summary["messages"] / wall_s,
        "per_node_round": result.summary["deliveries_per_node_round"],
        "speedup": result.virtual_s / wall_s,
        "updates_per_s": sum(step or 0 for step in steps) / wall_s,
        "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


if __name__ == "__main__":
    print(json.dumps(simulate(sys.argv[1])))
