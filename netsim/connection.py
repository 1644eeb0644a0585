"""A connection of the simulated network: two ends that carry frames to each other, and the streams on them.

Owns the frames, the order in which they arrive, and what each does to a stream at the other end. Streams are the very
``p2p.flow.FlowStream`` of the real network, so flow control, time limits and errors are not imitated but shared.
A protocol is proposed in the frame that opens a stream, and what is sent on it follows at once, as on the real network.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from enum import IntEnum
from typing import TYPE_CHECKING

from netsim.links import FRAME_OVERHEAD_BYTES, LinkModel
from p2p.flow import FlowStream
from p2p.transport import PeerId, ProtocolName

if TYPE_CHECKING:
    from netsim.network import SimHost


class Frame(IntEnum):
    """What a frame does at the end it arrives at."""

    OPEN = 0
    AGREED = 1
    REFUSED = 2
    DATA = 3
    CREDIT = 4
    EOF = 5
    RESET = 6
    CLOSE = 7
    BREAK = 8


class Side:
    """One end of a connection. Implements FrameSink by carrying frames to the other end."""

    def __init__(self, host: SimHost, peer: PeerId, link: LinkModel, *, outbound: bool) -> None:
        self.host = host
        self.peer = peer
        self.link = link
        """Of frames that leave here."""
        self.streams: dict[int, FlowStream] = {}
        self.over = False
        self.dialled: str | None = None
        """At which address of the peer, if from here."""
        self.other: Side = self
        """The far end; ``join`` names it."""
        self._network = host.network
        self._ids = itertools.count(1 if outbound else 2, 2)
        self._last_due_s = self._free_s = 0.0
        self._held: deque[tuple[Frame, int, bytes]] = deque()
        """What waits behind a partition."""

    def join(self, other: Side) -> None:
        """Make ``other`` the far end."""
        self.other = other

    # --- carrying ---------------------------------------------------------------------------------------------

    def carry(self, kind: Frame, stream_id: int, payload: bytes = b"") -> None:
        """Send a frame to the other end: over our line up, the way between, and its line down. Order is kept."""
        network = self._network
        if self._held or (network.cuts.active and network.cuts.blocks(self.host.local.peer, self.peer)):
            self._held.append((kind, stream_id, payload))
            return
        up = self.host.lines.up
        if up.free:
            self._travel(kind, stream_id, payload)
        else:
            up.carry(self, len(payload), self._travel, kind, stream_id, payload)

    def release(self) -> None:
        """A partition is healed: what waited for it leaves now, unless another one holds it."""
        if self._held and not self._network.cuts.blocks(self.host.local.peer, self.peer):
            held, self._held = self._held, deque()
            for frame in held:
                self.carry(*frame)

    def _travel(self, kind: Frame, stream_id: int, payload: bytes) -> None:
        network, link = self._network, self.link
        self.host.meter.bytes_sent += len(payload) + FRAME_OVERHEAD_BYTES
        sent_s = network.clock.current_time()
        if link.bytes_per_s != math.inf:
            sent_s = max(sent_s, self._free_s) + (len(payload) + FRAME_OVERHEAD_BYTES) / link.bytes_per_s
            self._free_s = sent_s
        due_s = sent_s + link.latency_s
        if link.jitter_s:
            due_s += network.rng.random() * link.jitter_s
        self._last_due_s = due_s = max(due_s, self._last_due_s)
        down = self.other.host.lines.down
        if down.free:
            network.clock.at(due_s, self.other.land, kind, stream_id, payload)
        else:
            other = self.other
            network.clock.at(due_s, down.carry, self, len(payload), other.land, kind, stream_id, payload)

    def land(self, kind: Frame, stream_id: int, payload: bytes) -> None:
        """A frame is here."""
        if self.over:
            return
        network = self._network
        network.deliveries += 1
        self.host.meter.bytes_received += len(payload) + FRAME_OVERHEAD_BYTES
        if network.trace is not None:
            network.trace.delivered(
                network.clock.current_time(),
                self.other.host.number,
                self.host.number,
                kind,
                stream_id,
                payload,
            )
        match kind:
            case Frame.DATA:
                self._land_data(stream_id, payload)
            case Frame.OPEN:
                self._answer(stream_id, ProtocolName(payload.decode()))
            case Frame.AGREED:
                if stream := self.streams.get(stream_id):
                    stream.agree()
            case Frame.REFUSED:
                if stream := self.streams.get(stream_id):
                    stream.refuse("the other side does not speak this protocol")
            case Frame.CREDIT:
                if stream := self.streams.get(stream_id):
                    stream.add_credit(int.from_bytes(payload, "big"))
            case Frame.EOF:
                if stream := self.streams.get(stream_id):
                    stream.deliver_eof()
            case Frame.RESET:
                if stream := self.streams.pop(stream_id, None):
                    stream.break_off("the peer reset the stream")
            case Frame.CLOSE:
                self.lose("the peer closed the connection", broken=False)
            case Frame.BREAK:
                self.lose("the connection broke")

    def _land_data(self, stream_id: int, payload: bytes) -> None:
        self._network.messages += 1
        stream = self.streams.get(stream_id)
        if stream is None:
            self.carry(Frame.RESET, stream_id)
        elif stream.accept_bytes(len(payload)):
            stream.deliver(payload)
        else:
            self.close("the peer sent past its receive window", broken=True)

    # --- streams ----------------------------------------------------------------------------------------------

    def open_stream(self, protocol: ProtocolName) -> FlowStream:
        """A stream whose protocol is proposed to the other end."""
        stream = self._new_stream(next(self._ids))
        stream.propose()
        self.carry(Frame.OPEN, stream.stream_id, protocol.encode())
        return stream

    def _answer(self, stream_id: int, protocol: ProtocolName) -> None:
        protocols = self.host.protocols
        if not protocols.serves(protocol):
            self.carry(Frame.REFUSED, stream_id)
        elif not protocols.admit(self.peer):
            self.carry(Frame.RESET, stream_id)
        else:
            self.carry(Frame.AGREED, stream_id)
            protocols.answer_agreed(self.peer, self._new_stream(stream_id), protocol)

    def _new_stream(self, stream_id: int) -> FlowStream:
        limits = self._network.limits
        stream = self.streams[stream_id] = FlowStream(
            self,
            stream_id,
            credit=limits.receive_window_bytes,
            window_bytes=limits.receive_window_bytes,
            timeout_s=limits.stream_timeout_s,
        )
        return stream

    # --- ending -----------------------------------------------------------------------------------------------

    def close(self, reason: str, *, broken: bool = False) -> None:
        """End the connection here for ``reason``; the other end learns of it once the frames before it are there.

        ``broken``: not on purpose, but because the program is gone or the other one is at fault.
        """
        self.carry(Frame.BREAK if broken else Frame.CLOSE, 0)
        if self._held:  # It will never be let through: the far end finds out by itself.
            self._network.after(
                self._network.limits.peer_silence_s, self.other.lose, "the connection fell silent"
            )
        self.lose(reason, broken=False)

    def lose(self, reason: str, *, broken: bool = True) -> None:
        """The connection is over at this end."""
        if self.over:
            return
        self.over = True
        for stream in self.streams.values():
            stream.break_off(reason)
        self.streams.clear()
        self.host.forget(self, reason, broken=broken)

    # --- FrameSink --------------------------------------------------------------------------------------------

    @property
    def sendable(self) -> bool:
        """Always: credits bound what is under way."""
        return True

    async def wait_sendable(self) -> None:
        """Wait for nothing: credits bound what is under way."""

    def send_data(self, stream: FlowStream, payload: memoryview) -> None:
        """Carry bytes; landing outside of the window ends the connection."""
        self.carry(Frame.DATA, stream.stream_id, bytes(payload))

    def send_credit(self, stream: FlowStream, count: int) -> None:
        """Carry credit."""
        self.carry(Frame.CREDIT, stream.stream_id, count.to_bytes(8, "big"))

    def send_eof(self, stream: FlowStream) -> None:
        """Carry the end of one direction."""
        self.carry(Frame.EOF, stream.stream_id)

    def send_reset(self, stream: FlowStream) -> None:
        """Carry the end of both."""
        self.carry(Frame.RESET, stream.stream_id)

    def forget(self, stream: FlowStream) -> None:
        """Frames for this stream are discarded from now on."""
        self.streams.pop(stream.stream_id, None)
