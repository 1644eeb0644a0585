"""Which records a node's weights hold, and the weights that hold them.

Owns the learner of one-byte mode together with the account of what was applied to it: so many batches of each log, and
our own newest records, which move our weights before they are sealed, sent and counted anywhere. The account is exact
when there are none of these: only then does a state hash say anything to others, and only then is a checkpoint taken.

Everything here is called in the ``train`` lane, so that state and account are never seen apart. Never waits, never
looks at a clock, knows no peers.

Relies on: ``gossip.record_logs`` to name each batch once when it comes to count, and once when it no longer does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from gossip.messages import SettledLog, Settlement
from gossip.record_batches import Batch
from p2p.transport import PeerId
from training.one_byte import Probed, RecordLearner, RecordRun
from training.trainer import bad_checkpoint


class _Place(msgspec.Struct, frozen=True, array_like=True):
    """How much of a log is applied, and the name of the last batch that is."""

    log: str
    number: Annotated[int, Meta(ge=1)]
    name: str


class AppliedRecords:
    """The learner of one node, and what moved it."""

    def __init__(self, learner: RecordLearner) -> None:
        self.learner = learner
        self.records = 0
        """Of all logs, that are applied and count."""
        self._of: dict[PeerId, int] = {}
        """Records that count, by author."""
        self._moved: dict[PeerId, float] = {}
        """How far the records of each author moved the weights: the sum of the sizes of its steps."""
        self._places: dict[bytes, _Place] = {}
        self._ahead: list[RecordRun] = []
        """Our own records that are applied and do not count yet, oldest first."""

    @property
    def exact(self) -> bool:
        """Whether the weights hold what counts and nothing else."""
        return not self._ahead

    def take_step(self, log: bytes, first: int, clock: int) -> Probed:
        """Probe the next minibatch, and let our own weights follow what it says at once."""
        probed = self.learner.probe(log, first)
        own = RecordRun(log, first, clock, probed.records)
        self.learner.apply([own])
        self._ahead.append(own)
        return probed

    def apply(self, come: Sequence[Batch], gone: Sequence[Batch]) -> None:
        """Batches came to count, and others no longer do."""
        self.learner.apply(
            [_run_of(batch) for batch in come if not self._catches_up(batch)],
            [_run_of(batch) for batch in gone],
        )
        for batch in sorted(gone, key=lambda batch: -batch.number):
            self._account(batch, -1)
            if batch.previous is None:
                self._places.pop(batch.log, None)
            else:
                self._places[batch.log] = _Place(batch.log.hex(), batch.number, batch.previous.hex())
        for batch in sorted(come, key=lambda batch: batch.number):
            self._account(batch, 1)
            self._places[batch.log] = _Place(batch.log.hex(), batch.number + 1, batch.name.hex())

    def _account(self, batch: Batch, sense: int) -> None:
        self.records += sense * len(batch.records)
        self._of[batch.author] = self._of.get(batch.author, 0) + sense * len(batch.records)
        moved = sense * self.learner.size_of(_run_of(batch))
        self._moved[batch.author] = self._moved.get(batch.author, 0.0) + moved

    def records_of(self, author: PeerId) -> int:
        """Records of ``author`` that the weights hold."""
        return self._of.get(author, 0)

    def influence_of(self, author: PeerId) -> float:
        """The part of ``author`` in all that records have moved the weights, 0 to 1."""
        total = sum(self._moved.values())
        return self._moved.get(author, 0.0) / total if total > 0 else 0.0

    def _catches_up(self, batch: Batch) -> bool:
        """Whether ``batch`` is what we made and applied before."""
        if not self._ahead or (self._ahead[0].log, self._ahead[0].first) != (batch.log, batch.first):
            return False
        made = 0
        while made < len(self._ahead) and self._ahead[made].first < batch.end:
            made += 1
        ours = self._ahead[:made]
        if b"".join(run.records for run in ours) != batch.records or {run.clock for run in ours} != {
            batch.clock
        }:
            # Another life of ours has written it: what we made since is a history that nobody will see.
            self.take_back()
            return False
        del self._ahead[:made]
        return True

    def take_back(self) -> None:
        """Undo what we applied of our own and nobody will ever count."""
        self.learner.apply([], gone=self._ahead)
        self._ahead.clear()

    # --- snapshots ------------------------------------------------------------------------------------------------

    def state_without(self, above: Sequence[Batch]) -> bytes:
        """The state of what counts less ``above``, all of which is applied; our own newest records left out too."""
        return self.learner.state_without([*map(_run_of, above), *self._ahead])

    def begin_from(self, settlement: Settlement, names: Mapping[bytes, SettledLog], state: bytes) -> None:
        """Hold what ``settlement`` holds and nothing else. Raises ValueError for a state of another model."""
        self.learner.take_state(state)
        self._ahead.clear()
        self._places = {
            name: _Place(name.hex(), entry.number, entry.name.hex()) for name, entry in names.items()
        }
        self._begin_account(settlement.logs)

    def _begin_account(self, settled: Iterable[SettledLog]) -> None:
        """By how far settled records moved the weights is not known any more: influence counts from here."""
        self.records, self._of, self._moved = 0, {}, {}
        for entry in settled:
            author = PeerId(entry.author)
            self.records += entry.end
            self._of[author] = self._of.get(author, 0) + entry.end

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def save(self) -> bytes:
        """Everything needed to go on. Only while the account is exact."""
        assert self.exact
        return self.learner.save(msgspec.json.encode(sorted(self._places.values(), key=_log_of)).decode())

    def load(self, data: bytes, held: Iterable[Batch], settled: Mapping[bytes, SettledLog]) -> None:
        """Go on from what ``save`` returned. Raises CheckpointError, and changes nothing, unless all of it is sound and
        every batch that it had applied is among those ``held`` or the last of its log that is ``settled``."""
        try:
            places = msgspec.json.decode(self.learner.applied_in(data), type=list[_Place])
        except msgspec.MsgspecError as error:
            raise bad_checkpoint(str(error)) from error
        wanted = {place.log: place for place in places}
        held = list(held)
        applied = {
            name.hex(): entry.end
            for name, entry in settled.items()
            if (place := wanted.get(name.hex()))
            and (place.number, place.name) == (entry.number, entry.name.hex())
        }
        for batch in held:
            place = wanted.get(batch.log.hex())
            if place is not None and batch.number + 1 == place.number and batch.name.hex() == place.name:
                applied[place.log] = batch.end
        missing = wanted.keys() - applied.keys() | {name.hex() for name in settled} - wanted.keys()
        if missing:
            raise bad_checkpoint(f"it holds records of {len(missing)} logs that are not held here")
        self.learner.load(data)
        self._places = {bytes.fromhex(log): place for log, place in wanted.items()}
        self._begin_account(settled.values())
        for batch in held:
            if batch.number < self._number(batch.log):
                self._account(batch, 1)

    def difference(self, counting: Iterable[Batch], held: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
        """What to apply and what to take back, after ``load``, for exactly ``counting`` to be applied."""
        counts = {batch.name for batch in counting}
        applied = {batch.name for batch in held if batch.number < self._number(batch.log)}
        return (
            [batch for batch in held if batch.name in counts and batch.name not in applied],
            [batch for batch in held if batch.name in applied and batch.name not in counts],
        )

    def _number(self, log: bytes) -> int:
        """How many batches of ``log`` are applied."""
        return self._places[log].number if log in self._places else 0


def _run_of(batch: Batch) -> RecordRun:
    return RecordRun(batch.log, batch.first, batch.clock, batch.records)


def _log_of(place: _Place) -> str:
    return place.log
