"""The local disk, checkpoints on it, and what a node remembers of its lives."""

import os
from pathlib import Path
from typing import cast

import pytest
import trio

from netsim.disk import SimDisk
from node.checkpoints import FOLDER, Checkpointer, Checkpoints
from node.compute import ThreadCompute
from node.costs import Costs
from node.disk import LocalDisk
from node.life import PATH, NodeState, begin_life, save_state
from training.learner import Learner


@pytest.fixture
def disk(tmp_path: Path) -> LocalDisk:
    return LocalDisk(tmp_path / "home")


async def test_a_write_replaces_the_whole_file_and_leaves_no_temporary(
    disk: LocalDisk, tmp_path: Path
) -> None:
    await disk.write_atomic("shards/a", b"old")
    await disk.write_atomic("shards/a", memoryview(b"newer"), sync=False)
    assert await disk.read("shards/a") == b"newer"
    assert await disk.list("shards") == [("shards/a", 5)]
    assert os.listdir(tmp_path / "home" / "shards") == ["a"]


async def test_leftovers_of_an_interrupted_write_are_swept(disk: LocalDisk, tmp_path: Path) -> None:
    await disk.write_atomic("shards/a", b"whole")
    (tmp_path / "home" / "shards" / "b.part").write_bytes(b"half")
    assert await disk.list("shards") == [("shards/a", 5)]
    assert not (tmp_path / "home" / "shards" / "b.part").exists()


async def test_missing_things(disk: LocalDisk) -> None:
    with pytest.raises(FileNotFoundError):
        await disk.read("nothing")
    await disk.delete("nothing")
    assert await disk.list("nothing") == []
    assert await disk.free_bytes() > 0


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "a/../../b", ""])
async def test_paths_stay_inside(disk: LocalDisk, path: str) -> None:
    with pytest.raises(ValueError, match="not a path inside"):
        await disk.write_atomic(path, b"x")


async def test_a_failed_write_keeps_the_old_bytes(disk: LocalDisk, tmp_path: Path) -> None:
    await disk.write_atomic("kept", b"old")
    (tmp_path / "home" / "kept.part").mkdir()  # the temporary cannot be created
    with pytest.raises(OSError):
        await disk.write_atomic("kept", b"new")
    assert await disk.read("kept") == b"old"


async def test_two_generations_are_kept(disk: LocalDisk) -> None:
    checkpoints = Checkpoints(disk)
    for step in (10, 20, 30):
        await checkpoints.save(step, f"state at {step}".encode())
    assert checkpoints.step == 30
    found = await Checkpoints(disk).load()
    assert found is not None
    assert (found.step, found.state) == (30, b"state at 30")
    assert len(await disk.list(FOLDER)) == 2


@pytest.mark.parametrize(
    "states", [(b"before the merge", b"after the merge"), (b"after the merge", b"before the merge")]
)
async def test_of_two_generations_at_one_step_the_later_counts(
    disk: LocalDisk, states: tuple[bytes, bytes]
) -> None:
    for state in states:
        await Checkpoints(disk).save(10, state)
    found = await Checkpoints(disk).load()
    assert found is not None
    assert found.state == states[1]


class SlowFirstDisk(LocalDisk):
    """The first write takes its time."""

    writes = 0

    async def write_atomic(self, path: str, data: bytes | memoryview, *, sync: bool = True) -> None:
        self.writes += 1
        await trio.sleep(0.2 if self.writes == 1 else 0)
        await super().write_atomic(path, data, sync=sync)


class MergingLearner:
    """A learner at one step whose state is another one every time it is saved, as a merge makes it."""

    step = 10

    def __init__(self, states: tuple[bytes, bytes]) -> None:
        self._states = iter(states)

    def save(self) -> bytes:
        return next(self._states)


@pytest.mark.parametrize("states", [(b"earlier", b"later"), (b"later", b"earlier")])
async def test_of_two_checkpoints_asked_for_at_once_the_later_counts(
    tmp_path: Path, states: tuple[bytes, bytes]
) -> None:
    disk = SlowFirstDisk(tmp_path / "home")
    learner = cast(Learner, MergingLearner(states))
    told: list[bytes] = []

    async def taken(head: bytes) -> None:
        told.append(head)

    checkpointer = Checkpointer(
        Checkpoints(disk),
        trainer=learner,
        compute=ThreadCompute(),
        costs=Costs(),
        based_on=lambda: b"merge",
        taken=taken,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(checkpointer.take)
        await trio.sleep(0.05)
        nursery.start_soon(checkpointer.take)
    assert checkpointer.problem == ""
    assert told == [b"merge", b"merge"]
    await checkpointer.take_unless_recent()
    assert len(told) == 2
    found = await Checkpoints(disk).load()
    assert found is not None
    assert found.state == states[1]


async def test_a_damaged_newest_generation_falls_back_one(disk: LocalDisk, tmp_path: Path) -> None:
    checkpoints = Checkpoints(disk)
    await checkpoints.save(10, b"good")
    await checkpoints.save(20, b"to be damaged")
    newest = max((tmp_path / "home" / FOLDER).iterdir())
    newest.write_bytes(b"to be damaGed")
    found = await Checkpoints(disk).load()
    assert found is not None
    assert (found.step, found.state) == (10, b"good")


async def test_a_half_written_generation_never_counts(disk: LocalDisk, tmp_path: Path) -> None:
    await Checkpoints(disk).save(10, b"good")
    (tmp_path / "home" / FOLDER / "000000000002-20-abc.safetensors.part").write_bytes(b"torn")
    (tmp_path / "home" / FOLDER / "notes.txt").write_text("mine")
    found = await Checkpoints(disk).load()
    assert found is not None
    assert found.step == 10


async def test_no_generation_at_all(disk: LocalDisk) -> None:
    assert await Checkpoints(disk).load() is None


async def test_every_life_has_a_higher_incarnation(disk: LocalDisk) -> None:
    first = await begin_life(disk, wall_time_s=1_700_000_000.5)
    await save_state(disk, NodeState(incarnation=first.incarnation, tokens_at_anchor=77))
    second = await begin_life(disk, wall_time_s=0.0)
    assert second == NodeState(incarnation=first.incarnation + 1, tokens_at_anchor=77)


async def test_a_damaged_state_does_not_go_back_in_time(disk: LocalDisk) -> None:
    earlier = await begin_life(disk, wall_time_s=1_700_000_000.0)
    await disk.write_atomic(PATH, b'{"incarnation": "many"}')
    later = await begin_life(disk, wall_time_s=1_700_000_100.0)
    assert later.incarnation > earlier.incarnation


async def test_whatever_bit_of_the_state_rots_it_is_found() -> None:
    disk = SimDisk()
    await save_state(disk, NodeState(incarnation=41, tokens_at_anchor=77))
    whole = await disk.read(PATH)
    for bit in range(8 * len(whole)):
        rotten = bytearray(whole)
        rotten[bit // 8] ^= 1 << bit % 8
        await disk.write_atomic(PATH, bytes(rotten), sync=False)
        assert await begin_life(disk, wall_time_s=1000.0) == NodeState(incarnation=1001), bytes(rotten)
