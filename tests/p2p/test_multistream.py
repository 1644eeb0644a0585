"""Agreeing on a protocol, and not agreeing, and nonsense."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from p2p.errors import GossamerError, MalformedMessage, ProtocolUnsupported
from p2p.multistream import PROPOSALS_MAX, answer, select


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
