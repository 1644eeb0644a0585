"""Shards by content, on disk or while that will do in memory: checked when read, bounded by a quota.

Owns the folder ``shards/``, the definition of a shard's root, what is in memory, pins and eviction. Never talks
to a peer. Relies on ``Disk`` for atomic writes; a torn or rotten file is found by its hash when it is read,
deleted, counted, and reported as missing, so that it is fetched again.

The root of a shard (two levels of BLAKE3, so that every chunk can be checked on its own): cut the bytes every
``CHUNK_BYTES``, hash each chunk, and hash the canonical CBOR of ``Outline(size, chunks)``.
"""

from __future__ import annotations

import errno
from collections import OrderedDict
from dataclasses import dataclass, field

import structlog
import trio
from blake3 import blake3

from gossip.disk import Disk
from gossip.messages import CHUNK_BYTES, Outline, ShardRef
from p2p.codec import encode
from p2p.errors import GossamerError

FOLDER = "shards"
CACHE_BYTES = 256 << 20
VOLATILE_SHARE = 0.5
"""Of the memory for shards, what those may take that are nowhere else; beyond it they go to disk too."""
_WRITING = "being written"
"""Pins a shard that is written although it is held."""

log = structlog.get_logger()


class ShardMissing(GossamerError):
    """The shard is not held, or its file turned out to be damaged."""


class StoreFull(GossamerError):
    """The shard does not fit: the quota is used up by pinned shards, or the disk is full."""


async def outline_of(data: bytes) -> tuple[ShardRef, Outline]:
    """The name of ``data`` and its chunk hashes; lets other tasks run between chunks (about 0.5 ms each)."""
    hashes = []
    view = memoryview(data)
    for start in range(0, len(view), CHUNK_BYTES):
        if start:
            await trio.lowlevel.checkpoint()
        hashes.append(blake3(view[start : start + CHUNK_BYTES]).digest())
    outline = Outline(size=len(data), chunks=hashes)
    return ref_of(outline), outline


def ref_of(outline: Outline) -> ShardRef:
    """The shard that ``outline`` describes."""
    return ShardRef(root=blake3(encode(outline)).digest(), size=outline.size)


def chunk_count(ref: ShardRef) -> int:
    """How many chunks a shard is cut into."""
    return -(-ref.size // CHUNK_BYTES)


def chunk_size(ref: ShardRef, index: int) -> int:
    """Bytes of chunk ``index``; 0 or less when the shard has no such chunk."""
    return min(CHUNK_BYTES, ref.size - index * CHUNK_BYTES)


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """A snapshot for status and metrics."""

    shards: int
    bytes_held: int
    """What the quota bounds, in memory alone or not."""
    bytes_on_disk: int
    bytes_pinned: int
    bytes_in_memory: int
    damaged: int
    """Files that failed their hash since the start."""
    evicted: int


@dataclass(slots=True)
class _Held:
    outline: Outline | None = None
    """Known once the bytes have been checked in this life."""
    synced: bool = False
    """Whether this life has made them durable."""
    owners: set[str] = field(default_factory=set)


class ShardStore:
    """At most ``quota_bytes`` of shards on ``disk``, and ``cache_bytes`` of them in memory too."""

    def __init__(self, disk: Disk, *, quota_bytes: int, cache_bytes: int = CACHE_BYTES) -> None:
        self._disk = disk
        self._quota_bytes = quota_bytes
        self._cache_bytes_max = cache_bytes
        self._volatile_bytes_max = int(cache_bytes * VOLATILE_SHARE)
        self._held: OrderedDict[ShardRef, _Held] = OrderedDict()
        self._cache: OrderedDict[ShardRef, bytes] = OrderedDict()
        """Of shards that are on disk, those used last."""
        self._volatile: dict[ShardRef, bytes] = {}
        """Shards that are not on disk."""
        self._bytes_held = 0
        self._bytes_cached = 0
        self._bytes_volatile = 0
        self._damaged = 0
        self._evicted = 0
        self._writing = trio.Lock()

    async def load(self) -> None:
        """Find what earlier lives stored. Files are checked when they are read, not now."""
        for path, size in await self._disk.list(FOLDER):
            ref = _ref_in(path)
            if ref is None or ref.size != size:
                await self._disk.delete(path)
                continue
            self._held[ref] = _Held()
            self._bytes_held += size

    def holds(self, ref: ShardRef) -> bool:
        """Whether the shard is believed to be here; its bytes are checked when they are read."""
        return ref in self._held

    async def put(
        self, data: bytes, *, owner: str | None = None, sync: bool = False, volatile: bool = False
    ) -> ShardRef:
        """Store ``data`` (at least one byte) and return its name; pinned for ``owner`` from the start if one is named.

        ``sync``: the bytes survive power loss once this returns. ``volatile``: a later life of this node has no use for
        them, so they need not be written while there is room in memory. Raises StoreFull.
        """
        ref, outline = await outline_of(data)
        async with self._writing:
            if ref not in self._held:
                await self._make_room(ref.size)
                if volatile and not sync and self._bytes_volatile + ref.size <= self._volatile_bytes_max:
                    self._volatile[ref] = data
                    self._bytes_volatile += ref.size
                else:
                    await self._write(_path_of(ref), data, sync=sync)
                self._held[ref] = _Held()
                self._bytes_held += ref.size
            elif (sync and not self._held[ref].synced) or (not volatile and ref in self._volatile):
                self.pin(ref, _WRITING)  # What is held already must not make room for itself.
                try:
                    await self._write(_path_of(ref), data, sync=sync)
                finally:
                    self._held[ref].owners.discard(_WRITING)
                self._forget_volatile(ref)
            held = self._held[ref]
            held.outline = outline
            held.synced |= sync
            self._held.move_to_end(ref)
            if owner is not None:
                self.pin(ref, owner)
            self._remember(ref, data)
        return ref

    async def sync(self, ref: ShardRef) -> None:
        """Have a shard that is held survive power loss. Raises ShardMissing, StoreFull or OSError."""
        held = self._held.get(ref)
        if held is None or not held.synced:
            await self.put(await self.get(ref), sync=True)

    async def get(self, ref: ShardRef) -> bytes:
        """The bytes of a shard, checked against its name. Raises ShardMissing."""
        if (data := self._in_memory(ref)) is not None:
            await trio.lowlevel.checkpoint_if_cancelled()
            return data
        held = self._held.get(ref)
        if held is None:
            raise ShardMissing(f"shard {ref.root.hex()[:12]} is not held here")
        try:
            data = await self._disk.read(_path_of(ref))
        except OSError as error:
            await self._discard(ref, held, f"unreadable: {error.strerror}")
            raise ShardMissing(f"shard {ref.root.hex()[:12]} could not be read: {error.strerror}") from error
        found, outline = await outline_of(data)
        if found != ref:
            await self._discard(ref, held, "its bytes do not match its name")
            raise ShardMissing(f"shard {ref.root.hex()[:12]} was damaged on disk")
        if self._held.get(ref) is held:
            held.outline = outline
            self._remember(ref, data)
        return data

    async def outline(self, ref: ShardRef) -> Outline:
        """The chunk hashes of a shard held here. Raises ShardMissing."""
        held = self._held.get(ref)
        if held is None or held.outline is None:
            await self.get(ref)
            held = self._held.get(ref)
        if held is None or held.outline is None:
            raise ShardMissing(f"shard {ref.root.hex()[:12]} was evicted while it was read")
        return held.outline

    # --- pins and eviction ------------------------------------------------------------------------------------

    def pin(self, ref: ShardRef, owner: str) -> None:
        """Keep a shard until ``owner`` lets go; a shard that is not held is ignored.

        Pins live in memory only: after a restart, owners pin again before anything new is put.
        """
        if ref in self._held:
            self._held[ref].owners.add(owner)

    def unpin(self, owner: str) -> None:
        """Drop every pin of ``owner``; the shards stay until room is needed."""
        for held in self._held.values():
            held.owners.discard(owner)

    async def release(self, owner: str) -> None:
        """Drop every pin of ``owner``, and with it the shards that nobody else has pinned: they are of no more use."""
        let_go = [ref for ref, held in self._held.items() if held.owners == {owner}]
        self.unpin(owner)
        async with self._writing:
            await self._drop(*(ref for ref in let_go if ref in self._held and not self._held[ref].owners))

    async def _make_room(self, size: int) -> None:
        while self._bytes_held + size > self._quota_bytes:
            if not await self._evict_oldest():
                raise StoreFull(
                    f"no room for a shard of {size} bytes: all {self._bytes_held} bytes held are in use",
                    why=f"the quota is {self._quota_bytes} bytes",
                    fix="allow the node more disk (disk_bytes_max in config.toml)",
                )

    async def _write(self, path: str, data: bytes, *, sync: bool) -> None:
        while True:
            try:
                return await self._disk.write_atomic(path, data, sync=sync)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                if not await self._evict_oldest():
                    raise StoreFull(
                        f"the disk is full: a shard of {len(data)} bytes was not stored",
                        why="shards that cannot be stored cannot be offered or merged",
                        fix="free disk space; the node goes on by itself",
                    ) from error

    async def _evict_oldest(self) -> bool:
        oldest = next((ref for ref, held in self._held.items() if not held.owners), None)
        if oldest is None:
            return False
        self._evicted += 1
        await self._drop(oldest)
        return True

    async def _discard(self, ref: ShardRef, held: _Held, why: str) -> None:
        async with self._writing:
            # Another reader may have discarded it, and a writer replaced it, while this one was reading.
            if self._held.get(ref) is held:
                self._damaged += 1
                log.warning("damaged shard deleted", shard=ref.root.hex(), bytes=ref.size, why=why)
                await self._drop(ref)

    async def _drop(self, *refs: ShardRef) -> None:
        on_disk = []
        for ref in refs:
            if self._held.pop(ref, None) is not None:
                self._bytes_held -= ref.size
            if self._cache.pop(ref, None) is not None:
                self._bytes_cached -= ref.size
            if not self._forget_volatile(ref):
                on_disk.append(_path_of(ref))
        if on_disk:
            await self._disk.delete(*on_disk)

    # --- in memory --------------------------------------------------------------------------------------------

    def _in_memory(self, ref: ShardRef) -> bytes | None:
        if ref in self._cache:
            self._cache.move_to_end(ref)
            return self._cache[ref]
        return self._volatile.get(ref)

    def _remember(self, ref: ShardRef, data: bytes) -> None:
        """Keep a shard that is on disk at hand, if it isn't too large; what was used longest ago makes room."""
        if ref not in self._cache and ref not in self._volatile and ref.size <= self._cache_bytes_max:
            self._cache[ref] = data
            self._bytes_cached += ref.size
        while self._bytes_cached + self._bytes_volatile > self._cache_bytes_max:
            oldest, _ = self._cache.popitem(last=False)
            self._bytes_cached -= oldest.size

    def _forget_volatile(self, ref: ShardRef) -> bool:
        """Whether the shard was in memory alone; it is there no more."""
        if self._volatile.pop(ref, None) is None:
            return False
        self._bytes_volatile -= ref.size
        return True

    def statistics(self) -> StoreStatistics:
        """Counts and sizes now."""
        return StoreStatistics(
            shards=len(self._held),
            bytes_held=self._bytes_held,
            bytes_on_disk=self._bytes_held - self._bytes_volatile,
            bytes_pinned=sum(ref.size for ref, held in self._held.items() if held.owners),
            bytes_in_memory=self._bytes_cached + self._bytes_volatile,
            damaged=self._damaged,
            evicted=self._evicted,
        )


def _path_of(ref: ShardRef) -> str:
    return f"{FOLDER}/{ref.root.hex()}-{ref.size}"


def _ref_in(path: str) -> ShardRef | None:
    root, _, size = path.removeprefix(f"{FOLDER}/").partition("-")
    try:
        return ShardRef(root=bytes.fromhex(root), size=int(size)) if len(root) == 64 else None
    except ValueError:
        return None
