"""StubSigner: signatures for simulations only, a hundred times cheaper than Ed25519 and worth nothing elsewhere.

Owns the names of simulated machines and a keyed hash in place of their keys. Whoever knows the world's key can sign as
anybody, and every machine knows it: what is simulated is that honest programs sign and check, and that what was
changed on the way does not verify. Where forging is the question, simulate with ``p2p.identity.Identity``.
"""

from __future__ import annotations

from blake3 import blake3

from p2p.identity import peer_id_of, public_key_of
from p2p.transport import PeerId

SIGNATURE_BYTES = 64
"""As long as an Ed25519 signature, so that messages are as long as in life."""


class StubSigner:
    """Signs as ``peer`` in the world of ``world_key`` (32 bytes). Implements p2p.identity.Signer."""

    def __init__(self, peer: PeerId, world_key: bytes) -> None:
        public_key_of(peer)  # Raises ValueError: in no world does a name that is none have signatures.
        self.peer = peer
        self._world_key = world_key
        self._author = peer.encode()

    def sign(self, purpose: str, payload: bytes) -> bytes:
        """64 bytes of keyed BLAKE3 over the peer, ``purpose`` and ``payload``."""
        return self._hash(self._author, purpose, payload)

    def verify(self, peer: PeerId, purpose: str, payload: bytes, signature: bytes) -> bool:
        """Whether ``signature`` is ``peer``'s over ``payload`` for ``purpose``, in the same world."""
        return signature == self._hash(peer.encode(), purpose, payload)

    def _hash(self, author: bytes, purpose: str, payload: bytes) -> bytes:
        # Neither peer ids nor purposes contain a zero byte.
        signed = b"\x00".join((author, purpose.encode(), payload))
        return blake3(signed, key=self._world_key).digest(length=SIGNATURE_BYTES)


def world_key(seed: int) -> bytes:
    """The 32-byte key that all machines of one simulated world share."""
    return blake3(f"netsim/world/{seed}".encode()).digest()


def machine_peer(seed: int, number: int) -> PeerId:
    """The id of machine ``number``: in form that of an Ed25519 key, which nobody generated and nobody holds."""
    return peer_id_of(blake3(f"netsim/machine/{seed}/{number}".encode()).digest())
