"""Frames over any stream, including one that ends or lies in every possible place."""

from __future__ import annotations

import msgspec
import pytest
import trio
import trio.testing

from p2p.errors import MalformedMessage, StreamBroken
from p2p.frames import receive_exactly, receive_message, send_message


class Text(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    text: str


async def framed(*messages: Text) -> bytes:
    left, right = trio.testing.memory_stream_one_way_pair()
    for message in messages:
        await send_message(left, message)
    await left.aclose()
    return b"".join([chunk async for chunk in right])


async def received(data: bytes, *, bytes_max: int = 100) -> Text | None:
    left, right = trio.testing.memory_stream_one_way_pair()
    await left.send_all(data)
    await left.aclose()
    return await receive_message(right, Text, bytes_max=bytes_max)


async def test_messages_arrive_in_order_and_then_the_end() -> None:
    left, right = trio.testing.lockstep_stream_one_way_pair()
    messages = [Text(text="x" * size) for size in (0, 1, 50)]
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            for message in messages:
                await send_message(left, message)
            await left.aclose()

        nursery.start_soon(send)
        assert [await receive_message(right, Text, bytes_max=100) for _ in messages] == messages
        assert await receive_message(right, Text, bytes_max=100) is None


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
    left, right = trio.testing.memory_stream_one_way_pair()
    await right.aclose()
    with pytest.raises(StreamBroken):
        await send_message(left, Text(text="x"))
    with pytest.raises(StreamBroken):
        await receive_exactly(right, 1)
    assert await receive_exactly(trio.testing.memory_stream_one_way_pair()[1], 0) == b""
