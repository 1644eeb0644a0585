"""Members that meet in pairs: they come together, and a death or a lie costs a meeting and nothing else."""

import statistics
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
import torch
import trio

from gossip.messages import PairReceipt
from netsim.world import World
from node.gossip_node import GossipNode
from node.pairs import MEETING_S_MAX, PairExchanger
from p2p.transport import PeerId
from tests.netsim.checked_world import SPEC, simulate
from training.learner import Learner, SliceReport
from training.spec_sections import ExchangeSpec, PairsSpec

PAIRS = msgspec.structs.replace(SPEC, outer=PairsSpec(), exchange=ExchangeSpec(every_steps=20, wire="fp32"))
"""A step takes a tenth of a second: a meeting every two."""


def pairs_of(node: GossipNode) -> PairExchanger:
    assert isinstance(node.exchanger, PairExchanger)
    return node.exchanger


def spread(world: World) -> float:
    """The variance between the nodes that are up, of where their outer steps begin."""
    starts = torch.stack([pairs_of(machine.node)._start for machine in world.up()])  # type: ignore[arg-type]
    return starts.var(0).mean().item()


def played(script: Callable[[World], Awaitable[None]], *, machines: int = 4, seed: int = 1) -> None:
    assert simulate(script, spec=PAIRS, machines=machines, seed=seed) == []


@pytest.mark.parametrize("machines", [2, 4, 7])
def test_all_meet_and_come_together(machines: int) -> None:
    """Who meets whom is drawn: how often and how close is the median of seven seeds."""
    least: list[int] = []
    left: list[float] = []

    async def script(world: World) -> None:
        nodes = await world.start_all()
        apart = spread(world)
        await trio.sleep(50)
        met = [pairs_of(node).mixes for node in nodes]
        # With an odd number somebody is left over every time.
        least.append(min(met))
        assert sum(met) % 2 == 0
        left.append(spread(world) / apart)
        assert all(pairs_of(node).one_sided == 0 for node in nodes)

    for seed in range(1, 8):
        played(script, machines=machines, seed=seed)
    assert statistics.median(least) >= 8
    assert statistics.median(left) < 0.2


def test_what_the_swarm_holds_in_all_is_not_changed_by_meeting() -> None:
    """Where nothing is learned, the mean of all starts stays where it is."""

    async def script(world: World) -> None:
        nodes = await world.start_all()
        for node in nodes:
            node.trainer.run_slice = idling(node.trainer)  # type: ignore[method-assign]
        await trio.sleep(1)
        for node in nodes:
            pairs_of(node).void_mixes()
        before = torch.stack([pairs_of(node)._start for node in nodes]).mean(0)
        await trio.sleep(45)
        assert min(pairs_of(node).mixes for node in nodes) >= 5
        after = torch.stack([pairs_of(node)._start for node in nodes]).mean(0)
        torch.testing.assert_close(after, before, rtol=0, atol=1e-5)

    played(script)


def idling(learner: Learner) -> Callable[[int], SliceReport]:
    """Steps that lead nowhere."""

    def run_slice(steps: int) -> SliceReport:
        learner.step += steps  # type: ignore[misc]
        return SliceReport(steps, steps, 1.0)

    return run_slice


def test_who_dies_in_a_meeting_costs_the_other_that_meeting_only() -> None:
    async def script(world: World) -> None:
        nodes = await world.start_all()
        await until(lambda: pairs_of(nodes[0])._meeting is not None)
        other = next(m for m in world.machines if m.identity.peer == pairs_of(nodes[0])._meeting.peer)  # type: ignore[union-attr]
        met = pairs_of(nodes[0]).mixes
        world.kill(other.number)
        await until(lambda: pairs_of(nodes[0])._meeting is None, seconds=MEETING_S_MAX + 1)
        await trio.sleep(20)
        assert pairs_of(nodes[0]).mixes > met

    played(script)


def test_a_receipt_that_is_lost_is_counted_by_who_waited_for_it() -> None:
    async def script(world: World) -> None:
        nodes = await world.start_all()
        deaf = pairs_of(nodes[1])
        answer = deaf._on_receipt

        async def without_a_word(peer: PeerId, receipt: PairReceipt) -> PairReceipt:
            await answer(peer, receipt)
            raise trio.BrokenResourceError("the connection broke")

        deaf._on_receipt = without_a_word  # type: ignore[method-assign]
        await until(lambda: sum(pairs_of(node).one_sided for node in nodes) > 0, seconds=60)
        assert deaf.one_sided == 0
        assert deaf.mixes > 0

    played(script, machines=2)


def test_a_receipt_is_given_again_and_stepped_on_once() -> None:
    async def script(world: World) -> None:
        nodes = await world.start_all()
        twice = pairs_of(nodes[1])
        answer, broke = twice._on_receipt, [False]

        async def the_second_time(peer: PeerId, receipt: PairReceipt) -> PairReceipt:
            reply = await answer(peer, receipt)
            broke[0] = not broke[0]
            if broke[0]:
                raise trio.BrokenResourceError("the connection broke")
            return reply

        twice._on_receipt = the_second_time  # type: ignore[method-assign]
        await trio.sleep(40)
        assert [pairs_of(node).one_sided for node in nodes] == [0, 0]
        assert pairs_of(nodes[0]).mixes == twice.mixes > 3

    played(script, machines=2)


@pytest.mark.parametrize(
    ("spoiled", "code"),
    [
        (lambda values: values * torch.nan, "non-finite"),
        (lambda values: values * 1e6, "norm"),
        (lambda values: values[:-1], "shape"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(
    spoiled: Callable[[torch.Tensor], torch.Tensor], code: str
) -> None:
    async def script(world: World) -> None:
        nodes = await world.start_all()
        hostile = pairs_of(nodes[1])
        honest = hostile._codec

        class Spoiling:
            size_bytes, decode = honest.size_bytes, honest.decode

            def encode(self, values: torch.Tensor) -> bytes:
                return honest.encode(spoiled(values))

        hostile._codec = Spoiling()  # type: ignore[assignment]
        await until(lambda: nodes[0].ledger.refusals[code] > 0, seconds=60)
        assert pairs_of(nodes[0]).mixes == 0

    assert {failure.checker for failure in simulate(script, spec=PAIRS, machines=2)} <= {"honest-not-banned"}


@pytest.mark.parametrize("receipt", ["of-another", "unsigned"])
def test_a_receipt_that_proves_nothing_is_not_stepped_on(receipt: str) -> None:
    async def script(world: World) -> None:
        nodes = await world.start_all()
        liar = pairs_of(nodes[1])
        honest = liar._receipt

        def forged(meeting: Any) -> PairReceipt:
            true = honest(meeting)
            if receipt == "unsigned":
                return msgspec.structs.replace(true, signature=bytes(64))
            claim = msgspec.structs.replace(true.claim, held=true.claim.brought)
            return msgspec.structs.replace(true, claim=claim)

        liar._receipt = forged  # type: ignore[method-assign]
        await trio.sleep(30)
        assert pairs_of(nodes[0]).mixes == 0

    assert {failure.checker for failure in simulate(script, spec=PAIRS, machines=2)} <= {"honest-not-banned"}


async def until(condition: Callable[[], bool], *, seconds: float = 30) -> None:
    with trio.fail_after(seconds):
        while not condition():
            await trio.sleep(0.01)
