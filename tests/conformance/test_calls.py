"""Frames and calls over both transports."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from p2p.codec import WireMessage
from p2p.errors import CallRefused, CallTimeout, MalformedMessage, ProtocolUnsupported, StreamBroken
from p2p.frames import receive_message, send_message
from p2p.rpc import call, serve_calls
from p2p.transport import PeerId, ProtocolName, Transport

if TYPE_CHECKING:
    from tests.conformance.conftest import World

ADD = ProtocolName("/test/add/1")
Clock = trio.abc.Clock | None
Pair = tuple[Transport, Transport]


class Add(WireMessage, frozen=True):
    left: int
    right: int


class Sum(WireMessage, frozen=True):
    total: int
    padding: bytes = b""


async def add(_: PeerId, request: Add) -> Sum:
    if request.left == 13:
        raise CallRefused("unlucky", "not this number")
    if request.left == 14:
        await trio.sleep_forever()
    return Sum(total=request.left + request.right, padding=bytes(request.right))


@pytest.fixture
def malformed(pair: Pair, world: World) -> list[tuple[PeerId, MalformedMessage]]:
    """Serves ADD on the far host; what it finds malformed is collected here."""
    reports: list[tuple[PeerId, MalformedMessage]] = []
    serve_calls(
        pair[1],
        ADD,
        Add,
        add,
        limits=world.limits,
        on_malformed=lambda peer, error: reports.append((peer, error)),
    )
    return reports


Reports = list[tuple[PeerId, MalformedMessage]]


async def test_a_call_returns_the_reply(clock: Clock, pair: Pair, malformed: Reports) -> None:
    near, far = pair
    results = []

    async def one(left: int) -> None:
        reply = await call(near, far.local.peer, ADD, Add(left=left, right=1), Sum, timeout_s=2)
        results.append(reply.total)

    async with trio.open_nursery() as nursery:
        for left in range(5):
            nursery.start_soon(one, left)
    assert sorted(results) == [1, 2, 3, 4, 5]
    assert near.traffic().streams_open == 0


async def test_a_refusal_carries_its_code(clock: Clock, pair: Pair, malformed: Reports) -> None:
    near, far = pair
    with pytest.raises(CallRefused, match="not this number") as refused:
        await call(near, far.local.peer, ADD, Add(left=13, right=1), Sum, timeout_s=2)
    assert refused.value.code == "unlucky"


async def test_no_reply_in_time_is_a_timeout_on_both_sides(
    clock: Clock, pair: Pair, malformed: Reports, world: World
) -> None:
    near, far = pair
    with pytest.raises(CallTimeout):
        await call(
            near, far.local.peer, ADD, Add(left=14, right=1), Sum, timeout_s=world.limits.call_timeout_s / 2
        )
    with pytest.raises(StreamBroken):
        await call(near, far.local.peer, ADD, Add(left=14, right=1), Sum, timeout_s=5)


async def test_calling_a_protocol_nobody_serves(clock: Clock, pair: Pair) -> None:
    near, far = pair
    with pytest.raises(ProtocolUnsupported):
        await call(near, far.local.peer, ADD, Add(left=1, right=1), Sum, timeout_s=2)


async def test_a_reply_above_the_callers_limit_is_refused(
    clock: Clock, pair: Pair, malformed: Reports
) -> None:
    near, far = pair
    with pytest.raises(MalformedMessage):
        await call(near, far.local.peer, ADD, Add(left=1, right=5000), Sum, timeout_s=2, bytes_max=1000)


@pytest.mark.parametrize("garbage", [b"\x00\x00\x00\x02ab", b"\xff\xff\xff\xff", b"\x00\x00\x00\x00"])
async def test_malformed_requests_are_reported_and_their_stream_is_reset(
    clock: Clock, pair: Pair, malformed: Reports, garbage: bytes
) -> None:
    near, far = pair
    stream = await near.open_stream(far.local.peer, ADD)
    await stream.send_all(garbage)
    with pytest.raises(trio.BrokenResourceError):
        await stream.receive_some()
    assert [peer for peer, _ in malformed] == [near.local.peer]
    reply = await call(near, far.local.peer, ADD, Add(left=2, right=2), Sum, timeout_s=2)
    assert reply.total == 4


async def test_a_stream_of_many_frames_ends_cleanly(clock: Clock, pair: Pair) -> None:
    near, far = pair

    async def count(_: PeerId, stream: trio.abc.HalfCloseableStream) -> None:
        total = 0
        while (message := await receive_message(stream, Add, bytes_max=100)) is not None:
            total += message.left + message.right
        await send_message(stream, Sum(total=total))

    far.serve(ProtocolName("/test/count/1"), count)
    async with await near.open_stream(far.local.peer, ProtocolName("/test/count/1")) as stream:
        for number in range(50):
            await send_message(stream, Add(left=number, right=1))
        await stream.send_eof()
        reply = await receive_message(stream, Sum, bytes_max=100)
        assert reply is not None
        assert reply.total == sum(range(50)) + 50
        assert await receive_message(stream, Sum, bytes_max=100) is None
