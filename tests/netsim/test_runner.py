"""One seed from nothing to its result: what ends it, what is told of it, and that nothing else is touched."""

import itertools
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import structlog
import torch
import trio

from netsim import draw, runner
from netsim.registry import parse_scenario, with_changes
from netsim.results import Event, Sample, SeedResult
from netsim.runner import fitted, plan, run_seed
from netsim.scenario import Scenario
from node.gossip_node import GossipNode
from p2p.transport import PeerId
from training.schedules import Schedule
from training.spec_sections import PHASE_MERGES_MAX

Line = Sample | Event | SeedResult


def scenario(toml: str = "", **changes: object) -> Scenario:
    """Three machines for 26 seconds, with two merges, ``toml`` at the end and some keys changed."""
    made = parse_scenario(f"""
name = "small"
nodes = 3
duration_s = 26
merge_every_s = 10
sample_every_s = 5
[run]
name = "small"
[run.merge]
wait_s_max = 2
{toml}
""")
    return with_changes(made, {key.replace("__", "."): value for key, value in changes.items()})


def lines_of(made: Scenario, seed: int = 1, **named: object) -> list[Line]:
    """All that is told of a seed."""
    lines: list[Line] = []
    run_seed(made, seed, emit=lines.append, **named)  # type: ignore[arg-type]
    return lines


def result_of(lines: list[Line]) -> SeedResult:
    """The last line, which is the result."""
    assert isinstance(lines[-1], SeedResult)
    return lines[-1]


def events(lines: list[Line], what: str) -> list[Event]:
    """Those of one kind."""
    return [line for line in lines if isinstance(line, Event) and line.what == what]


# --- what is told -----------------------------------------------------------------------------------------------


def test_a_seed_tells_its_story_in_order_and_its_result_last() -> None:
    lines = lines_of(scenario(), variant="plain")
    result = result_of(lines)
    assert (result.verdict, result.failures) == ("passed", [])
    assert (result.seed, result.variant, result.virtual_s) == (1, "plain", 26.0)
    assert sum(isinstance(line, SeedResult) for line in lines) == 1
    told = [line for line in lines if isinstance(line, Sample | Event)]
    assert all((line.seed, line.variant) == (1, "plain") for line in told)
    times = [line.at_s for line in told]
    assert times == sorted(times)
    assert [line.at_s for line in told if isinstance(line, Sample)] == pytest.approx(
        [0, 5, 10, 15, 20, 25, 26]
    )
    assert [event.machines for event in events(lines, "start")] == [[0], [1], [2]]
    assert [event.machines for event in events(lines, "commit")] == [[0, 1, 2]] * 2
    assert result.summary["commits"] == 2
    assert result.deliveries > 100
    assert result.wall_s > 0


def test_progress_is_told_in_virtual_seconds() -> None:
    seen: list[float] = []
    lines_of(scenario(), progress=seen.append)
    assert seen == pytest.approx([0, 5, 10, 15, 20, 25])


def test_what_was_drawn_is_told_before_and_after() -> None:
    made = scenario('[random_faults]\nkinds = ["break", "stall"]\non = 1.0\nper_hour = 600\nfor_s = 1')
    told = plan(made, 4)
    assert set(told["faults"]) == {"break", "stall"}
    assert result_of(lines_of(made, 4)).drawn == told | {"core": []}


def test_a_trace_file_has_a_line_for_each_delivery_and_event(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = lines_of(scenario(), trace=path)
    written = [json.loads(line) for line in path.read_text().splitlines()]
    delivered = [line for line in written if "frame" in line]
    assert len(delivered) == result_of(lines).deliveries
    assert {frozenset(line) for line in delivered} == {
        frozenset({"at_s", "from", "to", "frame", "stream", "bytes"})
    }
    assert {line["frame"] for line in delivered} > {"open", "agreed", "data", "eof"}
    assert {line["from"] for line in delivered} == {0, 1, 2}
    happened = [line for line in written if "event" in line]
    assert [line["event"] for line in happened] == [line.what for line in lines if isinstance(line, Event)]
    assert all(one["at_s"] <= other["at_s"] for one, other in itertools.pairwise(written))


def test_the_trace_is_that_of_the_scenario_and_the_seed_alone(tmp_path: Path) -> None:
    def trace(made: Scenario, seed: int, **named: object) -> str:
        return result_of(lines_of(made, seed, **named)).trace

    plain = trace(scenario(), 1)
    assert plain == trace(scenario(), 1, trace=tmp_path / "trace.jsonl", progress=lambda at_s: None)
    others = {trace(scenario(), 2), trace(scenario(nodes=4), 1), trace(scenario(network__latency_s=0.03), 1)}
    assert len(others | {plain}) == 4


# --- when it ends, and how --------------------------------------------------------------------------------------


def test_an_expectation_that_is_not_met_fails_the_seed() -> None:
    expected = '[[expect]]\nmetric = "commits"\nat_least = 3\n[[expect]]\nmetric = "up_share"\nat_most = 1'
    result = result_of(lines_of(scenario(expected)))
    assert result.verdict == "failed"
    (failure,) = result.failures
    assert (failure.checker, failure.what) == ("expect", "commits is 2, expected at least 3")
    assert (failure.at_s, failure.machine) == (26.0, None)
    assert result.summary["commits"] == 2


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ("at_most = 1", "commits is 2, expected at most 1"),
        ("at_least = 3\nat_most = 4", "commits is 2, expected at least 3 at most 4"),
        ("at_least = 2\nat_most = 2", None),
    ],
)
def test_both_bounds_of_an_expectation_count(bounds: str, words: str | None) -> None:
    result = result_of(lines_of(scenario(f'[[expect]]\nmetric = "commits"\n{bounds}')))
    assert [failure.what for failure in result.failures] == ([words] if words else [])


def test_a_figure_that_there_is_not_is_not_what_was_expected() -> None:
    made = scenario(
        '[[expect]]\nmetric = "commit_share"\nat_least = 0.1',
        merge_every_s=0,
        run__schedule={"preset": "custom", "phases": [{"until": 1.0}]},
    )
    (failure,) = result_of(lines_of(made)).failures
    assert failure.what == "commit_share is nan, expected at least 0.1"


def test_a_replay_up_to_a_time_is_the_same_story_without_its_end() -> None:
    made = scenario('[[expect]]\nmetric = "commits"\nat_least = 3', liveness__last_s=5)
    whole, part = lines_of(made), lines_of(made, until_s=15)
    assert result_of(part).verdict == "passed", "what is expected of a whole run is not of a part"
    assert result_of(part).virtual_s == 15
    assert events(part, "phase") == []
    told = [line for line in part if isinstance(line, Event)]
    assert told == [line for line in whole if isinstance(line, Event)][: len(told)]
    assert len(told) > 3
    later = lines_of(made, until_s=24)
    assert result_of(later).virtual_s == 24
    assert len(events(later, "phase")) == 1


def ends_with(error: Exception) -> Callable[[GossipNode], Awaitable[None]]:
    """A part of a node that fails, on the second machine to be switched on, five seconds into its life."""
    begun: list[GossipNode] = []

    async def beat(node: GossipNode) -> None:
        begun.append(node)
        mine = len(begun)
        await trio.sleep(5)
        if mine == 2:
            raise error
        await trio.sleep_forever()

    return beat


def test_a_node_that_raises_is_a_failure_with_its_machine_time_and_place() -> None:
    with patch.object(GossipNode, "_beat", ends_with(ZeroDivisionError("it is zero"))):
        lines = lines_of(scenario())
    result = result_of(lines)
    assert result.verdict == "failed"
    (failure,) = result.failures
    assert failure.checker == "crash"
    assert failure.what.startswith("a node ended with ZeroDivisionError: it is zero (test_runner.py:")
    assert failure.at_s == pytest.approx(5, abs=0.1)
    assert failure.machine in range(3)
    assert result.virtual_s == failure.at_s, "what follows explains nothing"
    assert "commits" not in result.summary


def test_what_a_node_logs_as_an_error_is_a_failure() -> None:
    async def beat(node: GossipNode) -> None:
        await trio.sleep(3)
        structlog.get_logger().error("beyond repair", part="heart")
        logging.getLogger("p2p.somewhere").error("%s broke", "stream", exc_info=ValueError("by itself"))
        await trio.sleep_forever()

    with patch.object(GossipNode, "_beat", beat):
        result = result_of(lines_of(scenario()))
    found = {(failure.checker, failure.what) for failure in result.failures}
    assert ("log", "beyond repair: {'part': 'heart'}") in found
    assert ("log", "stream broke: ValueError: by itself") in found
    assert result.virtual_s == 3


def test_warnings_are_no_failures_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    async def beat(node: GossipNode) -> None:
        structlog.get_logger().warning("a problem")
        logging.getLogger("p2p").warning("a problem")
        await trio.sleep_forever()

    with patch.object(GossipNode, "_beat", beat):
        assert "log" not in {
            failure.checker for failure in result_of(lines_of(scenario(), until_s=2)).failures
        }
    assert capfd.readouterr() == ("", "")


def test_logging_is_as_it_was_afterwards() -> None:
    logger = logging.getLogger("p2p")
    before = structlog.get_config(), list(logger.handlers), logger.propagate
    lines_of(scenario(), until_s=1)
    assert (structlog.get_config(), list(logger.handlers), logger.propagate) == before


def test_no_more_failures_are_told_than_people_read() -> None:
    async def beat(node: GossipNode) -> None:
        for number in range(100):
            structlog.get_logger().error(f"error {number}")
        await trio.sleep_forever()

    with patch.object(GossipNode, "_beat", beat):
        assert len(result_of(lines_of(scenario())).failures) == runner.FAILURES_TOLD


# --- the liveness phase -----------------------------------------------------------------------------------------


def test_in_the_end_only_the_core_is_there_and_nothing_goes_wrong() -> None:
    faults = """
[[fault]]
kind = "kill"
at_s = 4
machines = [0, 1, 2, 3]
[[fault]]
kind = "partition"
at_s = 3
machines = [1, 2, 4]
[[fault]]
kind = "slow"
at_s = 3
times = 1000
machines = ["all"]
[[fault]]
kind = "attack"
at_s = 5
attacker = "nan-fragments"
"""
    made = scenario(faults, nodes=6, duration_s=120, liveness__last_s=100, liveness__core=0.5)
    lines = lines_of(made, 2)
    result = result_of(lines)
    assert result.failures == []
    (phase,) = events(lines, "phase")
    assert phase.at_s == 20
    core = result.drawn["core"]
    assert phase.machines == core
    assert len(core) == 3
    assert set(core) < set(range(6)), "no hostile member is in it"
    last = [line for line in lines if isinstance(line, Sample)][-1]
    assert [number for number, step in enumerate(last.step) if step is not None] == core
    assert {last.height[number] for number in core} == {max(filter(None, last.height))}
    assert len(set(core) & {0, 1, 2, 3}) > 0, "somebody had to be switched on again"


# --- what is made to fit ----------------------------------------------------------------------------------------


def test_a_run_is_made_to_fit_its_merges() -> None:
    made = fitted(scenario(duration_s=600, merge_every_s=60, machines__step_s=0.1))
    assert made.run.train.steps == 6000
    assert Schedule.of(made.run).merge_points == tuple(round(number / 10, 9) for number in range(1, 11))
    assert fitted(made) == made


def test_a_run_that_says_when_it_merges_is_left_alone() -> None:
    made = scenario(merge_every_s=0)
    assert fitted(made) is made


def test_merges_are_at_least_one_and_not_too_many() -> None:
    for duration_s, every_s, merges in ((10, 600, 1), (1e5, 1, PHASE_MERGES_MAX)):
        made = fitted(scenario(duration_s=duration_s, merge_every_s=every_s))
        assert len(Schedule.of(made.run).merge_points) == merges


def test_a_seed_draws_what_merges_send_where_the_scenario_leaves_it_to_it() -> None:
    kinds = ({"kind": "none"}, {"kind": "nesterov", "momentum": 0.5})
    made = scenario(duration_s=60, merge_every_s=20, outers=kinds, inits=("per-peer", "shared"))
    assert {plan(made, seed)["init"] for seed in range(8)} == {"per-peer", "shared"}
    told = {plan(made, seed)["outer"]["kind"] for seed in range(8)}
    assert told == {"none", "nesterov"}
    nesterov = next(seed for seed in range(8) if plan(made, seed)["outer"]["kind"] == "nesterov")
    moved = run_seed(made, nesterov, emit=lambda line: None)
    as_it_is = run_seed(scenario(duration_s=60, merge_every_s=20), nesterov, emit=lambda line: None)
    assert moved.verdict == as_it_is.verdict == "passed"
    assert moved.summary["commits"] >= 2
    assert moved.trace != as_it_is.trace
    assert not {"outer", "init"} & plan(scenario(), 0).keys()


# --- machines ---------------------------------------------------------------------------------------------------


def test_machines_are_as_they_were_drawn() -> None:
    more = """
[machines]
slowness = [1, 50]
disk_s = [0.001, 0.1]
[network]
up_bytes_per_s = [1e4, 1e6]
undiallable = 0.5
"""
    made = scenario(more)
    for seed in range(3):
        last = [line for line in lines_of(made, seed) if isinstance(line, Sample)][-1]
        expected = [26 / (0.1 * draw.hardware(made, seed, number).slowness) for number in range(3)]
        assert last.step == pytest.approx(expected, rel=0.1, abs=1)


def test_a_topology_says_who_mixes_with_whom() -> None:
    def partners(topology: str) -> set[tuple[int, int]]:
        met: set[tuple[int, int]] = set()
        honest = GossipNode._may_mix_with

        def seen(node: GossipNode, peer: PeerId) -> bool:
            may = honest(node, peer)
            if may:
                met.add((numbers[node.local], numbers[peer]))
            return may

        numbers: dict[object, int] = {}
        stub = runner._stub_signer
        for number in range(6):
            numbers[stub(1, number).peer] = number
        with patch.object(GossipNode, "_may_mix_with", seen):
            lines_of(scenario(nodes=5, topology=topology))
        return met

    assert partners("full") == {(a, b) for a in range(5) for b in range(5) if a != b}
    assert partners("ring") == {(a, b) for a in range(5) for b in range(5) if (a - b) % 5 in (1, 4)}


def test_the_real_model_and_real_keys_run_too() -> None:
    more = """
[machines]
step_s = 1.0
signatures = "ed25519"
[run.model]
layers = 1
width = 16
heads = 2
context = 16
[run.train]
batch = 2
"""
    threads = torch.get_num_threads()
    result = result_of(lines_of(scenario(more, learner__kind="torch", merge_every_s=13)))
    torch.set_num_threads(threads)
    assert result.failures == []
    assert result.summary["commits"] == 1
    assert 3 < result.summary["final_loss"] < 8
