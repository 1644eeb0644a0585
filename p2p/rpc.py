"""One request, one reply, one stream, one deadline.

Owns the life of a call on both sides. Never knows what is asked. A handler answers with a message, or declines
by raising CallRefused, which travels as a ``Refusal``. Whatever else goes wrong costs the stream and nothing
more.

Relies on messages being WireMessages, so that a reply and a ``Refusal`` can be told apart.
"""

from __future__ import annotations

import types
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypeVar

import msgspec
import trio
from msgspec import Meta

from p2p.codec import WireMessage
from p2p.errors import CallRefused, CallTimeout, MalformedMessage, StreamBroken
from p2p.flow import FlowStream
from p2p.frames import receive_message, send_message
from p2p.limits import DEFAULT_LIMITS, Limits
from p2p.transport import PeerId, ProtocolName, Transport

T = TypeVar("T")

_CODE_CHARS_MAX = 64
_TEXT_CHARS_MAX = 512


class Refusal(WireMessage, frozen=True):
    """The request was understood and declined; ``code`` is for machines, ``text`` for people."""

    code: Annotated[str, Meta(max_length=_CODE_CHARS_MAX)]
    text: Annotated[str, Meta(max_length=_TEXT_CHARS_MAX)]


async def call(
    transport: Transport,
    peer: PeerId,
    protocol: ProtocolName,
    request: msgspec.Struct,
    reply_type: type[T] | types.UnionType,
    *,
    timeout_s: float,
    bytes_max: int = DEFAULT_LIMITS.frame_bytes_max,
) -> T:
    """The reply of ``peer`` to ``request``; ``timeout_s`` covers everything from opening the stream.

    Raises PeerUnreachable, ProtocolUnsupported, CallTimeout, CallRefused, StreamBroken or MalformedMessage.
    """
    expected: Any = reply_type | Refusal
    reply: Any = None
    with trio.move_on_after(timeout_s) as deadline:
        stream = await transport.open_stream(peer, protocol)
        try:
            await send_message(stream, request)
            reply = await receive_message(stream, expected, bytes_max=bytes_max)
        finally:
            stream.close()
    if deadline.cancelled_caught:
        raise CallTimeout(f"{peer} did not answer {protocol} within {timeout_s:g} s")
    if reply is None:
        raise StreamBroken(f"{peer} closed the {protocol} stream without a reply")
    if isinstance(reply, Refusal):
        raise CallRefused(reply.code, reply.text)
    return reply  # type: ignore[no-any-return]


def serve_calls(
    transport: Transport,
    protocol: ProtocolName,
    request_type: Any,
    handler: Callable[[PeerId, Any], Awaitable[msgspec.Struct]],
    *,
    limits: Limits,
    on_malformed: Callable[[PeerId, MalformedMessage], None],
) -> None:
    """Answer calls of ``protocol``: ``handler(peer, request)`` returns the reply or raises CallRefused.

    A call that is not done after ``limits.call_timeout_s`` is abandoned. Malformed requests are reported to
    ``on_malformed`` and their stream is reset.
    """

    async def answer(peer: PeerId, stream: FlowStream) -> None:
        with trio.move_on_after(limits.call_timeout_s) as deadline:
            try:
                request: Any = await receive_message(stream, request_type, bytes_max=limits.frame_bytes_max)
            except MalformedMessage as error:
                on_malformed(peer, error)
                raise
            if request is None:
                return
            try:
                reply = await handler(peer, request)
            except CallRefused as refused:
                reply = Refusal(code=refused.code[:_CODE_CHARS_MAX], text=refused.what[:_TEXT_CHARS_MAX])
            await send_message(stream, reply)
        if deadline.cancelled_caught:
            raise CallTimeout(f"a {protocol} call of {peer} was not done after {limits.call_timeout_s:g} s")

    transport.serve(protocol, answer)
