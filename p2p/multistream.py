"""Agreeing on a protocol at the start of a stream: multistream-select 1.0.0, with every size bounded.

Owns the few text lines that both sides exchange (https://github.com/multiformats/multistream-select). Used
three times on the way to a stream: to pick the encryption, the multiplexer, and the stream's own protocol. The
caller sets the deadline.

Written here because the installed library believes any length a stranger announces.
"""

from __future__ import annotations

from collections.abc import Container

import trio

from p2p.errors import MalformedMessage, ProtocolUnsupported, StreamBroken
from p2p.frames import receive_exactly
from p2p.transport import ProtocolName

VERSION = "/multistream/1.0.0"
NOT_AVAILABLE = "na"
LINE_BYTES_MAX = 256
PROPOSALS_MAX = 16
"""Protocols a dialler may try before we hang up."""


async def select(stream: trio.abc.Stream, protocol: str) -> None:
    """Propose ``protocol`` as the dialler; returns when the other side has agreed. Takes one round trip.

    Raises ProtocolUnsupported, MalformedMessage or StreamBroken.
    """
    await _send(stream, _line(VERSION) + _line(protocol))
    if await _receive_line(stream) != VERSION:
        raise MalformedMessage("the other side does not speak multistream 1.0.0")
    answer = await _receive_line(stream)
    if answer != protocol:
        raise ProtocolUnsupported(f"the other side does not speak {protocol}")


async def answer(stream: trio.abc.Stream, offered: Container[str]) -> ProtocolName:
    """Agree, as the listener, to the first proposal that is ``offered``.

    Raises ProtocolUnsupported when nothing fits, MalformedMessage or StreamBroken.
    """
    await _send(stream, _line(VERSION))
    if await _receive_line(stream) != VERSION:
        raise MalformedMessage("the other side does not speak multistream 1.0.0")
    for _ in range(PROPOSALS_MAX):
        proposal = await _receive_line(stream)
        if proposal in offered:
            await _send(stream, _line(proposal))
            return ProtocolName(proposal)
        await _send(stream, _line(NOT_AVAILABLE))
    raise ProtocolUnsupported(f"none of {PROPOSALS_MAX} proposals is spoken here")


def _line(text: str) -> bytes:
    """A varint length, the text, a newline."""
    data = text.encode() + b"\n"
    assert len(data) <= LINE_BYTES_MAX, "protocol names are short"
    return (
        bytes([len(data)]) if len(data) < 0x80 else bytes([len(data) & 0x7F | 0x80, len(data) >> 7])
    ) + data


async def _receive_line(stream: trio.abc.Stream) -> str:
    size = (await receive_exactly(stream, 1))[0]
    if size & 0x80:
        size = size & 0x7F | (await receive_exactly(stream, 1))[0] << 7
    if not 1 <= size <= LINE_BYTES_MAX:
        raise MalformedMessage(f"a negotiation line of {size} bytes")
    data = await receive_exactly(stream, size)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise MalformedMessage("a negotiation line that is not text") from error
    if not text.endswith("\n"):
        raise MalformedMessage("a negotiation line without its newline")
    return text[:-1]


async def _send(stream: trio.abc.Stream, data: bytes) -> None:
    try:
        await stream.send_all(data)
    except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
        raise StreamBroken(f"could not send: {error}") from error
