"""The checkers in small worlds: silent while promises are kept, whatever happens, and each tells what it is there for.

Mistakes of the product are planted in ``tests/sim``; here they are made by hand in a running world, where that is
enough, and what must not be taken for one happens.
"""

import msgspec
import pytest
import torch
import trio

from gossip.store import FOLDER as SHARDS
from netsim.attackers import ATTACKERS
from netsim.checkers import task_census
from netsim.checkers.swarm import COMMIT_S, OFF_S
from netsim.world import World
from node.checkpoints import FOLDER as CHECKPOINTS
from node.life import PATH as NODE_STATE
from tests.netsim.checked_world import SPEC, Script, caught, simulate, with_merge
from training.run_spec import RunSpec
from training.spec_sections import NesterovSpec, PhaseSpec, ScheduleSpec

OFTEN = msgspec.structs.replace(
    SPEC, schedule=ScheduleSpec(preset="custom", phases=(PhaseSpec(until=1.0, merges=60),))
)
"""A merge every ten seconds."""
BY_UPDATES = msgspec.structs.replace(OFTEN, init="shared", outer=NesterovSpec(wire="e3m0"))
"""The same, and they move the weights that all begin with, by what members send in four bits."""
STREAMED = msgspec.structs.replace(OFTEN, outer=NesterovSpec(wire="int8", streaming=True))
"""The first one averages weights; the others move a fragment each."""


def everybody(world: World, besides: int) -> list[int]:
    return [machine.number for machine in world.machines if machine.number != besides][:3]


async def restart(world: World, number: int) -> None:
    await world.machines[number].ended.wait()
    await world.switch_on(number, bootstrap=everybody(world, number)).wait()


# --- nothing is wrong ---------------------------------------------------------------------------------------------


async def calm(world: World) -> None:
    await world.start_all()
    await trio.sleep(130)
    world.core = (0, 1, 2, 3)
    await trio.sleep(60)


async def deaths_and_returns(world: World) -> None:
    await world.start_all()
    await trio.sleep(35)
    world.kill(1)
    world.power_cut(2)
    await trio.sleep(10)
    await restart(world, 1)
    await restart(world, 2)
    await trio.sleep(20)
    await world.leave(3)
    world.machines[3].disk.power_cut()
    await restart(world, 3)
    await trio.sleep(30)


async def rot(world: World) -> None:
    """Every kind of file rots while its machine is off."""
    await world.start_all()
    await trio.sleep(45)
    for number, folder in enumerate(("", CHECKPOINTS, "merges", SHARDS)):
        disk = world.machines[number].disk
        world.kill(number)
        for path in disk.files_in(folder):
            if folder != CHECKPOINTS or path == max(disk.files_in(folder)):
                disk.flip_bit(path, len(await disk.read(path)) // 2)
        await restart(world, number)
        await trio.sleep(15)
    await trio.sleep(30)


async def a_long_partition(world: World) -> None:
    """Each side counts the other as absent, both commit, and one branch wins."""
    await world.start_all()
    await trio.sleep(35)
    world.calm_since_s = None
    left, right = ([machine.peer for machine in world.machines[half::2]] for half in range(2))
    world.network.cut(left, right)
    await trio.sleep(150)
    heads = {machine.node.merger.head for machine in world.machines if machine.node is not None}
    assert len(heads) == 2
    world.network.heal()
    world.calm_since_s = trio.current_time()
    await trio.sleep(60)
    world.core = (0, 1, 2, 3)
    await trio.sleep(30)


async def a_full_disk(world: World) -> None:
    await world.start_all()
    await trio.sleep(30)
    world.calm_since_s = None
    world.machines[1].disk.capacity_bytes = 0
    await trio.sleep(40)
    world.kill(1)
    world.machines[1].disk.capacity_bytes = 1 << 30
    await restart(world, 1)
    await trio.sleep(40)


@pytest.mark.parametrize("spec", [OFTEN, BY_UPDATES, STREAMED], ids=["weights", "updates", "streamed"])
@pytest.mark.parametrize("script", [calm, deaths_and_returns, rot, a_long_partition, a_full_disk])
def test_the_checkers_are_silent_while_promises_are_kept(script: Script, spec: RunSpec) -> None:
    assert simulate(script, spec=spec) == []


def test_those_who_begin_alike_merge_by_updates_from_the_first_on() -> None:
    by_update: dict[int, bool] = {}

    async def script(world: World) -> None:
        node = (await world.start_all())[0]
        for _ in range(45):
            await trio.sleep(1)
            if committed := node.merger.head_record:
                by_update[committed.record.height] = bool(committed.record.updates)

    for spec, first in ((BY_UPDATES, True), (STREAMED, False)):
        by_update.clear()
        assert simulate(script, spec=spec) == []
        assert [by_update[height] for height in (1, 2, 3)] == [first, True, True]


# --- something is -------------------------------------------------------------------------------------------------


async def weights_overwritten(world: World) -> None:
    node = (await world.start_all())[1]
    await trio.sleep(5)
    node.trainer._live[3] = float("nan")  # type: ignore[attr-defined]
    await trio.sleep(20)


async def anchor_overwritten(world: World) -> None:
    node = (await world.start_all())[1]
    await trio.sleep(45)
    assert node.merge_host.anchor is not None
    node.merge_host.anchor[3] += 1.0
    await trio.sleep(1)


async def shard_overwritten(world: World) -> None:
    await world.start_all()
    await trio.sleep(45)
    disk = world.machines[1].disk
    await disk.write_atomic(next(iter(disk.files_in(SHARDS))), b"something else")


async def checkpoints_lost(world: World) -> None:
    await world.start_all()
    await trio.sleep(45)
    disk = world.machines[1].disk
    for path in disk.files_in(CHECKPOINTS):
        await disk.delete(path)
    world.kill(1)


async def state_restored_from_a_backup(world: World) -> None:
    await world.start_all()
    backup = await world.machines[1].disk.read(NODE_STATE)
    world.kill(1)
    await restart(world, 1)
    world.kill(1)
    await world.machines[1].disk.write_atomic(NODE_STATE, backup)
    await restart(world, 1)


async def chain_lost(world: World) -> None:
    await world.start_all()
    await trio.sleep(45)
    disk = world.machines[1].disk
    world.kill(1)
    for path in disk.files_in("merges/records"):
        await disk.delete(path)
    await restart(world, 1)
    await trio.sleep(1)


async def step_back(world: World) -> None:
    node = (await world.start_all())[1]
    await trio.sleep(20)
    node.trainer.step -= 50  # type: ignore[misc]
    await trio.sleep(5)


async def members_forgotten(world: World) -> None:
    nodes = await world.start_all()
    nodes[1].members.heard = lambda *_: None  # type: ignore[method-assign]
    await trio.sleep(130)


async def the_dead_remembered(world: World) -> None:
    nodes = await world.start_all()
    await trio.sleep(20)
    nodes[1].members.alive = lambda now_s: [node.local for node in nodes[2:]]  # type: ignore[method-assign]
    world.kill(2)
    await trio.sleep(OFF_S + 10)


async def a_ban(world: World) -> None:
    nodes = await world.start_all()
    await trio.sleep(5)
    for _ in range(30):
        nodes[1].ledger.note(nodes[2].local, "stall")
    await trio.sleep(1)


async def a_slander(world: World) -> None:
    nodes = await world.start_all()
    await trio.sleep(5)
    nodes[1].ledger.note(nodes[2].local, "hash", "a chunk")
    nodes[1].ledger.note(nodes[3].local, "not-held")
    await trio.sleep(10)


async def a_process_that_stays(world: World) -> None:
    nodes = await world.start_all()

    async def linger() -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep(20)

    nodes[1].merger._nursery.start_soon(linger)
    await trio.sleep(1)
    world.kill(1)
    await trio.sleep(15)


async def merges_that_never_come(world: World) -> None:
    for node in await world.start_all():
        node.merger._propose = trio.sleep_forever  # type: ignore[method-assign]
    await trio.sleep(60 + COMMIT_S + 40)


async def a_core_that_never_agrees(world: World) -> None:
    nodes = await world.start_all()
    await trio.sleep(15)
    nodes[1].merger._chain.head = b"x" * 32
    world.core = (0, 1)
    await trio.sleep(1)


@pytest.mark.parametrize(
    ("script", "checker"),
    [
        (weights_overwritten, "finite"),
        (anchor_overwritten, "equal-bits"),
        (shard_overwritten, "hashes"),
        (checkpoints_lost, "checkpoints"),
        (state_restored_from_a_backup, "monotonic"),
        (chain_lost, "monotonic"),
        (step_back, "monotonic"),
        (members_forgotten, "membership"),
        (the_dead_remembered, "membership"),
        (a_ban, "honest-not-banned"),
        (a_slander, "honest-not-banned"),
        (a_process_that_stays, "leaks"),
        (merges_that_never_come, "progress"),
        (a_core_that_never_agrees, "agreement-at-the-end"),
    ],
)
def test_each_checker_tells_what_it_is_there_for(script: Script, checker: str) -> None:
    assert checker in caught(simulate(script, spec=OFTEN))


def test_hostile_machines_are_not_held_to_anything() -> None:
    async def script(world: World) -> None:
        world.machines[3].spoil = lambda node: None
        nodes = await world.start_all()
        await trio.sleep(20)
        nodes[3].trainer.step -= 50  # type: ignore[misc]
        nodes[3].ledger.note(nodes[2].local, "hash")
        nodes[2].ledger.note(nodes[3].local, "hash")
        await trio.sleep(20)

    assert simulate(script, spec=OFTEN) == []


def test_a_hostile_owner_that_nobody_can_refute_is_no_mistake_of_the_product() -> None:
    """With one owner for each fragment, a member that sums wrongly is believed; with two it is not."""

    async def script(world: World) -> None:
        world.machines[3].spoil = ATTACKERS["wrong-sums"].spoil
        await world.start_all()
        await trio.sleep(45)
        spoiled.update(m.node.merger.head_height for m in world.machines[:3] if m.node is not None)

    for replicas in (1, 2):
        spoiled: set[int] = set()
        assert simulate(script, spec=with_merge(OFTEN, replicas=replicas)) == []
        assert min(spoiled) > 1


def test_looking_changes_nothing() -> None:
    """The same seed ends in the same weights with checkers and without."""
    ends = []

    async def script(world: World) -> None:
        await deaths_and_returns(world)
        weights = torch.cat([m.node.trainer.read() for m in world.machines if m.node is not None])
        ends.append((weights.numpy().tobytes(), world.network.deliveries, trio.current_time()))

    simulate(script, spec=OFTEN)
    simulate(script, spec=OFTEN, checked=False)
    assert ends[0] == ends[1]


async def test_tasks_that_outlive_a_world_are_counted() -> None:
    told: list[tuple[str, str, int | None]] = []
    async with trio.open_nursery() as nursery:
        with task_census(lambda *failure: told.append(failure)):
            pass
        assert told == []
        with task_census(lambda *failure: told.append(failure)):
            nursery.start_soon(trio.sleep_forever)
        nursery.cancel_scope.cancel()
    assert told == [("leaks", "1 tasks outlive the world", None)]
