"""What somebody who is no member yet may ask of any peer of a run: its spec, and who its members are.

Owns two calls of HELLO_PROTOCOL, which ``gossip.links`` answers, and what is believed of their replies.
"""

from __future__ import annotations

from blake3 import blake3

from gossip.address_book import can_be_dialled
from gossip.messages import (
    HELLO_PROTOCOL,
    Heartbeat,
    Notice,
    Notices,
    SpecBytes,
    WantPeers,
    WantSpec,
)
from p2p.codec import decode
from p2p.errors import GossamerError
from p2p.limits import Limits
from p2p.rpc import call
from p2p.transport import PeerId, PeerRecord, Transport

PEERS_ASKED = 32


async def fetch_spec(transport: Transport, peer: PeerId, run: bytes, *, timeout_s: float) -> bytes:
    """The canonical bytes of the run spec named ``run``, from any peer that has it.

    Raises TransportError, or GossamerError when the bytes are not that spec.
    """
    reply = await call(transport, peer, HELLO_PROTOCOL, WantSpec(run=run), SpecBytes, timeout_s=timeout_s)
    if blake3(reply.spec).digest() != run:
        raise GossamerError(
            f"{peer} sent a run spec that does not match the invite",
            why="what a swarm trains is named by the hash in its invite, so nobody has to be trusted",
            fix="ask for an invite with other peers in it",
        )
    return reply.spec


async def members_known_to(transport: Transport, peer: PeerId, *, limits: Limits) -> list[PeerRecord]:
    """Members that ``peer`` tells of, and where they are: peer exchange for who is no member yet.

    It is the word of ``peer`` alone, so a hint and no more. Raises TransportError or MalformedMessage.
    """
    known = await call(
        transport,
        peer,
        HELLO_PROTOCOL,
        WantPeers(count=PEERS_ASKED),
        Notices,
        timeout_s=limits.call_timeout_s,
    )
    found = []
    for packed in known.notices:
        notice = decode(packed, Notice, bytes_max=limits.notice_bytes_max)
        beat = decode(notice.body, Heartbeat, bytes_max=limits.notice_bytes_max)
        addresses = [
            address
            for address in beat.addresses[: limits.addresses_per_peer_max]
            if can_be_dialled(address, chars_max=limits.address_chars_max)
        ]
        found.append(PeerRecord(PeerId(notice.author), tuple(addresses)))
    return found
