"""Every bug that is planted is found, by the checker whose promise it breaks; without it the same seeds pass."""

from dataclasses import dataclass

import pytest

from netsim.registry import parse_scenario
from netsim.results import SeedResult
from netsim.runner import run_seed
from netsim.scenario import Scenario
from tests.sim import planted
from tests.sim.planted import Plant

SEEDS_MAX = 200
"""A bug must be found within so many seeds; those below are found within a few."""

SMALL_WORLD = """
name = "planted"
nodes = 4
duration_s = {seconds}
merge_every_s = 15
[run]
name = "planted"
[run.exchange]
every_steps = 4
fragments = 2
[run.merge]
wait_s_max = 5.0
period_s = 30.0
[machines]
step_s = 0.5
"""
LIARS = """
[[fault]]
kind = "attack"
attacker = "{name}"
at_s = 20
"""
POWER_CUTS = """
[random_faults]
kinds = ["power-cut"]
on = 1.0
per_hour = 200
for_s = [1, 10]
"""
CRASHES = """
[random_faults]
kinds = ["crash"]
on = 1.0
per_hour = 400
for_s = [1, 5]
"""
HALVES = """
[[fault]]
kind = "partition"
machines = [0, 1]
at_s = [20, 40]
for_s = 40
"""
STALLS = """
[network]
latency_s = 0.2
jitter_s = 0.1
[random_faults]
kinds = ["stall", "kill"]
on = 1.0
per_hour = 400
for_s = [4, 10]
"""
UNEQUAL = """slowness = [1, 10]
"""


@dataclass(frozen=True)
class Bug:
    """What is planted, who must find it, and in which world it shows."""

    plant: Plant
    checker: str
    world: str = ""
    seconds: int = 45
    """Of virtual time, so many that the bug shows in one of the first seeds."""


BUGS = [
    Bug(planted.hash_check_skipped, "hashes", LIARS.format(name="rotten-shards")),
    Bug(planted.old_notices_accepted, "monotonic", LIARS.format(name="replays")),
    Bug(planted.state_not_synced, "monotonic"),
    Bug(planted.promise_not_synced, "agreement"),
    Bug(planted.results_not_synced, "agreement"),
    Bug(planted.nan_check_gone, "finite", LIARS.format(name="nan-fragments")),
    Bug(planted.merge_set_unsorted, "exact-average"),
    Bug(planted.duplicate_counted, "exact-average"),
    Bug(planted.weights_not_capped, "exact-average", UNEQUAL, seconds=60),
    Bug(planted.task_leaked, "bounded", seconds=200),
    Bug(planted.closed_stream_kept, "bounded"),
    Bug(planted.member_forgotten, "membership", seconds=150),
    Bug(planted.quorum_of_half, "agreement", HALVES, seconds=60),
    Bug(planted.promise_ignored, "agreement", STALLS, seconds=100),
    Bug(planted.acceptance_forgotten, "agreement", STALLS, seconds=100),
    Bug(planted.contribution_subtracted_twice, "rebase"),
    Bug(planted.live_weights_left_behind, "rebase"),
    Bug(planted.old_checkpoints_deleted_first, "checkpoints", CRASHES, seconds=150),
    Bug(planted.honest_peer_banned, "honest-not-banned", STALLS, seconds=150),
]


def scenario_of(bug: Bug) -> Scenario:
    """The world in which ``bug`` shows."""
    return parse_scenario(SMALL_WORLD.format(seconds=bug.seconds) + bug.world)


def outcome(scenario: Scenario, seed: int) -> SeedResult:
    """How one seed ends."""
    return run_seed(scenario, seed, emit=lambda line: None)


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.plant.__name__)
def test_a_planted_bug_is_found_and_nothing_is_without_it(bug: Bug) -> None:
    scenario = scenario_of(bug)
    for seed in range(SEEDS_MAX):
        with bug.plant():
            found = outcome(scenario, seed)
        if found.verdict == "failed":
            break
    assert {failure.checker for failure in found.failures} == {bug.checker}
    assert outcome(scenario, seed).failures == []
