"""Encrypted framing with a stand-in cipher: cut messages, several at once, and bytes that were tampered with."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from p2p.metered import Meter, MeteredStream
from p2p.noise_stream import PLAINTEXT_BYTES_MAX, NoiseStream


def seal(data: bytes) -> bytes:
    return data[::-1] + bytes(16)


def unseal(data: bytes) -> bytes:
    if data[-16:] != bytes(16):
        raise ValueError("the tag does not fit")
    return data[:-16][::-1]


def pair() -> tuple[NoiseStream, NoiseStream]:
    left, right = trio.testing.memory_stream_pair()
    return NoiseStream(left, seal, unseal), NoiseStream(right, seal, unseal)


@pytest.mark.parametrize("size", [1, PLAINTEXT_BYTES_MAX, PLAINTEXT_BYTES_MAX + 1, 1 << 20])
async def test_bytes_come_through_in_order(size: int) -> None:
    left, right = pair()
    data = bytes(range(256)) * (size // 256 + 1)
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            await left.send_all(data[:size])
            await left.aclose()

        nursery.start_soon(send)
        received = b""
        while chunk := await right.receive_some(1000):
            assert len(chunk) <= 1000
            received += chunk
    assert received == data[:size]


async def test_messages_may_arrive_in_any_pieces() -> None:
    raw, carrier = trio.testing.memory_stream_pair()
    stream = NoiseStream(carrier, seal, unseal)
    wire = b"".join(len(seal(part)).to_bytes(2, "big") + seal(part) for part in (b"one", b"", b"three"))
    received = b""
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            for at in range(len(wire)):
                await raw.send_all(wire[at : at + 1])
                await trio.testing.wait_all_tasks_blocked()

        nursery.start_soon(send)
        while len(received) < 8:
            received += await stream.receive_some()
    assert received == b"onethree"


@pytest.mark.parametrize("wire", [b"\x00\x11" + b"x" * 17, b"\x00\x00", b"\x00"])
async def test_anything_else_breaks_the_connection(wire: bytes) -> None:
    raw, carrier = trio.testing.memory_stream_pair()
    await raw.send_all(wire)
    await raw.send_eof()
    with pytest.raises(trio.BrokenResourceError):
        await NoiseStream(carrier, seal, unseal).receive_some()


async def test_the_socket_is_told_how_much_of_a_message_is_missing() -> None:
    raw, carrier = trio.testing.memory_stream_pair()
    stream = NoiseStream(carrier, seal, unseal)
    awaited: list[int] = []
    stream.awaiting = awaited.append
    wire = len(seal(b"hello")).to_bytes(2, "big") + seal(b"hello")
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            for part in (wire[:1], wire[1:2], wire[2:10], wire[10:]):
                await trio.testing.wait_all_tasks_blocked()
                await raw.send_all(part)

        nursery.start_soon(send)
        assert await stream.receive_some() == b"hello"
    assert awaited == [2, 1, 21, 13]


async def test_a_full_message_in_many_packets_wakes_its_reader_a_few_times() -> None:
    """Over a real socket, as a line of a home has it; without the hint it would be once a packet."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    near = await trio.open_tcp_stream("127.0.0.1", listeners[0].socket.getsockname()[1])
    far = await listeners[0].accept()
    metered = MeteredStream(far, Meter())
    stream = NoiseStream(metered, seal, unseal)
    stream.awaiting = metered.await_bytes
    reads = 0
    receive = metered.receive_some

    async def counted(max_bytes: int | None = None) -> bytes:
        nonlocal reads
        reads += 1
        return await receive(max_bytes)

    metered.receive_some = counted  # type: ignore[method-assign]
    data, sent = bytes(PLAINTEXT_BYTES_MAX), trio.Event()
    wire = (PLAINTEXT_BYTES_MAX + 16).to_bytes(2, "big") + seal(data)
    async with near, far, listeners[0], trio.open_nursery() as nursery:

        async def send() -> None:
            for at in range(0, len(wire), 1448):
                await near.send_all(wire[at : at + 1448])
                await trio.sleep(0.0005)
            sent.set()

        nursery.start_soon(send)
        with trio.fail_after(5):
            assert await stream.receive_some() == data
        assert reads <= 4
        await sent.wait()
        # And what is short comes through at once.
        await near.send_all(len(seal(b"short")).to_bytes(2, "big") + seal(b"short"))
        with trio.fail_after(1):
            assert await stream.receive_some() == b"short"
