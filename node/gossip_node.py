"""The node of gossip mode: trains its own replica, mixes with a few peers at a time, merges with all on schedule.

Owns the wiring of the mode: which part hears what from which other part. A reader who follows a shard goes
``node.exchange`` -> ``gossip.shard_transfer`` -> ``gossip.store``; who follows a merge goes ``gossip.merging`` ->
``node.merge_host`` -> ``node.merges``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import structlog
import trio

from gossip.merge_record import genesis_hash
from gossip.merging import Merger
from gossip.messages import Heartbeat
from node.checkpoints import Checkpointer
from node.exchange import Exchanger
from node.foretelling import foretell
from node.life import NodeState
from node.merge_host import Adoption, NodeMergeHost
from node.merge_values import MergeValues
from node.merges import Merges
from node.node import LOSS_TOLD_MAX, Node, Weights, Which
from node.pairs import PairExchanger
from node.partners import Partners
from node.rounds import AwaitFinalMerge, Exchange, Finished, MemberProgress, Rounds, Train
from node.runtime import NodeOptions, Runtime
from node.snapshot_pulls import SnapshotPuller
from node.snapshots import Snapshots
from node.status import Foretold
from p2p.errors import GossamerError
from p2p.transport import PeerId
from training.codecs.named import WIRES
from training.learner import Learner
from training.merge_math import weights_hash
from training.mixing import BEGINNER_TOKENS_SHARE
from training.outer_state import streams, updates_of
from training.run_spec import RunSpec
from training.schedules import Schedule
from training.spec_sections import PairsSpec

log = structlog.get_logger()

SLICE_S = 0.1
"""Inner steps run in slices of about this long, so that reads and writes of the weights wait no longer."""


class GossipNode(Node):
    """One peer of one run in gossip mode."""

    def __init__(
        self,
        runtime: Runtime,
        options: NodeOptions,
        *,
        spec: RunSpec,
        state: NodeState,
        trainer: Learner,
        eligible: Callable[[PeerId], bool] | None = None,
    ) -> None:
        """``eligible``: whom of the members this node may mix with; None is everybody."""
        super().__init__(runtime, options, spec=spec, state=state)
        self.trainer = trainer
        self._eligible = eligible or (lambda peer: True)
        adoptions_in, adoptions_out = trio.open_memory_channel[Adoption](16)
        self._exchanges_in, self._exchanges_out = trio.open_memory_channel[Exchange](1)
        limits = options.limits
        schedule = Schedule.of(spec)
        updates, alike = updates_of(spec.outer), spec.init == "shared"
        self.checkpointer = Checkpointer(
            self.checkpoints,
            trainer=trainer,
            compute=runtime.compute,
            costs=runtime.costs,
            based_on=lambda: self.merge_host.head,
            taken=lambda head: self.merges.remember(head),
        )
        self.merge_host = NodeMergeHost(
            local=self.local,
            genesis=genesis_hash(self.run_id),
            trainer=trainer,
            compute=runtime.compute,
            costs=runtime.costs,
            store=self.store,
            fetcher=self.fetcher,
            values=MergeValues(
                layout=trainer.layout,
                compute=runtime.compute,
                costs=runtime.costs,
                store=self.store,
                ledger=self.ledger,
                updates=updates,
                alike=alike,
                outliers=spec.outliers,
                streaming=streams(spec.outer),
                points=len(schedule.merge_points),
                # Several owners of one piece must come to the same bytes, and owe different things.
                owes=spec.merge.replicas == 1,
            ),
            alive=self._alive,
            unheard_s=self._unheard_s,
            void_mixes=lambda: self.exchanger.void_mixes(),
            is_elder=self._is_elder,
            adopted=adoptions_in.send_nowait,
            tokens_at_anchor=state.tokens_at_anchor,
            initial=trainer.read() if updates and alike else None,
        )
        self.merger = Merger(
            transport=runtime.transport,
            signer=runtime.signer,
            run=self.run_id,
            disk=runtime.disk,
            host=self.merge_host,
            shape=self.merge_host.shape,
            replicas=spec.merge.replicas,
            merge_period_s=spec.merge.period_s,
            limits=limits,
            rng=runtime.rng,
            note=self.ledger.note,
            reach=self.links.reach,
        )
        self.snapshots = Snapshots(
            transport=runtime.transport,
            trainer=trainer,
            compute=runtime.compute,
            costs=runtime.costs,
            store=self.store,
            ledger=self.ledger,
            limits=limits,
            peers_max=schedule.peers_max,
            wire=spec.exchange.wire,
        )
        self._puller = SnapshotPuller(
            codec=WIRES[spec.exchange.wire],
            layout=trainer.layout,
            transport=runtime.transport,
            compute=runtime.compute,
            costs=runtime.costs,
            fetcher=self.fetcher,
            ledger=self.ledger,
            limits=limits,
            pacer=self._pull_pacer,
        )
        self.exchanger = self._build_exchanger(spec, schedule)
        self.rounds = Rounds(
            steps_total=spec.train.steps,
            every_steps=spec.exchange.every_steps,
            fragments=trainer.layout.fragments,
            merge_points=schedule.merge_points,
            exchanging=schedule.exchanges,
        )
        self.merges = Merges(
            runtime=runtime,
            trainer=trainer,
            rounds=self.rounds,
            wait_s_max=spec.merge.wait_s_max,
            merger=self.merger,
            host=self.merge_host,
            notices=self.notices,
            state=state,
            adoptions=adoptions_out,
            members=self._progress_of_alive,
            others_known=lambda: len(self.book) > 0,
            progress=self._progress,
            settled=self._merge_settled,
        )

    def _build_exchanger(self, spec: RunSpec, schedule: Schedule) -> Exchanger | PairExchanger:
        runtime = self.runtime
        partners = Partners(
            spec.exchange.partners,
            rng=runtime.rng,
            members=self.members.peers,
            may_mix_with=self._may_mix_with,
        )
        if isinstance(spec.outer, PairsSpec):
            return PairExchanger(
                spec=spec.outer,
                codec=WIRES[spec.exchange.wire],
                every_steps=spec.exchange.every_steps,
                schedule=schedule,
                run=self.run_id,
                signer=runtime.signer,
                transport=runtime.transport,
                trainer=self.trainer,
                compute=runtime.compute,
                costs=runtime.costs,
                store=self.store,
                fetcher=self.fetcher,
                ledger=self.ledger,
                limits=self.limits,
                rng=runtime.rng,
                partners=partners,
                may_mix_with=self._may_mix_with,
                is_elder=self._is_elder,
                pacer=self._pull_pacer,
            )
        return Exchanger(
            spec=spec.exchange,
            schedule=schedule,
            trainer=self.trainer,
            compute=runtime.compute,
            costs=runtime.costs,
            puller=self._puller,
            rng=runtime.rng,
            partners=partners,
            outliers=spec.outliers,
            note=self.ledger.note,
            is_elder=self._is_elder,
        )

    async def foretell(self, bytes_max: int) -> Foretold:
        """What a merge would come to now; nothing is adopted. Raises GossamerError where there is nobody else."""
        return await foretell(
            local=self.local,
            runtime=self.runtime,
            trainer=self.trainer,
            puller=self._puller,
            alive=self._alive(),
            bytes_max=bytes_max,
        )

    @property
    def step(self) -> int:
        """Inner steps taken since the run began."""
        return self.trainer.step

    @property
    def tokens(self) -> int:
        """What they learned from."""
        return self.trainer.tokens

    def facts(self) -> dict[str, int]:
        """Mixes so far."""
        return {"mixes": self.exchanger.mixes}

    async def weights(self, which: Which) -> Weights:
        """Our own weights, or the anchor's. Raises GossamerError when there is no anchor."""
        if which == "live":
            values = await self.runtime.compute.run(
                self.trainer.read, lane="train", cost_s=self.runtime.costs.copy_s
            )
        elif self.merge_host.anchor is None:
            raise GossamerError(
                "there is no merged model yet",
                why="no global merge has been committed in this run",
                fix="start one: gossamer merge now    or take this node's own weights: --which live",
            )
        else:
            values = self.merge_host.anchor
        return Weights(self.trainer.layout.views(values), weights_hash(values))

    async def wait_finished(self) -> None:
        """Return once all inner steps are taken and all scheduled merges are committed, measured and remembered."""
        while not isinstance(self.rounds.plan(), Finished):
            await self._progress.wait()

    def current_problem(self) -> str:
        """What stands in the way now, for people; empty when nothing does."""
        if self.ledger.resting:
            return self.ledger.resting
        parts = (self.merger, self.links, self.merges, self.checkpointer)
        return next((part.problem for part in parts if part.problem), self._problem)

    # --- starting and stopping --------------------------------------------------------------------------------

    async def _remember(self) -> None:
        await self.merger.load()
        checkpoint = await self.checkpoints.load()
        if checkpoint is not None:
            await self.runtime.compute.run(
                partial(self.trainer.load, checkpoint.state), lane="train", cost_s=self.runtime.costs.copy_s
            )
            self.rounds.resume(self.trainer.step)
            log.info("resumed", step=self.trainer.step)
        if self.merger.head_record is not None:
            self.rounds.merge_committed(self.merger.head_record.record.point)

    def _begin(self, nursery: trio.Nursery) -> None:
        self.snapshots.serve()
        if isinstance(self.exchanger, PairExchanger):
            self.exchanger.serve(nursery)
        nursery.start_soon(self.merger.run)
        nursery.start_soon(self._train)
        nursery.start_soon(self._exchange)
        nursery.start_soon(self.merges.run)
        nursery.start_soon(self.checkpointer.run)

    async def wait_settled(self) -> None:
        """Return when no merge is under way. Of one that this process has contributed to, the next would know no more
        what it contributed, and could only take the average in place of its weights."""
        await self.merges.wait_settled()

    async def _make_durable(self) -> None:
        await self.checkpointer.take()

    async def _merge_settled(self) -> None:
        """The others are told of a merge taken over here, and it becomes durable.

        Where merges follow each other within seconds most wait for the next checkpoint: a life that begins before it
        puts its weights on the last anchor once more, and all it has lost is the steps since.
        """
        self._problem = ""
        self._publish_heartbeat()
        self._progress.made()
        if isinstance(self.rounds.plan(), Train):
            await self.checkpointer.take_unless_recent()
        else:
            await self.checkpointer.take()

    # --- training and exchanging ------------------------------------------------------------------------------

    async def _train(self) -> None:
        slice_steps = 1
        while True:
            match self.rounds.plan():
                case Train(steps_max=steps_max):
                    self.phase = "training"
                    slice_steps = await self._train_slice(min(slice_steps, steps_max))
                case AwaitFinalMerge():
                    self.phase = "merging"
                    await self._progress.wait()
                case Finished():
                    self.phase = "finished"
                    await self._progress.wait()

    async def _train_slice(self, steps: int) -> int:
        """Take ``steps`` inner steps; returns how many make the next slice about ``SLICE_S`` long."""
        began_s = trio.current_time()
        report = await self.runtime.compute.run(
            partial(self.trainer.run_slice, steps), lane="train", cost_s=steps * self.runtime.costs.step_s
        )
        elapsed_s = max(trio.current_time() - began_s, 1e-6)
        self._took(steps, report.tokens, report.loss, elapsed_s)
        due = self.rounds.trained(self.trainer.step)
        if due is not None:
            self._exchanges_in.send_nowait(due)
        if not isinstance(self.rounds.plan(), Train):
            self._publish_heartbeat()
            self._progress.made()
        return max(1, round(SLICE_S * steps / elapsed_s))

    async def _exchange(self) -> None:
        async for due in self._exchanges_out:
            try:
                await self.exchanger.exchange(due)
                self._problem = ""
            except (GossamerError, OSError) as error:
                self._report_problem(f"exchange skipped: {error}")
            finally:
                self.rounds.exchange_ended()

    # --- members ------------------------------------------------------------------------------------------------------

    def _may_mix_with(self, peer: PeerId) -> bool:
        """Whether ``peer`` is alive, not banned and no beginner, whose weights would undo what was learned here."""
        member = self.members.get(peer, trio.current_time())
        if member is None or member.state != "alive":
            return False
        grown = member.heartbeat.tokens >= BEGINNER_TOKENS_SHARE * self.trainer.tokens
        return grown and self._eligible(peer) and not self.ledger.shuns(peer)

    def _is_elder(self, peer: PeerId) -> bool:
        """Whether ``peer`` says it has learned so much more that our weights are no measure for its own."""
        beat = self._heartbeat_of(peer)
        return beat is not None and self.trainer.tokens < BEGINNER_TOKENS_SHARE * beat.tokens

    def _heard(self, author: PeerId, beat: Heartbeat) -> None:
        self.merger.heads_changed(author, beat.head, beat.head_height, beat.head_participants)

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(
            addresses=list(self.runtime.transport.local.addresses)[: self.limits.addresses_per_peer_max],
            agent=self._agent,
            step=self.trainer.step,
            steps_total=self.rounds.steps_total,
            steps_per_s=self.steps_per_s,
            tokens=self.trainer.tokens,
            loss=min(self.loss or 0.0, LOSS_TOLD_MAX),
            head=self.merger.head,
            head_height=self.merger.head_height,
            head_participants=self.merger.head_participants,
            # A goodbye stands: who stops has a last checkpoint to write and merges to finish, and beats meanwhile.
            leaving=self._leaving,
            records=0,
            vector=b"",
            state=b"",
        )

    def _progress_of_alive(self) -> list[MemberProgress]:
        own = MemberProgress(self.trainer.step, self.rounds.steps_total, self.steps_per_s)
        words = self.members.words_of_alive(trio.current_time())
        return [own, *(_progress_now(beat, unheard_s) for _, beat, unheard_s in words)]


def _progress_now(beat: Heartbeat, unheard_s: float) -> MemberProgress:
    """Where a member should be by now: in a large swarm its last word is some time old."""
    step = min(beat.step + beat.steps_per_s * unheard_s, max(beat.steps_total, beat.step))
    return MemberProgress(step, beat.steps_total, beat.steps_per_s)
