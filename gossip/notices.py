"""The table of signed registers that spreads everything small: who is here, what they offer, how far they are.

Owns the registers, the order between versions of one register, and the checks a notice passes before it is
held. Never sends anything and never reads a clock: ``gossip.anti_entropy`` reconciles tables over the network.
Relies on ``Signer`` for signatures and on the caller to pass the time.

A register is keyed by (author, kind) and ordered by (incarnation, sequence, check); the greatest wins. Merging
two tables is therefore commutative, associative and idempotent (a map of last-writer-wins registers: Shapiro
et al., "A comprehensive study of Convergent and Commutative Replicated Data Types", 2011, section 3.2), so
tables that have seen the same notices are equal whatever the order, grouping or repetition.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

import trio
from blake3 import blake3
from msgspec.structs import replace

from gossip.messages import (
    NOTICE_BODIES,
    NOTICE_BODY_BYTES_MAX,
    Message,
    Notice,
    NoticeClaim,
    Version,
    Versions,
)
from p2p.codec import decode, encode
from p2p.errors import MalformedMessage
from p2p.identity import Signer
from p2p.limits import Limits
from p2p.transport import PeerId

PURPOSE = "gossamer/notice/1"
AUTHOR_SILENCE_S = 600.0
"""An author unheard for this long gives up its place when the table is full and a new author asks."""

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
    version: Version
    wire_bytes: int


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
        self._feeds: set[ChangeFeed] = set()
        self._versions: list[Version] | None = None
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
        notice = replace(unsigned, signature=self._signer.sign(PURPOSE, self._claim_bytes(unsigned)))
        wire = encode(notice)
        if len(notice.body) > NOTICE_BODY_BYTES_MAX or len(wire) > self._limits.notice_bytes_max:
            raise ValueError(f"a {kind} notice of {len(wire)} bytes is more than peers accept")
        self._said[kind] = body
        self._hold(_Register(notice, body, _version_of(notice, wire), len(wire)))
        return notice

    # --- what others say --------------------------------------------------------------------------------------

    def offer(self, notice: Notice, now_s: float) -> Verdict:
        """Check a notice from anywhere and hold it when it is newer than what is held."""
        body_type = NOTICE_BODIES.get(notice.kind)
        if body_type is None:
            return Verdict.UNKNOWN_KIND
        wire = encode(notice)
        if len(wire) > self._limits.notice_bytes_max:
            return Verdict.OVERSIZED
        author = PeerId(notice.author)
        version = _version_of(notice, wire)
        held = self._registers.get((author, notice.kind))
        if held is not None and _stamp(version) <= _stamp(held.version):
            return Verdict.KNOWN
        if not self._signer.verify(author, PURPOSE, self._claim_bytes(notice), notice.signature):
            return Verdict.SIGNATURE
        try:
            body = decode(notice.body, body_type, bytes_max=self._limits.notice_bytes_max)
        except MalformedMessage:
            return Verdict.MALFORMED
        if not self._make_room(author, now_s):
            return Verdict.TABLE_FULL
        self._hold(_Register(notice, body, version, len(wire)))
        if author != self._signer.peer:
            self._heard_s[author] = now_s
        elif notice.incarnation >= self._incarnation:
            self._rise_above(notice.incarnation)
        return Verdict.ACCEPTED

    def _claim_bytes(self, notice: Notice) -> bytes:
        return encode(
            NoticeClaim(
                run=self._run,
                author=notice.author,
                kind=notice.kind,
                incarnation=notice.incarnation,
                sequence=notice.sequence,
                body=notice.body,
            )
        )

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
        for key in [key for key in self._registers if key[0] == quietest]:
            del self._registers[key]
            self._changed(key)
        return True

    def _rise_above(self, incarnation: int) -> None:
        self._incarnation = incarnation + 1
        self._incarnation_jumps += 1
        for kind, body in list(self._said.items()):
            self.publish(kind, body)

    def _hold(self, register: _Register) -> None:
        key = (PeerId(register.notice.author), register.notice.kind)
        self._registers[key] = register
        self._changed(key)

    def _changed(self, key: Key) -> None:
        self._versions = self._digest = None
        for feed in self._feeds:
            feed._push(key)

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

    def authors(self) -> list[PeerId]:
        """Everyone with a notice in the table, sorted; ourselves included once we have said something."""
        return sorted({author for author, _ in self._registers})

    @contextmanager
    def changes(self) -> Iterator[ChangeFeed]:
        """Follow the table: everything held now counts as changed, then whatever changes while inside."""
        feed = ChangeFeed(self._registers)
        self._feeds.add(feed)
        try:
            yield feed
        finally:
            self._feeds.remove(feed)

    def statistics(self) -> TableStatistics:
        """Counts and sizes now."""
        return TableStatistics(
            authors=len(self.authors()),
            notices=len(self._registers),
            bytes_held=sum(register.wire_bytes for register in self._registers.values()),
            incarnation_jumps=self._incarnation_jumps,
        )

    # --- reconciling with another table -----------------------------------------------------------------------

    def versions(self) -> list[Version]:
        """The version of every register, sorted by (author, kind)."""
        if self._versions is None:
            self._versions = [self._registers[key].version for key in sorted(self._registers)]
        return self._versions

    def digest(self) -> bytes:
        """32 bytes, equal exactly when the tables are: BLAKE3 of the canonical Versions message."""
        if self._digest is None:
            self._digest = blake3(encode(Versions(versions=self.versions()))).digest()
        return self._digest

    def missing_from(self, theirs: Sequence[Version]) -> list[Notice]:
        """The notices we hold that a table with versions ``theirs`` lacks or holds older."""
        stamps = {(version.author, version.kind): _stamp(version) for version in theirs}
        return [
            register.notice
            for key, register in self._registers.items()
            if key not in stamps or stamps[key] < _stamp(register.version)
        ]

    def wanted_from(self, theirs: Sequence[Version]) -> list[Version]:
        """Those of ``theirs`` that are of a known kind and newer than ours."""
        return [
            version
            for version in theirs
            if version.kind in NOTICE_BODIES
            and (
                (held := self._registers.get((PeerId(version.author), version.kind))) is None
                or _stamp(held.version) < _stamp(version)
            )
        ]


class ChangeFeed:
    """The keys of changed registers, each once however often it changed: never longer than the table.

    An async iterator for one reader; a slow reader skips intermediate versions and loses nothing else.
    """

    def __init__(self, keys: Iterable[Key]) -> None:
        self._pending = dict.fromkeys(keys)
        self._changed = trio.Event()

    def _push(self, key: Key) -> None:
        self._pending[key] = None
        self._changed.set()

    def __aiter__(self) -> AsyncIterator[Key]:
        return self

    async def __anext__(self) -> Key:
        while not self._pending:
            self._changed = trio.Event()
            await self._changed.wait()
        await trio.lowlevel.checkpoint()
        key = next(iter(self._pending))
        del self._pending[key]
        return key


def _version_of(notice: Notice, wire: bytes) -> Version:
    return Version(
        author=notice.author,
        kind=notice.kind,
        incarnation=notice.incarnation,
        sequence=notice.sequence,
        check=blake3(wire).digest(length=8),
    )


def _stamp(version: Version) -> tuple[int, int, bytes]:
    return version.incarnation, version.sequence, version.check
