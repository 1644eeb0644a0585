"""A relay: carries connections to peers that cannot be dialled, who have asked it to (circuit relay v2, "hop").

Owns the reservations, the circuits and what each may cost. Whom it carries it never learns more of than two peer ids:
a circuit is encrypted from end to end, inside of it. It never dials, so only who is connected can be reached.

Bounds, all in ``Limits``: reservations and how long they hold, circuits in all and per peer, bytes and seconds of each
circuit; and one rate for everything that is carried. A reservation ends with its connection, or with the stream it was
made on, where that stays open: so it is no idle connection on either side.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio

from p2p.circuit_messages import (
    HOP_PROTOCOL,
    STOP_PROTOCOL,
    HopMessage,
    Limit,
    Reservation,
    Status,
    StopMessage,
    named_peer,
    naming,
    receive,
    send,
    status_name,
)
from p2p.errors import GossamerError, MalformedMessage, StreamBroken, TransportError
from p2p.flow import FlowStream
from p2p.limits import Limits
from p2p.pacer import Pacer
from p2p.transport import PeerId, Transport

COPY_BYTES_MAX = 64 << 10

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayTerms:
    """What this peer does for those that cannot be dialled."""

    bytes_per_s_max: float
    """Of all that is carried, each byte counted once."""
    wall_time_s: Callable[[], float]
    """By which a reservation is told when it expires."""


class Relay:
    """The relay of one transport."""

    def __init__(self, transport: Transport, terms: RelayTerms, *, limits: Limits) -> None:
        self.offered = False
        """Whether reservations are given at all: only where others can dial this peer."""
        self.bytes_carried = 0
        self._transport = transport
        self._limits = limits
        self._pacer = Pacer(terms.bytes_per_s_max)
        self._wall_time_s = terms.wall_time_s
        self._reserved_until_s: dict[PeerId, float] = {}
        self._circuits: Counter[PeerId] = Counter()
        """Of each peer, at either end."""

    @property
    def circuits(self) -> int:
        """How many are carried right now."""
        return self._circuits.total() // 2

    def reserved(self) -> list[PeerId]:
        """Who holds a reservation and is connected."""
        now_s, connected = trio.current_time(), self._transport.peers()
        return [
            peer for peer, until_s in self._reserved_until_s.items() if now_s < until_s and peer in connected
        ]

    def serve(self) -> None:
        """Answer whoever asks for a reservation or a circuit."""
        self._transport.serve(HOP_PROTOCOL, self._answer)

    async def _answer(self, peer: PeerId, stream: FlowStream) -> None:
        with trio.fail_after(self._limits.stream_timeout_s):
            try:
                request = await receive(stream, HopMessage)
            except MalformedMessage:
                await self._say(stream, Status.MALFORMED_MESSAGE)
                raise
        match request.type:
            case HopMessage.RESERVE:
                await self._reserve(peer, stream)
            case HopMessage.CONNECT:
                await self._connect(peer, named_peer(request), stream)
            case _:
                await self._say(stream, Status.UNEXPECTED_MESSAGE)

    # --- reservations -------------------------------------------------------------------------------------------

    async def _reserve(self, peer: PeerId, stream: FlowStream) -> None:
        if not self.offered or self._transport.relay_of(peer) is not None:
            return await self._say(stream, Status.PERMISSION_DENIED)
        held = self.reserved()
        self._reserved_until_s = {each: self._reserved_until_s[each] for each in held}
        if peer not in held and len(held) >= self._limits.relay_reservations_max:
            return await self._say(stream, Status.RESERVATION_REFUSED)
        until_s = trio.current_time() + self._limits.relay_reservation_s
        self._reserved_until_s[peer] = until_s
        await self._say(
            stream,
            Status.OK,
            reservation=Reservation(expire=int(self._wall_time_s() + self._limits.relay_reservation_s)),
            limit=self._limit(),
        )
        # As long as the other side leaves it open, and nothing more comes on it.
        with trio.move_on_at(until_s):
            try:
                await stream.receive_some(1)
            except trio.BrokenResourceError:
                if self._reserved_until_s.get(peer) == until_s:
                    del self._reserved_until_s[peer]
                raise
        return None

    # --- circuits -----------------------------------------------------------------------------------------------

    async def _connect(self, source: PeerId, target: PeerId, stream: FlowStream) -> None:
        if self._transport.relay_of(source) is not None:
            return await self._say(stream, Status.PERMISSION_DENIED)
        if target not in self.reserved():
            return await self._say(stream, Status.NO_RESERVATION)
        busiest = max(self._circuits[source], self._circuits[target])
        if (
            self.circuits >= self._limits.relay_circuits_max
            or busiest >= self._limits.relay_circuits_per_peer_max
        ):
            return await self._say(stream, Status.RESOURCE_LIMIT_EXCEEDED)
        self._circuits.update((source, target))
        try:
            await self._carry(source, target, stream)
        finally:
            self._circuits.subtract((source, target))
            self._circuits += Counter()  # drops the zeros
        return None

    async def _carry(self, source: PeerId, target: PeerId, stream: FlowStream) -> None:
        try:
            with trio.fail_after(self._limits.stream_timeout_s):
                far = await self._offer(source, target)
        except (GossamerError, trio.TooSlowError) as error:
            _log.debug("no circuit from %s to %s: %s", source, target, error)
            return await self._say(stream, Status.CONNECTION_FAILED)
        try:
            await self._say(stream, Status.OK, limit=self._limit())
            with trio.move_on_after(self._limits.relay_circuit_s_max):
                await self._splice(stream, far)
        finally:
            far.reset("the circuit is over")
        return None

    async def _offer(self, source: PeerId, target: PeerId) -> FlowStream:
        """A stream to ``target``, who has agreed to be connected with ``source``."""
        far = await self._transport.open_stream(target, STOP_PROTOCOL)
        agreed = False
        try:
            request = StopMessage(type=StopMessage.CONNECT, limit=self._limit())
            request.peer.id = naming(source)
            await send(far, request)
            answer = await receive(far, StopMessage)
            if answer.type != StopMessage.STATUS or answer.status != Status.OK:
                raise TransportError(f"{target} declines: {status_name(answer.status)}")
            agreed = True
        finally:
            if not agreed:
                far.reset("no circuit")
        return far

    async def _splice(self, near: FlowStream, far: FlowStream) -> None:
        """Until both directions have ended, one breaks, or the circuit has had its share."""
        left = self._limits.relay_circuit_bytes_max

        async def copy(source: FlowStream, sink: FlowStream) -> None:
            nonlocal left
            try:
                while data := await source.receive_some(COPY_BYTES_MAX):
                    data = data[:left]
                    left -= len(data)
                    self.bytes_carried += len(data)
                    await self._pacer.wait_to_spend(len(data))
                    await sink.send_all(data)
                    if not left:
                        return both.cancel_scope.cancel()
                await sink.send_eof()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                both.cancel_scope.cancel()
            return None

        async with trio.open_nursery() as both:
            both.start_soon(copy, near, far)
            both.start_soon(copy, far, near)

    # --- saying -------------------------------------------------------------------------------------------------

    def _limit(self) -> Any:
        return Limit(
            duration=int(self._limits.relay_circuit_s_max), data=self._limits.relay_circuit_bytes_max
        )

    async def _say(self, stream: FlowStream, status: Any, **more: Any) -> None:
        with trio.fail_after(self._limits.stream_timeout_s):
            try:
                await send(stream, HopMessage(type=HopMessage.STATUS, status=status, **more))
            except StreamBroken as error:
                _log.debug("who asked the relay has left: %s", error)
