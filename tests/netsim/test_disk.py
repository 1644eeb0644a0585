"""The simulated disk: what a process sees, what a power cut leaves, and the faults of real disks."""

import errno
import random
from collections import Counter

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from gossip.disk import Disk
from netsim.determinism import SimClock
from netsim.disk import SimDisk
from node.checkpoints import Checkpoints

OLD, NEW = b"old bytes", b"the new ones"


def run(function, *args):
    return trio.run(function, *args, clock=SimClock())


async def found_after_a_cut(seed: int, sync_after: str | None = None) -> bytes | None:
    """What is in a file that was durable, then replaced without sync, once the power was cut."""
    disk = SimDisk(rng=random.Random(seed))
    await disk.write_atomic("folder/file", OLD)
    await disk.write_atomic("folder/file", NEW, sync=False)
    if sync_after is not None:
        await disk.write_atomic(sync_after, b"x")
    disk.power_cut()
    try:
        return await disk.read("folder/file")
    except FileNotFoundError:
        return None


# --- what a process sees ------------------------------------------------------------------------------------------


async def test_it_is_a_disk() -> None:
    disk: Disk = SimDisk(capacity_bytes=100)
    await disk.write_atomic("b/2", b"22")
    await disk.write_atomic("b/1", memoryview(b"1"), sync=False)
    await disk.write_atomic("b/c/3", b"333")
    assert await disk.list("b") == [("b/1", 1), ("b/2", 2)]
    assert await disk.list("nowhere") == []
    assert await disk.read("b/1") == b"1"
    assert await disk.free_bytes() == 94
    await disk.delete("b/2")
    await disk.delete("b/2")
    assert await disk.list("b") == [("b/1", 1)]
    assert await disk.free_bytes() == 96
    with pytest.raises(FileNotFoundError):
        await disk.read("b/2")


async def test_a_file_needs_room_beside_the_one_it_replaces() -> None:
    disk = SimDisk(capacity_bytes=20)
    await disk.write_atomic("file", bytes(12))
    with pytest.raises(OSError) as raised:
        await disk.write_atomic("file", bytes(9))
    assert raised.value.errno == errno.ENOSPC
    assert await disk.read("file") == bytes(12)
    await disk.write_atomic("file", bytes(8))
    assert await disk.free_bytes() == 12


async def test_a_disk_that_shrank_is_full_until_it_grows() -> None:
    disk = SimDisk(capacity_bytes=20)
    await disk.write_atomic("file", bytes(12))
    disk.capacity_bytes = 0
    assert await disk.free_bytes() == 0
    with pytest.raises(OSError, match="No space"):
        await disk.write_atomic("other", b"1")
    disk.capacity_bytes = 20
    await disk.write_atomic("other", b"1")


# --- power cuts ---------------------------------------------------------------------------------------------------


def test_after_a_power_cut_an_unsynced_file_is_the_old_the_new_or_torn() -> None:
    found = Counter(run(found_after_a_cut, seed) for seed in range(300))
    assert found[OLD] > 50
    assert found[NEW] > 50
    for torn in found.keys() - {OLD, NEW}:
        assert torn.rstrip(b"\0") == NEW[: len(torn.rstrip(b"\0"))]
        assert len(torn) < len(NEW) or (len(torn) == len(NEW) and torn.endswith(b"\0"))
    assert len(found) > 10, "torn at many places"


def test_a_synced_write_makes_the_names_in_its_folder_durable_but_not_the_bytes() -> None:
    same, other = Counter(), Counter()
    for seed in range(100):
        same[run(found_after_a_cut, seed, "folder/synced")] += 1
        other[run(found_after_a_cut, seed, "elsewhere/synced")] += 1
    assert OLD not in same
    assert same[NEW] < 100
    assert OLD in other


async def test_what_was_synced_last_survives_whatever_was_not_synced_before() -> None:
    disk = SimDisk(rng=random.Random(1))
    await disk.write_atomic("file", OLD, sync=False)
    await disk.write_atomic("file", NEW)
    disk.power_cut()
    assert await disk.read("file") == NEW


def test_a_deleted_file_may_be_back_unless_something_was_synced_after_it() -> None:
    async def back(seed: int, synced: bool) -> bool:
        disk = SimDisk(rng=random.Random(seed))
        await disk.write_atomic("folder/file", OLD)
        await disk.delete("folder/file")
        if synced:
            await disk.write_atomic("folder/other", NEW)
        disk.power_cut()
        return ("folder/file", len(OLD)) in await disk.list("folder")

    assert {run(back, seed, False) for seed in range(20)} == {False, True}
    assert {run(back, seed, True) for seed in range(20)} == {False}


async def test_what_was_never_on_the_disk_does_not_come_back() -> None:
    disk = SimDisk(rng=random.Random(1))
    await disk.write_atomic("file", OLD, sync=False)
    await disk.delete("file")
    disk.power_cut()
    assert await disk.list("") == []


async def test_what_a_power_cut_left_stays_at_the_next() -> None:
    disk = SimDisk(rng=random.Random(5))
    for number in range(20):
        await disk.write_atomic(f"file-{number}", NEW, sync=False)
    disk.power_cut()
    left = [(path, await disk.read(path)) for path, _ in await disk.list("")]
    disk.power_cut()
    assert [(path, await disk.read(path)) for path, _ in await disk.list("")] == left


Step = tuple[str, str, bytes]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["sync", "write", "delete", "cut"]),
        st.sampled_from(["a/1", "a/2", "b/1"]),
        st.binary(max_size=8),
    ),
    max_size=30,
)


@given(steps=STEPS, seed=st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_free_space_and_contents_follow_any_history(steps: list[Step], seed: int) -> None:
    """Until the power goes a process sees what it wrote; afterwards a synced file is what it was."""

    async def history() -> None:
        disk = SimDisk(capacity_bytes=1000, rng=random.Random(seed))
        seen: dict[str, bytes] = {}
        durable: dict[str, bytes] = {}
        for verb, path, data in steps:
            if verb == "delete":
                await disk.delete(path)
                seen.pop(path, None)
                durable.pop(path, None)
            elif verb == "cut":
                disk.power_cut()
                now = {p: await disk.read(p) for folder in "ab" for p, _ in await disk.list(folder)}
                assert durable.items() <= now.items()
                seen, durable = now, dict(now)
            else:
                await disk.write_atomic(path, data, sync=verb == "sync")
                seen[path] = data
                durable.pop(path, None)
                if verb == "sync":
                    durable[path] = data
            assert {p: await disk.read(p) for folder in "ab" for p, _ in await disk.list(folder)} == seen
            assert await disk.free_bytes() == 1000 - sum(map(len, seen.values()))

    run(history)


# --- killed, slow, failing, rotten --------------------------------------------------------------------------------


async def test_a_write_that_was_cancelled_left_the_old_bytes(autojump_clock: SimClock) -> None:
    disk = SimDisk()
    await disk.write_atomic("file", OLD)
    disk.operation_s = 1.0
    with trio.move_on_after(0.5):
        await disk.write_atomic("file", NEW)
    disk.operation_s = 0.0
    assert await disk.read("file") == OLD


async def test_operations_of_a_slow_disk_queue(autojump_clock: SimClock) -> None:
    disk = SimDisk()
    disk.operation_s, disk.bytes_per_s = 0.5, 100.0
    done: dict[str, float] = {}

    async def write(path: str) -> None:
        await disk.write_atomic(path, bytes(50))
        done[path] = trio.current_time()

    async with trio.open_nursery() as nursery:
        for path in "abc":
            nursery.start_soon(write, path)
    assert sorted(done.values()) == pytest.approx([1.0, 2.0, 3.0])
    await disk.read("a")
    assert trio.current_time() == pytest.approx(4.0)


async def test_writes_fail_so_many_times_or_until_then(autojump_clock: SimClock) -> None:
    disk = SimDisk()
    disk.fail_writes(errno.EDQUOT, count=2)
    for _ in range(2):
        with pytest.raises(OSError) as raised:
            await disk.write_atomic("file", NEW)
        assert raised.value.errno == errno.EDQUOT
    await disk.write_atomic("file", OLD)
    disk.fail_writes(errno.ENOSPC, until_s=5.0)
    with pytest.raises(OSError, match="No space"):
        await disk.write_atomic("file", NEW)
    assert await disk.read("file") == OLD
    await trio.sleep(5)
    await disk.write_atomic("file", NEW)
    disk.fail_reads(count=1)
    with pytest.raises(OSError) as raised:
        await disk.read("file")
    assert raised.value.errno == errno.EIO
    assert await disk.read("file") == NEW


async def test_bits_rot_in_both_images() -> None:
    disk = SimDisk(rng=random.Random(1))
    assert disk.flip_random_bit(random.Random(1)) is None
    await disk.write_atomic("file", OLD)
    disk.flip_bit("file", 3)
    rotten = bytes([*OLD[:3], OLD[3] ^ 1, *OLD[4:]])
    assert await disk.read("file") == rotten
    disk.power_cut()
    assert await disk.read("file") == rotten
    flipped = disk.flip_random_bit(random.Random(1))
    assert flipped is not None
    path, byte = flipped
    now = await disk.read(path)
    assert [index for index in range(len(OLD)) if now[index] != rotten[index]] == [byte]


# --- hooks --------------------------------------------------------------------------------------------------------


async def test_onlookers_see_the_files_and_what_may_still_be_lost() -> None:
    disk = SimDisk(rng=random.Random(1))
    await disk.write_atomic("folder/kept", OLD)
    await disk.write_atomic("folder/file", NEW, sync=False)
    assert disk.files_in("folder") == {"folder/file": NEW, "folder/kept": OLD}
    assert disk.files_in("nowhere") == {}
    assert disk.is_unsynced("folder/file")
    assert not disk.is_unsynced("folder/kept")
    assert not disk.is_unsynced("nowhere/file")


def test_damage_is_what_nobody_wrote() -> None:
    async def cut(seed: int) -> bool:
        disk = SimDisk(rng=random.Random(seed))
        await disk.write_atomic("file", OLD)
        await disk.write_atomic("file", NEW, sync=False)
        disk.power_cut()
        assert (disk.damaged == {"file"}) == (await disk.read("file") not in (OLD, NEW))
        return bool(disk.damaged)

    assert {run(cut, seed) for seed in range(20)} == {False, True}


async def test_operations_are_numbered_and_told_before_and_after() -> None:
    disk = SimDisk()
    told: list[tuple[str, int, str, str, int]] = []

    def teller(moment: str):
        return lambda number, verb, path: told.append((moment, number, verb, path, disk._used_bytes))

    disk.on_operation, disk.on_effect = teller("before"), teller("after")
    await disk.write_atomic("a/file", b"123")
    await disk.read("a/file")
    await disk.list("a")
    await disk.delete("a/file")
    assert told == [
        ("before", 1, "write", "a/file", 0),
        ("after", 1, "write", "a/file", 3),
        ("before", 2, "read", "a/file", 3),
        ("after", 2, "read", "a/file", 3),
        ("before", 3, "list", "a", 3),
        ("after", 3, "list", "a", 3),
        ("before", 4, "delete", "a/file", 3),
        ("after", 4, "delete", "a/file", 0),
    ]
    assert disk.operations == 4


@pytest.mark.parametrize("moment", ["on_operation", "on_effect"])
def test_the_power_may_go_at_any_operation_and_a_checkpoint_survives(moment: str) -> None:
    """Whatever operation of taking a checkpoint is the last one: the newest loadable is the old one or the new."""

    async def cut_at(last: int) -> tuple[bool, int]:
        disk = SimDisk(rng=random.Random(last))
        checkpoints = Checkpoints(disk)
        for step in range(3):
            await checkpoints.save(step, b"state %d" % step)
        first = disk.operations
        with trio.CancelScope() as process:

            def cut(number: int, verb: str, path: str) -> None:
                if number == first + last:
                    disk.power_cut()
                    process.cancel()

            setattr(disk, moment, cut)
            await checkpoints.save(3, b"state 3")
        setattr(disk, moment, None)
        found = await Checkpoints(disk).load()
        assert found is not None
        assert found.state == b"state %d" % found.step
        return process.cancelled_caught, found.step

    outcomes = []
    while not outcomes or outcomes[-1][0]:
        outcomes.append(run(cut_at, len(outcomes) + 1))
    assert [step for _, step in outcomes] == sorted(step for _, step in outcomes)
    assert {step for _, step in outcomes} == {2, 3}
    assert len(outcomes) == 5, "list, write, list, delete; and one that is not cut"


async def test_a_process_that_outlives_a_power_cut_is_told() -> None:
    disk = SimDisk()
    disk.on_operation = lambda number, verb, path: disk.power_cut()
    with pytest.raises(OSError, match="the power was cut"):
        await disk.write_atomic("file", NEW)
    disk.on_operation = None
    assert await disk.list("") == []
