"""Encrypted framing with a stand-in cipher: cut messages, several at once, and bytes that were tampered with."""

from __future__ import annotations

import pytest
import trio
import trio.testing

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
