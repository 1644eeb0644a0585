"""Private swarms on real sockets: what a stranger is told, whatever it sends, and for how long."""

from __future__ import annotations

import contextlib
import logging
import struct

import pytest
import trio

from p2p.errors import PeerUnreachable
from p2p.flow import FlowStream
from p2p.identity import Identity, public_key_of
from p2p.libp2p_transport import open_libp2p
from p2p.limits import Limits
from p2p.noise_handshake import CHALLENGE_BYTES, FIRST_MESSAGE_BYTES
from p2p.service import open_service_nursery
from p2p.swarm_key import SwarmKey
from p2p.transport import PeerId, PeerRecord, ProtocolName, Transport
from tests.p2p.garbage import RAW

LOOPBACK = ["/ip4/127.0.0.1/tcp/0"]
LIMITS = Limits(dial_timeout_s=0.5)
KEY = SwarmKey(b"k" * 32)
ECHO = ProtocolName("/test/echo/1")
GOES_ON_S = 0.2
"""How much later than its deadline a busy machine may notice."""


def port_of(transport: Transport) -> int:
    return int(transport.local.addresses[0].rpartition("/")[2])


async def everything_said(stream: trio.SocketStream) -> bytes:
    said = b""
    with contextlib.suppress(trio.BrokenResourceError):
        async for data in stream:
            said += data
    return said


async def echo(_: PeerId, stream: FlowStream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)


class Wire:
    """A listener on loopback that passes bytes on to another port and keeps what each side has said."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.said: dict[str, bytes] = {"dialler": b"", "listener": b""}

    async def carry(self, inbound: trio.SocketStream) -> None:
        outbound = await trio.open_tcp_stream("127.0.0.1", self._port)
        async with outbound, trio.open_nursery() as nursery:
            nursery.start_soon(self._pump, "dialler", inbound, outbound)
            nursery.start_soon(self._pump, "listener", outbound, inbound)

    async def _pump(self, who: str, source: trio.SocketStream, target: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in source:
                self.said[who] += data
                await target.send_all(data)
            await target.send_eof()


@contextlib.asynccontextmanager
async def wire_to(host: Transport):  # type: ignore[no-untyped-def]
    wire = Wire(port_of(host))
    async with open_service_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, wire.carry, listeners)
        port = listeners[0].socket.getsockname()[1]
        yield wire, PeerRecord(host.local.peer, (f"/ip4/127.0.0.1/tcp/{port}",))


async def test_members_talk_and_who_listens_in_reads_no_name() -> None:
    async with (
        open_libp2p(Identity.generate(), listen=LOOPBACK, swarm_key=KEY) as far,
        open_libp2p(Identity.generate(), listen=[], swarm_key=KEY) as near,
        wire_to(far) as (wire, record),
    ):
        far.serve(ECHO, echo)
        await near.connect(record)
        async with await near.open_stream(far.local.peer, ECHO) as stream:
            await stream.send_all(b"a plain word")
            assert await stream.receive_some() == b"a plain word"
    assert len(wire.said["listener"]) > CHALLENGE_BYTES + FIRST_MESSAGE_BYTES
    for said in wire.said.values():
        for name in (b"multistream", b"noise", b"yamux", b"/test", b"a plain word"):
            assert name not in said
        for transport in (near, far):
            assert transport.local.peer.encode() not in said
            assert public_key_of(transport.local.peer) not in said


@pytest.mark.parametrize(
    "sent", [*RAW.values(), struct.pack(">H", FIRST_MESSAGE_BYTES) + bytes(FIRST_MESSAGE_BYTES)]
)
async def test_a_stranger_hears_a_challenge_and_nothing_more(sent: bytes) -> None:
    async with (
        open_libp2p(Identity.generate(), listen=LOOPBACK, limits=LIMITS, swarm_key=KEY) as host,
        await trio.open_tcp_stream("127.0.0.1", port_of(host)) as stranger,
    ):
        with trio.fail_after(LIMITS.dial_timeout_s + GOES_ON_S):
            with contextlib.suppress(trio.BrokenResourceError):
                await stranger.send_all(sent)
                await stranger.send_eof()
            assert len(await everything_said(stranger)) in (
                0,
                CHALLENGE_BYTES,
            )  # None where a reset came first.
        assert host.peers() == frozenset()


async def test_two_challenges_are_never_alike() -> None:
    async with open_libp2p(Identity.generate(), listen=LOOPBACK, limits=LIMITS, swarm_key=KEY) as host:
        heard = set()
        for _ in range(20):
            async with await trio.open_tcp_stream("127.0.0.1", port_of(host)) as stranger:
                heard.add(await stranger.receive_some(CHALLENGE_BYTES))
        assert len(heard) == 20


async def test_a_stranger_that_dribbles_is_cut_off_in_time() -> None:
    """One byte at a time, of a first message that begins as it should."""
    async with (
        open_libp2p(Identity.generate(), listen=LOOPBACK, limits=LIMITS, swarm_key=KEY) as host,
        await trio.open_tcp_stream("127.0.0.1", port_of(host)) as stranger,
    ):
        began_s = trio.current_time()
        with contextlib.suppress(trio.BrokenResourceError):
            for byte in struct.pack(">H", FIRST_MESSAGE_BYTES) + bytes(1000):
                assert trio.current_time() - began_s < 3 * LIMITS.dial_timeout_s
                await stranger.send_all(bytes([byte]))
                await trio.sleep(0.05)


async def test_a_recorded_handshake_proves_nothing_a_second_time() -> None:
    async with (
        open_libp2p(Identity.generate(), listen=LOOPBACK, limits=LIMITS, swarm_key=KEY) as far,
        open_libp2p(Identity.generate(), listen=[], limits=LIMITS, swarm_key=KEY) as near,
        wire_to(far) as (wire, record),
    ):
        await near.connect(record)
        recorded = wire.said["dialler"]
        assert len(recorded) > FIRST_MESSAGE_BYTES
        async with await trio.open_tcp_stream("127.0.0.1", port_of(far)) as stranger:
            challenge = await stranger.receive_some(CHALLENGE_BYTES)
            assert challenge != wire.said["listener"][:CHALLENGE_BYTES]
            await stranger.send_all(recorded[: 2 + FIRST_MESSAGE_BYTES])
            with trio.fail_after(5):
                assert await everything_said(stranger) == b""
        assert far.traffic().connections_refused == {"swarm-key": 1}
        assert far.peers() == {near.local.peer}


async def test_a_listener_that_has_no_key_learns_nothing_of_who_dials() -> None:
    """It may send whatever it likes for a challenge: it gets a first message, which names nobody."""
    heard: list[bytes] = []

    async def listen(stream: trio.SocketStream) -> None:
        await stream.send_all(bytes(CHALLENGE_BYTES))
        heard.append(await stream.receive_some())

    async with (
        open_libp2p(Identity.generate(), listen=[], limits=LIMITS, swarm_key=KEY) as near,
        open_service_nursery() as nursery,
    ):
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, listen, listeners)
        address = f"/ip4/127.0.0.1/tcp/{listeners[0].socket.getsockname()[1]}"
        with pytest.raises(PeerUnreachable, match="swarm"):
            await near.connect(PeerRecord(Identity.generate().peer, (address,)))
    (first,) = heard
    assert len(first) == 2 + FIRST_MESSAGE_BYTES
    assert public_key_of(near.local.peer) not in first


async def test_both_sides_are_told_what_may_be_wrong(caplog: pytest.LogCaptureFixture) -> None:
    async def why_not(dialler: SwarmKey | None, listener: SwarmKey | None) -> str:
        caplog.clear()
        async with (
            open_libp2p(Identity.generate(), listen=LOOPBACK, swarm_key=listener) as far,
            open_libp2p(Identity.generate(), listen=[], swarm_key=dialler) as near,
        ):
            with pytest.raises(PeerUnreachable) as refused:
                await near.connect(far.local)
            with trio.fail_after(5):
                while len(caplog.records) < 2:
                    await trio.sleep(0.01)
        return str(refused.value)

    other = SwarmKey(b"o" * 32)
    with caplog.at_level(logging.INFO):
        assert "gossamer join 'INVITE'" in await why_not(KEY, other)
        assert "another swarm key" in caplog.text
        assert "gossamer invite" in await why_not(KEY, None)
        assert "hung up at the greeting" in caplog.text
        assert "gossamer join 'INVITE'" in await why_not(None, KEY)
        assert "it has no swarm key" in caplog.text
    for key in (KEY, other):
        assert key.text not in caplog.text
        assert key.secret.hex() not in caplog.text
