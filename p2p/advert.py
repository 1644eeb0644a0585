"""An advert: a member's signed word that a run is there, for lists that anybody may keep and pass on.

Owns the text form, one line of JSON for each, and its checks. A list is a file of such lines, or what a peer holds.
Whoever holds the key of ``peer`` has said what is in the line, and nobody has changed it since; whether it is true, and
worth joining, a signature cannot tell. An advert is no secret: private swarms have invites (``p2p.invite``).
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from p2p.codec import WireMessage, encode
from p2p.errors import AdvertError
from p2p.identity import Identity, Signer
from p2p.transport import PeerId

PURPOSE = "advert"
LIST_BYTES_MAX = 1 << 20
ADVERTS_MAX = 1000
ADDRESSES_MAX = 8
ABOUT_CHARS_MAX = 200
EXPIRES_UNIX_S_MAX = 1 << 36
"""In a year of four digits, which is what people are shown."""
_VERIFIER = Identity.generate()

RunName = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,47}\Z")]
RunId = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
FullAddress = Annotated[str, Meta(pattern=r"^/\S{1,250}/p2p/[1-9A-HJ-NP-Za-km-z]{40,64}\Z")]
"""With ``/p2p/`` and the peer at its end."""


class Claim(WireMessage, frozen=True):
    """What is signed."""

    name: RunName
    about: Annotated[str, Meta(max_length=ABOUT_CHARS_MAX)]
    run: RunId
    parameters: Annotated[int, Meta(ge=0, le=2**53)]
    addresses: Annotated[list[FullAddress], Meta(min_length=1, max_length=ADDRESSES_MAX)]
    expires_unix_s: Annotated[int, Meta(ge=0, le=EXPIRES_UNIX_S_MAX)]


class Advert(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A claim, who makes it, and the signature, in base64."""

    claim: Claim
    peer: Annotated[str, Meta(min_length=40, max_length=64)]
    signature: Annotated[str, Meta(min_length=88, max_length=88)]

    def line(self) -> str:
        """The text form."""
        return msgspec.json.encode(self).decode()


class Unusable(msgspec.Struct, frozen=True):
    """A line of a list that is no advert, or not any more."""

    line: int
    why: str


class AdvertRefused(ValueError):
    """A line is no advert that holds now; ``reason``: "malformed", "signature", or "expired", which is no offence."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def sign_advert(signer: Signer, claim: Claim) -> Advert:
    """``claim``, as the word of ``signer``."""
    signature = base64.b64encode(signer.sign(PURPOSE, encode(claim))).decode()
    return Advert(claim, signer.peer, signature)


def read_list(data: bytes, now_unix_s: float, *, origin: str) -> tuple[list[Advert], list[Unusable]]:
    """The adverts in a list that hold now, and the other lines. Raises AdvertError for a list that is too long."""
    lines = data.splitlines()
    if len(data) > LIST_BYTES_MAX or len(lines) > ADVERTS_MAX:
        raise AdvertError(
            f"the list of swarms at {origin} is too long",
            why=f"at most {ADVERTS_MAX} lines and {LIST_BYTES_MAX >> 20} MiB are read",
            fix="name another list: gossamer swarms --from FILE",
        )
    adverts: list[Advert] = []
    unusable: list[Unusable] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith(b"#"):
            continue
        try:
            adverts.append(read_advert(line, now_unix_s))
        except AdvertRefused as refused:
            unusable.append(Unusable(number, str(refused)))
    return adverts, unusable


def read_advert(line: bytes, now_unix_s: float, verifier: Signer = _VERIFIER) -> Advert:
    """The advert in ``line``. Raises AdvertRefused unless it holds now."""
    try:
        advert = msgspec.json.decode(line, type=Advert)
        signature = base64.b64decode(advert.signature, validate=True)
    except (msgspec.MsgspecError, ValueError) as error:
        raise AdvertRefused("malformed", str(error)) from error
    if now_unix_s >= advert.claim.expires_unix_s:
        raise AdvertRefused("expired", "it has expired")
    if not verifier.verify(PeerId(advert.peer), PURPOSE, encode(advert.claim), signature):
        raise AdvertRefused("signature", "its signature is not that of the peer it names")
    return advert


def chosen_by_name(adverts: Sequence[Advert], name: str) -> list[Advert]:
    """All adverts of the one run that has this name. Raises AdvertError where there is none, or more than one."""
    named = [advert for advert in adverts if advert.claim.name == name]
    runs = sorted({advert.claim.run for advert in named})
    if not runs:
        raise AdvertError(
            f"no swarm called {name} is on the lists",
            why="a name is looked up in the lists that you keep, and with the node that runs here",
            fix="see what is on them: gossamer swarms    or join by an invite or a run id",
        )
    if len(runs) > 1:
        raise AdvertError(
            f"{len(runs)} swarms are called {name}",
            why="anybody may give a run any name; its id is its own",
            fix=f"join by its id: gossamer join {runs[0]} --bootstrap ADDR    (gossamer swarms --json has them all)",
        )
    return named
