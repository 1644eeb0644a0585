"""The messages of circuit relay v2: protobuf, each behind its length, as the specification has them.

Owns how they are sent and read with every size bounded, and how peers are named in them
(https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md). The message types are the library's; its own relay
reads what came with one read of the stream, without a length, and so does not speak with others. Never decides
anything: ``p2p.relay`` answers, ``p2p.circuits`` asks.
"""

from __future__ import annotations

from typing import Any, TypeVar

import base58
import trio
from google.protobuf.message import DecodeError, Message
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Limit, Reservation, Status, StopMessage

from p2p.errors import MalformedMessage, StreamBroken
from p2p.frames import receive_exactly
from p2p.identity import public_key_of
from p2p.transport import PeerId, ProtocolName

HOP_PROTOCOL = ProtocolName("/libp2p/circuit/relay/0.2.0/hop")
STOP_PROTOCOL = ProtocolName("/libp2p/circuit/relay/0.2.0/stop")
MESSAGE_BYTES_MAX = 4096
VARINT_BYTES_MAX = 2
"""Of a length up to MESSAGE_BYTES_MAX."""

M = TypeVar("M", bound=Message)

__all__ = [
    "HOP_PROTOCOL",
    "STOP_PROTOCOL",
    "HopMessage",
    "Limit",
    "Reservation",
    "Status",
    "StopMessage",
    "named_peer",
    "naming",
    "receive",
    "send",
    "status_name",
]


async def send(stream: trio.abc.SendStream, message: Message) -> None:
    """Send one message. Raises StreamBroken."""
    data = message.SerializeToString()
    size = len(data)
    length = bytes([size]) if size < 0x80 else bytes([size & 0x7F | 0x80, size >> 7])
    try:
        await stream.send_all(length + data)
    except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
        raise StreamBroken(f"could not send: {error}") from error


async def receive(stream: trio.abc.ReceiveStream, kind: type[M]) -> M:
    """The next message, and not a byte of what follows it. Raises MalformedMessage or StreamBroken."""
    size = 0
    for place in range(VARINT_BYTES_MAX):
        byte = (await receive_exactly(stream, 1))[0]
        size |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            break
    else:
        raise MalformedMessage("a message of a relay that is too long")
    if size > MESSAGE_BYTES_MAX:
        raise MalformedMessage(f"a message of a relay of {size} bytes, the limit is {MESSAGE_BYTES_MAX}")
    message: M = kind()
    try:
        message.ParseFromString(await receive_exactly(stream, size))
    except DecodeError as error:
        raise MalformedMessage("a message of a relay that is not protobuf") from error
    return message


def naming(peer: PeerId) -> bytes:
    """``peer`` as messages name it: the bytes that its text encodes."""
    return bytes(base58.b58decode(peer))


def named_peer(message: Any) -> PeerId:
    """Whom a HopMessage or a StopMessage names. Raises MalformedMessage."""
    peer = PeerId(base58.b58encode(message.peer.id).decode())
    try:
        public_key_of(peer)
    except ValueError as error:
        raise MalformedMessage("a message of a relay that names no peer") from error
    return peer


def status_name(status: int) -> str:
    """For people: ``no reservation``."""
    name: str = Status.Name(status) if status in Status.values() else f"status {status}"
    return name.replace("_", " ").lower()
