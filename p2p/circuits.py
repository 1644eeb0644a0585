"""Being reached, and reaching others, through relays: the client's side of circuit relay v2.

Owns the addresses that lead through a relay, the reservations this peer holds, and both ends of a circuit until it is a
stream like any other; what is then spoken on it (encryption, streams) is the transport's. Never chooses a relay.

A circuit is only taken from a relay that was asked for it, and only once the peer at its other end has proved the id
that the relay has named: a relay can refuse and delay, and cannot pretend.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio

from p2p.circuit_messages import (
    HOP_PROTOCOL,
    STOP_PROTOCOL,
    HopMessage,
    Status,
    StopMessage,
    named_peer,
    naming,
    receive,
    send,
    status_name,
)
from p2p.errors import CallRefused, PeerUnreachable, StreamBroken
from p2p.flow import FlowStream
from p2p.limits import Limits
from p2p.transport import PeerId, Transport

CIRCUIT = "p2p-circuit"
RENEWED_AFTER = 0.5
"""Of a reservation's time: there is as much left to try again elsewhere."""


def split_circuit(address: str) -> tuple[str, PeerId] | None:
    """The relay's own address and its id, of ``ADDRESS/p2p/RELAY/p2p-circuit``; None for any other address."""
    relay_address, _, rest = address.partition("/p2p/")
    match rest.split("/"):
        case [relay, last] if last == CIRCUIT:
            return relay_address, PeerId(relay)
    return None


def circuit_address(relay_address: str, relay: PeerId) -> str:
    """Where a peer is reached that holds a reservation at ``relay``, which is itself at ``relay_address``."""
    return f"{relay_address}/p2p/{relay}/{CIRCUIT}"


class Circuits:
    """The circuits of one transport that end here; ``take`` makes a connection of an inbound one and runs it.

    ``take`` is given the stream, the peer that has to be at its other end, and the relay.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        limits: Limits,
        take: Callable[[FlowStream, PeerId, PeerId], Awaitable[None]],
    ) -> None:
        self._transport = transport
        self._limits = limits
        self._take = take
        self._held: set[PeerId] = set()

    def serve(self) -> None:
        """Take circuits from relays at which this peer holds a reservation."""
        self._transport.serve(STOP_PROTOCOL, self._accept)

    async def hold_reservation(self, relay: PeerId, held: Callable[[], None]) -> None:
        """Be reachable through ``relay``, a connected peer, until this fails or is cancelled; ``held`` once it is so.

        Raises CallRefused where the relay declines, PeerUnreachable or StreamBroken where it is gone.
        """
        stream, seconds = await self._reserve(relay)
        self._held.add(relay)
        held()
        try:
            while True:
                with trio.move_on_after(RENEWED_AFTER * seconds):
                    try:
                        await stream.receive_some(1)
                    except trio.BrokenResourceError as error:
                        raise StreamBroken(f"{relay} does not relay any more: {error}") from error
                    # A relay that ends the stream keeps the reservation all the same, as most of them do.
                    await trio.sleep_forever()
                before = stream
                stream, seconds = await self._reserve(relay)
                await before.send_eof()
                before.close()
        finally:
            self._held.discard(relay)
            stream.reset("not needed any more")

    async def _reserve(self, relay: PeerId) -> tuple[FlowStream, float]:
        """The stream that a new reservation hangs on, and for how many seconds it holds."""
        stream = await self._transport.open_stream(relay, HOP_PROTOCOL)
        granted = False
        try:
            await send(stream, HopMessage(type=HopMessage.RESERVE))
            await self._answer_of(relay, stream)
            granted = True
        finally:
            if not granted:
                stream.reset("no reservation")
        # What the relay says of its expiry is by its own clock, which may be hours off: all are renewed alike.
        return stream, self._limits.relay_reservation_s

    async def open(self, relay: PeerId, target: PeerId) -> FlowStream:
        """A circuit to ``target`` through ``relay``, a connected peer. Raises PeerUnreachable or StreamBroken."""
        stream = await self._transport.open_stream(relay, HOP_PROTOCOL)
        connected = False
        try:
            request = HopMessage(type=HopMessage.CONNECT)
            request.peer.id = naming(target)
            await send(stream, request)
            await self._answer_of(relay, stream)
            connected = True
        except CallRefused as refused:
            raise PeerUnreachable(f"by way of {relay}: {refused.what}") from refused
        finally:
            if not connected:
                stream.reset("no circuit")
        return stream

    async def _answer_of(self, relay: PeerId, stream: FlowStream) -> Any:
        with trio.move_on_after(self._limits.stream_timeout_s) as patience:
            answer = await receive(stream, HopMessage)
        if patience.cancelled_caught:
            raise StreamBroken(f"{relay} did not answer within {self._limits.stream_timeout_s:g} s")
        if answer.type != HopMessage.STATUS or answer.status != Status.OK:
            raise CallRefused("relay", f"{relay} declines: {status_name(answer.status)}")
        return answer

    async def _accept(self, relay: PeerId, stream: FlowStream) -> None:
        with trio.fail_after(self._limits.stream_timeout_s):
            request = await receive(stream, StopMessage)
            if request.type != StopMessage.CONNECT or relay not in self._held:
                refusal = (
                    Status.PERMISSION_DENIED
                    if request.type == StopMessage.CONNECT
                    else Status.UNEXPECTED_MESSAGE
                )
                return await send(stream, StopMessage(type=StopMessage.STATUS, status=refusal))
            source = named_peer(request)
            await send(stream, StopMessage(type=StopMessage.STATUS, status=Status.OK))
        await self._take(stream, source, relay)
        return None
