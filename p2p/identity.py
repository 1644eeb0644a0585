"""Who we are: an Ed25519 key in a private file, the peer id it implies, and signatures under both.

Owns the key file and the arithmetic between public keys and peer ids. Never prints, logs or pickles a key.

A peer id is the base58 form of the identity multihash of the protobuf-encoded Ed25519 public key (libp2p peer
id specification), so a signature can be checked from the peer id alone, with no key exchange.

Signatures are made over ``purpose || 0x00 || payload``: bytes signed for one purpose never verify for another.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Protocol

import base58
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from p2p.errors import IdentityError
from p2p.private_file import create_private, read_private
from p2p.transport import PeerId

# identity multihash (0x00), 36 bytes: protobuf PublicKey{Type=Ed25519, Data=32 bytes}
_PEER_ID_PREFIX = bytes([0x00, 0x24, 0x08, 0x01, 0x12, 0x20])
IDS_REMEMBERED = 1 << 12
"""Base58 is slow, and the same ids are named again and again."""


class Signer(Protocol):
    """Signs as one peer and checks anybody's signatures. netsim may hand in a cheap keyed-hash double."""

    @property
    def peer(self) -> PeerId:
        """The peer whose key signs."""

    def sign(self, purpose: str, payload: bytes) -> bytes:
        """A signature over ``payload`` for ``purpose``."""

    def verify(self, peer: PeerId, purpose: str, payload: bytes, signature: bytes) -> bool:
        """Whether ``signature`` was made by ``peer`` over ``payload`` for ``purpose``."""


class Identity:
    """An Ed25519 key pair and the peer id it implies. Implements Signer."""

    def __init__(self, private_key: Ed25519PrivateKey) -> None:
        self._key = private_key
        self.peer = peer_id_of(private_key.public_key().public_bytes_raw())

    @classmethod
    def generate(cls) -> Identity:
        """A new random identity, not stored anywhere."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def create(cls, path: Path) -> Identity:
        """A new identity written to ``path`` with mode 0600; refuses to touch an existing file."""
        identity = cls.generate()
        pem = identity._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        try:
            create_private(path, pem)
        except FileExistsError as error:
            raise IdentityError(
                f"{path} already holds a key",
                why="overwriting it would change this node's peer id for good",
                fix=f"move it away first, or use it: gossamer keys show (file {path})",
            ) from error
        return identity

    @classmethod
    def load(cls, path: Path) -> Identity:
        """The identity stored in ``path``. Raises IdentityError when it is missing, open to others or mangled."""
        try:
            pem = read_private(
                path,
                IdentityError,
                use="a node needs its key",
                risk="whoever reads it can speak as this node",
            )
        except FileNotFoundError as error:
            raise IdentityError(
                f"no identity key at {path}", why="a node needs a key to have a name", fix="gossamer init"
            ) from error
        try:
            key = serialization.load_pem_private_key(pem, password=None)
        except (ValueError, TypeError) as error:
            raise IdentityError(
                f"{path} is not a PEM private key",
                why="the file is damaged or of another kind",
                fix=f"restore it from a backup, or move it away and run: gossamer init ({path})",
            ) from error
        if not isinstance(key, Ed25519PrivateKey):
            raise IdentityError(
                f"{path} is not an Ed25519 key", why="peer ids are Ed25519 keys", fix="gossamer init"
            )
        return cls(key)

    @property
    def private_seed(self) -> bytes:
        """The 32-byte private seed, for the libp2p host only."""
        return self._key.private_bytes_raw()

    def sign(self, purpose: str, payload: bytes) -> bytes:
        """A 64-byte Ed25519 signature (RFC 8032) over ``payload`` for ``purpose``."""
        return self._key.sign(_signed_bytes(purpose, payload))

    def verify(self, peer: PeerId, purpose: str, payload: bytes, signature: bytes) -> bool:
        """Whether ``signature`` is ``peer``'s over ``payload``; False for malformed ids and signatures too."""
        try:
            public_key = Ed25519PublicKey.from_public_bytes(public_key_of(peer))
            public_key.verify(signature, _signed_bytes(purpose, payload))
        except (InvalidSignature, ValueError):
            return False
        return True


def peer_id_of(public_key: bytes) -> PeerId:
    """The peer id of a 32-byte Ed25519 public key."""
    return PeerId(base58.b58encode(_PEER_ID_PREFIX + public_key).decode())


def public_key_of(peer: PeerId) -> bytes:
    """The 32-byte Ed25519 public key inside ``peer``. Raises ValueError when it is not such an id.

    There is one id for each key: a second spelling of it would be a second vote.
    """
    raw: bytes = base58.b58decode(peer)
    key = raw[len(_PEER_ID_PREFIX) :]
    if len(key) != 32 or peer_id_of(key) != peer:
        raise ValueError(f"{peer!r} is not an Ed25519 peer id")
    return key


@functools.lru_cache(maxsize=IDS_REMEMBERED)
def is_peer_id(text: str) -> bool:
    """Whether ``public_key_of`` lets it pass."""
    try:
        public_key_of(PeerId(text))
    except ValueError:
        return False
    return True


def _signed_bytes(purpose: str, payload: bytes) -> bytes:
    return purpose.encode() + b"\x00" + payload
