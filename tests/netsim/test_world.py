"""The daemon's own node in virtual time: it trains, mixes, merges, dies, comes back, and agrees."""

import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest
import trio
from trio.testing import MockClock

from gossip.messages import ShardRef
from netsim.world import World, open_world
from node.describe import describe
from node.gossip_node import GossipNode
from p2p.transport import PeerId
from training.data import Corpus
from training.merge_math import weights_hash
from training.run_spec import parse_run_spec
from training.spec_sections import ScheduleSpec

SPEC = parse_run_spec("""
name = "small-world"
[model]
layers = 2
width = 16
heads = 2
context = 16
[data]
held_out_bytes = 4096
[train]
steps = 400
batch = 2
[exchange]
every_steps = 10
fragments = 2
[schedule]
preset = "custom"
phases = [{ until = 1.0, merges = 2 }]
[merge]
wait_s_max = 20
""")


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return small_corpus()


def small_corpus() -> Corpus:
    rng = random.Random(0)
    words = [bytes(rng.choices(b"abcdefgh ", k=6)) for _ in range(200)]
    return Corpus.of([b" ".join(rng.choices(words, k=400)) for _ in range(60)])


async def until(condition: Callable[[], bool], *, seconds: float) -> float:
    """Wait for ``condition`` in virtual time; returns how long it took, and fails when it takes longer."""
    began_s = trio.current_time()
    with trio.fail_after(seconds):
        while not condition():
            await trio.sleep(0.1)
    return trio.current_time() - began_s


def finished(nodes: list[GossipNode]) -> bool:
    return all(node.phase == "finished" and node.merges.last is not None for node in nodes)


def anchors(nodes: list[GossipNode]) -> set[str]:
    return {node.merges.last.weights_hash for node in nodes if node.merges.last is not None}


def live(world: World) -> list[GossipNode]:
    return [machine.node for machine in world.machines if machine.node is not None]


async def test_four_nodes_train_mix_and_end_with_equal_anchors(
    autojump_clock: MockClock, corpus: Corpus
) -> None:
    async with open_world(SPEC, corpus, machines=4, seed=1) as world:
        nodes = await world.start_all()
        await until(lambda: finished(nodes), seconds=60)
        assert all(node.merges.count == 2 for node in nodes)
        assert len(anchors(nodes)) == 1
        assert all(node.exchanger.mixes > 5 for node in nodes)
        assert all(node.merges.last is not None and len(node.merges.last.contributors) == 4 for node in nodes)
        assert all(node.ledger.refusals.total() == 0 for node in nodes)


@pytest.mark.parametrize(
    "victim", [0, 1, *(pytest.param(number, marks=pytest.mark.slow) for number in (2, 3))]
)
async def test_any_node_can_die_and_the_rest_merge_without_it(
    autojump_clock: MockClock, corpus: Corpus, victim: int
) -> None:
    async with open_world(SPEC, corpus, machines=4, seed=2) as world:
        nodes = await world.start_all()
        await until(lambda: nodes[victim].trainer.step >= 100, seconds=60)
        world.kill(victim)
        rest = live(world)
        await until(lambda: finished(rest), seconds=90)
        assert len(anchors(rest)) == 1
        assert all(node.merges.last is not None and len(node.merges.last.contributors) == 3 for node in rest)


async def test_a_killed_node_resumes_under_its_name_and_joins_the_next_merge(
    autojump_clock: MockClock, corpus: Corpus
) -> None:
    async with open_world(SPEC, corpus, machines=4, seed=3) as world:
        nodes = await world.start_all()
        name = nodes[0].local
        await until(lambda: nodes[0].checkpoints.step >= 200, seconds=60)
        world.kill(0)
        await trio.sleep(1.0)
        again = await world.start(0)
        assert again.local == name
        await until(lambda: again.trainer.step >= 200, seconds=0.5)
        nodes = live(world)
        await until(lambda: finished(nodes), seconds=120)
        assert len(anchors(nodes)) == 1
        assert again.merges.last is not None
        assert name in again.merges.last.contributors


async def test_a_node_killed_between_commit_and_checkpoint_takes_the_anchor_again(
    autojump_clock: MockClock, corpus: Corpus
) -> None:
    async with open_world(SPEC, corpus, machines=3, seed=6) as world:
        nodes = await world.start_all()
        await until(lambda: nodes[1].merger.head_height == 1, seconds=60)
        world.kill(1)
        again = await world.start(1, bootstrap=0)
        await until(lambda: all(node.merges.count == 1 for node in (again, nodes[0], nodes[2])), seconds=5)
        assert again.merge_host.anchor is not None
        assert anchors([again, nodes[0], nodes[2]]) == anchors([nodes[0]])
        assert again.merges.last is not None
        assert again.local in again.merges.last.contributors
        assert again.merges.last.contributed


async def test_the_status_of_a_restarted_node_still_tells_all_of_its_last_merge(
    autojump_clock: MockClock, corpus: Corpus
) -> None:
    """All of it: how good its own weights were before the merge cannot be measured a second time."""
    async with open_world(SPEC, corpus, machines=3, seed=7) as world:
        nodes = await world.start_all()
        await until(lambda: all(node.merges.count == 2 for node in nodes), seconds=60)
        before = describe(nodes[1], device="cpu", parameters=0, unit="byte", name="").last_merge
        assert before is not None
        assert before.contributed
        assert before.loss_before is not None
        world.kill(1)
        again = await world.start(1, bootstrap=0)
        await until(lambda: again.merge_host.anchor is not None, seconds=1)
        assert describe(again, device="cpu", parameters=0, unit="byte", name="").last_merge == before
        assert weights_hash(again.trainer.read()) == weights_hash(nodes[0].trainer.read())


async def test_a_full_disk_is_told_until_a_checkpoint_fits_again(
    autojump_clock: MockClock, corpus: Corpus
) -> None:
    async with open_world(SPEC, corpus, machines=1, seed=8) as world:
        machine = world.machines[0]
        node = await world.start(0)
        machine.disk.capacity_bytes = 0
        await until(lambda: "free disk space" in node.checkpointer.problem, seconds=30)
        assert node.current_problem()
        machine.disk.capacity_bytes = 1 << 30
        await until(lambda: node.checkpoints.step > 0 and not node.current_problem(), seconds=60)


async def test_a_late_node_takes_the_anchor_and_contributes_to_the_next_merge(
    autojump_clock: MockClock, corpus: Corpus
) -> None:
    async with open_world(SPEC, corpus, machines=4, seed=4) as world:
        nodes = [await world.start(number, bootstrap=0 if number else None) for number in range(3)]
        await until(lambda: all(node.merges.count == 1 for node in nodes), seconds=60)
        late = await world.start(3, bootstrap=1)
        await until(lambda: late.merges.count == 1, seconds=10)
        assert late.merges.last is not None
        assert not late.merges.last.contributed
        assert anchors([late]) == anchors(nodes)
        await until(lambda: finished([*nodes, late]), seconds=120)
        assert len(anchors([*nodes, late])) == 1


async def test_a_beginner_learns_from_its_elders_and_not_they_from_it(
    autojump_clock: MockClock, corpus: Corpus
) -> None:
    spec = msgspec.structs.replace(
        SPEC,
        train=msgspec.structs.replace(SPEC.train, steps=4000),
        schedule=ScheduleSpec(),
    )
    async with open_world(spec, corpus, machines=2, seed=5) as world:
        elder = await world.start(0)
        await until(lambda: elder.trainer.step >= 2000, seconds=90)
        beginner = await world.start(1, bootstrap=0)
        await until(lambda: beginner.exchanger.mixes > 0, seconds=20)
        assert beginner.trainer.step < 0.1 * elder.trainer.step
        assert elder.exchanger.mixes == 0
        await until(lambda: elder.exchanger.mixes > 0, seconds=60)
        assert beginner.trainer.step >= 0.1 * elder.trainer.step


async def test_a_merge_with_a_beginner_leaves_nobody_out(autojump_clock: MockClock, corpus: Corpus) -> None:
    """Each sums one of the two fragments, and the beginner's own weights are no measure for the elder's."""
    spec = msgspec.structs.replace(
        SPEC,
        train=msgspec.structs.replace(SPEC.train, steps=4000),
        schedule=ScheduleSpec(preset="final-only"),
    )
    async with open_world(spec, corpus, machines=2, seed=6) as world:
        elder = await world.start(0)
        await until(lambda: elder.trainer.step >= 2000, seconds=90)
        beginner = await world.start(1, bootstrap=0)
        await until(lambda: len(elder.members.alive(trio.current_time())) == 1, seconds=20)
        report = await elder.merges.merge_now(30)
        assert len(report.contributors) == 2
        assert elder.ledger.refusals.total() == beginner.ledger.refusals.total() == 0


REPLAY = """
import trio
import tests.conftest  # quiet logs
from netsim.determinism import SimClock, deterministic_scheduling
from netsim.world import open_world
from tests.netsim.test_world import SPEC, finished, small_corpus, until

async def main():
    async with open_world(SPEC, small_corpus(), machines=3, seed=9) as world:
        nodes = await world.start_all()
        took_s = await until(lambda: finished(nodes), seconds=120)
        for node in nodes:
            traffic = node.runtime.transport.traffic()
            print(node.merges.last.record, node.loss, took_s, traffic.bytes_sent, traffic.bytes_received)

with deterministic_scheduling(9):
    trio.run(main, clock=SimClock())
"""


def test_one_seed_is_one_history_whatever_the_hash_seed() -> None:
    histories = set()
    for hash_seed in ("1", "2"):
        environment = {
            **os.environ,
            "PYTHONHASHSEED": hash_seed,
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        ran = subprocess.run(
            [sys.executable, "-c", REPLAY],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=100,
        )
        histories.add(ran.stdout)
    assert len(histories) == 1


async def test_an_anchor_found_again_late_does_not_replace_a_later_one(
    autojump_clock: MockClock, corpus: Corpus
) -> None:
    """A restarted node has caught up with a merge before it has found the results of the one it had."""
    async with open_world(SPEC, corpus, machines=4, seed=11) as world:
        nodes = await world.start_all()
        await until(lambda: all(node.merges.count == 1 for node in nodes), seconds=120)
        results_before = set(nodes[0].merger.head_record.record.results)
        world.kill(3)
        await nodes[0].merges.merge_now(120)
        late = await world.start(3, bootstrap=0)
        fetch, slowed = late.merge_host.fetch, []

        async def slow_fetch(
            ref: ShardRef, holders: Sequence[PeerId], timeout_s: float, *, volatile: bool
        ) -> None:
            if ref in results_before:
                slowed.append(ref)
                await trio.sleep(20)
            await fetch(ref, holders, timeout_s, volatile=volatile)

        late.merge_host.fetch = slow_fetch
        await until(lambda: late.merger.head_height >= 2, seconds=15)
        assert slowed
        await trio.sleep(60)
        assert late.merges.last is not None
        assert late.merges.last.height == late.merger.head_height
        assert anchors([late]) == anchors([nodes[0]])
