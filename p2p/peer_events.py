"""Who is connected, and the news of it, for every implementation of Transport.

Owns the set of connected peers and the subscriptions to it, so that both networks publish the same events in
the same order: PeerUp once, then PeerDown once, for each stay of a peer.
"""

from __future__ import annotations

import trio

from p2p.transport import PeerDown, PeerEvent, PeerId, PeerUp


class PeerEvents:
    """The connected peers, and channels that hear of every change; a full channel loses its oldest event."""

    def __init__(self, events_max: int) -> None:
        self._events_max = events_max
        self._connected: set[PeerId] = set()
        self._subscribers: list[
            tuple[trio.MemorySendChannel[PeerEvent], trio.MemoryReceiveChannel[PeerEvent]]
        ] = []

    @property
    def connected(self) -> frozenset[PeerId]:
        """The peers connected right now."""
        return frozenset(self._connected)

    def subscribe(self) -> trio.MemoryReceiveChannel[PeerEvent]:
        """A new channel of events from now on; closing it ends the subscription."""
        send, receive = trio.open_memory_channel[PeerEvent](self._events_max)
        self._subscribers.append((send, receive.clone()))
        return receive

    def up(self, peer: PeerId, *, outbound: bool) -> None:
        """A connection to ``peer`` is usable; silent when another one already was."""
        if peer not in self._connected:
            self._connected.add(peer)
            self._publish(PeerUp(peer, outbound))

    def down(self, peer: PeerId, reason: str, *, broken: bool) -> None:
        """The last connection to ``peer`` is gone."""
        if peer in self._connected:
            self._connected.remove(peer)
            self._publish(PeerDown(peer, reason, broken))

    def close(self) -> None:
        """End every subscription."""
        for send, overflow in self._subscribers:
            send.close()
            overflow.close()
        self._subscribers.clear()

    def _publish(self, event: PeerEvent) -> None:
        live = []
        for send, overflow in self._subscribers:
            # One open receiver is our own clone, kept to drop the oldest event from a full channel.
            if send.statistics().open_receive_channels == 1:
                send.close()
                overflow.close()
                continue
            try:
                send.send_nowait(event)
            except trio.WouldBlock:
                overflow.receive_nowait()
                send.send_nowait(event)
            live.append((send, overflow))
        self._subscribers = live
