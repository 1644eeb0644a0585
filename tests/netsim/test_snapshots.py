"""Snapshots on request: as fresh as asking, shared, kept while they may be wanted, and never more than a few."""

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import torch
import trio
from trio.testing import MockClock

from gossip.ledger import PeerLedger
from gossip.messages import SNAPSHOT_PROTOCOL, ShardRef, Snapshot, WantSnapshot
from gossip.store import ShardStore
from netsim.compute import SimCompute
from netsim.disk import SimDisk
from netsim.network import open_sim_network
from node.costs import Costs
from node.snapshots import SHARED_S, Snapshots
from p2p.errors import CallRefused
from p2p.limits import DEFAULT_LIMITS
from p2p.rpc import call
from p2p.transport import Transport
from tests.gossip.world import IDENTITIES
from tests.netsim.test_world import SPEC, small_corpus
from training.codecs.named import WIRES
from training.run_spec import run_id
from training.schedules import Schedule
from training.trainer import Trainer

KEPT_MAX = 2 + 2 * Schedule.of(SPEC).peers_max


class Served:
    """A node that serves snapshots, and peers that are connected to it and ask."""

    def __init__(self, host: Transport, askers: list[Transport], quota_bytes: int) -> None:
        self.host = host
        self.askers = askers
        self.ledger = PeerLedger()
        self.store = ShardStore(SimDisk(), quota_bytes=quota_bytes)
        self.trainer = Trainer(
            SPEC, small_corpus(), run=run_id(SPEC), peer="serving", part=None, device="cpu", threads=1
        )
        self.snapshots = Snapshots(
            transport=host,
            trainer=self.trainer,
            compute=SimCompute(),
            costs=Costs(),
            store=self.store,
            ledger=self.ledger,
            limits=DEFAULT_LIMITS,
            peers_max=Schedule.of(SPEC).peers_max,
            wire=SPEC.exchange.wire,
        )
        self.snapshots.serve()

    async def ask(self, asker: int, fragment: int = 0) -> ShardRef:
        """What one peer is given."""
        want = WantSnapshot(fragment=fragment)
        reply = await call(
            self.askers[asker], self.host.local.peer, SNAPSHOT_PROTOCOL, want, Snapshot, timeout_s=5
        )
        return reply.shard

    async def values(self, shard: ShardRef, fragment: int = 0) -> torch.Tensor:
        """The weights in it."""
        size = self.trainer.layout.fragment_size(fragment)
        return WIRES[SPEC.exchange.wire].decode(await self.store.get(shard), size)


@asynccontextmanager
async def served(askers: int, *, quota_bytes: int = 1 << 26) -> AsyncIterator[Served]:
    async with AsyncExitStack() as stack:
        network = await stack.enter_async_context(open_sim_network(random.Random(1)))
        hosts = [
            await stack.enter_async_context(network.open_host(identity.peer))
            for identity in IDENTITIES[: askers + 1]
        ]
        for asker in hosts[1:]:
            await asker.connect(hosts[0].local)
        yield Served(hosts[0], list(hosts[1:]), quota_bytes)


async def test_a_snapshot_is_of_the_weights_at_the_moment_of_asking(autojump_clock: MockClock) -> None:
    async with served(1) as node:
        for fragment in (0, 1):
            node.trainer.run_slice(1)
            live = node.trainer.read(fragment)
            assert torch.equal(await node.values(await node.ask(0, fragment), fragment), live)
            await trio.sleep(10 * SHARED_S)


async def test_who_asks_at_the_same_time_gets_the_same_snapshot(autojump_clock: MockClock) -> None:
    async with served(3) as node:
        first = await node.ask(0)
        node.trainer.run_slice(1)
        assert await node.ask(1) == first
        await trio.sleep(10 * SHARED_S)
        assert await node.ask(2) != first
        assert node.snapshots.taken == 2


async def test_a_snapshot_is_kept_until_its_last_peer_asks_again(autojump_clock: MockClock) -> None:
    async with served(2) as node:
        first = await node.ask(0)
        assert await node.ask(1) == first
        for asker in (0, 1):
            assert node.store.holds(first)
            node.trainer.run_slice(1)
            await trio.sleep(10 * SHARED_S)
            await node.ask(asker)
        assert not node.store.holds(first)


async def test_peers_that_never_come_back_do_not_fill_the_store(autojump_clock: MockClock) -> None:
    async with served(5) as node:
        given = []
        for asker in range(5):
            given.append(await node.ask(asker))
            node.trainer.run_slice(1)
            await trio.sleep(10 * SHARED_S)
        assert [node.store.holds(shard) for shard in given] == [False] * (5 - KEPT_MAX) + [True] * KEPT_MAX


async def test_a_peer_that_asks_without_pause_is_given_few_snapshots(autojump_clock: MockClock) -> None:
    async with served(1) as node:
        began_s = trio.current_time()
        for _ in range(200):
            await node.ask(0)
        assert node.snapshots.taken <= 1 + (trio.current_time() - began_s) / SHARED_S


@pytest.mark.parametrize("fragment", [2, 2**53])
async def test_a_fragment_that_does_not_exist_is_refused(autojump_clock: MockClock, fragment: int) -> None:
    async with served(1) as node:
        with pytest.raises(CallRefused, match="2 fragments"):
            await node.ask(0, fragment)


async def test_a_banned_peer_is_refused(autojump_clock: MockClock) -> None:
    async with served(1) as node:
        while not node.ledger.banned(node.askers[0].local.peer):
            node.ledger.note(node.askers[0].local.peer, "hash", "lies")
        with pytest.raises(CallRefused, match="does not serve"):
            await node.ask(0)


async def test_a_full_store_is_a_refusal_and_not_a_crash(autojump_clock: MockClock) -> None:
    async with served(1, quota_bytes=100) as node:
        for _ in range(2):
            with pytest.raises(CallRefused, match="no room"):
                await node.ask(0)
