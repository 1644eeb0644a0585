"""27 kinds of garbage to throw at a node, from raw TCP bytes to well-formed frames with nonsense inside.

Each kind is aimed at one layer. ``throw`` delivers one; the victim is expected to survive them all.
"""

from __future__ import annotations

from dataclasses import dataclass

import trio

from p2p.errors import GossamerError, ProtocolUnsupported
from p2p.transport import PeerRecord, ProtocolName, Transport

HEADER = b"\x13/multistream/1.0.0\n"
NOISE = HEADER + b"\x07/noise\n"
GOSSAMER_PROTOCOLS = tuple(
    ProtocolName(f"/gossamer/{name}/1") for name in ("hello", "sync", "shard", "snapshot", "merge", "reach")
)
FOREIGN_PROTOCOLS = tuple(
    ProtocolName(name)
    for name in (
        "/meshsub/1.0.0",
        "/meshsub/1.1.0",
        "/meshsub/1.2.0",
        "/ipfs/id/1.0.0",
        "/ipfs/id/push/1.0.0",
        "/ipfs/ping/1.0.0",
        "/ipfs/kad/1.0.0",
        "/libp2p/circuit/relay/0.2.0/hop",
        "/libp2p/circuit/relay/0.2.0/stop",
    )
)


def _noise(message: bytes) -> bytes:
    """The negotiation of Noise, then one handshake message."""
    return NOISE + len(message).to_bytes(2, "big") + message


def _frame(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


RAW: dict[str, bytes] = {
    "nothing": b"",
    "one byte": b"\x00",
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "tls client hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
    "zeros": bytes(100_000),
    "ones": b"\xff" * 100_000,
    "multistream of another version": b"\x13/multistream/9.9.9\n",
    "multistream line of 2^63 bytes": b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
    "multistream proposals without end": HEADER + b"\x05/abc\n" * 5000,
    "multistream asking for plaintext": HEADER + b"\x11/plaintext/2.0.0\n" + b"\x08\x01",
    "noise of no bytes": _noise(b""),
    "noise of 1 byte": _noise(b"\x01"),
    "noise with a zero key": _noise(bytes(32)),
    "noise of the greatest size": _noise(b"\xa5" * 65535),
    "noise cut off": NOISE + b"\xff\xff" + b"\x00" * 100,
    "noise twice the first message": _noise(b"\x09" * 32) + b"\x00\x20" + b"\x09" * 32,
}
"""Sent on a fresh TCP connection, before anybody has proved an identity."""

STREAM: dict[str, bytes] = {
    "empty stream": b"",
    "frame of no bytes": _frame(b""),
    "frame of 4 GiB": b"\xff\xff\xff\xff",
    "frame cut off": b"\x00\x00\x10\x00abc",
    "frame of text": _frame(b"hello there"),
    "frame of deep lists": _frame(b"\x81" * 1000 + b"\x01"),
    "frame of endless lists": _frame(b"\x9f" * 1000),
    "frame of a huge array": _frame(b"\x9b\x7f\xff\xff\xff\xff\xff\xff\xff"),
    "frame of tags": _frame(b"\xd8\x23\x62.*"),
    "frame of an unknown message": _frame(b"\xa1\x64type\x67Unknown"),
    "protobuf-like bytes": b"\x0a\xff\xff\xff\xff\x0f" + bytes(range(200)),
}
"""Sent on an authenticated stream of a protocol."""


@dataclass(frozen=True, slots=True)
class Garbage:
    """One kind: its name, its bytes, and whether it goes to the port itself or into a stream of each protocol."""

    name: str
    data: bytes
    raw: bool


KINDS = tuple(
    [Garbage(name, data, raw=True) for name, data in RAW.items()]
    + [Garbage(name, data, raw=False) for name, data in STREAM.items()]
)
assert len(KINDS) == 27, "the promise is 27 kinds"


async def throw(garbage: Garbage, victim: PeerRecord, attacker: Transport, *, patience_s: float) -> None:
    """Throw one kind at ``victim``: at its port, or by way of ``attacker`` at every protocol it may serve."""
    if garbage.raw:
        host, port = victim.addresses[0].split("/")[2:5:2]
        await _pour(await trio.open_tcp_stream(host, int(port)), garbage.data, patience_s)
        return
    for protocol in GOSSAMER_PROTOCOLS + FOREIGN_PROTOCOLS:
        await attacker.connect(victim)  # the victim may well have hung up on us, but it must be there
        try:
            stream = await attacker.open_stream(victim.peer, protocol)
        except GossamerError:
            continue
        await _pour(stream, garbage.data, patience_s)


async def _pour(stream: trio.abc.HalfCloseableStream, data: bytes, patience_s: float) -> None:
    """Send everything and the end, then read what comes back until the other side has had enough."""
    async with stream:
        try:
            with trio.move_on_after(patience_s):
                await stream.send_all(data)
                await stream.send_eof()
                while await stream.receive_some():
                    pass
        except (trio.BrokenResourceError, ProtocolUnsupported, OSError):
            pass
