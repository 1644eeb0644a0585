"""From a fresh socket to an encrypted one whose peer is known: the Noise handshake. The only file with libp2p in it.

Owns what is said before encryption, and the two patterns. In an open swarm it is libp2p's own, Noise XX after
multistream-select. In a private one it is Noise XXpsk0 (The Noise Protocol Framework, section 9) with a key derived
from the swarm's: the first message proves the key, and nothing but random bytes is said to whoever has not proved it.
A listener begins with a challenge, which both sides mix in, so that a recorded first message proves nothing.

From the library come the pattern's messages, which bind libp2p's peer id to the Noise keys, and the cryptography under
them. Never decides who may connect; the caller sets the deadline. Every exception of the library ends here.
"""

from __future__ import annotations

import logging
import secrets
from typing import Any

import trio
from cryptography.exceptions import InvalidTag
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_new_noise_key_pair
from libp2p.io.exceptions import IOException
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.security.noise.patterns import PatternXX
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE_PROTOCOL

from p2p import multistream
from p2p.errors import GossamerError, MalformedMessage, StreamBroken, SwarmKeyMismatch, TransportError
from p2p.frames import receive_exactly
from p2p.identity import Identity, public_key_of
from p2p.metered import Meter, MeteredStream
from p2p.noise_stream import LENGTH_BYTES, TAG_BYTES, NoiseStream
from p2p.swarm_key import SwarmKey
from p2p.transport import PeerId

PRIVATE_PATTERN = b"Noise_XXpsk0_25519_ChaChaPoly_SHA256"
KEY_USE = "gossamer 2026-11-29 private swarm noise psk"
PROLOGUE = b"gossamer/private/1\x00"
"""Followed by the challenge."""
CHALLENGE_BYTES = 32
FIRST_MESSAGE_BYTES = 32 + TAG_BYTES
"""An ephemeral key, and the tag that proves the swarm's."""
OPEN_GREETING = b"\x13/multistream/1.0.0\n"
"""What a listener in an open swarm says first; shorter than a challenge."""


class NoiseHandshake:
    """The handshakes of one node, in the private swarm of ``swarm_key`` or, without one, in an open swarm."""

    def __init__(self, identity: Identity, swarm_key: SwarmKey | None) -> None:
        _quiet_library()
        keys = create_new_key_pair(identity.private_seed)
        self._keys = (
            ID.from_pubkey(keys.public_key),
            keys.private_key,
            create_new_noise_key_pair().private_key,
        )
        self._psk = None if swarm_key is None else swarm_key.derived(KEY_USE)

    async def dial(self, socket: trio.abc.Stream, peer: PeerId) -> NoiseStream:
        """Prove who we are to ``peer``, which must prove its id first.

        Raises SwarmKeyMismatch or another TransportError, or MalformedMessage.
        """
        pattern = await (
            self._propose(socket) if self._psk is None else self._take_challenge(socket, self._psk)
        )
        raw = RawConnection(TrioTCPStream(socket), initiator=True)
        try:
            secure: Any = await pattern.handshake_outbound(raw, ID.from_base58(peer))
        except IOException as error:
            if self._psk is None:
                raise _failed(error) from error
            raise SwarmKeyMismatch(
                "it hung up when this node proved the key of its swarm, so it has another one; has the key been"
                " changed? join with a new invite: gossamer join 'INVITE'"
            ) from error
        except Exception as error:  # the library raises a dozen unrelated types for bytes it does not like
            raise _failed(error) from error
        return _stream(socket, secure)[0]

    async def answer(self, socket: trio.abc.Stream) -> tuple[NoiseStream, PeerId]:
        """Learn who has dialled, and prove who we are; in a private swarm only to who has proved its key.

        Raises SwarmKeyMismatch or another TransportError, or MalformedMessage.
        """
        source: trio.abc.Stream | _Reread = socket
        if self._psk is None:
            try:
                await multistream.answer(socket, {str(NOISE_PROTOCOL)})
            except StreamBroken as error:
                raise StreamBroken(
                    "it hung up at the greeting; so does a port scan, and a node in a private swarm, whose key this"
                    " node lacks"
                ) from error
            pattern = PatternXX(*self._keys)
        else:
            pattern, source = await self._challenge(socket, self._psk)
        try:
            secure: Any = await pattern.handshake_inbound(
                RawConnection(TrioTCPStream(source), initiator=False)
            )
        except InvalidTag as error:
            if self._psk is None:
                raise _failed(error) from error
            raise SwarmKeyMismatch("it has another swarm key") from error
        except Exception as error:
            raise _failed(error) from error
        return _stream(socket, secure)

    # --- what comes before encryption -----------------------------------------------------------------------------

    async def _propose(self, socket: trio.abc.Stream) -> PatternXX:
        heard = Meter()
        try:
            await multistream.select(MeteredStream(socket, heard), NOISE_PROTOCOL)
        except (MalformedMessage, StreamBroken) as error:
            if not heard.bytes_received:
                raise
            raise SwarmKeyMismatch(
                "it does not speak in the clear, so it may be in a private swarm, whose key this node lacks; join"
                " with an invite that has it: gossamer join 'INVITE'"
            ) from error
        return PatternXX(*self._keys)

    async def _take_challenge(self, socket: trio.abc.Stream, psk: bytes) -> PatternXX:
        greeting = await receive_exactly(socket, len(OPEN_GREETING))
        if greeting == OPEN_GREETING:
            raise SwarmKeyMismatch(
                "it is in no private swarm, and this node is; ask for an invite from the swarm that this node is to"
                " be in: gossamer invite"
            )
        return _PrivatePattern(
            *self._keys,
            psk=psk,
            challenge=greeting + await receive_exactly(socket, CHALLENGE_BYTES - len(greeting)),
        )

    async def _challenge(self, socket: trio.abc.Stream, psk: bytes) -> tuple[PatternXX, _Reread]:
        challenge = secrets.token_bytes(CHALLENGE_BYTES)
        try:
            await socket.send_all(challenge)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise StreamBroken(f"could not send: {error}") from error
        length = await receive_exactly(socket, LENGTH_BYTES)
        if int.from_bytes(length, "big") != FIRST_MESSAGE_BYTES:
            # Not to be read to its end: whoever knows no better has announced anything.
            raise SwarmKeyMismatch("it has no swarm key")
        return _PrivatePattern(*self._keys, psk=psk, challenge=challenge), _Reread(length, socket)


class _PrivatePattern(PatternXX):  # type: ignore[misc]
    """Noise XXpsk0 with libp2p's payloads, for one connection."""

    def __init__(self, *keys: Any, psk: bytes, challenge: bytes) -> None:
        super().__init__(*keys, prologue=PROLOGUE + challenge)
        self.protocol_name = PRIVATE_PATTERN
        self._psk = psk

    def create_noise_state(self, prologue: bytes | None = None) -> Any:
        state = super().create_noise_state(prologue)
        state.set_psks(self._psk)
        return state


class _Reread:
    """``stream`` as it was before ``data`` was read from it."""

    def __init__(self, data: bytes, stream: trio.abc.Stream) -> None:
        self._data = data
        self._stream = stream
        self.send_all = stream.send_all

    async def receive_some(self, max_bytes: int) -> bytes:
        if not self._data:
            return bytes(await self._stream.receive_some(max_bytes))
        data, self._data = self._data[:max_bytes], self._data[max_bytes:]
        return data


def _stream(socket: trio.abc.Stream, secure: Any) -> tuple[NoiseStream, PeerId]:
    peer = PeerId(secure.get_remote_peer().to_base58())
    try:
        public_key_of(peer)  # only ids that contain their key can be checked against signatures
    except ValueError as error:
        raise _failed(error) from error
    noise = secure.conn.noise_state
    stream = NoiseStream(socket, noise.encrypt, noise.decrypt)
    if isinstance(socket, MeteredStream):
        stream.awaiting = socket.await_bytes
    return stream, peer


def _failed(error: Exception) -> GossamerError:
    return TransportError(f"the encryption handshake failed: {str(error) or type(error).__name__}")


def _quiet_library() -> None:
    """Keep what strangers can provoke out of the log: the library reports every failed handshake as an error."""
    library = logging.getLogger("libp2p")
    if library.level == logging.NOTSET:
        library.setLevel(logging.CRITICAL)
