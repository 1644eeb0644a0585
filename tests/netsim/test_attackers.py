"""Every hostile member of the registry, among honest members on quadratics: without effect, and told from them.

With real models: ``test_hostile_members``.
"""

import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
import pytest
import torch
import trio

from gossip.ledger import STANDING_MAX
from gossip.messages import Notice
from netsim.attackers import ATTACKERS
from netsim.determinism import SimClock, deterministic_scheduling
from netsim.network import open_sim_network
from netsim.quadratic import Quadratic, QuadraticProblem
from netsim.world import LearnerFactory, Machine, World
from node.gossip_node import GossipNode
from p2p.codec import decode
from tests.conftest import Entries
from tests.netsim.test_world import anchors, finished, until
from training.run_spec import RunSpec, parse_run_spec, run_id
from training.spec_sections import NesterovSpec

HONEST = 4
WORLDS_MAX = 16
"""In which a lie may come to nothing, one after the other, before one must show that it is told from the truth."""
SPEC = parse_run_spec("""
name = "besieged"
[train]
steps = 800
[exchange]
every_steps = 10
fragments = 2
[schedule]
preset = "custom"
phases = [{ until = 1.0, merges = 4 }]
[merge]
replicas = 2
wait_s_max = 20
period_s = 10
""")
BY_UPDATES = msgspec.structs.replace(SPEC, outer=NesterovSpec(wire="fp32"))
"""All merges but the first go by differences."""
MAY_HAPPEN = {"not-held", "broken", "banned", "refused"}
"""What a member may be noted for that some have banned and others not yet."""


def quadratics(spec: RunSpec) -> LearnerFactory:
    """What the machines of these tests learn."""
    # All want the same: a fifth member with wishes of its own would draw the mean off without telling any lie.
    problem = QuadraticProblem(heterogeneity=0.0)

    def build(machine: Machine) -> Quadratic:
        return Quadratic(
            spec, problem, run=run_id(spec), peer=machine.peer, part=(machine.number + 1, HONEST)
        )

    return build


@contextlib.asynccontextmanager
async def besieged_world(seed: int, spec: RunSpec = SPEC) -> AsyncIterator[World]:
    """Honest machines on one quadratic, all off."""
    async with open_sim_network(random.Random(seed)) as network, trio.open_nursery() as nursery:
        world = World(network, nursery, spec=spec, seed=seed, learners=quadratics(spec))
        for _ in range(HONEST):
            world.add_machine()
        yield world
        nursery.cancel_scope.cancel()


async def attack(world: World, name: str) -> Machine:
    """One more member, which is hostile."""
    mallory = world.add_machine()
    mallory.spoil = ATTACKERS[name].spoil
    await world.start(mallory.number, bootstrap=0)
    return mallory


def refusals(nodes: list[GossipNode]) -> Counter[str]:
    return sum((node.ledger.refusals for node in nodes), start=Counter())


def simulated(main: Callable[..., Awaitable[None]], seed: int, *args: object) -> None:
    """Run a whole world: the same history whenever the same code runs."""
    with deterministic_scheduling(seed):
        trio.run(main, seed, *args, clock=SimClock())


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        *((name, SPEC) for name in ATTACKERS),
        *((name, BY_UPDATES) for name in ATTACKERS if name.endswith(("-inputs", "-sums"))),
    ],
    ids=lambda value: value if isinstance(value, str) else value.outer.__struct_config__.tag,
)
def test_honest_members_train_merge_and_agree_beside_it(name: str, spec: RunSpec, told: Entries) -> None:
    """In one world or another: a member that proposes every merge itself shows its contributions to nobody."""
    noted: Counter[str] = Counter()
    reason = ATTACKERS[name].refused_as
    for seed in range(21, 21 + WORLDS_MAX):
        simulated(besieged_by, seed, name, spec, told, noted)
        if noted[reason] or not reason:
            break
    assert bool(noted[reason]) == bool(reason)


async def besieged_by(seed: int, name: str, spec: RunSpec, told: Entries, noted: Counter[str]) -> None:
    attacker = ATTACKERS[name]
    async with besieged_world(seed, spec) as world:
        nodes = await world.start_all()
        await until(lambda: all(node.merges.count for node in nodes), seconds=60)
        mallory = await attack(world, name)
        await until(lambda: finished(nodes), seconds=240)
        noted.update(refusals(nodes))
        assert set(noted) - {attacker.refused_as} <= MAY_HAPPEN
        assert not any(node.ledger.banned(other.local) for node in nodes for other in nodes)
        assert len(anchors(nodes)) == 1
        for node in nodes:
            assert bool(torch.isfinite(node.trainer.read()).all())
            # From 1.3 to 2.2 at the start.
            assert (node.merge_host.anchor - node.trainer.optimum).square().mean() < 0.2
            # Whoever is banned is not asked; a liar may have banned honest members in its turn, and serve them nothing.
            shunned = mallory.node is not None and mallory.node.ledger.standing(node.local) < STANDING_MAX
            assert shunned or node.exchanger.mixes_failed <= node.ledger.refusals.total()
            # At the optimum contributions are noise, and no direction is against those of all others.
            if name != "turned-inputs":
                assert not (name.endswith("-inputs") and mallory.peer in node.merges.last.contributors)

        refused = [entry for entry in told if entry["event"] == "refused" and entry["peer"] == mallory.peer]
        reasons = Counter(entry["reason"] for entry in refused)
        assert reasons[attacker.refused_as] >= noted[attacker.refused_as], "it may refuse itself besides"
        assert not [entry for entry in told if entry["log_level"] in ("error", "critical")]


def test_it_is_as_hostile_in_its_next_life() -> None:
    async def main(seed: int) -> None:
        async with besieged_world(seed) as world:
            nodes = await world.start_all()
            mallory = await attack(world, "nan-fragments")
            await trio.sleep(0.1)
            world.kill(mallory.number)
            assert not refusals(nodes)
            await world.start(mallory.number)
            await until(lambda: bool(refusals(nodes)["non-finite"]), seconds=60)

    simulated(main, 22)


def test_a_replayed_notice_takes_nobody_back_in_time() -> None:
    async def main(seed: int) -> None:
        async with besieged_world(seed) as world:
            nodes = await world.start_all()
            mallory = (await attack(world, "replays")).node
            assert mallory is not None
            newest: dict[tuple[int, str], tuple[int, int]] = {}
            for _ in range(40):
                await trio.sleep(0.5)
                for number, node in enumerate(nodes):
                    for author in node.notices.authors():
                        notice = node.notices.get(author, "heartbeat")
                        assert notice is not None
                        stamp = (notice.incarnation, notice.sequence)
                        assert stamp >= newest.get((number, author), (0, 0))
                        newest[number, author] = stamp
            assert mallory.anti_entropy.rounds > 10
            replies = [
                decode(packed, Notice, bytes_max=1 << 14) for packed in mallory.notices.compare(b"").missing
            ]
            replayed = {notice.author: notice for notice in replies}
            for node in nodes:
                old = replayed[node.local]
                stamps = [stamp for (_, author), stamp in newest.items() if author == node.local]
                assert (old.incarnation, old.sequence) < min(stamps)
            assert not refusals(nodes)

    simulated(main, 23)


def test_a_member_of_another_run_is_sent_away() -> None:
    """No attacker of the registry: it follows another invite."""

    async def main(seed: int) -> None:
        other = msgspec.structs.replace(SPEC, name="other-world")
        async with besieged_world(seed) as world:
            nodes = await world.start_all()
            elsewhere = World(
                world.network, world._nursery, spec=other, seed=seed, learners=quadratics(other)
            )
            for _ in range(HONEST + 1):
                elsewhere.add_machine()
            stranger = await elsewhere.start(HONEST, bootstrap=0)
            await until(lambda: bool(refusals(nodes)["wrong-run"]), seconds=60)
            await until(lambda: finished(nodes), seconds=120)
            assert set(refusals(nodes)) == {"wrong-run"}
            assert len(anchors(nodes)) == 1
            assert all(
                node.merges.last.contributors == sorted(other.local for other in nodes) for node in nodes
            )
            assert not any(stranger.local in node.notices.authors() for node in nodes)

    simulated(main, 24)


def test_attackers_are_named_and_told_in_words_for_people() -> None:
    for name, attacker in ATTACKERS.items():
        assert name == name.lower().replace(" ", "-")
        assert 10 < len(attacker.about) < 110
