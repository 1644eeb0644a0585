"""The errors a peer's code may raise, from the root that every package shares down to one cause each.

    GossamerError                 what happened, why it matters, what to do next
    ├── IdentityError             the key file is missing, unreadable or open to others
    ├── SwarmKeyError             the file of a private swarm's key is damaged or open to others
    ├── InviteError               an invite line is mangled, expired or for another version
    ├── AdvertError               a list of swarms cannot be used, or does not have what was asked for
    ├── AddressError              text is not an address, or not one that serves the purpose here
    ├── PortInUse                 another program, or another node, holds the listening port
    ├── MalformedMessage          bytes from a peer are not the canonical form of an allowed message
    └── TransportError            the network let us down
        ├── PeerUnreachable       no address of the peer answered in time
        │   ├── SwarmKeyMismatch  one side is in a private swarm, and the other has not its key
        │   └── NotAllowed        the peer is there, and hung up when it knew who dials
        ├── ProtocolUnsupported   the peer is there but does not speak the protocol
        ├── StreamBroken          a stream ended, was reset or stalled in the middle
        ├── CallTimeout           a request got no reply before its deadline
        └── CallRefused           the peer answered, and said no

Every user-facing error says three things; the command line prints them and never a traceback.
"""

from __future__ import annotations


class GossamerError(Exception):
    """An error made to be read: ``what`` happened, ``why`` it matters, ``fix``: what to type or do next."""

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.fix = fix


class IdentityError(GossamerError):
    """The identity key cannot be used: missing, unreadable, malformed, or readable by others."""


class SwarmKeyError(GossamerError):
    """The key of a private swarm cannot be used: unreadable, malformed, or readable by others."""


class InviteError(GossamerError):
    """An invite line cannot be used: mangled, expired, or made by another version."""


class AdvertError(GossamerError):
    """A list of swarms cannot be read, or has no swarm of the name that was asked for, or several."""


class AddressError(GossamerError):
    """Text that is not an address, or not one that a peer can be dialled at or that this machine can listen on."""


class PortInUse(GossamerError):
    """The listening port is taken; a second listener would silently steal half the connections."""


class MalformedMessage(GossamerError):
    """Bytes from a peer that are not the canonical encoding of an allowed message within its bounds."""


class TransportError(GossamerError):
    """The network let us down; retrying elsewhere or later is the caller's decision."""


class PeerUnreachable(TransportError):
    """No address of the peer answered before the dial deadline."""


class SwarmKeyMismatch(PeerUnreachable):
    """One of the two sides is in a private swarm, and the other has another key than that swarm's, or none."""


class NotAllowed(PeerUnreachable):
    """The peer proved its id and hung up when it knew ours, as who keeps an allow-list does."""


class ProtocolUnsupported(TransportError):
    """The peer answered but does not serve the requested protocol."""


class StreamBroken(TransportError):
    """The stream ended early, was reset, or made no progress before its deadline."""


class CallTimeout(TransportError):
    """A request got no complete reply before its deadline."""


class CallRefused(TransportError):
    """The peer received the request and declined it; ``code`` is a short machine-readable reason."""

    def __init__(self, code: str, what: str) -> None:
        super().__init__(what)
        self.code = code
