"""The records of a run that one node holds, and which of them count: a pure function of what it holds.

Owns the logs, the proofs that some of them are forked, and the rule by which batches are applied. It never sends
anything, never reads a clock and never touches weights: whoever asks is told which batches came to count and which no
longer do.

A log is a chain of batches, held without gaps. Which of them count is decided by what is held alone, never by the order
in which it came:

* **Forks.** Two batches after the same one prove that their author signed two histories. The log ends before them, at
  everyone who holds the proof, and what counted beyond is taken back. Below ``final`` a log no longer changes.
* **Clocks.** A batch counts once those before it do and as many records are applied, less ``reach``, as its clock says.
  More records never make a batch stop counting, so there is one greatest set of batches that count, whatever the order.
* **Openings.** The logs that one author opened, by clock and incarnation, count from the moment that enough records are
  applied, less ``reach``: opening logs without end buys no room.

Two tables merge by offering each what the other holds, which is commutative, associative and idempotent: a replicated
set with a deterministic view (Shapiro et al., "Conflict-free replicated data types", SSS 2011).

Relies on: ``gossip.record_batches`` for what a batch must be.
"""

from __future__ import annotations

import heapq
import itertools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from blake3 import blake3

from gossip.messages import BATCHES_PER_MESSAGE_MAX, HEAD_ROW_BYTES, LOG_NAME_BYTES, LOGS_MAX, FirstBatch
from gossip.record_batches import Batch, LogRules, check, log_name, name_of, parse
from p2p.errors import MalformedMessage
from p2p.identity import Signer
from p2p.transport import PeerId

WAITING_PER_LOG_MAX = 16
"""Batches of one log that are held although they do not count yet; the rest is asked for when they do."""


_ROW = struct.Struct(f">{LOG_NAME_BYTES}sQ32sB")


class Offer(StrEnum):
    """What became of an offered batch; faults of ``record_batches.Fault`` besides."""

    ACCEPTED = "accepted"
    KNOWN = "known"
    """Held already, or of a log that ends before it."""
    FORK = "fork"
    """It proves that its log is forked."""
    ORPHAN = "orphan"
    """The batch before it is not held: it must be asked for first."""
    WAITING = "waiting"
    """Too many batches of its log wait to count; not held."""
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Head:
    """How far a log goes: an entry of a version vector."""

    log: bytes
    number: int
    """Batches."""
    name: bytes
    """Of the last batch."""
    forked: bool


@dataclass(slots=True, eq=False)
class _Log:
    name: bytes
    author: PeerId
    incarnation: int
    chain: list[Batch] = field(default_factory=list)
    counting: int = 0
    """How many batches of the chain count."""
    rivals: tuple[bytes, bytes] | None = None
    """Two packed batches that would both go on from the end of the chain: the proof that the log is forked."""

    @property
    def opened(self) -> tuple[int, int]:
        """In what order the logs of an author were opened. One that is forked from the start came first."""
        return (self.chain[0].clock if self.chain else 0), self.incarnation


class RecordLogs:
    """All logs of one run that a node holds."""

    def __init__(self, *, run: bytes, signer: Signer, rules: LogRules) -> None:
        self._run = run
        self._signer = signer
        self._rules = rules
        self._logs: dict[bytes, _Log] = {}
        self._batches: dict[bytes, Batch] = {}
        """By name: every batch of every chain."""
        self._opened: dict[PeerId, list[_Log]] = {}
        """What each author opened, in that order."""
        self._waiting: list[tuple[int, bytes]] = []
        """A heap of (records that must be applied, log): the first batch of each log that does not count yet."""
        self._come: dict[bytes, Batch] = {}
        self._gone: dict[bytes, Batch] = {}
        self.records = 0
        """Records that count: the clock of what is made here next."""

    # --- what is offered ----------------------------------------------------------------------------------------

    def offer(self, packed: bytes) -> tuple[Offer, bytes]:
        """Hold a batch from anywhere, if it belongs here; returns also the name of its log, where that can be told.

        Raises InvalidBatch for one that is valid nowhere.
        """
        message = parse(packed)
        held = self._batches.get(name_of(self._run, message))
        if held is not None:
            return Offer.KNOWN, held.log
        before = None
        if isinstance(message, FirstBatch):
            log = self._logs.get(log_name(self._run, PeerId(message.author), message.incarnation))
            if log is None and len(self._logs) >= LOGS_MAX:
                return Offer.FULL, b""
        else:
            before = self._batches.get(message.previous)
            if before is None:
                return Offer.ORPHAN, b""
            log = self._logs[before.log]
        place = 0 if before is None else before.number + 1
        if log is not None and place == len(log.chain):
            if log.rivals is not None:
                return Offer.KNOWN, log.name
            if len(log.chain) - log.counting >= WAITING_PER_LOG_MAX:
                return Offer.WAITING, log.name
        batch = check(self._run, packed, message, before, self._rules, self._signer)
        if log is None:
            self._open(batch)
        elif place < len(log.chain):
            self._cut(log, place, batch)
            return Offer.FORK, log.name
        else:
            self._extend(log, batch)
        return Offer.ACCEPTED, batch.log

    def _open(self, batch: Batch) -> None:
        log = _Log(batch.log, batch.author, batch.incarnation, [batch])
        self._logs[log.name] = log
        self._batches[batch.name] = batch
        opened = self._opened.setdefault(log.author, [])
        opened.append(log)
        if log.opened == max(other.opened for other in opened):
            self._wait(log, len(opened) - 1)
            self._count_more()
        else:
            self._count_again()

    def _extend(self, log: _Log, batch: Batch) -> None:
        log.chain.append(batch)
        self._batches[batch.name] = batch
        if log.counting == len(log.chain) - 1:
            self._wait(log, self._rank(log))
            self._count_more()

    def _cut(self, log: _Log, place: int, rival: Batch) -> None:
        """End ``log`` before ``place``, where it holds another batch than ``rival``."""
        log.rivals = log.chain[place].packed, rival.packed
        self._count(log, min(log.counting, place))
        for batch in log.chain[place:]:
            del self._batches[batch.name]
        del log.chain[place:]
        self._count_again()

    # --- which batches count --------------------------------------------------------------------------------------

    def _rank(self, log: _Log) -> int:
        """How many logs its author opened before it."""
        return sum(other.opened < log.opened for other in self._opened[log.author])

    def _need(self, log: _Log, rank: int, number: int) -> int:
        """How many records must be applied before batch ``number`` of ``log`` counts."""
        return max(log.chain[number].clock, rank * self._rules.opening_cost) - self._rules.reach

    def _wait(self, log: _Log, rank: int) -> None:
        heapq.heappush(self._waiting, (self._need(log, rank, log.counting), log.name))

    def _count_more(self) -> None:
        """Let every batch count whose turn it is, now that something was added."""
        while self._waiting and self._waiting[0][0] <= self.records:
            log = self._logs[heapq.heappop(self._waiting)[1]]
            self._count(log, log.counting + 1)
            if log.counting < len(log.chain):
                self._wait(log, self._rank(log))

    def _count_again(self) -> None:
        """Work out from nothing what counts, after something was taken away."""
        counting = dict.fromkeys(self._logs, 0)
        ranks = {
            log.name: rank
            for opened in self._opened.values()
            for rank, log in enumerate(sorted(opened, key=lambda log: log.opened))
        }
        records = 0
        waiting = [
            (self._need(log, ranks[log.name], 0), log.name) for log in self._logs.values() if log.chain
        ]
        heapq.heapify(waiting)
        while waiting and waiting[0][0] <= records:
            log = self._logs[heapq.heappop(waiting)[1]]
            records += len(log.chain[counting[log.name]].records)
            counting[log.name] += 1
            if counting[log.name] < len(log.chain):
                heapq.heappush(waiting, (self._need(log, ranks[log.name], counting[log.name]), log.name))
        for log in self._logs.values():
            self._count(log, counting[log.name])
        self._waiting = waiting

    def _count(self, log: _Log, number: int) -> None:
        """Let the first ``number`` batches of ``log`` count, and no more."""
        for batch in log.chain[number : log.counting]:
            self.records -= len(batch.records)
            if self._come.pop(batch.name, None) is None:
                self._gone[batch.name] = batch
        for batch in log.chain[log.counting : number]:
            self.records += len(batch.records)
            if self._gone.pop(batch.name, None) is None:
                self._come[batch.name] = batch
        log.counting = number

    def take_changes(self) -> tuple[list[Batch], list[Batch]]:
        """The batches that came to count since the last call, and those that no longer do."""
        come, gone = list(self._come.values()), list(self._gone.values())
        self._come.clear()
        self._gone.clear()
        return come, gone

    # --- what is held ---------------------------------------------------------------------------------------------

    def heads(self) -> list[Head]:
        """The version vector: every log, by name. Tables with equal vectors hold the same and count the same."""
        return [self._head(log) for _, log in sorted(self._logs.items())]

    def lacks(self, head: Head) -> bool:
        """Whether another table with this ``head`` holds something that this one does not."""
        held = self._logs.get(head.log)
        if held is None:
            return True
        if head.forked and (held.rivals is None or head.number < len(held.chain)):
            return True
        if held.rivals is not None and head.number > len(held.chain):
            return (
                False  # what goes on after a fork counts nowhere; it is the other side that lacks the proof
            )
        return head.number > 0 and head.name not in self._batches

    def head(self, log: bytes) -> Head | None:
        """How far one log goes."""
        held = self._logs.get(log)
        return None if held is None else self._head(held)

    def _head(self, log: _Log) -> Head:
        name = log.chain[-1].name if log.chain else bytes(32)
        return Head(log.name, len(log.chain), name, log.rivals is not None)

    def proof(self, log: bytes) -> tuple[PeerId, tuple[bytes, ...]]:
        """The author of a log, and the two batches that prove it forked, or none."""
        held = self._logs[log]
        return held.author, held.rivals or ()

    def last(self, log: bytes) -> Batch | None:
        """The last batch of a log: what its author goes on from."""
        held = self._logs.get(log)
        return held.chain[-1] if held is not None and held.chain else None

    @property
    def waiting(self) -> int:
        """Records that are held and do not count yet."""
        return sum(len(batch.records) for log in self._logs.values() for batch in log.chain[log.counting :])

    def counting(self) -> Iterator[Batch]:
        """Every batch that counts."""
        for log in self._logs.values():
            yield from log.chain[: log.counting]

    def batches(self) -> Iterator[Batch]:
        """Every batch that is held, those of a log in order."""
        for log in self._logs.values():
            yield from log.chain

    def after(self, log: bytes, names: Sequence[bytes], bytes_max: int) -> list[bytes]:
        """What goes on from the last batch of ``log`` among ``names``: packed, in order, as much as fits.

        ``names`` tells what the other side holds of it. Where the log ends in a fork, the proof comes last.
        """
        held = self._logs.get(log)
        if held is None:
            return []
        common = max((self._batches[name].number for name in names if name in self._batches), default=-1)
        packed = [batch.packed for batch in held.chain[common + 1 :]]
        packed += held.rivals or ()
        sizes = itertools.accumulate(map(len, packed))
        some = [item for item, size in zip(packed, sizes, strict=True) if size <= bytes_max]
        return some[:BATCHES_PER_MESSAGE_MAX]

    def skeleton(self, log: bytes) -> list[bytes]:
        """Names of batches from the last one back, ever further apart: enough to find where two histories part."""
        held = self._logs.get(log)
        if held is None:
            return []
        back = [0, *(1 << exponent for exponent in range(len(held.chain).bit_length()))]
        return [held.chain[-1 - steps].name for steps in back if steps < len(held.chain)]

    def rows(self) -> bytes:
        """The version vector as it travels (``gossip.messages.Heads``)."""
        return b"".join(
            head.log + head.number.to_bytes(8, "big") + head.name + bytes([head.forked])
            for head in self.heads()
        )

    def digest(self) -> bytes:
        """BLAKE3 of the version vector, 32 bytes."""
        return blake3(self.rows()).digest()


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
