"""The node of one-byte mode: probes directions on its own data, and applies what everybody's probes said.

Owns the wiring of the mode, and the way of a record: probed and applied here (``node.applied_records``), collected into
a batch that is signed and durable (``gossip.record_author``), pushed (``gossip.log_spread``), counted at every node
alike (``gossip.record_logs``) and applied there. There are no rounds and no agreement: who holds the same batches holds
the same weights.
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

from gossip.log_spread import LogSpread
from gossip.messages import Heartbeat, SettledLog, Settlement
from gossip.record_archive import RecordArchive
from gossip.record_author import RecordAuthor
from gossip.record_batches import Batch, InvalidBatch, LogRules
from gossip.record_logs import RecordLogs
from gossip.store import ShardMissing, outline_of
from node.applied_records import AppliedRecords
from node.base import base_ref
from node.life import NodeState
from node.node import LOSS_TOLD_MAX, Node, Weights, Which
from node.record_snapshots import Certified, RecordSnapshots
from node.runtime import NodeOptions, Runtime
from node.status import Verification
from p2p.transport import PeerId
from training.one_byte import RecordLearner
from training.run_spec import OneByteSpec, RunSpec
from training.trainer import CheckpointError

STOCK_S = 1.0
"""A state hash is worked out at most this often."""
CHECKPOINT_S = 20.0
JOIN_S = 600.0
"""The longest that a newcomer waits for a snapshot that members have told of."""
JOIN_LOOK_S = 0.5
JOIN_LOOKS = 6
"""Looks at what members tell, before a newcomer takes it that there is no snapshot."""
RETRY_S = 5.0
"""After the disk would not take a batch."""
STATES_REMEMBERED = 256
"""State hashes of our own, by version vector, with which those of others are compared."""

T = TypeVar("T")

log = structlog.get_logger()


class OneByteNode(Node):
    """One peer of one run in one-byte mode."""

    pace = 5.0

    def __init__(
        self,
        runtime: Runtime,
        options: NodeOptions,
        *,
        spec: RunSpec,
        state: NodeState,
        learner: RecordLearner,
    ) -> None:
        super().__init__(runtime, options, spec=spec, state=state)
        assert isinstance(spec.one_byte, OneByteSpec)
        self.learner = learner
        self.applied = AppliedRecords(learner)
        self._one_byte: OneByteSpec = spec.one_byte
        self._rules = rules_of(spec.one_byte)
        self.logs = RecordLogs(run=self.run_id, signer=runtime.signer, rules=self._rules)
        self.archive = RecordArchive(runtime.disk)
        self.spread = LogSpread(
            transport=runtime.transport,
            logs=self.logs,
            ledger=self.ledger,
            limits=options.limits,
            rng=runtime.rng,
            changed=self._progress.made,
        )
        self.snapshots = RecordSnapshots(
            local=self.local,
            notices=self.notices,
            store=self.store,
            fetcher=self.fetcher,
            ledger=self.ledger,
            keeper=self,
            alive=self._alive,
            every_records=spec.one_byte.snapshot_records,
            votes_needed=spec.one_byte.snapshot_votes,
        )
        self.author: RecordAuthor
        """Who writes our log, from the moment that what was written before is known."""
        self._archived: set[bytes] = set()
        """Names of the batches that a segment holds."""
        self._applying = trio.Lock()
        self._states: dict[bytes, bytes] = {}
        """By version vector: the state hash that we came to."""
        self._stock_s = self._saved_s = -math.inf
        self._saving = trio.Lock()
        self._began_batch_s = 0.0
        self._probe_s = self._apply_s = 0.0
        """What a probe, and applying a record of another, have taken lately."""
        self.diverged: PeerId | None = None
        """A member that told of another state at the same vector: one of us is broken."""

    # --- what it says of itself -----------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Minibatches probed on since the run began."""
        return self.learner.step

    @property
    def tokens(self) -> int:
        """What they held."""
        return self.learner.tokens

    def facts(self) -> dict[str, int]:
        """Records applied so far, of everybody."""
        return {"records": self.applied.records}

    async def weights(self, which: Which) -> Weights:
        """The weights that hold every record that counts here, and the state hash. There is no other model."""
        while True:
            found = await self._in_lane(self._exact_weights)
            if found is not None:
                return found
            await self._progress.wait()

    def _exact_weights(self) -> Weights | None:
        if not self.applied.exact:
            return None
        tensors = {name: tensor.clone() for name, tensor in self.learner.weights().items()}
        return Weights(tensors, self.learner.digest())

    async def wait_finished(self) -> None:
        """Return once our steps are taken and everybody who is alive is done too and has told of our vector."""
        while not self._finished():
            await self._progress.wait()

    def _finished(self) -> bool:
        if self.phase != "finished" or self.state_hash is None:
            return False
        beats = [beat for _, beat, _ in self.members.words_of_alive(trio.current_time())]
        return all(beat.step >= beat.steps_total and beat.vector == self.logs.digest() for beat in beats)

    @property
    def ceiling(self) -> float | None:
        """How many peers as fast as this one can be followed: the time of a probe over that of applying a record."""
        if not self._probe_s or not self._apply_s:
            return None
        return self._probe_s / self._apply_s

    @property
    def state_hash(self) -> bytes | None:
        """That of everything that is held now; None while records are on the way into the weights."""
        return self._states.get(self.logs.digest())

    def current_problem(self) -> str:
        """What stands in the way now, for people; empty when nothing does."""
        if self.diverged is not None:
            return (
                f"{self.diverged} holds the same records and other weights; one of the two machines is broken: "
                "run gossamer log verify on both"
            )
        return self.links.problem or self._problem

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(
            addresses=list(self.runtime.transport.local.addresses)[: self.limits.addresses_per_peer_max],
            agent=self._agent,
            step=self.learner.step,
            steps_total=self.spec.train.steps,
            steps_per_s=self.steps_per_s,
            tokens=self.learner.tokens,
            loss=min(self.loss or 0.0, LOSS_TOLD_MAX),
            head=bytes(32),
            head_height=0,
            head_participants=0,
            leaving=self._stopping.is_set(),
            records=self.logs.records,
            vector=self.logs.digest(),
            state=self.state_hash or b"",
        )

    def _heard(self, author: PeerId, beat: Heartbeat) -> None:
        if beat.vector:
            self.spread.heard_digest(author, beat.vector)
        ours = self._states.get(beat.vector)
        if beat.state and ours is not None and beat.state != ours:
            self.diverged = author
            log.error("weights differ at the same records", peer=author, vector=beat.vector.hex())
        self._progress.made()

    # --- starting and stopping ------------------------------------------------------------------------------------

    async def _remember(self) -> None:
        parameters = sum(tensor.numel() for tensor in self.learner.weights().values())
        if (ref := base_ref(self._one_byte, parameters)) is not None:
            self.store.pin(ref, "base")  # Newcomers ask for it.
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
                state = await self.store.get(base.snapshot.state)
                await self._in_lane(partial(self.applied.begin_from, base.settlement, settled, state))
            except (ShardMissing, ValueError) as error:
                log.warning("nothing to go on from, joining anew", reason=str(error))
                self.logs.begin_from(Settlement(logs=[]))
                held, self._archived = [], set()
                self.archive.disown()
        if (base := self.archive.base) is not None:
            await self.snapshots.resume(Certified(base.snapshot, base.settlement, base.certificate))
        self.logs.take_changes()
        come, gone = self.applied.difference(self.logs.counting(), held)
        await self._apply(come, gone)
        self.author = RecordAuthor(
            run=self.run_id,
            signer=self.runtime.signer,
            logs=self.logs,
            archive=self.archive,
            rules=self._rules,
            rng=self.runtime.rng,
        )

    async def _resume(self, held: list[Batch], settled: Mapping[bytes, SettledLog]) -> bool:
        """Take up the last checkpoint; returns whether there was one that could be."""
        checkpoint = await self.checkpoints.load()
        if checkpoint is None:
            return False
        try:
            await self._in_lane(partial(self.applied.load, checkpoint.state, held, settled))
        except CheckpointError as error:
            log.warning("checkpoint of no use", reason=error.what)
            return False
        log.info("resumed", step=self.learner.step, records=self.applied.records)
        return True

    def _begin(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(self._take_part, nursery)

    async def _take_part(self, nursery: trio.Nursery) -> None:
        """Who holds nothing begins from a snapshot, if there is one, instead of asking for every batch there was."""
        if not self.logs.records and len(self.book):
            self.phase = "joining"
            with trio.move_on_after(JOIN_S):
                await self._join()
        nursery.start_soon(self.spread.run)
        nursery.start_soon(self._learn)
        nursery.start_soon(self._follow)
        nursery.start_soon(self.snapshots.run)

    async def _join(self) -> None:
        """Return once a snapshot was taken over, or members are heard that know of none."""
        looks = 0
        while self.snapshots.certified is None and looks < JOIN_LOOKS:
            await trio.sleep(JOIN_LOOK_S)
            await self.snapshots.look()
            looks += bool(self.members.peers()) and not self.snapshots.offered

    async def _make_durable(self) -> None:
        if self.author.open:
            await self._seal()
        await self._apply_changes()
        await self._save()

    # --- learning -------------------------------------------------------------------------------------------------

    async def _learn(self) -> None:
        """Probe until all steps are taken; stop for as long as our share of the records is used up."""
        author, probes = self.author, self._one_byte.probes
        while self.learner.step < self.spec.train.steps:
            if author.disowned:
                await self._begin_anew()
            if author.room < probes and author.open:
                await self._seal()
            if author.room < probes:
                self.phase = "waiting"
                await self._progress.wait()
                continue
            self.phase = "training"
            await self._take_step()
            aged_s = trio.current_time() - self._began_batch_s
            if author.room < probes or aged_s >= self._one_byte.batch_s_max:
                await self._seal()
        if author.open:
            await self._seal()
        self.phase = "finished"
        self._progress.made()

    async def _begin_anew(self) -> None:
        """Our log goes on otherwise than we wrote it, or ends in a fork: another life of ours is, or was, at it too."""
        log.warning("our log was continued elsewhere, starting another", log=self.author.log.hex())
        await self._in_lane(self.applied.take_back)
        self.author.begin_anew()

    async def _take_step(self) -> None:
        author = self.author
        began_s = trio.current_time()
        if not author.open:
            self._began_batch_s = began_s
        tokens = self.learner.tokens
        step = partial(self.applied.take_step, author.log, author.next, author.clock)
        probed, took_s = await self._in_lane(
            partial(_timed, step), cost_s=self._one_byte.probes * self.runtime.costs.step_s
        )
        author.add(probed.records)
        elapsed_s = max(trio.current_time() - began_s, 1e-6)
        self._took(1, self.learner.tokens - tokens, probed.loss, elapsed_s)
        self._probe_s = _smoothed(self._probe_s, took_s / len(probed.records))

    async def _seal(self) -> None:
        """Sign what was collected, make it durable, push it; then the weights hold what counts and nothing else."""
        while True:
            if self.author.disowned:
                await self._begin_anew()
                return
            try:
                packed = await self.author.seal()
                break
            except OSError as error:
                self._report_problem(f"records cannot be kept: {error.strerror}; free disk space")
                await trio.sleep(RETRY_S)
        self._problem = ""
        self.spread.publish(packed)
        await self._apply_changes()
        await self._take_stock()

    # --- following ------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Apply what comes to count, whoever made it."""
        while True:
            await self._apply_changes()
            await self._take_stock()
            with trio.move_on_after(STOCK_S):
                await self._progress.wait()

    async def _apply_changes(self) -> None:
        async with self._applying:
            await self._drain()

    async def _drain(self) -> None:
        while any(changes := self.logs.take_changes()):
            await self._apply(*changes)

    async def _apply(self, come: list[Batch], gone: list[Batch]) -> None:
        """In small parts, so that a step or an evaluation need not wait for all of it."""
        for batch in gone:
            await self._in_lane(partial(self.applied.apply, [], [batch]))
        for batch in come:
            _, took_s = await self._in_lane(partial(_timed, partial(self.applied.apply, [batch], [])))
            if batch.author != self.local:
                self._apply_s = _smoothed(self._apply_s, took_s / len(batch.records))

    # --- snapshots: this node as a RecordKeeper -------------------------------------------------------------------

    @property
    def records(self) -> int:
        """How many count."""
        return self.logs.records

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
            return await self._in_lane(partial(self.applied.state_without, above))

    async def settle(self, settlement: Settlement) -> bool:
        """Let what it holds be final; False while not all of it is held here."""
        settled = self.logs.settle(settlement)
        self._progress.made()
        return settled

    async def begin_from(self, settlement: Settlement, state: bytes) -> None:
        """Hold it and what is known beyond it, and nothing else. Raises ValueError."""
        async with self._applying:
            names = self.logs.named(settlement)
            await self._in_lane(partial(self.applied.begin_from, settlement, names, state))
            self.logs.begin_from(settlement)
            await self._drain()
        log.info("began from a snapshot", records=self.logs.records)

    async def forget(self, certified: Certified) -> None:
        """Let go of the batches that it holds, here and on disk."""
        self.logs.forget(certified.settlement)
        held = list(self.logs.batches())
        try:
            await self.archive.keep_above(
                certified.snapshot,
                certified.certificate,
                certified.settlement,
                [batch.packed for batch in held],
            )
        except OSError as error:
            self._report_problem(f"records cannot be kept: {error.strerror}; free disk space")
        else:
            self._archived = {batch.name for batch in held}
        await self._save(always=True)

    async def verify(self) -> Verification:
        """Check every signature and rule again, and take all records back: what is left must be their beginning."""
        async with self._applying:
            await self._drain()
            held, vector = list(self.logs.batches()), self.logs.digest()
            counting = list(self.logs.counting())
            state, began = await self._in_lane(
                lambda: (self.learner.digest(), self.applied.state_without(counting))
            )
        again = RecordLogs(run=self.run_id, signer=self.runtime.signer, rules=self._rules)
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
            counts_alike=again.records == self.logs.records and (again.digest() == vector or self._forked),
            comes_back=sound,
        )

    @property
    def _forked(self) -> bool:
        return any(head.forked for head in self.logs.heads())

    # --- taking stock ---------------------------------------------------------------------------------------------

    async def _take_stock(self) -> None:
        """Work out the state hash, and save, whenever the weights hold what counts and nothing else."""
        now_s = trio.current_time()
        vector = self.logs.digest()
        if vector not in self._states and now_s - self._stock_s >= STOCK_S:
            self._stock_s = now_s
            digest = await self._in_lane(self._exact_digest)
            if digest is not None and vector == self.logs.digest():
                self._states[vector] = digest
                if len(self._states) > STATES_REMEMBERED:
                    del self._states[next(iter(self._states))]
                if self.phase == "finished":
                    self._publish_heartbeat()
                self._progress.made()
        if now_s - self._saved_s >= CHECKPOINT_S:
            await self._save()

    def _exact_digest(self) -> bytes | None:
        exact = self.applied.exact and self.applied.records == self.logs.records
        return self.learner.digest() if exact else None

    async def _save(self, *, always: bool = False) -> None:
        """A segment of what is new, and a checkpoint. Failing is a problem to show, not a reason to die."""
        async with self._saving:
            await self._save_new(always)

    async def _save_new(self, always: bool) -> None:
        new = [batch for batch in self.logs.batches() if batch.name not in self._archived]
        if not new and not always:
            return
        state = await self._in_lane(lambda: self.applied.save() if self.applied.exact else None)
        if state is None:
            return
        self._saved_s = trio.current_time()
        try:
            await self.archive.keep([batch.packed for batch in new])
            self._archived.update(batch.name for batch in new)
            await self.checkpoints.save(self.learner.step, state)
        except OSError as error:
            self._report_problem(f"checkpoint failed: {error.strerror}; free disk space, training goes on")

    async def _in_lane(self, work: Callable[[], T], *, cost_s: float | None = None) -> T:
        if cost_s is None:
            cost_s = self.runtime.costs.copy_s
        return await self.runtime.compute.run(work, lane="train", cost_s=cost_s)


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    """What ``work`` returns and how many seconds it took: the lane's own, and none of waiting for it."""
    began_s = time.perf_counter()
    result = work()
    return result, time.perf_counter() - began_s


def _smoothed(mean: float, value: float) -> float:
    return value if mean == 0.0 else 0.9 * mean + 0.1 * value


def rules_of(spec: OneByteSpec) -> LogRules:
    """The rules of the logs of a run."""
    return LogRules(
        records_max=spec.batch_records,
        allowance=spec.log_allowance,
        share_percent=spec.log_share_percent,
        reach=spec.log_reach,
        opening_cost=spec.log_opening_cost,
    )
