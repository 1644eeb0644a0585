"""The Transport contract, held against both implementations."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from p2p.errors import PeerUnreachable, ProtocolUnsupported
from p2p.flow import FlowStream
from p2p.noise_stream import SOCKET_READ_BYTES
from p2p.transport import PeerDown, PeerId, PeerUp, ProtocolName, Transport

if TYPE_CHECKING:
    from tests.conformance.conftest import World

ECHO = ProtocolName("/test/echo/1")
Clock = trio.abc.Clock | None
Pair = tuple[Transport, Transport]
Stream = trio.abc.HalfCloseableStream


async def echo(_: PeerId, stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.send_eof()


async def read_all(stream: Stream) -> bytes:
    data = b""
    while chunk := await stream.receive_some():
        data += chunk
    return data


# --- streams ----------------------------------------------------------------------------------------------------


async def test_bytes_come_back_in_order_and_the_end_is_seen(clock: Clock, pair: Pair) -> None:
    near, far = pair
    far.serve(ECHO, echo)
    stream = await near.open_stream(far.local.peer, ECHO)
    sent = b"".join(bytes([n % 251]) * n for n in range(0, 1500, 7))
    async with stream, trio.open_nursery() as nursery:

        async def send() -> None:
            await stream.send_all(sent)
            await stream.send_eof()

        nursery.start_soon(send)
        assert await read_all(stream) == sent


async def test_either_side_can_open_streams(clock: Clock, pair: Pair) -> None:
    near, far = pair
    near.serve(ECHO, echo)
    async with await far.open_stream(near.local.peer, ECHO) as stream:
        await stream.send_all(b"from the listener")
        assert await stream.receive_some() == b"from the listener"


async def test_the_handler_learns_the_authentic_peer(clock: Clock, pair: Pair) -> None:
    near, far = pair

    async def tell(peer: PeerId, stream: Stream) -> None:
        await stream.send_all(peer.encode())

    far.serve(ECHO, tell)
    async with await near.open_stream(far.local.peer, ECHO) as stream:
        assert await read_all(stream) == near.local.peer.encode()


async def test_one_direction_ends_while_the_other_goes_on(clock: Clock, pair: Pair) -> None:
    near, far = pair

    async def answer_after_end(_: PeerId, stream: Stream) -> None:
        request = await read_all(stream)
        for _ in range(3):
            await stream.send_all(request)

    far.serve(ECHO, answer_after_end)
    async with await near.open_stream(far.local.peer, ECHO) as stream:
        await stream.send_all(b"abc")
        await stream.send_eof()
        with pytest.raises(trio.ClosedResourceError):
            await stream.send_all(b"more")
        assert await read_all(stream) == b"abcabcabc"


async def test_streams_obey_trios_own_contract(clock: Clock, pair: Pair) -> None:
    near, far = pair
    arrived, arrivals = trio.open_memory_channel[tuple[Stream, trio.Event]](0)

    async def hand_over(_: PeerId, stream: Stream) -> None:
        done = trio.Event()
        await arrived.send((stream, done))
        await done.wait()

    far.serve(ECHO, hand_over)
    handlers: list[trio.Event] = []

    async def make_pair() -> tuple[Stream, Stream]:
        while handlers:
            handlers.pop().set()
        ours = await near.open_stream(far.local.peer, ECHO)
        theirs, done = await arrivals.receive()
        handlers.append(done)
        return ours, theirs

    async def make_clogged_pair() -> tuple[Stream, Stream]:
        ours, theirs = await make_pair()
        async with trio.open_nursery() as nursery:
            for stream in (ours, theirs):
                nursery.start_soon(fill, stream)
        return ours, theirs

    async def fill(stream: Stream) -> None:
        clogged = False
        while not clogged:
            with trio.move_on_after(0.2) as patience:
                await stream.send_all(bytes(16 << 10))
            clogged = patience.cancelled_caught

    await trio.testing.check_half_closeable_stream(make_pair, make_clogged_pair)


async def test_what_needs_no_waiting_can_be_done_at_once(clock: Clock, pair: Pair, world: World) -> None:
    near, far = pair
    received: list[bytes] = []
    read, done = trio.Event(), trio.Event()

    async def receive(_: PeerId, stream: FlowStream) -> None:
        received.append(await stream.receive_some(2))
        received.extend(stream.receive_now(100) for _ in range(2))
        read.set()
        received.append(await read_all(stream))
        stream.close()
        try:
            stream.receive_now(1)
        except trio.ClosedResourceError:
            done.set()

    far.serve(ECHO, receive)
    stream = await near.open_stream(far.local.peer, ECHO)
    assert stream.send_now(b"abcd")
    assert not stream.send_now(bytes(world.limits.receive_window_bytes))
    with trio.fail_after(10):
        await read.wait()
        await stream.send_all(b"ef")
        await stream.send_eof()
        with pytest.raises(trio.ClosedResourceError):
            stream.send_now(b"too late")
        await done.wait()
    assert received == [b"ab", b"cd", b"", b"ef"]
    stream.close()


async def test_a_slow_reader_holds_the_sender_back(clock: Clock, pair: Pair, world: World) -> None:
    near, far = pair
    go_on = trio.Event()
    received = 0

    async def read_late(_: PeerId, stream: Stream) -> None:
        nonlocal received
        await go_on.wait()
        received = len(await read_all(stream))

    far.serve(ECHO, read_late)
    stream = await near.open_stream(far.local.peer, ECHO)
    total = 4 * world.limits.receive_window_bytes
    async with stream, trio.open_nursery() as nursery:
        done = trio.Event()

        async def send() -> None:
            await stream.send_all(bytes(total))
            await stream.send_eof()
            done.set()

        nursery.start_soon(send)
        with trio.move_on_after(world.limits.stream_timeout_s / 4):
            await done.wait()
        assert not done.is_set()
        assert far.traffic().bytes_received <= 1.01 * world.limits.receive_window_bytes, "framing included"
        go_on.set()
        await read_all(stream)
    assert received == total


async def test_a_reader_that_stops_for_good_breaks_the_senders_stream(
    clock: Clock, pair: Pair, world: World
) -> None:
    near, far = pair

    async def never_read(_: PeerId, stream: Stream) -> None:
        await trio.sleep_forever()

    far.serve(ECHO, never_read)
    stream = await near.open_stream(far.local.peer, ECHO)
    with trio.fail_after(3 * world.limits.stream_timeout_s):
        with pytest.raises(trio.BrokenResourceError, match="took no data"):
            await stream.send_all(bytes(4 * world.limits.receive_window_bytes))


async def test_an_exception_in_a_handler_costs_only_its_stream(
    clock: Clock, pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    near, far = pair

    async def fail(_: PeerId, stream: Stream) -> None:
        raise RuntimeError("a bug")

    far.serve(ECHO, echo)
    far.serve(ProtocolName("/test/fail/1"), fail)
    with caplog.at_level(logging.CRITICAL):
        failing = await near.open_stream(far.local.peer, ProtocolName("/test/fail/1"))
        with pytest.raises(trio.BrokenResourceError):
            await failing.receive_some()
    async with await near.open_stream(far.local.peer, ECHO) as stream:
        await stream.send_all(b"still here")
        assert await stream.receive_some() == b"still here"


UNKNOWN = ProtocolName("/test/unknown/1")


@pytest.mark.parametrize(
    "ahead",
    [
        b"",
        b"\x00\x00\x00\x05hello",
        b"\x05hello",  # neither a line of the negotiation nor too short for one
        b"\x50 the beginning of a line of 80 bytes",
        bytes(200_000),
    ],
    ids=["nothing", "a frame", "a line", "half a line", "many bytes"],
)
@pytest.mark.parametrize("half_closed", [False, True])
async def test_a_protocol_nobody_serves_is_refused_at_the_first_read(
    clock: Clock, pair: Pair, ahead: bytes, half_closed: bool
) -> None:
    near, far = pair
    stream = await near.open_stream(far.local.peer, UNKNOWN)
    await stream.send_all(ahead)
    if half_closed:
        await stream.send_eof()
    with trio.fail_after(1):
        for _ in range(2):  # and at every one after it
            with pytest.raises(ProtocolUnsupported):
                await stream.receive_some()
        assert near.traffic().streams_open == 0
        while far.traffic().streams_open:
            await trio.sleep(0.01)
    stream.close()
    with pytest.raises(trio.ClosedResourceError):
        await stream.receive_some()
    far.serve(ECHO, echo)
    async with await near.open_stream(far.local.peer, ECHO) as stream:
        await stream.send_all(b"still here")
        assert await stream.receive_some() == b"still here"


async def test_who_only_writes_hears_of_a_refusal_too(clock: Clock, pair: Pair, world: World) -> None:
    near, far = pair
    with trio.fail_after(world.limits.stream_timeout_s):
        stream = await near.open_stream(far.local.peer, UNKNOWN)
        await stream.send_all(b"x")
        with pytest.raises(ProtocolUnsupported):
            await stream.wait_agreed()
        with pytest.raises(ProtocolUnsupported):
            stream.send_now(b"x")
        stream = await near.open_stream(far.local.peer, UNKNOWN)
        with pytest.raises(ProtocolUnsupported):
            await stream.send_all(bytes(4 * world.limits.receive_window_bytes))


async def test_who_only_writes_can_wait_for_an_agreement(clock: Clock, pair: Pair) -> None:
    near, far = pair
    far.serve(ECHO, echo)
    stream = await near.open_stream(far.local.peer, ECHO)
    assert not stream.agreed
    await stream.wait_agreed()
    assert stream.agreed
    stream.reset("enough")
    with pytest.raises(trio.BrokenResourceError):
        await stream.send_all(b"x")


async def test_what_was_sent_before_closing_arrives_though_no_answer_was_awaited(
    clock: Clock, pair: Pair
) -> None:
    near, far = pair
    heard, arrivals = trio.open_memory_channel[bytes](1)

    async def listen(_: PeerId, stream: Stream) -> None:
        await heard.send(await read_all(stream))

    far.serve(ECHO, listen)
    for sent in (b"", b"farewell"):
        stream = await near.open_stream(far.local.peer, ECHO)
        await stream.send_all(sent)
        stream.close()
        with trio.fail_after(1):
            assert await arrivals.receive() == sent
    assert near.traffic().streams_open == 0


async def test_a_reset_before_the_answer_ends_it_on_both_sides(clock: Clock, pair: Pair) -> None:
    near, far = pair
    far.serve(ECHO, echo)
    stream = await near.open_stream(far.local.peer, ECHO)
    assert stream.send_now(b"x")
    stream.reset("changed our mind")
    with pytest.raises(trio.BrokenResourceError, match="changed our mind"):
        await stream.receive_some()
    with trio.fail_after(1):
        while far.traffic().streams_open:
            await trio.sleep(0.01)


async def test_a_peer_may_hold_only_so_many_streams_open(clock: Clock, pair: Pair, world: World) -> None:
    near, far = pair
    far.serve(ECHO, echo)
    streams = [await near.open_stream(far.local.peer, ECHO) for _ in range(world.limits.streams_per_peer_max)]
    one_more = await near.open_stream(far.local.peer, ECHO)
    with pytest.raises(trio.BrokenResourceError, match="reset"):
        await one_more.receive_some()
    assert not one_more.agreed
    assert far.traffic().streams_refused == 1
    for stream in streams:
        await stream.send_eof()
        await read_all(stream)
        await stream.aclose()
    async with await near.open_stream(far.local.peer, ECHO) as again:
        await again.send_eof()
        assert await read_all(again) == b""


async def test_streams_that_were_closed_leave_nothing_behind(clock: Clock, pair: Pair) -> None:
    near, far = pair
    far.serve(ECHO, echo)
    tasks_before = trio.lowlevel.current_statistics().tasks_living
    for number in range(200):
        async with await near.open_stream(far.local.peer, ECHO) as stream:
            await stream.send_all(str(number).encode())
            await stream.send_eof()
            assert await read_all(stream) == str(number).encode()
    await trio.testing.wait_all_tasks_blocked()
    assert near.traffic().streams_open == far.traffic().streams_open == 0
    assert trio.lowlevel.current_statistics().tasks_living == tasks_before


async def test_cancelling_any_wait_leaves_no_task_and_no_stream(clock: Clock, pair: Pair) -> None:
    near, far = pair

    async def read_slowly(_: PeerId, stream: Stream) -> None:
        while await stream.receive_some():
            await trio.sleep(0.01)

    far.serve(ECHO, read_slowly)
    tasks_before = trio.lowlevel.current_statistics().tasks_living

    async def open_and_wait(wait_for: str) -> None:
        async with await near.open_stream(far.local.peer, ECHO) as stream:
            if wait_for == "read":
                await stream.receive_some()
            await stream.send_all(bytes(16 << 20))

    for wait_for in ("read", "write"):
        with trio.move_on_after(0.1):
            await open_and_wait(wait_for)
    for _ in range(4):
        with trio.CancelScope() as scope:
            scope.cancel()
            await near.open_stream(far.local.peer, ECHO)
    async with await near.open_stream(far.local.peer, ECHO):
        pass
    with trio.fail_after(1):
        while trio.lowlevel.current_statistics().tasks_living > tasks_before:
            await trio.sleep(0.01)
    assert near.traffic().streams_open == far.traffic().streams_open == 0


async def test_traffic_counts_both_directions(clock: Clock, pair: Pair) -> None:
    near, far = pair
    far.serve(ECHO, echo)
    async with await near.open_stream(far.local.peer, ECHO) as stream:
        await stream.send_all(bytes(10_000))
        await stream.send_eof()
        await read_all(stream)
    for traffic in (near.traffic(), far.traffic()):
        # With the handshake, the agreement on a protocol and the frames.
        assert 10_000 <= traffic.bytes_sent <= 10_800
        assert 10_000 <= traffic.bytes_received <= 10_800


# --- connections --------------------------------------------------------------------------------------------------


async def test_peers_and_events_agree_on_both_sides(clock: Clock, world: World) -> None:
    near, far = await world.host(), await world.host()
    near_events, far_events = near.peer_events(), far.peer_events()
    await near.connect(far.local)
    assert await near_events.receive() == PeerUp(far.local.peer, outbound=True)
    assert await far_events.receive() == PeerUp(near.local.peer, outbound=False)
    assert near.peers() == {far.local.peer}
    assert far.peers() == {near.local.peer}
    await near.disconnect(far.local.peer, "enough for today")
    assert await near_events.receive() == PeerDown(far.local.peer, "enough for today", broken=False)
    assert await far_events.receive() == PeerDown(
        near.local.peer, "the peer closed the connection", broken=False
    )
    assert near.peers() == far.peers() == frozenset()


async def test_what_was_sent_before_a_disconnect_arrives(clock: Clock, pair: Pair) -> None:
    near, far = pair
    heard: list[bytes] = []
    done = trio.Event()

    async def listen(_: PeerId, stream: Stream) -> None:
        try:
            while True:
                heard.append(await stream.receive_some())
        finally:
            done.set()

    far.serve(ECHO, listen)
    stream = await near.open_stream(far.local.peer, ECHO)
    await stream.send_all(b"goodbye")
    await near.disconnect(far.local.peer, "leaving")
    await done.wait()
    assert b"".join(heard) == b"goodbye"


async def test_connecting_again_changes_nothing(clock: Clock, pair: Pair) -> None:
    near, far = pair
    events = near.peer_events()
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(near.connect, far.local)
    await far.connect(near.local)
    assert near.peers() == {far.local.peer}
    with pytest.raises(trio.WouldBlock):
        events.receive_nowait()


async def test_many_dials_at_once_make_one_connection(clock: Clock, world: World) -> None:
    near, far = await world.host(), await world.host()
    events = near.peer_events()
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(near.connect, far.local)
    assert await events.receive() == PeerUp(far.local.peer, outbound=True)
    with pytest.raises(trio.WouldBlock):
        events.receive_nowait()


async def test_dialling_each_other_at_once_is_one_stay(clock: Clock, world: World) -> None:
    near, far = await world.host(), await world.host()
    events = near.peer_events()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(near.connect, far.local)
        nursery.start_soon(far.connect, near.local)
    near.serve(ECHO, echo)
    async with await far.open_stream(near.local.peer, ECHO) as stream:
        await stream.send_all(b"x")
        assert await stream.receive_some() == b"x"
    await far.disconnect(near.local.peer, "both of them")
    assert isinstance(await events.receive(), PeerUp)
    assert isinstance(await events.receive(), PeerDown)
    with pytest.raises(trio.WouldBlock):
        events.receive_nowait()


async def test_a_peer_that_is_not_there_is_unreachable(clock: Clock, world: World) -> None:
    host = await world.host()
    with pytest.raises(PeerUnreachable):
        await host.connect(world.nobody())
    with pytest.raises(PeerUnreachable):
        await host.connect(host.local)
    with pytest.raises(PeerUnreachable):
        await host.open_stream(world.nobody().peer, ECHO)
    await host.disconnect(world.nobody().peer, "was never connected")


async def test_somebody_else_at_the_address_is_not_the_peer(clock: Clock, world: World) -> None:
    near, far = await world.host(), await world.host()
    impostor = world.nobody().__class__(world.nobody().peer, far.local.addresses)
    with pytest.raises(PeerUnreachable):
        await near.connect(impostor)
    await near.connect(far.local)  # a failed dial is not remembered against the address


async def test_streams_of_a_lost_connection_break(clock: Clock, world: World) -> None:
    near = await world.host()
    async with world.open_host() as far:
        far.serve(ECHO, echo)
        await near.connect(far.local)
        events = near.peer_events()
        stream = await near.open_stream(far.local.peer, ECHO)
        await stream.send_all(b"x")
        assert await stream.receive_some() == b"x"
    assert await events.receive() == PeerDown(far.local.peer, "the peer closed the connection", broken=False)
    with pytest.raises(trio.BrokenResourceError):
        await stream.receive_some()
    with pytest.raises(trio.BrokenResourceError):
        await stream.send_all(b"x")
    with pytest.raises(PeerUnreachable):
        await near.open_stream(far.local.peer, ECHO)


async def test_sending_past_the_receive_window_costs_the_connection(
    clock: Clock, pair: Pair, world: World
) -> None:
    near, far = pair

    async def never_read(_: PeerId, stream: Stream) -> None:
        await trio.sleep_forever()

    async def overrun() -> None:
        stream = await near.open_stream(far.local.peer, ECHO)
        stream.add_credit(1 << 30)  # type: ignore[attr-defined]  # a sender that grants itself credit
        await stream.send_all(bytes(8 * world.limits.receive_window_bytes))
        await stream.receive_some()

    far.serve(ECHO, never_read)
    far_events, near_events = far.peer_events(), near.peer_events()
    with pytest.raises(trio.BrokenResourceError):
        await overrun()
    assert await far_events.receive() == PeerDown(
        near.local.peer, "the peer sent past its receive window", broken=False
    )
    assert isinstance(await near_events.receive(), PeerDown)
    # What was read from the socket with the first byte too many, and nothing after that.
    assert far.traffic().bytes_received <= 1.01 * (world.limits.receive_window_bytes + SOCKET_READ_BYTES)


async def test_a_subscriber_that_does_not_listen_loses_the_oldest_events(clock: Clock, world: World) -> None:
    near, far = await world.host(), await world.host()
    events = near.peer_events()
    for _ in range(world.limits.peer_events_max // 2 + 3):
        await near.connect(far.local)
        await near.disconnect(far.local.peer, "again")
    assert events.statistics().current_buffer_used == world.limits.peer_events_max
    assert isinstance(events.receive_nowait(), PeerUp)


async def test_whoever_dialled_knows_at_which_address(clock: Clock, pair: Pair) -> None:
    near, far = pair
    assert near.dialled(far.local.peer) == far.local.addresses[0]
    assert far.dialled(near.local.peer) is None
    await near.disconnect(far.local.peer, "enough")
    assert near.dialled(far.local.peer) is None
