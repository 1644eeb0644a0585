"""The node of one-byte mode: probes directions on its own data, and applies what everybody's probes said.

Owns the wiring of the mode, and the way of a record: probed and applied here (``node.applied_records``), collected into
a batch that is signed and durable (``gossip.record_author``), pushed (``gossip.log_spread``), counted at every node
alike (``gossip.record_logs``) and applied there. There are no rounds and no agreement: who holds the same batches holds
the same weights.
"""

from __future__ import annotations

import structlog
import trio

from gossip.log_spread import LogSpread
from gossip.messages import Heartbeat
from gossip.record_author import RecordAuthor
from gossip.record_batches import LogRules
from node.base import files_ref, weights_ref
from node.life import NodeState
from node.node import LOSS_TOLD_MAX, Node, Weights, Which
from node.record_keeper import RecordKeeper
from node.record_snapshots import RecordSnapshots
from node.runtime import NodeOptions, Runtime
from p2p.transport import PeerId
from training.one_byte import RecordLearner
from training.run_spec import RunSpec
from training.spec_sections import OneByteSpec

LOOK_S = 1.0
"""A state hash may be due although nothing new has come."""
JOIN_S = 600.0
"""The longest that a newcomer tries to come to where the others are before it learns."""
RETURN_S = 30.0
"""The longest that a node waits to hear what members hold of its own log: its disk may be an older one, put back; to go
on from there would be a fork."""
JOIN_LOOK_S = 0.5
JOIN_LOOKS = 6
"""Looks at what members tell, before a newcomer takes it that there is no snapshot."""
RETRY_S = 5.0
"""After the disk would not take a batch."""
FINISH_S = 120.0
"""Without any news: whoever says that it is not done, or that it holds something else, is waited for no longer."""
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
        self._one_byte: OneByteSpec = spec.one_byte
        self._rules = rules_of(spec.one_byte)
        self.keeper = RecordKeeper(
            runtime,
            run=self.run_id,
            rules=self._rules,
            learner=learner,
            checkpoints=self.checkpoints,
            changed=self._state_known,
        )
        self.logs = self.keeper.logs
        self.applied = self.keeper.applied
        self.spread = LogSpread(
            transport=runtime.transport,
            logs=self.logs,
            ledger=self.ledger,
            limits=options.limits,
            rng=runtime.rng,
            changed=self._news,
            company=self.links,
        )
        self.snapshots = RecordSnapshots(
            local=self.local,
            notices=self.notices,
            store=self.store,
            fetcher=self.fetcher,
            ledger=self.ledger,
            keeper=self.keeper,
            alive=self._alive,
            learned=self._learned_members,
            every_records=spec.one_byte.snapshot_records,
            votes_needed=spec.one_byte.snapshot_votes,
        )
        self.remembers = False
        """Whether what earlier lives have written is known; nothing can be told of records before."""
        self.author: RecordAuthor
        """Who writes our log, once this node remembers."""
        self._began_batch_s = 0.0
        self._learned = trio.Event()
        """Set while no steps are taken and all records are sealed."""
        self._learned.set()
        self._news_s = trio.current_time()
        """When something last came that was not held, or a member came or went."""
        self._were_alive: list[PeerId] = []
        self._contradicted: dict[PeerId, Heartbeat] = {}
        """Of members that told of another state at a vector of ours: their last word."""

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
            found = await self.keeper.in_lane(self.keeper.weights)
            if found is not None:
                return found
            await self._progress.wait()

    async def wait_finished(self) -> None:
        """Return once our steps are taken and everybody who is alive is done too and has told of our vector."""
        while not self._finished():
            await self._progress.wait()

    def _finished(self) -> bool:
        if self.phase != "finished" or self.keeper.state_hash is None:
            return False
        now_s = trio.current_time()
        if now_s - self._news_s > max(FINISH_S, 3 * self._one_byte.batch_s_max):
            return True
        beats = [beat for _, beat, _ in self.members.words_of_alive(now_s)]
        return all(beat.step >= beat.steps_total and beat.vector == self.logs.digest() for beat in beats)

    @property
    def diverged(self) -> PeerId | None:
        """A member that holds what we hold and comes to another state; None where others come to ours."""
        beats = self.members.words_of_alive(trio.current_time())
        if any(beat.state and beat.state == self.keeper.state_at(beat.vector) for _, beat, _ in beats):
            return None
        return next((peer for peer, beat, _ in beats if self._contradicted.get(peer) is beat), None)

    def current_problem(self) -> str:
        """What stands in the way now, for people; empty when nothing does."""
        if self.diverged is not None:
            return (
                f"{self.diverged} holds the same records and other weights; one of the two machines is broken: "
                "run gossamer log verify on both"
            )
        return self.links.problem or self.keeper.problem or self._problem

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
            leaving=self._leaving,
            records=self.logs.records,
            vector=self.logs.digest(),
            state=self.keeper.state_hash or b"",
        )

    def _heard(self, author: PeerId, beat: Heartbeat) -> None:
        if beat.vector:
            self.spread.heard_digest(author, beat.vector)
        ours = self.keeper.state_at(beat.vector)
        if beat.state and ours is not None and beat.state != ours:
            members = self.members.peers()
            self._contradicted = {peer: told for peer, told in self._contradicted.items() if peer in members}
            self._contradicted[author] = beat
            self.ledger.note(author, "other-state", "at the records that we hold")
            if self.diverged is not None:
                log.error("weights differ at the same records", peer=author, vector=beat.vector.hex())
        else:
            self._contradicted.pop(author, None)
        if (alive := self._alive()) != self._were_alive:
            self._were_alive, self._news_s = alive, trio.current_time()
        self._progress.made()

    def _learned_members(self) -> list[PeerId]:
        words = self.members.words_of_alive(trio.current_time())
        holding = [peer for peer, beat, _ in words if beat.records]
        return [*holding, self.local] if self.logs.records else holding

    def _news(self) -> None:
        self._news_s = trio.current_time()
        self._progress.made()

    # --- starting and stopping ------------------------------------------------------------------------------------

    async def _remember(self) -> None:
        for ref in (files_ref(self.spec), weights_ref(self.spec)):
            if ref is not None:
                self.store.pin(ref, "base")  # Newcomers ask for it.
        certified = await self.keeper.load(self.store)
        if certified is not None:
            await self.snapshots.resume(certified)
        self.author = RecordAuthor(
            run=self.run_id,
            signer=self.runtime.signer,
            logs=self.logs,
            archive=self.keeper.archive,
            rules=self._rules,
            rng=self.runtime.rng,
        )
        self.remembers = True

    def _begin(self, nursery: trio.Nursery) -> None:
        nursery.start_soon(self._take_part, nursery)

    async def _take_part(self, nursery: trio.Nursery) -> None:
        """Go first where the others are; who holds nothing waits longer for them than who has been there before."""
        joining = not self.logs.records
        until_s = trio.current_time() + (JOIN_S if joining else RETURN_S)
        if joining and len(self.book):
            self.phase = "joining"
            with trio.move_on_at(until_s):
                await self._find_snapshot()
        nursery.start_soon(self.spread.run)
        nursery.start_soon(self._follow)
        nursery.start_soon(self.snapshots.run)
        if len(self.book):
            with trio.move_on_at(until_s):
                await self._catch_up()
        nursery.start_soon(self._learn)

    async def _find_snapshot(self) -> None:
        """Return once one was taken over, which spares all batches below it, or members are heard that know of none."""
        looks = 0
        while self.snapshots.certified is None and looks < JOIN_LOOKS:
            await trio.sleep(JOIN_LOOK_S)
            await self.snapshots.look()
            looks += bool(self.members.peers()) and not self.snapshots.offered

    async def _catch_up(self) -> None:
        """Return once the weights hold all that one member held."""
        await self.spread.exchange.compared.wait()
        await self.keeper.apply_changes()

    async def wait_settled(self) -> None:
        """Every moment is good: whatever is collected when this node stops is sealed and kept."""

    async def _make_durable(self) -> None:
        self._progress.made()  # Who waits for more room to learn is to notice that there is no need of it.
        await self._learned.wait()
        await self.keeper.apply_changes()
        await self.keeper.save()

    # --- learning -------------------------------------------------------------------------------------------------

    async def _learn(self) -> None:
        """Probe until all steps are taken; stop for as long as our share of the records is used up."""
        author, probes = self.author, self._one_byte.probes
        self._learned = trio.Event()
        while self.learner.step < self.spec.train.steps and not self._stopping.is_set():
            if author.disowned:
                await self._begin_anew("it was continued elsewhere")
            elif author.stranded:
                await self._begin_anew("it waits for records that a fork took away")
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
        if not self._stopping.is_set():
            self.phase = "finished"
        self._learned.set()
        self._progress.made()

    async def _begin_anew(self, why: str) -> None:
        """Our log goes on otherwise than we wrote it, or ends in a fork: another life of ours is, or was, at it too. Or
        nobody would count what we added to it."""
        log.warning("starting another log", why=why, log=self.author.log.hex())
        await self.keeper.take_back()
        self.author.begin_anew()

    async def _take_step(self) -> None:
        author = self.author
        began_s = trio.current_time()
        if not author.open:
            self._began_batch_s = began_s
        tokens = self.learner.tokens
        cost_s = self._one_byte.probes * self.runtime.costs.step_s
        clock = author.clock
        probed = await self.keeper.take_step(author.log, author.next, clock, cost_s=cost_s)
        author.add(probed.records, clock)
        elapsed_s = max(trio.current_time() - began_s, 1e-6)
        self._took(1, self.learner.tokens - tokens, probed.loss, elapsed_s)

    async def _seal(self) -> None:
        """Sign what was collected, make it durable, push it; then the weights hold what counts and nothing else."""
        while True:
            if self.author.disowned:
                await self._begin_anew("it was continued elsewhere")
                return
            try:
                packed = await self.author.seal()
                break
            except OSError as error:
                self._report_problem(f"records cannot be kept: {error.strerror}; free disk space")
                await trio.sleep(RETRY_S)
        self._problem = ""
        self.spread.publish(packed)
        await self.keeper.apply_changes()
        await self.keeper.take_stock()

    # --- following ------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Apply what comes to count, whoever made it."""
        while True:
            await self.keeper.apply_changes()
            await self.keeper.take_stock()
            with trio.move_on_after(LOOK_S):
                await self._progress.wait()

    def _state_known(self) -> None:
        if self.phase == "finished":
            self._publish_heartbeat()
        self._progress.made()


def rules_of(spec: OneByteSpec) -> LogRules:
    """The rules of the logs of a run."""
    return LogRules(
        records_max=spec.batch_records,
        allowance=spec.log_allowance,
        share_percent=spec.log_share_percent,
        reach=spec.log_reach,
        opening_cost=spec.log_opening_cost,
    )
