"""SimDisk: files in memory that outlive a simulated process, and the faults of real disks on command.

Owns two images of one machine's files: what a process sees, and what a power cut would leave. They differ where a
write or a delete was not synced; as on a real file system, a synced write makes the names in its folder durable too,
so that what was deleted before it stays deleted, but not the bytes of other files. Nothing becomes durable by itself,
however long it lies: what a program did not sync, it must be able to lose.

A killed process changes nothing here: a write cancelled before it ended has left the old bytes. Damage is for the
readers to find.
"""

from __future__ import annotations

import errno
import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

import trio

_Listing = list[tuple[str, int]]
OperationHook = Callable[[int, str, str], None]
"""Told (number, ``read`` | ``write`` | ``delete`` | ``list``, path); may cut the power."""


class _Never(Enum):
    """Stands for no earlier state at all: whatever was there before cannot come back."""

    COMES_BACK = 0


_Before = bytes | None | _Never
"""What an unsynced path may go back to: bytes, absence, or nothing earlier."""


@dataclass(slots=True)
class _Folder:
    """The files directly in one folder; keys are whole paths."""

    files: dict[str, bytes] = field(default_factory=dict)
    """As a process sees them."""
    unsynced: dict[str, _Before] = field(default_factory=dict)
    """Where the two images differ. Of several states since the last sync only the first and the last are kept."""

    def write(self, path: str, data: bytes, *, sync: bool) -> None:
        before = self.files.get(path)
        self.files[path] = data
        if sync:
            self.unsynced.pop(path, None)
            if self.unsynced:
                self._sync_names()
        else:
            self._unsettle(path, before)

    def delete(self, path: str) -> None:
        before = self.files.pop(path)
        self._unsettle(path, before)
        if self.unsynced[path] is None:
            del self.unsynced[path]  # It never was on the disk.

    def cut_power(self, rng: random.Random) -> set[str]:
        """Draw for each unsynced path what is found afterwards; that is durable then. Returns the torn ones."""
        torn = set()
        for path, before in self.unsynced.items():
            now = self.files.pop(path, None)
            found: list[bytes | None] = [now]
            if now:
                found.append(_torn(now, rng))
            if not isinstance(before, _Never):
                found.append(before)
            chosen = rng.choice(found)
            if chosen is not None:
                self.files[path] = chosen
                if chosen not in (now, before):
                    torn.add(path)
        self.unsynced.clear()
        return torn

    def _unsettle(self, path: str, before: bytes | None) -> None:
        if self.unsynced.get(path, _Never.COMES_BACK) is _Never.COMES_BACK:
            self.unsynced[path] = before

    def _sync_names(self) -> None:
        self.unsynced = {path: _Never.COMES_BACK for path in self.unsynced if path in self.files}


@dataclass(slots=True)
class _Failing:
    """Operations of one kind that fail, so many or until a time."""

    code: int
    count: float
    until_s: float

    def check(self, path: str) -> None:
        """Raise OSError when it is this operation's turn to fail."""
        if self.count > 0 and trio.current_time() < self.until_s:
            self.count -= 1
            raise OSError(self.code, os.strerror(self.code), path)


class SimDisk:
    """One machine's disk. Implements gossip.disk.Disk; ``rng`` decides what a power cut leaves."""

    def __init__(self, *, capacity_bytes: int = 1 << 30, rng: random.Random | None = None) -> None:
        self.capacity_bytes = capacity_bytes
        """May change at any time; below what is stored, nothing more fits."""
        self.operation_s = 0.0
        """What each operation takes. They queue: one disk does one thing at a time."""
        self.bytes_per_s = math.inf
        self.operations = 0
        """Reads, writes, deletes and lists begun since the beginning; the number hooks are told."""
        self.on_operation: OperationHook | None = None
        """Called before an operation has any effect."""
        self.on_effect: OperationHook | None = None
        """Called once it has had its effect, before the process hears of it."""
        self.damaged: set[str] = set()
        """Paths that a fault ever left with bytes nobody wrote there: torn by a power cut, or with a bit flipped."""
        self._rng = rng or random.Random(0)
        self._folders: dict[str, _Folder] = {}
        self._used_bytes = 0
        self._free_at_s = -math.inf
        self._lives = 0
        self._failing_reads: _Failing | None = None
        self._failing_writes: _Failing | None = None

    # --- Disk -------------------------------------------------------------------------------------------------

    async def read(self, path: str) -> bytes:
        """The bytes of ``path``."""
        folder = self._folder(path)
        number = await self._begin("read", path, len(folder.files.get(path, b"")))
        if self._failing_reads is not None:
            self._failing_reads.check(path)
        try:
            data = folder.files[path]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path) from None
        if self.on_effect is not None:
            await self._tell_effect(number, "read", path)
        return data

    async def write_atomic(self, path: str, data: bytes | memoryview, *, sync: bool = True) -> None:
        """Replace ``path``; ENOSPC when it does not fit beside everything else, the old bytes included."""
        number = await self._begin("write", path, len(data))
        if self._failing_writes is not None:
            self._failing_writes.check(path)
        if len(data) > self.capacity_bytes - self._used_bytes:
            raise OSError(errno.ENOSPC, "No space left on device", path)
        folder = self._folder(path)
        self._used_bytes += len(data) - len(folder.files.get(path, b""))
        folder.write(path, bytes(data), sync=sync)
        if self.on_effect is not None:
            await self._tell_effect(number, "write", path)

    async def delete(self, *paths: str) -> None:
        """Remove each of ``paths`` that is there, one after the other: the power can go between two."""
        for path in paths:
            number = await self._begin("delete", path, 0)
            folder = self._folder(path)
            if path in folder.files:
                self._used_bytes -= len(folder.files[path])
                folder.delete(path)
            if self.on_effect is not None:
                await self._tell_effect(number, "delete", path)

    async def list(self, folder: str) -> _Listing:
        """(path, bytes) of the files directly in ``folder``, sorted."""
        number = await self._begin("list", folder, 0)
        found = self._folders.get(folder)
        listing = [] if found is None else sorted((path, len(data)) for path, data in found.files.items())
        if self.on_effect is not None:
            await self._tell_effect(number, "list", folder)
        return listing

    async def free_bytes(self) -> int:
        """Bytes that can still be written."""
        await trio.lowlevel.checkpoint()
        return max(0, self.capacity_bytes - self._used_bytes)

    # --- faults -----------------------------------------------------------------------------------------------

    def power_cut(self) -> None:
        """The power goes and comes back. Each file that was not synced is as it was, or as it is, or torn.

        What was deleted may be back. Operations under way have no more effect; the machine's process is the caller's
        to end.
        """
        self._lives += 1
        self._free_at_s = -math.inf
        for folder in self._folders.values():
            self.damaged |= folder.cut_power(self._rng)
        self._used_bytes = sum(
            len(data) for folder in self._folders.values() for data in folder.files.values()
        )

    def fail_writes(self, code: int, *, count: int | None = None, until_s: float = math.inf) -> None:
        """Have the next ``count`` writes (None: all), up to virtual time ``until_s``, fail with errno ``code``.

        Replaces what was asked for before; a count of 0 ends it.
        """
        self._failing_writes = _Failing(code, math.inf if count is None else count, until_s)

    def fail_reads(
        self, code: int = errno.EIO, *, count: int | None = None, until_s: float = math.inf
    ) -> None:
        """The same for reads, of files that are there or not."""
        self._failing_reads = _Failing(code, math.inf if count is None else count, until_s)

    def flip_bit(self, path: str, byte: int, bit: int = 0) -> None:
        """Bit rot: one bit of one byte of ``path`` changes where it lies, so in both images."""
        folder = self._folder(path)
        data = bytearray(folder.files[path])
        data[byte] ^= 1 << bit
        folder.files[path] = bytes(data)
        self.damaged.add(path)

    def flip_random_bit(self, rng: random.Random) -> tuple[str, int] | None:
        """Bit rot in one file, each as likely as the others; returns its path and the byte, None on an empty disk."""
        paths = sorted(
            path for folder in self._folders.values() for path, data in folder.files.items() if data
        )
        if not paths:
            return None
        path = rng.choice(paths)
        byte = rng.randrange(len(self._folder(path).files[path]))
        self.flip_bit(path, byte, rng.randrange(8))
        return path, byte

    # --- for those who look on --------------------------------------------------------------------------------

    def files_in(self, folder: str) -> dict[str, bytes]:
        """What a process would find directly in ``folder`` now, by path, sorted. Takes no time."""
        found = self._folders.get(folder)
        return dict(sorted(found.files.items())) if found is not None else {}

    def is_unsynced(self, path: str) -> bool:
        """Whether a power cut now could take back what a process sees under ``path``."""
        found = self._folders.get(path.rpartition("/")[0])
        return found is not None and path in found.unsynced

    # --- operations -------------------------------------------------------------------------------------------

    def _folder(self, path: str) -> _Folder:
        name = path.rpartition("/")[0]
        folder = self._folders.get(name)
        if folder is None:
            folder = self._folders[name] = _Folder()
        return folder

    async def _begin(self, verb: str, path: str, size: int) -> int:
        """Count an operation and let the time pass that it takes; returns its number."""
        self.operations += 1
        number, life = self.operations, self._lives
        if self.on_operation is not None:
            self.on_operation(number, verb, path)
        if self.operation_s or self.bytes_per_s != math.inf:
            began_s = max(trio.current_time(), self._free_at_s)
            self._free_at_s = began_s + self.operation_s + size / self.bytes_per_s
            await trio.sleep_until(self._free_at_s)
        else:
            await trio.lowlevel.checkpoint()
        self._check_life(life, path)
        return number

    async def _tell_effect(self, number: int, verb: str, path: str) -> None:
        assert self.on_effect is not None
        life = self._lives
        self.on_effect(number, verb, path)
        if life != self._lives:
            await trio.lowlevel.checkpoint()
        self._check_life(life, path)

    def _check_life(self, life: int, path: str) -> None:
        # A process that outlives the power cut is a mistake of the scenario's; its operations must not count.
        if life != self._lives:
            raise OSError(errno.EIO, "the power was cut", path)


def _torn(data: bytes, rng: random.Random) -> bytes:
    """What is left of a write that was under way: a prefix, or the right length with zeros at the end."""
    written = rng.randrange(len(data))
    return data[:written] + (bytes(len(data) - written) if rng.random() < 0.5 else b"")
