"""Counts the bytes that pass a socket, whatever they are for: what a line is charged with, handshakes included.

Owns two running totals for a transport and the thin stream that adds to them. Never looks at a byte. It also passes on
to a socket how many bytes are worth waking up for.
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass

import trio


@dataclass(slots=True)
class Meter:
    """Running totals over all connections of a transport, in bytes."""

    bytes_sent: int = 0
    bytes_received: int = 0


class MeteredStream(trio.abc.Stream):
    """``stream``, with ``meter`` counting along."""

    def __init__(self, stream: trio.abc.Stream, meter: Meter) -> None:
        self._stream = stream
        self._meter = meter
        self._awaited = 1

    async def send_all(self, data: bytes | memoryview) -> None:
        """As of the stream; what could not be sent whole is counted whole."""
        self._meter.bytes_sent += len(data)
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """As of the stream."""
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """As of the stream."""
        data = await self._stream.receive_some(max_bytes)
        self._meter.bytes_received += len(data)
        return data

    def await_bytes(self, count: int) -> None:
        """Have the next read of a socket wait for ``count`` bytes, at least one, or for the end of the connection.

        A hint, which other streams and some systems have no use for.
        """
        if count == self._awaited or not isinstance(self._stream, trio.SocketStream):
            return
        self._awaited = count
        if hasattr(socket, "SO_RCVLOWAT"):
            with contextlib.suppress(OSError):  # Closed, or a system that has the name and not the thing.
                self._stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)

    async def aclose(self) -> None:
        """As of the stream."""
        await self._stream.aclose()
