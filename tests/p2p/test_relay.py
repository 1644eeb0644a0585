"""Circuits through a relay, over real sockets: what they carry, what they cost, and who is refused."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import trio

from p2p.circuit_messages import (
    HOP_PROTOCOL,
    STOP_PROTOCOL,
    HopMessage,
    Status,
    StopMessage,
    naming,
    receive,
    send,
)
from p2p.circuits import circuit_address, split_circuit
from p2p.errors import CallRefused, MalformedMessage, PeerUnreachable, StreamBroken
from p2p.identity import Identity
from p2p.libp2p_transport import Libp2pTransport, open_libp2p
from p2p.limits import Limits
from p2p.relay import RelayTerms
from p2p.service import open_service_nursery
from p2p.swarm_key import SwarmKey
from p2p.transport import PeerId, PeerRecord, ProtocolName

ECHO = ProtocolName("/test/echo/1")
LIMITS = Limits(dial_timeout_s=2.0, stream_timeout_s=2.0, peer_silence_s=4.0)
FAST = RelayTerms(bytes_per_s_max=1e9, wall_time_s=lambda: 1_700_000_000.0)


async def echo(_: PeerId, stream: trio.abc.HalfCloseableStream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.send_eof()


async def ask_echo(near: Libp2pTransport, far: PeerId, data: bytes) -> bytes:
    async with await near.open_stream(far, ECHO) as stream, trio.open_nursery() as nursery:

        async def say() -> None:
            await stream.send_all(data)
            await stream.send_eof()

        nursery.start_soon(say)
        return b"".join([part async for part in stream])


@contextlib.asynccontextmanager
async def open_host(
    *, listens: bool = True, limits: Limits = LIMITS, terms: RelayTerms | None = None, **more: Any
) -> AsyncIterator[Libp2pTransport]:
    listen = ["/ip4/127.0.0.1/tcp/0"] if listens else []
    async with open_libp2p(
        Identity.generate(), listen=listen, limits=limits, relay_terms=terms, **more
    ) as transport:
        transport.serve(ECHO, echo)
        yield transport


class Three:
    """A relay, somebody who is reached through it alone, and somebody who wants to."""

    def __init__(self, relay: Libp2pTransport, hidden: Libp2pTransport, asker: Libp2pTransport) -> None:
        self.relay, self.hidden, self.asker = relay, hidden, asker

    @property
    def way(self) -> PeerRecord:
        """To the hidden one."""
        address = circuit_address(self.relay.local.addresses[0], self.relay.local.peer)
        return PeerRecord(self.hidden.local.peer, (address,))


@contextlib.asynccontextmanager
async def open_three(
    *, limits: Limits = LIMITS, terms: RelayTerms = FAST, reserve: bool = True, **more: Any
) -> AsyncIterator[Three]:
    async with (
        open_host(limits=limits, terms=terms, **more) as relay,
        open_host(listens=False, limits=limits, terms=terms, **more) as hidden,
        open_host(limits=limits, **more) as asker,
        open_service_nursery() as nursery,
    ):
        relay.offer_relay(True)
        await hidden.connect(relay.local)
        if reserve:
            held = trio.Event()
            nursery.start_soon(hidden.hold_reservation, relay.local.peer, held.set)
            with trio.fail_after(2):
                await held.wait()
        yield Three(relay, hidden, asker)


async def test_a_peer_that_nobody_can_dial_is_reached_through_its_relay() -> None:
    async with open_three() as three:
        hidden, asker = three.hidden.local.peer, three.asker.local.peer
        assert three.hidden.local.addresses == ()
        await three.asker.connect(three.way)
        assert three.asker.relay_of(hidden) == three.hidden.relay_of(asker) == three.relay.local.peer
        assert three.asker.host_of(hidden) is three.hidden.host_of(asker) is None
        assert three.hidden.host_of(three.relay.local.peer) == "127.0.0.1"
        assert three.asker.dialled(hidden) == three.way.addresses[0]
        data = bytes(range(256)) * 8192
        assert await ask_echo(three.asker, hidden, data) == data
        assert await ask_echo(three.hidden, asker, b"and back") == b"and back"
        assert three.relay.relay is not None
        assert three.relay.relay.circuits == 1
        # Both ways, with little besides: encryption, frames, pings.
        assert 2 * len(data) < three.relay.relay.bytes_carried < 2.05 * len(data)
        await three.asker.disconnect(hidden, "done")
        with trio.fail_after(2):
            while three.relay.relay.circuits or asker in three.hidden.peers():
                await trio.sleep(0.01)


async def test_inside_of_a_circuit_a_private_swarm_is_private() -> None:
    key = SwarmKey(b"k" * 32)
    async with open_three(swarm_key=key) as three, open_host(swarm_key=None) as stranger:
        await three.asker.connect(three.way)
        assert await ask_echo(three.asker, three.hidden.local.peer, b"ours") == b"ours"
        with pytest.raises(PeerUnreachable):
            await stranger.connect(three.way)


async def test_whom_the_relay_names_has_to_prove_it() -> None:
    async with open_three() as three, open_host() as other:
        stream = await three.relay.open_stream(three.hidden.local.peer, STOP_PROTOCOL)
        request = StopMessage(type=StopMessage.CONNECT)
        request.peer.id = naming(other.local.peer)
        await send(stream, request)
        assert (await receive(stream, StopMessage)).status == Status.OK
        carrier = await three.asker._handshake.dial(stream, three.hidden.local.peer)
        assert await carrier.receive_some() == b""  # It hung up on who is not the other.
        assert three.asker.local.peer not in three.hidden.peers()


@pytest.mark.parametrize("offered", [True, False])
async def test_who_has_no_reservation_is_not_reached(offered: bool) -> None:
    async with open_three(reserve=False) as three:
        three.relay.offer_relay(offered)
        with pytest.raises(PeerUnreachable, match="no reservation"):
            await three.asker.connect(three.way)
        if not offered:
            with pytest.raises(CallRefused, match="permission denied"):
                await three.hidden.hold_reservation(three.relay.local.peer, lambda: None)


async def test_a_circuit_is_taken_from_ones_own_relay_only() -> None:
    async with open_three() as three:
        await three.hidden.connect(three.asker.local)
        stream = await three.asker.open_stream(three.hidden.local.peer, STOP_PROTOCOL)
        request = StopMessage(type=StopMessage.CONNECT)
        request.peer.id = naming(three.asker.local.peer)
        await send(stream, request)
        assert (await receive(stream, StopMessage)).status == Status.PERMISSION_DENIED


async def test_a_reservation_ends_with_its_stream_and_with_the_connection() -> None:
    async with open_three(reserve=False) as three:
        assert three.relay.relay is not None
        for end in ("stream", "connection"):
            await three.hidden.connect(three.relay.local)
            async with trio.open_nursery() as nursery:
                held = trio.Event()

                async def hold(held: trio.Event = held) -> None:
                    with contextlib.suppress(StreamBroken):
                        await three.hidden.hold_reservation(three.relay.local.peer, held.set)

                nursery.start_soon(hold)
                await held.wait()
                assert three.relay.relay.reserved() == [three.hidden.local.peer]
                if end == "stream":
                    nursery.cancel_scope.cancel()
                else:
                    await three.hidden.disconnect(three.relay.local.peer, "enough")
            with trio.fail_after(2):
                while three.relay.relay.reserved():
                    await trio.sleep(0.01)


async def test_reservations_are_renewed_before_they_expire() -> None:
    async with open_three(limits=replace(LIMITS, relay_reservation_s=0.4)) as three:
        assert three.relay.relay is not None
        for _ in range(30):
            assert three.relay.relay.reserved() == [three.hidden.local.peer]
            await trio.sleep(0.05)
        assert len(three.relay.idle_peers()) == 0, "so it is not let go in a crowd"


async def test_a_circuit_carries_so_much_and_lasts_so_long() -> None:
    async with open_three(limits=replace(LIMITS, relay_circuit_bytes_max=200_000)) as three:
        await three.asker.connect(three.way)
        assert await ask_echo(three.asker, three.hidden.local.peer, bytes(50_000)) == bytes(50_000)
        with pytest.raises((trio.BrokenResourceError, PeerUnreachable, ExceptionGroup)):
            await ask_echo(three.asker, three.hidden.local.peer, bytes(100_000))
        assert three.relay.relay is not None
        assert three.relay.relay.bytes_carried == 200_000
        with trio.fail_after(2):
            while three.hidden.local.peer in three.asker.peers():
                await trio.sleep(0.01)
        await three.asker.connect(three.way)
        assert await ask_echo(three.asker, three.hidden.local.peer, bytes(50_000)) == bytes(50_000)
    async with open_three(limits=replace(LIMITS, relay_circuit_s_max=0.3)) as three:
        await three.asker.connect(three.way)
        with trio.fail_after(2):
            while three.hidden.local.peer in three.asker.peers():
                await trio.sleep(0.01)


async def test_all_that_is_carried_stays_below_the_rate() -> None:
    async with open_three(terms=replace(FAST, bytes_per_s_max=200_000)) as three:
        await three.asker.connect(three.way)
        assert three.relay.relay is not None
        before, began_s = three.relay.relay.bytes_carried, trio.current_time()
        await ask_echo(three.asker, three.hidden.local.peer, bytes(100_000))
        took_s = trio.current_time() - began_s
        # A piece may begin at once whatever its size: that much more has passed at most.
        assert three.relay.relay.bytes_carried - before <= 200_000 * took_s + (64 << 10)
        assert took_s > 0.6


async def test_there_are_so_many_reservations_and_circuits_and_no_more() -> None:
    limits = replace(LIMITS, relay_reservations_max=1, relay_circuits_per_peer_max=1)
    async with open_three(limits=limits) as three, open_host(listens=False) as late, open_host() as second:
        await late.connect(three.relay.local)
        with pytest.raises(CallRefused, match="reservation refused"):
            await late.hold_reservation(three.relay.local.peer, lambda: None)
        await three.asker.connect(three.way)
        with pytest.raises(PeerUnreachable, match="resource limit exceeded"):
            await second.connect(three.way)


async def test_no_circuit_leads_through_a_circuit() -> None:
    async with open_three() as three:
        three.hidden.offer_relay(True)
        await three.asker.connect(three.way)
        with pytest.raises(CallRefused, match="permission denied"):
            await three.asker.hold_reservation(three.hidden.local.peer, lambda: None)


async def test_a_direct_connection_takes_the_place_of_a_circuit() -> None:
    async with open_three() as three:
        hidden, asker = three.hidden.local.peer, three.asker.local.peer
        await three.asker.connect(three.way)
        events = three.asker.peer_events()
        async with await three.asker.open_stream(hidden, ECHO) as stream:
            await stream.send_all(b"before")
            # It can dial, though nobody can dial it.
            await three.hidden.connect(three.asker.local, direct=True)
            assert three.hidden.relay_of(asker) is None
            assert three.hidden.host_of(asker) == "127.0.0.1"
            assert await stream.receive_some() == b"before", "what was under way goes on"
            assert three.relay.relay is not None
            assert three.relay.relay.circuits == 1
        with trio.fail_after(4):
            while three.relay.relay.circuits:
                await trio.sleep(0.01)
        assert await ask_echo(three.asker, hidden, b"after") == b"after"
        with pytest.raises(trio.WouldBlock):
            events.receive_nowait()  # Nobody has come or gone.
        await three.hidden.connect(three.asker.local, direct=True)  # Nothing is left to be done.


async def test_whether_a_peer_can_be_dialled_is_found_out_without_a_connection_to_it() -> None:
    async with open_host() as near, open_host() as far, open_host() as other:
        events = far.peer_events()
        await near.answers_at(far.local.peer, far.local.addresses[0])
        with pytest.raises(PeerUnreachable, match="/tcp/1"):
            await near.answers_at(far.local.peer, "/ip4/127.0.0.1/tcp/1")
        with pytest.raises(PeerUnreachable):
            await near.answers_at(other.local.peer, far.local.addresses[0])
        assert near.peers() == far.peers() == frozenset()
        with pytest.raises(trio.WouldBlock):
            events.receive_nowait()


async def test_more_addresses_are_told_in_their_order() -> None:
    async with open_host() as host:
        (own,) = host.local.addresses
        host.announce(["/ip4/203.0.113.7/tcp/9"], ["/ip4/198.51.100.1/tcp/1/p2p/R/p2p-circuit"])
        assert host.local.addresses == (
            "/ip4/203.0.113.7/tcp/9",
            own,
            "/ip4/198.51.100.1/tcp/1/p2p/R/p2p-circuit",
        )
        host.announce([own])
        assert host.local.addresses == (own,)


@pytest.mark.parametrize(
    ("protocol", "data"),
    [
        (HOP_PROTOCOL, b"\xff\xff\xff\xff"),
        (HOP_PROTOCOL, b"\xa0\x7f"),
        (HOP_PROTOCOL, b"\x04nope"),
        (STOP_PROTOCOL, b"\x04nope"),
        (HOP_PROTOCOL, b"\x02\x08\x01"),
    ],
    ids=["endless length", "too long", "no protobuf", "no protobuf to stop", "names nobody"],
)
async def test_garbage_costs_its_stream_and_nothing_else(protocol: ProtocolName, data: bytes) -> None:
    async with open_three() as three:
        await three.asker.connect(three.relay.local)
        target = three.relay if protocol == HOP_PROTOCOL else three.hidden
        source = three.asker if protocol == HOP_PROTOCOL else three.relay
        stream = await source.open_stream(target.local.peer, protocol)
        await stream.send_all(data)
        answer: Any = None
        with contextlib.suppress(trio.BrokenResourceError, MalformedMessage, StreamBroken):
            with trio.fail_after(2):
                answer = await receive(stream, HopMessage)
        assert answer is None or answer.status == Status.MALFORMED_MESSAGE
        await three.asker.connect(three.way)
        assert await ask_echo(three.asker, three.hidden.local.peer, b"still") == b"still"


def test_addresses_through_relays_are_told_from_others() -> None:
    relay = Identity.generate().peer
    through = circuit_address("/ip4/192.0.2.7/tcp/4100", relay)
    assert through == f"/ip4/192.0.2.7/tcp/4100/p2p/{relay}/p2p-circuit"
    assert split_circuit(through) == ("/ip4/192.0.2.7/tcp/4100", relay)
    for other in ("/ip4/192.0.2.7/tcp/4100", f"/ip4/192.0.2.7/tcp/4100/p2p/{relay}", f"{through}/p2p/x", ""):
        assert split_circuit(other) is None
