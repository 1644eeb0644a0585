"""Frames over any stream, including one that ends or lies in every possible place."""

from __future__ import annotations

import msgspec
import pytest
import trio
import trio.testing

from p2p.errors import MalformedMessage, StreamBroken
from p2p.flow import FlowStream
from p2p.frames import receive_exactly, receive_message, send_message

WINDOW_BYTES = 256


class Text(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    text: str


class Wire:
    """A FrameSink that hands what it is given to the stream at the other end, cut into crumbs of ``crumb_bytes``."""

    sendable = True

    def __init__(self, crumb_bytes: int) -> None:
        self._crumb_bytes = crumb_bytes
        self.far: FlowStream | None = None

    @property
    def _far(self) -> FlowStream:
        assert self.far is not None
        return self.far

    async def wait_sendable(self) -> None:
        """Always."""

    def send_data(self, stream: FlowStream, payload: memoryview) -> None:
        assert self._far.accept_bytes(len(payload))
        for at in range(0, len(payload), self._crumb_bytes):
            self._far.deliver(bytes(payload[at : at + self._crumb_bytes]))

    def send_credit(self, stream: FlowStream, count: int) -> None:
        self._far.add_credit(count)

    def send_eof(self, stream: FlowStream) -> None:
        self._far.deliver_eof()

    def send_reset(self, stream: FlowStream) -> None:
        self._far.break_off("reset")

    def forget(self, stream: FlowStream) -> None:
        """Nothing is kept."""


def stream_pair(crumb_bytes: int = 1 << 20) -> tuple[FlowStream, FlowStream]:
    wires = Wire(crumb_bytes), Wire(crumb_bytes)
    left, right = (
        FlowStream(wire, 1, credit=WINDOW_BYTES, window_bytes=WINDOW_BYTES, timeout_s=5.0) for wire in wires
    )
    wires[0].far, wires[1].far = right, left
    return left, right


async def framed(*messages: Text) -> bytes:
    left, right = stream_pair()
    for message in messages:
        await send_message(left, message)
    await left.send_eof()
    return b"".join([chunk async for chunk in right])


async def received(data: bytes, *, bytes_max: int = 100) -> Text | None:
    left, right = stream_pair()
    await left.send_all(data)
    await left.send_eof()
    return await receive_message(right, Text, bytes_max=bytes_max)


@pytest.mark.parametrize("crumb_bytes", [1, 3, 1 << 20])
async def test_messages_arrive_in_order_and_then_the_end(crumb_bytes: int) -> None:
    left, right = stream_pair(crumb_bytes)
    messages = [Text(text="x" * size) for size in (0, 1, 50, 1000)]  # the last one is larger than the window
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            for message in messages:
                await send_message(left, message)
            await left.send_eof()

        nursery.start_soon(send)
        assert [await receive_message(right, Text, bytes_max=2000) for _ in messages] == messages
        assert await receive_message(right, Text, bytes_max=2000) is None


async def test_a_message_that_needs_no_waiting_notices_a_cancelled_scope_all_the_same() -> None:
    left, right = stream_pair()
    with trio.CancelScope() as scope:
        scope.cancel()
        await send_message(left, Text(text="never"))
    assert scope.cancelled_caught
    await send_message(left, Text(text="sent"))
    with trio.CancelScope() as scope:
        scope.cancel()
        await receive_message(right, Text, bytes_max=100)
    assert scope.cancelled_caught
    assert await receive_message(right, Text, bytes_max=100) == Text(text="sent")


async def test_a_message_waits_its_turn_behind_one_under_way() -> None:
    left, right = stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(left.send_all, bytes(2 * WINDOW_BYTES))
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await send_message(left, Text(text="in between"))
        assert await receive_exactly(right, 2 * WINDOW_BYTES) == bytes(2 * WINDOW_BYTES)


async def test_an_end_inside_a_frame_is_a_broken_stream() -> None:
    data = await framed(Text(text="hello"))
    assert await received(b"") is None
    for cut in range(1, len(data)):
        with pytest.raises(StreamBroken):
            await received(data[:cut])
    assert await received(data) == Text(text="hello")


@pytest.mark.parametrize("declared", [101, 2**31, 2**32 - 1])
async def test_a_frame_above_the_limit_is_refused_before_it_is_read(declared: int) -> None:
    with pytest.raises(MalformedMessage, match="the limit is 100"):
        await received(declared.to_bytes(4, "big"))


@pytest.mark.parametrize("body", [b"", b"\xff", b"hello", b"\xa1\x64text\x61x"])
async def test_a_frame_of_anything_else_is_malformed(body: bytes) -> None:
    with pytest.raises(MalformedMessage):
        await received(len(body).to_bytes(4, "big") + body)


async def test_a_stream_that_breaks_is_reported_as_ours() -> None:
    left, right = stream_pair()
    right.close()
    with pytest.raises(StreamBroken):
        await send_message(left, Text(text="x"))
    with pytest.raises(StreamBroken):
        await receive_exactly(right, 1)
    with pytest.raises(StreamBroken):
        await receive_message(right, Text, bytes_max=100)
    assert await receive_exactly(stream_pair()[1], 0) == b""
