"""``gossamer`` as usual, except that every shard it serves has one bit turned: somebody to join by, in a benchmark."""

from __future__ import annotations

from typing import Any, cast

import node.node
from cli.main import main
from gossip.messages import ShardRef
from gossip.shard_transfer import ShardServer
from gossip.store import ShardStore


class _RottenStore:
    """A store as far as serving needs one."""

    def __init__(self, store: ShardStore) -> None:
        self.outline = store.outline
        self._store = store

    async def get(self, ref: ShardRef) -> bytes:
        """Almost the bytes of ``ref``."""
        data = bytearray(await self._store.get(ref))
        for start in range(0, len(data), 4096):
            data[start] ^= 1
        return bytes(data)


class _LyingServer(ShardServer):
    def __init__(self, *, store: ShardStore, **others: Any) -> None:
        super().__init__(store=cast(ShardStore, _RottenStore(store)), **others)


if __name__ == "__main__":
    node.node.ShardServer = _LyingServer  # type: ignore[misc]
    raise SystemExit(main())
