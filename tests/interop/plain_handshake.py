"""A connection to a private swarm a second time, in plain Python, written from docs/PROTOCOL.md and Noise.

The dialler's half of the handshake and the multiplexer's selection after it, over a blocking socket. Nothing is shared
with the nodes but the primitives of ``cryptography`` and ``blake3``: that is its use.
"""

import hmac
import socket
from hashlib import sha256

from blake3 import blake3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

# Section Private swarms, and sections 4, 5 and 9 of the Noise Protocol Framework, revision 34.


def expand(chaining_key, material, count):
    secret = hmac.digest(chaining_key, material, sha256)
    outputs = [b""]
    for number in range(1, count + 1):
        outputs.append(hmac.digest(secret, outputs[-1] + bytes([number]), sha256))
    return outputs[1:]


class Cipher:
    """A key, and how often it was used."""

    def __init__(self, key):
        self.cipher, self.used = ChaCha20Poly1305(key), 0

    def nonce(self):
        self.used += 1
        return bytes(4) + (self.used - 1).to_bytes(8, "little")

    def seal(self, data, associated=b""):
        return self.cipher.encrypt(self.nonce(), data, associated)

    def open(self, data, associated=b""):
        return self.cipher.decrypt(self.nonce(), data, associated)


class Symmetric:
    """The chaining key, the hash of all that was said, and the key of the moment."""

    def __init__(self, prologue):
        name = b"Noise_XXpsk0_25519_ChaChaPoly_SHA256"
        self.chaining_key = self.hash = sha256(name).digest()
        self.mix_hash(prologue)

    def mix_hash(self, data):
        self.hash = sha256(self.hash + data).digest()

    def mix_key(self, material):
        self.chaining_key, key = expand(self.chaining_key, material, 2)
        self.cipher = Cipher(key)

    def mix_psk(self, psk):
        self.chaining_key, extra, key = expand(self.chaining_key, psk, 3)
        self.mix_hash(extra)
        self.cipher = Cipher(key)

    def seal(self, data):
        sealed = self.cipher.seal(data, self.hash)
        self.mix_hash(sealed)
        return sealed

    def open(self, sealed):
        data = self.cipher.open(sealed, self.hash)
        self.mix_hash(sealed)
        return data


def receive(connection, size):
    data = b""
    while len(data) < size:
        some = connection.recv(size - len(data))
        if not some:
            raise EOFError(f"{len(data)} of {size} bytes")
        data += some
    return data


def receive_message(connection):
    return receive(connection, int.from_bytes(receive(connection, 2), "big"))


def send_message(connection, data):
    connection.sendall(len(data).to_bytes(2, "big") + data)


def proto_field(number, data):
    return bytes([number << 3 | 2, len(data)]) + data


def proto_fields(data):
    """Of a message whose fields are all bytes shorter than 128."""
    fields = {}
    while data:
        number, size, data = data[0] >> 3, data[1], data[2:]
        fields[number], data = data[:size], data[size:]
    return fields


SIGNED = b"noise-libp2p-static-key:"
ED25519 = bytes([0x08, 0x01, 0x12, 0x20])


def dial(port, swarm_key, identity):
    """Connect as ``identity``; returns the socket, the ciphers out and in, and the listener's Ed25519 key."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=5)
    psk = blake3(swarm_key, derive_key_context="gossamer 2026-11-29 private swarm noise psk").digest()
    state = Symmetric(b"gossamer/private/1\0" + receive(connection, 32))
    static, ephemeral = X25519PrivateKey.generate(), X25519PrivateKey.generate()

    state.mix_psk(psk)
    public = ephemeral.public_key().public_bytes_raw()
    state.mix_hash(public)
    state.mix_key(public)
    send_message(connection, public + state.seal(b""))

    answer = receive_message(connection)
    state.mix_hash(answer[:32])
    state.mix_key(answer[:32])
    their_ephemeral = X25519PublicKey.from_public_bytes(answer[:32])
    state.mix_key(ephemeral.exchange(their_ephemeral))
    their_static = state.open(answer[32:80])
    state.mix_key(ephemeral.exchange(X25519PublicKey.from_public_bytes(their_static)))
    payload = proto_fields(state.open(answer[80:]))
    assert payload[1].startswith(ED25519)
    their_identity = payload[1].removeprefix(ED25519)
    Ed25519PublicKey.from_public_bytes(their_identity).verify(payload[2], SIGNED + their_static)

    own = static.public_key().public_bytes_raw()
    sealed = state.seal(own)
    state.mix_key(static.exchange(their_ephemeral))
    payload = proto_field(1, ED25519 + identity.public_key().public_bytes_raw())
    payload += proto_field(2, identity.sign(SIGNED + own))
    send_message(connection, sealed + state.seal(payload))
    outward, inward = map(Cipher, expand(state.chaining_key, b"", 2))
    return connection, outward, inward, their_identity


def select(connection, outward, inward, protocol):
    """What the listener says to a proposal of ``protocol``: multistream-select, in as many messages as it takes."""
    lines = [b"/multistream/1.0.0\n", protocol + b"\n"]
    send_message(connection, outward.seal(b"".join(bytes([len(line)]) + line for line in lines)))
    said = b""
    while len(said) < 21 or len(said) < 21 + said[20]:
        said += inward.open(receive_message(connection))
    return said


def new_identity():
    return Ed25519PrivateKey.generate()
