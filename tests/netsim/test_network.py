"""What a scenario can do to the simulated network: latency, bandwidth, partitions, crashes."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
import trio.testing

from netsim.network import LinkModel, SimHost, SimNetwork, open_sim_network
from p2p.codec import WireMessage
from p2p.errors import PeerUnreachable, ProtocolUnsupported
from p2p.limits import Limits
from p2p.rpc import call, serve_calls
from p2p.service import open_service_nursery
from p2p.transport import PeerDown, PeerId, PeerUp, ProtocolName

ECHO = ProtocolName("/test/echo/1")
LIMITS = Limits(peer_silence_s=12, dial_timeout_s=10, stream_timeout_s=15)
A, B, C = (PeerId(name) for name in ("a", "b", "c"))
Clock = trio.testing.MockClock


async def echo(_: PeerId, stream: trio.abc.HalfCloseableStream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


@pytest.fixture
async def network() -> AsyncIterator[SimNetwork]:
    async with open_sim_network(random.Random(1), link=LinkModel(latency_s=0.1), limits=LIMITS) as network:
        yield network


@pytest.fixture
async def hosts(network: SimNetwork) -> AsyncIterator[dict[PeerId, SimHost]]:
    async with open_service_nursery() as nursery:

        async def keep(peer: PeerId, task_status: Any) -> None:
            async with network.open_host(peer) as host:
                host.serve(ECHO, echo)
                task_status.started(host)
                await trio.sleep_forever()

        yield {peer: await nursery.start(keep, peer) for peer in (A, B, C)}


async def round_trip_s(near: SimHost, far: SimHost, size: int = 1) -> float:
    started = trio.current_time()
    async with await near.open_stream(far.local.peer, ECHO) as stream:
        await stream.send_all(bytes(size))
        received = 0
        while received < size:
            received += len(await stream.receive_some())
        return trio.current_time() - started


async def test_time_passes_as_the_links_say(
    autojump_clock: Clock, network: SimNetwork, hosts: dict[PeerId, SimHost]
) -> None:
    started = trio.current_time()
    await hosts[A].connect(hosts[B].local)
    assert trio.current_time() - started == pytest.approx(0.3)
    assert await round_trip_s(hosts[A], hosts[B]) == pytest.approx(0.2)
    network.set_link(A, B, LinkModel(latency_s=1.0))
    assert await round_trip_s(hosts[A], hosts[B]) == pytest.approx(1.1)
    await trio.sleep(1.0)  # what closed the last stream is there
    network.set_link(A, B, LinkModel(latency_s=0.0, bytes_per_s=1e6))
    assert await round_trip_s(hosts[A], hosts[B], size=500_000) == pytest.approx(0.6, abs=0.01)


class Number(WireMessage, frozen=True):
    value: int


async def test_a_call_takes_one_round_trip_and_so_does_its_refusal(
    autojump_clock: Clock, hosts: dict[PeerId, SimHost]
) -> None:
    async def repeat(_: PeerId, request: Number) -> Number:
        return request

    serve_calls(
        hosts[B], ProtocolName("/test/call/1"), Number, repeat, limits=LIMITS, on_malformed=lambda *_: None
    )
    await hosts[A].connect(hosts[B].local)
    for protocol in ("/test/call/1", "/test/unknown/1"):
        started = trio.current_time()
        with contextlib.suppress(ProtocolUnsupported):
            await call(hosts[A], B, ProtocolName(protocol), Number(value=1), Number, timeout_s=5)
        assert trio.current_time() - started == pytest.approx(0.2)


async def test_a_peer_that_cannot_answer_is_given_up_at_the_first_read(
    autojump_clock: Clock, network: SimNetwork, hosts: dict[PeerId, SimHost]
) -> None:
    await hosts[A].connect(hosts[B].local)
    network.set_link(B, A, LinkModel(latency_s=60))
    stream = await hosts[A].open_stream(B, ECHO)
    await stream.send_all(b"hello?")
    started = trio.current_time()
    with pytest.raises(trio.BrokenResourceError, match="did not answer within 15 s"):
        await stream.receive_some()
    assert trio.current_time() - started == pytest.approx(LIMITS.stream_timeout_s)
    await trio.sleep(1)
    assert not hosts[B].traffic().streams_open


async def test_jitter_never_reorders_a_stream(
    autojump_clock: Clock, network: SimNetwork, hosts: dict[PeerId, SimHost]
) -> None:
    network.set_link(A, B, LinkModel(latency_s=0.01, jitter_s=1.0))
    await hosts[A].connect(hosts[B].local)
    sent = b"".join(number.to_bytes(2, "big") for number in range(200))
    async with await hosts[A].open_stream(B, ECHO) as stream:
        for at in range(0, len(sent), 2):
            await stream.send_all(sent[at : at + 2])
            await trio.sleep(0.01)
        received = b""
        while len(received) < len(sent):
            received += await stream.receive_some()
    assert received == sent


async def test_a_short_partition_delays_and_a_long_one_disconnects(
    autojump_clock: Clock, network: SimNetwork, hosts: dict[PeerId, SimHost]
) -> None:
    await hosts[A].connect(hosts[B].local)
    await hosts[A].connect(hosts[C].local)
    events = hosts[A].peer_events()
    network.cut([A], [B])

    async def heal_later() -> None:
        await trio.sleep(5)
        network.heal()

    stream = await hosts[A].open_stream(C, ECHO)  # the other link is not touched
    await stream.aclose()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(heal_later)
        started = trio.current_time()
        assert await round_trip_s(hosts[A], hosts[B]) > 5
        assert trio.current_time() - started < 6

    network.cut([A], [B, C])
    cut_at = trio.current_time()
    lost = {await events.receive(), await events.receive()}
    assert lost == {PeerDown(peer, "no sign of life for 12 s", broken=True) for peer in (B, C)}
    assert trio.current_time() - cut_at == pytest.approx(LIMITS.peer_silence_s)
    with pytest.raises(PeerUnreachable, match="in time"):
        await hosts[B].connect(hosts[A].local)
    network.heal()
    await hosts[B].connect(hosts[A].local)
    assert await events.receive() == PeerUp(B, outbound=False)


async def test_a_crash_is_seen_by_the_peers_and_cancels_the_block(
    autojump_clock: Clock, network: SimNetwork, hosts: dict[PeerId, SimHost]
) -> None:
    await hosts[A].connect(hosts[B].local)
    events = hosts[A].peer_events()
    stream = await hosts[A].open_stream(B, ECHO)
    record = hosts[B].local
    network.crash(B)
    assert await events.receive() == PeerDown(B, "the connection broke", broken=True)
    with pytest.raises(trio.BrokenResourceError):
        await stream.receive_some()
    with pytest.raises(PeerUnreachable):
        await hosts[A].connect(record)
    async with network.open_host(B):  # the same peer, started again
        await hosts[A].connect(record)
        assert await events.receive() == PeerUp(B, outbound=True)
    assert await events.receive() == PeerDown(B, "the peer closed the connection", broken=False)
