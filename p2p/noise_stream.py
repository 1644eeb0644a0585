"""An encrypted connection after its handshake: Noise transport messages over a socket.

Owns the framing of section 12 of the Noise specification as libp2p uses it: a 2-byte big-endian length, then
that many bytes of ciphertext. The handshake and the keys are somebody else's; this takes the two functions that
came out of it. Reading takes whatever the socket holds and opens every message in it, which is what makes it
several times cheaper than a read per length and a read per message. While a message is incomplete nothing can be done
with any of it, so the socket is told how much is missing (``awaiting``): on a home line a full message comes in 45
packets, and each would otherwise take the processor away from training.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import trio

LENGTH_BYTES = 2
TAG_BYTES = 16
PLAINTEXT_BYTES_MAX = (1 << 16) - 1 - TAG_BYTES
"""Plaintext of one message: 65,519 bytes."""
SOCKET_READ_BYTES = 256 << 10


class NoiseStream(trio.abc.Stream):
    """Bytes in the clear on this side, Noise messages on the other."""

    def __init__(
        self, socket: trio.abc.Stream, seal: Callable[[bytes], bytes], unseal: Callable[[bytes], bytes]
    ) -> None:
        self.awaiting: Callable[[int], None] | None = None
        """Called before a read that is of no use until so many bytes are there."""
        self._socket = socket
        self._seal = seal
        self._unseal = unseal
        self._ciphertext = bytearray()
        self._plaintext: deque[bytes] = deque()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt and send ``data`` in as few messages as fit. A cancelled call leaves the stream unusable."""
        messages = []
        for at in range(0, len(data), PLAINTEXT_BYTES_MAX):
            sealed = self._seal(bytes(data[at : at + PLAINTEXT_BYTES_MAX]))
            messages += [len(sealed).to_bytes(LENGTH_BYTES, "big"), sealed]
        await self._socket.send_all(b"".join(messages))

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the socket takes data."""
        await self._socket.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """The plaintext of the next message that is not empty, or ``b""`` at the end of the connection."""
        while not self._plaintext:
            if self.awaiting is not None:
                self.awaiting(self._missing())
            received = await self._socket.receive_some(SOCKET_READ_BYTES)
            if not received:
                if self._ciphertext:
                    raise trio.BrokenResourceError("the connection ended inside a message")
                return b""
            self._ciphertext += received
            self._open_messages()
        message = self._plaintext.popleft()
        if max_bytes is not None and len(message) > max_bytes:
            self._plaintext.appendleft(message[max_bytes:])
            message = message[:max_bytes]
        return message

    def _missing(self) -> int:
        """Bytes until the message that has begun is complete, or of its length."""
        if len(self._ciphertext) < LENGTH_BYTES:
            return LENGTH_BYTES - len(self._ciphertext)
        length = int.from_bytes(self._ciphertext[:LENGTH_BYTES], "big")
        return LENGTH_BYTES + length - len(self._ciphertext)

    def _open_messages(self) -> None:
        at = 0
        with memoryview(self._ciphertext) as data:
            while len(data) - at >= LENGTH_BYTES:
                end = at + LENGTH_BYTES + int.from_bytes(data[at : at + LENGTH_BYTES], "big")
                if end > len(data):
                    break
                try:
                    message = self._unseal(bytes(data[at + LENGTH_BYTES : end]))
                except Exception as error:  # whatever the cipher raises, the bytes are not the peer's
                    raise trio.BrokenResourceError("a message that does not decrypt") from error
                if message:
                    self._plaintext.append(message)
                at = end
        del self._ciphertext[:at]

    async def aclose(self) -> None:
        """Close the socket."""
        await self._socket.aclose()
