"""One log of records as a node holds it: a chain of batches without gaps, how many of them count, and where it ends.

Owns the arithmetic between a batch's number, its place in what is held and the records up to it, and the two forms in
which others are told how far a log goes: a row of a version vector and an entry of a settlement. Decides nothing: which
batches count is for ``gossip.record_logs`` to say.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from gossip.messages import HEAD_ROW_BYTES, LOG_NAME_BYTES, SettledLog
from gossip.record_batches import Batch
from p2p.errors import MalformedMessage
from p2p.transport import PeerId

_ROW = struct.Struct(f">{LOG_NAME_BYTES}sQ32sB")


@dataclass(frozen=True, slots=True)
class Head:
    """How far a log goes: an entry of a version vector."""

    log: bytes
    number: int
    """Batches."""
    name: bytes
    """Of the last batch."""
    forked: bool

    @property
    def row(self) -> bytes:
        """As it travels (``gossip.messages.Heads``)."""
        return _ROW.pack(self.log, self.number, self.name, self.forked)


@dataclass(slots=True, eq=False)
class Log:
    """What one node holds of one log. Numbers count batches from the first that there ever was."""

    name: bytes
    author: PeerId
    incarnation: int
    base: Batch | None = None
    """The last batch that is not held any more, without its records; None where the first one still is."""
    chain: list[Batch] = field(default_factory=list)
    """What is held after that."""
    counting: int = 0
    """How many batches count, those before the chain among them."""
    final: int = 0
    """How many batches of it no fork can take back."""
    rivals: tuple[bytes, bytes] | None = None
    """Two packed batches that would both go on from the end of the chain: the proof that the log is forked."""
    exposed: bool = False
    """Whether a fork below ``final`` was seen: its author need not be blamed for every copy of it."""

    @property
    def start(self) -> int:
        """Batches before the chain."""
        return 0 if self.base is None else self.base.number + 1

    @property
    def length(self) -> int:
        """All batches up to the end of the chain."""
        return self.start + len(self.chain)

    def batch(self, number: int) -> Batch:
        """Batch ``number``, which must be held or be the base."""
        if number < self.start:
            assert self.base is not None
            return self.base
        return self.chain[number - self.start]

    def end(self, number: int) -> int:
        """Records of its first ``number`` batches."""
        return self.batch(number - 1).end if number else 0

    def between(self, first: int, number: int) -> list[Batch]:
        """Batches from ``first`` up to ``number``."""
        return self.chain[first - self.start : number - self.start]

    @property
    def head(self) -> Head:
        """How far it goes."""
        name = self.batch(self.length - 1).name if self.length else bytes(32)
        return Head(self.name, self.length, name, self.rivals is not None)

    # --- settlements ----------------------------------------------------------------------------------------------

    @property
    def settled(self) -> SettledLog:
        """What counts of it, as a snapshot names it."""
        last = self.batch(self.counting - 1)
        return SettledLog(
            author=self.author,
            incarnation=self.incarnation,
            number=self.counting,
            end=last.end,
            clock=last.clock,
            name=last.name,
        )

    def holds(self, entry: SettledLog) -> bool:
        """Whether this log could be taken back to where ``entry`` ends, and is the one that ends there."""
        if not self.start <= entry.number <= self.length:
            return False
        return self.batch(entry.number - 1).name == entry.name

    def begin_after(self, entry: SettledLog) -> list[Batch]:
        """Hold no batch that ``entry`` holds; returns those that were, and their base."""
        let_go = self.between(self.start, entry.number)
        if self.base is not None:
            let_go.append(self.base)
        del self.chain[: entry.number - self.start]
        self.base = Batch(
            name=entry.name,
            log=self.name,
            author=self.author,
            incarnation=self.incarnation,
            number=entry.number - 1,
            first=entry.end,
            clock=entry.clock,
            records=b"",
            previous=None,
            packed=b"",
        )
        return let_go


def parse_rows(rows: bytes) -> list[Head]:
    """The version vector in ``rows``. Raises MalformedMessage unless every row is whole, sound and in its place."""
    if len(rows) % HEAD_ROW_BYTES:
        raise MalformedMessage(f"{len(rows)} bytes of rows that take {HEAD_ROW_BYTES} each")
    heads: list[Head] = []
    for at in range(0, len(rows), HEAD_ROW_BYTES):
        log, number, name, flag = _ROW.unpack_from(rows, at)
        if flag > 1 or (number == 0 and not flag) or (heads and heads[-1].log >= log):
            raise MalformedMessage("a version vector that no table has")
        heads.append(Head(log, number, name, bool(flag)))
    return heads
