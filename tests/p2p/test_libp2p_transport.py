"""What only real sockets can show: ports, addresses, foreign libp2p peers, slow strangers, and 27 kinds of garbage."""

from __future__ import annotations

import contextlib
import logging
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.peer.id import ID
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.insecure.transport import PLAINTEXT_PROTOCOL_ID, InsecureTransport
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from multiaddr import Multiaddr

from p2p.codec import WireMessage
from p2p.errors import AddressError, MalformedMessage, PeerUnreachable, PortInUse, ProtocolUnsupported
from p2p.identity import Identity
from p2p.libp2p_transport import open_libp2p
from p2p.limits import Limits
from p2p.rpc import call, serve_calls
from p2p.service import open_service_nursery
from p2p.transport import PeerDown, PeerId, PeerRecord, PeerUp, ProtocolName, Transport
from tests.p2p.garbage import GOSSAMER_PROTOCOLS, KINDS, Garbage, throw

ECHO = ProtocolName("/test/echo/1")
QUESTIONS = ProtocolName("/test/questions/1")
LOOPBACK = ["/ip4/127.0.0.1/tcp/0"]
LIMITS = Limits(dial_timeout_s=1.0, stream_timeout_s=1.0, peer_silence_s=1.0, handshakes_per_address_max=3)


async def echo(_: PeerId, stream: trio.abc.HalfCloseableStream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.send_eof()


class Question(WireMessage, frozen=True):
    text: str


async def repeat(_: PeerId, question: Question) -> Question:
    return question


def port_of(record: PeerRecord) -> int:
    return int(record.addresses[0].split("/")[4])


@contextlib.asynccontextmanager
async def open_host(limits: Limits = LIMITS) -> AsyncIterator[Transport]:
    async with open_libp2p(Identity.generate(), listen=LOOPBACK, limits=limits) as transport:
        transport.serve(ECHO, echo)
        yield transport


async def echoes(near: Transport, far: Transport) -> bool:
    await near.connect(far.local)
    async with await near.open_stream(far.local.peer, ECHO) as stream:
        await stream.send_all(b"are you there?")
        return await stream.receive_some() == b"are you there?"


# --- ports and addresses ----------------------------------------------------------------------------------------


async def test_a_second_node_on_the_port_is_told_so() -> None:
    async with open_host() as host:
        port = port_of(host.local)
        with pytest.raises(PortInUse, match=str(port)) as refused:
            async with open_libp2p(Identity.generate(), listen=[f"/ip4/127.0.0.1/tcp/{port}"]):
                pass
        assert f":{port}" in refused.value.fix
    async with open_libp2p(Identity.generate(), listen=[f"/ip4/127.0.0.1/tcp/{port}"]) as again:
        assert port_of(again.local) == port


async def test_a_port_that_others_share_is_still_taken() -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(PortInUse):
            async with open_libp2p(
                Identity.generate(), listen=[f"/ip4/127.0.0.1/tcp/{other.getsockname()[1]}"]
            ):
                pass


@pytest.mark.parametrize(
    "address", ["/ip4/192.0.2.250/tcp/0", "/ip4/127.0.0.1/udp/4100", "nonsense", "/tcp/4100"]
)
async def test_an_address_one_cannot_listen_on_is_explained(address: str) -> None:
    with pytest.raises(AddressError):
        async with open_libp2p(Identity.generate(), listen=[address]):
            pass


async def test_a_wildcard_is_announced_as_the_interfaces_behind_it() -> None:
    async with open_libp2p(Identity.generate(), listen=["/ip4/0.0.0.0/tcp/0"]) as host, open_host() as other:
        assert host.local.addresses
        assert not any("0.0.0.0" in address for address in host.local.addresses)
        await other.connect(host.local)


async def test_a_forwarded_port_is_announced_instead() -> None:
    forwarded = "/ip4/203.0.113.7/tcp/4100"
    async with open_libp2p(Identity.generate(), listen=LOOPBACK, announce=[forwarded]) as transport:
        assert transport.local.addresses == (forwarded,)


async def test_version_6_of_the_internet_works() -> None:
    async with open_libp2p(Identity.generate(), listen=["/ip6/::1/tcp/0"]) as host, open_host() as other:
        assert host.local.addresses[0].startswith("/ip6/::1/tcp/")
        await other.connect(host.local)
        await other.disconnect(host.local.peer, "done")


async def test_one_good_address_among_bad_ones_is_enough() -> None:
    async with open_host() as near, open_host() as far:
        addresses = ("/ip4/127.0.0.1/tcp/1", "mangled", "/ip4/192.0.2.1/tcp/1", *far.local.addresses)
        await near.connect(PeerRecord(far.local.peer, addresses))
        assert near.peers() == {far.local.peer}


async def test_an_exception_of_the_block_comes_out_as_it_is() -> None:
    with pytest.raises(ZeroDivisionError):
        async with open_host(), open_host():
            _ = 1 / 0


# --- strangers ----------------------------------------------------------------------------------------------------


async def test_half_open_connections_do_not_shut_others_out() -> None:
    limits = Limits(dial_timeout_s=60.0, handshakes_per_address_max=3)
    async with open_host(limits) as host, contextlib.AsyncExitStack() as sockets:
        for _ in range(limits.handshakes_per_address_max):
            await sockets.enter_async_context(await trio.open_tcp_stream("127.0.0.1", port_of(host.local)))
        async with open_host() as near:
            with pytest.raises(PeerUnreachable):  # from this address it is the stranger's turn
                await near.connect(host.local)
            await sockets.aclose()
            with trio.fail_after(5):
                while not near.peers():
                    with contextlib.suppress(PeerUnreachable):
                        await near.connect(host.local)
            assert await echoes(near, host)


async def test_strangers_that_hang_up_at_once_do_no_harm() -> None:
    async with open_host() as host, open_host() as near:
        for _ in range(50):
            with socket.create_connection(("127.0.0.1", port_of(host.local))) as stranger:
                # Linger for 0 s: closing sends a reset instead of a polite end.
                stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert await echoes(near, host)


async def test_a_handshake_that_does_not_finish_is_given_up() -> None:
    async with open_host() as host, await trio.open_tcp_stream("127.0.0.1", port_of(host.local)) as stranger:
        with trio.fail_after(5 * LIMITS.dial_timeout_s):
            while await stranger.receive_some():
                pass


async def test_inbound_connections_come_and_go_without_using_anything_up() -> None:
    limits = Limits(peers_max=2)
    async with open_host(limits) as host:
        events = host.peer_events()
        for _ in range(20):
            async with open_host() as guest:
                await guest.connect(host.local)
                assert await events.receive() == PeerUp(guest.local.peer, outbound=False)
            goodbye = PeerDown(guest.local.peer, "the peer closed the connection", broken=False)
            assert await events.receive() == goodbye
        assert host.peers() == frozenset()


async def test_more_peers_than_allowed_are_turned_away() -> None:
    async with open_host(Limits(peers_max=1)) as host, open_host() as first, open_host() as second:
        await first.connect(host.local)
        with contextlib.suppress(PeerUnreachable):
            await second.connect(host.local)
        assert host.peers() == {first.local.peer}
        assert await echoes(first, host)
        with pytest.raises(PeerUnreachable):
            await host.connect(second.local)


async def test_whoever_dials_here_leaves_room_for_our_own_choice() -> None:
    async with contextlib.AsyncExitStack() as stack:
        host = await stack.enter_async_context(open_host(Limits(peers_max=3, peers_inbound_max=1)))
        guests = [await stack.enter_async_context(open_host()) for _ in range(4)]
        for guest in guests[:3]:
            with contextlib.suppress(PeerUnreachable):
                await guest.connect(host.local)
        with trio.fail_after(5):
            while not host.peers():
                await trio.sleep(0.01)
        assert len(host.peers()) == 1
        await host.connect(guests[3].local)
        assert host.dialled(guests[3].local.peer) == guests[3].local.addresses[0]
        assert await echoes(host, guests[3])


Pump = Callable[[trio.SocketStream, trio.SocketStream], Awaitable[None]]


@contextlib.asynccontextmanager
async def open_proxy(far: PeerRecord, pump: Pump) -> AsyncIterator[PeerRecord]:
    """``far`` at another address; each direction of a connection to it passes through a ``pump``."""

    async def forward(inbound: trio.SocketStream) -> None:
        outbound = await trio.open_tcp_stream("127.0.0.1", port_of(far))
        async with outbound, trio.open_nursery() as pumps:
            pumps.start_soon(carry, inbound, outbound)
            pumps.start_soon(carry, outbound, inbound)

    async def carry(source: trio.SocketStream, target: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):  # one of the two has left
            await pump(source, target)

    async with open_service_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, forward, listeners)
        yield PeerRecord(far.peer, (f"/ip4/127.0.0.1/tcp/{listeners[0].socket.getsockname()[1]}",))


async def test_a_call_over_a_slow_line_takes_one_round_trip(nursery: trio.Nursery) -> None:
    one_way_s = 0.1

    async def pump(source: trio.SocketStream, target: trio.SocketStream) -> None:
        under_way, arriving = trio.open_memory_channel[tuple[float, bytes]](1000)
        nursery.start_soon(arrive, arriving, target)
        with under_way:
            while data := await source.receive_some():
                under_way.send_nowait((trio.current_time() + one_way_s, bytes(data)))

    async def arrive(
        arriving: trio.MemoryReceiveChannel[tuple[float, bytes]], target: trio.SocketStream
    ) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for due_s, data in arriving:
                await trio.sleep_until(due_s)
                await target.send_all(data)

    async with open_host() as near, open_host() as far, open_proxy(far.local, pump) as slow:
        serve_calls(far, QUESTIONS, Question, repeat, limits=LIMITS, on_malformed=lambda *_: None)
        await near.connect(slow)
        for protocol in (QUESTIONS, ProtocolName("/test/unknown/1")):
            times_s = []
            for _ in range(3):
                started_s = trio.current_time()
                with contextlib.suppress(ProtocolUnsupported):
                    await call(near, far.local.peer, protocol, Question(text="?"), Question, timeout_s=5)
                times_s.append(trio.current_time() - started_s)
            assert 2 * one_way_s <= min(times_s) < 3.5 * one_way_s


async def test_a_peer_that_falls_silent_is_dropped() -> None:
    """A frozen process keeps its sockets open; only the missing signs of life tell. Played by a frozen proxy."""
    frozen = False

    async def pump(source: trio.SocketStream, target: trio.SocketStream) -> None:
        while data := await source.receive_some():
            if frozen:
                await trio.sleep_forever()
            await target.send_all(data)

    async with open_host() as near, open_host() as far, open_proxy(far.local, pump) as proxy:
        near_events, far_events = near.peer_events(), far.peer_events()
        await near.connect(proxy)
        assert await echoes(near, far)
        await near_events.receive()
        await far_events.receive()
        frozen = True
        with trio.fail_after(2 * LIMITS.peer_silence_s):
            assert await near_events.receive() == PeerDown(
                far.local.peer, "no sign of life for 1 s", broken=True
            )
            assert await far_events.receive() == PeerDown(
                near.local.peer, "no sign of life for 1 s", broken=True
            )


# --- the rest of the libp2p world -----------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def open_stock_host(*, plaintext: bool = False) -> AsyncIterator[object]:
    keys = create_new_key_pair()
    security = (
        {PLAINTEXT_PROTOCOL_ID: InsecureTransport(keys)}
        if plaintext
        else {NOISE: NoiseTransport(keys, noise_privkey=create_noise_key_pair().private_key)}
    )
    host = new_host(keys, sec_opt=security)
    async with host.run([Multiaddr(LOOPBACK[0])]):
        yield host
        await host.close()


async def test_a_stock_libp2p_host_can_dial_us_and_talk() -> None:
    async with open_host(Limits()) as ours, open_stock_host() as stock:
        await stock.connect(info_from_p2p_addr(Multiaddr(f"{ours.local.addresses[0]}/p2p/{ours.local.peer}")))
        stream = await stock.new_stream(ID.from_base58(ours.local.peer), [ECHO])
        data = bytes(range(256)) * 4096
        received = b""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.write, data)
            while len(received) < len(data):
                received += await stream.read(65536)
        assert received == data
        await stream.close()


async def test_we_can_dial_a_stock_libp2p_host_and_talk() -> None:
    async with open_host(Limits()) as ours, open_stock_host() as stock:

        async def stock_echo(stream) -> None:  # type: ignore[no-untyped-def]
            for _ in range(16):
                await stream.write(await stream.read(65536))
            await stream.close()

        stock.set_stream_handler(ECHO, stock_echo)
        peer = PeerId(stock.get_id().to_base58())
        address = str(stock.get_addrs()[0]).rpartition("/p2p/")[0]
        await ours.connect(PeerRecord(peer, (address,)))
        async with await ours.open_stream(peer, ECHO) as stream:
            for number in range(16):
                await stream.send_all(bytes([number]) * 1000)
                assert await stream.receive_some() == bytes([number]) * 1000
            await stream.send_eof()
            assert await stream.receive_some() == b""


async def test_a_stock_host_that_refuses_is_understood() -> None:
    async with open_host(Limits()) as ours, open_stock_host() as stock:
        peer = PeerId(stock.get_id().to_base58())
        await ours.connect(PeerRecord(peer, (str(stock.get_addrs()[0]).rpartition("/p2p/")[0],)))
        for ahead in (b"", b"\x00\x00\x00\x05hello"):
            async with await ours.open_stream(peer, ECHO) as stream:
                await stream.send_all(ahead)
                with trio.fail_after(5), pytest.raises(ProtocolUnsupported):
                    await stream.receive_some()


async def test_a_stock_host_may_propose_one_protocol_after_another() -> None:
    async with open_host(Limits()) as ours, open_stock_host() as stock:
        await stock.connect(info_from_p2p_addr(Multiaddr(f"{ours.local.addresses[0]}/p2p/{ours.local.peer}")))
        with trio.fail_after(5):
            stream = await stock.new_stream(ID.from_base58(ours.local.peer), ["/test/other/1", ECHO])
            await stream.write(b"agreed")
            assert await stream.read(6) == b"agreed"
        await stream.close()


async def test_plaintext_is_never_spoken() -> None:
    async with open_host() as ours, open_stock_host(plaintext=True) as stock:
        target = info_from_p2p_addr(Multiaddr(f"{ours.local.addresses[0]}/p2p/{ours.local.peer}"))
        with pytest.raises(Exception):  # noqa: B017  # whatever the library makes of being refused
            with trio.fail_after(5):
                await stock.connect(target)
        assert ours.peers() == frozenset()


# --- garbage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", KINDS, ids=lambda garbage: garbage.name)
async def test_a_host_survives_garbage(garbage: Garbage, caplog: pytest.LogCaptureFixture) -> None:
    complaints: list[MalformedMessage] = []
    async with open_host() as victim, open_host() as attacker, open_host() as honest:
        for protocol in GOSSAMER_PROTOCOLS:
            serve_calls(
                victim,
                protocol,
                Question,
                repeat,
                limits=LIMITS,
                on_malformed=lambda _, error: complaints.append(error),
            )
        with caplog.at_level(logging.ERROR):
            await throw(garbage, victim.local, attacker, patience_s=0.2)
        assert caplog.records == []
        if garbage.name.startswith("frame of"):
            assert len(complaints) == len(GOSSAMER_PROTOCOLS)
        assert await echoes(honest, victim)
        for protocol in GOSSAMER_PROTOCOLS:
            reply = await call(
                honest, victim.local.peer, protocol, Question(text="well?"), Question, timeout_s=2
            )
            assert reply.text == "well?"
