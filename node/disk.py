"""LocalDisk: the Disk seam on one folder of the local file system.

Owns the folder it is given: every path stays inside. Writes go to a temporary file beside the target, which is
renamed over it; with ``sync`` the file is synced before the rename and the folder after it, so a power
cut leaves the old bytes or the new. Never checks what the bytes mean.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path, PurePosixPath

import trio

_TEMPORARY_SUFFIX = ".part"
_Listing = list[tuple[str, int]]


class LocalDisk:
    """Files under ``root``, which is created with mode 0700. Implements gossip.disk.Disk."""

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(mode=0o700, parents=True, exist_ok=True)

    async def read(self, path: str) -> bytes:
        """The bytes of ``path``."""
        return await trio.to_thread.run_sync(self._inside(path).read_bytes)

    async def write_atomic(self, path: str, data: bytes | memoryview, *, sync: bool = True) -> None:
        """Replace ``path`` by ``data``, durable on return when ``sync``."""
        await trio.to_thread.run_sync(_replace, self._inside(path), data, sync)

    async def delete(self, *paths: str) -> None:
        """Remove each of ``paths`` that is there."""
        await trio.to_thread.run_sync(_unlink, *map(self._inside, paths))

    async def list(self, folder: str) -> _Listing:
        """(path, bytes) of the files directly in ``folder``; leftovers of interrupted writes are removed."""
        return await trio.to_thread.run_sync(self._list, folder)

    async def free_bytes(self) -> int:
        """Free space of the file system that holds the folder."""
        usage = await trio.to_thread.run_sync(shutil.disk_usage, self._root)
        return usage.free

    def _inside(self, path: str) -> Path:
        parts = PurePosixPath(path).parts
        if not parts or any(part in ("..", "/") for part in parts):
            raise ValueError(f"{path!r} is not a path inside the disk")
        return self._root.joinpath(*parts)

    def _list(self, folder: str) -> _Listing:
        found = []
        try:
            with os.scandir(self._inside(folder)) as entries:
                for entry in entries:
                    if entry.name.endswith(_TEMPORARY_SUFFIX):
                        _unlink(Path(entry.path))
                    elif entry.is_file(follow_symlinks=False):
                        found.append((f"{folder}/{entry.name}", entry.stat().st_size))
        except FileNotFoundError:
            return []
        return sorted(found)


def _replace(target: Path, data: bytes | memoryview, sync: bool) -> None:
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = target.with_name(target.name + _TEMPORARY_SUFFIX)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError:
        # A full disk must not also keep the half-written file that filled it.
        _unlink(temporary)
        raise
    if sync:
        descriptor = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _unlink(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
