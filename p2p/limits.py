"""Every bound on what a peer may make us hold, send or wait for, with its unit, in one place.

``gossamer config limits`` prints this table. A test or a scenario lowers values by building another ``Limits``;
nothing reads a bound from anywhere else.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds, each named with its unit last. One instance is handed to every part that needs one."""

    # connections and streams
    peers_max: int = 64
    """Connections kept at once."""
    peers_inbound_max: int = 56
    """Those of them that others have made: whoever dials here cannot keep this node from dialling."""
    streams_per_peer_max: int = 32
    """Inbound streams one peer may hold open."""
    dial_timeout_s: float = 10.0
    handshakes_max: int = 128
    """Inbound connections that have not proved their identity yet."""
    handshakes_per_address_max: int = 32
    """The same, from one IP address: a stranger cannot hold every slot."""
    stream_timeout_s: float = 15.0
    """Opening a stream, and any single write."""
    peer_silence_s: float = 12.0
    """A peer that answers no ping for this long is disconnected."""
    receive_window_bytes: int = 1 << 20
    """Unread bytes one stream may hold (at least 256 KiB); a peer that sends past it loses its connection."""
    peer_events_max: int = 256
    """Connection events one subscriber may leave unread before the oldest is dropped."""

    # relays
    relay_reservations_max: int = 64
    """Peers that cannot be dialled and are reached through this one."""
    relay_reservation_s: float = 3600.0
    """How long a reservation holds before it has to be asked for again."""
    relay_circuits_max: int = 64
    """Connections carried at once."""
    relay_circuits_per_peer_max: int = 16
    """Those of them that one peer is at an end of."""
    relay_circuit_bytes_max: int = 4 << 30
    """What one connection may carry in both directions together; then it ends, and may be made again."""
    relay_circuit_s_max: float = 6 * 3600.0

    # messages
    frame_bytes_max: int = 1 << 20
    """The largest message, before it is parsed."""
    cbor_depth_max: int = 8
    call_timeout_s: float = 15.0
    """A request and its reply, unless the caller names a shorter deadline."""

    # membership and notices
    members_max: int = 1024
    notice_bytes_max: int = 16 << 10
    """One signed notice, body included."""
    notices_per_author_max: int = 8
    notices_per_swap_max: int = 256
    addresses_per_peer_max: int = 8
    address_chars_max: int = 256
    address_book_max: int = 4096
    links_target: int = 8
    """Neighbours a node tries to stay connected to."""

    # shards
    shard_bytes_max: int = 1 << 30
    chunks_in_flight_per_peer: int = 4
    chunk_timeout_s: float = 30.0
    """One chunk of 1 MiB from its turn to its last byte: the minimum rate of a holder is 34 KiB/s."""
    chunk_stall_s: float = 8.0
    """No byte of a chunk whose turn it is."""
    fetches_max: int = 16
    """Shards fetched at the same time."""

    # merges
    merge_participants_max: int = 1024
    merge_fragments_max: int = 1024
    merge_records_kept: int = 64
    """Committed records a node keeps: how far behind a member may be and still verify every link it missed."""
    merge_call_timeout_s: float = 10.0
    """The longest a proposer waits for promises and contributions."""
    merge_transfer_timeout_s: float = 600.0
    """The longest it waits for sums, or for acknowledgements, however large the model."""
    merge_bytes_per_s_min: int = 1 << 20
    """The rate that transfers of a merge are given time for, until they have been observed."""
    merge_turn_s: float = 1.0
    """Between the turns of successive proposers."""
    merge_retry_s_max: float = 30.0
    """The longest pause of a proposer whose attempts keep failing."""

    # control socket
    control_line_bytes_max: int = 4 << 20
    """One request or one reply: the status of a swarm of ``members_max`` with full address lists fits."""
    control_clients_max: int = 16


DEFAULT_LIMITS = Limits()
"""The bounds of an ordinary node."""
