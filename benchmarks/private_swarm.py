"""What the key of a private swarm costs on loopback: setting a connection up, also over a slow line, and moving bytes.

Both sides share one process and one core, so the times are sums over both.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from time import perf_counter

import trio

from benchmarks.harness import Figure, ratios
from p2p.flow import FlowStream
from p2p.identity import Identity
from p2p.libp2p_transport import Libp2pTransport, open_libp2p
from p2p.service import open_service_nursery
from p2p.swarm_key import SwarmKey
from p2p.transport import PeerId, PeerRecord, ProtocolName

CONNECTIONS = 40
SLOW_CONNECTIONS = 3
ONE_WAY_S = 0.05
STREAM_BYTES = 64 << 20
WRITE_BYTES = 1 << 20
ANYWHERE = ("/ip4/127.0.0.1/tcp/0",)
SINK = ProtocolName("/bench/sink/1")


async def measure(repeats: int = 5) -> list[Figure]:
    """Milliseconds and MB/s, open and private in turn, and the ratios."""
    keys = {"open": None, "private": SwarmKey.generate()}
    figures: dict[str, dict[str, list[float]]] = {
        name: {kind: [] for kind in keys} for name in ("set-up", "slow set-up", "rate")
    }
    for _ in range(repeats + 1):
        for kind, key in keys.items():
            async with (
                open_libp2p(Identity.generate(), listen=ANYWHERE, swarm_key=key) as far,
                open_libp2p(Identity.generate(), listen=(), swarm_key=key) as near,
                _slow_line(far.local) as slowly,
            ):
                figures["set-up"][kind].append(await _set_up_ms(near, far.local, CONNECTIONS))
                figures["slow set-up"][kind].append(await _set_up_ms(near, slowly, SLOW_CONNECTIONS))
                figures["rate"][kind].append(await _rate(near, far))
    lines = []
    for name, unit in (("set-up", "ms"), ("slow set-up", "ms"), ("rate", "MB/s")):
        # The first round warms both up.
        plain, private = (tuple(figures[name][kind][1:]) for kind in keys)
        lines += [
            Figure(f"{name}, open swarm", unit, plain),
            Figure(f"{name}, private swarm", unit, private),
            Figure(f"{name}, private / open", "x", ratios(private, plain)),
        ]
    return lines


async def _set_up_ms(near: Libp2pTransport, record: PeerRecord, count: int) -> float:
    spent_s = 0.0
    for _ in range(count):
        began_s = perf_counter()
        await near.connect(record)
        spent_s += perf_counter() - began_s
        await near.disconnect(record.peer, "again")
    return 1000 * spent_s / count


async def _rate(near: Libp2pTransport, far: Libp2pTransport) -> float:
    done = trio.Event()

    async def sink(_: PeerId, stream: FlowStream) -> None:
        received = 0
        while received < STREAM_BYTES:
            received += len(await stream.receive_some())
        done.set()

    far.serve(SINK, sink)
    await near.connect(far.local)
    began_s = perf_counter()
    async with await near.open_stream(far.local.peer, SINK) as stream:
        data = bytes(WRITE_BYTES)
        for _ in range(STREAM_BYTES // WRITE_BYTES):
            await stream.send_all(data)
        await done.wait()
    return STREAM_BYTES / 1e6 / (perf_counter() - began_s)


@contextlib.asynccontextmanager
async def _slow_line(target: PeerRecord) -> AsyncIterator[PeerRecord]:
    """``target`` behind a line of ONE_WAY_S in each direction, but for TCP's own handshake."""
    port = int(target.addresses[0].rpartition("/")[2])

    async def delay(source: trio.SocketStream, sink: trio.SocketStream, nursery: trio.Nursery) -> None:
        async def deliver(data: bytes, before: trio.Event, after: trio.Event) -> None:
            await trio.sleep(ONE_WAY_S)
            await before.wait()
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await sink.send_all(data)
            after.set()

        last = trio.Event()
        last.set()
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in source:
                before, last = last, trio.Event()
                nursery.start_soon(deliver, data, before, last)
        await last.wait()
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await sink.send_eof()

    async def carry(inbound: trio.SocketStream) -> None:
        outbound = await trio.open_tcp_stream("127.0.0.1", port)
        async with outbound, trio.open_nursery() as nursery:
            nursery.start_soon(delay, inbound, outbound, nursery)
            nursery.start_soon(delay, outbound, inbound, nursery)

    async with open_service_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, carry, listeners)
        address = f"/ip4/127.0.0.1/tcp/{listeners[0].socket.getsockname()[1]}"
        yield PeerRecord(target.peer, (address,))
