"""Which protocols a node serves, and the tasks that serve them, on any kind of connection.

Owns the handlers, the cap on inbound streams per peer, the listener's part in the negotiation at the start of a
stream, and the fate of exceptions: this is the one place where every exception of a handler ends, at the price of its
stream.
"""

from __future__ import annotations

import logging
from collections import Counter

import trio

from p2p import multistream
from p2p.errors import GossamerError, ProtocolUnsupported
from p2p.flow import FlowStream
from p2p.limits import Limits
from p2p.transport import PeerId, ProtocolName, StreamHandler

_log = logging.getLogger(__name__)


class Protocols:
    """The handlers of one transport and the streams they are working on; tasks run in ``nursery``."""

    def __init__(self, limits: Limits, nursery: trio.Nursery) -> None:
        self._limits = limits
        self._nursery = nursery
        self._handlers: dict[ProtocolName, StreamHandler] = {}
        self._in_service: Counter[PeerId] = Counter()
        self.streams_refused = 0

    def serve(self, protocol: ProtocolName, handler: StreamHandler) -> None:
        """Answer inbound streams of ``protocol`` with ``handler``."""
        assert protocol not in self._handlers, f"{protocol} is served already"
        self._handlers[protocol] = handler

    def admit(self, peer: PeerId) -> bool:
        """Whether ``peer`` may have one more inbound stream; if so it must be passed to ``answer``."""
        if self._in_service[peer] >= self._limits.streams_per_peer_max:
            self.streams_refused += 1
            return False
        self._in_service[peer] += 1
        return True

    def answer(self, peer: PeerId, stream: FlowStream) -> None:
        """Serve an admitted inbound stream in a task of its own, which agrees on its protocol first."""
        self._nursery.start_soon(self._serve, peer, stream, None)

    def serves(self, protocol: ProtocolName) -> bool:
        """Whether streams of ``protocol`` are answered here."""
        return protocol in self._handlers

    def answer_agreed(self, peer: PeerId, stream: FlowStream, protocol: ProtocolName) -> None:
        """Serve an admitted inbound stream of a protocol that was named in advance and is served."""
        self._nursery.start_soon(self._serve, peer, stream, protocol)

    async def _serve(self, peer: PeerId, stream: FlowStream, protocol: ProtocolName | None) -> None:
        try:
            if protocol is None:
                with trio.fail_after(self._limits.stream_timeout_s):
                    protocol = await self._agree(stream)
            await self._handlers[protocol](peer, stream)
            stream.close()
        except (GossamerError, trio.BrokenResourceError, trio.TooSlowError) as error:
            _log.debug("a stream of %s for %s failed: %s", peer, protocol or "an unknown protocol", error)
        except Exception:
            _log.exception("the handler of %s failed on a stream of %s", protocol, peer)
        finally:
            stream.reset("the handler did not finish")
            self._in_service[peer] -= 1
            if not self._in_service[peer]:
                del self._in_service[peer]

    async def _agree(self, stream: FlowStream) -> ProtocolName:
        try:
            return await multistream.answer(stream, self._handlers)
        except ProtocolUnsupported:
            # The dialler has to hear of it, and many a multiplexer drops what was not read yet when a reset comes. So
            # what the dialler had sent ahead is let in, a window of it at most, until it has its answer and leaves.
            await stream.send_eof()
            left = self._limits.receive_window_bytes
            while left and (received := await stream.receive_some(left)):
                left -= len(received)
            stream.close()
            raise
