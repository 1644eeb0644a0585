"""``gossamer`` as usual, except that all shards it serves are rotten: somebody to join by, in a benchmark."""

from __future__ import annotations

from typing import Any, cast

import node.node
from cli.main import main
from gossip.shard_transfer import ShardServer
from gossip.store import ShardStore
from netsim.attackers import RottenStore


class _LyingServer(ShardServer):
    def __init__(self, *, store: ShardStore, **others: Any) -> None:
        super().__init__(store=cast(ShardStore, RottenStore(store)), **others)


if __name__ == "__main__":
    node.node.ShardServer = _LyingServer  # type: ignore[misc]
    raise SystemExit(main())
