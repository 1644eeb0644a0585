"""One node's own log: records collected into batches, each signed, durable and pushed before the next is begun.

Owns the open batch and the place in the log where it goes. Never decides what a record says, nor applies one.

Relies on: ``gossip.record_archive`` to make a batch durable before anybody hears of it; who cannot say where its log
ended starts another, and so never forks one.
"""

from __future__ import annotations

import random

from gossip.record_archive import RecordArchive
from gossip.record_batches import LogRules, log_name, make
from gossip.record_logs import RecordLogs
from p2p.identity import Signer


class RecordAuthor:
    """Writes the log of one node, from where its archive ends."""

    def __init__(
        self,
        *,
        run: bytes,
        signer: Signer,
        logs: RecordLogs,
        archive: RecordArchive,
        rules: LogRules,
        rng: random.Random,
    ) -> None:
        """``logs`` holds what ``archive`` has loaded."""
        self._run = run
        self._signer = signer
        self._logs = logs
        self._archive = archive
        self._rules = rules
        self._rng = rng
        self._open = bytearray()
        self._clock = 0
        self._begin(archive.incarnation)

    def _begin(self, incarnation: int | None) -> None:
        self._incarnation = incarnation if incarnation is not None else self._draw_incarnation()
        self.log = log_name(self._run, self._signer.peer, self._incarnation)
        self._wrote = self._end()
        if incarnation is not None and self._wrote != (self._archive.written, False):
            # What is forked ends there for everybody; and what we wrote and lost, others hold.
            self._begin(None)

    def _draw_incarnation(self) -> int:
        """One that was never used, and greater than earlier ones as far as we can tell: the older logs come first."""
        return min(self._logs.records, 2**31 - 1) << 32 | self._rng.getrandbits(32)

    def _end(self) -> tuple[int, bool]:
        """Where our log ends in the table, and whether it is forked there."""
        head = self._logs.head(self.log)
        return (0, False) if head is None else (head.number, head.forked)

    @property
    def disowned(self) -> bool:
        """Whether our log ends elsewhere than we left it: somebody else has our key, or we have lost our memory."""
        return self._end() != self._wrote

    @property
    def stranded(self) -> bool:
        """Whether what we write would wait, since our clock counts records that a proven fork took away."""
        return self._logs.stranded(self.log)

    def begin_anew(self) -> None:
        """Write another log from here on. What was not sealed is forgotten."""
        self._open.clear()
        self._begin(None)

    @property
    def next(self) -> int:
        """The sequence number of the next record."""
        last = self._logs.last(self.log)
        return (last.end if last is not None else 0) + len(self._open)

    @property
    def clock(self) -> int:
        """Of the next record: how many were applied when its batch was begun."""
        if self._open:
            return self._clock
        last = self._logs.last(self.log)
        return max(self._logs.records, last.clock if last is not None else 0)

    @property
    def open(self) -> int:
        """Records of the batch that is not sealed yet."""
        return len(self._open)

    @property
    def room(self) -> int:
        """How many more records may be added before the batch must be sealed, or others have made theirs."""
        if not self._logs.takes_more(self.log, self._signer.peer):
            return 0
        return min(self._rules.records_max - len(self._open), self._rules.capacity(self.clock) - self.next)

    def add(self, records: bytes, clock: int) -> None:
        """Add the next records to the open batch: as many as there was ``room`` for when they were probed at ``clock``.

        More records may count by now, or fewer; the batch is what was begun then.
        """
        assert not self._open or clock == self._clock
        assert len(self._open) + len(records) <= self._rules.records_max
        self._clock = clock
        self._open += records

    async def seal(self) -> bytes:
        """Close the open batch: signed and durable, to be pushed now. Raises OSError, the batch being open still."""
        packed = make(
            self._run,
            self._signer,
            self._logs.last(self.log),
            self._incarnation,
            self._clock,
            bytes(self._open),
        )
        await self._archive.keep_own(self._incarnation, packed)
        self._open.clear()
        self._wrote = (self._wrote[0] + 1, False)
        return packed
