"""Counts the bytes that pass a socket, whatever they are for: what a line is charged with, handshakes included.

Owns two running totals for a transport and the thin stream that adds to them. Never looks at a byte.
"""

from __future__ import annotations

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

    async def aclose(self) -> None:
        """As of the stream."""
        await self._stream.aclose()
