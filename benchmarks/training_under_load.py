"""Training beside the network: tokens per second alone, and while receiving and sending 10 MB/s at the same time.

One process trains as the daemon does (slices in the train lane of ThreadCompute) and holds one connection to a peer
process. In loaded windows each pulls shards from the other, paced to 10 MB/s by the product's own pacer. Run as a
module it is that peer.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from functools import partial
from pathlib import Path

import trio

from benchmarks.harness import Figure, ratios
from gossip.ledger import PeerLedger
from gossip.messages import ShardRef
from gossip.shard_transfer import ShardFetcher, ShardServer
from gossip.store import ShardStore
from node.compute import ThreadCompute
from node.disk import LocalDisk
from node.gossip_node import SLICE_S
from p2p.identity import Identity
from p2p.libp2p_transport import open_libp2p
from p2p.limits import Limits
from p2p.pacer import Pacer
from p2p.transport import PeerId, PeerRecord, Transport
from training.data import Corpus
from training.run_spec import parse_run_spec, run_id
from training.trainer import Trainer

RATE_BYTES_PER_S = 10_000_000
SHARD_BYTES = 8 << 20
WINDOW_S = 4.0
ANYWHERE = ("/ip4/127.0.0.1/tcp/0",)
LIMITS = Limits()


class Traffic:
    """Pulls the other side's shard over and over while ``on``; one per process."""

    def __init__(self, transport: Transport, peer: PeerRecord, shard: ShardRef) -> None:
        self._peer = peer
        self._shard = shard
        self._fetcher = ShardFetcher(
            transport=transport,
            ledger=PeerLedger(),
            limits=LIMITS,
            rng=random.Random(1),
            reach=lambda _: transport.connect(peer),
        )

    async def pull_for(self, seconds: float) -> None:
        """Pull at the paced rate for ``seconds``."""
        pacer = Pacer(RATE_BYTES_PER_S)
        with trio.move_on_after(seconds):
            while True:
                await self._fetcher.fetch(self._shard, [self._peer.peer], timeout_s=60, pacer=pacer)


async def _store(transport: Transport, folder: str) -> tuple[ShardStore, ShardRef]:
    store = ShardStore(LocalDisk(Path(folder)), quota_bytes=1 << 30)
    shard = await store.put(os.urandom(SHARD_BYTES))
    ShardServer(transport=transport, store=store, ledger=PeerLedger()).serve()
    return store, shard


def _tell(transport: Transport, shard: ShardRef) -> str:
    return json.dumps(
        {"peer": transport.local.peer, "addresses": transport.local.addresses, "root": shard.root.hex()}
    )


def _told(line: str) -> tuple[PeerRecord, ShardRef]:
    where = json.loads(line)
    record = PeerRecord(PeerId(where["peer"]), tuple(where["addresses"]))
    return record, ShardRef(root=bytes.fromhex(where["root"]), size=SHARD_BYTES)


async def peer() -> None:
    """The other process: on each line of standing input it pulls for as many seconds as the line says."""
    with tempfile.TemporaryDirectory() as folder:
        async with open_libp2p(Identity.generate(), listen=ANYWHERE, limits=LIMITS) as transport:
            _, shard = await _store(transport, folder)
            print(_tell(transport, shard), flush=True)
            lines = trio.wrap_file(sys.stdin)
            traffic = Traffic(transport, *_told(await lines.readline()))
            async for line in lines:
                await traffic.pull_for(float(line))


async def measure(repeats: int = 5) -> list[Figure]:
    """Tokens/s in windows with and without traffic, in turn, and their ratio."""
    spec = parse_run_spec('name = "load-bench"')
    identity = Identity.generate()
    corpus = await trio.to_thread.run_sync(partial(Corpus.load, "stdlib", None))
    trainer = Trainer(spec, corpus, run=run_id(spec), peer=identity.peer, part=None, device="cpu", threads=1)
    compute = ThreadCompute()
    quiet, loaded, rates = [], [], []
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "benchmarks.training_under_load"], stdin=-1, stdout=-1
    )
    try:
        assert process.stdout is not None
        assert process.stdin is not None
        with tempfile.TemporaryDirectory() as folder:
            async with open_libp2p(identity, listen=ANYWHERE, limits=LIMITS) as transport:
                _, shard = await _store(transport, folder)
                traffic = Traffic(transport, *_told((await process.stdout.receive_some()).decode()))
                await process.stdin.send_all(f"{_tell(transport, shard)}\n".encode())
                await _train_for(trainer, compute, WINDOW_S)
                for _ in range(repeats):
                    quiet.append(await _train_for(trainer, compute, WINDOW_S))
                    before = transport.traffic()
                    async with trio.open_nursery() as nursery:
                        await process.stdin.send_all(f"{WINDOW_S}\n".encode())
                        nursery.start_soon(traffic.pull_for, WINDOW_S)
                        loaded.append(await _train_for(trainer, compute, WINDOW_S))
                    after = transport.traffic()
                    moved = (
                        after.bytes_sent - before.bytes_sent + after.bytes_received - before.bytes_received
                    ) / 2
                    rates.append(moved / 1e6 / WINDOW_S)
    finally:
        process.kill()
        await process.wait()
    return [
        Figure("training alone", "tokens/s", tuple(quiet)),
        Figure("training while sending and receiving", "tokens/s", tuple(loaded)),
        Figure("  rate of each direction meanwhile", "MB/s", tuple(rates)),
        Figure("training under load / alone", "x", ratios(loaded, quiet), at_least=0.95),
    ]


async def _train_for(trainer: Trainer, compute: ThreadCompute, seconds: float) -> float:
    """Tokens per second over a window of about ``seconds``."""
    began_s, tokens, steps = trio.current_time(), 0, 1
    while trio.current_time() - began_s < seconds:
        slice_began_s = trio.current_time()
        report = await compute.run(partial(trainer.run_slice, steps), lane="train", cost_s=0.0)
        tokens += report.tokens
        steps = max(1, round(SLICE_S * steps / (trio.current_time() - slice_began_s)))
    return tokens / (trio.current_time() - began_s)


if __name__ == "__main__":
    trio.run(peer)
