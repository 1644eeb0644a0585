"""Messages on a stream: a 4-byte big-endian length, then that many bytes of canonical CBOR.

Owns the framing and the translation of trio's stream errors into ours. Never decides what a message means, nor
how long to wait: deadlines belong to the caller. Relies on ``p2p.codec`` for everything inside a frame.

Messages are small and most of them need no waiting, so nothing here gives other tasks a turn unless it has to wait; a
cancelled scope is noticed all the same.
"""

from __future__ import annotations

import types
from typing import TypeVar

import msgspec
import trio

from p2p import codec
from p2p.errors import MalformedMessage, StreamBroken
from p2p.flow import FlowStream

LENGTH_BYTES = 4

T = TypeVar("T")


async def send_message(stream: FlowStream, message: msgspec.Struct) -> None:
    """Send one frame. Raises StreamBroken."""
    data = codec.encode(message)
    frame = len(data).to_bytes(LENGTH_BYTES, "big") + data
    await trio.lowlevel.checkpoint_if_cancelled()
    try:
        if not stream.send_now(frame):
            await stream.send_all(frame)
    except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
        raise StreamBroken(f"could not send: {error}") from error


async def receive_message(
    stream: FlowStream, message_type: type[T] | types.UnionType, *, bytes_max: int
) -> T | None:
    """The next frame's message, or None when the stream ends cleanly between frames.

    Raises MalformedMessage for a frame above ``bytes_max`` (before reading it) or with anything else inside
    than a canonical ``message_type``, StreamBroken when the stream breaks or ends inside a frame.
    """
    await trio.lowlevel.checkpoint_if_cancelled()
    first = _receive_now(stream, LENGTH_BYTES) or await _receive_some(stream, LENGTH_BYTES)
    if not first:
        return None
    header = first + await receive_exactly(stream, LENGTH_BYTES - len(first))
    size = int.from_bytes(header, "big")
    if size > bytes_max:
        raise MalformedMessage(f"a frame of {size} bytes, the limit is {bytes_max}")
    data = _receive_now(stream, size)
    if len(data) < size:
        data += await receive_exactly(stream, size - len(data))
    return codec.decode(data, message_type, bytes_max=bytes_max)  # type: ignore[arg-type]


async def receive_exactly(stream: trio.abc.ReceiveStream, size: int) -> bytes:
    """The next ``size`` bytes. Raises StreamBroken when the stream ends or breaks before."""
    chunks = []
    missing = size
    while missing:
        here = _receive_now(stream, missing) if isinstance(stream, FlowStream) else b""
        chunk = here or await _receive_some(stream, missing)
        if not chunk:
            raise StreamBroken(f"the stream ended {missing} bytes early")
        chunks.append(chunk)
        missing -= len(chunk)
    return b"".join(chunks)


def _receive_now(stream: FlowStream, max_bytes: int) -> bytes:
    try:
        return stream.receive_now(max_bytes)
    except trio.ClosedResourceError as error:
        raise StreamBroken(f"could not receive: {error}") from error


async def _receive_some(stream: trio.abc.ReceiveStream, max_bytes: int) -> bytes:
    try:
        return bytes(await stream.receive_some(max_bytes))
    except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
        raise StreamBroken(f"could not receive: {error}") from error
