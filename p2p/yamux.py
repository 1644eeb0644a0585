"""Many streams over one connection: the yamux multiplexer, with its flow control enforced.

Owns the framing of yamux 1.0.0 (https://github.com/hashicorp/yamux/blob/master/spec.md) as libp2p uses it, the
one writer and the one reader of a connection, and the checks on what the other side may send. It works over any
``trio.abc.Stream`` and knows nothing of peers or protocols.

Wire-compatible with every libp2p; written here because the installed library's session only logs a peer that
ignores its receive window, gives up on a closed window after five seconds, and answers every read with a frame.

Bounds: unread bytes per stream (the receive window), inbound streams (``admit``), data frames waiting for the
socket (``DATA_FRAMES_QUEUED``), control frames waiting for it (``CONTROL_FRAMES_MAX``), silence (``silence_s``).
"""

from __future__ import annotations

import logging
import struct
from collections import deque
from collections.abc import Callable
from typing import Final

import trio

from p2p.flow import FRAME_PAYLOAD_BYTES, FlowStream
from p2p.limits import Limits

DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
HEADER: Final = struct.Struct(">BBHII")  # version, type, flags, stream id, length
INITIAL_WINDOW_BYTES = 256 << 10
"""What the protocol grants on every new stream; more is granted with the opening frame."""

DATA_FRAMES_QUEUED = 8
"""Data frames that wait for the socket; a stream that wants to send more waits its turn."""
WRITE_BYTES = 4 * (HEADER.size + FRAME_PAYLOAD_BYTES)
"""Frames that go to the socket together: full ones fill whole encrypted messages, small ones share one."""
CONTROL_FRAMES_MAX = 1024
"""Frames we owe the other side; one that asks for more without reading them is cut off."""
FLUSH_TIMEOUT_S = 1.0
"""How long a polite close waits for queued frames to leave."""
SILENT_INTERVALS_MAX = 4
"""After so many in a row without a byte a peer is given up. From the first on it is asked for a sign of life."""

GO_AWAY_NORMAL = 0

_log = logging.getLogger(__name__)


class Session:
    """One multiplexed connection. ``run`` it in a nursery; when it returns the connection is over.

    ``admit`` is asked before each inbound stream; a refused stream is reset and counted in ``streams_refused``.
    Implements FrameSink for its streams.
    """

    def __init__(
        self,
        carrier: trio.abc.Stream,
        *,
        initiator: bool,
        limits: Limits,
        admit: Callable[[], bool],
    ) -> None:
        assert limits.receive_window_bytes >= INITIAL_WINDOW_BYTES, "the protocol grants 256 KiB unasked"
        self._carrier = carrier
        self._limits = limits
        self._admit = admit
        self._next_id = 1 if initiator else 2
        self._streams: dict[int, FlowStream] = {}
        self._accepted_send, self._accepted = trio.open_memory_channel[FlowStream](
            limits.streams_per_peer_max
        )

        self._outbox: deque[bytes] = deque()
        self._control_frames = 0
        self._data_frames = 0
        self._writing = False
        self._outbox_filled = trio.lowlevel.ParkingLot()
        self._outbox_drained = trio.lowlevel.ParkingLot()

        self._heard = True
        self._scope = trio.CancelScope()
        self.reason = ""
        """Why the connection ended, for people; empty while it lives."""
        self.broken = False
        """Whether it ended without either side closing it on purpose."""
        self.closed = trio.Event()
        self.streams_refused = 0

    @property
    def streams_open(self) -> int:
        """Streams in either direction that were not closed here yet."""
        return len(self._streams)

    async def run(self) -> None:
        """Move frames until the connection ends; never raises but for cancellation."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write_frames)
                    nursery.start_soon(self._read_frames)
                    nursery.start_soon(self._watch_silence)
        finally:
            self.end("this node closed the connection")
            self._accepted_send.close()
            self.closed.set()
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(self._carrier)

    def end(self, reason: str, *, broken: bool = False) -> None:
        """End the connection now. The first reason given is the one kept."""
        if not self.reason:
            self.reason, self.broken = reason, broken
        self._scope.cancel()
        for stream in self._streams.values():
            stream.break_off(self.reason)
        self._streams.clear()
        self._outbox_drained.unpark_all()

    async def aclose(self, reason: str) -> None:
        """End the connection politely: queued frames leave first, for at most FLUSH_TIMEOUT_S."""
        if not self.reason:
            self.reason = reason
            self._queue_control(GO_AWAY, 0, 0, GO_AWAY_NORMAL)
            with trio.move_on_after(FLUSH_TIMEOUT_S):
                while (self._outbox or self._writing) and not self.closed.is_set():
                    await self._outbox_drained.park()
        self.end(reason)

    async def open_stream(self) -> FlowStream:
        """A new stream; usable at once. Raises BrokenResourceError when the connection is over."""
        await trio.lowlevel.checkpoint()
        if self.reason:
            raise trio.BrokenResourceError(self.reason)
        stream = self._new_stream(self._next_id, credit=INITIAL_WINDOW_BYTES)
        self._next_id += 2
        self._queue_control(WINDOW_UPDATE, SYN, stream.stream_id, self._extra_window)
        return stream

    async def accept_stream(self) -> FlowStream:
        """The next stream the other side opened. Raises EndOfChannel when the connection is over."""
        return await self._accepted.receive()

    # --- FrameSink --------------------------------------------------------------------------------------------

    @property
    def sendable(self) -> bool:
        """Whether one more data frame may be queued now."""
        return self._data_frames < DATA_FRAMES_QUEUED and not self.reason

    async def wait_sendable(self) -> None:
        """Wait for one of the few places before the socket; streams take turns."""
        while self._data_frames >= DATA_FRAMES_QUEUED and not self.reason:
            await self._outbox_drained.park()

    def send_data(self, stream: FlowStream, payload: memoryview) -> None:
        """Queue one data frame."""
        self._data_frames += 1
        self._outbox.append(HEADER.pack(0, DATA, 0, stream.stream_id, len(payload)) + payload)
        self._outbox_filled.unpark()

    def send_credit(self, stream: FlowStream, count: int) -> None:
        """Queue a window update."""
        self._queue_control(WINDOW_UPDATE, 0, stream.stream_id, count)

    def send_eof(self, stream: FlowStream) -> None:
        """Queue a FIN, behind the stream's data."""
        self._queue_control(WINDOW_UPDATE, FIN, stream.stream_id, 0)

    def send_reset(self, stream: FlowStream) -> None:
        """Queue a RST."""
        self._queue_control(WINDOW_UPDATE, RST, stream.stream_id, 0)

    def forget(self, stream: FlowStream) -> None:
        """Frames for this stream are discarded from now on."""
        self._streams.pop(stream.stream_id, None)

    # --- the three tasks --------------------------------------------------------------------------------------

    async def _write_frames(self) -> None:
        while True:
            while not self._outbox:
                await self._outbox_filled.park()
            batch = [self._outbox.popleft()]
            size = len(batch[0])
            while self._outbox and size + len(self._outbox[0]) <= WRITE_BYTES:
                batch.append(self._outbox.popleft())
                size += len(batch[-1])
            data_frames = sum(frame[1] == DATA for frame in batch)
            self._data_frames -= data_frames
            self._control_frames -= len(batch) - data_frames
            self._writing = True
            try:
                await self._carrier.send_all(b"".join(batch))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return self.end("the connection broke", broken=True)
            self._writing = False
            self._outbox_drained.unpark_all()

    async def _watch_silence(self) -> None:
        # Counting intervals instead of comparing clocks: when this very process was stopped for a minute, the
        # peer must not be blamed for the silence.
        silent_intervals = 0
        while silent_intervals < SILENT_INTERVALS_MAX:
            if not self._heard:
                self._queue_control(PING, SYN, 0, 0)
            self._heard = False
            # One interval more, so that the silence is over in time wherever in one it began.
            await trio.sleep(self._limits.peer_silence_s / (SILENT_INTERVALS_MAX + 1))
            silent_intervals = 0 if self._heard else silent_intervals + 1
        self.end(f"no sign of life for {self._limits.peer_silence_s:g} s", broken=True)

    async def _read_frames(self) -> None:
        header = b""  # the beginning of a header that was cut by the end of a message
        payload_left = 0
        flags = 0
        stream: FlowStream | None = None
        while True:
            try:
                received = await self._carrier.receive_some()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return self.end("the connection broke", broken=True)
            if not received:
                return self.end("the peer closed the connection", broken=True)  # A polite one says so first.
            self._heard = True
            data = memoryview(header + received if header else received)
            at = 0
            while at < len(data):
                if payload_left:
                    taken = min(payload_left, len(data) - at)
                    if stream is not None:
                        stream.deliver(bytes(data[at : at + taken]))
                    at += taken
                    payload_left -= taken
                    if payload_left:
                        break
                    self._end_frame(stream, flags)
                    continue
                if len(data) - at < HEADER.size:
                    break
                version, kind, flags, stream_id, length = HEADER.unpack_from(data, at)
                at += HEADER.size
                if version != 0 or kind > GO_AWAY:
                    return self._offend("the peer does not speak yamux")
                if kind == PING:
                    if flags & SYN:
                        self._queue_control(PING, ACK, 0, length)
                    continue
                if kind == GO_AWAY:
                    return self.end("the peer closed the connection")
                stream = self._open_inbound(stream_id) if flags & SYN else self._streams.get(stream_id)
                if kind == WINDOW_UPDATE:
                    if stream is not None:
                        stream.add_credit(length)
                    self._end_frame(stream, flags)
                    continue
                if stream is None:
                    # Closed here while the data was under way; tell the sender to stop.
                    self._queue_control(WINDOW_UPDATE, RST, stream_id, 0)
                if length > self._limits.receive_window_bytes or (
                    stream is not None and not stream.accept_bytes(length)
                ):
                    return self._offend("the peer sent past its receive window")
                payload_left = length
                if not length:
                    self._end_frame(stream, flags)
            header = bytes(data[at:])

    # --- parts ------------------------------------------------------------------------------------------------

    @property
    def _extra_window(self) -> int:
        return self._limits.receive_window_bytes - INITIAL_WINDOW_BYTES

    def _new_stream(self, stream_id: int, *, credit: int) -> FlowStream:
        stream = FlowStream(
            self,
            stream_id,
            credit=credit,
            window_bytes=self._limits.receive_window_bytes,
            timeout_s=self._limits.stream_timeout_s,
        )
        self._streams[stream_id] = stream
        return stream

    def _open_inbound(self, stream_id: int) -> FlowStream | None:
        ours = stream_id % 2 == self._next_id % 2
        if ours or stream_id in self._streams:
            self._offend("the peer opened a stream under a number that is taken")
            return None
        if not self._admit():
            self.streams_refused += 1
            self._queue_control(WINDOW_UPDATE, RST, stream_id, 0)
            return None
        stream = self._new_stream(stream_id, credit=INITIAL_WINDOW_BYTES)
        try:
            self._accepted_send.send_nowait(stream)
        except trio.WouldBlock:
            stream.reset("opened faster than it can be served")
            self.streams_refused += 1
            return None
        self._queue_control(WINDOW_UPDATE, ACK, stream_id, self._extra_window)
        return stream

    def _end_frame(self, stream: FlowStream | None, flags: int) -> None:
        if stream is None:
            return
        if flags & RST:
            self.forget(stream)
            stream.break_off("the peer reset the stream")
        elif flags & FIN:
            stream.deliver_eof()

    def _queue_control(self, kind: int, flags: int, stream_id: int, value: int) -> None:
        self._control_frames += 1
        if self._control_frames > CONTROL_FRAMES_MAX:
            return self.end("the peer asks for more than it reads")
        self._outbox.append(HEADER.pack(0, kind, flags, stream_id, value))
        self._outbox_filled.unpark()

    def _offend(self, reason: str) -> None:
        _log.info("dropping a connection: %s", reason)
        self.end(reason)
