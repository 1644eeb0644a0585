"""The table of signed registers that spreads everything small: who is here, what they offer, how far they are.

Owns the registers, the order between versions of one register, and the checks a notice passes before it is
held. Never sends anything and never reads a clock: ``gossip.anti_entropy`` reconciles tables over the network.
Relies on ``Signer`` for signatures and on the caller to pass the time.

A register is keyed by (author, kind) and ordered by its stamp: incarnation, sequence, signature; the greatest wins.
Merging two tables is therefore commutative, associative and idempotent (a map of last-writer-wins registers: Shapiro
et al., "A comprehensive study of Convergent and Commutative Replicated Data Types", 2011, section 3.2), so
tables that have seen the same notices are equal whatever the order, grouping or repetition.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from blake3 import blake3
from msgspec.structs import replace

from gossip.messages import (
    NOTICE_BODIES,
    NOTICE_BODY_BYTES_MAX,
    REGISTER_KEY_BYTES,
    REGISTER_STAMP_BYTES,
    Message,
    Notice,
    NoticeClaim,
)
from p2p.codec import decode, encode
from p2p.errors import MalformedMessage
from p2p.identity import Signer
from p2p.limits import Limits
from p2p.transport import PeerId

PURPOSE = "gossamer/notice/1"
AUTHOR_SILENCE_S = 600.0
"""An author unheard for this long gives up its place when the table is full and a new author asks."""

NOTICE_OVERHEAD_BYTES = 400
"""More than a notice takes beyond its body."""
REFUSED_KEYS_KEPT = 1024
"""Registers of kinds that this version does not know: not asked for again with every round."""

_ROW = struct.Struct(f"{REGISTER_KEY_BYTES}s{REGISTER_STAMP_BYTES}s")
ROW_BYTES = _ROW.size
"""What Versions says of one register."""

Key = tuple[PeerId, str]
"""(author, kind): which register."""
Body = TypeVar("Body", bound=Message)


class Verdict(StrEnum):
    """What became of an offered notice."""

    ACCEPTED = "accepted"
    KNOWN = "known"
    """Not newer than what is held: a duplicate or a replay, both normal between honest peers."""
    UNKNOWN_KIND = "unknown-kind"
    OVERSIZED = "oversized"
    SIGNATURE = "signature"
    MALFORMED = "malformed"
    TABLE_FULL = "table-full"

    @property
    def blames_sender(self) -> bool:
        """Whether no honest peer could have passed the notice on: each checks before it holds."""
        return self in (Verdict.OVERSIZED, Verdict.SIGNATURE, Verdict.MALFORMED)


@dataclass(frozen=True, slots=True)
class TableStatistics:
    """A snapshot for status and metrics."""

    authors: int
    notices: int
    bytes_held: int
    incarnation_jumps: int
    """Times a newer notice of our own came back: a restored backup, or our key in use elsewhere."""


@dataclass(frozen=True, slots=True)
class _Register:
    notice: Notice
    body: Message
    key: bytes
    """As Versions has it."""
    stamp: bytes

    @property
    def wire_bytes(self) -> int:
        return len(self.notice.body) + NOTICE_OVERHEAD_BYTES


class NoticeTable:
    """The registers one node holds for one run.

    ``incarnation`` must be greater than in any earlier life of this identity; the node keeps a counter on
    disk. Should a newer notice of ours come back nevertheless, the table jumps above it and signs again.
    """

    def __init__(self, *, signer: Signer, run: bytes, incarnation: int, limits: Limits) -> None:
        self._signer = signer
        self._run = run
        self._incarnation = incarnation
        self._incarnation_jumps = 0
        self._sequence = 0
        self._limits = limits
        self._registers: dict[Key, _Register] = {}
        self._heard_s: dict[PeerId, float] = {}
        self._said: dict[str, Message] = {}
        self._heeding: list[Callable[[PeerId, str], None]] = []
        self._key_of: dict[bytes, Key] = {}
        self._versions = _Versions()
        self._refused: dict[bytes, bytes] = {}
        """Key -> stamp of notices whose kind is not known here."""
        self._digest: bytes | None = None

    # --- what we say ------------------------------------------------------------------------------------------

    @property
    def incarnation(self) -> int:
        """The incarnation our notices carry now; worth remembering on disk, as it may have jumped."""
        return self._incarnation

    def publish(self, kind: str, body: Message) -> Notice:
        """Sign ``body`` as our newest word on ``kind`` and hold it. Raises ValueError when it is too large."""
        assert type(body) is NOTICE_BODIES[kind]
        self._sequence += 1
        unsigned = Notice(
            author=self._signer.peer,
            kind=kind,
            incarnation=self._incarnation,
            sequence=self._sequence,
            body=encode(body),
            signature=bytes(64),
        )
        notice = replace(unsigned, signature=self._signer.sign(PURPOSE, _claim_of(self._run, unsigned)))
        if self._oversized(notice):
            raise ValueError(f"a {kind} notice of {len(notice.body)} bytes is more than peers accept")
        self._said[kind] = body
        self._hold(notice, body)
        return notice

    # --- what others say --------------------------------------------------------------------------------------

    def offer(self, notice: Notice, now_s: float) -> Verdict:
        """Check a notice from anywhere and hold it when it is newer than what is held."""
        body_type = NOTICE_BODIES.get(notice.kind)
        author = PeerId(notice.author)
        if body_type is None:
            if len(self._refused) == REFUSED_KEYS_KEPT:
                del self._refused[next(iter(self._refused))]
            self._refused[_register_key(author, notice.kind)] = _stamp_of(notice)
            return Verdict.UNKNOWN_KIND
        if self._oversized(notice):
            return Verdict.OVERSIZED
        held = self._registers.get((author, notice.kind))
        if held is not None and _stamp_of(notice) <= held.stamp:
            return Verdict.KNOWN
        if not self._signer.verify(author, PURPOSE, _claim_of(self._run, notice), notice.signature):
            return Verdict.SIGNATURE
        try:
            body = decode(notice.body, body_type, bytes_max=self._limits.notice_bytes_max)
        except MalformedMessage:
            return Verdict.MALFORMED
        if not self._make_room(author, now_s):
            return Verdict.TABLE_FULL
        self._hold(notice, body)
        if author != self._signer.peer:
            self._heard_s[author] = now_s
        elif notice.incarnation >= self._incarnation:
            self._rise_above(notice.incarnation)
        return Verdict.ACCEPTED

    def _oversized(self, notice: Notice) -> bool:
        size = len(notice.body)
        return size > NOTICE_BODY_BYTES_MAX or size + NOTICE_OVERHEAD_BYTES > self._limits.notice_bytes_max

    def _make_room(self, author: PeerId, now_s: float) -> bool:
        # One of the members_max places is ours.
        if author in self._heard_s or author == self._signer.peer:
            return True
        if len(self._heard_s) < self._limits.members_max - 1:
            return True
        quietest = min(self._heard_s, key=self._heard_s.__getitem__)
        if now_s - self._heard_s[quietest] < AUTHOR_SILENCE_S:
            return False
        del self._heard_s[quietest]
        for name in [name for name in self._registers if name[0] == quietest]:
            key = self._registers.pop(name).key
            del self._key_of[key]
            self._versions.drop(key)
            self._changed(name)
        return True

    def _rise_above(self, incarnation: int) -> None:
        self._incarnation = incarnation + 1
        self._incarnation_jumps += 1
        for kind, body in list(self._said.items()):
            self.publish(kind, body)

    def _hold(self, notice: Notice, body: Message) -> None:
        name = PeerId(notice.author), notice.kind
        held = self._registers.get(name)
        key = held.key if held is not None else _register_key(*name)
        stamp = _stamp_of(notice)
        self._registers[name] = _Register(notice, body, key, stamp)
        self._key_of[key] = name
        self._versions.put(key, stamp)
        self._changed(name)

    def _changed(self, name: Key) -> None:
        self._digest = None
        for heed in self._heeding:
            heed(*name)

    # --- what is held -----------------------------------------------------------------------------------------

    def get(self, author: PeerId, kind: str) -> Notice | None:
        """The newest notice held of ``author`` on ``kind``."""
        register = self._registers.get((author, kind))
        return register.notice if register is not None else None

    def body_of(self, author: PeerId, kind: str, body_type: type[Body]) -> Body | None:
        """The decoded body of the newest notice of ``author`` on ``kind``."""
        register = self._registers.get((author, kind))
        if register is None:
            return None
        assert isinstance(register.body, body_type)
        return register.body

    def __len__(self) -> int:
        """Registers held."""
        return len(self._registers)

    def authors(self) -> list[PeerId]:
        """Everyone with a notice in the table, sorted; ourselves included once we have said something."""
        return sorted({author for author, _ in self._registers})

    def count_authors(self) -> int:
        """How many ``authors`` there are."""
        own = any((self._signer.peer, kind) in self._registers for kind in NOTICE_BODIES)
        return len(self._heard_s) + own

    def on_change(self, heed: Callable[[PeerId, str], None]) -> None:
        """Have ``heed(author, kind)`` called whenever a register has changed: at once for each that is held.

        A dropped register has changed too: there is no notice then. ``heed`` must neither block nor publish.
        """
        self._heeding.append(heed)
        for author, kind in list(self._registers):
            heed(author, kind)

    def statistics(self) -> TableStatistics:
        """Counts and sizes now."""
        return TableStatistics(
            authors=self.count_authors(),
            notices=len(self._registers),
            bytes_held=sum(register.wire_bytes for register in self._registers.values()),
            incarnation_jumps=self._incarnation_jumps,
        )

    # --- reconciling with another table -----------------------------------------------------------------------

    def versions(self) -> bytes:
        """Key and stamp of every register, ascending by key: what Versions carries."""
        return self._versions.to_bytes()

    def digest(self) -> bytes:
        """32 bytes, equal exactly when the tables are: BLAKE3 of ``versions``."""
        if self._digest is None:
            self._digest = blake3(self.versions()).digest()
        return self._digest

    def missing_from(self, theirs: Mapping[bytes, bytes]) -> list[Notice]:
        """The notices we hold that a table with stamps ``theirs`` by key lacks or holds older."""
        stamp_at = theirs.get
        return self.held([key for key, stamp in self._versions.stamps.items() if stamp_at(key, b"") < stamp])

    def wanted_from(self, theirs: Mapping[bytes, bytes]) -> list[bytes]:
        """The keys of ``theirs`` whose stamps are newer than what we hold, or refused for its kind."""
        stamp_at = self._versions.stamps.get
        newer = [key for key, stamp in theirs.items() if stamp_at(key, b"") < stamp]
        return [key for key in newer if self._refused.get(key, b"") < theirs[key]]

    def held(self, keys: Iterable[bytes]) -> list[Notice]:
        """The notices of these keys, as far as they are held."""
        names = (self._key_of.get(key) for key in keys)
        return [self._registers[name].notice for name in names if name is not None]


class _Versions:
    """Keys and stamps of the registers, kept in the order and the form in which they travel.

    Tables of thousands are compared many times a second, and few of their registers change in between.
    """

    def __init__(self) -> None:
        self.stamps: dict[bytes, bytes] = {}
        self._keys: list[bytes] = []
        self._rows = bytearray()

    def put(self, key: bytes, stamp: bytes) -> None:
        """Add a register, or replace its stamp."""
        at = bisect_left(self._keys, key)
        end = at
        if key in self.stamps:
            end += 1
        else:
            self._keys.insert(at, key)
        self._rows[at * ROW_BYTES : end * ROW_BYTES] = key + stamp
        self.stamps[key] = stamp

    def drop(self, key: bytes) -> None:
        """Remove a register."""
        at = bisect_left(self._keys, key)
        del self.stamps[key], self._keys[at], self._rows[at * ROW_BYTES : (at + 1) * ROW_BYTES]

    def to_bytes(self) -> bytes:
        """All rows, ascending by key."""
        return bytes(self._rows)


def parse_versions(registers: bytes) -> dict[bytes, bytes]:
    """Key -> stamp of what Versions carries. Raises MalformedMessage unless it is whole and ascending."""
    if len(registers) % ROW_BYTES:
        raise MalformedMessage(f"{len(registers)} bytes of versions, {ROW_BYTES} each")
    stamps = dict(_ROW.iter_unpack(registers))
    keys = list(stamps)
    if len(keys) * ROW_BYTES != len(registers) or keys != sorted(keys):
        raise MalformedMessage("versions not sorted, or named twice")
    return stamps


def parse_keys(want: bytes) -> list[bytes]:
    """The keys that Swap wants. Raises MalformedMessage unless they are whole."""
    if len(want) % REGISTER_KEY_BYTES:
        raise MalformedMessage(f"{len(want)} bytes of keys, {REGISTER_KEY_BYTES} each")
    return [want[at : at + REGISTER_KEY_BYTES] for at in range(0, len(want), REGISTER_KEY_BYTES)]


def _register_key(author: PeerId, kind: str) -> bytes:
    return blake3(f"{author}\0{kind}".encode()).digest(length=REGISTER_KEY_BYTES)


def _claim_of(run: bytes, notice: Notice) -> bytes:
    """What the signature of ``notice`` covers."""
    return encode(
        NoticeClaim(
            run=run,
            author=notice.author,
            kind=notice.kind,
            incarnation=notice.incarnation,
            sequence=notice.sequence,
            body=notice.body,
        )
    )


def _stamp_of(notice: Notice) -> bytes:
    numbers = notice.incarnation.to_bytes(8, "big") + notice.sequence.to_bytes(8, "big")
    return numbers + notice.signature[:8]
