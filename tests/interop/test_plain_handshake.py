"""A dialler written from the documentation alone gets into a private swarm, and only with its key."""

from __future__ import annotations

import pytest
import trio

from p2p.identity import Identity, peer_id_of, public_key_of
from p2p.libp2p_transport import open_libp2p
from p2p.swarm_key import SwarmKey
from p2p.transport import PeerUp
from tests.interop import plain_handshake as plain

KEY = SwarmKey(b"k" * 32)


async def test_a_handshake_written_from_the_documentation_is_understood() -> None:
    async with open_libp2p(Identity.generate(), listen=["/ip4/127.0.0.1/tcp/0"], swarm_key=KEY) as host:
        events = host.peer_events()
        port = int(host.local.addresses[0].rpartition("/")[2])
        guest = plain.new_identity()

        def come_in() -> bytes:
            connection, outward, inward, their_identity = plain.dial(port, KEY.secret, guest)
            with connection:
                assert their_identity == public_key_of(host.local.peer)
                return plain.select(connection, outward, inward, b"/yamux/1.0.0")

        assert await trio.to_thread.run_sync(come_in) == b"\x13/multistream/1.0.0\n\x0d/yamux/1.0.0\n"
        with trio.fail_after(5):
            up = await events.receive()
        assert up == PeerUp(peer_id_of(guest.public_key().public_bytes_raw()), outbound=False)


async def test_with_another_key_there_is_no_answer() -> None:
    async with open_libp2p(Identity.generate(), listen=["/ip4/127.0.0.1/tcp/0"], swarm_key=KEY) as host:
        port = int(host.local.addresses[0].rpartition("/")[2])
        with pytest.raises(EOFError, match="0 of 2 bytes"):
            await trio.to_thread.run_sync(plain.dial, port, b"o" * 32, plain.new_identity())
        assert host.traffic().connections_refused == {"swarm-key": 1}
