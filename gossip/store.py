"""Shards by content on disk: checked when written, checked when read, bounded by a quota.

Owns the folder ``shards/``, the definition of a shard's root, the cache in memory, pins and eviction. Never talks
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
_SYNCING = "being synced"
"""Pins a shard that is written once more."""

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
        hashes.append(blake3(view[start : start + CHUNK_BYTES]).digest())
        await trio.lowlevel.checkpoint()
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
    bytes_pinned: int
    bytes_cached: int
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
        self._held: OrderedDict[ShardRef, _Held] = OrderedDict()
        self._cache: OrderedDict[ShardRef, bytes] = OrderedDict()
        self._bytes_held = 0
        self._bytes_cached = 0
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

    async def put(self, data: bytes, *, owner: str | None = None, sync: bool = False) -> ShardRef:
        """Store ``data`` (at least one byte) and return its name; pinned for ``owner`` from the start if one is named.

        ``sync``: the bytes survive power loss once this returns. Raises StoreFull.
        """
        ref, outline = await outline_of(data)
        async with self._writing:
            if ref not in self._held:
                await self._make_room(ref.size)
                await self._write(_path_of(ref), data, sync=sync)
                self._held[ref] = _Held()
                self._bytes_held += ref.size
            elif sync and not self._held[ref].synced:
                self.pin(ref, _SYNCING)  # What is written again must not make room for itself.
                try:
                    await self._write(_path_of(ref), data, sync=True)
                finally:
                    self._held[ref].owners.discard(_SYNCING)
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
        if ref in self._cache:
            await trio.lowlevel.checkpoint()
            self._cache.move_to_end(ref)
            return self._cache[ref]
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
            for ref in let_go:
                if ref in self._held and not self._held[ref].owners:
                    await self._drop(ref)

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

    async def _drop(self, ref: ShardRef) -> None:
        if self._held.pop(ref, None) is not None:
            self._bytes_held -= ref.size
        if self._cache.pop(ref, None) is not None:
            self._bytes_cached -= ref.size
        await self._disk.delete(_path_of(ref))

    # --- the cache --------------------------------------------------------------------------------------------

    def _remember(self, ref: ShardRef, data: bytes) -> None:
        if ref in self._cache or ref.size > self._cache_bytes_max:
            return
        self._cache[ref] = data
        self._bytes_cached += ref.size
        while self._bytes_cached > self._cache_bytes_max:
            oldest, _ = self._cache.popitem(last=False)
            self._bytes_cached -= oldest.size

    def statistics(self) -> StoreStatistics:
        """Counts and sizes now."""
        return StoreStatistics(
            shards=len(self._held),
            bytes_held=self._bytes_held,
            bytes_pinned=sum(ref.size for ref, held in self._held.items() if held.owners),
            bytes_cached=self._bytes_cached,
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
