"""Agreeing on a protocol, and not agreeing, and nonsense."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
import trio.testing

from p2p.errors import GossamerError, MalformedMessage, ProtocolUnsupported
from p2p.flow import FlowStream
from p2p.multistream import PROPOSALS_MAX, answer, propose, select


async def test_both_sides_agree_on_what_both_speak() -> None:
    left, right = trio.testing.memory_stream_pair()
    agreed = []

    async def listen() -> None:
        agreed.append(await answer(right, {"/a/1", "/" + "b" * 200}))

    for protocol in ("/a/1", "/" + "b" * 200):  # one byte of length, and two
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            await select(left, protocol)
    assert agreed == ["/a/1", "/" + "b" * 200]


async def test_what_is_not_spoken_is_refused() -> None:
    left, right = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer, right, {"/a/1"})
        with pytest.raises(ProtocolUnsupported):
            await select(left, "/b/1")
        nursery.cancel_scope.cancel()


async def test_proposals_are_counted() -> None:
    left, right = trio.testing.memory_stream_pair()
    await left.send_all(b"\x13/multistream/1.0.0\n" + b"\x03/x\n" * PROPOSALS_MAX)
    with pytest.raises(ProtocolUnsupported):
        await answer(right, {"/a/1"})


HEADER = b"\x13/multistream/1.0.0\n"


async def test_a_second_proposal_may_follow_a_refusal() -> None:
    left, right = trio.testing.memory_stream_pair()
    await left.send_all(HEADER + b"\x03/x\n" * (PROPOSALS_MAX - 1) + b"\x05/a/1\nhello")
    assert await answer(right, {"/a/1"}) == "/a/1"
    assert await right.receive_some() == b"hello"
    said = await left.receive_some()
    assert said == HEADER + b"\x03na\n" * (PROPOSALS_MAX - 1) + b"\x05/a/1\n"


@pytest.mark.parametrize("ahead", [b"\x00\x00\x00\x05hello", b"\x05hello", b"\x05hel", b""])
async def test_what_follows_a_refusal_and_is_no_proposal_is_the_end_of_it(ahead: bytes) -> None:
    left, right = trio.testing.memory_stream_pair()
    await left.send_all(HEADER + b"\x03/x\n" + ahead)
    await left.send_eof()
    with pytest.raises(ProtocolUnsupported, match="/x is not spoken here"):
        await answer(right, {"/a/1"})


async def test_a_dialler_that_left_without_the_answer_is_heard_out() -> None:
    left, right = trio.testing.memory_stream_pair()
    await left.send_all(HEADER + b"\x05/a/1\nhello")
    await left.aclose()
    assert await answer(right, {"/a/1"}) == "/a/1"
    assert await right.receive_some() == b"hello"


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x13/multistream/2.0.0\n",
        b"\x00",
        HEADER + b"\x00",
        HEADER + b"\x04/a/1",
        HEADER + b"\x02\xff\n",
        HEADER + b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        HEADER + b"\x81\x02" + b"x" * 257,
    ],
)
async def test_nonsense_is_malformed_whatever_length_it_declares(data: bytes) -> None:
    left, right = trio.testing.memory_stream_pair()
    await left.send_all(data)
    await left.send_eof()
    with pytest.raises(MalformedMessage if len(data) > 20 and data.startswith(HEADER) else GossamerError):
        await answer(right, {"/a/1"})


# --- going on without the answer ----------------------------------------------------------------------------------


class Sink:
    """Takes down what a stream sends."""

    sendable = True

    def __init__(self) -> None:
        self.sent: list[bytes | str] = []

    async def wait_sendable(self) -> None:
        pass

    def send_data(self, stream: FlowStream, payload: memoryview) -> None:
        self.sent.append(bytes(payload))

    def send_credit(self, stream: FlowStream, count: int) -> None:
        self.sent.append("credit")

    def send_eof(self, stream: FlowStream) -> None:
        self.sent.append("end")

    def send_reset(self, stream: FlowStream) -> None:
        self.sent.append("reset")

    def forget(self, stream: FlowStream) -> None:
        pass


PROPOSED = HEADER + b"\x05/a/1\n"
TIMEOUT_S = 15.0


async def proposed() -> tuple[FlowStream, Sink]:
    sink = Sink()
    stream = FlowStream(sink, 1, credit=1 << 18, window_bytes=1 << 18, timeout_s=TIMEOUT_S)
    await propose(stream, "/a/1")
    return stream, sink


async def test_nothing_is_waited_for_before_the_first_read() -> None:
    stream, sink = await proposed()
    assert stream.send_now(b"question")
    await stream.send_all(b"!")
    await stream.send_eof()
    assert sink.sent == [PROPOSED, b"question", b"!", "end"]
    assert not stream.agreed


@pytest.mark.parametrize("at", range(1, len(PROPOSED) + 1))
async def test_the_answer_may_be_cut_anywhere(at: int) -> None:
    stream, _ = await proposed()
    received = []

    async def receive() -> None:
        received.append(await stream.receive_some())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        stream.deliver(PROPOSED[:at])
        assert stream.agreed is (at == len(PROPOSED))
        await trio.testing.wait_all_tasks_blocked()
        stream.deliver(PROPOSED[at:] + b"and")
        assert stream.agreed
    stream.deliver(b"more")
    assert received == [b"and"]
    assert await stream.receive_some() == b"more"


Answer = Callable[[FlowStream], None]


def says(*pieces: bytes) -> Answer:
    def answer_with(stream: FlowStream) -> None:
        for piece in pieces:
            stream.deliver(piece)

    return answer_with


@pytest.mark.parametrize(
    ("answer_with", "error", "why", "told"),
    [
        (says(HEADER + b"\x03na\n"), ProtocolUnsupported, "does not speak /a/1", True),
        (says(HEADER, b"\x03na\n" + b"and more", b"of it"), ProtocolUnsupported, "does not speak /a/1", True),
        (says(HEADER + b"\x05/b/1\n"), ProtocolUnsupported, "does not speak /a/1", True),
        (says(b"\x13/multistream/2.0.0\n"), trio.BrokenResourceError, "multistream", True),
        (says(b"HTTP/1.1 400 Bad Request\r\n" * 20), trio.BrokenResourceError, "newline", True),
        (says(HEADER + b"\x00"), trio.BrokenResourceError, "line of 0 bytes", True),
        (says(b"\xff" * 50_000), trio.BrokenResourceError, "line of", True),
        (says(HEADER), trio.BrokenResourceError, "did not answer within 15 s", True),
        (lambda _: None, trio.BrokenResourceError, "did not answer within 15 s", True),
        (FlowStream.deliver_eof, trio.BrokenResourceError, "without an answer", True),
        (lambda stream: stream.break_off("they reset it"), trio.BrokenResourceError, "they reset it", False),
    ],
)
async def test_without_an_agreement_nothing_can_be_read_or_written(
    autojump_clock: object, answer_with: Answer, error: type[Exception], why: str, told: bool
) -> None:
    stream, sink = await proposed()
    answer_with(stream)
    started = trio.current_time()
    for _ in range(2):
        with pytest.raises(error, match=why):
            await stream.receive_some()
    with pytest.raises(error, match=why):
        await stream.send_all(b"x")
    with pytest.raises(error, match=why):
        await stream.wait_agreed()
    assert trio.current_time() - started == (TIMEOUT_S if "within" in why else 0)
    assert sink.sent[1:] == ["reset"] * told
    stream.close()
    with pytest.raises(trio.ClosedResourceError):
        await stream.receive_some()


async def test_a_refusal_wakes_whoever_waits_to_send() -> None:
    stream, _ = await proposed()
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            with pytest.raises(ProtocolUnsupported):
                await stream.send_all(bytes(1 << 20))

        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        stream.deliver(HEADER + b"\x03na\n")


async def test_closing_before_the_answer_is_the_end_of_it(autojump_clock: object) -> None:
    stream, sink = await proposed()
    started = trio.current_time()
    async with trio.open_nursery() as nursery:

        async def read() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await stream.receive_some()

        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        stream.close()
    assert trio.current_time() == started
    assert sink.sent[1:] == ["end", "reset"]


async def test_a_cancelled_first_read_loses_nothing(autojump_clock: object) -> None:
    stream, _ = await proposed()
    with trio.move_on_after(1):
        await stream.receive_some()
    stream.deliver(PROPOSED[:10])
    with trio.move_on_after(1):
        await stream.receive_some()
    stream.deliver(PROPOSED[10:] + b"there")
    assert await stream.receive_some() == b"there"
