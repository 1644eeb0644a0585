"""A small world for merge tests: members with real mergers on the simulated network, and hosts that add integers.

A member believes alive whom it is connected to. Every second each member connects to the others it can reach and
hears their heads, as heartbeats would tell it.
"""

from __future__ import annotations

import contextlib
import errno
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence

import trio
from blake3 import blake3

from gossip.merge_shape import MergeShape
from gossip.merge_work import ResultRefused
from gossip.merging import InputRefused, Merger
from gossip.messages import CommittedRecord, Contribution, MergeRecord, PieceResult, ShardRef
from netsim.network import SimHost, SimNetwork, open_sim_network
from p2p.errors import GossamerError
from p2p.limits import Limits
from p2p.transport import PeerDown, PeerId, PeerUp, ProtocolName, StreamHandler
from tests.gossip.world import RUN, MemoryDisk

PIECES = 3
ABSURD = 10**30
"""No weighted sum comes to this."""
LATENCY_S = 0.02
PERIOD_S = 60.0
LIMITS = Limits(merge_call_timeout_s=5.0)
Hook = Callable[[PeerId, str], None]


class CheapSigner:
    """A Signer whose signatures are keyed hashes: fast, and as hard to mistake as needed in a test."""

    def __init__(self, peer: PeerId) -> None:
        self.peer = peer

    def sign(self, purpose: str, payload: bytes) -> bytes:
        """Sixty-four bytes that only this peer and purpose give for ``payload``."""
        return blake3(f"{self.peer}/{purpose}/".encode() + payload).digest(64)

    def verify(self, peer: PeerId, purpose: str, payload: bytes, signature: bytes) -> bool:
        """Whether ``peer`` made it."""
        return CheapSigner(peer).sign(purpose, payload) == signature


def peer_named(number: int) -> PeerId:
    """A peer id of the right length."""
    return PeerId(f"peer-{number:02d}-".ljust(44, "x"))


class IntegerHost:
    """A MergeHost whose weights are one integer per piece, and whose average is their weighted sum."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.live = [member.number * 1000 + piece for piece in range(PIECES)]
        self.anchors: list[tuple[bytes, list[int]]] = []
        """(record hash, anchor) of every adoption."""
        self.contributed: list[bool] = []
        self.refuses: set[PeerId] = set()
        self.lies_about: set[int] = set()
        """Pieces that this host sums wrongly."""
        self.absurd = False
        """Its sums are out of all proportion."""
        self.shard_bytes = 16
        """Another number is another model."""
        self.full = False
        """Nothing more fits on the disk."""
        self.transfer_s = 2 * LATENCY_S
        self.fetches: Counter[bytes] = Counter()
        """How often each shard was asked for."""

    def alive(self) -> Sequence[PeerId]:
        """Everybody connected."""
        return sorted({self.member.peer, *self.member.host.peers()})

    def unheard_s(self, peer: PeerId) -> float:
        """Since the connection ended."""
        if peer in self.member.host.peers():
            return 0.0
        return trio.current_time() - self.member.last_seen_s.get(peer, 0.0)

    async def contribute(self, parent: bytes, moved: Sequence[int]) -> Contribution | None:
        """The live integers."""
        await trio.sleep(0.01)
        inputs = [self.keep(self.live[piece]) for piece in moved]
        return Contribution(
            peer=self.member.peer, weight=1 + self.member.number, moved=list(moved), inputs=inputs
        )

    async def sum_piece(
        self, parent: bytes, piece: int, inputs: Sequence[tuple[PeerId, ShardRef, int]]
    ) -> PieceResult:
        """Their weighted sum."""
        for peer, _, _ in inputs:
            if peer in self.refuses:
                raise InputRefused(peer, "not to my taste")
        await trio.sleep(0.01)
        total = sum(weight * self.value(ref) for _, ref, weight in inputs)
        shard = self.keep(total + (piece in self.lies_about) + 2 * ABSURD * self.absurd)
        return PieceResult(piece=piece, shard=shard, update=None)

    def holds_anchor(self, record: bytes) -> bool:
        """Integers travel as they are."""
        return False

    async def apply_update(self, parent: bytes, piece: int, update: ShardRef) -> ShardRef:
        """Never asked for."""
        raise AssertionError

    def hold(self, record: MergeRecord) -> None:
        """Nothing here is ever let go of."""

    async def secure(self, record: MergeRecord) -> None:
        """Shards here outlive every crash, unless the disk is full."""
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")

    async def check_result(self, parent: bytes, piece: int, ref: ShardRef) -> None:
        """Integers within reason are welcome."""
        if self.value(ref) > ABSURD:
            raise ResultRefused("norm", "out of all proportion")

    async def fetch(
        self, ref: ShardRef, holders: Sequence[PeerId], timeout_s: float, *, volatile: bool
    ) -> None:
        """Copy the shard from the first holder that is up, reachable and has it."""
        if self.full and ref.root not in self.member.shards:
            raise OSError(errno.ENOSPC, "No space left on device")
        for holder in holders:
            if ref.root in self.member.shards:
                return
            self.fetches[ref.root] += 1
            await trio.sleep(self.transfer_s)
            source = self.member.world.members[holder]
            if source.up and holder in self.member.host.peers() and ref.root in source.shards:
                self.member.shards[ref.root] = source.shards[ref.root]
        if ref.root not in self.member.shards:
            raise GossamerError(f"{ref.root.hex()[:8]} is nowhere to be had")

    async def adopt(
        self, committed: CommittedRecord, record_hash: bytes, contributed: bool, *, duration_s: float
    ) -> None:
        """Take the sums as the anchor."""
        anchor = [self.value(ref) for ref in committed.record.results]
        self.anchors.append((record_hash, anchor))
        self.contributed.append(contributed)
        self.live = [value % 1009 + self.member.number for value in anchor]

    def keep(self, value: int) -> ShardRef:
        """Store one integer."""
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        data = value.to_bytes(self.shard_bytes, "big")
        root = blake3(data).digest()
        self.member.shards[root] = data
        return ShardRef(root=root, size=len(data))

    def value(self, ref: ShardRef) -> int:
        """Read one integer, which must be here."""
        return int.from_bytes(self.member.shards[ref.root], "big")


class TappedTransport:
    """A SimHost that tells ``hook`` of every merge call before it is made, when it arrives and once answered."""

    def __init__(self, host: SimHost, hook: Hook) -> None:
        self._host = host
        self._hook = hook

    def __getattr__(self, name: str) -> object:
        return getattr(self._host, name)

    async def open_stream(self, peer: PeerId, protocol: ProtocolName) -> trio.abc.HalfCloseableStream:
        """As the host, after the hook."""
        self._hook(self._host.local.peer, "asks")
        await trio.lowlevel.checkpoint()
        return await self._host.open_stream(peer, protocol)

    def serve(self, protocol: ProtocolName, handler: StreamHandler) -> None:
        """As the host, with the hook around the handler."""

        async def tapped(peer: PeerId, stream: trio.abc.HalfCloseableStream) -> None:
            self._hook(self._host.local.peer, "hears")
            await trio.lowlevel.checkpoint()
            await handler(peer, stream)
            self._hook(self._host.local.peer, "answered")

        self._host.serve(protocol, tapped)


class Member:
    """One member over all its lives: what is on its disk stays, the rest is new after a restart."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.number = number
        self.peer = peer_named(number)
        self.disk = MemoryDisk()
        self.shards: dict[bytes, bytes] = {}
        self.last_seen_s: dict[PeerId, float] = {}
        self.offences: list[tuple[PeerId, str]] = []
        self.numbers = IntegerHost(self)
        self.host: SimHost
        self.merger: Merger

    async def live(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Be up until crashed."""
        network = self.world.network
        async with network.open_host(self.peer) as self.host:
            transport = TappedTransport(self.host, lambda peer, event: self.world.hook(peer, event))
            self.merger = Merger(
                transport=transport,  # type: ignore[arg-type]
                signer=CheapSigner(self.peer),
                run=RUN,
                disk=self.disk,
                host=self.numbers,
                shape=MergeShape((16,) * PIECES),
                replicas=self.world.replicas,
                merge_period_s=PERIOD_S,
                limits=LIMITS,
                rng=random.Random(self.number),
                note=lambda peer, code, what: self.offences.append((peer, code)),
                reach=self.reach,
            )
            await self.merger.load()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.merger.run)
                nursery.start_soon(self._watch)
                nursery.start_soon(self._mingle)
                await self._connect()
                task_status.started()

    @property
    def up(self) -> bool:
        """Whether it lives now."""
        return self.peer in self.world.network.hosts

    async def reach(self, peer: PeerId) -> None:
        """Connect if need be."""
        target = self.world.network.hosts.get(peer)
        if target is None:
            raise GossamerError(f"{peer} is down")
        await self.host.connect(target.local)

    async def _connect(self) -> None:
        for other in self.world.members.values():
            if other is not self and other.up and self.world.network.reachable(self.peer, other.peer):
                with contextlib.suppress(GossamerError):
                    await self.reach(other.peer)

    async def _watch(self) -> None:
        async for event in self.host.peer_events():
            match event:
                case PeerUp() | PeerDown():
                    self.last_seen_s[event.peer] = trio.current_time()

    async def _mingle(self) -> None:
        while True:
            await trio.sleep(1.0)
            await self._connect()
            for peer in self.host.peers():
                merger = self.world.members[peer].merger
                self.merger.heads_changed(peer, merger.head, merger.head_height, merger.head_participants)


class World:
    """All members, and the hook that hears of every merge call."""

    def __init__(self, network: SimNetwork, nursery: trio.Nursery, count: int, replicas: int) -> None:
        self.network = network
        self.replicas = replicas
        self.members = {peer_named(number): Member(self, number) for number in range(count)}
        self.hook: Hook = lambda peer, event: None
        self._nursery = nursery

    def __getitem__(self, number: int) -> Member:
        return self.members[peer_named(number)]

    async def start(self, *numbers: int) -> None:
        """Bring members up, connected to all that are up."""
        for number in numbers:
            await self._nursery.start(self[number].live)

    def crash(self, number: int) -> None:
        """Kill a member where it stands."""
        if self[number].up:
            self.network.crash(self[number].peer)

    @property
    def up(self) -> list[Member]:
        """Members that are up."""
        return [member for member in self.members.values() if member.up]

    def due(self, point: int) -> None:
        """The point is due at every member that is up."""
        for member in self.up:
            member.merger.due(point)

    async def committed(self, height: int, within_s: float) -> float:
        """Wait until every member that is up has adopted ``height``; returns how long that took."""
        began_s = trio.current_time()
        with trio.fail_after(within_s):
            while not all(member.merger.statistics().adopted_height >= height for member in self.up):
                await trio.sleep(0.01)
        return trio.current_time() - began_s

    def check_agreement(self) -> None:
        """Members with equal heads hold equal anchors; and all that are up have one head."""
        anchors: dict[bytes, list[int]] = {}
        for member in self.members.values():
            for name, anchor in member.numbers.anchors:
                assert anchors.setdefault(name, anchor) == anchor
        assert len({member.merger.head for member in self.up}) <= 1


@contextlib.asynccontextmanager
async def open_world(count: int, *, replicas: int = 1, seed: int = 0) -> AsyncIterator[World]:
    """A world of ``count`` members, all up and connected."""
    async with (
        open_sim_network(random.Random(seed)) as network,
        trio.open_nursery() as nursery,
    ):
        world = World(network, nursery, count, replicas)
        await world.start(*range(count))
        yield world
        nursery.cancel_scope.cancel()
