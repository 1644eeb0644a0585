"""Agreeing on a protocol at the start of a stream: multistream-select 1.0.0, with every size bounded.

Owns the few text lines that both sides exchange (https://github.com/multiformats/multistream-select). Used
three times on the way to a stream: to pick the encryption, the multiplexer, and the stream's own protocol. Only the
first two are waited for: on a stream the dialler goes on at once, and its stream tells it of the answer. The
caller sets the deadline.

Written here because the installed library believes any length a stranger announces.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Generator
from typing import TypeVar

import trio

from p2p.errors import MalformedMessage, ProtocolUnsupported, StreamBroken
from p2p.flow import FlowStream
from p2p.frames import receive_exactly
from p2p.transport import ProtocolName

VERSION = "/multistream/1.0.0"
NOT_AVAILABLE = "na"
LINE_BYTES_MAX = 256
PROPOSALS_MAX = 16
"""Protocols a dialler may try before we hang up."""

T = TypeVar("T")


async def select(stream: trio.abc.Stream, protocol: str) -> None:
    """Propose ``protocol`` as the dialler; returns when the other side has agreed. Takes one round trip.

    Raises ProtocolUnsupported, MalformedMessage or StreamBroken.
    """
    await _send(stream, _line(VERSION) + _line(protocol))
    await _receive(stream, _agreement(protocol))


async def propose(stream: FlowStream, protocol: str) -> None:
    """Propose ``protocol`` as the first thing said on ``stream``, which hears the answer when it comes.

    Raises StreamBroken.
    """
    lines = _line(VERSION) + _line(protocol)
    stream.propose(_Hearing(protocol).hear)
    proposed = False
    try:
        # Without a turn for others, so that what the caller says next leaves together with it.
        await _send(stream, lines)
        proposed = True
    finally:
        if not proposed:
            stream.reset("no protocol was proposed")


async def answer(stream: trio.abc.Stream, offered: Container[str]) -> ProtocolName:
    """Agree, as the listener, to the first proposal that is ``offered``.

    Gives other tasks a turn only where it has to wait. Raises ProtocolUnsupported when nothing fits, MalformedMessage
    or StreamBroken.
    """
    await _reply(stream, VERSION)
    if await _receive(stream, _received_line()) != VERSION:
        raise MalformedMessage("the other side does not speak multistream 1.0.0")
    refused = ""
    for _ in range(PROPOSALS_MAX):
        try:
            proposal = await _receive(stream, _received_line())
        except (MalformedMessage, StreamBroken) as error:
            if not refused:
                raise
            # No further proposal: what the dialler has sent without waiting for our answer, or its end.
            raise ProtocolUnsupported(f"{refused} is not spoken here") from error
        if proposal in offered:
            await _reply(stream, proposal)
            return ProtocolName(proposal)
        await _reply(stream, NOT_AVAILABLE)
        refused = proposal
    raise ProtocolUnsupported(f"none of {PROPOSALS_MAX} proposals is spoken here")


class _Hearing:
    """A dialler's end of a negotiation whose answer comes in pieces, with what follows it."""

    def __init__(self, protocol: str) -> None:
        self._answer = _agreement(protocol)
        self._wanted = next(self._answer)
        self._heard = b""

    def hear(self, data: bytes) -> bytes | None:
        """What follows the agreement, or None before it is complete. Raises ProtocolUnsupported or MalformedMessage."""
        self._heard += data
        while len(self._heard) >= self._wanted:
            part, self._heard = self._heard[: self._wanted], self._heard[self._wanted :]
            try:
                self._wanted = self._answer.send(part)
            except StopIteration:
                return self._heard
        return None


# --- what is said, whichever way its bytes come: a parser asks for so many of them at a time -----------------------


def _agreement(protocol: str) -> Generator[int, bytes, None]:
    if (yield from _received_line()) != VERSION:
        raise MalformedMessage("the other side does not speak multistream 1.0.0")
    if (yield from _received_line()) != protocol:
        raise ProtocolUnsupported(f"the other side does not speak {protocol}")


def _received_line() -> Generator[int, bytes, str]:
    size = (yield 1)[0]
    if size & 0x80:
        size = size & 0x7F | (yield 1)[0] << 7
    if not 1 <= size <= LINE_BYTES_MAX:
        raise MalformedMessage(f"a negotiation line of {size} bytes")
    data = yield size
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise MalformedMessage("a negotiation line that is not text") from error
    if not text.endswith("\n"):
        raise MalformedMessage("a negotiation line without its newline")
    return text[:-1]


def _line(text: str) -> bytes:
    """A varint length, the text, a newline."""
    data = text.encode() + b"\n"
    assert len(data) <= LINE_BYTES_MAX, "protocol names are short"
    return (
        bytes([len(data)]) if len(data) < 0x80 else bytes([len(data) & 0x7F | 0x80, len(data) >> 7])
    ) + data


async def _receive(stream: trio.abc.Stream, parser: Generator[int, bytes, T]) -> T:
    wanted = next(parser)
    while True:
        data = await receive_exactly(stream, wanted)
        try:
            wanted = parser.send(data)
        except StopIteration as done:
            result: T = done.value
            return result


async def _reply(stream: trio.abc.Stream, line: str) -> None:
    # A dialler that wants no reply may have left by now; what it had to say is still to be read.
    with contextlib.suppress(StreamBroken):
        await _send(stream, _line(line))


async def _send(stream: trio.abc.Stream, data: bytes) -> None:
    try:
        if not (isinstance(stream, FlowStream) and stream.send_now(data)):
            await stream.send_all(data)
    except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
        raise StreamBroken(f"could not send: {error}") from error
