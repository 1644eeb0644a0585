"""Pulling shards over the simulated network, from holders that are honest, lying, stalling, dying or slow.

Goal: the bytes that come out always match their name, whoever serves them, and one honest holder suffices.
"""

from __future__ import annotations

import contextlib
import random

import pytest
import trio
from blake3 import blake3

from gossip.ledger import PeerLedger
from gossip.messages import (
    CHUNK_BYTES,
    SHARD_PROTOCOL,
    ChunkFollows,
    NotHeld,
    Outline,
    WantChunk,
    WantOutline,
)
from gossip.shard_transfer import STREAM_IDLE_S, FetchFailed, ShardFetcher, ShardServer
from gossip.store import ShardStore, outline_of
from netsim.network import LinkModel, open_sim_network
from p2p.errors import PeerUnreachable
from p2p.frames import receive_message, send_message
from p2p.limits import Limits
from p2p.pacer import Pacer
from p2p.transport import PeerRecord
from tests.gossip.world import IDENTITIES, MemoryDisk

SEEKER, *HOLDERS = (identity.peer for identity in IDENTITIES)
LIMITS = Limits()
LINK = LinkModel(latency_s=0.02, bytes_per_s=20e6)
SMALL = bytes(range(250)) * 40
LARGE = b"".join(blake3(bytes([n])).digest(length=CHUNK_BYTES) for n in range(9)) + b"a short last chunk"


class Seeker:
    """The side that fetches, and the network it fetches over."""

    def __init__(self, network, host):
        self.network = network
        self.host = host
        self.ledger = PeerLedger()
        self.ledgers = {}
        """Of those who really serve."""
        self.fetcher = ShardFetcher(
            transport=host, ledger=self.ledger, limits=LIMITS, rng=random.Random(5), reach=self._reach
        )
        self.asked = []

    async def _reach(self, peer):
        if peer not in self.network.hosts:
            raise PeerUnreachable(f"{peer} is down")
        await self.host.connect(self.network.hosts[peer].local)

    async def fetch(self, ref, holders, timeout_s=600.0, **options):
        return await self.fetcher.fetch(ref, holders, timeout_s=timeout_s, **options)


@contextlib.asynccontextmanager
async def world(*handlers, link=LINK):
    """A seeker, and one holder per handler; a handler of None is a real server that holds SMALL and LARGE."""
    async with (
        open_sim_network(random.Random(1), link=link, limits=LIMITS) as network,
        contextlib.AsyncExitStack() as stack,
    ):
        seeker = Seeker(network, await stack.enter_async_context(network.open_host(SEEKER)))
        for peer, handler in zip(HOLDERS, handlers, strict=False):
            host = await stack.enter_async_context(network.open_host(peer))
            if handler is None:
                store = ShardStore(MemoryDisk(), quota_bytes=1 << 30)
                await store.put(SMALL)
                await store.put(LARGE)
                ledger = seeker.ledgers[peer] = PeerLedger()
                ShardServer(transport=host, store=store, ledger=ledger).serve()
            else:
                host.serve(SHARD_PROTOCOL, handler)
        yield seeker


# --- holders that fail, each in its own way ---------------------------------------------------------------------


async def serve_faithfully(stream, *, chunk=lambda index, data: data, outline=lambda o: o, before=None):
    """Serve LARGE with hooks on what is sent."""
    _, honest = await outline_of(LARGE)
    while (request := await receive_message(stream, WantOutline | WantChunk, bytes_max=1024)) is not None:
        if before is not None:
            await before(request)
        if isinstance(request, WantOutline):
            await send_message(stream, outline(honest))
        else:
            data = chunk(request.index, LARGE[request.index * CHUNK_BYTES :][:CHUNK_BYTES])
            await send_message(stream, ChunkFollows(size=len(data)))
            await stream.send_all(data)


async def lies_about_a_chunk(peer, stream):
    await serve_faithfully(stream, chunk=lambda index, data: data[:-1] + bytes([data[-1] ^ (index == 2)]))


async def lies_about_the_outline(peer, stream):
    await serve_faithfully(stream, outline=lambda o: Outline(size=o.size, chunks=[*o.chunks[:-1], bytes(32)]))


async def sends_a_short_chunk(peer, stream):
    await serve_faithfully(stream, chunk=lambda index, data: data[:-1])


async def stalls(peer, stream):
    async def before(request):
        if isinstance(request, WantChunk):
            await trio.sleep_forever()

    await serve_faithfully(stream, before=before)


async def breaks(peer, stream):
    async def before(request):
        if isinstance(request, WantChunk) and request.index >= 2:
            raise trio.BrokenResourceError

    await serve_faithfully(stream, before=before)


async def babbles(peer, stream):
    await stream.send_all(b"\x00\x00\x00\x04what")
    await trio.sleep_forever()


async def holds_nothing(peer, stream):
    while await receive_message(stream, WantOutline | WantChunk, bytes_max=1024) is not None:
        await send_message(stream, NotHeld())


BAD_HOLDERS = {
    lies_about_a_chunk: "hash",
    lies_about_the_outline: "hash",
    sends_a_short_chunk: "malformed",
    stalls: "stall",
    breaks: "broken",
    babbles: "malformed",
    holds_nothing: "not-held",
}


# --- tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data", [SMALL, LARGE, LARGE[:CHUNK_BYTES], b"x"], ids=["small", "large", "chunk", "byte"]
)
async def test_fetch_from_honest_holders(autojump_clock, data):
    ref, _ = await outline_of(data)
    async with world(None, None, None) as seeker:
        for peer in HOLDERS[:3]:
            if data in (b"x", LARGE[:CHUNK_BYTES]):
                store = ShardStore(MemoryDisk(), quota_bytes=1 << 30)
                await store.put(data)
                seeker.network.hosts[peer].protocols._handlers.clear()
                ShardServer(transport=seeker.network.hosts[peer], store=store, ledger=PeerLedger()).serve()
        assert await seeker.fetch(ref, HOLDERS[:3]) == data
        assert sum(seeker.fetcher.bytes_pulled.values()) == len(data)
        assert not seeker.ledger.refusals


async def test_several_holders_share_the_work(autojump_clock):
    ref, _ = await outline_of(LARGE)
    async with world(None, None, None) as seeker:
        began_s = trio.current_time()
        await seeker.fetch(ref, HOLDERS[:1])
        alone_s = trio.current_time() - began_s
        began_s = trio.current_time()
        await seeker.fetch(ref, HOLDERS[:3])
        together_s = trio.current_time() - began_s
    assert together_s < 0.6 * alone_s
    assert all(seeker.fetcher.bytes_pulled[peer] for peer in HOLDERS[:3])


async def test_pipelining_hides_the_round_trips(autojump_clock):
    ref, _ = await outline_of(LARGE)
    async with world(None, link=LinkModel(latency_s=0.025, bytes_per_s=8e6)) as seeker:
        began_s = trio.current_time()
        await seeker.fetch(ref, HOLDERS[:1])
        taken_s = trio.current_time() - began_s
    # One round trip per chunk would add half a second.
    assert taken_s < 0.2 + 1.02 * len(LARGE) / 8e6


async def test_a_chunk_from_the_only_holder_takes_one_round_trip(autojump_clock):
    ref, _ = await outline_of(SMALL)
    async with world(None, link=LinkModel(latency_s=0.25)) as seeker:
        await seeker.host.connect(seeker.network.hosts[HOLDERS[0]].local)
        began_s = trio.current_time()
        assert await seeker.fetch(ref, HOLDERS[:1]) == SMALL
        assert trio.current_time() - began_s == pytest.approx(0.5)


async def test_a_holder_that_does_not_answer_keeps_no_chunk_from_the_others(autojump_clock):
    ref, _ = await outline_of(SMALL)
    async with world(None, None) as seeker:
        for silent in HOLDERS[:2]:  # whichever is asked first
            for peer in HOLDERS[:2]:
                latency_s = 60.0 if peer == silent else 0.02
                seeker.network.set_link(peer, SEEKER, LinkModel(latency_s=latency_s))
                await seeker.host.disconnect(peer, "so that it is dialled again")
                await seeker.host.connect(seeker.network.hosts[peer].local)
            began_s = trio.current_time()
            assert await seeker.fetch(ref, HOLDERS[:2]) == SMALL
            assert trio.current_time() - began_s < 1


async def test_a_holder_that_takes_nobody_on_costs_the_fetch_and_no_standing(autojump_clock):
    ref, _ = await outline_of(SMALL)
    async with world(None) as seeker:
        host = seeker.network.hosts[HOLDERS[0]]
        await seeker.host.connect(host.local)
        streams = [
            await seeker.host.open_stream(HOLDERS[0], SHARD_PROTOCOL)
            for _ in range(LIMITS.streams_per_peer_max)
        ]
        with pytest.raises(FetchFailed) as caught:
            await seeker.fetch(ref, HOLDERS[:1])
        assert "no answer" in caught.value.why
        for stream in streams:
            stream.close()
        await trio.sleep(1)
        handler = host.protocols._handlers.pop(SHARD_PROTOCOL)
        with pytest.raises(FetchFailed) as caught:
            await seeker.fetch(ref, HOLDERS[:1])
        assert "does not speak" in caught.value.why
        host.serve(SHARD_PROTOCOL, handler)
        seeker.network.set_link(HOLDERS[0], SEEKER, LinkModel(latency_s=60))
        with pytest.raises(FetchFailed) as caught:
            await seeker.fetch(ref, HOLDERS[:1])
        assert "did not answer within 15 s" in caught.value.why
    assert not seeker.ledger.refusals


@pytest.mark.parametrize("bad", BAD_HOLDERS)
async def test_a_bad_holder_alone_fails_the_fetch_and_is_noted(autojump_clock, bad):
    ref, _ = await outline_of(LARGE)
    async with world(bad) as seeker:
        with pytest.raises(FetchFailed) as caught:
            await seeker.fetch(ref, HOLDERS[:1])
    assert HOLDERS[0] in caught.value.why
    assert seeker.ledger.refusals == {BAD_HOLDERS[bad]: 1}


@pytest.mark.parametrize("bad", BAD_HOLDERS)
async def test_one_honest_holder_among_bad_ones_suffices(autojump_clock, bad):
    ref, _ = await outline_of(LARGE)
    async with world(bad, bad, None) as seeker:
        assert await seeker.fetch(ref, HOLDERS[:3]) == LARGE
        assert seeker.ledger.standing(HOLDERS[2]) == 100.0


async def test_standing_by_holders_are_used_when_the_first_four_fail(autojump_clock):
    ref, _ = await outline_of(LARGE)
    async with world(*[holds_nothing] * 4, None) as seeker:
        assert await seeker.fetch(ref, HOLDERS) == LARGE


async def test_a_holder_that_dies_in_the_middle_is_replaced_and_its_chunks_are_kept(autojump_clock):
    ref, _ = await outline_of(LARGE)
    async with world(None, None) as seeker:
        async with trio.open_nursery() as nursery:

            async def kill_one():
                while seeker.fetcher.bytes_pulled[HOLDERS[0]] < 2 * CHUNK_BYTES:
                    await trio.sleep(0.05)
                seeker.network.crash(HOLDERS[0])

            nursery.start_soon(kill_one)
            assert await seeker.fetch(ref, HOLDERS[:2]) == LARGE
        assert sum(seeker.fetcher.bytes_pulled.values()) == len(LARGE), "no chunk was accepted twice"


async def test_nobody_to_ask(autojump_clock):
    ref, _ = await outline_of(SMALL)
    async with world() as seeker:
        for holders in ([], [HOLDERS[0]]):
            with pytest.raises(FetchFailed):
                await seeker.fetch(ref, holders)


async def test_the_deadline_holds(autojump_clock):
    ref, _ = await outline_of(LARGE)
    async with world(stalls) as seeker:
        began_s = trio.current_time()
        with pytest.raises(FetchFailed, match="could not be fetched") as caught:
            await seeker.fetch(ref, HOLDERS[:1], timeout_s=3.0)
        assert trio.current_time() - began_s == pytest.approx(3.0)
        assert "not done after 3 s" in caught.value.why


async def test_a_shard_beyond_the_limit_is_not_even_asked_for(autojump_clock):
    ref, _ = await outline_of(SMALL)
    async with world(None) as seeker:
        seeker.fetcher.limits = Limits(shard_bytes_max=len(SMALL) - 1)
        with pytest.raises(FetchFailed, match="limit"):
            await seeker.fetch(ref, HOLDERS[:1])


async def test_banned_holders_are_not_asked_and_not_answered(autojump_clock):
    ref, _ = await outline_of(SMALL)
    async with world(None) as seeker:
        for _ in range(2):
            seeker.ledger.note(HOLDERS[0], "hash")
        with pytest.raises(FetchFailed, match="could not be fetched"):
            await seeker.fetch(ref, HOLDERS[:1])
        assert HOLDERS[0] not in seeker.host.peers()


async def test_who_rests_serves_nobody_though_it_is_connected(autojump_clock):
    ref, _ = await outline_of(SMALL)
    async with world(None) as seeker:
        seeker.ledgers[HOLDERS[0]].resting = "enough for today"
        with pytest.raises(FetchFailed, match="could not be fetched"):
            await seeker.fetch(ref, HOLDERS[:1])
        seeker.ledgers[HOLDERS[0]].resting = ""
        assert await seeker.fetch(ref, HOLDERS[:1]) == SMALL


async def test_a_pacer_bounds_the_rate_of_all_who_share_it(autojump_clock):
    ref, _ = await outline_of(LARGE)
    async with world(None, None) as seeker:
        pacer = Pacer(2e6)
        began_s = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(lambda: seeker.fetch(ref, HOLDERS[:2], pacer=pacer))
        taken_s = trio.current_time() - began_s
    expected_s = 2 * len(LARGE) / 2e6
    assert expected_s * 0.85 < taken_s < expected_s * 1.15


async def test_a_server_under_a_rate_limit_is_slow_but_never_called_stalled(autojump_clock):
    ref, _ = await outline_of(LARGE)
    async with world() as seeker, seeker.network.open_host(HOLDERS[0]) as host:
        store = ShardStore(MemoryDisk(), quota_bytes=1 << 30)
        await store.put(LARGE)
        ShardServer(transport=host, store=store, ledger=PeerLedger(), pacer=Pacer(100e3)).serve()
        began_s = trio.current_time()
        assert await seeker.fetch(ref, HOLDERS[:1]) == LARGE
        assert trio.current_time() - began_s == pytest.approx(len(LARGE) / 100e3, rel=0.1)
    assert not seeker.ledger.refusals


async def test_the_server_survives_strange_requests_and_closes_idle_streams(autojump_clock):
    ref, _ = await outline_of(SMALL)
    async with world(None) as seeker:
        await seeker.host.connect(PeerRecord(HOLDERS[0], seeker.network.hosts[HOLDERS[0]].local.addresses))
        stream = await seeker.host.open_stream(HOLDERS[0], SHARD_PROTOCOL)
        await send_message(stream, WantChunk(shard=ref, index=1))
        assert await receive_message(stream, NotHeld, bytes_max=64) == NotHeld()
        await send_message(stream, WantChunk(shard=ref, index=2**53))
        assert await receive_message(stream, NotHeld, bytes_max=64) == NotHeld()
        with trio.fail_after(STREAM_IDLE_S + 1):
            assert await receive_message(stream, NotHeld, bytes_max=64) is None
        oversized = await seeker.host.open_stream(HOLDERS[0], SHARD_PROTOCOL)
        await oversized.send_all(b"\xff\xff\xff\xff")
        with pytest.raises(trio.BrokenResourceError):
            await oversized.receive_some(1)
        assert await seeker.fetch(ref, HOLDERS[:1]) == SMALL


async def test_damage_at_rest_is_not_passed_on_and_can_be_repaired_from_a_peer(autojump_clock):
    ref, _ = await outline_of(LARGE)
    disk = MemoryDisk()
    await ShardStore(disk, quota_bytes=1 << 30).put(LARGE)
    disk.flip_bit(next(iter(disk.files)), 5 * CHUNK_BYTES)
    store = ShardStore(disk, quota_bytes=1 << 30)
    await store.load()
    async with world(None) as seeker, seeker.network.open_host(HOLDERS[1]) as host:
        ShardServer(transport=host, store=store, ledger=PeerLedger()).serve()
        assert await seeker.fetch(ref, HOLDERS[:2]) == LARGE
        assert store.statistics().damaged == 1
        assert not store.holds(ref)
        await store.put(await seeker.fetch(ref, HOLDERS[:1]))
        assert await store.get(ref) == LARGE
