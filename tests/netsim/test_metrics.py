"""The figures of a simulation, on cases small enough to work out by hand."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trio

from netsim.determinism import SimClock
from netsim.metrics import MEMBER_AFTER_S, Metrics, dispersion
from netsim.world import Machine
from node.gossip_node import GossipNode
from training.run_spec import RunSpec
from training.spec_sections import PhaseSpec, ScheduleSpec


class SketchedNode(GossipNode):
    """As much of a node as is measured, and nothing else of it."""

    def __init__(self, weights: list[float], loss: float = 1.0) -> None:
        self.asked: list[int] = []
        self.traffic = SimpleNamespace(bytes_sent=0)
        self.loss = loss
        self.merger = SimpleNamespace(due=self.asked.append, head_height=0)
        self.merge_host = SimpleNamespace(adopt=self._adopt)
        self.exchanger = SimpleNamespace(mixes=0, mixes_failed=0)
        self.members = SimpleNamespace(alive=lambda now_s: [])
        self.runtime = SimpleNamespace(transport=SimpleNamespace(traffic=lambda: self.traffic))
        self.trainer = SimpleNamespace(
            step=0, evaluate=lambda values=None: self.loss, read=lambda: torch.tensor(weights)
        )
        self.adopted: list[bytes] = []

    async def _adopt(self, committed: object, record_hash: bytes, *, extra: int = 0) -> None:
        self.adopted.append(record_hash)


class SketchedWorld:
    """Machines that are switched on and off by hand."""

    def __init__(self, machines: int, founders: int) -> None:
        self.machines = [self._machine(number) for number in range(machines)]
        self.network = SimpleNamespace(deliveries=0, messages=0)
        self.spec = RunSpec(
            name="x",
            schedule=ScheduleSpec(preset="custom", phases=(PhaseSpec(until=1.0, merges=2),)),
        )
        self.told: list[tuple[str, list[int], str]] = []
        self.metrics = Metrics(
            self,  # type: ignore[arg-type]
            lambda what, machines, detail, until_s: self.told.append((what, list(machines), detail)),
            exact_loss=True,
            founders=founders,
        )

    @staticmethod
    def _machine(number: int) -> Machine:
        identity: Any = SimpleNamespace(peer=f"peer-{number}")
        nothing: Any = None
        return Machine(number=number, identity=identity, disk=nothing, compute=nothing, costs=nothing)

    def up(self) -> list[Machine]:
        return [machine for machine in self.machines if machine.node is not None]

    def on(self, *numbers: int, weights: float = 1.0, loss: float = 1.0) -> list[SketchedNode]:
        """A process begins on each."""
        nodes: list[Any] = []
        for number in numbers:
            machine = self.machines[number]
            machine.starts_s.append(trio.current_time())
            nodes.append(SketchedNode([weights, 0.0], loss))
            machine.node = nodes[-1]
            self.metrics.started(machine)
        return nodes

    def off(self, number: int) -> None:
        """It ends."""
        machine = self.machines[number]
        machine.bytes_sent_before = machine.bytes_sent
        self.metrics.stopped(machine, "killed")
        machine.node = None

    def due(self, number: int, point: int) -> None:
        """The node of a machine finds a merge due."""
        node: Any = self.machines[number].node
        node.merger.due(point)

    async def commit(self, by: int, name: bytes, point: int, contributors: list[int]) -> None:
        """A node holds the anchor of a record."""
        peers = [SimpleNamespace(peer=f"peer-{number}") for number in contributors]
        record = SimpleNamespace(height=point, point=point, contributors=peers)
        node: Any = self.machines[by].node
        await node.merge_host.adopt(SimpleNamespace(record=record), name, extra=1)

    def summary(self) -> dict[str, float]:
        return self.metrics.summary()


def in_time(main: Callable[[], Any]) -> None:
    """Run ``main`` in virtual time."""
    trio.run(main, clock=SimClock())


# --- merges -----------------------------------------------------------------------------------------------------


def test_a_merge_counts_with_nine_in_ten_of_those_who_lived_through_it() -> None:
    async def main() -> None:
        world = SketchedWorld(20, founders=20)
        world.on(*range(20))
        await trio.sleep(MEMBER_AFTER_S)
        world.due(3, 1)
        world.due(5, 1)
        await trio.sleep(4)
        await world.commit(0, b"one", 1, list(range(18)))
        world.due(3, 2)
        await world.commit(0, b"two", 2, list(range(17)))
        assert world.summary()["commit_share"] == 0.5
        assert world.summary()["merges_due"] == world.summary()["commits"] == 2
        assert world.summary()["commit_s"] == 2.0  # the median of 4 s and none

    in_time(main)


def test_a_merge_that_never_commits_counts_as_due() -> None:
    async def main() -> None:
        world = SketchedWorld(2, founders=2)
        world.on(0, 1)
        assert math.isnan(world.summary()["commit_share"])
        await trio.sleep(MEMBER_AFTER_S)
        world.due(0, 1)
        assert world.summary()["commit_share"] == 0.0
        assert math.isnan(world.summary()["commit_s"])

    in_time(main)


def test_nobody_is_missed_who_died_meanwhile_or_has_just_come() -> None:
    async def main() -> None:
        world = SketchedWorld(6, founders=4)
        world.on(0, 1, 2, 3)
        await trio.sleep(MEMBER_AFTER_S - 1)
        world.on(4)
        await trio.sleep(1)
        world.due(0, 1)
        world.off(2)
        world.off(3)
        await trio.sleep(1)
        world.on(3)  # It lives, and did not live through it.
        await world.commit(0, b"one", 1, [0, 1])
        assert world.summary()["commit_share"] == 1.0

    in_time(main)


def test_hostile_members_are_not_missed() -> None:
    async def main() -> None:
        world = SketchedWorld(3, founders=3)
        world.machines[2].spoil = lambda node: None
        world.on(0, 1, 2)
        await trio.sleep(MEMBER_AFTER_S)
        world.due(0, 1)
        await world.commit(0, b"one", 1, [0, 1])
        assert world.summary()["commit_share"] == 1.0

    in_time(main)


def test_a_record_is_one_commit_whoever_takes_it() -> None:
    async def main() -> None:
        world = SketchedWorld(2, founders=2)
        first, second = world.on(0, 1)
        await world.commit(0, b"one", 1, [0, 1])
        await world.commit(1, b"one", 1, [0, 1])
        assert world.summary()["commits"] == 1
        assert first.adopted == second.adopted == [b"one"]
        assert [line for line in world.told if line[0] == "commit"] == [
            ("commit", [0, 1], "height 1, point 1")
        ]
        world.due(0, 7)
        assert first.asked == [7]

    in_time(main)


def test_the_second_record_of_a_point_does_not_make_good_for_the_first() -> None:
    """After a partition both sides may have committed: who was first is measured."""

    async def main() -> None:
        world = SketchedWorld(4, founders=4)
        world.on(0, 1, 2, 3)
        await trio.sleep(MEMBER_AFTER_S)
        world.due(0, 1)
        await world.commit(0, b"left", 1, [0, 1])
        await world.commit(2, b"all", 1, [0, 1, 2, 3])
        assert world.summary()["commit_share"] == 0.0

    in_time(main)


# --- newcomers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inside", "rounds"),
    [([[0, 1]], 0), ([[0, 1, 2]], 1), ([[0], [0], [0, 2], [0]], 3), ([[0], [0], [0], [0]], 4)],
)
def test_a_newcomer_is_in_after_so_many_commits(inside: list[list[int]], rounds: int) -> None:
    """Who is still waiting counts with the commits it has seen; the founders do not count."""

    async def main() -> None:
        world = SketchedWorld(3, founders=2)
        world.on(0, 1)
        await world.commit(0, b"before", 1, [0, 1])
        if rounds:
            world.on(2)
        for place, contributors in enumerate(inside):
            await world.commit(0, bytes([place]), 2 + place, contributors)
        assert world.summary()["join_rounds_max"] == rounds

    in_time(main)


def test_the_slowest_newcomer_counts_unless_it_gave_up() -> None:
    async def main() -> None:
        world = SketchedWorld(4, founders=1)
        world.machines[3].spoil = lambda node: None
        world.on(0, 1, 2, 3)
        await world.commit(0, b"one", 1, [0, 1])
        await world.commit(0, b"two", 2, [0, 1])
        assert world.summary()["join_rounds_max"] == 2
        world.off(2)
        assert world.summary()["join_rounds_max"] == 1
        world.on(2)
        await world.commit(0, b"three", 3, [0, 1, 2])
        assert world.summary()["join_rounds_max"] == 3, "counted from its first start"

    in_time(main)


# --- bytes, mixes, time -----------------------------------------------------------------------------------------


def test_bytes_of_all_lives_count_and_the_busiest_interval_is_the_peak() -> None:
    async def main() -> None:
        world = SketchedWorld(2, founders=2)
        first, second = world.on(0, 1)
        for sent in (100, 500, 600):
            await trio.sleep(10)
            first.traffic.bytes_sent = sent
            second.traffic.bytes_sent = sent
            world.metrics.sample(0, "")
        world.off(0)
        (again,) = world.on(0)
        again.traffic.bytes_sent = 50
        sample = world.metrics.sample(0, "")
        assert sample.bytes_sent == [650, 600]
        assert world.summary()["bytes_per_node"] == 625
        assert world.summary()["bytes_per_s_peak"] == 40  # 400 bytes in 10 s, each

    in_time(main)


def test_mixes_are_per_time_that_a_machine_was_up() -> None:
    async def main() -> None:
        world = SketchedWorld(2, founders=2)
        first, second = world.on(0, 1)
        await trio.sleep(10)
        world.metrics.sample(0, "")
        first.exchanger.mixes, second.exchanger.mixes, second.exchanger.mixes_failed = 4, 2, 2
        world.off(1)
        await trio.sleep(10)
        world.metrics.sample(0, "")
        first.exchanger.mixes = 8
        world.network.deliveries, world.network.messages = 240, 120
        found = world.summary()
        assert found["up_share"] == 0.75  # 30 of 40 s
        assert found["mixes_per_node"] == pytest.approx(10 * 20 / 30)
        assert found["mix_failure_share"] == 2 / 12
        assert found["deliveries_per_node_s"] == 8
        assert found["deliveries_per_node_round"] == 20
        assert found["messages"] == 120

    in_time(main)


def test_a_sample_says_what_each_machine_knows() -> None:
    async def main() -> None:
        world = SketchedWorld(3, founders=3)
        (first,) = world.on(0, weights=1.0, loss=2.0)
        (third,) = world.on(2, weights=3.0, loss=math.nan)
        first.members.alive = lambda now_s: ["peer-2"]
        first.merger.head_height, third.trainer.step = 4, 30
        await trio.sleep(5)
        sample = world.metrics.sample(7, "wide")
        assert (sample.seed, sample.variant, sample.at_s, sample.up) == (7, "wide", 5.0, 2)
        assert sample.seen == [2, None, 1]
        assert sample.step == [0, None, 30]
        assert sample.loss == [2.0, None, None], "what is not finite is left out"
        assert sample.height == [4, None, 0]
        assert sample.dispersion == pytest.approx(0.5)
        assert sample.accuracy == []

    in_time(main)


def test_losses_at_the_end() -> None:
    async def main() -> None:
        world = SketchedWorld(3, founders=3)
        assert math.isnan(world.summary()["final_loss"])
        world.on(0, loss=1.0)
        world.on(2, loss=4.0)
        found = world.summary()
        assert (found["final_loss"], found["loss_spread"]) == (2.5, 3.0)

    in_time(main)


# --- dispersion -------------------------------------------------------------------------------------------------


def test_dispersion_is_the_distance_from_the_mean_over_its_norm() -> None:
    models = [torch.tensor([3.0, 4.0]) + torch.tensor(offset) for offset in ([1.0, 0.0], [-1.0, 0.0])]
    assert dispersion(models) == pytest.approx(1 / 5)
    assert dispersion([1000 * model for model in models]) == pytest.approx(1 / 5)
    assert dispersion(models[:1]) == dispersion([]) == dispersion([models[0]] * 5) == 0.0


def test_models_around_nothing_are_infinitely_far_apart() -> None:
    assert dispersion([torch.tensor([1.0]), torch.tensor([-1.0])]) > 1e9
