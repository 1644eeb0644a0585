"""Faults can pick the machines that have the most neighbours in the topology."""

from __future__ import annotations

from collections.abc import Sequence

from netsim import draw
from netsim.registry import parse_scenario
from netsim.results import Event, Sample, SeedResult
from netsim.runner import run_seed
from netsim.scenario import Scenario
from netsim.topology import draw_topology


def scenario(topology: str, pick: str) -> Scenario:
    return parse_scenario(f"""
name = "hubs"
nodes = 16
duration_s = 4
topology = "{topology}"
[run]
name = "hubs"
[[fault]]
kind = "kill"
at_s = 3
count = 4
pick = "{pick}"
""")


def killed(scenario: Scenario, seed: int) -> list[int]:
    lines: list[Sample | Event | SeedResult] = []
    assert run_seed(scenario, seed, emit=lines.append).verdict == "passed"
    return next(line.machines for line in lines if isinstance(line, Event) and line.what == "kill")


def degrees(topology: str, seed: int, machines: Sequence[int]) -> list[int]:
    graph = draw_topology(topology, 16, draw.generator(seed, "topology"))
    return sorted(len(graph.neighbours(machine)) for machine in machines)


def test_hubs_have_the_most_neighbours() -> None:
    for seed in range(3):
        hubs = killed(scenario("barabasi-albert:2", "hubs"), seed)
        assert degrees("barabasi-albert:2", seed, hubs) == degrees("barabasi-albert:2", seed, range(16))[-4:]


def test_random_victims_are_not_the_hubs() -> None:
    drawn = [killed(scenario("barabasi-albert:2", "random"), seed) for seed in range(3)]
    hubs = [killed(scenario("barabasi-albert:2", "hubs"), seed) for seed in range(3)]
    assert drawn != hubs


def test_among_equals_the_seed_decides() -> None:
    victims = [tuple(killed(scenario("ring", "hubs"), seed)) for seed in range(3)]
    assert len(set(victims)) == 3
