"""One-byte mode in virtual time: whatever happens to nodes and network, who lives holds the same bits in the end."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator

import pytest
import trio

from gossip.messages import LOG_PROTOCOL, Push
from gossip.record_archive import OWN
from gossip.record_batches import make
from netsim.network import open_sim_network
from netsim.record_learner import sketched_learner
from netsim.world import Machine, World
from node.one_byte_node import OneByteNode
from p2p.errors import TransportError
from p2p.frames import send_message
from p2p.limits import DEFAULT_LIMITS, Limits
from training.one_byte import OneByteLearner, RecordRun
from training.run_spec import RunSpec, parse_run_spec, run_id, spec_as_toml

SPEC = parse_run_spec("""
name = "one-byte-world"
init = "shared"
[train]
steps = 400
[one_byte]
step_size = 1e-3
batch_records = 16
batch_s_max = 5
snapshot_records = 0
""")
SNAPPING = parse_run_spec(spec_as_toml(SPEC).replace("snapshot_records = 0", "snapshot_records = 300"))


FOLDERS = ("records", "checkpoints", "")
"""Of a node's disk."""


def learners(spec: RunSpec):
    def build(machine: Machine) -> OneByteLearner:
        return sketched_learner(spec, run_id(spec), machine.peer)

    return build


@contextlib.asynccontextmanager
async def world(
    seed: int, machines: int, spec: RunSpec = SPEC, limits: Limits = DEFAULT_LIMITS
) -> AsyncIterator[World]:
    async with (
        open_sim_network(random.Random(seed), limits=limits) as network,
        trio.open_nursery() as nursery,
    ):
        one = World(network, nursery, spec=spec, seed=seed, learners=learners(spec))
        for _ in range(machines):
            one.add_machine()
        yield one
        nursery.cancel_scope.cancel()


def nodes(world: World) -> list[OneByteNode]:
    return [machine.node for machine in world.up() if isinstance(machine.node, OneByteNode)]


async def all_finish(world: World, *, within_s: float) -> set[bytes]:
    """Wait until every node that is up has finished; returns their state hashes."""
    with trio.fail_after(within_s):
        for node in nodes(world):
            await node.wait_finished()
    return {node.learner.digest() for node in nodes(world)}


async def test_a_swarm_learns_to_the_end_and_holds_the_same_bits(autojump_clock: object) -> None:
    async with world(1, 4) as one:
        await one.start_all()
        hashes = await all_finish(one, within_s=120)
        assert len(hashes) == 1
        assert all(node.logs.records == 4 * 400 for node in nodes(one))
        assert all(node.diverged is None for node in nodes(one))
        node = nodes(one)[0]
        found = await node.keeper.verify()
        assert found.comes_back
        assert found.damaged == []
        disk = one.machines[0].disk
        segment = next(path for path, _ in await disk.list("records") if path != OWN)
        for path in (segment, OWN):
            whole = await disk.read(path)
            await disk.write_atomic(path, whole[:-1] + bytes([whole[-1] ^ 1]))
        found = await node.keeper.verify()
        assert found.damaged == [segment, OWN]
        assert found.comes_back, "what is in memory is sound"
        node.learner.state.values[3] += 1
        assert not (await node.keeper.verify()).comes_back


@pytest.mark.parametrize("seed", range(20, 23))
async def test_a_step_that_halves_between_a_probe_and_its_batch_halves_for_all(
    autojump_clock: object, seed: int
) -> None:
    """A record is applied here before its batch is begun; what arrives meanwhile must not move the batch's clock."""
    halvings = list(range(40, 1240, 40))
    spec = parse_run_spec(spec_as_toml(SPEC).replace("halvings = []", f"halvings = {halvings}"))
    async with world(seed, 4, spec) as one:
        await one.start_all()
        assert len(await all_finish(one, within_s=300)) == 1
        assert all(node.diverged is None for node in nodes(one))


async def test_a_killed_node_goes_on_with_its_log_where_it_ended(autojump_clock: object) -> None:
    async with world(2, 4) as one:
        await one.start_all()
        await trio.sleep(6)
        victim = nodes(one)[1]
        log, made = victim.author.log, victim.logs.head(victim.author.log)
        one.kill(1)
        await trio.sleep(3)
        again = await one.start(1)
        assert isinstance(again, OneByteNode)
        await trio.sleep(1)
        assert again.author.log == log
        after = again.logs.head(log)
        assert made is not None
        assert after is not None
        assert after.number >= made.number
        assert again.logs._batches[made.name].number == made.number - 1
        assert len(await all_finish(one, within_s=120)) == 1
        assert not any(head.forked for head in again.logs.heads())


async def test_a_node_that_lost_its_records_opens_another_log(autojump_clock: object) -> None:
    async with world(3, 3) as one:
        await one.start_all()
        await trio.sleep(6)
        log = nodes(one)[1].author.log
        one.kill(1)
        for path, _ in await one.machines[1].disk.list("records"):
            await one.machines[1].disk.delete(path)
        again = await one.start(1)
        assert isinstance(again, OneByteNode)
        await trio.sleep(1)
        assert again.author.log != log
        assert len(await all_finish(one, within_s=120)) == 1
        assert not any(head.forked for head in again.logs.heads())


async def test_a_disk_put_back_from_a_backup_is_no_fork(autojump_clock: object) -> None:
    async with world(14, 3) as one:
        await one.start_all()
        await trio.sleep(6)
        disk = one.machines[1].disk
        backup = {path: data for folder in FOLDERS for path, data in disk.files_in(folder).items()}
        log = nodes(one)[1].author.log
        await trio.sleep(6)
        one.kill(1)
        for folder in FOLDERS:
            for path in disk.files_in(folder):
                await disk.delete(path)
        for path, data in backup.items():
            await disk.write_atomic(path, data)
        peers = [machine.peer for machine in one.machines]
        cut = one.network.cut([peers[1]], [peers[0], peers[2]])
        again = await one.start(1)
        assert isinstance(again, OneByteNode)
        await trio.sleep(4)
        one.network.heal([cut])
        assert len(await all_finish(one, within_s=120)) == 1
        assert again.author.log != log
        assert not any(head.forked for head in again.logs.heads())


async def test_in_a_crowd_there_is_room_for_a_newcomer(autojump_clock: object) -> None:
    """All slots of all seven are taken; whoever has nothing to say to a neighbour is to let it go."""
    async with world(13, 8, limits=Limits(peers_max=6, links_target=3)) as one:
        await one.start(0)
        for number in range(1, 7):
            await one.start(number, bootstrap=0)
        await trio.sleep(40)
        assert all(len(node.runtime.transport.peers()) > 2 for node in nodes(one))
        newcomer = await one.start(7, bootstrap=0)
        assert isinstance(newcomer, OneByteNode)
        with trio.fail_after(120):
            while newcomer.logs.records < 7 * 400:
                await trio.sleep(1)


async def test_two_halves_that_were_cut_off_end_with_the_same_bits(autojump_clock: object) -> None:
    async with world(4, 6) as one:
        await one.start_all()
        await trio.sleep(3)
        peers = [machine.peer for machine in one.machines]
        cut = one.network.cut(peers[:3], peers[3:])
        await trio.sleep(60)
        assert len({node.logs.digest() for node in nodes(one)}) == 2
        one.network.heal([cut])
        await trio.sleep(30)
        assert len(await all_finish(one, within_s=120)) == 1
        assert nodes(one)[0].logs.records == 6 * 400


async def test_a_newcomer_replays_what_it_missed(autojump_clock: object) -> None:
    async with world(5, 4) as one:
        for number in range(3):
            await one.start(number, bootstrap=0 if number else None)
        await trio.sleep(30)
        await one.start(3, bootstrap=1)
        await trio.sleep(5)
        assert nodes(one)[3].applied.records >= 3 * 400
        assert len(await all_finish(one, within_s=120)) == 1


async def forge(liar: OneByteNode, told: list[OneByteNode]) -> None:
    """Another batch in the place of our last one, for some to see."""
    last = liar.logs.last(liar.author.log)
    assert last is not None
    before = None if last.previous is None else liar.logs._batches[last.previous]
    packed = make(liar.run_id, liar.runtime.signer, before, last.incarnation, last.clock, b"\x7f" * 5)
    for node in told:
        with contextlib.suppress(TransportError):
            stream = await liar.runtime.transport.open_stream(node.local, LOG_PROTOCOL)
            await send_message(stream, Push(batches=[packed]))


async def test_a_peer_that_tells_two_histories_ends_alone(autojump_clock: object) -> None:
    async with world(6, 5) as one:
        await one.start_all()
        await trio.sleep(15)
        liar, *honest = nodes(one)
        await forge(liar, honest[:2])
        await trio.sleep(20)
        one.kill(0)
        assert len(await all_finish(one, within_s=200)) == 1
        assert all(node.logs.head(liar.author.log).forked for node in honest)
        assert all(
            liar.local in node.ledger.refusals or node.ledger.refusals["equivocation"] for node in honest
        )


async def test_snapshots_are_certified_and_batches_below_them_let_go_of(autojump_clock: object) -> None:
    longer = parse_run_spec(spec_as_toml(SNAPPING).replace("steps = 400", "steps = 1200"))
    async with world(7, 4, longer) as one:
        await one.start_all()
        assert len(await all_finish(one, within_s=300)) == 1
        await trio.sleep(60)
        for node in nodes(one):
            certified = node.snapshots.certified
            assert certified is not None
            assert certified.snapshot.records >= 4500
            assert len(certified.certificate.votes) >= 2
            assert sum(len(batch.records) for batch in node.logs.counting()) < 2400
            assert node.logs.records == 4 * 1200
            found = await node.keeper.verify()
            assert found.comes_back
            assert found.counts_alike
            assert found.settled > 0


async def test_a_newcomer_begins_from_a_snapshot(autojump_clock: object) -> None:
    async with world(8, 5, SNAPPING) as one:
        for number in range(4):
            await one.start(number, bootstrap=0 if number else None)
        await trio.sleep(60)
        newcomer = await one.start(4, bootstrap=1)
        assert isinstance(newcomer, OneByteNode)
        await trio.sleep(10)
        assert newcomer.applied.records >= 4 * 400
        assert sum(len(batch.records) for batch in newcomer.logs.counting()) < 1000
        assert len(await all_finish(one, within_s=120)) == 1
        fresh = sketched_learner(SNAPPING, run_id(SNAPPING), "anybody")
        assert newcomer.learner.digest() != fresh.digest()


async def test_a_node_restarts_from_what_it_kept_above_a_snapshot(autojump_clock: object) -> None:
    async with world(9, 3, SNAPPING) as one:
        await one.start_all()
        await trio.sleep(60)
        assert nodes(one)[1].keeper.archive.base is not None
        one.kill(1)
        for path, _ in await one.machines[1].disk.list("checkpoints"):
            await one.machines[1].disk.delete(path)
        await trio.sleep(2)
        await one.start(1)
        await trio.sleep(5)
        assert len(await all_finish(one, within_s=120)) == 1


async def test_a_false_snapshot_finds_no_votes(autojump_clock: object) -> None:
    async with world(10, 4, SNAPPING) as one:
        await one.start_all()
        liar = nodes(one)[0]
        honest_state = liar.learner.state_without
        liar.learner.state_without = lambda gone: bytes(len(honest_state(gone)))  # type: ignore[method-assign]
        await all_finish(one, within_s=300)
        await trio.sleep(60)
        for node in nodes(one)[1:]:
            assert node.snapshots.certified is not None
            votes = node.snapshots.certified.certificate.votes
            assert all(liar.local.encode() not in packed for packed in votes)
        assert sum(node.ledger.refusals["false-snapshot"] for node in nodes(one)) > 0


# --- everything at once -----------------------------------------------------------------------------------------------


async def live_through(seed: int, spec: RunSpec = SPEC) -> None:
    """A minute and a half of faults, drawn from the seed, and a liar; then calm, and all must hold the same bits."""
    rng = random.Random(seed)
    count = rng.randint(3, 7)
    async with world(seed, count, spec) as one:
        await one.start_all()
        liar = rng.randrange(1, count) if rng.random() < 0.7 else None
        cuts = []
        for _ in range(rng.randint(4, 14)):
            await trio.sleep(rng.uniform(0.2, 12))
            number = rng.randrange(count)
            up = one.machines[number].node is not None
            match rng.choice(["kill", "power", "leave", "cut", "heal", "break", "fork", "start", "lose"]):
                case "kill" if up:
                    one.kill(number)
                case "power" if up:
                    one.power_cut(number)
                case "leave" if up:
                    await one.leave(number)
                case "cut":
                    peers = [machine.peer for machine in one.machines]
                    rng.shuffle(peers)
                    half = rng.randint(1, count - 1)
                    cuts.append(one.network.cut(peers[:half], peers[half:], one_way=rng.random() < 0.3))
                case "heal" if cuts:
                    one.network.heal([cuts.pop()])
                case "break" if up:
                    one.network.break_all(one.machines[number].peer)
                case "fork" if liar is not None and one.machines[liar].node is not None:
                    node = one.machines[liar].node
                    assert isinstance(node, OneByteNode)
                    if node.logs.last(node.author.log) is not None:
                        others = [other for other in nodes(one) if other is not node]
                        await forge(node, rng.sample(others, rng.randint(0, len(others))))
                case "start" if not up:
                    one.switch_on(number)
                case "lose" if not up:
                    for path, _ in await one.machines[number].disk.list("records"):
                        await one.machines[number].disk.delete(path)
        one.network.heal(cuts)
        for machine in one.machines:
            if machine.node is None and machine.number != liar and not machine.wanted:
                await machine.ended.wait()
                one.switch_on(machine.number)
        if liar is not None and one.machines[liar].node is not None:
            one.kill(liar)
        await trio.sleep(60)
        hashes = await all_finish(one, within_s=1800)
        assert len(hashes) == 1, {node.local[-4:]: node.learner.digest().hex()[:8] for node in nodes(one)}
        if spec is SPEC:
            fresh = sketched_learner(SPEC, run_id(SPEC), "anybody")
            counting = nodes(one)[0].logs.counting()
            fresh.apply([RecordRun(b.log, b.first, b.clock, b.records) for b in counting])
            assert hashes == {fresh.digest()}
        assert all(node.diverged is None for node in nodes(one))


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_happens_all_end_with_the_same_bits(autojump_clock: object, seed: int) -> None:
    await live_through(seed)


@pytest.mark.parametrize("seed", range(200, 206))
async def test_whatever_happens_snapshots_or_not(autojump_clock: object, seed: int) -> None:
    await live_through(seed, SNAPPING)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
async def test_whatever_happens_200_times(autojump_clock: object, seed: int) -> None:
    await live_through(seed, SNAPPING)
