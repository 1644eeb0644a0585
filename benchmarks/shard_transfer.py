"""Shard transfer between two processes over libp2p, against raw trio TCP with 1 MiB writes.

Run as a module it is the sending process: it serves one shard on both doors and prints where.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from functools import partial
from pathlib import Path
from time import perf_counter

import trio

from benchmarks.harness import Figure, ratios
from gossip.ledger import PeerLedger
from gossip.messages import ShardRef
from gossip.shard_transfer import ShardFetcher, ShardServer
from gossip.store import ShardStore
from node.disk import LocalDisk
from p2p.identity import Identity
from p2p.libp2p_transport import open_libp2p
from p2p.limits import Limits
from p2p.transport import PeerId, PeerRecord

SHARD_BYTES = 64 << 20
WRITE_BYTES = 1 << 20
ANYWHERE = ("/ip4/127.0.0.1/tcp/0",)


async def serve() -> None:
    """The sender: a shard server and a raw TCP server, both with the same bytes."""
    limits = Limits()
    data = os.urandom(SHARD_BYTES)
    with tempfile.TemporaryDirectory() as folder:
        async with open_libp2p(Identity.generate(), listen=ANYWHERE, limits=limits) as transport:
            store = ShardStore(LocalDisk(Path(folder)), quota_bytes=1 << 30)
            ref = await store.put(data)
            ShardServer(transport=transport, store=store, ledger=PeerLedger()).serve()

            async def send_raw(stream: trio.SocketStream) -> None:
                for start in range(0, len(data), WRITE_BYTES):
                    await stream.send_all(memoryview(data)[start : start + WRITE_BYTES])

            async with trio.open_nursery() as nursery:
                listeners = await nursery.start(
                    partial(trio.serve_tcp, send_raw, 0, host="127.0.0.1"),
                )
                where = {
                    "peer": transport.local.peer,
                    "addresses": list(transport.local.addresses),
                    "root": ref.root.hex(),
                    "port": listeners[0].socket.getsockname()[1],
                }
                print(json.dumps(where), flush=True)
                await trio.sleep_forever()


async def measure(repeats: int = 5) -> list[Figure]:
    """Figures in MB/s and the ratio of the two."""
    limits = Limits()
    process = await trio.lowlevel.open_process([sys.executable, "-m", "benchmarks.shard_transfer"], stdout=-1)
    try:
        assert process.stdout is not None
        where = json.loads(await process.stdout.receive_some())
        sender = PeerRecord(PeerId(where["peer"]), tuple(where["addresses"]))
        ref = ShardRef(root=bytes.fromhex(where["root"]), size=SHARD_BYTES)
        shard_rates, raw_rates = [], []
        async with open_libp2p(Identity.generate(), listen=ANYWHERE, limits=limits) as transport:
            await transport.connect(sender)
            fetcher = ShardFetcher(
                transport=transport,
                ledger=PeerLedger(),
                limits=limits,
                rng=random.Random(1),
                reach=lambda _: transport.connect(sender),
            )
            for _ in range(repeats + 1):
                began = perf_counter()
                await fetcher.fetch(ref, [sender.peer], timeout_s=60)
                shard_rates.append(SHARD_BYTES / 1e6 / (perf_counter() - began))
                raw_rates.append(await _receive_raw(where["port"]))
    finally:
        process.kill()
        await process.wait()
    # The first round warms both paths up.
    shard_rates, raw_rates = shard_rates[1:], raw_rates[1:]
    return [
        Figure("shard transfer, two processes, verified", "MB/s", tuple(shard_rates)),
        Figure("raw trio TCP, 1 MiB writes", "MB/s", tuple(raw_rates)),
        Figure("shard transfer / raw TCP", "x", ratios(shard_rates, raw_rates), at_least=0.10),
    ]


async def _receive_raw(port: int) -> float:
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    received = 0
    began = perf_counter()
    async with stream:
        while chunk := await stream.receive_some(WRITE_BYTES):
            received += len(chunk)
    assert received == SHARD_BYTES
    return SHARD_BYTES / 1e6 / (perf_counter() - began)


if __name__ == "__main__":
    trio.run(serve)
