"""Small real things the gossip tests share: a disk in memory, identities, bodies of notices."""

from __future__ import annotations

import errno

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from gossip.messages import Heartbeat
from gossip.notices import NoticeTable
from p2p.codec import encode
from p2p.identity import Identity
from p2p.limits import DEFAULT_LIMITS

RUN = bytes(range(32))
OTHER_RUN = bytes(32)


class MemoryDisk:
    """A Disk in memory with a size, whose files a test may damage."""

    def __init__(self, capacity_bytes: int = 1 << 30) -> None:
        self.capacity_bytes = capacity_bytes
        self.files: dict[str, bytes] = {}

    async def read(self, path: str) -> bytes:
        """The file, or FileNotFoundError."""
        try:
            return self.files[path]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, "no such file", path) from None

    async def write_atomic(self, path: str, data: bytes | memoryview, *, sync: bool = True) -> None:
        """Replace the file, or ENOSPC."""
        if await self.free_bytes() + len(self.files.get(path, b"")) < len(data):
            raise OSError(errno.ENOSPC, "No space left on device", path)
        self.files[path] = bytes(data)

    async def delete(self, *paths: str) -> None:
        """Remove the files that are there."""
        for path in paths:
            self.files.pop(path, None)

    async def list(self, folder: str) -> list[tuple[str, int]]:
        """Files directly in the folder."""
        return sorted(
            (path, len(data)) for path, data in self.files.items() if path.rpartition("/")[0] == folder
        )

    async def free_bytes(self) -> int:
        """What is left of the capacity."""
        return self.capacity_bytes - sum(len(data) for data in self.files.values())

    def flip_bit(self, path: str, byte: int) -> None:
        """Let one bit rot."""
        damaged = bytearray(self.files[path])
        damaged[byte] ^= 1
        self.files[path] = bytes(damaged)


IDENTITIES = [Identity(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32)) for number in range(6)]
"""The same in every run, so that nothing drawn or sorted by peer differs."""


def heartbeat(**changes: object) -> Heartbeat:
    """A heartbeat of a member that has just begun, with ``changes``."""
    fields: dict[str, object] = {
        "addresses": ["/ip4/127.0.0.1/tcp/4100"],
        "agent": "test/1",
        "step": 0,
        "steps_total": 100,
        "steps_per_s": 0.0,
        "tokens": 0,
        "loss": 0.0,
        "head": bytes(32),
        "head_height": 0,
        "head_participants": 0,
        "leaving": False,
        "records": 0,
        "vector": b"",
        "state": b"",
    }
    return Heartbeat(**(fields | changes))  # type: ignore[arg-type]


def notice_bytes(identity: Identity, **fields: object) -> bytes:
    """A first heartbeat of ``identity``, as it travels."""
    table = NoticeTable(signer=identity, run=RUN, incarnation=1, limits=DEFAULT_LIMITS)
    return encode(table.publish("heartbeat", heartbeat(**fields)))
