"""Hostile members and merely ill ones among honest nodes with real models: refused, and without effect.

Every hostile member of the registry, on cheaper models: ``test_attackers``.
"""

import math
from dataclasses import replace

import msgspec
import pytest
import torch
from trio.testing import MockClock

from netsim.attackers import ATTACKERS
from netsim.world import Machine, World, open_world
from tests.netsim.test_world import SPEC, anchors, finished, small_corpus, until
from training.data import Corpus
from training.learner import SliceReport
from training.spec_sections import PhaseSpec, ScheduleSpec

EARLY = msgspec.structs.replace(
    SPEC,
    train=msgspec.structs.replace(SPEC.train, steps=800),
    schedule=ScheduleSpec(
        preset="custom", phases=(PhaseSpec(until=0.125, merges=1), PhaseSpec(until=1.0, merges=1))
    ),
)
SHORT = msgspec.structs.replace(SPEC, train=msgspec.structs.replace(SPEC.train, steps=200))


async def attack(world: World, name: str) -> Machine:
    """One more member, which is hostile."""
    mallory = world.add_machine()
    mallory.spoil = ATTACKERS[name].spoil
    await world.start(mallory.number, bootstrap=0)
    return mallory


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return small_corpus()


@pytest.mark.parametrize("name", ["huge-fragments", "lopsided-fragments"])
async def test_weights_out_of_proportion_are_not_mixed_in(
    autojump_clock: MockClock, corpus: Corpus, name: str
) -> None:
    reason = ATTACKERS[name].refused_as
    async with open_world(EARLY, corpus, machines=2, seed=11) as world:
        nodes = await world.start_all()
        await until(lambda: all(node.merges.count for node in nodes), seconds=60)
        await attack(world, name)
        await until(lambda: all(node.ledger.refusals[reason] for node in nodes), seconds=60)
        assert max(node.trainer.step for node in nodes) < EARLY.train.steps
        await until(lambda: finished(nodes), seconds=180)
        for node in nodes:
            assert node.exchanger.mixes_failed <= node.ledger.refusals[reason], "who is banned is not asked"
            assert bool(torch.isfinite(node.trainer.read()).all())
        assert len(anchors(nodes)) == 1


@pytest.mark.parametrize("name", ["nan-inputs", "short-inputs", "huge-inputs"])
async def test_weights_that_must_not_be_averaged_are_left_out_of_merges(
    autojump_clock: MockClock, corpus: Corpus, name: str
) -> None:
    reason = ATTACKERS[name].refused_as
    async with open_world(SHORT, corpus, machines=3, seed=13) as world:
        nodes = await world.start_all()
        mallory = await attack(world, name)
        await until(lambda: all(node.merges.count == 2 for node in nodes), seconds=120)
        assert len(anchors(nodes)) == 1
        for node in nodes:
            assert node.merges.last.contributors == sorted(node.local for node in nodes)
            assert set(node.ledger.refusals) <= {reason, "not-held"}
            assert bool(torch.isfinite(node.trainer.read()).all())
        # Whoever proposed all merges without her own weights has shown them to nobody.
        proposers = {node.merger.head_record.record.ballot.proposer for node in nodes}
        assert any(node.ledger.refusals[reason] for node in nodes) or proposers == {mallory.peer}


@pytest.mark.parametrize("loss", [math.nan, 1e30])
async def test_a_loss_that_overflows_once_costs_nobody_its_standing(
    autojump_clock: MockClock, corpus: Corpus, loss: float
) -> None:
    async with open_world(SHORT, corpus, machines=2, seed=14) as world:
        nodes = await world.start_all()
        train = nodes[0].trainer.run_slice
        losses = iter([loss])

        def overflow_once(steps: int) -> SliceReport:
            report = train(steps)
            return replace(report, loss=next(losses, report.loss))

        await until(lambda: nodes[0].trainer.step >= 100, seconds=60)
        nodes[0].trainer.run_slice = overflow_once
        await until(lambda: all(node.merges.count == 2 for node in nodes), seconds=60)
        assert all(node.merges.last.contributors == sorted(node.local for node in nodes) for node in nodes)
        assert all(node.ledger.refusals.total() == 0 for node in nodes)
