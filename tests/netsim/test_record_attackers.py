"""Every hostile member of one-byte mode among honest ones: they hold the same bits, and nobody honest pays for it.

Goal: beside each lie honest members take all their steps, apply each other's records, end in one state, ban none of
their own; and the lie is refused, counted and told where it is an offence.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator

import pytest
import trio

from netsim.determinism import SimClock, deterministic_scheduling
from netsim.network import open_sim_network
from netsim.record_attackers import RECORD_ATTACKERS
from netsim.record_learner import sketched_learner
from netsim.world import World, ed25519_signer
from node.describe import describe
from node.one_byte_node import FINISH_S, OneByteNode
from tests.conftest import Entries
from training.run_spec import parse_run_spec, run_id

HONEST = 4
STEPS = 200
SPEC = parse_run_spec(f"""
name = "one-byte-besieged"
init = "shared"
[train]
steps = {STEPS}
[one_byte]
step_size = 1e-3
batch_records = 16
batch_s_max = 5
snapshot_records = 300
log_allowance = 4096
log_reach = 4096
log_opening_cost = 1024
""")
MAY_HAPPEN = {"not-held", "broken", "banned", "refused", "stall", "not-served", "other-state", "unvouched"}
"""What a member may be noted for that some have banned and others not yet, that is in the middle of something, or that
relies on a snapshot of which others have not heard."""


@contextlib.asynccontextmanager
async def besieged(seed: int, name: str, liars: int = 1) -> AsyncIterator[tuple[World, list[OneByteNode]]]:
    """Honest members, and among the first to start hostile ones."""
    async with open_sim_network(random.Random(seed)) as network, trio.open_nursery() as nursery:
        world = World(
            network,
            nursery,
            spec=SPEC,
            seed=seed,
            learners=lambda machine: sketched_learner(SPEC, run_id(SPEC), machine.peer),
            signer=ed25519_signer,
        )
        for _ in range(HONEST + liars):
            world.add_machine()
        for machine in world.machines[HONEST:]:
            machine.spoil = RECORD_ATTACKERS[name].spoil
        honest = []
        for number in random.Random(seed).sample(range(HONEST + liars), HONEST + liars):
            node = await world.start(number, bootstrap=0 if number else None)
            if world.machines[number].honest:
                assert isinstance(node, OneByteNode)
                honest.append(node)
            await trio.sleep(random.Random(seed).uniform(0, 2))
        yield world, honest
        nursery.cancel_scope.cancel()


async def live_beside(seed: int, name: str, told: Entries, noted: Counter[str]) -> None:
    attacker = RECORD_ATTACKERS[name]
    async with besieged(seed, name) as (world, honest):
        liar = world.machines[HONEST].peer
        with trio.fail_after(300):
            while any(node.step < STEPS for node in honest):
                await trio.sleep(1)
            await trio.sleep(15)
            world.kill(HONEST)
            while not agree(honest):
                await trio.sleep(1)
        noted.update(sum((node.ledger.refusals for node in honest), Counter()))
        fresh = sketched_learner(SPEC, run_id(SPEC), "anybody").digest()
        for node in honest:
            assert node.step == STEPS
            assert node.learner.digest() != fresh
            for other in honest:
                assert not node.ledger.banned(other.local), node.ledger.last_problem(other.local)
                assert node.applied.records_of(other.local) == STEPS, "everybody's records are in the weights"
            assert (await node.keeper.verify()).comes_back
            assert node.diverged is None
            status = describe(node, device="cpu", parameters=1, unit="byte", name="")
            assert status.refusals == dict(node.ledger.refusals)
            assert status.records is not None
            assert status.records.duplicates == node.spread.duplicates
        assert set(noted) - {attacker.refused_as} <= MAY_HAPPEN
        if attacker.refused_as:
            reasons = {
                entry["reason"] for entry in told if entry["event"] == "refused" and entry["peer"] == liar
            }
            assert (attacker.refused_as in reasons) == bool(noted[attacker.refused_as])


def agree(nodes: list[OneByteNode]) -> bool:
    """Whether all hold the same records, and the same bits."""
    if len({node.logs.digest() for node in nodes}) > 1:
        return False
    return len({node.keeper.state_hash for node in nodes}) == 1 and nodes[0].keeper.state_hash is not None


def simulated(seed: int, name: str, told: Entries) -> Counter[str]:
    noted: Counter[str] = Counter()
    with deterministic_scheduling(seed):
        trio.run(live_beside, seed, name, told, noted, clock=SimClock())
    return noted


@pytest.mark.parametrize("name", RECORD_ATTACKERS)
def test_honest_members_learn_and_agree_beside_it(name: str, told: Entries) -> None:
    noted = simulated(36, name, told)
    reason = RECORD_ATTACKERS[name].refused_as
    assert not reason or noted[reason] > 0


@pytest.mark.parametrize(("seed", "name"), [(32, "replayer"), (35, "falling-clock")])
def test_snapshots_that_do_not_hold_one_another_leave_no_two_states(
    seed: int, name: str, told: Entries
) -> None:
    """Worlds in which a later snapshot holds less of one log: some relied on the earlier one, and some did not."""
    simulated(seed, name, told)


@pytest.mark.parametrize("name", ["hollow-vector", "other-state"])
def test_who_says_that_it_is_not_done_holds_nobody_up_for_ever(name: str) -> None:
    async def main(seed: int) -> None:
        async with besieged(seed, name) as (_, honest):
            with trio.fail_after(60 + 2 * FINISH_S):
                for node in honest:
                    await node.wait_finished()
                while not agree(honest):  # who has just heard of the last record has no state to tell of yet
                    await trio.sleep(0.1)

    with deterministic_scheduling(32):
        trio.run(main, 32, clock=SimClock())


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORD_ATTACKERS)
@pytest.mark.parametrize("seed", range(32, 62))
def test_honest_members_learn_and_agree_beside_it_30_times(name: str, seed: int, told: Entries) -> None:
    simulated(seed, name, told)


def test_attackers_are_named_and_told_in_words_for_people() -> None:
    for name, attacker in RECORD_ATTACKERS.items():
        assert name == name.lower().replace(" ", "-")
        assert 10 < len(attacker.about) < 110
