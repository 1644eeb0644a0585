"""The Disk seam: durable bytes under short relative paths, and nothing else.

Owns no behaviour. ``node.disk`` implements it on a directory; netsim implements one that fills up, tears
writes and flips bits. Checks on content (hashes) belong to the callers, on write and again on read.
"""

from __future__ import annotations

from typing import Protocol


class Disk(Protocol):
    """Whole-file storage. Paths are relative, ``/``-separated, without ``..``. Errors are OSError."""

    async def read(self, path: str) -> bytes:
        """The bytes of ``path``. Raises FileNotFoundError when there is none."""

    async def write_atomic(self, path: str, data: bytes | memoryview, *, sync: bool = True) -> None:
        """Replace ``path`` by ``data``: afterwards, and after a crash, the old bytes or the new, never a mix.

        With ``sync`` the new bytes survive power loss once this returns (file and directory are synced);
        without, a crash may leave the old bytes or none, for content that can be fetched again.
        """

    async def delete(self, *paths: str) -> None:
        """Remove each of ``paths`` that is there."""

    async def list(self, folder: str) -> list[tuple[str, int]]:
        """(path, bytes) of every file directly in ``folder``, sorted by path; empty when there is none."""

    async def free_bytes(self) -> int:
        """Bytes that can still be written."""
