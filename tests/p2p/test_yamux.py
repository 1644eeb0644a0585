"""The multiplexer against a peer that is slow, silent, rude or gone. Virtual time, memory streams, raw frames."""

from __future__ import annotations

import contextlib

import pytest
import trio
import trio.testing

from p2p.codec import WireMessage
from p2p.flow import FRAME_PAYLOAD_BYTES
from p2p.frames import send_message
from p2p.limits import Limits
from p2p.multistream import propose
from p2p.yamux import (
    ACK,
    CONTROL_FRAMES_MAX,
    DATA,
    DATA_FRAMES_QUEUED,
    FIN,
    GO_AWAY,
    HEADER,
    INITIAL_WINDOW_BYTES,
    PING,
    RST,
    SYN,
    WINDOW_UPDATE,
    WRITE_BYTES,
    Session,
)

LIMITS = Limits(
    peer_silence_s=12, stream_timeout_s=15, receive_window_bytes=512 << 10, streams_per_peer_max=4
)
Clock = trio.testing.MockClock


class Greeting(WireMessage, frozen=True):
    text: str


class Wire:
    """The other end of a session's connection, spoken by hand."""

    def __init__(self, nursery: trio.Nursery, *, admitted: int = 4) -> None:
        self.stream, carrier = trio.testing.memory_stream_pair()
        self._left = admitted
        self.session = Session(carrier, initiator=False, limits=LIMITS, admit=self._admit)
        nursery.start_soon(self.session.run)

    def _admit(self) -> bool:
        self._left -= 1
        return self._left >= 0

    async def send(self, kind: int, flags: int, stream_id: int, value: int, payload: bytes = b"") -> None:
        await self.stream.send_all(HEADER.pack(0, kind, flags, stream_id, value) + payload)

    async def receive(self) -> tuple[int, int, int, int]:
        """The next frame that is not a ping, without its payload."""
        while True:
            header = b""
            while len(header) < HEADER.size:
                header += await self.stream.receive_some(HEADER.size - len(header))
            _, kind, flags, stream_id, value = HEADER.unpack(header)
            left = value if kind == DATA else 0
            while left:
                left -= len(await self.stream.receive_some(left))
            if kind != PING:
                return kind, flags, stream_id, value

    async def ended(self) -> str:
        await self.session.closed.wait()
        return self.session.reason


async def test_a_new_stream_grants_the_rest_of_the_window(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    wire = Wire(nursery)
    extra = LIMITS.receive_window_bytes - INITIAL_WINDOW_BYTES
    ours = await wire.session.open_stream()
    assert await wire.receive() == (WINDOW_UPDATE, SYN, ours.stream_id, extra)
    await wire.send(WINDOW_UPDATE, SYN, 1, 0)
    theirs = await wire.session.accept_stream()
    assert await wire.receive() == (WINDOW_UPDATE, ACK, theirs.stream_id, extra)


async def test_frames_may_be_cut_anywhere(autojump_clock: Clock, nursery: trio.Nursery) -> None:
    wire = Wire(nursery)
    data = HEADER.pack(0, DATA, SYN, 1, 5) + b"hello" + HEADER.pack(0, DATA, FIN, 1, 6) + b" world"
    for at in range(len(data)):
        await wire.stream.send_all(data[at : at + 1])
    stream = await wire.session.accept_stream()
    received = b""
    while chunk := await stream.receive_some():
        received += chunk
    assert received == b"hello world"


async def test_credit_comes_back_half_a_window_at_a_time(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    wire = Wire(nursery)
    await wire.send(WINDOW_UPDATE, SYN, 1, 0)
    stream = await wire.session.accept_stream()
    assert (await wire.receive())[1] == ACK
    half = LIMITS.receive_window_bytes // 2
    await wire.send(DATA, 0, 1, half, bytes(half))
    consumed = 0
    while consumed < half:
        consumed += len(await stream.receive_some(1000))
    assert await wire.receive() == (WINDOW_UPDATE, 0, 1, half)


@pytest.mark.parametrize("announced", [LIMITS.receive_window_bytes + 1, 2**32 - 1])
async def test_an_overrun_ends_the_connection_before_it_is_buffered(
    autojump_clock: Clock, nursery: trio.Nursery, announced: int
) -> None:
    wire = Wire(nursery)
    await wire.send(WINDOW_UPDATE, SYN, 1, 0)
    await wire.send(DATA, 0, 1, announced)
    assert await wire.ended() == "the peer sent past its receive window"


async def test_an_overrun_in_small_pieces_ends_it_too(autojump_clock: Clock, nursery: trio.Nursery) -> None:
    wire = Wire(nursery)
    await wire.send(WINDOW_UPDATE, SYN, 1, 0)
    stream = await wire.session.accept_stream()
    piece = LIMITS.receive_window_bytes // 4
    for _ in range(4):
        await wire.send(DATA, 0, 1, piece, bytes(piece))
    await trio.testing.wait_all_tasks_blocked()
    assert not wire.session.reason
    await wire.send(DATA, 0, 1, 1, b"x")
    assert await wire.ended() == "the peer sent past its receive window"
    for _ in range(4):  # what came within the window can still be read
        assert len(await stream.receive_some()) == piece
    with pytest.raises(trio.BrokenResourceError):
        await stream.receive_some()


async def test_data_for_a_stream_closed_here_is_answered_with_a_reset(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    wire = Wire(nursery)
    await wire.send(WINDOW_UPDATE, SYN, 1, 0)
    stream = await wire.session.accept_stream()
    await stream.aclose()
    await wire.send(DATA, 0, 1, 3, b"abc")
    frames = [await wire.receive() for _ in range(4)]
    assert [flags for _, flags, _, _ in frames] == [ACK, FIN, RST, RST]
    assert not wire.session.reason


async def test_streams_beyond_the_cap_are_reset_and_counted_out(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    wire = Wire(nursery, admitted=1)
    await wire.send(WINDOW_UPDATE, SYN, 1, 0)
    await wire.send(WINDOW_UPDATE, SYN, 3, 0)
    assert (await wire.receive())[1:3] == (ACK, 1)
    assert (await wire.receive())[1:3] == (RST, 3)
    assert wire.session.streams_open == 1


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "does not speak yamux"),
        (HEADER.pack(1, DATA, 0, 1, 0), "does not speak yamux"),
        (HEADER.pack(0, 4, 0, 1, 0), "does not speak yamux"),
        (HEADER.pack(0, DATA, SYN, 2, 0), "number that is taken"),
        (HEADER.pack(0, DATA, SYN, 1, 0) * 2, "number that is taken"),
        (HEADER.pack(0, GO_AWAY, 0, 0, 0), "closed the connection"),
        (b"", "closed the connection"),
    ],
)
async def test_the_reason_of_an_end_is_named(
    autojump_clock: Clock, nursery: trio.Nursery, frame: bytes, reason: str
) -> None:
    wire = Wire(nursery)
    await wire.stream.send_all(frame)
    await wire.stream.send_eof()
    assert reason in await wire.ended()
    with pytest.raises(trio.BrokenResourceError):
        await wire.session.open_stream()


async def test_a_silent_peer_is_dropped_in_time(autojump_clock: Clock, nursery: trio.Nursery) -> None:
    wire = Wire(nursery)
    started = trio.current_time()
    assert await wire.ended() == "no sign of life for 12 s"
    assert 9 <= trio.current_time() - started <= 12


async def test_a_peer_that_answers_pings_is_kept(autojump_clock: Clock, nursery: trio.Nursery) -> None:
    wire = Wire(nursery)
    with trio.move_on_after(100):
        while True:
            header = await wire.stream.receive_some(HEADER.size)
            _, kind, flags, _, value = HEADER.unpack(header)
            assert (kind, flags) == (PING, SYN)
            await wire.send(PING, ACK, 0, value)
    assert not wire.session.reason


async def test_a_peer_that_is_heard_is_not_asked_for_a_sign_of_life(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    wire = Wire(nursery)
    for value in range(60):
        await wire.send(PING, SYN, 0, value)
        assert HEADER.unpack(await wire.stream.receive_some(HEADER.size)) == (0, PING, ACK, 0, value)
        await trio.sleep(1)
    assert not wire.session.reason


async def test_pings_are_answered(autojump_clock: Clock, nursery: trio.Nursery) -> None:
    wire = Wire(nursery)
    assert HEADER.unpack(await wire.stream.receive_some(HEADER.size))[1] == PING
    await wire.send(PING, SYN, 0, 77)
    assert HEADER.unpack(await wire.stream.receive_some(HEADER.size)) == (0, PING, ACK, 0, 77)


async def test_a_socket_that_takes_nothing_holds_the_senders_and_bounds_the_queue(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    ours, carrier = trio.testing.lockstep_stream_pair()  # takes a write only while somebody reads
    session = Session(carrier, initiator=True, limits=LIMITS, admit=lambda: True)
    nursery.start_soon(session.run)

    async def send() -> None:
        stream = await session.open_stream()
        with contextlib.suppress(trio.BrokenResourceError):  # the first ones fit into the queue
            await stream.send_all(bytes(INITIAL_WINDOW_BYTES))

    started = trio.current_time()
    async with trio.open_nursery() as senders:
        for _ in range(4):
            senders.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        assert 0 < session._data_frames <= DATA_FRAMES_QUEUED
        # One write's worth is with the socket, a full queue behind it, and the senders hold the rest.
        queued_bytes = sum(map(len, session._outbox))
        assert queued_bytes <= DATA_FRAMES_QUEUED * (HEADER.size + FRAME_PAYLOAD_BYTES)
        assert WRITE_BYTES + queued_bytes < 4 * INITIAL_WINDOW_BYTES
    assert trio.current_time() - started <= LIMITS.stream_timeout_s
    await ours.aclose()


async def test_a_peer_that_asks_without_reading_is_cut_off(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    ours, carrier = trio.testing.lockstep_stream_pair()
    session = Session(carrier, initiator=False, limits=LIMITS, admit=lambda: True)
    nursery.start_soon(session.run)
    await ours.send_all(HEADER.pack(0, PING, SYN, 0, 0) * (2 * CONTROL_FRAMES_MAX))
    await session.closed.wait()
    assert session.reason == "the peer asks for more than it reads"


async def test_a_polite_close_lets_what_was_sent_leave(autojump_clock: Clock, nursery: trio.Nursery) -> None:
    wire = Wire(nursery)
    stream = await wire.session.open_stream()
    await stream.send_all(b"goodbye")
    await wire.session.aclose("enough")
    assert wire.session.reason == "enough"
    kinds = [await wire.receive() for _ in range(3)]
    assert [kind for kind, *_ in kinds] == [WINDOW_UPDATE, DATA, GO_AWAY]
    with pytest.raises(trio.BrokenResourceError, match="enough"):
        await stream.send_all(b"x")


async def test_a_proposal_and_the_first_message_leave_in_one_write(
    autojump_clock: Clock, nursery: trio.Nursery
) -> None:
    ours, carrier = trio.testing.memory_stream_pair()
    writes = []
    session = Session(carrier, initiator=True, limits=LIMITS, admit=lambda: True)
    nursery.start_soon(session.run)
    await trio.testing.wait_all_tasks_blocked()
    await ours.receive_some()  # a ping

    async def count() -> None:
        writes.append(trio.current_time())

    carrier.send_stream.send_all_hook = count
    for number in range(1, 11):
        stream = await session.open_stream()
        await propose(stream, "/test/echo/1")
        await send_message(stream, Greeting(text="hello"))
        await trio.testing.wait_all_tasks_blocked()
        assert len(writes) == number
        stream.break_off("enough")
    assert (await ours.receive_some()).count(b"hello") == 10


async def test_no_stream_keeps_the_connection_to_itself(autojump_clock: Clock, nursery: trio.Nursery) -> None:
    wire = Wire(nursery)
    streams = [await wire.session.open_stream() for _ in range(3)]
    for stream in streams:
        nursery.start_soon(stream.send_all, bytes(INITIAL_WINDOW_BYTES))
    sent = dict.fromkeys((stream.stream_id for stream in streams), 0)
    while not all(sent.values()):
        kind, _, stream_id, _ = await wire.receive()
        if kind == DATA:
            sent[stream_id] += 1
    assert sum(sent.values()) < 3 * DATA_FRAMES_QUEUED
