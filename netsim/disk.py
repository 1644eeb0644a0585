"""SimDisk: files in memory that outlive a simulated process, and the faults of real disks on command."""

from __future__ import annotations

import errno

import trio

_Listing = list[tuple[str, int]]


class SimDisk:
    """One machine's disk of ``capacity_bytes``. Writes are whole or not at all, as ``Disk`` promises."""

    def __init__(self, *, capacity_bytes: int = 1 << 30) -> None:
        self.capacity_bytes = capacity_bytes
        self._files: dict[str, bytes] = {}

    async def read(self, path: str) -> bytes:
        """The bytes of ``path``."""
        await trio.lowlevel.checkpoint()
        try:
            return self._files[path]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", path) from None

    async def write_atomic(self, path: str, data: bytes | memoryview, *, sync: bool = True) -> None:
        """Replace ``path``; ENOSPC when it does not fit beside everything else, the old bytes included."""
        await trio.lowlevel.checkpoint()
        if len(data) > self._free():
            raise OSError(errno.ENOSPC, "No space left on device", path)
        self._files[path] = bytes(data)

    async def delete(self, path: str) -> None:
        """Remove ``path`` if it is there."""
        await trio.lowlevel.checkpoint()
        self._files.pop(path, None)

    async def list(self, folder: str) -> _Listing:
        """(path, bytes) of the files directly in ``folder``, sorted."""
        await trio.lowlevel.checkpoint()
        return sorted(
            (path, len(data)) for path, data in self._files.items() if path.rpartition("/")[0] == folder
        )

    async def free_bytes(self) -> int:
        """Bytes that can still be written."""
        await trio.lowlevel.checkpoint()
        return self._free()

    def flip_bit(self, path: str, byte: int) -> None:
        """Bit rot: the lowest bit of one byte of ``path`` changes."""
        data = bytearray(self._files[path])
        data[byte] ^= 1
        self._files[path] = bytes(data)

    def _free(self) -> int:
        return self.capacity_bytes - sum(map(len, self._files.values()))
