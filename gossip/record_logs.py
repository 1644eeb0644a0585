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
* **Openings.** The logs that one author opened, by incarnation, count from the moment that enough records are
  applied, less ``reach``: opening logs without end buys no room.

Two tables merge by offering each what the other holds, which is commutative, associative and idempotent: a replicated
set with a deterministic view (Shapiro et al., "Conflict-free replicated data types", SSS 2011).

Relies on: ``gossip.record_batches`` for what a batch must be.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
from collections.abc import Iterator, Sequence
from enum import StrEnum

from blake3 import blake3

from gossip.messages import (
    BATCHES_PER_MESSAGE_MAX,
    LOGS_MAX,
    FirstBatch,
    SettledLog,
    Settlement,
)
from gossip.record_batches import Batch, InvalidBatch, LogRules, check, log_name, name_of, parse
from gossip.record_log import Head, Log
from p2p.identity import Signer
from p2p.transport import PeerId

WAITING_PER_LOG_MAX = 16
"""Batches of one log that are held although they do not count yet; the rest is asked for when they do."""

OPENINGS_WAITING_MAX = 16
"""Logs of one author that are held although nothing of them counts yet: the first ones, as none counts before them."""


class Offer(StrEnum):
    """What became of an offered batch; faults of ``record_batches.Fault`` besides."""

    ACCEPTED = "accepted"
    DISPLACED = "displaced"
    """Accepted; it opens a log, for which one of its author's gave way that came after it."""
    KNOWN = "known"
    """Held already, or of a log that ends before it."""
    FORK = "fork"
    """It proves that its log is forked."""
    ORPHAN = "orphan"
    """The batch before it is not held: it must be asked for first."""
    WAITING = "waiting"
    """Too many batches of its log, or logs of its author, wait to count; not held."""
    FULL = "full"
    """There is no room for another log."""


class RecordLogs:
    """All logs of one run that a node holds."""

    def __init__(self, *, run: bytes, signer: Signer, rules: LogRules) -> None:
        self._run = run
        self._signer = signer
        self._rules = rules
        self._clear()

    def _clear(self) -> None:
        self._logs: dict[bytes, Log] = {}
        self._batches: dict[bytes, Batch] = {}
        """By name: every batch of every chain, and the bases."""
        self._opened: dict[PeerId, list[Log]] = {}
        """What each author opened."""
        self._waiting: list[tuple[int, bytes]] = []
        """A heap of (records that must be applied, log): the first batch of each log that does not count yet."""
        self._come: dict[bytes, Batch] = {}
        self._gone: dict[bytes, Batch] = {}
        self._records = 0
        self._stale = False
        """Whether what counts is to be worked out anew: once for any number of forks, when somebody asks."""

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
            author = PeerId(message.author)
            log = self._logs.get(log_name(self._run, author, message.incarnation))
            if log is None:
                last = self._last_waiting(author)
                if last is not None and last.incarnation < message.incarnation:
                    return Offer.WAITING, b""
                if last is None and len(self._logs) >= LOGS_MAX:
                    return Offer.FULL, b""
        else:
            before = self._batches.get(message.previous)
            if before is None:
                return Offer.ORPHAN, b""
            log = self._logs[before.log]
        place = 0 if before is None else before.number + 1
        if log is not None and (place < log.start or (place < log.final and log.exposed)):
            return Offer.KNOWN, log.name
        if log is not None and place == log.length:
            if log.rivals is not None:
                return Offer.KNOWN, log.name
            if log.length - log.counting >= WAITING_PER_LOG_MAX:
                return Offer.WAITING, log.name
        batch = check(self._run, packed, message, before, self._rules, self._signer)
        if log is None:
            return Offer.DISPLACED if self._open(batch) else Offer.ACCEPTED, batch.log
        if place < log.length:
            if place >= log.final:
                self._cut(log, place, batch)
            else:
                log.exposed = True
            return Offer.FORK, log.name
        self._extend(log, batch)
        return Offer.ACCEPTED, batch.log

    def _last_waiting(self, author: PeerId, count: int = OPENINGS_WAITING_MAX) -> Log | None:
        """The log of ``author`` that gives way to an earlier one; None while fewer than ``count`` wait."""
        waiting = [log for log in self._opened.get(author, ()) if not log.counting]
        return max(waiting, key=lambda log: log.incarnation) if len(waiting) >= count else None

    def _open(self, batch: Batch) -> bool:
        """Returns whether another log had to give way."""
        if (last := self._last_waiting(batch.author)) is not None:
            self._drop(last)
        log = self._add_log(batch.log, batch.author, batch.incarnation)
        log.chain.append(batch)
        self._batches[batch.name] = batch
        opened = self._opened[log.author]
        if log.incarnation < max(other.incarnation for other in opened):
            self._stale = True
        elif not self._stale:
            self._wait(log, len(opened) - 1)
            self._count_more()
        return last is not None

    def _drop(self, log: Log) -> None:
        """Forget a log of which nothing counts."""
        for batch in log.chain:
            del self._batches[batch.name]
        self._opened[log.author].remove(log)
        del self._logs[log.name]
        self._stale = True

    def _add_log(self, name: bytes, author: PeerId, incarnation: int) -> Log:
        log = self._logs[name] = Log(name, author, incarnation)
        self._opened.setdefault(author, []).append(log)
        return log

    def _extend(self, log: Log, batch: Batch) -> None:
        log.chain.append(batch)
        self._batches[batch.name] = batch
        if not self._stale and log.counting == log.length - 1:
            self._wait(log, self._rank(log))
            self._count_more()

    def _cut(self, log: Log, place: int, rival: Batch) -> None:
        """End ``log`` before ``place``, where it holds another batch than ``rival``."""
        log.rivals = log.batch(place).packed, rival.packed
        self._count(log, min(log.counting, place))
        for batch in log.between(place, log.length):
            del self._batches[batch.name]
        del log.chain[place - log.start :]
        self._stale = True

    # --- which batches count --------------------------------------------------------------------------------------

    @property
    def records(self) -> int:
        """Records that count: the clock of what is made here next."""
        self._refresh()
        return self._records

    def _refresh(self) -> None:
        if self._stale:
            self._count_again()

    def _rank(self, log: Log) -> int:
        """How many logs its author opened before it."""
        return sum(other.incarnation < log.incarnation for other in self._opened[log.author])

    def _need(self, log: Log, rank: int, number: int) -> int:
        """How many records must be applied before batch ``number`` of ``log`` counts."""
        return max(log.batch(number).clock, rank * self._rules.opening_cost) - self._rules.reach

    def _wait(self, log: Log, rank: int) -> None:
        heapq.heappush(self._waiting, (self._need(log, rank, log.counting), log.name))

    def _count_more(self) -> None:
        """Let every batch count whose turn it is, now that something was added."""
        while self._waiting and self._waiting[0][0] <= self._records:
            log = self._logs[heapq.heappop(self._waiting)[1]]
            self._count(log, log.counting + 1)
            if log.counting < log.length:
                self._wait(log, self._rank(log))

    def _count_again(self) -> None:
        """Work out anew what counts beyond what is final, after something was taken away."""
        counting = {log.name: log.final for log in self._logs.values()}
        ranks = {
            log.name: rank
            for opened in self._opened.values()
            for rank, log in enumerate(sorted(opened, key=lambda log: log.incarnation))
        }
        records = sum(log.end(log.final) for log in self._logs.values())
        waiting = [
            (self._need(log, ranks[log.name], log.final), log.name)
            for log in self._logs.values()
            if log.length > log.final
        ]
        heapq.heapify(waiting)
        while waiting and waiting[0][0] <= records:
            log = self._logs[heapq.heappop(waiting)[1]]
            records += len(log.batch(counting[log.name]).records)
            counting[log.name] += 1
            if counting[log.name] < log.length:
                heapq.heappush(waiting, (self._need(log, ranks[log.name], counting[log.name]), log.name))
        for log in self._logs.values():
            self._count(log, counting[log.name])
        for author in self._opened:
            while (last := self._last_waiting(author, OPENINGS_WAITING_MAX + 1)) is not None:
                self._drop(last)
        self._waiting = [(need, name) for need, name in waiting if name in self._logs]
        heapq.heapify(self._waiting)
        self._stale = False

    def _count(self, log: Log, number: int) -> None:
        """Let the first ``number`` batches of ``log`` count, and no more."""
        for batch in log.between(number, log.counting):
            self._records -= len(batch.records)
            if self._come.pop(batch.name, None) is None:
                self._gone[batch.name] = batch
        for batch in log.between(log.counting, number):
            self._records += len(batch.records)
            if self._gone.pop(batch.name, None) is None:
                self._come[batch.name] = batch
        log.counting = number

    def take_changes(self) -> tuple[list[Batch], list[Batch]]:
        """The batches that came to count since the last call, and those that no longer do."""
        self._refresh()
        come, gone = list(self._come.values()), list(self._gone.values())
        self._come.clear()
        self._gone.clear()
        return come, gone

    # --- what is settled ------------------------------------------------------------------------------------------

    def settlement(self) -> Settlement:
        """What counts now, as a snapshot of it names it."""
        self._refresh()
        logs = sorted(self._logs.values(), key=lambda log: (log.author, log.incarnation))
        return Settlement(logs=[log.settled for log in logs if log.counting])

    def above(self, settlement: Settlement) -> list[Batch] | None:
        """The batches that count and ``settlement`` does not hold; None where it holds what does not count here."""
        self._refresh()
        held = self.named(settlement)
        for name, entry in held.items():
            log = self._logs.get(name)
            if log is None or log.counting < entry.number or not log.holds(entry):
                return None
        return [
            batch
            for log in self._logs.values()
            for batch in log.between(
                max(log.start, held[log.name].number if log.name in held else 0), log.counting
            )
        ]

    def settle(self, settlement: Settlement) -> bool:
        """Let what ``settlement`` holds be final, and nothing else, whatever was before: what counts then depends on it
        and on what is held. False, and nothing has changed, unless all of it is held here and no more is let go of.
        """
        entries = self.named(settlement)
        if not all(name in self._logs and self._logs[name].holds(entry) for name, entry in entries.items()):
            return False
        if any(log.start and name not in entries for name, log in self._logs.items()):
            return False
        for name, log in self._logs.items():
            log.final = entries[name].number if name in entries else 0
            log.exposed = False
        self._count_again()
        return True

    def begin_from(self, settlement: Settlement) -> None:
        """Hold what ``settlement`` holds, whatever was held before, and what of that goes on from it.

        ``take_changes`` then gives what counts beyond it.
        """
        held = [batch.packed for log in self._logs.values() for batch in log.chain]
        held += [packed for log in self._logs.values() for packed in log.rivals or ()]
        self._clear()
        for name, entry in self.named(settlement).items():
            log = self._add_log(name, PeerId(entry.author), entry.incarnation)
            log.counting = log.final = entry.number
            self._begin_after(log, entry)
            self._records += entry.end
        for packed in held:
            with contextlib.suppress(InvalidBatch):
                self.offer(packed)

    def forget(self, settlement: Settlement) -> bool:
        """Let go of the batches that ``settlement`` holds: a snapshot stands for them. False, and nothing has changed,
        unless all of them are final."""
        entries = self.named(settlement)
        if not all(
            name in self._logs and entry.number <= self._logs[name].final for name, entry in entries.items()
        ):
            return False
        for name, entry in entries.items():
            if self._logs[name].start < entry.number:
                self._begin_after(self._logs[name], entry)
        return True

    def _begin_after(self, log: Log, entry: SettledLog) -> None:
        for batch in log.begin_after(entry):
            del self._batches[batch.name]
        assert log.base is not None
        self._batches[log.base.name] = log.base

    def named(self, settlement: Settlement) -> dict[bytes, SettledLog]:
        """The entries of ``settlement`` by the names of their logs."""
        return {
            log_name(self._run, PeerId(entry.author), entry.incarnation): entry for entry in settlement.logs
        }

    # --- what is held ---------------------------------------------------------------------------------------------

    def heads(self) -> list[Head]:
        """The version vector: every log, by name. Tables with equal vectors hold the same and count the same."""
        self._refresh()
        return [log.head for _, log in sorted(self._logs.items())]

    def lacks(self, head: Head) -> bool:
        """Whether another table with this ``head`` holds something that this one does not."""
        held = self._logs.get(head.log)
        if held is None:
            return True
        if head.number < held.final:
            return False
        if head.forked and (held.rivals is None or head.number < held.length):
            return True
        if held.rivals is not None and head.number > held.length:
            # What goes on after a fork counts nowhere; it is the other side that lacks the proof.
            return False
        return head.number > 0 and head.name not in self._batches

    def head(self, log: bytes) -> Head | None:
        """How far one log goes."""
        held = self._logs.get(log)
        return None if held is None else held.head

    def proof(self, log: bytes) -> tuple[PeerId, tuple[bytes, ...]]:
        """The author of a log, and the two batches that prove it forked, or none."""
        held = self._logs[log]
        return held.author, held.rivals or ()

    def last(self, log: bytes) -> Batch | None:
        """The last batch of a log: what its author goes on from."""
        held = self._logs.get(log)
        return held.batch(held.length - 1) if held is not None and held.length else None

    def describe(self, log: bytes) -> tuple[PeerId, int, int, int]:
        """Author, incarnation, records that count and records that wait, of a log that is held."""
        self._refresh()
        held = self._logs[log]
        counting = held.end(held.counting)
        return held.author, held.incarnation, counting, held.end(held.length) - counting

    def takes_more(self, log: bytes, author: PeerId) -> bool:
        """Whether a next batch of ``log`` would be held: not too many of it, or logs of its author, wait to count."""
        self._refresh()
        held = self._logs.get(log)
        if held is None:
            return self._last_waiting(author) is None
        return held.length - held.counting < WAITING_PER_LOG_MAX

    def stranded(self, log: bytes) -> bool:
        """Whether ``log`` ends in what waits for records that a fork took away, and another log would not have to."""
        held, records = self._logs.get(log), self.records
        if held is None or held.counting == held.length:
            return False
        another = len(self._opened[held.author]) * self._rules.opening_cost
        return another <= records + self._rules.reach < held.batch(held.length - 1).clock

    @property
    def waiting(self) -> int:
        """Records that are held and do not count yet."""
        self._refresh()
        return sum(log.end(log.length) - log.end(log.counting) for log in self._logs.values())

    def counting(self) -> Iterator[Batch]:
        """Every batch that is held and counts."""
        self._refresh()
        for log in self._logs.values():
            yield from log.between(log.start, log.counting)

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
        packed = [batch.packed for batch in held.between(max(common + 1, held.start), held.length)]
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
        names = [held.chain[-1 - steps].name for steps in back if steps < len(held.chain)]
        return names if held.base is None else [*names, held.base.name]

    def rows(self) -> bytes:
        """The version vector as it travels (``gossip.messages.Heads``)."""
        return b"".join(head.row for head in self.heads())

    def digest(self) -> bytes:
        """BLAKE3 of the version vector, 32 bytes."""
        return blake3(self.rows()).digest()
