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

import functools
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from blake3 import blake3
from msgspec.structs import replace

from gossip.messages import (
    NOTICE_BODIES,
    NOTICE_BODY_BYTES_MAX,
    PACKED_NOTICE_BYTES_MAX,
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

REFUSED_KEYS_KEPT = 1024
"""Registers of kinds that this version does not know: not asked for again with every round."""

ROW_BYTES = REGISTER_KEY_BYTES + REGISTER_STAMP_BYTES
"""What Versions says of one register: its key and its stamp."""
_ROW = struct.Struct(f"{ROW_BYTES}s")
KEYS_REMEMBERED = 1 << 14
"""Registers whose keys need not be worked out again: more than a table holds."""

Body = TypeVar("Body", bound=Message)
Heed = Callable[[PeerId, str, Message | None], None]
"""``heed(author, kind, body)``: what the register holds now, or None when it was dropped."""


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
class _Envelope:
    """A notice as it travels, and where it belongs."""

    packed: bytes
    notice: Notice
    key: bytes
    row: bytes
    """As Versions has it: key and stamp."""


@dataclass(frozen=True, slots=True)
class _Register:
    envelope: _Envelope
    body: Message


@dataclass(frozen=True, slots=True)
class Difference:
    """Between our table and another."""

    missing: list[bytes]
    """Notices that the other lacks or holds older, as they travel."""
    wanted: list[bytes]
    """Keys of registers of which the other holds something newer that we have not refused for its kind."""


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
        self._registers: dict[bytes, _Register] = {}
        """By key."""
        self._heard_s: dict[PeerId, float] = {}
        self._said: dict[str, Message] = {}
        self._heeding: list[Heed] = []
        self._versions = _Versions()
        self._refused: dict[bytes, bytes] = {}
        """Key -> row of notices whose kind is not known here."""

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
        packed = encode(notice)
        if len(packed) > self._limits.notice_bytes_max or len(notice.body) > NOTICE_BODY_BYTES_MAX:
            raise ValueError(f"a {kind} notice of {len(packed)} bytes is more than peers accept")
        self._said[kind] = body
        self._hold(_read(_open(packed)))
        return notice

    # --- what others say --------------------------------------------------------------------------------------

    def offer(self, packed: bytes, now_s: float) -> Verdict:
        """Check the bytes of a notice from anywhere and hold it when it is newer than what is held."""
        if len(packed) > self._limits.notice_bytes_max:
            return Verdict.OVERSIZED
        try:
            envelope = _open(packed)
        except MalformedMessage:
            return Verdict.MALFORMED
        notice, key = envelope.notice, envelope.key
        if notice.kind not in NOTICE_BODIES:
            if len(self._refused) == REFUSED_KEYS_KEPT:
                del self._refused[next(iter(self._refused))]
            self._refused[key] = envelope.row
            return Verdict.UNKNOWN_KIND
        held = self._registers.get(key)
        if held is not None and envelope.row <= held.envelope.row:
            return Verdict.KNOWN
        author = PeerId(notice.author)
        if not self._signer.verify(author, PURPOSE, _claim_of(self._run, notice), notice.signature):
            return Verdict.SIGNATURE
        try:
            register = _read(envelope)
        except MalformedMessage:
            return Verdict.MALFORMED
        if not self._make_room(author, now_s):
            return Verdict.TABLE_FULL
        self._hold(register)
        if author != self._signer.peer:
            self._heard_s[author] = now_s
        elif notice.incarnation >= self._incarnation:
            self._rise_above(notice.incarnation)
        return Verdict.ACCEPTED

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
        for kind in NOTICE_BODIES:
            if self._registers.pop(_register_key(quietest, kind), None) is not None:
                self._versions.drop(_register_key(quietest, kind))
                self._changed(quietest, kind, None)
        return True

    def _rise_above(self, incarnation: int) -> None:
        self._incarnation = incarnation + 1
        self._incarnation_jumps += 1
        for kind, body in list(self._said.items()):
            self.publish(kind, body)

    def _hold(self, register: _Register) -> None:
        envelope = register.envelope
        self._registers[envelope.key] = register
        self._versions.put(envelope.row)
        self._changed(PeerId(envelope.notice.author), envelope.notice.kind, register.body)

    def _changed(self, author: PeerId, kind: str, body: Message | None) -> None:
        for heed in self._heeding:
            heed(author, kind, body)

    # --- what is held -----------------------------------------------------------------------------------------

    def get(self, author: PeerId, kind: str) -> Notice | None:
        """The newest notice held of ``author`` on ``kind``."""
        register = self._registers.get(_register_key(author, kind))
        return register.envelope.notice if register is not None else None

    def verified(self, packed: bytes, body_type: type[Body]) -> tuple[PeerId, Body] | None:
        """Author and body of a notice that need not be the newest of its kind; None unless all of it is sound."""
        try:
            envelope = _open(packed)
            body = _read(envelope).body if envelope.notice.kind in NOTICE_BODIES else None
        except MalformedMessage:
            return None
        notice = envelope.notice
        author = PeerId(notice.author)
        if not isinstance(body, body_type):
            return None
        if not self._signer.verify(author, PURPOSE, _claim_of(self._run, notice), notice.signature):
            return None
        return author, body

    def packed(self, author: PeerId, kind: str) -> bytes | None:
        """The same as it travels."""
        register = self._registers.get(_register_key(author, kind))
        return register.envelope.packed if register is not None else None

    def body_of(self, author: PeerId, kind: str, body_type: type[Body]) -> Body | None:
        """The decoded body of the newest notice of ``author`` on ``kind``."""
        register = self._registers.get(_register_key(author, kind))
        if register is None:
            return None
        assert isinstance(register.body, body_type)
        return register.body

    def __len__(self) -> int:
        """Registers held."""
        return len(self._registers)

    def authors(self) -> list[PeerId]:
        """Everyone with a notice in the table, sorted; ourselves included once we have said something."""
        return sorted({PeerId(register.envelope.notice.author) for register in self._registers.values()})

    def count_authors(self) -> int:
        """How many ``authors`` there are."""
        ours = (_register_key(self._signer.peer, kind) for kind in NOTICE_BODIES)
        return len(self._heard_s) + any(key in self._registers for key in ours)

    def on_change(self, heed: Heed) -> None:
        """Have ``heed`` called whenever a register has changed, and at once for each that is held.

        It must neither block nor publish.
        """
        self._heeding.append(heed)
        for register in list(self._registers.values()):
            heed(PeerId(register.envelope.notice.author), register.envelope.notice.kind, register.body)

    def statistics(self) -> TableStatistics:
        """Counts and sizes now."""
        return TableStatistics(
            authors=self.count_authors(),
            notices=len(self._registers),
            bytes_held=sum(len(register.envelope.packed) for register in self._registers.values()),
            incarnation_jumps=self._incarnation_jumps,
        )

    # --- reconciling with another table -----------------------------------------------------------------------

    def versions(self) -> bytes:
        """Key and stamp of every register, ascending by key: what Versions carries."""
        return self._versions.to_bytes()

    def compare(self, registers: bytes) -> Difference:
        """What differs from a table of these ``versions``. Raises MalformedMessage unless whole and ascending."""
        rows = [row for (row,) in _ROW.iter_unpack(_whole(registers, ROW_BYTES))]
        theirs = set(rows)
        if len(theirs) < len(rows) or rows != sorted(rows):
            raise MalformedMessage("versions not sorted, or named twice")
        ours = {register.envelope.row for register in self._registers.values()}
        # Most rows are equal, and drop out here. What is left is looked at one by one.
        we_hold = {row[:REGISTER_KEY_BYTES]: row for row in sorted(ours - theirs)}
        they_hold = {row[:REGISTER_KEY_BYTES]: row for row in sorted(theirs - ours)}
        return Difference(
            missing=self.held(key for key, row in we_hold.items() if they_hold.get(key, b"") < row),
            wanted=[
                key
                for key, row in they_hold.items()
                if we_hold.get(key, b"") < row and self._refused.get(key, b"") < row
            ],
        )

    def held(self, keys: Iterable[bytes]) -> list[bytes]:
        """The notices of these keys as they travel, as far as they are held."""
        registers = (self._registers.get(key) for key in keys)
        return [register.envelope.packed for register in registers if register is not None]


class _Versions:
    """The rows of the registers, kept in the order and the form in which they travel.

    Tables of thousands are compared many times a second, and few of their registers change in between.
    """

    def __init__(self) -> None:
        self._keys: list[bytes] = []
        self._rows = bytearray()

    def put(self, row: bytes) -> None:
        """Add a register, or replace its stamp."""
        key = row[:REGISTER_KEY_BYTES]
        at, held = self._place(key)
        if not held:
            self._keys.insert(at, key)
        self._rows[at * ROW_BYTES : (at + held) * ROW_BYTES] = row

    def drop(self, key: bytes) -> None:
        """Remove a register that is held."""
        at, _ = self._place(key)
        del self._keys[at], self._rows[at * ROW_BYTES : (at + 1) * ROW_BYTES]

    def _place(self, key: bytes) -> tuple[int, bool]:
        at = bisect_left(self._keys, key)
        return at, at < len(self._keys) and self._keys[at] == key

    def to_bytes(self) -> bytes:
        """All rows, ascending by key."""
        return bytes(self._rows)


def parse_keys(want: bytes) -> list[bytes]:
    """The keys that Swap wants. Raises MalformedMessage unless they are whole."""
    _whole(want, REGISTER_KEY_BYTES)
    return [want[at : at + REGISTER_KEY_BYTES] for at in range(0, len(want), REGISTER_KEY_BYTES)]


def _whole(data: bytes, unit_bytes: int) -> bytes:
    if len(data) % unit_bytes:
        raise MalformedMessage(f"{len(data)} bytes of what takes {unit_bytes} each")
    return data


@functools.lru_cache(maxsize=KEYS_REMEMBERED)
def _register_key(author: PeerId, kind: str) -> bytes:
    return blake3(f"{author}\0{kind}".encode()).digest(length=REGISTER_KEY_BYTES)


# Everything below depends on nothing but its arguments and gives what is never changed: a simulation of a thousand
# members has each notice worked out once for all of them (netsim.sharing).


def _open(packed: bytes) -> _Envelope:
    """Raises MalformedMessage."""
    notice = decode(packed, Notice, bytes_max=PACKED_NOTICE_BYTES_MAX)
    key = _register_key(PeerId(notice.author), notice.kind)
    numbers = notice.incarnation.to_bytes(8, "big") + notice.sequence.to_bytes(8, "big")
    return _Envelope(packed, notice, key, key + numbers + notice.signature[:8])


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


def _read(envelope: _Envelope) -> _Register:
    """Raises MalformedMessage unless the body is one of its kind."""
    notice = envelope.notice
    body_type = NOTICE_BODIES[notice.kind]
    return _Register(envelope, decode(notice.body, body_type, bytes_max=NOTICE_BODY_BYTES_MAX))
