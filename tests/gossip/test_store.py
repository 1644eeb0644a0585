"""The shard store: what comes out is what went in, or nothing; within its quota; over restarts."""

from __future__ import annotations

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from gossip.messages import CHUNK_BYTES, Outline, ShardRef
from gossip.store import FOLDER, ShardMissing, ShardStore, StoreFull, chunk_count, chunk_size, outline_of
from netsim.determinism import SimClock
from netsim.disk import SimDisk
from p2p.codec import encode
from tests.gossip.world import MemoryDisk


def shard(number, size=1000):
    return bytes([number]) * size


async def test_the_root_is_as_documented():
    data = bytes(range(256)) * (CHUNK_BYTES // 100)
    ref, outline = await outline_of(data)
    chunks = [
        blake3(data[start : start + CHUNK_BYTES]).digest() for start in range(0, len(data), CHUNK_BYTES)
    ]
    assert outline == Outline(size=len(data), chunks=chunks)
    assert ref == ShardRef(root=blake3(encode(outline)).digest(), size=len(data))


@given(st.integers(1, 1 << 30))
def test_chunks_cover_the_shard_exactly(size):
    ref = ShardRef(root=bytes(32), size=size)
    count = chunk_count(ref)
    assert (
        sum(chunk_size(ref, index) for index in (0, count - 1)[: min(count, 2)])
        + max(0, count - 2) * CHUNK_BYTES
        == size
    )
    assert chunk_size(ref, count) <= 0 < chunk_size(ref, count - 1)


async def test_put_and_get_over_a_restart():
    disk = MemoryDisk()
    store = ShardStore(disk, quota_bytes=1 << 20)
    ref = await store.put(shard(1))
    assert await store.get(ref) == shard(1)
    again = ShardStore(disk, quota_bytes=1 << 20)
    assert not again.holds(ref)
    await again.load()
    assert again.holds(ref)
    assert await again.get(ref) == shard(1)
    assert (await again.outline(ref)).size == 1000


@pytest.mark.parametrize("byte", [0, 500, 999])
async def test_a_flipped_bit_makes_the_shard_missing_and_it_can_be_put_again(byte):
    disk = MemoryDisk()
    ref = await ShardStore(disk, quota_bytes=1 << 20).put(shard(1))
    store = ShardStore(disk, quota_bytes=1 << 20)
    await store.load()
    disk.flip_bit(next(iter(disk.files)), byte)
    with pytest.raises(ShardMissing, match="damaged"):
        await store.get(ref)
    assert not store.holds(ref)
    assert disk.files == {}
    assert store.statistics().damaged == 1
    assert await store.put(shard(1)) == ref
    assert await store.get(ref) == shard(1)


async def test_truncated_and_foreign_files_are_removed_on_load():
    disk = MemoryDisk()
    ref = await ShardStore(disk, quota_bytes=1 << 20).put(shard(1))
    path = next(iter(disk.files))
    disk.files = {path: shard(1)[:-1], "shards/notes.txt": b"hello"}
    store = ShardStore(disk, quota_bytes=1 << 20)
    await store.load()
    assert not store.holds(ref)
    assert disk.files == {}


async def test_the_quota_evicts_the_oldest_that_nobody_pinned():
    store = ShardStore(MemoryDisk(), quota_bytes=3000)
    first = await store.put(shard(1), owner="mine")
    second, third = await store.put(shard(2)), await store.put(shard(3))
    fourth = await store.put(shard(4))
    assert [store.holds(ref) for ref in (first, second, third, fourth)] == [True, False, True, True]
    store.unpin("mine")
    await store.put(shard(5))
    assert not store.holds(first)
    assert store.statistics().bytes_held == 3000


async def test_pins_count_per_owner():
    store = ShardStore(MemoryDisk(), quota_bytes=1000)
    ref = await store.put(shard(1), owner="a")
    store.pin(ref, "b")
    store.unpin("a")
    with pytest.raises(StoreFull, match="in use"):
        await store.put(shard(2))
    assert store.holds(ref)
    store.unpin("b")
    await store.put(shard(2))
    assert not store.holds(ref)


async def test_a_full_disk_evicts_what_it_may_and_then_says_so():
    disk = MemoryDisk(capacity_bytes=2500)
    store = ShardStore(disk, quota_bytes=1 << 20)
    spare = await store.put(shard(1))
    kept = await store.put(shard(2), owner="mine")
    third = await store.put(shard(3), owner="mine")
    assert [store.holds(ref) for ref in (spare, kept, third)] == [False, True, True]
    with pytest.raises(StoreFull, match="disk is full") as caught:
        await store.put(shard(4))
    assert caught.value.fix
    assert await store.get(kept) == shard(2)
    assert store.statistics().bytes_held == 2000


async def test_memory_is_bounded_and_disk_serves_the_rest():
    store = ShardStore(MemoryDisk(), quota_bytes=1 << 20, cache_bytes=2500)
    refs = [await store.put(shard(number)) for number in range(5)]
    assert store.statistics().bytes_in_memory == 2000
    assert [await store.get(ref) for ref in refs] == [shard(number) for number in range(5)]
    assert store.statistics().bytes_in_memory == 2000
    large = await store.put(bytes(2501))
    assert await store.get(large) == bytes(2501)


async def test_what_a_later_life_has_no_use_for_is_not_written_while_memory_has_room() -> None:
    disk = MemoryDisk()
    store = ShardStore(disk, quota_bytes=1 << 20, cache_bytes=5000)
    refs = [await store.put(shard(number), owner="merge", volatile=True) for number in range(4)]
    kept = [await store.put(shard(number)) for number in range(10, 20)]
    assert len(disk.files) == 2 + 10, "two of the four are half of what memory may hold"
    assert store.statistics().bytes_in_memory <= 5000
    assert store.statistics().bytes_on_disk == sum(map(len, disk.files.values()))
    assert [await store.get(ref) for ref in refs + kept[:1]] == [shard(number) for number in (0, 1, 2, 3, 10)]
    await store.release("merge")
    assert not any(map(store.holds, refs))
    assert len(disk.files) == 10
    again = [await store.put(shard(number), volatile=True) for number in range(2)]
    assert len(disk.files) == 10, "what was released made room"
    assert await store.get(again[1]) == shard(1)


async def test_a_shard_in_memory_alone_is_written_once_it_is_to_stay() -> None:
    for sync in (False, True):
        disk = MemoryDisk()
        store = ShardStore(disk, quota_bytes=1 << 20)
        ref = await store.put(shard(1), volatile=True)
        assert not disk.files
        await (store.sync(ref) if sync else store.put(shard(1)))
        await store.put(shard(1), volatile=True)
        later = ShardStore(disk, quota_bytes=1 << 20)
        await later.load()
        assert await later.get(ref) == shard(1)
        assert store.statistics().bytes_in_memory == store.statistics().bytes_held == 1000


async def test_a_shard_in_memory_alone_outlives_a_full_disk() -> None:
    disk = MemoryDisk(capacity_bytes=500)
    store = ShardStore(disk, quota_bytes=1 << 20)
    ref = await store.put(shard(1), volatile=True)
    with pytest.raises(StoreFull, match="disk is full"):
        await store.sync(ref)
    assert await store.get(ref) == shard(1)


async def test_a_shard_in_memory_alone_counts_towards_the_quota_and_can_be_evicted() -> None:
    store = ShardStore(MemoryDisk(), quota_bytes=1500)
    first = await store.put(shard(1), volatile=True)
    second = await store.put(shard(2), volatile=True)
    assert [store.holds(ref) for ref in (first, second)] == [False, True]
    with pytest.raises(ShardMissing):
        await store.get(first)


async def test_what_an_owner_releases_is_gone_unless_somebody_else_wants_it() -> None:
    disk = MemoryDisk()
    store = ShardStore(disk, quota_bytes=1 << 20)
    mine, ours, kept = b"mine", b"ours", b"nobody's, kept until room is needed"
    await store.put(mine, owner="snapshot")
    await store.put(ours, owner="snapshot")
    shared = await store.put(ours, owner="merge")
    free = await store.put(kept)
    await store.release("snapshot")
    assert [await store.get(ref) for ref in (shared, free)] == [ours, kept]
    assert store.statistics().shards == 2
    assert len(await disk.list("shards")) == 2


async def test_a_shard_becomes_durable_once_it_is_asked_to(autojump_clock: SimClock) -> None:
    disk = SimDisk()
    store = ShardStore(disk, quota_bytes=1000)
    ref = await store.put(b"x" * 100)
    path = f"{FOLDER}/{ref.root.hex()}-100"
    assert disk.is_unsynced(path)
    await store.put(b"x" * 100, sync=True)
    assert not disk.is_unsynced(path)
    operations = disk.operations
    await store.put(b"x" * 100, sync=True)
    assert disk.operations == operations, "it is durable already"


async def test_what_is_made_durable_makes_no_room_for_itself(autojump_clock: SimClock) -> None:
    disk = SimDisk(capacity_bytes=150)
    store = ShardStore(disk, quota_bytes=1000)
    ref = await store.put(b"x" * 100)
    with pytest.raises(StoreFull):
        await store.put(b"x" * 100, sync=True)
    assert await store.get(ref) == b"x" * 100
    assert disk.files_in(FOLDER)
    assert store.statistics().bytes_pinned == 0
