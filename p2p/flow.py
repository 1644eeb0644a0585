"""One byte stream with credit-based flow control, the same in the real and in the simulated network.

Owns what a stream is once frames can be exchanged: its unread bytes, its credits in both directions, its ends
and its failures, under trio's rules for a HalfCloseableStream. It never touches a socket or a clock: frames
leave through a ``FrameSink`` (a yamux session, or netsim's network) and arrive through ``deliver_*``.

Whoever opens a stream may send at once, before the other side has agreed to its protocol: the first read waits for
that. A refusal is more than a broken stream, and raises ProtocolUnsupported from then on. Never knows how the two
sides agree: ``propose`` is given an ear for it.

Flow control is that of yamux: each side may send as many bytes as it holds credit for, and gets credit back as
the other side's reader consumes. Receiving more than was granted is an offence that costs the connection.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

import trio

from p2p.errors import MalformedMessage, ProtocolUnsupported
from p2p.patience import renew

FRAME_PAYLOAD_BYTES = 65_507
"""Payload bytes of a full frame: with the 12-byte yamux header it fills one Noise message exactly (65,519)."""


class FrameSink(Protocol):
    """Where a stream's frames go. All but ``wait_sendable`` return at once and keep the order of calls."""

    @property
    def sendable(self) -> bool:
        """Whether one more data frame may be queued now."""

    async def wait_sendable(self) -> None:
        """Wait until one more data frame may be queued; it is queued before the next checkpoint, or never."""

    def send_data(self, stream: FlowStream, payload: memoryview) -> None:
        """Queue one data frame, after ``wait_sendable``. ``payload`` is the caller's: copy it."""

    def send_credit(self, stream: FlowStream, count: int) -> None:
        """Allow the other side ``count`` more bytes."""

    def send_eof(self, stream: FlowStream) -> None:
        """Tell the other side that no more bytes follow."""

    def send_reset(self, stream: FlowStream) -> None:
        """Tell the other side that the stream is dead in both directions."""

    def forget(self, stream: FlowStream) -> None:
        """Drop the stream: nothing is delivered to it any more."""


class FlowStream(trio.abc.HalfCloseableStream):
    """A bounded, ordered byte stream. Errors are trio's: Closed (here), Broken (there), Busy (two callers).

    And ProtocolUnsupported, where this side has proposed a protocol that the other one does not speak.
    """

    def __init__(
        self,
        sink: FrameSink,
        stream_id: int,
        *,
        credit: int,
        window_bytes: int,
        timeout_s: float,
    ) -> None:
        """``credit`` bytes may be sent at once; ``window_bytes`` is what the other side was granted."""
        self.stream_id = stream_id
        self._sink = sink
        self._timeout_s = timeout_s

        self._credit = credit
        self._sending = False
        self._eof_sent = False
        self._writable = trio.lowlevel.ParkingLot()

        self._window_bytes = window_bytes
        self._granted = window_bytes  # bytes the other side may still send
        self._consumed = 0  # bytes read here that were not granted again yet
        self._unread: deque[bytes] = deque()
        self._receiving = False
        self._eof_received = False
        self._readable = trio.lowlevel.ParkingLot()

        self.agreed = True
        """Whether both sides know what is spoken here; not yet, where this one has proposed it."""
        self._hear: Callable[[bytes], bytes | None] | None = None
        self._settled = trio.lowlevel.ParkingLot()

        self._closed = False
        self._broken = ""
        self._broken_as: type[Exception] = trio.BrokenResourceError

    # --- agreeing on a protocol -------------------------------------------------------------------------------

    def propose(self, hear: Callable[[bytes], bytes | None] | None = None) -> None:
        """Let nothing be read before the other side has agreed to what this one proposes.

        ``hear`` is given what arrives, and returns what follows the agreement, None where that is not complete; it
        raises ProtocolUnsupported or MalformedMessage. Without it the sink calls ``agree`` or ``refuse``.
        """
        self.agreed = False
        self._hear = hear

    async def wait_agreed(self) -> None:
        """Wait for the agreement, ``timeout_s`` seconds at most; the first read does so by itself."""
        with trio.move_on_after(self._timeout_s) as patience:
            while not self.agreed:
                self._check_open()
                await self._settled.park()
        if patience.cancelled_caught:
            self.reset(f"the peer did not answer within {self._timeout_s:g} s")
            self._check_open()

    def agree(self) -> None:
        """The other side speaks the protocol."""
        self.agreed = True
        self._settled.unpark_all()

    def refuse(self, reason: str) -> None:
        """The other side does not speak the protocol."""
        self._broken_as = ProtocolUnsupported
        self.reset(reason)

    def _after_answer(self, payload: bytes) -> bytes:
        """What of ``payload`` comes after the agreement."""
        rest = None
        if self._hear is not None and not self._broken:  # The rest of a frame may follow a refusal.
            try:
                rest = self._hear(payload)
            except ProtocolUnsupported as refusal:
                self.refuse(refusal.what)
            except MalformedMessage as error:
                self.reset(f"the peer's answer is none: {error.what}")
        if rest is None:
            return b""
        self.agree()
        return rest

    # --- sending ----------------------------------------------------------------------------------------------

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send ``data``; breaks the stream when no byte of it can be sent for ``timeout_s`` seconds."""
        with _Exclusive(self, "_sending", "another task is sending"):
            self._check_open()
            if self._eof_sent:
                raise trio.ClosedResourceError("the end of the stream was already sent")
            await trio.lowlevel.checkpoint()
            view = memoryview(data)
            with trio.move_on_after(self._timeout_s) as patience:
                while view:
                    await self._wait_credit()
                    await self._sink.wait_sendable()
                    self._check_open()
                    size = min(len(view), self._credit, FRAME_PAYLOAD_BYTES)
                    self._send_frame(view[:size])
                    view = view[size:]
                    renew(patience, self._timeout_s)
            if patience.cancelled_caught:
                self.reset(f"the peer took no data for {self._timeout_s:g} s")
                self._check_open()

    def send_now(self, data: bytes) -> bool:
        """Send ``data`` if that needs no waiting, and say whether it did; not a checkpoint. Raises as ``send_all``."""
        self._check_open()
        if self._eof_sent:
            raise trio.ClosedResourceError("the end of the stream was already sent")
        must_wait = self._sending or len(data) > self._credit or not self._sink.sendable
        if must_wait or len(data) > FRAME_PAYLOAD_BYTES:
            return False
        self._send_frame(memoryview(data))
        return True

    def _send_frame(self, payload: memoryview) -> None:
        self._credit -= len(payload)
        self._sink.send_data(self, payload)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until there is credit."""
        with _Exclusive(self, "_sending", "another task is sending"):
            self._check_open()
            await trio.lowlevel.checkpoint()
            await self._wait_credit()

    async def send_eof(self) -> None:
        """Say that nothing follows; the other direction stays open."""
        with _Exclusive(self, "_sending", "another task is sending"):
            self._check_open(broken=False)
            await trio.lowlevel.checkpoint()
            if not self._eof_sent and not self._broken:
                self._eof_sent = True
                self._sink.send_eof(self)

    async def _wait_credit(self) -> None:
        self._check_open()
        while self._credit <= 0:
            await self._writable.park()
            self._check_open()

    # --- receiving --------------------------------------------------------------------------------------------

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """At least one byte, at most ``max_bytes``; ``b""`` once the other side has sent its end.

        The first waits until the other side has agreed to the protocol.
        """
        if max_bytes is not None:
            if not isinstance(max_bytes, int):
                raise TypeError("max_bytes must be an integer or None")
            if max_bytes < 1:
                raise ValueError("max_bytes must be at least 1")
        with _Exclusive(self, "_receiving", "another task is receiving"):
            self._check_open(broken=False)
            if not self.agreed:
                await self.wait_agreed()
            if self._unread or self._eof_received:
                await trio.lowlevel.checkpoint()  # Otherwise parking is one.
            while not self._unread:
                if self._eof_received:
                    return b""
                self._check_open()
                await self._readable.park()
                self._check_open(broken=False)
            return self._take(max_bytes)

    def receive_now(self, max_bytes: int) -> bytes:
        """At most ``max_bytes`` of what is there already, or ``b""``; not a checkpoint. Raises as ``receive_some``."""
        self._check_open(broken=False)
        return self._take(max_bytes) if self._unread and not self._receiving else b""

    def _take(self, max_bytes: int | None) -> bytes:
        chunk = self._unread.popleft()
        if max_bytes is not None and len(chunk) > max_bytes:
            self._unread.appendleft(chunk[max_bytes:])
            chunk = chunk[:max_bytes]
        self._grant_again(len(chunk))
        return chunk

    def _grant_again(self, count: int) -> None:
        # Half a window at a time: one small frame for every 512 KiB instead of one for every read.
        self._consumed += count
        if self._consumed * 2 >= self._window_bytes and not (self._eof_received or self._broken):
            self._granted += self._consumed
            self._sink.send_credit(self, self._consumed)
            self._consumed = 0

    # --- ending -----------------------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """``close``, and a checkpoint."""
        self.close()
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        """Close both directions: what was sent still arrives; what the other side still sends is discarded."""
        if not self._closed:
            self._closed = True
            if not self._broken:
                if not self._eof_sent:
                    self._eof_sent = True
                    self._sink.send_eof(self)
                if not self._eof_received:
                    # After the end of our bytes, so it only stops the other side's sending, at once.
                    self._sink.send_reset(self)
                self._sink.forget(self)
            self._unread.clear()
            self._wake()

    def reset(self, reason: str) -> None:
        """Kill both directions at once, here and at the other side; a no-op on a stream that has ended."""
        if not (self._closed or self._broken):
            self._sink.send_reset(self)
            self._sink.forget(self)
            self._unread.clear()
            self.break_off(reason)

    def break_off(self, reason: str) -> None:
        """The connection is gone, or the other side has reset the stream; what arrived before can be read."""
        self._broken = reason
        self._wake()

    # --- what arrives -----------------------------------------------------------------------------------------

    def accept_bytes(self, count: int) -> bool:
        """Account for ``count`` bytes announced by the other side; False when that exceeds what was granted."""
        self._granted -= count
        return self._granted >= 0

    def deliver(self, payload: bytes) -> None:
        """Bytes arrived; they were accounted for before."""
        if not self.agreed:
            payload = self._after_answer(payload)
        if payload and not self._eof_received:
            self._unread.append(payload)
            if self._receiving:
                self._readable.unpark_all()

    def deliver_eof(self) -> None:
        """The other side will send nothing more."""
        if not self.agreed:
            return self.reset("the peer ended the stream without an answer")
        self._eof_received = True
        if self._receiving:
            self._readable.unpark_all()

    def add_credit(self, count: int) -> None:
        """The other side allows ``count`` more bytes."""
        self._credit += count
        if self._sending:
            self._writable.unpark_all()

    def _wake(self) -> None:
        self._settled.unpark_all()
        if self._receiving:
            self._readable.unpark_all()
        if self._sending:
            self._writable.unpark_all()

    def _check_open(self, *, broken: bool = True) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed")
        if broken and self._broken:
            raise self._broken_as(self._broken)


class _Exclusive:
    """One task at a time in each direction, as trio's stream contract asks: the second gets BusyResourceError."""

    __slots__ = ("_flag", "_message", "_stream")

    def __init__(self, stream: FlowStream, flag: str, message: str) -> None:
        self._stream = stream
        self._flag = flag
        self._message = message

    def __enter__(self) -> None:
        if getattr(self._stream, self._flag):
            raise trio.BusyResourceError(self._message)
        setattr(self._stream, self._flag, True)

    def __exit__(self, *_: object) -> None:
        setattr(self._stream, self._flag, False)
