"""The records of one node and the weights that hold them: read from disk, followed, saved, settled and checked.

Owns the table of logs, the archive, the account of what is applied (``node.applied_records``) and the checkpoints, and
keeps them in step: batches that come to count are applied in the ``train`` lane, one at a time; a state hash and a
checkpoint are taken when the weights hold what counts and nothing else. Never makes a record and never talks to a peer.

Relies on: whoever offers batches to ``logs`` calls ``apply_changes`` then.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import structlog
import trio
from blake3 import blake3

from gossip.messages import SettledLog, Settlement
from gossip.record_archive import RecordArchive
from gossip.record_batches import Batch, InvalidBatch, LogRules
from gossip.record_logs import RecordLogs
from gossip.store import ShardMissing, ShardStore, outline_of
from node.applied_records import AppliedRecords
from node.checkpoints import Checkpoints
from node.node import Weights
from node.record_snapshots import Certified
from node.runtime import Runtime
from node.status import Verification
from training.one_byte import Probed, RecordLearner
from training.trainer import CheckpointError

STOCK_S = 1.0
"""A state hash is worked out at most this often."""
CHECKPOINT_S = 20.0
STATES_REMEMBERED = 256
"""State hashes of our own, by version vector, with which those of others are compared."""

T = TypeVar("T")

log = structlog.get_logger()


class RecordKeeper:
    """What one node knows of the records of its run, and its model."""

    def __init__(
        self,
        runtime: Runtime,
        *,
        run: bytes,
        rules: LogRules,
        learner: RecordLearner,
        checkpoints: Checkpoints,
        changed: Callable[[], None],
    ) -> None:
        """``changed()`` is called when the state hash of what is held has become known; it must not block."""
        self.learner = learner
        self.applied = AppliedRecords(learner)
        self.logs = RecordLogs(run=run, signer=runtime.signer, rules=rules)
        self.archive = RecordArchive(runtime.disk)
        self._runtime = runtime
        self._run = run
        self._rules = rules
        self._checkpoints = checkpoints
        self._changed = changed
        self._archived: set[bytes] = set()
        """Names of the batches that a segment holds."""
        self._applying = trio.Lock()
        self._saving = trio.Lock()
        self._states: dict[bytes, bytes] = {}
        """By version vector: the state hash that we came to."""
        self._stock_s = self._saved_s = -math.inf
        self._probe_s = self._apply_s = 0.0
        """What a probe, and applying a record of another, have taken lately."""
        self.problem = ""
        """Why nothing can be written, for people; empty when it can."""

    @property
    def records(self) -> int:
        """How many count."""
        return self.logs.records

    @property
    def state_hash(self) -> bytes | None:
        """That of everything that is held now; None while records are on the way into the weights."""
        return self._states.get(self.logs.digest())

    def state_at(self, vector: bytes) -> bytes | None:
        """The state hash that we came to at a version vector, if that was lately."""
        return self._states.get(vector)

    @property
    def ceiling(self) -> float | None:
        """How many peers as fast as this one can be followed: the time of a probe over that of applying a record."""
        if not self._probe_s or not self._apply_s:
            return None
        return self._probe_s / self._apply_s

    def weights(self) -> Weights | None:
        """The weights and their hash; None while they hold what does not count. In the ``train`` lane."""
        if not self.applied.exact:
            return None
        tensors = {name: tensor.clone() for name, tensor in self.learner.weights().items()}
        return Weights(tensors, self.learner.digest())

    # --- from disk ------------------------------------------------------------------------------------------------

    async def load(self, store: ShardStore) -> Certified | None:
        """Take up what earlier lives kept; returns the snapshot that it goes on from."""
        batches = await self.archive.load()
        base = self.archive.base
        settled = self.logs.named(base.settlement) if base is not None else {}
        if base is not None:
            self.logs.begin_from(base.settlement)
        for packed in batches:
            try:
                self.logs.offer(packed)
            except InvalidBatch as error:
                log.warning("archived batch refused", fault=error.fault)
        held = list(self.logs.batches())
        self._archived = {batch.name for batch in held}
        if not await self._resume(held, settled) and base is not None:
            try:
                state = await store.get(base.snapshot.state)
                await self.in_lane(partial(self.applied.begin_from, base.settlement, settled, state))
            except (ShardMissing, ValueError) as error:
                log.warning("nothing to go on from, joining anew", reason=str(error))
                self.logs.begin_from(Settlement(logs=[]))
                held, self._archived = [], set()
                self.archive.disown()
        self.logs.take_changes()
        come, gone = self.applied.difference(self.logs.counting(), held)
        await self._apply(come, gone)
        base = self.archive.base
        return None if base is None else Certified(base.snapshot, base.settlement, base.certificate)

    async def _resume(self, held: list[Batch], settled: Mapping[bytes, SettledLog]) -> bool:
        """Take up the last checkpoint; returns whether there was one that could be."""
        checkpoint = await self._checkpoints.load()
        if checkpoint is None:
            return False
        try:
            await self.in_lane(partial(self.applied.load, checkpoint.state, held, settled))
        except CheckpointError as error:
            log.warning("checkpoint of no use", reason=error.what)
            return False
        log.info("resumed", step=self.learner.step, records=self.applied.records)
        return True

    # --- following ------------------------------------------------------------------------------------------------

    async def take_step(self, log_name: bytes, first: int, clock: int, *, cost_s: float) -> Probed:
        """Probe once, and let our own weights follow at once."""
        step = partial(self.applied.take_step, log_name, first, clock)
        probed, took_s = await self.in_lane(partial(_timed, step), cost_s=cost_s)
        self._probe_s = _smoothed(self._probe_s, took_s / len(probed.records))
        return probed

    async def take_back(self) -> None:
        """Undo what we applied of our own and nobody will ever count."""
        await self.in_lane(self.applied.take_back)

    async def apply_changes(self) -> None:
        """Apply what has come to count, and take back what no longer does."""
        async with self._applying:
            await self._drain()

    async def _drain(self) -> None:
        while any(changes := self.logs.take_changes()):
            await self._apply(*changes)

    async def _apply(self, come: list[Batch], gone: list[Batch]) -> None:
        """In small parts, so that a step or an evaluation need not wait for all of it."""
        for batch in gone:
            await self.in_lane(partial(self.applied.apply, [], [batch]))
        for batch in come:
            _, took_s = await self.in_lane(partial(_timed, partial(self.applied.apply, [batch], [])))
            if batch.author != self._runtime.signer.peer:
                self._apply_s = _smoothed(self._apply_s, took_s / len(batch.records))

    # --- snapshots --------------------------------------------------------------------------------------------------

    def settlement(self) -> Settlement:
        """Which ones."""
        return self.logs.settlement()

    async def state_of(self, settlement: Settlement) -> bytes | None:
        """The state that ``settlement`` comes to; None while it holds what does not count here."""
        async with self._applying:
            await self._drain()
            above = self.logs.above(settlement)
            if above is None:
                return None
            return await self.in_lane(partial(self.applied.state_without, above))

    async def settle(self, settlement: Settlement) -> bool:
        """Let what it holds be final; False while not all of it is held here."""
        settled = self.logs.settle(settlement)
        if settled:
            self._states.clear()  # At the same vector other batches may count now.
        self._changed()
        return settled

    async def begin_from(self, settlement: Settlement, state: bytes) -> None:
        """Hold it and what is known beyond it, and nothing else. Raises ValueError."""
        async with self._applying:
            names = self.logs.named(settlement)
            await self.in_lane(partial(self.applied.begin_from, settlement, names, state))
            self.logs.begin_from(settlement)
            await self._drain()
        log.info("began from a snapshot", records=self.logs.records)

    async def forget(self, certified: Certified) -> bool:
        """Let go of the batches that it holds, here and on disk; False if some of them are not final any more."""
        if not self.logs.forget(certified.settlement):
            return False
        held = list(self.logs.batches())
        try:
            await self.archive.keep_above(
                certified.snapshot,
                certified.certificate,
                certified.settlement,
                [batch.packed for batch in held],
            )
        except OSError as error:
            self._report(f"records cannot be kept: {error.strerror}; free disk space")
        else:
            self._archived = {batch.name for batch in held}
        await self.save(always=True)
        return True

    async def verify(self) -> Verification:
        """Check every signature and rule again, and take all records back: what is left must be their beginning."""
        async with self._applying:
            await self._drain()
            held, vector, records = list(self.logs.batches()), self.logs.digest(), self.logs.records
            forked = any(head.forked for head in self.logs.heads())
            counting = list(self.logs.counting())
            state, began = await self.in_lane(
                lambda: (self.learner.digest(), self.applied.state_without(counting))
            )
        again = RecordLogs(run=self._run, signer=self._runtime.signer, rules=self._rules)
        base = self.archive.base
        if base is not None:
            again.begin_from(base.settlement)
        for batch in held:
            again.offer(batch.packed)
        if base is None:
            sound = blake3(began).digest() == self.learner.base_hash
        else:
            ref, _ = await outline_of(began)
            sound = ref == base.snapshot.state
        return Verification(
            batches=len(held),
            records=sum(len(batch.records) for batch in counting),
            settled=base.snapshot.records if base is not None else 0,
            state=state.hex(),
            counts_alike=again.records == records and (again.digest() == vector or forked),
            comes_back=sound,
            damaged=await self.archive.damaged(),
        )

    # --- taking stock ---------------------------------------------------------------------------------------------

    async def take_stock(self) -> None:
        """Work out the state hash, and save, whenever the weights hold what counts and nothing else."""
        now_s = trio.current_time()
        vector = self.logs.digest()
        if vector not in self._states and now_s - self._stock_s >= STOCK_S:
            self._stock_s = now_s
            digest = await self.in_lane(self._exact_digest)
            if digest is not None and vector == self.logs.digest():
                self._states[vector] = digest
                if len(self._states) > STATES_REMEMBERED:
                    del self._states[next(iter(self._states))]
                self._changed()
        if now_s - self._saved_s >= CHECKPOINT_S:
            await self.save()

    def _exact_digest(self) -> bytes | None:
        exact = self.applied.exact and self.applied.records == self.logs.records
        return self.learner.digest() if exact else None

    async def save(self, *, always: bool = False) -> None:
        """A segment of what is new, and a checkpoint. Failing is a problem to show, not a reason to die."""
        async with self._saving:
            new = [batch for batch in self.logs.batches() if batch.name not in self._archived]
            if not new and not always:
                return
            state = await self.in_lane(lambda: self.applied.save() if self.applied.exact else None)
            if state is None:
                return
            self._saved_s = trio.current_time()
            try:
                await self.archive.keep([batch.packed for batch in new])
                self._archived.update(batch.name for batch in new)
                await self._checkpoints.save(self.learner.step, state)
            except OSError as error:
                self._report(f"checkpoint failed: {error.strerror}; free disk space, training goes on")
            else:
                self.problem = ""

    def _report(self, text: str) -> None:
        self.problem = text
        log.warning("problem", text=text)

    async def in_lane(self, work: Callable[[], T], *, cost_s: float | None = None) -> T:
        """Run ``work`` where weights are written."""
        if cost_s is None:
            cost_s = self._runtime.costs.copy_s
        return await self._runtime.compute.run(work, lane="train", cost_s=cost_s)


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    """What ``work`` returns and how many seconds it took: the lane's own, and none of waiting for it."""
    began_s = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began_s


def _smoothed(mean: float, value: float) -> float:
    return value if mean == 0.0 else 0.9 * mean + 0.1 * value
