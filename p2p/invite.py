"""An invite: one line that holds all a newcomer needs, and says so plainly when it was damaged on the way.

Owns the text form. ``gossamer:join/1/<run id>?peer=<multiaddr>&...&check=<8 hex digits>``: the run id in
lower-case base32 without padding, one ``peer`` per bootstrap address, each percent-encoded where it must be,
optionally ``secret`` (the key of a private swarm, in the same base32) and ``expires`` (unix seconds), and last a
checksum (CRC-32) of everything before it.

The checksum finds typing errors. An invite is not signed, since who gets one knows no key yet that a signature could
be checked by: whoever can change it on its way can as well write another. So it is as good as the way it came.
"""

from __future__ import annotations

import base64
import datetime
import re
import zlib
from dataclasses import dataclass
from urllib.parse import quote, unquote

from p2p.errors import InviteError
from p2p.swarm_key import SwarmKey

SCHEME = "gossamer:join/"
VERSION = "1"
RUN_ID_BYTES = 32
PEERS_MAX = 8
INVITE_CHARS_MAX = 1024
EXPIRES_UNIX_S_MAX = 1 << 36
"""In a year of four digits, which is what people are shown."""

_WHY = "a run can only be joined with an invite that arrived whole"
_FIX = "copy the whole line again and put it in quotes, or ask for a new one: gossamer invite"
_CHECKED = re.compile(r"(?P<body>.*)&check=(?P<check>[0-9a-f]{8})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Invite:
    """How to join one run."""

    run: bytes
    """The run id: 32 bytes."""
    addresses: tuple[str, ...]
    """Full multiaddrs of bootstrap peers, each ending in ``/p2p/<peer id>``; one to PEERS_MAX, the best first."""
    swarm_key: SwarmKey | None = None
    """Of a private swarm. Whoever reads the invite learns it, and can use it when the invite has long expired."""
    expires_unix_s: int | None = None

    def __post_init__(self) -> None:
        if len(self.run) != RUN_ID_BYTES:
            raise ValueError(f"a run id has {RUN_ID_BYTES} bytes, not {len(self.run)}")
        if not 1 <= len(self.addresses) <= PEERS_MAX:
            raise ValueError(f"an invite names 1 to {PEERS_MAX} peers, not {len(self.addresses)}")
        for address in self.addresses:
            if not re.fullmatch(r"/\S+/p2p/[1-9A-HJ-NP-Za-km-z]{40,64}", address):
                raise ValueError(
                    f"{address!r} is not a full address like /ip4/192.0.2.7/tcp/4100/p2p/12D3..."
                )
        if self.expires_unix_s is not None and not 0 <= self.expires_unix_s <= EXPIRES_UNIX_S_MAX:
            raise ValueError("it expires in no year that there is")
        if len(self._line(1)) > INVITE_CHARS_MAX:
            raise ValueError(f"{self.addresses[0]!r} is too long for an invite")

    def format(self) -> str:
        """One line of at most INVITE_CHARS_MAX characters; the last peers, if they do not fit, are left out."""
        lines = (self._line(peers) for peers in range(len(self.addresses), 0, -1))
        return next(line for line in lines if len(line) <= INVITE_CHARS_MAX)

    def _line(self, peers: int) -> str:
        fields = [f"peer={_escape(address)}" for address in self.addresses[:peers]]
        if self.swarm_key is not None:
            fields.append(f"secret={self.swarm_key.text}")
        if self.expires_unix_s is not None:
            fields.append(f"expires={self.expires_unix_s}")
        run = base64.b32encode(self.run).decode().rstrip("=").lower()
        body = f"{SCHEME}{VERSION}/{run}?{'&'.join(fields)}"
        return f"{body}&check={_checksum(body)}"

    @classmethod
    def parse(cls, text: str, now_unix_s: float) -> Invite:
        """The invite in ``text``. Raises InviteError that says what is wrong with it."""
        line = text.strip()
        if not line.startswith(SCHEME):
            raise _error(f"this is not an invite: it does not begin with {SCHEME}")
        if len(line) > INVITE_CHARS_MAX or re.search(r"\s", line):
            raise _error("the invite is not one line on its own")
        version = line.removeprefix(SCHEME).partition("/")[0]
        if version != VERSION and version.isdigit():
            raise InviteError(
                f"the invite is for protocol version {version}, this program speaks version {VERSION}",
                why="nodes of different versions do not understand each other",
                fix="install the version of the person who invited you",
            )
        if (checked := _CHECKED.fullmatch(line)) is None:
            raise _error("the invite is cut off: its checksum at the end is missing")
        if checked["check"] != _checksum(checked["body"]):
            raise _error("the invite was mistyped: its checksum does not fit")
        try:
            invite = cls._from_body(checked["body"])
        except ValueError as error:
            raise _error(f"the invite is not valid: {error}") from error
        if invite.expires_unix_s is not None and now_unix_s >= invite.expires_unix_s:
            raise InviteError(
                f"the invite expired on {utc_text(invite.expires_unix_s)}",
                why="its maker limited how long it may be used",
                fix="ask for a new one: gossamer invite",
            )
        return invite

    @classmethod
    def _from_body(cls, body: str) -> Invite:
        run, _, query = body.removeprefix(f"{SCHEME}{VERSION}/").partition("?")
        fields: dict[str, list[str]] = {}
        for field in query.split("&"):
            name, _, value = field.partition("=")
            fields.setdefault(name, []).append(unquote(value))
        if not fields.keys() <= {"peer", "secret", "expires"}:
            raise ValueError("it has a field that this version does not know")
        (secret,) = fields.get("secret", [None])
        (expires,) = fields.get("expires", [None])
        invite = cls(
            run=base64.b32decode(run.upper() + "=" * (-len(run) % 8)),
            addresses=tuple(fields.get("peer", ())),
            swarm_key=None if secret is None else SwarmKey.from_text(secret),
            expires_unix_s=None if expires is None else int(expires),
        )
        if not invite.format().startswith(body + "&"):
            raise ValueError("it is not in the form that this version writes")
        return invite


def utc_text(unix_s: int) -> str:
    """A moment for people: ``2026-12-06 17:00 UTC``."""
    return f"{datetime.datetime.fromtimestamp(unix_s, datetime.UTC):%Y-%m-%d %H:%M} UTC"


def _escape(text: str) -> str:
    return quote(text, safe="/:.-_~")


def _checksum(body: str) -> str:
    return f"{zlib.crc32(body.encode()):08x}"


def _error(what: str) -> InviteError:
    return InviteError(what, why=_WHY, fix=_FIX)
